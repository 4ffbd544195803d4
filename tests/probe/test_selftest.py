"""Wrong derivatives are found before anything is logged from them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from spectral_callbacks.linalg import Matrix
from spectral_callbacks.operators import Hessian, ParameterSpace
from spectral_callbacks.probe import (
    Probe,
    WrongDerivativeError,
    check_reached,
    check_symmetry,
    undisturbed,
    unreached_parameters,
)
from tests.faults import NestedBackward, SkewedSquare


class WrongSquare(nn.Module):
    """A layer with a right gradient and a wrong second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return SkewedSquare.apply(self.linear(x))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x[:, None, :].expand(-1, 3, -1))[0][:, -1]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(3, 1, dim_feedforward=4, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x[:, None, :].expand(-1, 3, -1))


class Words(nn.Module):
    def __init__(self, *, scale_grad_by_freq: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3, scale_grad_by_freq=scale_grad_by_freq)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        words = torch.tensor([0, 1, 1, 1, 2, 2, 0, 3])
        return self.head(torch.tanh(self.embedding(words))) * x.mean()


SOUND: dict[str, Callable[[], nn.Module]] = {
    "perceptron": lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)),
    "ReLU": lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)),
    "one weight": lambda: nn.Linear(3, 1, bias=False),
    "batch norm": lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.GELU(), nn.Linear(5, 2)),
    "group norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.SiLU()),
    "layer norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1)),
    "dropout": lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 1)),
    "lstm": Recurrent,
    "transformer": Attention,
    "embedding": Words,
    "weight norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh()),
    "spectral norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh()),
}


def square_loss(module: nn.Module, x: Tensor) -> Tensor:
    return (module(x) - 1).square().mean()


def probe_of(module: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor] = square_loss) -> Probe:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 3, generator=generator)
    return Probe(module, torch.optim.SGD(module.parameters(), lr=0.1), [x], loss=loss)


def is_told(module: nn.Module, seed: int = 0) -> bool:
    with probe_of(module) as probe:
        generator = torch.Generator().manual_seed(seed)
        return check_symmetry(probe.operator(Hessian), probe.space, module, generator=generator)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", SOUND)
def test_a_sound_network_passes(kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    assert is_told(SOUND[kind](), seed)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_verdict_does_not_depend_on_the_unit_of_the_loss(scale: float) -> None:
    sound = SOUND["perceptron"]()
    wrong = nn.Sequential(WrongSquare())
    generator = torch.Generator().manual_seed(0)
    with probe_of(sound, lambda m, x: scale * square_loss(m, x)) as probe:
        assert check_symmetry(probe.operator(Hessian), probe.space, sound, generator=generator)
    with (
        probe_of(wrong, lambda m, x: scale * square_loss(m, x)) as probe,
        pytest.raises(WrongDerivativeError, match=r"in 0\.linear"),
    ):
        check_symmetry(probe.operator(Hessian), probe.space, wrong, generator=generator)


@pytest.mark.parametrize("seed", range(3))
def test_a_wrong_second_derivative_is_reported_with_the_name_of_its_module(seed: int) -> None:
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    module = nn.ModuleDict({"body": body, "neck": WrongSquare(), "head": nn.Linear(3, 1)})
    module.forward = lambda x: module["head"](module["neck"](module["body"](x)))
    with pytest.raises(WrongDerivativeError, match=r"the second derivative is wrong in (body\.0, )?neck\.linear"):
        is_told(module, seed)


def test_an_embedding_that_scales_its_gradient_by_frequency_is_found() -> None:
    with pytest.raises(WrongDerivativeError, match=r"wrong between (embedding and head|head and embedding)"):
        is_told(Words(scale_grad_by_freq=True))


@pytest.mark.parametrize(("row", "column", "pair"), [(0, 7, {"0", "2"}), (5, 0, {"0", "1"}), (6, 5, {"1", "2"})])
def test_a_defect_between_modules_is_reported_with_the_names_of_both(row: int, column: int, pair: set[str]) -> None:
    matrix = torch.diag(torch.linspace(1.0, 8.0, 8))
    matrix[row, column] = 3.0
    module = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 1), nn.Linear(1, 1))
    space = ParameterSpace(module)
    names = "|".join(f"{a} and {b}" for a, b in (sorted(pair), sorted(pair, reverse=True)))
    with pytest.raises(WrongDerivativeError, match=f"wrong between ({names}):"):
        check_symmetry(Matrix(matrix), space, module, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("noise", [None, 0.1])
def test_a_matrix_passes_as_far_as_its_products_may_be_noisy(noise: float | None) -> None:
    module = nn.Linear(49, 1)
    space, generator = ParameterSpace(module), torch.Generator().manual_seed(0)
    symmetric = torch.randn(50, 50)
    symmetric = symmetric + symmetric.T
    slightly_off = Matrix(symmetric + 1e-2 * torch.randn(50, 50))
    if noise is None:
        with pytest.raises(WrongDerivativeError):
            check_symmetry(slightly_off, space, module, generator=generator)
    else:
        assert check_symmetry(slightly_off, space, module, generator=generator, noise=noise)


def test_products_that_are_zero_leave_the_question_open() -> None:
    module = nn.Linear(3, 1)
    with probe_of(module, lambda m, x: m(x).sum()) as probe:
        generator = torch.Generator().manual_seed(0)
        assert not check_symmetry(probe.operator(Hessian), probe.space, module, generator=generator)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_products_that_are_not_finite_leave_the_question_open(value: float) -> None:
    module = nn.Linear(3, 1)
    matrix = torch.eye(4)
    matrix[0, 0] = value
    generator = torch.Generator().manual_seed(0)
    assert not check_symmetry(Matrix(matrix), ParameterSpace(module), module, generator=generator)


def test_two_products_are_spent_where_all_is_well() -> None:
    module = nn.Linear(3, 1)
    matrix, counted = torch.eye(4), []

    class Counted(Matrix):
        def matmat(self, X: Tensor) -> Tensor:
            counted.append(X.shape[1])
            return super().matmat(X)

    check_symmetry(Counted(matrix), ParameterSpace(module), module, generator=torch.Generator().manual_seed(0))
    assert sum(counted) == 2


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        self.unused = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return NestedBackward.apply(self.first(x), self.second)


def unreached_in(module: nn.Module) -> tuple[tuple[str, ...], ParameterSpace]:
    space = ParameterSpace(module)
    with undisturbed(module) as isolation:
        loss = isolation.evaluate(lambda: module(torch.ones(2, 3)).sum(), seed=0)
        return unreached_parameters(loss, space), space


def test_parameters_behind_a_backward_pass_of_its_own_are_unreached() -> None:
    names, _ = unreached_in(Checkpointed())
    assert names == ("second.0.weight", "second.0.bias", "unused.weight", "unused.bias")


@pytest.mark.parametrize("kind", SOUND)
def test_every_parameter_of_an_ordinary_network_is_reached(kind: str) -> None:
    names, _ = unreached_in(SOUND[kind]())
    assert names == ()


def test_a_deep_graph_is_walked() -> None:
    module = nn.Linear(3, 3)
    space, x = ParameterSpace(module), torch.ones(1, 3)
    loss = module(x).sum()
    for _ in range(5_000):
        loss = loss + 1
    assert unreached_parameters(loss, space) == ()


def test_a_loss_without_a_graph_reaches_nothing() -> None:
    assert unreached_parameters(torch.ones(()), ParameterSpace(nn.Linear(1, 1))) == ("weight", "bias")


def test_training_that_reaches_more_than_the_probe_is_an_error_naming_the_module() -> None:
    module = Checkpointed()
    names, space = unreached_in(module)
    check_reached(names, space)
    module(torch.ones(2, 3)).sum().backward()
    with pytest.raises(
        WrongDerivativeError, match=r"second\.0\.weight, second\.0\.bias, .* curvature of second\.0 would"
    ):
        check_reached(names, space)


def test_training_that_reaches_no_more_is_none() -> None:
    module = nn.ModuleDict({"used": nn.Linear(3, 1), "unused": nn.Linear(3, 1)})
    module.forward = lambda x: module["used"](x)
    names, space = unreached_in(module)
    module(torch.ones(2, 3)).sum().backward()
    module["unused"].weight.grad = torch.zeros(1, 3)
    check_reached(names, space)
    assert names == ("unused.weight", "unused.bias")


def test_scaling_by_frequency_is_wrong_in_plain_torch_too() -> None:
    weight = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    words = torch.tensor([0, 0, 1])

    def loss(weight: Tensor) -> Tensor:
        return F.embedding(words, weight, scale_grad_by_freq=True).square().sum()

    assert not torch.autograd.gradcheck(loss, weight, raise_exception=False)

"""One factor for all weights gives a layer the entropy that was asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectral_callbacks.init.entropy import EntropyScale, scale_to_entropy_
from spectral_callbacks.init.scale_search import UnreachedError, search_scale

N = 60
TOLERANCE = 0.01


def entropy(features: Tensor, sigma: float, t: int = 1, alpha: float = 0.0) -> float:
    """Bits, from the matrix of every pair and every sample by its definition; float64."""
    X = features.detach().double().flatten(1)
    squared = torch.stack([(X - x).square().sum(1) for x in X])
    G = torch.exp(-squared / (2 * sigma**2))
    density = G.sum(1)
    G = G / torch.outer(density, density) ** alpha
    degree = G.sum(1)
    eigenvalues = torch.linalg.eigvals(G / degree[:, None]).real.abs() ** t  # of the random walk itself
    p = eigenvalues / eigenvalues.sum()
    return -torch.special.xlogy(p, p).sum().item() / math.log(2)


class Tied(nn.Module):
    """Two layers that share a weight, and a bias each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 3))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.Flatten(), nn.Linear(216, 5)
    )


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(nn.Linear(3, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 2))


def recurrent() -> nn.Module:
    return nn.Sequential(nn.Embedding(11, 7), nn.LSTM(7, 5, batch_first=True))


Case = tuple[Callable[[], nn.Module], tuple[int, ...], str, float, float]
NETS: dict[str, Case] = {
    "mlp": (mlp, (N, 6), "3", 4.0, 1.0),
    "mlp-down": (mlp, (N, 6), "2", 1.0, 0.5),
    "mlp-itself": (mlp, (N, 6), "", 2.0, 10.0),
    "conv": (conv, (N, 1, 8, 8), "3", 3.0, 10.0),
    "transformer": (transformer, (N, 5, 3), "2", 4.0, 1.0),
    "tied": (Tied, (N, 6), "second", 4.5, 10.0),
}


def drawn(case: Case, generator: torch.Generator) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = case[0]()
    return net, torch.randn(case[1], generator=generator)


def output_of(net: nn.Module, layer: str, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    modes = {module: module.training for module in net.modules()}
    net.eval()
    with torch.no_grad(), net.get_submodule(layer).register_forward_hook(lambda *a: seen.append(a[-1])):
        net(x)
    for module, mode in modes.items():
        module.training = mode
    return seen[0]


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def bit_identical(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", NETS)
def test_the_layer_has_the_target_by_an_independent_reckoning(name: str, generator: torch.Generator) -> None:
    net, x = drawn(NETS[name], generator)
    _, _, layer, target, sigma = NETS[name]
    before = entropy(output_of(net, layer, x), sigma)
    assert abs(before - target) > 0.1
    found = scale_to_entropy_(net, x, layer=layer, target=target, sigma=sigma, generator=generator)
    assert (found.scale < 1) == (before > target)
    assert found.entropy == pytest.approx(target, abs=TOLERANCE)
    assert entropy(output_of(net, layer, x), sigma) == pytest.approx(found.entropy, abs=1e-4)
    assert found.tried[0] == (1.0, pytest.approx(before, abs=1e-4))
    assert found.tried[-1] == (found.scale, found.entropy)


@pytest.mark.parametrize("name", NETS)
def test_matrices_are_the_old_ones_times_the_scale_and_nothing_else_moves(
    name: str, generator: torch.Generator
) -> None:
    net, x = drawn(NETS[name], generator)
    before = state(net)
    _, _, layer, target, sigma = NETS[name]
    found = scale_to_entropy_(net, x, layer=layer, target=target, sigma=sigma, generator=generator)
    for parameter, value in net.state_dict().items():
        factor = found.scale if value.ndim >= 2 else 1.0
        assert torch.equal(value, before[parameter] * factor), parameter


@pytest.mark.parametrize(("t", "alpha"), [(2, 0.0), (1, 0.5), (3, 1.0)])
def test_time_and_anisotropy_of_the_kernel_are_those_asked_for(
    t: int, alpha: float, generator: torch.Generator
) -> None:
    net, x = drawn(NETS["mlp"], generator)
    found = scale_to_entropy_(net, x, layer="3", target=3.0, sigma=1.0, t=t, alpha=alpha, generator=generator)
    assert entropy(output_of(net, "3", x), 1.0, t, alpha) == pytest.approx(3.0, abs=TOLERANCE + 1e-4)
    assert found.entropy == pytest.approx(3.0, abs=TOLERANCE)


@pytest.mark.parametrize(("sigma", "width"), [("official", 10.0), ("sqrt_dim", 20**0.5)])
def test_the_widths_by_name_do_not_follow_the_scale(sigma: Any, width: float, generator: torch.Generator) -> None:
    net, x = drawn(NETS["mlp"], generator)
    scale_to_entropy_(net, x, layer="2", target=2.0, sigma=sigma, generator=generator)
    assert entropy(output_of(net, "2", x), width) == pytest.approx(2.0, abs=TOLERANCE + 1e-4)


def test_a_tolerance_is_kept_and_a_finer_one_takes_more_looks(generator: torch.Generator) -> None:
    looks = []
    for atol in (0.3, 1e-3):
        net, x = drawn(NETS["mlp"], generator)
        found = scale_to_entropy_(net, x, layer="3", target=4.0, sigma=1.0, atol=atol, generator=generator)
        assert abs(entropy(output_of(net, "3", x), 1.0) - 4.0) < atol + 1e-4
        looks.append(len(found.tried))
    assert looks[0] < looks[1] <= 25


def test_a_module_with_the_target_is_left_as_it_is(generator: torch.Generator) -> None:
    net, x = drawn(NETS["mlp"], generator)
    now = entropy(output_of(net, "3", x), 1.0)
    before = state(net)
    found = scale_to_entropy_(net, x, layer="3", target=now, sigma=1.0, generator=generator)
    assert found == EntropyScale(1.0, found.entropy, ((1.0, found.entropy),))
    assert bit_identical(before, state(net))


def test_more_samples_than_the_most_are_the_same_subset_at_every_scale(generator: torch.Generator) -> None:
    """Were it another at each scale, the entropy of one scale would differ between two looks."""
    found = []
    for _ in range(2):
        net, x = drawn(NETS["mlp"], torch.Generator().manual_seed(7))
        chosen = torch.Generator().manual_seed(3)
        found.append(
            scale_to_entropy_(net, x, layer="3", target=3.0, sigma=1.0, max_samples=20, atol=1e-4, generator=chosen)
        )
    assert found[0] == found[1]
    scales, entropies = zip(*sorted(found[0].tried), strict=True)
    assert entropies == tuple(sorted(entropies)), scales
    assert max(entropies) < math.log2(20)


def test_the_search_leaves_no_trace_but_the_weights(generator: torch.Generator) -> None:
    net, x = drawn(NETS["conv"], generator)
    net.eval()
    net.get_submodule("1").train()
    net(x).sum().backward()
    gradients = [p.grad for p in net.parameters()]
    modes, hooks = [m.training for m in net.modules()], [len(m._forward_hooks) for m in net.modules()]
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    random = torch.get_rng_state()
    scale_to_entropy_(net, x, layer="3", target=3.0, sigma=10.0, generator=generator)
    assert modes == [m.training for m in net.modules()]
    assert hooks == [len(m._forward_hooks) for m in net.modules()]
    assert bit_identical(buffers, dict(net.named_buffers()))
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is gradient and p.requires_grad for p, gradient in zip(net.parameters(), gradients, strict=True))


class Restless(nn.Module):
    """Counts its calls in a buffer, adds noise in eval mode too, and fails at one of them."""

    calls: Tensor

    def __init__(self, fails_at: int = 10_000) -> None:
        super().__init__()
        self.linear, self.fails_at = nn.Linear(6, 20), fails_at
        self.num_calls = 0
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.num_calls += 1
        if self.num_calls == self.fails_at:
            raise RuntimeError("planted")
        return self.linear(x) + 0.1 * torch.randn(len(x), 20)


def test_noise_in_the_module_is_the_same_at_every_scale(generator: torch.Generator) -> None:
    net, x = drawn((Restless, (N, 6), "", 0, 0), generator)
    random = torch.get_rng_state()
    found = scale_to_entropy_(net, x, layer="", target=3.0, sigma=1.0, atol=1e-4, generator=generator)
    assert torch.equal(random, torch.get_rng_state())
    assert dict(net.named_buffers())["calls"] == 0
    assert entropy(output_of(net, "", x), 1.0) == pytest.approx(found.entropy, abs=1e-4)


def test_after_an_error_in_the_module_its_weights_are_put_back(generator: torch.Generator) -> None:
    net, x = drawn((lambda: Restless(fails_at=3), (N, 6), "", 0, 0), generator)
    net.train()
    before, random = state(net), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="planted"):
        scale_to_entropy_(net, x, layer="", target=3.0, sigma=1.0, generator=generator)
    assert bit_identical(before, state(net))
    assert net.training
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("target", [5.6, 1e-5])
def test_a_target_out_of_reach_is_refused_with_what_can_be_had(target: float, generator: torch.Generator) -> None:
    """A tanh saturates, so that samples on one side of all hyperplanes cannot be told apart however large the scale."""
    net, x = drawn((lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh()), (N, 6), "", 0, 0), generator)
    before = state(net)
    settings: dict[str, Any] = {"low": 0.1, "high": 4.0, "atol": 1e-6}
    with pytest.raises(ValueError, match=r"is reached at no scale between 0\.1 and 4") as refused:
        scale_to_entropy_(net, x, layer="1", target=target, sigma=1.0, generator=generator, **settings)
    assert bit_identical(before, state(net))
    ends = []
    for scale in (0.1, 4.0):
        net.load_state_dict(before)
        with torch.no_grad():
            net.get_submodule("0").get_parameter("weight").mul_(scale)
        ends.append(entropy(output_of(net, "1", x), 1.0))
    message = str(refused.value)
    assert f"between {ends[0]:.4g} and {ends[1]:.4g} bits" in message
    assert f"log2 n is {math.log2(N):.4g}" in message


def test_outputs_that_overflow_end_the_search_and_are_named(generator: torch.Generator) -> None:
    net, x = drawn((lambda: nn.Sequential(nn.Linear(6, 4)), (N, 6), "", 0, 0), generator)
    with pytest.raises(ValueError, match=r"At scale \S+e\+3\d its outputs are not finite"):
        scale_to_entropy_(net, x, layer="0", target=5.0, sigma=1e38, high=1e39, generator=generator)
    with pytest.raises(ValueError, match="not finite as the module is"):
        scale_to_entropy_(net, x * math.nan, layer="0", target=5.0, sigma=1.0, generator=generator)


def test_a_norm_layer_that_hides_the_scale_is_named_as_a_reason(generator: torch.Generator) -> None:
    net, x = drawn(
        (lambda: nn.Sequential(nn.Linear(6, 4, bias=False), nn.LayerNorm(4, eps=0)), (N, 6), "", 0, 0), generator
    )
    with pytest.raises(ValueError, match="a norm layer may lie in between"):
        scale_to_entropy_(net, x, layer="1", target=0.5, sigma=1.0, generator=generator)


def test_a_gain_of_two_dimensions_and_a_frozen_weight_stay(generator: torch.Generator) -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (2, 3)), nn.LayerNorm([2, 3]), nn.Flatten(), nn.Linear(6, 9))
    net.get_submodule("0").requires_grad_(False)
    before = state(net)
    x = torch.randn(N, 6, generator=generator)
    found = scale_to_entropy_(net, x, layer="4", target=3.0, sigma=1.0, generator=generator)
    assert found.scale != 1
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"4.weight"}


def test_a_layer_is_found_under_each_of_its_names(generator: torch.Generator) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.again = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x)

    x = torch.randn(N, 6, generator=generator)
    found = scale_to_entropy_(Named(), x, layer="again", target=3.0, sigma=1.0, generator=generator)
    assert found.entropy == pytest.approx(3.0, abs=TOLERANCE)


def test_a_module_of_several_inputs_takes_a_tuple(generator: torch.Generator) -> None:
    net, x = nn.Bilinear(4, 3, 5), torch.randn(N, 4, generator=generator)
    found = scale_to_entropy_(net, (x, x[:, :3]), layer="", target=2.0, sigma=1.0, generator=generator)
    assert found.entropy == pytest.approx(2.0, abs=TOLERANCE)


def test_tokens_are_inputs_too_and_an_embedding_is_a_weight(generator: torch.Generator) -> None:
    net, tokens = recurrent(), torch.randint(11, (N, 4), generator=generator)
    before = state(net)
    found = scale_to_entropy_(net, tokens, layer="0", target=4.0, sigma=1.0, generator=generator)
    assert entropy(output_of(net, "0", tokens), 1.0) == pytest.approx(4.0, abs=TOLERANCE + 1e-4)
    assert torch.equal(net.state_dict()["0.weight"], before["0.weight"] * found.scale)


@pytest.mark.parametrize(
    ("layer", "settings", "message"),
    [
        ("3", {"sigma": "median"}, r"sigma is 'median', which follows the scale .*: a number, 'official' \(10\) or"),
        ("3", {"sigma": "wide"}, r"sigma is 'wide'\. Choose a fixed width: a number, 'official' \(10\) or 'sqrt_dim'"),
        ("3", {"target": 0.0}, r"target is 0\.0 bits, and must lie between 0 and log2 n = 5\.907"),
        ("3", {"target": 5.91}, r"target is 5\.91 bits, and must lie between 0 and log2 n = 5\.907"),
        ("3", {"target": math.nan}, "target is nan bits"),
        ("3", {"max_samples": 4}, r"log2 n = 2"),
        ("3", {"low": 2.0}, r"low=2\.0 and high=1000\.0 must be .* with 1 between"),
        ("3", {"low": 0.0}, r"low=0\.0"),
        ("3", {"high": math.inf}, "high=inf"),
        ("3", {"atol": 0.0}, r"atol is 0\.0 bits"),
        ("hed", {}, r"layer='hed' names no submodule of ModuleDict\. Close to it: 'head', 'whole'; layer=\"\""),
        ("head", {}, r"layer='head' runs 0 times"),
        ("twice", {}, r"layer='twice' runs 2 times .* Name a layer around it"),
        ("pair", {}, r"layer='pair' returns <class 'tuple'>"),
        ("whole", {}, r"layer='whole' returns a torch\.int64 of shape \(60, 6\)"),
        ("sum", {}, r"layer='sum' returns a torch\.float32 of shape \(6,\), .* the 60 samples"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 10 else "",
)
def test_bad_input_is_refused_and_leaves_the_weights(
    layer: str, settings: dict[str, Any], message: str, generator: torch.Generator
) -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    class Whole(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.long()

    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum(0)

    class Net(nn.ModuleDict):
        def forward(self, x: Tensor) -> Tensor:
            x = self["twice"](self["twice"](self["3"](x)))
            return self["pair"](x)[0] + self["whole"](x) + self["sum"](x)

    Net.__name__ = "ModuleDict"
    parts = {"3": nn.Linear(6, 6), "twice": nn.ReLU(), "pair": Pair(), "whole": Whole(), "sum": Sum()}
    net = Net({**parts, "head": nn.Linear(6, 2)})
    before = state(net)
    asked: dict[str, Any] = {"target": 3.0, "sigma": 1.0, **settings}
    with pytest.raises(ValueError, match=message):
        scale_to_entropy_(net, torch.randn(N, 6, generator=generator), layer=layer, generator=generator, **asked)
    assert bit_identical(before, state(net))


def test_inputs_without_common_samples_and_modules_without_weights_are_refused(generator: torch.Generator) -> None:
    net = nn.Linear(6, 2)
    for inputs in (torch.tensor(1.0), torch.zeros(1, 6), (torch.zeros(3, 6), torch.zeros(4, 6)), ()):
        with pytest.raises(ValueError, match=r"inputs have the shapes .* in dimension 0"):
            scale_to_entropy_(net, inputs, layer="", target=1.0, sigma=1.0, generator=generator)
    for weightless in (nn.ReLU(), nn.BatchNorm1d(6), nn.Linear(6, 2).requires_grad_(False)):
        with pytest.raises(ValueError, match="no trainable parameter of two or more dimensions"):
            scale_to_entropy_(weightless, torch.ones(N, 6), layer="", target=1.0, sigma=1.0, generator=generator)
    with pytest.raises(ValueError, match=r"the parameter weight has no shape yet"):
        scale_to_entropy_(nn.LazyLinear(3), torch.ones(N, 6), layer="", target=1.0, sigma=1.0, generator=generator)


def test_of_several_crossings_the_one_next_to_1_is_found() -> None:
    looks = search_scale(lambda s: math.sin(4 * math.log2(s)), 0.5, low=1 / 64, high=64, atol=1e-3)
    roots = [2 ** ((angle + turn * 2 * math.pi) / 4) for angle in (math.pi / 6, math.pi * 5 / 6) for turn in (-1, 0, 1)]
    nearest = min(abs(math.log2(root)) for root in roots)
    assert abs(math.log2(looks[-1][0])) <= nearest + 1
    assert min(abs(math.log(looks[-1][0] / root)) for root in roots) < 1e-3


def test_the_ends_of_the_range_are_looked_at_and_not_passed() -> None:
    looks = search_scale(lambda s: s, 2.9, low=0.4, high=3.0, atol=0.01)
    assert max(scale for scale, _ in looks) == 3.0
    assert looks[4][0] == pytest.approx(math.sqrt(2 * 3))  # the last two scales in this direction are the bracket
    with pytest.raises(UnreachedError) as refused:
        search_scale(lambda s: s, 7.0, low=0.4, high=3.0, atol=0.01)
    assert [scale for scale, _ in refused.value.looks] == [1.0, 2.0, 0.5, 3.0, 0.4]


def test_a_falling_number_is_found_by_its_first_step_down() -> None:
    looks = search_scale(lambda s: s, 0.6, low=1e-3, high=1e3, atol=0.01)
    assert [scale for scale, _ in looks[:2]] == [1.0, 0.5]


def test_a_jump_past_the_target_is_said() -> None:
    with pytest.raises(UnreachedError, match=r"target=0\.5 is passed by a jump at scale 3$"):
        search_scale(lambda s: float(s > 3.000001), 0.5, low=1e-3, high=1e3, atol=0.1)

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_callbacks.linalg import eigsh
from spectral_callbacks.operators import Hessian
from spectral_callbacks.operators.gauss_newton import GaussNewton
from spectral_callbacks.operators.outputs import Cut, OutputObjective
from spectral_callbacks.operators.parameters import ParameterSpace
from spectral_callbacks.probe import Probe, twice_differentiable
from tests import oracles
from tests.operators import networks
from tests.operators.dense import dense_gauss_newton

Loss = Callable[[nn.Module, Any], Tensor]


def open_probe(module: nn.Module, batches: list[Any], loss: Loss, outputs: str | None = "") -> Probe:
    return Probe(module, torch.optim.SGD(module.parameters(), lr=0.1), batches, loss=loss, outputs=outputs)


def cross_entropy(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def squared_error(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (module(batch[0]) - batch[1]).square().sum(1).mean() / 2


def classes(n: int, k: int = 3, d: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d, dtype=torch.float64), torch.randint(0, k, (n,))


def targets(n: int, k: int = 3, d: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d, dtype=torch.float64), torch.randn(n, k, dtype=torch.float64)


def mlp(*sizes: int) -> nn.Module:
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


LINEAR: dict[str, tuple[Loss, Callable[[int], Any]]] = {
    "softmax regression": (cross_entropy, classes),
    "least squares": (squared_error, targets),
}


@pytest.mark.parametrize("name", LINEAR)
def test_it_is_the_hessian_of_a_linear_model(name: str) -> None:
    loss, make = LINEAR[name]
    module = nn.Linear(4, 3).double()
    with open_probe(module, [make(8), make(5)], loss) as probe:
        G, H = probe.gauss_newton().to_dense(), probe.operator(Hessian).to_dense()
    assert oracles.relative_error(G, H) < 1e-10


@pytest.mark.parametrize(("loss", "make", "rank"), [(cross_entropy, classes, 16), (squared_error, targets, 24)])
def test_its_rank_is_that_of_theory(loss: Loss, make: Callable[[int], Any], rank: int) -> None:
    """N (k - 1) for softmax cross-entropy and N k for squared loss, of 8 samples and 3 outputs."""
    module = mlp(4, 12, 3)
    with open_probe(module, [make(8)], loss) as probe:
        eigenvalues = torch.linalg.eigvalsh(probe.gauss_newton().to_dense())
        assert probe.space.size > 2 * rank
    assert (eigenvalues > 1e-9 * eigenvalues[-1]).sum() == rank
    assert eigenvalues[0] > -1e-12 * eigenvalues[-1]


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_it_is_the_matrix_of_an_independent_way(name: str) -> None:
    case = networks.case(name, torch.float64)
    with open_probe(case.module, [case.batch], case.loss) as probe:
        G, parameters = probe.gauss_newton().to_dense(), list(probe.space.tensors)
    with twice_differentiable():
        outputs = case.module(case.batch[0])
    expected = dense_gauss_newton(outputs, lambda z: F.cross_entropy(z, case.batch[1]), parameters)
    assert oracles.relative_error(G, expected) < 1e-11


@pytest.mark.parametrize("name", ["MLP", "transformer"])
def test_batches_of_different_size_are_weighed_by_it(name: str) -> None:
    case = networks.case(name, torch.float64)
    batches = [tuple(t[:8] for t in case.batch), tuple(t[8:] for t in case.batch)]
    with open_probe(case.module, batches, case.loss) as probe:
        parts = probe.gauss_newton().to_dense()
    with open_probe(case.module, [case.batch], case.loss) as probe:
        whole = probe.gauss_newton().to_dense()
    assert oracles.relative_error(parts, whole) < 1e-12


@pytest.mark.parametrize("name", ["MLP", "attention", "GRU"])
def test_with_the_residual_term_it_is_the_hessian(name: str) -> None:
    """H = G + Σ (d loss/d outputs) d²outputs/dθ²; the second term by a loop over autograd."""
    case = networks.case(name, torch.float64)
    with open_probe(case.module, [case.batch], case.loss) as probe:
        G, H = probe.gauss_newton().to_dense(), probe.operator(Hessian).to_dense()
        parameters = list(probe.space.tensors)
    outputs = case.module(case.batch[0]).detach().requires_grad_()
    (slopes,) = torch.autograd.grad(F.cross_entropy(outputs, case.batch[1]), outputs)
    with twice_differentiable():
        residual = oracles.dense_hessian(lambda: (slopes * case.module(case.batch[0])).sum(), parameters)
    assert oracles.relative_error(G + residual, H) < 1e-10
    assert oracles.relative_error(G, H) > 1e-2


class Twice(nn.Module):
    """Scores two inputs with one head, and has a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.head = nn.Linear(3, 2)
        self.unused = nn.Linear(2, 2)

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.body(x).tanh()), self.head(self.body(-2 * x).tanh())


def contrast(module: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    first, second = module.scores(batch[0])
    return (first + 2 * second - batch[1]).square().sum(1).mean() / 2


def test_a_submodule_that_runs_twice_counts_with_both_outputs() -> None:
    module, (x, y) = Twice().double(), targets(6, k=2)
    with open_probe(module, [(x, y)], contrast, "head") as probe:
        G, parameters = probe.gauss_newton().to_dense(), list(probe.space.tensors)
        unused = probe.space.slices["unused.weight"]
    both = torch.stack(module.scores(x))
    expected = dense_gauss_newton(both, lambda z: (z[0] + 2 * z[1] - y).square().sum(1).mean() / 2, parameters)
    assert oracles.relative_error(G, expected) < 1e-12
    assert not G[unused].any()
    assert G.any()


def test_outputs_of_any_number_of_dimensions() -> None:
    """A model of sequences, whose outputs are (samples, positions, words)."""
    module = nn.Sequential(nn.Embedding(5, 3), nn.Tanh(), nn.Linear(3, 5)).double()
    words = torch.randint(0, 5, (4, 7))

    def loss(module: nn.Module, words: Tensor) -> Tensor:
        return F.cross_entropy(module(words[:, :-1]).mT, words[:, 1:])

    with open_probe(module, [words], loss) as probe:
        G, parameters = probe.gauss_newton(), list(probe.space.tensors)
        ((pushed,),) = G.jvp(torch.ones(probe.space.size, dtype=torch.float64))
        dense = G.to_dense()
    assert pushed.shape == (4, 6, 5)
    expected = dense_gauss_newton(module(words[:, :-1]), lambda z: F.cross_entropy(z.mT, words[:, 1:]), parameters)
    assert oracles.relative_error(dense, expected) < 1e-12


def test_the_curvature_of_every_sample_along_a_direction_takes_one_pass() -> None:
    module, batches = mlp(4, 5, 3), [classes(6), classes(3)]
    with open_probe(module, batches, cross_entropy) as probe:
        G = probe.gauss_newton()
        v = torch.randn(probe.space.size, dtype=torch.float64, generator=probe.generator)
        pushed = G.jvp(v)
        curved = G.output_curvature(pushed)
        parameters = list(probe.space.tensors)
        whole = v @ G.matmat(v[:, None])[:, 0]
    total = 0.0
    for (x, y), (Jv,), (AJv,), weight in zip(batches, pushed, curved, G.weights, strict=True):
        forms = len(x) * (Jv * AJv).sum(1)
        for i in range(len(x)):
            one = dense_gauss_newton(
                module(x[i : i + 1]), functools.partial(F.cross_entropy, target=y[i : i + 1]), parameters
            )
            assert forms[i].item() == pytest.approx((v @ one @ v).item(), rel=1e-10)
        total += weight * forms.mean().item()
    assert whole.item() == pytest.approx(total, rel=1e-12)


def test_its_eigenvalues_are_found_by_the_usual_search() -> None:
    module = mlp(4, 8, 3)
    with open_probe(module, [classes(8)], cross_entropy) as probe:
        G = probe.gauss_newton()
        pairs = eigsh(G, generator=probe.generator)
        true = torch.linalg.eigvalsh(G.to_dense())[-1:]
    assert oracles.relative_error(pairs.values, true) < 1e-5


def test_a_half_precision_model_has_float32_products() -> None:
    module = mlp(4, 5, 3)
    x, y = classes(6)
    with open_probe(module, [(x, y)], cross_entropy) as probe:
        exact = probe.gauss_newton().to_dense()
    with open_probe(module.bfloat16(), [(x.bfloat16(), y)], cross_entropy) as probe:
        rough = probe.gauss_newton().to_dense()
    assert rough.dtype == torch.float32
    assert oracles.relative_error(rough, exact) < 0.1


# ---- Convexity


def saddle(z: Tensor) -> Tensor:
    return z[:, 0].square().sum() - 1e-2 * z[:, 1].square().sum()


def sine(z: Tensor) -> Tensor:
    return z.sin().sum()


def probabilities(z: Tensor) -> Tensor:
    """Squared error of a softmax."""
    return (z.softmax(1) - torch.eye(3, dtype=z.dtype)[0]).square().sum()


@pytest.mark.parametrize("curve", [saddle, sine, probabilities])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loss_that_is_not_convex_in_the_outputs_is_refused(
    curve: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    module = mlp(4, 5, 3).to(dtype)
    x = torch.randn(16, 4, dtype=dtype)
    with open_probe(module, [x], lambda module, x: curve(module(x)), "2") as probe:
        G = probe.gauss_newton()
        for _ in range(2):
            with pytest.raises(
                ValueError,
                match=r"not convex in the outputs of outputs='2': .* eigenvalue -.*; name a later output .* or leave",
            ):
                G.matmat(torch.ones(probe.space.size, 1, dtype=dtype))


CONVEX: dict[str, Callable[[Tensor], Tensor]] = {
    "cross-entropy": lambda z: F.cross_entropy(z, torch.zeros(len(z), dtype=torch.long)),
    "confident cross-entropy": lambda z: F.cross_entropy(100 * z, torch.zeros(len(z), dtype=torch.long)),
    "squared": lambda z: z.square().mean(),
    "huber": lambda z: F.huber_loss(z, torch.ones_like(z)),
    "binary": lambda z: F.binary_cross_entropy_with_logits(z, torch.ones_like(z)),
    "poisson": lambda z: F.poisson_nll_loss(z, torch.ones_like(z)),
    "one output, large": lambda z: 1e6 * z.sum().square(),
}


@pytest.mark.parametrize("name", CONVEX)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_convex_loss_is_not_refused(name: str, dtype: torch.dtype) -> None:
    module = mlp(4, 5, 3).to(dtype)
    x = torch.randn(16, 4, dtype=dtype)
    with open_probe(
        module, [x], lambda module, x: CONVEX[name](module(x).float() if dtype == torch.bfloat16 else module(x))
    ) as probe:
        product = probe.gauss_newton().matmat(torch.ones(probe.space.size, 1, dtype=probe.space.dtype))
    assert product.isfinite().all()


FLAT: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda z: z.mean(),
    "absolute": lambda z: F.l1_loss(z, torch.ones_like(z)),
    "hinge": lambda z: (1 - z).relu().sum(),
    "huber, from afar": lambda z: F.huber_loss(z, torch.full_like(z, 100.0)),
    "no output": lambda z: torch.ones(()),
}


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loss_without_curvature_in_the_outputs_is_refused(name: str, dtype: torch.dtype) -> None:
    module = mlp(4, 5, 3).to(dtype)
    x = torch.randn(16, 4, dtype=dtype)
    with open_probe(module, [x, x], lambda module, x: FLAT[name](module(x))) as probe:
        G = probe.gauss_newton()
        for _ in range(2):
            with pytest.raises(
                ValueError,
                match=r"no curvature in the outputs of outputs='', .* \(L1 .*; name as outputs= the submodule",
            ):
                G.matmat(torch.ones(probe.space.size, 1, dtype=dtype))


class Scored(nn.Module):
    """Returns its own loss along with the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 5, 3)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, y), "logits": logits}


def test_outputs_that_hold_the_loss_itself_are_refused() -> None:
    module, batch = Scored(), classes(8)

    def own(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return module(*batch)["loss"]

    with open_probe(module, [batch], own) as probe:
        v = torch.ones(probe.space.size, 1, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"they hold the loss itself, .* name as outputs= the submodule before"):
            probe.gauss_newton().matmat(v)
    with open_probe(module, [batch], own, "net") as probe:
        assert probe.gauss_newton().matmat(v).any()


def test_one_batch_without_curvature_is_none_of_all() -> None:
    module, x = mlp(4, 5, 3), torch.randn(16, 4, dtype=torch.float64)
    near, far = torch.zeros(16, 3, dtype=torch.float64), torch.full((16, 3), 100.0, dtype=torch.float64)
    with open_probe(module, [(x, far), (x, near)], lambda m, batch: F.huber_loss(m(batch[0]), batch[1])) as probe:
        assert probe.gauss_newton().matmat(torch.ones(probe.space.size, 1, dtype=torch.float64)).any()


@pytest.mark.parametrize("keep_graphs", [True, False])
def test_output_shapes_are_those_of_each_batch(*, keep_graphs: bool) -> None:
    module = nn.Linear(2, 3)

    def cut(n: int) -> Cut:
        z, w = module(torch.ones(n, 4, 2)), module(torch.ones(2)).sum()
        leaves = z.detach().requires_grad_(), w.detach().requires_grad_()
        return Cut((z, w), leaves, leaves[0].square().sum() + leaves[1])

    cuts = [functools.partial(cut, 5), functools.partial(cut, 1)]
    G = GaussNewton(OutputObjective(ParameterSpace(module), cuts, keep_graphs=keep_graphs))
    assert G.output_shapes == (((5, 4, 3), ()), ((1, 4, 3), ()))
    assert G.output_shapes == tuple(tuple(t.shape for t in of_batch) for of_batch in G.jvp(torch.zeros(9)))


def test_convexity_is_looked_at_once_and_costs_no_pass_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        searches.append(options["max_matvecs"])
        return eigsh(*arguments, **options)

    monkeypatch.setattr("spectral_callbacks.operators.gauss_newton.eigsh", counted)
    module = nn.Linear(2, 2)
    runs: list[int] = []

    def cut() -> Cut:
        runs.append(1)
        z = module(torch.ones(3, 2))
        leaf = z.detach().requires_grad_()
        return Cut((z,), (leaf,), leaf.square().sum())

    G = GaussNewton(OutputObjective(ParameterSpace(module), [cut, cut]))
    for _ in range(3):
        G.matmat(torch.ones(6, 1))
    assert len(runs) == 2
    assert searches == [20, 20]
    monkeypatch.setattr("spectral_callbacks.operators.gauss_newton._LOOK_BYTES", 4 * 6 * 3)
    GaussNewton(OutputObjective(ParameterSpace(module), [cut])).matmat(torch.ones(6, 1))
    assert searches[2:] == [3]

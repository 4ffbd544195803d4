"""Per-sample quantities of a probe: the same whatever code the model runs, and without a trace."""

from __future__ import annotations

import collections
import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spectral_callbacks.operators import Hessian
from spectral_callbacks.operators.samples import Looped, Samples, Vectorized, samples_of
from spectral_callbacks.probe import Probe, twice_differentiable
from tests.operators import networks
from tests.operators.dense import dense_gauss_newton
from tests.oracles import dense_gradient, dense_hessian, global_random_state, relative_error

Batch = tuple[Tensor, Tensor]


def loss_of(module: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def batch_of(n: int) -> Batch:
    return torch.randn(n, 4, dtype=torch.float64), torch.randint(0, 3, (n,))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def open_probe(module: nn.Module, batches: list[Any], loss: Any = loss_of, **options: Any) -> Probe:
    options = {"outputs": "", **options}
    return Probe(module, torch.optim.SGD(module.parameters(), lr=0.1), batches, loss=loss, **options)


def gradients_of(module: nn.Module, batches: list[Batch], loss: Any = loss_of) -> Tensor:  # (N, n)
    parameters = [p for p in module.parameters() if p.requires_grad]
    rows = []
    for x, y in batches:
        for one in zip(x.split(1), y.split(1), strict=True):
            gradient = torch.autograd.grad(loss(module, one), parameters, allow_unused=True, materialize_grads=True)
            rows.append(torch.cat([g.to_dense().reshape(-1) for g in gradient]))
    return torch.stack(rows)


def way_of(probe: Probe, outputs: str | None = None) -> type[Samples]:
    """How samples are evaluated alone."""
    sampled = probe._sampled
    return type(samples_of(probe.space, sampled._alone(probe.space, sampled._parts(None), outputs)))


VECTORIZED = {
    "MLP", "LayerNorm", "RMSNorm", "GroupNorm", "attention", "transformer", "transformer, norm first", "weight norm",
    "weight norm by a hook", "checkpoint", "tied and frozen",
}  # fmt: skip
UNCOUPLED = [name for name in networks.NETWORKS if name not in ("BatchNorm", "convolution")]


@pytest.mark.parametrize("name", UNCOUPLED)
def test_the_gram_matrix_is_that_of_a_loop_of_gradients(name: str) -> None:
    case = networks.case(name, torch.float64)
    with open_probe(case.module, [case.batch], case.loss) as probe:
        gram = probe.per_sample_gram()
        assert way_of(probe) is (Vectorized if name in VECTORIZED else Looped)
    with twice_differentiable():
        G = gradients_of(case.module, [case.batch], case.loss)
    assert relative_error(gram, G @ G.mT) < 1e-12


@pytest.mark.parametrize("name", UNCOUPLED)
def test_sample_curvatures_add_up_to_the_gauss_newton_matrix(name: str) -> None:
    """(1/N) Σ J_iᵀ A_i J_i has the non-zero eigenvalues of blockdiag(A) · gram / N, and these traces."""
    case = networks.case(name, torch.float64)
    N = len(case.batch[1])
    with open_probe(case.module, [case.batch], case.loss) as probe:
        found, gram = probe.sample_curvature(), probe.per_sample_gram()
        G = probe.gauss_newton().to_dense()
        assert found.losses.mean().item() == pytest.approx(probe.loss(), rel=1e-12)
    C = found.slopes.shape[1]
    assert found.gram.shape == (N, C, N, C)
    A = torch.block_diag(*found.curvatures)
    product = found.gram.view(N * C, N * C) @ A / N
    powers = [product, product @ product, product @ product @ product]
    for k, power in enumerate(powers, start=1):
        assert power.trace().item() == pytest.approx(torch.linalg.matrix_power(G, k).trace().item(), rel=1e-10)
    inner = torch.einsum("ic,icjd,jd->ij", found.slopes, found.gram, found.slopes)
    assert relative_error(inner, gram) < 1e-12


def test_a_sample_has_the_gauss_newton_matrix_of_itself_alone() -> None:
    module, (x, y) = mlp(), batch_of(4)
    with open_probe(module, [(x, y)]) as probe:
        found, parameters = probe.sample_curvature(), list(probe.space.tensors)
    for i in range(4):
        G = dense_gauss_newton(module(x[i : i + 1]), lambda z, i=i: F.cross_entropy(z, y[i : i + 1]), parameters)
        product = found.gram[i, :, i] @ found.curvatures[i]
        assert product.trace().item() == pytest.approx(G.trace().item(), rel=1e-12)
        assert (product @ product).trace().item() == pytest.approx(G.square().sum().item(), rel=1e-12)


def test_the_mean_gradient_is_the_gradient_of_the_probe() -> None:
    module = mlp()
    with open_probe(module, [batch_of(6), batch_of(3)]) as probe:
        gram, gradient = probe.per_sample_gram(), probe.gradient()
        assert probe.num_samples == 9
    assert gram.mean().item() == pytest.approx(gradient.square().sum().item(), rel=1e-12)


@pytest.mark.parametrize(("count", "found"), [(None, 9), (1, 1), (6, 6), (7, 7), (9, 9), (100, 9)])
def test_samples_are_the_first_ones_over_the_batches_in_order(count: int | None, found: int) -> None:
    module, batches = mlp(), [batch_of(6), batch_of(3)]
    G = gradients_of(module, batches)[:found]
    with open_probe(module, batches) as probe:
        assert relative_error(probe.per_sample_gram(count), G @ G.mT) < 1e-12
        assert probe.sample_curvature(count).losses.shape == (found,)


@pytest.mark.parametrize("count", [0, -3])
def test_no_sample_is_refused(count: int) -> None:
    with open_probe(mlp(), [batch_of(6)]) as probe:
        for quantity in (probe.per_sample_gram, probe.sample_curvature):
            with pytest.raises(ValueError, match=f"num_samples={count} must be at least 1; pass None"):
                quantity(count)


def test_outputs_may_be_a_sequence_each() -> None:
    module = nn.Sequential(nn.Embedding(5, 3), nn.Tanh(), nn.Linear(3, 5)).double()
    words = torch.randint(0, 5, (4, 4))

    def loss(module: nn.Module, words: Tensor) -> Tensor:
        return F.cross_entropy(module(words[:, :-1]).mT, words[:, 1:])

    with open_probe(module, [words], loss) as probe:
        found, G = probe.sample_curvature(), probe.gauss_newton().to_dense()
    assert found.gram.shape == (4, 15, 4, 15)
    trace = torch.einsum("icid,icd->", found.gram, found.curvatures) / 4
    assert trace.item() == pytest.approx(G.trace().item(), rel=1e-12)


@dataclasses.dataclass(frozen=True)
class Frozen:
    batch: Any
    batch_idx: int


def test_a_batch_may_be_nested_and_hold_what_all_samples_share() -> None:
    x, y = batch_of(6)
    frozen = Frozen({"in": (x, [y]), "scale": torch.tensor(2.0), "name": "x"}, 3)

    def loss(module: nn.Module, frozen: Frozen) -> Tensor:
        x, (y,) = frozen.batch.pop("in")
        return loss_of(module, (x * frozen.batch["scale"], y)) + frozen.batch_idx

    module = mlp()
    with open_probe(module, [frozen], loss) as probe:
        assert way_of(probe) is Vectorized
        gram, losses = probe.per_sample_gram(), probe.sample_curvature().losses
        subset = probe.subset(torch.tensor([1, 4])).gradient()
    G = gradients_of(module, [(2 * x, y)])
    assert relative_error(gram, G @ G.mT) < 1e-12
    assert relative_error(subset, G[[1, 4]].mean(0)) < 1e-12
    assert losses.mean().item() > 3
    assert set(frozen.batch) == {"in", "scale", "name"}


# ---- Code that is no function of tensors


class Busy(nn.Module):
    """Does in its forward pass what models do beside computing."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        self.dropout = nn.Dropout(0.0)
        self.teacher = nn.Linear(5, 3).double().requires_grad_(False)
        self.register_buffer("ema", torch.zeros(3, dtype=torch.float64))
        self.ema: Tensor
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=3)
        self.losses: list[float] = []
        self.latest: Tensor | None = None
        self.recent: collections.deque[Any] = collections.deque(maxlen=3)
        self.calls = 0
        self.generator = torch.Generator().manual_seed(1)
        self.numpy_generator = np.random.default_rng(1)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.dropout(self.body(x))


def item(module: Any, z: Tensor, y: Tensor) -> None:
    module.losses.append(z.sum().item())


def metric(module: Any, z: Tensor, y: Tensor) -> None:
    module.accuracy(z, y)


def branch(module: Any, z: Tensor, y: Tensor) -> None:
    if z.sum() > 0:
        module.calls += 1


def buffer(module: Any, z: Tensor, y: Tensor) -> None:
    module.ema.mul_(0.9).add_(z.detach().mean(0), alpha=0.1)


def teacher(module: Any, z: Tensor, y: Tensor) -> None:
    for t, s in zip(module.teacher.parameters(), module.body[-1].parameters(), strict=True):
        t.data.mul_(0.9).add_(s.data, alpha=0.1)


def labels(module: Any, z: Tensor, y: Tensor) -> None:
    module.recent.append(y.tolist())


def attribute(module: Any, z: Tensor, y: Tensor) -> None:
    module.latest = z
    module.recent.append(z.detach())


def teacher_alone(module: Any, z: Tensor, y: Tensor) -> None:
    for t in module.teacher.parameters():
        t.data.mul_(0.9)
    module.ema.add_(1)


def generators(module: Any, z: Tensor, y: Tensor) -> None:
    torch.rand(2, generator=module.generator)
    module.numpy_generator.random()
    random.random()
    np.random.rand()


DOINGS: dict[Callable[..., None], type[Any]] = {
    item: Looped, metric: Vectorized, branch: Looped, buffer: Looped, labels: Looped, attribute: Vectorized,
    teacher_alone: Looped, teacher: Looped, generators: Vectorized,
}  # fmt: skip


@pytest.mark.parametrize("doing", DOINGS)
def test_whatever_a_model_does_beside_the_numbers_are_right_and_it_is_undone(doing: Callable[..., None]) -> None:
    module, (x, y) = Busy(), batch_of(5)
    module.accuracy(module(x), y)
    G = gradients_of(module, [(x, y)])
    given = [torch.full_like(p, 7.0) for p in module.parameters()]
    for p, g in zip(module.parameters(), given, strict=True):
        p.grad = g

    def loss(module: Any, batch: Batch) -> Tensor:
        z = module(batch[0])
        doing(module, z, batch[1])
        return F.cross_entropy(z, batch[1])

    def state() -> list[Any]:
        return [
            global_random_state(), [t.tolist() for t in module.state_dict().values()], dict(vars(module)),
            list(module.losses), list(module.recent), module.generator.get_state().tolist(),
            module.numpy_generator.bit_generator.state, module.accuracy.compute().item(),
            [dict(vars(m)) | {"_parameters": 0} for m in module.body],
            [id(p) for p in module.parameters()], x.tolist(), y.tolist(),
        ]  # fmt: skip

    before = state()
    with open_probe(module, [(x, y)], loss) as probe:
        assert way_of(probe, "") is DOINGS[doing]
        gram, found = probe.per_sample_gram(), probe.sample_curvature()
    assert state() == before
    assert relative_error(gram, G @ G.mT) < 1e-12
    inner = torch.einsum("ic,icjd,jd->ij", found.slopes, found.gram, found.slopes)
    assert relative_error(inner, G @ G.mT) < 1e-12
    for p, g in zip(module.parameters(), given, strict=True):
        assert p.grad is g
        assert (g == 7).all()


def test_a_loss_may_write_to_its_batch() -> None:
    module, (x, y) = mlp(), batch_of(5)
    before = x.clone()
    with open_probe(module, [(x, y)], lambda module, batch: loss_of(module, (batch[0].mul_(2), batch[1]))) as probe:
        assert way_of(probe) is Looped
        gram = probe.per_sample_gram()
    assert torch.equal(x, before)
    G = gradients_of(module, [(2 * x, y)])
    assert relative_error(gram, G @ G.mT) < 1e-12


def test_dropout_masks_are_frozen_and_each_sample_draws_its_own() -> None:
    module = nn.Sequential(nn.Linear(4, 30), nn.Dropout(0.5), nn.Linear(30, 3)).double()
    x, y = batch_of(1)
    same = x.expand(4, 4).clone(), y.expand(4).clone()
    found = {}
    for seed in (0, 0, 1):
        with open_probe(module, [same], seed=seed) as probe:
            gram, curvature = probe.per_sample_gram(), probe.sample_curvature()
        inner = torch.einsum("ic,icjd,jd->ij", curvature.slopes, curvature.gram, curvature.slopes)
        assert relative_error(inner, gram) < 1e-12
        assert torch.equal(found.setdefault(seed, gram), gram)
    assert not torch.equal(found[0], found[1])
    assert len(set(found[0].diagonal().tolist())) == 4


def test_the_loop_draws_masks_in_the_same_manner() -> None:
    module = nn.Sequential(nn.Linear(4, 30), nn.Dropout(0.5), nn.Linear(30, 3)).double()
    x, y = batch_of(1)

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        value = loss_of(module, batch)
        value.item()
        return value

    grams = []
    for _ in range(2):
        with open_probe(module, [(x.expand(4, 4).clone(), y.expand(4).clone())] * 2, loss) as probe:
            assert way_of(probe) is Looped
            grams.append(probe.per_sample_gram())
    assert torch.equal(*grams)
    assert len(set(grams[0].diagonal().tolist())) == 8


# ---- What has no samples


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(5), nn.BatchNorm1d(5, track_running_stats=False)])
def test_batch_norm_couples_samples(norm: nn.BatchNorm1d) -> None:
    module = nn.Sequential(nn.Linear(4, 5), norm, nn.Linear(5, 3)).double()
    with open_probe(module, [batch_of(6)]) as probe:
        for quantity in (probe.per_sample_gram, probe.sample_curvature):
            with pytest.raises(
                ValueError, match=r"BatchNorm1d '1' normalises by the statistics of the batch, .* mode=\"eval\""
            ):
                quantity()


def test_in_eval_mode_batch_norm_couples_nothing() -> None:
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    batch = batch_of(6)
    module(batch[0])
    with open_probe(module, [batch], mode="eval") as probe:
        gram = probe.per_sample_gram()
    G = gradients_of(module.eval(), [batch])
    assert relative_error(gram, G @ G.mT) < 1e-12


def test_tensors_of_different_length_have_no_samples() -> None:
    x, y = batch_of(6)

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return loss_of(module, batch[:2]) * batch[2].sum()

    with open_probe(mlp(), [(x, y, torch.ones(3))], loss) as probe:
        for quantity in (
            probe.per_sample_gram, probe.sample_curvature, lambda: probe.subset(torch.tensor([0])),
        ):  # fmt: skip
            with pytest.raises(ValueError, match="the batch holds tensors of lengths 6, 3, and a sample is one entry"):
                quantity()


def test_a_loss_with_a_penalty_has_a_gram_matrix_and_no_output_curvature() -> None:
    module = mlp()

    def loss(module: Any, batch: Batch) -> Tensor:
        return loss_of(module, batch) + module[0].weight.square().sum()

    batch = batch_of(5)
    G = gradients_of(module, [batch], loss)
    with open_probe(module, [batch], loss) as probe:
        assert relative_error(probe.per_sample_gram(), G @ G.mT) < 1e-12
        for quantity in (probe.sample_curvature, lambda: probe.gauss_newton().to_dense()):
            with pytest.raises(ValueError, match=r"the loss depends on 0\.weight other than through outputs=''"):
                quantity()


def test_a_loss_that_is_no_number_is_refused() -> None:
    with open_probe(mlp(), [batch_of(4)], lambda module, batch: module(batch[0])) as probe:
        for quantity in (probe.per_sample_gram, probe.sample_curvature):
            with pytest.raises(ValueError, match=r"the loss has shape \(\d, 3\); return a scalar"):
                quantity()


def squeezed(module: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(module(batch[0]).squeeze(), batch[1])


def written_out(module: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(module(batch[0].view(6, 4)), batch[1])


def of_one_shape(module: nn.Module, batch: Batch) -> Tensor:
    """Raises a ValueError of its own."""
    return F.cross_entropy(module(batch[0]).view(-1, 3), batch[1][0].expand(6))


@pytest.mark.parametrize("loss", [squeezed, written_out, of_one_shape])
def test_a_loss_that_does_not_run_on_some_samples_says_so(loss: Any) -> None:
    def subset(probe: Probe) -> Tensor:
        return probe.subset(torch.tensor([3])).gradient()

    with open_probe(mlp(), [batch_of(6)], loss) as probe:
        assert probe.gradient().any()
        for quantity in (Probe.per_sample_gram, Probe.sample_curvature, subset):
            with pytest.raises(
                ValueError, match=r"the loss does not run on 1 of its samples: .*; pass loss= that takes a batch of any"
            ) as found:
                quantity(probe)
            assert type(found.value) is ValueError
            assert str(found.value.__cause__) in str(found.value)
        assert probe.gradient().any()


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 2 * grad_outputs[0]


def test_errors_that_are_not_of_the_samples_keep_their_name() -> None:
    def short_of_memory(module: nn.Module, batch: Batch) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def writing(module: Any, batch: Batch) -> Tensor:
        with torch.no_grad():
            module[0].weight.mul_(2)
        return loss_of(module, batch)

    def once(module: nn.Module, batch: Batch) -> Tensor:
        return Once.apply(module(batch[0])).square().mean()

    for loss, kind, message in (
        (once, RuntimeError, "marked @once_differentiable"),
        (short_of_memory, torch.OutOfMemoryError, "CUDA out of memory"),
        (writing, RuntimeError, "the loss writes to the trainable parameters"),
    ):
        with open_probe(mlp(), [batch_of(6)], loss) as probe:
            for quantity in (
                probe.sample_curvature, lambda: Hessian(probe.subset(torch.tensor([0]))).to_dense()
            ):  # fmt: skip
                with pytest.raises(kind, match=message):
                    quantity()


def test_fewer_samples_come_back_where_rows_of_all_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    module, batches = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3).double()), [batch_of(6), batch_of(3)]
    num_bytes = 8 * sum(p.numel() for name, p in module.named_parameters() if name != "bias")
    with open_probe(module, batches) as probe:
        gram, curvature = probe.per_sample_gram(), probe.sample_curvature()
    monkeypatch.setattr("spectral_callbacks.operators.samples._ROW_BYTES", 7 * num_bytes)
    with open_probe(module, batches) as probe:
        torch.testing.assert_close(probe.per_sample_gram(), gram[:7, :7], rtol=1e-12, atol=1e-12)
        fewer = probe.sample_curvature()
    assert fewer.gram.shape == (2, 3, 2, 3)
    torch.testing.assert_close(fewer.losses, curvature.losses[:2], rtol=1e-12, atol=1e-12)


def test_parameters_that_are_not_measured_are_held_fixed() -> None:
    module, batch = mlp(), batch_of(5)
    optimizer = torch.optim.SGD(module[2].parameters(), lr=0.1)
    with Probe(module, optimizer, [batch], loss=loss_of, outputs="") as probe:
        gram = probe.per_sample_gram()
    G = gradients_of(module, [batch])[:, 25:]
    assert relative_error(gram, G @ G.mT) < 1e-12


def test_per_sample_quantities_are_computed_once() -> None:
    module = mlp()
    with open_probe(module, [batch_of(5)]) as probe:
        other = probe.seen_by(torch.Generator())
        assert probe.per_sample_gram() is other.per_sample_gram()
        assert probe.sample_curvature(3) is other.sample_curvature(3)
        assert probe.sample_curvature(3) is not probe.sample_curvature(4)


def test_a_closed_probe_says_so() -> None:
    probe = open_probe(mlp(), [batch_of(5)])
    for quantity in (probe.per_sample_gram, probe.sample_curvature):
        with pytest.raises(RuntimeError, match="the probe is closed"):
            quantity()


# ---- Subsets


def test_a_subset_is_the_mean_over_its_samples() -> None:
    module, batches = mlp(), [batch_of(6), batch_of(3)]
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    for indices in ([0], [8], [5, 6], [7, 1, 1, 4], list(range(9))):
        chosen = x[indices], y[indices]
        with open_probe(module, batches) as probe:
            subset = probe.subset(torch.tensor(indices))
            loss, gradient, hessian = subset.loss(), subset.gradient(), Hessian(subset).to_dense()
        parameters = list(module.parameters())
        assert loss == pytest.approx(loss_of(module, chosen).item(), rel=1e-12)
        assert relative_error(gradient, dense_gradient(lambda b=chosen: loss_of(module, b), parameters)) < 1e-12
        assert relative_error(hessian, dense_hessian(lambda b=chosen: loss_of(module, b), parameters)) < 1e-12


def test_all_samples_in_another_order_are_the_objective() -> None:
    module = mlp()
    with open_probe(module, [batch_of(6), batch_of(3)]) as probe:
        shuffled = probe.subset(torch.randperm(9))
        assert shuffled.loss() == pytest.approx(probe.loss(), rel=1e-12)
        assert relative_error(shuffled.gradient(), probe.gradient()) < 1e-12


@pytest.mark.parametrize("wrong", [[], [9], [-1]])
def test_a_subset_of_no_samples_is_refused(wrong: list[int]) -> None:
    message = "must be a vector of at least one int from 0 to 8"
    with open_probe(mlp(), [batch_of(6), batch_of(3)]) as probe, pytest.raises(ValueError, match=message):
        probe.subset(torch.tensor(wrong, dtype=torch.int64))

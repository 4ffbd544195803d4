from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_callbacks.operators import samples as engine
from spectral_callbacks.operators.gram import gram, sample_curvature
from spectral_callbacks.operators.outputs import Cut
from spectral_callbacks.operators.parameters import ParameterSpace
from spectral_callbacks.operators.samples import (
    Chunk,
    Looped,
    SampleBatch,
    SampleFunction,
    Samples,
    Vectorized,
    samples_of,
)
from tests import oracles
from tests.operators.dense import jacobian

WAYS: tuple[type[Samples], ...] = (Looped, Vectorized)


class Rows(SampleBatch):
    """Samples that are rows of x and y, of a net whose outputs are (2, 3) and a number each."""

    def __init__(self, module: nn.Module, x: Tensor, y: Tensor) -> None:
        self.size = len(x)
        self._module, self._x, self._y = module, x, y
        self.cuts: list[int] = []
        self.maps: list[range] = []

    def loss(self, first: Tensor, second: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(first.view(2, 3), y) + second.square().sum() * first.view(-1)[0].exp()

    def outputs(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z[:6].view(2, 3), z[6:]

    def cut(self, index: int) -> Cut:
        self.cuts.append(index)
        outputs = self.outputs(self._module(self._x[index]))
        first, second = (z.detach().requires_grad_() for z in outputs)
        return Cut(outputs, (first, second), self.loss(first, second, self._y[index]))

    def vmap(self, function: Callable[[SampleFunction], Any], samples: range) -> Any:
        self.maps.append(samples)

        def run(x: Tensor, y: Tensor, parameters: Sequence[Tensor], shift: Tensor | None) -> tuple[Tensor, Tensor]:
            named = dict(zip([name for name, _ in self._module.named_parameters()], parameters, strict=True))
            z = torch.func.functional_call(self._module, named, (x,))
            return self.loss(*self.outputs(z if shift is None else z.detach() + shift), y), z

        chosen = slice(samples.start, samples.stop)
        one = torch.func.vmap(lambda x, y: function(functools.partial(run, x, y)))
        return one(self._x[chosen], self._y[chosen])


class Unused(nn.Sequential):
    """With a parameter that no output reaches."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.unused = nn.Parameter(torch.ones(2))


def problem(*sizes: int) -> tuple[nn.Module, list[Rows]]:
    module = Unused(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 7)).double()
    return module, [Rows(module, torch.randn(n, 4).double(), torch.randint(0, 3, (n, 2))) for n in sizes]


def expected(module: nn.Module, batches: Sequence[Rows]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Jacobians (N, C, n), slopes, curvatures, losses and gradients, sample by sample."""
    parameters = list(module.parameters())
    found: list[list[Tensor]] = [[], [], [], [], []]
    for batch in batches:
        for x, y in zip(batch._x, batch._y, strict=True):
            z = module(x)

            def loss(z: Tensor, batch: Rows = batch, y: Tensor = y) -> Tensor:
                return batch.loss(*batch.outputs(z), y)

            leaf = z.detach().requires_grad_()
            (slope,) = torch.autograd.grad(loss(leaf), leaf)
            curvature = torch.as_tensor(torch.autograd.functional.hessian(loss, z.detach()))
            gradient = oracles.dense_gradient(lambda: loss(module(x)), parameters)  # noqa: B023 - called at once
            for place, value in zip(
                found, (jacobian(z, parameters), slope, curvature, loss(leaf).detach(), gradient), strict=True
            ):
                place.append(value)
    J, slopes, curvatures, losses, gradients = map(torch.stack, found)
    return J, slopes, curvatures, losses, gradients


def build(way: type[Samples], module: nn.Module, batches: Sequence[SampleBatch], num_outputs: int = 7) -> Samples:
    return way(ParameterSpace(module), batches, num_outputs)


@pytest.mark.parametrize("way", WAYS)
def test_all_quantities_are_those_of_a_loop_over_samples(way: type[Samples]) -> None:
    module, batches = problem(5, 3)
    found = sample_curvature(build(way, module, batches))
    J, slopes, curvatures, losses, gradients = expected(module, batches)
    torch.testing.assert_close(found.gram, torch.einsum("icn,jdn->icjd", J, J), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.slopes, slopes, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.curvatures, curvatures, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.losses, losses, rtol=1e-12, atol=1e-12)
    inner = torch.einsum("ic,icjd,jd->ij", found.slopes, found.gram, found.slopes)
    torch.testing.assert_close(inner, gradients @ gradients.mT, rtol=1e-11, atol=1e-11)
    for value in (found.gram, found.slopes, found.curvatures, found.losses):
        assert value.dtype == torch.float64
        assert value.device.type == "cpu"
        assert not value.requires_grad


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("held_rows", "at_once"), [(6, 256), (10, 2), (16, 5), (28, 256), (120, 9)])
def test_however_little_is_held_at_once_the_result_is_the_same(
    way: type[Samples], held_rows: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, batches = problem(4, 2)
    samples = build(way, module, batches)
    whole = sample_curvature(samples)
    samples.held_bytes = held_rows * samples.row_bytes
    monkeypatch.setattr(engine, "_ROWS_AT_ONCE", at_once)
    assert len(list(samples.chunks())) > 1
    parts = sample_curvature(samples)
    torch.testing.assert_close(parts.gram, whole.gram, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(parts.curvatures, whole.curvatures, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(parts.losses, whole.losses, rtol=1e-13, atol=1e-13)


def test_no_more_rows_are_held_than_are_allowed() -> None:
    module, batches = problem(9)
    samples = build(Vectorized, module, batches)
    samples.held_bytes = 30 * samples.row_bytes  # two blocks of 15 rows, 2 samples each
    chunks = list(samples.chunks())
    assert [len(chunk.samples) for chunk in chunks] == [2, 2, 2, 2, 1]
    gram(samples)
    assert len(batches[0].maps) == 5 + 4 + 3 + 2 + 1


def test_all_rows_are_computed_once_where_they_can_be_held() -> None:
    module, batches = problem(9)
    samples = build(Vectorized, module, batches)
    samples.held_bytes = 63 * samples.row_bytes
    gram(samples)
    assert len(batches[0].maps) == len(list(samples.chunks())) == 3


@pytest.mark.parametrize("limit", [1, 3, 7, 8, 100])
def test_chunks_cover_every_row_once_and_in_order(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module, batches = problem(5, 3)
    monkeypatch.setattr(engine, "_ROWS_AT_ONCE", limit)
    rows = [
        (chunk.batch, i, c)
        for chunk in build(Looped, module, batches).chunks()
        for i in chunk.samples
        for c in chunk.outputs
    ]
    assert rows == [(b, i, c) for b, size in enumerate((5, 3)) for i in range(size) for c in range(7)]


def test_samples_are_vectorized_where_that_agrees_with_plain_autograd() -> None:
    module, batches = problem(3)
    assert type(samples_of(ParameterSpace(module), batches)) is Vectorized


class Unvectorized(Rows):
    def vmap(self, function: Callable[[SampleFunction], Any], samples: range) -> Any:
        raise RuntimeError("vmap: it looks like you're calling .item()")


class Scaled(Rows):
    """The wrong function: all outputs, or the loss alone, too large by a thousandth."""

    outputs_by, loss_by = 1.0, 1.0

    def vmap(self, function: Callable[[SampleFunction], Any], samples: range) -> Any:
        def wrong(run: SampleFunction, parameters: Sequence[Tensor], shift: Tensor | None) -> tuple[Tensor, Tensor]:
            loss, z = run(parameters, shift)
            return self.loss_by * loss, self.outputs_by * z

        return super().vmap(lambda run: function(functools.partial(wrong, run)), samples)


class ScaledOutputs(Scaled):
    outputs_by = 1.001


class ScaledLoss(Scaled):
    loss_by = 1.001


@pytest.mark.parametrize("kind", [Unvectorized, ScaledOutputs, ScaledLoss])
def test_samples_are_looped_where_vmap_raises_or_is_wrong(kind: type[Rows]) -> None:
    module, (right,) = problem(3)
    samples = samples_of(ParameterSpace(module), [kind(module, right._x, right._y)])
    assert type(samples) is Looped
    torch.testing.assert_close(sample_curvature(samples).gram, sample_curvature(build(Looped, module, [right])).gram)


def test_what_the_loop_cannot_run_either_is_an_error() -> None:
    class Broken(Unvectorized):
        def cut(self, index: int) -> Cut:
            raise RuntimeError("no such file")

    module, (right,) = problem(3)
    with pytest.raises(RuntimeError, match="no such file"):
        samples_of(ParameterSpace(module), [Broken(module, right._x, right._y)])


def test_samples_of_different_shape_are_refused() -> None:
    class Ragged(Unvectorized):
        def cut(self, index: int) -> Cut:
            cut = super().cut(index)
            return Cut(cut.outputs[: 1 + index % 2], cut.leaves[: 1 + index % 2], cut.loss)

    module, (right,) = problem(3)
    samples = samples_of(ParameterSpace(module), [Ragged(module, right._x, right._y)])
    with pytest.raises(ValueError, match=r"sample 1 of batch 0 has 7 outputs and the first sample 6; .* one shape"):
        gram(samples)


def test_a_result_that_is_too_large_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    module, batches = problem(9)
    monkeypatch.setattr(engine, "_GRAM_BYTES", 8 * 50**2)
    with pytest.raises(
        ValueError, match=r"9 samples with 7 outputs each take .* GiB are allowed; pass num_samples=7 or"
    ):
        samples_of(ParameterSpace(module), batches)
    assert batches[0].cuts == [0]
    assert not batches[0].maps
    monkeypatch.setattr(engine, "_GRAM_BYTES", 8 * 6**2)
    with pytest.raises(ValueError, match="leave this quantity out"):
        samples_of(ParameterSpace(module), batches)


@pytest.mark.parametrize("way", WAYS)
def test_a_row_has_a_part_for_every_parameter_zero_where_it_is_not_reached(way: type[Samples]) -> None:
    module, batches = problem(4)
    rows = build(way, module, batches).rows(Chunk(0, range(1, 3), range(2, 5)))
    assert [r.shape for r in rows] == [(6, p.numel()) for p in module.parameters()]
    J = expected(module, batches)[0]
    torch.testing.assert_close(torch.cat(rows, dim=1), J[1:3, 2:5].reshape(6, -1))
    unused = [name for name, _ in module.named_parameters()].index("unused")
    assert not rows[unused].any()


def test_half_precision_rows_have_float64_inner_products() -> None:
    module, batches = problem(3)
    exact = gram(build(Vectorized, module, batches))
    module.bfloat16()
    rough = [Rows(module, b._x.bfloat16(), b._y) for b in batches]
    found = gram(build(Vectorized, module, rough))
    assert found.dtype == torch.float64
    assert oracles.relative_error(found, exact) < 0.05


def test_inner_products_of_float32_rows_are_good_to_float32() -> None:
    module, batches = problem(6)
    exact = gram(build(Vectorized, module, batches))
    module.float()
    found = gram(build(Vectorized, module, [Rows(module, b._x.float(), b._y) for b in batches]))
    assert oracles.relative_error(found, exact) < 1e-6

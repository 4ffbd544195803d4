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
    return way(ParameterSpace(module), batches, num_outputs, sum(batch.size for batch in batches))


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


def row_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("rows", "at_once"), [(1, 256), (10, 2), (16, 5), (28, 256), (120, 9)])
def test_however_little_is_computed_at_once_the_result_is_the_same(
    way: type[Samples], rows: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, batches = problem(4, 2)
    samples = build(way, module, batches)
    whole = sample_curvature(samples)
    monkeypatch.setattr(engine, "_CHUNK_BYTES", rows * row_bytes(module))
    monkeypatch.setattr(engine, "_ROWS_AT_ONCE", at_once)
    assert len(list(samples.chunks())) > 1
    parts = sample_curvature(samples)
    torch.testing.assert_close(parts.gram, whole.gram, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(parts.curvatures, whole.curvatures, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(parts.losses, whole.losses, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("at_once", [1, 3, 7, 20, 256])
def test_every_row_is_computed_once(way: type[Samples], at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module, batches = problem(5, 3)
    monkeypatch.setattr(engine, "_ROWS_AT_ONCE", at_once)
    samples = build(way, module, batches)
    calls: list[Chunk] = []

    def rows(chunk: Chunk) -> tuple[Tensor, ...]:
        calls.append(chunk)
        return way.rows(samples, chunk)

    monkeypatch.setattr(samples, "rows", rows)
    gram(samples)
    computed = [(chunk.batch, i, c) for chunk in calls for i in chunk.samples for c in chunk.outputs]
    assert sorted(computed) == [(b, i, c) for b, size in enumerate((5, 3)) for i in range(size) for c in range(7)]


MEMORY: dict[str, tuple[int, int | None, int]] = {
    "enough": (100, None, 8),
    "of six samples": (6, None, 6),
    "of six and a bit": (6, 4 * 7, 6),
    "free for six, a quarter of it": (100, 4 * 6, 6),
    "free for less than two, half of it for two": (100, 4, 2),
    "allowed for one, free for more": (1, 100, 2),
}


@pytest.mark.parametrize("name", MEMORY)
def test_as_many_samples_are_taken_as_have_rows_that_can_be_held(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All in units of the rows of one sample."""
    allowed, free, found = MEMORY[name]
    module, batches = problem(5, 3)
    of_sample = 7 * row_bytes(module)
    monkeypatch.setattr(engine, "_ROW_BYTES", allowed * of_sample)
    monkeypatch.setattr(engine, "free_bytes", lambda device: None if free is None else free * of_sample)
    samples = samples_of(ParameterSpace(module), batches)
    assert samples.num_samples == found
    curvature = sample_curvature(samples)
    J, slopes, curvatures, losses, _ = expected(module, batches)
    torch.testing.assert_close(curvature.gram, torch.einsum("icn,jdn->icjd", J[:found], J[:found]))
    torch.testing.assert_close(curvature.slopes, slopes[:found])
    torch.testing.assert_close(curvature.curvatures, curvatures[:found])
    torch.testing.assert_close(curvature.losses, losses[:found])


@pytest.mark.parametrize("free", [None, 3])
def test_two_samples_that_cannot_be_held_are_refused_before_any_work(
    free: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, batches = problem(5, 3)
    of_sample = 7 * row_bytes(module)
    monkeypatch.setattr(engine, "_ROW_BYTES", of_sample)
    monkeypatch.setattr(engine, "free_bytes", lambda device: None if free is None else free * of_sample)
    with pytest.raises(ValueError, match=r"of 2 samples with 7 outputs each the Jacobian rows take .* leave this"):
        samples_of(ParameterSpace(module), batches)
    assert batches[0].cuts == [0]
    assert not batches[0].maps
    one = Rows(module, batches[0]._x[:1], batches[0]._y[:1])
    assert samples_of(ParameterSpace(module), [one]).num_samples == 1


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


def test_as_many_samples_are_taken_as_have_inner_products_of_2_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    module, batches = problem(9)
    monkeypatch.setattr(engine, "_GRAM_BYTES", 8 * 50**2)
    assert samples_of(ParameterSpace(module), batches).num_samples == 7
    monkeypatch.setattr(engine, "_GRAM_BYTES", 8 * 13**2)
    with pytest.raises(ValueError, match=r"of 2 samples with 7 outputs each .* inner products .* leave this quantity"):
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

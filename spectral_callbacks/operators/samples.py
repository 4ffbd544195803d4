"""Samples: each alone a function of the parameters, its Jacobian row by row."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from spectral_callbacks.operators.graphs import dense_gradients
from spectral_callbacks.operators.memory import free_bytes
from spectral_callbacks.operators.outputs import Cut, slopes_of
from spectral_callbacks.operators.parameters import ParameterSpace

_GRAM_BYTES = 2**31  # of the result
_ROW_BYTES = 2**31  # of all rows together
_SHARE = 4  # or one in four of the free bytes, if that is less
_CHUNK_BYTES = 2**27  # of rows computed at once
_ROWS_AT_ONCE = 256  # backward passes run as one, which bounds their activations
_MARGIN = 3.0  # in units of √ε, between two ways to the same derivative
_T = TypeVar("_T")

SampleFunction = Callable[[Sequence[Tensor], Tensor | None], tuple[Tensor, Tensor]]
"""(parameters, shift (C,) of the outputs or None) -> (loss (), outputs (C,)) of one sample."""


class SampleBatch(abc.ABC):
    """One frozen batch, seen sample by sample.

    Attributes:
        size: Number of samples.
    """

    size: int

    @abc.abstractmethod
    def cut(self, index: int) -> Cut:
        """Return one sample alone, evaluated plainly."""

    @abc.abstractmethod
    def vmap(self, function: Callable[[SampleFunction], _T], samples: range) -> _T:
        """Return what a function makes of each of these samples, stacked, all at once by `torch.func.vmap`."""


class Chunk(NamedTuple):
    """Jacobian rows that are computed together: some samples of a batch, and some of their outputs."""

    batch: int
    samples: range
    outputs: range


class Samples(abc.ABC):
    """Jacobian rows and loss derivatives of samples, chunk by chunk.

    Args:
        space: The parameters.
        batches: The samples, in order.
        num_outputs: C, of each sample.
        num_samples: How many samples to take, the first ones.
    """

    def __init__(
        self, space: ParameterSpace, batches: Sequence[SampleBatch], num_outputs: int, num_samples: int
    ) -> None:
        self.space = space
        self.batches = tuple(batches)
        self.num_outputs = num_outputs
        self.num_samples = num_samples

    @abc.abstractmethod
    def rows(self, chunk: Chunk) -> tuple[Tensor, ...]:
        """Return rows of the Jacobian, samples first: one (rows, entries) tensor for each parameter."""

    @abc.abstractmethod
    def scores(self, batch: int, samples: range) -> tuple[Tensor, Tensor, Tensor]:
        """Return losses (m,), slopes (m, C) and curvatures (m, C, C)."""

    def agree_with(self, gram: Tensor) -> bool:
        """Return whether inner products of all rows, (N C, N C), are those of the first and the last row."""
        first = torch.cat([r.flatten() for r in self.rows(Chunk(0, range(1), range(1)))])
        *_, (batch, samples) = self.sample_chunks(1)
        output = range(self.num_outputs - 1, self.num_outputs)
        last = torch.cat([r.flatten() for r in self.rows(Chunk(batch, samples, output))])
        rows = torch.stack([first, last])
        found = gram[[0, -1]][:, [0, -1]]
        margin = _MARGIN * math.sqrt(torch.finfo(rows.dtype).eps)
        return bool(((rows @ rows.mT).cpu() - found).abs().max() <= margin * found.diagonal().max())

    def chunks(self) -> Iterator[Chunk]:
        """Yield all chunks, in the order of their rows."""
        limit = max(1, min(_ROWS_AT_ONCE, _CHUNK_BYTES // _row_bytes(self.space)))
        for batch, samples in self.sample_chunks(max(1, limit // self.num_outputs)):
            for outputs in _split(range(self.num_outputs), limit):
                yield Chunk(batch, samples, outputs)

    def sample_chunks(self, limit: int) -> Iterator[tuple[int, range]]:
        """Yield the samples that are run together, as batch and indices."""
        left = self.num_samples
        for place, batch in enumerate(self.batches):
            size = min(left, batch.size)
            left -= size
            for samples in _split(range(size), limit):
                yield place, samples


class Looped(Samples):
    """One sample after the other, with code of any kind: N forward and N C backward passes of one sample each."""

    def rows(self, chunk: Chunk) -> tuple[Tensor, ...]:
        """Return rows by one backward pass each."""
        rows: list[list[Tensor]] = []
        for index in chunk.samples:
            outputs = self._outputs(chunk.batch, index)
            for c in chunk.outputs:
                rows.append([g.reshape(-1) for g in dense_gradients(outputs[c], self.space.tensors, retain_graph=True)])
        return tuple(map(torch.stack, zip(*rows, strict=True)))

    def scores(self, batch: int, samples: range) -> tuple[Tensor, Tensor, Tensor]:
        """Return them by C backward passes of the loss alone."""
        cuts = [self.batches[batch].cut(index) for index in samples]
        slopes, curvatures = zip(*map(_slope_and_curvature, cuts), strict=True)
        losses = [cut.loss.detach().reshape(()) for cut in cuts]
        return torch.stack(losses), torch.stack(slopes), torch.stack(curvatures)

    def _outputs(self, batch: int, index: int) -> Tensor:
        cut = self.batches[batch].cut(index)
        outputs = torch.cat([z.reshape(-1) for z in cut.outputs])
        if len(outputs) != self.num_outputs:
            raise ValueError(
                f"sample {index} of batch {batch} has {len(outputs)} outputs and the first sample {self.num_outputs}; "
                "per-sample quantities need outputs of one shape: pad the batches to one length."
            )
        return outputs


class Vectorized(Samples):
    """All samples of a chunk at once, by `torch.func.vmap`: raises where the model runs code that is not a function."""

    def rows(self, chunk: Chunk) -> tuple[Tensor, ...]:
        """Return rows by as many backward passes as there are, run as one."""
        parameters = tuple(p.detach() for p in self.space.tensors)

        def rows_of(sample: SampleFunction) -> tuple[Tensor, ...]:
            outputs, pull, *_ = torch.func.vjp(lambda *theta: sample(theta, None)[1], *parameters)
            first = chunk.outputs.start
            unit = torch.eye(len(outputs), dtype=outputs.dtype, device=outputs.device)
            return torch.func.vmap(pull)(unit[first : chunk.outputs.stop])

        rows = self.batches[chunk.batch].vmap(rows_of, chunk.samples)
        return tuple(r.detach().reshape(len(chunk.samples) * len(chunk.outputs), -1) for r in rows)

    def scores(self, batch: int, samples: range) -> tuple[Tensor, Tensor, Tensor]:
        """Return them by reverse mode, twice."""
        parameters = tuple(p.detach() for p in self.space.tensors)

        def scores_of(sample: SampleFunction) -> tuple[Tensor, Tensor, Tensor]:
            dtype = torch.promote_types(parameters[0].dtype, torch.float32)
            zero = torch.zeros(self.num_outputs, dtype=dtype, device=self.space.device)

            def slope_and_loss(shift: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
                slope, loss = torch.func.grad_and_value(lambda shift: sample(parameters, shift)[0])(shift)
                return slope, (slope, loss)

            derivatives = torch.func.jacrev(slope_and_loss, has_aux=True)
            curvature, (slope, loss) = derivatives(zero)
            return loss, slope, curvature

        loss, slope, curvature = self.batches[batch].vmap(scores_of, samples)
        return loss.detach(), slope.detach(), curvature.detach()


def samples_of(space: ParameterSpace, batches: Sequence[SampleBatch]) -> Samples:
    """Return the samples, vectorized if that works and agrees with plain autograd on the first one, else looped.

    All rows of their Jacobians are held at once, in at most 2 GiB and a quarter of what is free, and their inner
    products in 2 GiB: where that is not enough for all samples, only the first ones are taken, but not less than two.

    Raises:
        ValueError: If two are too many.
    """
    num_outputs = sum(z.numel() for z in batches[0].cut(0).outputs)
    num_samples = _fitting(space, sum(batch.size for batch in batches), num_outputs)
    looped, vectorized = (way(space, batches, num_outputs, num_samples) for way in (Looped, Vectorized))
    try:
        plain, fast = map(_first, (looped, vectorized))
    except Exception:  # noqa: BLE001 - the user's code under transforms of torch; what is its own fault the loop raises
        return looped
    return vectorized if all(map(_agree, plain, fast)) else looped


def _fitting(space: ParameterSpace, num_wanted: int, num_outputs: int) -> int:
    """Return how many samples have rows that can be held."""
    free, of_sample = free_bytes(space.device), num_outputs * _row_bytes(space)
    share = _ROW_BYTES if free is None else min(_ROW_BYTES, free // _SHARE)
    by_gram, by_rows = math.isqrt(_GRAM_BYTES // 8) // max(1, num_outputs), share // max(1, of_sample)
    fewest = min(2, num_wanted)
    limit = share if free is None else max(share, free // 2)
    if by_gram < fewest or fewest * of_sample > limit:
        rows, products = fewest * of_sample, 8 * (fewest * num_outputs) ** 2
        raise ValueError(
            f"of {fewest} samples with {num_outputs} outputs each the Jacobian rows take {_gib(rows)} and their inner "
            f"products {_gib(products)}; {_gib(limit)} and {_gib(_GRAM_BYTES)} are allowed. Name a submodule with "
            "fewer outputs as outputs=, or leave this quantity out."
        )
    return max(fewest, min(num_wanted, by_gram, by_rows))


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3g} GiB"


def _row_bytes(space: ParameterSpace) -> int:
    """Return the memory of one row of the Jacobian."""
    return sum(p.numel() * p.element_size() for p in space.tensors)


def _slope_and_curvature(cut: Cut) -> tuple[Tensor, Tensor]:
    sizes = [leaf.numel() for leaf in cut.leaves]
    slopes = slopes_of(cut)
    dense = [torch.zeros_like(z) if s is None else s for s, z in zip(slopes, cut.leaves, strict=True)]
    slope = torch.cat([s.reshape(-1) for s in dense])
    if not slope.requires_grad:
        return slope, slope.new_zeros(sum(sizes), sum(sizes))
    rows = [
        torch.autograd.grad(s, cut.leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        for s in slope.unbind()
    ]
    return slope.detach(), torch.stack([torch.cat([r.reshape(-1) for r in row]) for row in rows])


def _first(samples: Samples) -> tuple[Tensor, Tensor]:
    """Return a row, and the scores, of the first sample."""
    row, scores = samples.rows(Chunk(0, range(1), range(1))), samples.scores(0, range(1))
    return torch.cat([r.reshape(-1) for r in row]), torch.cat([s.reshape(-1) for s in scores])


def _agree(a: Tensor, b: Tensor) -> bool:
    margin = _MARGIN * math.sqrt(torch.finfo(b.dtype).eps)
    return a.shape == b.shape and bool((a - b).abs().max() <= margin * a.abs().max())


def _split(whole: range, limit: int) -> Iterator[range]:
    for start in range(whole.start, whole.stop, limit):
        yield range(start, min(start + limit, whole.stop))

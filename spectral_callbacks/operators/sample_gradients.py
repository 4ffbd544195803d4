"""The gradients of samples, a matrix with a row for each, known by its factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from spectral_callbacks.operators.factors import Factor, LatestRows
from spectral_callbacks.operators.graphs import BatchGraphs
from spectral_callbacks.operators.parameters import ParameterSpace

Factors = list[tuple[int, Factor]]
"""(index of a parameter, the gradients by it of all samples of a batch, as shares in the mean over the batch)."""


@dataclasses.dataclass(frozen=True)
class SampleGram:
    """What N samples' gradients have to do with each other; each is of the sample's own loss. float64, on the CPU.

    Attributes:
        gram: (N, N), inner products.
        by_parameter: Their parts from each parameter, by its name, where they were asked for.
        along: (N, k), inner products with k directions, where some were given.
    """

    gram: Tensor
    by_parameter: dict[str, Tensor] | None = None
    along: Tensor | None = None


class SampleGramSum:
    """Adds up inner products, parameter by parameter.

    Args:
        space: The parameters.
        num_samples: N.
        by_parameter: Whether their parts are kept.
        directions: (n, k), whose inner products with the gradients are taken too.
    """

    def __init__(
        self, space: ParameterSpace, num_samples: int, *, by_parameter: bool = False, directions: Tensor | None = None
    ) -> None:
        if directions is not None and len(directions) != space.size:
            raise ValueError(
                f"directions have {len(directions)} entries and the parameters {space.size}; pass (n, k), of the "
                "parameters that are measured now."
            )
        self._space = space
        self._places = list(space.slices.values())
        self._num_samples = num_samples
        self._gram: Tensor | None = None
        self._parts: dict[str, Tensor] | None = {} if by_parameter else None
        self._directions = directions
        self._latest = LatestRows()
        k = 0 if directions is None else directions.shape[1]
        self._along = torch.zeros(num_samples, k, dtype=torch.float64)

    def add(self, parameter: int, factor: Factor) -> None:
        """Take one parameter in."""
        part = factor.gram_after(self._latest)
        if self._gram is None:
            self._gram = part.clone()
        else:
            if part.dtype != self._gram.dtype:
                self._gram = self._gram.to(torch.promote_types(part.dtype, self._gram.dtype))
            self._gram.add_(part)
        if self._parts is not None:
            self._parts[self._space.names[parameter]] = part.to("cpu", torch.float64)
        if self._directions is not None:
            V = _part(self._directions, self._places[parameter], self._space.tensors[parameter].shape)
            self._along += factor.products(V).to("cpu", torch.float64)

    def result(self, scale: float) -> SampleGram:
        """Return the inner products of gradients that are `scale` times those that were added."""
        parts = None if self._parts is None else {name: scale**2 * part for name, part in self._parts.items()}
        along = None if self._directions is None else scale * self._along
        gram = self._along.new_zeros(self._num_samples, self._num_samples) if self._gram is None else self._gram
        return SampleGram(scale**2 * gram.to("cpu", torch.float64), parts, along)


class SampleGradients(BatchGraphs[Factors]):
    """The matrix G of the gradients of N samples, (N, n), never formed: each row is of the sample's own loss.

    A batch is known by the factors that a backward pass over it leaves: the inputs of the layers and the gradients of
    their outputs. They are kept between products by the rule of `BatchGraphs`, else every product runs the batch again.

    Args:
        space: The parameters, n numbers.
        batches: One closure a batch; each returns the factors of its samples.
        sizes: Number of samples of each.

    Attributes:
        num_samples: N.
    """

    def __init__(self, space: ParameterSpace, batches: Sequence[Callable[[], Factors]], sizes: Sequence[int]) -> None:
        super().__init__(space, len(sizes), sizes, None)
        self.num_samples = sum(sizes)
        self._places = list(space.slices.values())
        self._batches = tuple(batches)
        self._sizes = tuple(sizes)

    def products(
        self,
        V: Tensor,  # (n, k)
    ) -> Tensor:  # (N, k)
        """Return G V: a pass over each batch, or none where its factors are kept, and two GEMMs a layer and column."""
        return torch.cat([self._products(factors, size, V) for factors, size in self._factors()])

    def combined(
        self,
        C: Tensor,  # (N, k)
    ) -> Tensor:  # (n, k)
        """Return Gᵀ C, at the cost of `products`."""
        parts = C.to(self.space.device, self.space.dtype).split(self._sizes)
        total = torch.zeros(self.space.size, C.shape[1], dtype=self.space.dtype, device=self.space.device)
        for (factors, size), part in zip(self._factors(), parts, strict=True):
            self._add_combined(total, factors, size, part)
        return total

    def second_moment(
        self,
        V: Tensor,  # (n, k)
    ) -> Tensor:  # (n, k)
        """Return Gᵀ G V in one pass."""
        total = torch.zeros_like(V)
        for factors, size in self._factors():
            self._add_combined(total, factors, size, self._products(factors, size, V))
        return total

    def _build(self, index: int) -> Factors:
        return self._batches[index]()

    def _factors(self) -> Iterator[tuple[Factors, int]]:
        return zip(self.graphs(), self._sizes, strict=True)

    def _products(self, factors: Factors, size: int, V: Tensor) -> Tensor:
        total = torch.zeros(size, V.shape[1], dtype=self.space.dtype, device=self.space.device)
        for parameter, factor in factors if V.shape[1] else ():
            part = _part(V, self._places[parameter], self.space.tensors[parameter].shape)
            total.add_(factor.products(part), alpha=size)
        return total

    def _add_combined(self, total: Tensor, factors: Factors, size: int, part: Tensor) -> None:
        for parameter, factor in factors if part.shape[1] else ():
            total[self._places[parameter]].add_(factor.combined(part).reshape(part.shape[1], -1).mT, alpha=size)


def _part(V: Tensor, place: slice, shape: Sequence[int]) -> Tensor:  # (k, *shape)
    """Return the part of k vectors that belongs to one parameter."""
    return V[place].mT.reshape(V.shape[1], *shape)

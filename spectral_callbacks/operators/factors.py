"""Gradients of many samples by one tensor, in product form: all that is asked of them, without N numbers an entry."""

from __future__ import annotations

import abc
import functools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import final

import torch
from torch import Tensor

from spectral_callbacks.operators import tiles
from spectral_callbacks.operators.tiles import GramSum, pieces, promoted


class LatestRows:
    """Rows whose inner products were taken last: those of a layer's output gradients serve its weight and its bias."""

    def __init__(self) -> None:
        self._rows: Tensor | None = None
        self._gram: Tensor | None = None

    def keep(self, rows: Tensor, gram: Tensor) -> None:
        """Remember the inner products (N, N) of rows (N, m)."""
        self._rows, self._gram = rows, gram

    def gram(self, rows: Tensor) -> Tensor | None:
        """Return the inner products of these rows, or None where they lie elsewhere in memory."""
        known = self._rows
        if known is None or rows.data_ptr() != known.data_ptr():
            return None
        return (
            self._gram
            if (rows.shape, rows.stride(), rows.dtype) == (known.shape, known.stride(), known.dtype)
            else None
        )


class Factor(abc.ABC):
    """The gradients J_i of N samples by one tensor w, held as the factors that they are made of.

    A subclass knows the rows of all J_i; everything else follows from a few rows at a time, and is replaced where the
    factors give it more cheaply. No method takes more than 128 MiB beyond its arguments and its result, as long as one
    row of w for all samples fits. Half precision is promoted to float32; sums are taken in the dtype of the factors.

    Attributes:
        num_samples: N.
        shape: Of w.
    """

    num_samples: int
    shape: torch.Size

    @abc.abstractmethod
    def block(
        self,
        part: slice,  # of the first dimension of w; a scalar counts as (1,)
    ) -> Tensor:  # (N, m)
        """Return the gradients by these rows of w, flattened."""

    @property
    def kind(self) -> Hashable:
        """Factors of equal kinds add up to one of this kind, by `joined`; None stands alone."""
        return None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the factor consists of, as `joined` takes it."""
        return ()

    def joined(
        self,
        tensors: Sequence[tuple[Tensor, ...]],  # of all summands, this one's too
    ) -> Factor:
        """Return the sum of factors of this kind in product form."""
        raise TypeError(f"{type(self).__name__} of {len(tensors)} summands has no product form; add their blocks.")

    def gram(self) -> Tensor:  # (N, N)
        """Return the inner products <J_i, J_j>."""
        total: GramSum | None = None
        for J in map(self.block, self.parts()):
            total = total or GramSum(J, self.num_samples)
            total.add(J)
        if total is None:
            raise ValueError(f"w has the shape {tuple(self.shape)} and no entry; leave it out.")
        return total.value()

    def gram_after(self, latest: LatestRows) -> Tensor:  # (N, N)
        """Return the inner products, with what the factor before left, and leave what the next may need."""
        return self.gram()

    def products(
        self,
        V: Tensor,  # (k, *shape)
    ) -> Tensor:  # (N, k)
        """Return the inner products <J_i, V_j>."""
        rows = V.reshape(len(V), self.num_rows, -1)
        return _added(_times(self.block(part), rows[:, part].flatten(1).T) for part in self.parts())

    def combined(
        self,
        C: Tensor,  # (N, k)
    ) -> Tensor:  # (k, *shape)
        """Return the sums Σ_i C_ij J_i."""
        rows = [_times(self.block(part).T, C).T for part in self.parts()]
        return torch.cat(rows, dim=1).view(-1, *self.shape)

    @property
    def num_rows(self) -> int:
        """The size of the first dimension of w, 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    def parts(self) -> Iterator[slice]:
        """Yield the rows of w, as many at a time as a tile holds."""
        return pieces(self.num_rows, tiles.TILE_BYTES // max(1, 8 * self.num_samples * self.shape[1:].numel()))


@final
class Rows(Factor):
    """Gradients that are given entry by entry: those of biases and of gains.

    Args:
        rows: (N, *shape).

    Example:
        >>> import torch
        >>> Rows(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).gram().tolist()
        [[5.0, 11.0], [11.0, 25.0]]
    """

    def __init__(self, rows: Tensor) -> None:
        (self._rows,) = promoted(rows)
        self.num_samples = len(rows)
        self.shape = rows.shape[1:]

    @property
    def kind(self) -> Hashable:
        """The shape."""
        return (Rows, self.shape)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The rows."""
        return (self._rows,)

    def joined(self, tensors: Sequence[tuple[Tensor, ...]]) -> Rows:
        """Return the sum of the rows."""
        total = torch.zeros_like(self._rows)
        for (rows,) in tensors:
            total += rows
        return Rows(total)

    def block(self, part: slice) -> Tensor:
        """Return the gradients by these rows of w, flattened."""
        return self._rows.reshape(self.num_samples, self.num_rows, -1)[:, part].flatten(1)

    def gram_after(self, latest: LatestRows) -> Tensor:
        """Return the inner products: those of the factor before, if it had the same rows."""
        known = latest.gram(self._rows) if self._rows.ndim == 2 else None
        return self.gram() if known is None else known

    def gram(self) -> Tensor:
        """Return the inner products <J_i, J_j>: one product of matrices."""
        J = self._rows.reshape(self.num_samples, -1)
        if J.numel() * self.num_samples < 2**26:
            return J @ J.T
        total = GramSum(J, self.num_samples)
        total.add(J)
        return total.value()


@final
class Sum(Factor):
    """Gradients that add up, as those of all uses of one weight.

    Factors of one kind are joined, which keeps the product form; mixtures are summed a few rows of w at a time. The
    Gram matrix is that of the sum, not the sum of the Gram matrices.

    Args:
        factors: At least one; all of the same samples and shape.

    Raises:
        ValueError: If they are not.

    Example:
        >>> import torch
        >>> a, b = Rows(torch.tensor([[1.0], [2.0]])), Rows(torch.tensor([[1.0], [-2.0]]))
        >>> Sum([a, b]).gram().tolist()
        [[4.0, 0.0], [0.0, 0.0]]
    """

    def __init__(self, factors: Sequence[Factor]) -> None:
        sizes = {(f.num_samples, *f.shape) for f in factors}
        if len(sizes) != 1:
            raise ValueError(
                f"the gradients to add have the sizes {sorted(sizes)}, samples first; pass at least one factor, and "
                "those of the same samples by the same tensor."
            )
        self._factors = tuple(factors)
        self.num_samples = factors[0].num_samples
        self.shape = factors[0].shape

    def block(self, part: slice) -> Tensor:
        """Return the gradients by these rows of w, flattened."""
        return _added([f.block(part) for f in self._factors])

    def gram(self) -> Tensor:
        """Return the inner products of the sums."""
        terms = self._terms()
        if len(terms) == 1:
            return terms[0].gram()
        return super().gram() if len(terms) == len(self._factors) else Sum(terms).gram()

    def products(self, V: Tensor) -> Tensor:
        """Return the inner products with V_j of the sums."""
        return _added([f.products(V) for f in self._factors])

    def combined(self, C: Tensor) -> Tensor:
        """Return the sums Σ_i C_ij J_i."""
        return _added([f.combined(C) for f in self._factors])

    def _terms(self) -> list[Factor]:
        kinds: dict[Hashable, list[Factor]] = {}
        for factor in self._factors:
            kinds.setdefault(factor.kind or factor, []).append(factor)
        terms: list[Factor] = []
        for factors in kinds.values():
            tensors = [f.tensors for f in factors]
            fits = sum(t.nbytes for summand in tensors for t in summand) <= tiles.MAX_BYTES
            terms += [factors[0].joined(tensors)] if len(factors) > 1 and fits else factors
        return terms


def _times(J: Tensor, X: Tensor) -> Tensor:
    return J @ X.to(J.dtype)


def _added(tensors: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, tensors)

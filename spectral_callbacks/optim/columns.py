"""Columns of a fixed orthonormal basis: which a matrix has most of, and what is kept when they change."""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from spectral_callbacks.linalg import dct, dct_basis, inverse_dct

_BLOCK = 128  # lines whose squares are summed at once, in the cache


class Basis(abc.ABC):
    """An orthonormal basis Q of the lines of a matrix; some of its columns span the subspace to work in.

    Args:
        width: Length of a line, and number of columns.
    """

    def __init__(self, width: int) -> None:
        self.width = width

    @abc.abstractmethod
    def analyze(
        self,
        lines: Tensor,  # (lines, width)
    ) -> Tensor:  # (lines, width)
        """Return the coefficients of every line in every column: lines @ Q."""

    @abc.abstractmethod
    def synthesize(
        self,
        coefficients: Tensor,  # (lines, width)
    ) -> Tensor:  # (lines, width)
        """Return the lines with these coefficients: coefficients @ Qᵀ."""

    @abc.abstractmethod
    def project(
        self,
        lines: Tensor,  # (lines, width)
        columns: Tensor,  # (r,)
    ) -> Tensor:  # (lines, r)
        """Return the coefficients of every line in some columns."""

    @abc.abstractmethod
    def add_(
        self,
        lines: Tensor,  # (lines, width)
        coefficients: Tensor,  # (lines, r)
        columns: Tensor,  # (r,)
        *,
        factor: float = 1.0,
        decay: float = 1.0,
    ) -> None:
        """Set lines to decay · lines + factor · coefficients @ Q[:, columns]ᵀ, in place."""


class Cosines(Basis):
    """The cosines of the DCT-II; in full they cost n log n operations a line."""

    def analyze(self, lines: Tensor) -> Tensor:
        """See `Basis`."""
        return dct(lines)

    def synthesize(self, coefficients: Tensor) -> Tensor:
        """See `Basis`."""
        return inverse_dct(coefficients)

    def project(self, lines: Tensor, columns: Tensor) -> Tensor:
        """See `Basis`."""
        return lines @ self._columns(lines, columns)

    def add_(
        self, lines: Tensor, coefficients: Tensor, columns: Tensor, *, factor: float = 1.0, decay: float = 1.0
    ) -> None:
        """See `Basis`."""
        lines.addmm_(coefficients, self._columns(lines, columns).mT, beta=decay, alpha=factor)

    def _columns(self, lines: Tensor, columns: Tensor) -> Tensor:  # (width, r)
        return dct_basis(self.width, lines.dtype, lines.device).index_select(1, columns)


class Entries(Basis):
    """The identity: a column is one entry of every line."""

    def analyze(self, lines: Tensor) -> Tensor:
        """See `Basis`."""
        return lines

    def synthesize(self, coefficients: Tensor) -> Tensor:
        """See `Basis`."""
        return coefficients

    def project(self, lines: Tensor, columns: Tensor) -> Tensor:
        """See `Basis`."""
        return lines.index_select(1, columns)

    def add_(
        self, lines: Tensor, coefficients: Tensor, columns: Tensor, *, factor: float = 1.0, decay: float = 1.0
    ) -> None:
        """See `Basis`."""
        lines.mul_(decay).index_add_(1, columns, coefficients, alpha=factor)


BASES: dict[str, type[Basis]] = {"dct": Cosines, "identity": Entries}


def energies(
    coefficients: Tensor,  # (lines, n)
) -> Tensor:  # (n,)
    """Return the sum of squares of each column."""
    total = coefficients.new_zeros(coefficients.shape[1])
    for block in coefficients.split(_BLOCK):
        total += block.square().sum(dim=0)
    return total


def strongest(
    energies: Tensor,  # (n,)
    rank: int,
) -> Tensor:  # (rank,), int32
    """Return the columns of the largest energies, in ascending order; of equal ones those that come first.

    By Parseval what the other columns hold is the squared error of the projection on these, so that no other choice of
    as many columns has a smaller one; it is at most the share 1 - rank / n of the whole. (The paper's code ranks by the
    sums of absolute values instead.)

    Example:
        >>> import torch
        >>> strongest(torch.tensor([4.0, 1.0, 9.0, 4.0]), 2)
        tensor([0, 2], dtype=torch.int32)
    """
    return energies.argsort(descending=True, stable=True)[:rank].sort().values.int()


def carry_over(
    columns: Tensor,  # (r,)
    state: dict[str, Tensor],
) -> None:
    """Move what a state holds of each of its columns to the columns that are selected now, in place.

    Both selections are of one orthonormal basis, so that the rotation between them, Q[:, old]ᵀ Q[:, new], is a part of
    a permutation: a column that is kept keeps its moments and its age, a new one starts at zero.

    Args:
        columns: The selected columns, ascending.
        state: With `columns` the ones selected before, and their `ages` (r,), `exp_avg` and `exp_avg_sq` (lines, r).

    Example:
        >>> import torch
        >>> moments = {"exp_avg": torch.tensor([[5.0, 6.0]]), "exp_avg_sq": torch.tensor([[7.0, 8.0]])}
        >>> state = {"columns": torch.tensor([0, 2]), "ages": torch.tensor([3, 4]), **moments}
        >>> carry_over(torch.tensor([1, 2]), state)
        >>> state["ages"], state["exp_avg"]
        (tensor([0, 4]), tensor([[0., 6.]]))
    """
    before = state["columns"]
    if torch.equal(before, columns):
        return
    places = torch.searchsorted(before, columns).clamp_(max=len(before) - 1)
    kept = before[places] == columns
    for name in ("ages", "exp_avg", "exp_avg_sq"):
        values = state[name]
        values.copy_(torch.where(kept, values.index_select(-1, places), 0))
    before.copy_(columns)

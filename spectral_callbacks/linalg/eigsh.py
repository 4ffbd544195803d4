"""A few extreme eigenpairs of a symmetric operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from spectral_callbacks.linalg.krylov import Krylov
from spectral_callbacks.linalg.operator import LinearOperator
from spectral_callbacks.linalg.result import MAX_ASYMMETRY, Eigenpairs, Status

Which = Literal["LA", "SA", "BE"]

_SMALL = 0.01  # eigenvalues below this share of ‖A‖ are sought as if they were as large
_NEXT = 0.05  # residual, relative to the wanted ones, at which the eigenpairs next to them count as seen ...
_NEXT_LOOSENESS = 15.0  # ... or so many times rtol, where that is more
_LOOK = 3  # products from a fresh random vector before the rest of the space counts as seen
_MAX_BASIS = 80  # columns; beyond, the basis is compressed to its best half


def eigsh(
    A: LinearOperator,  # (n, n), symmetric
    k: int = 1,
    *,
    which: Which = "LA",
    rtol: float = 3e-3,
    max_matvecs: int = 100,
    generator: torch.Generator,
    start: Tensor | None = None,  # (n,) or (n, s)
) -> Eigenpairs:
    """Find k extreme eigenpairs of A by Lanczos iteration with full reorthogonalisation.

    The search ends when the residual ‖A x - θ x‖ of every wanted pair is at most rtol |θ| (for eigenvalues that are
    small against ‖A‖: at most rtol ‖A‖ / 100). An error of the value is of the order residual² / gap, far below the
    residual.

    A residual does not tell that no larger eigenvalue was missed; nearly all large errors of such searches are that.
    Two guards make it rare: the pairs next to the wanted ones must have been seen as well (to 5 %, or 15 rtol if that
    is more), and for k > 1 the search looks on from a fresh random vector, so that repeated eigenvalues are found as
    often as they occur.

    Args:
        A: Symmetric operator.
        k: Number of pairs, at least 1 and at most n.
        which: "LA" the largest algebraic (not by magnitude), largest first; "SA" the smallest, smallest first; "BE"
            both ends, the larger half from above, in descending order.
        rtol: Residual to reach, relative to each value.
        max_matvecs: Products that may be spent, at least k.
        generator: Source of the start vector, on A's device.
        start: Approximate eigenvectors, for example of a matrix a few training steps ago; each costs one product.

    Returns:
        Values, orthonormal vectors, residuals, and a status: `BUDGET` when the products ran out, `BREAKDOWN` when they
        are not those of a symmetric matrix, `NONFINITE` when one is not finite (the values then are NaN).

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> from spectral_callbacks.linalg import Matrix
        >>> A = Matrix(torch.diag(torch.tensor([3.0, 1.0, -5.0])))
        >>> pairs = eigsh(A, generator=torch.Generator().manual_seed(0))
        >>> round(pairs.values.item(), 4), pairs.status.name
        (3.0, 'CONVERGED')

    References:
        Parlett, The Symmetric Eigenvalue Problem (1998), chapter 13; Stewart, A Krylov-Schur algorithm (2002).
    """
    check_search(k, which=which, rtol=rtol, max_matvecs=max_matvecs)
    n = A.shape[0]
    if A.shape != (n, n) or k > n:
        raise ValueError(f"k={k} eigenpairs of an operator of shape {A.shape}: it must be square, with k at most n.")
    if start is not None and (start.ndim > 2 or start.shape[0] != n):
        raise ValueError(f"start has shape {tuple(start.shape)}; pass (n,) or (n, s) with n = {n}.")
    starts = () if start is None else start.reshape(n, -1).unbind(dim=1)
    search = Search(A, k, which=which, rtol=rtol, max_matvecs=max_matvecs, generator=generator)
    return search.run(starts, look=k > 1)


def check_search(k: int, *, which: str, rtol: float, max_matvecs: int) -> None:
    """Raise unless these settings make sense.

    Raises:
        ValueError: Naming the setting, its rule and the remedy.
    """
    if which not in get_args(Which):
        raise ValueError(f"which={which!r} must be one of {', '.join(map(repr, get_args(Which)))}.")
    if k < 1:
        raise ValueError(f"k={k} eigenpairs were asked for; ask for at least 1.")
    if not 0 < rtol < 1:
        raise ValueError(f"rtol={rtol} must lie between 0 and 1, for example 3e-3.")
    if max_matvecs < k:
        raise ValueError(f"max_matvecs={max_matvecs} must be at least k={k}: each pair takes a product.")


class Search:
    """One search: a Krylov basis that grows until what is wanted is found.

    Args:
        A: Symmetric operator.
        k: Number of pairs.
        which: The end of the spectrum.
        rtol: Residual to reach.
        max_matvecs: Products that may be spent.
        generator: Draws random vectors.
    """

    def __init__(
        self,
        A: LinearOperator,
        k: int,
        *,
        which: Which,
        rtol: float,
        max_matvecs: int,
        generator: torch.Generator,
    ) -> None:
        self._A = A
        self._k = k
        self._which: Which = which
        self._rtol = rtol
        self._max_matvecs = max_matvecs
        self._generator = generator
        self._krylov = Krylov(A)
        self._values = torch.zeros(0, dtype=torch.float64)
        self._S = torch.zeros(0, 0, dtype=torch.float64)

    def run(self, starts: Sequence[Tensor], *, look: bool) -> Eigenpairs:
        """Search from these vectors, or from a random one; with `look`, also where they do not lead."""
        krylov = self._krylov
        for start in starts:
            if krylov.add(start) and self._has_budget():
                krylov.expand()
        if krylov.dimension == 0 and krylov.finite:
            self._explore(1)
        seen: Tensor | None = None
        while True:
            status = self._solve()
            if status is not None:
                break
            follow = self._unfinished()
            if follow is None and look and not self._agrees(seen):
                seen = self._values[self._wanted(self._k)]
                num_products = self._explore(_LOOK)
                if not num_products:
                    status = Status.BUDGET if self._spans_less_than_all() else Status.CONVERGED
                    break
                if num_products < _LOOK and self._krylov.num_directions:
                    seen = None  # a look cut short has not looked
            elif follow is None:
                status = Status.CONVERGED
                break
            elif not self._has_budget():
                status = Status.BUDGET
                break
            elif not self._follow(follow):
                status = Status.BREAKDOWN
                break
        if status is not Status.NONFINITE and krylov.asymmetry > MAX_ASYMMETRY:
            status = Status.BREAKDOWN
        return self._pairs(status)

    def _pairs(self, status: Status) -> Eigenpairs:
        """Return the wanted pairs of the basis, fewer than asked for where it has fewer."""
        if status is Status.NONFINITE:
            values = torch.full((self._k,), torch.nan, dtype=torch.float64)
            vectors = torch.zeros(self._A.shape[0], self._k, dtype=self._A.dtype, device=self._A.device)
            return Eigenpairs(values, vectors, values, status, self._krylov.num_matvecs)
        wanted = self._wanted(self._k)
        S = self._S[:, wanted]
        return Eigenpairs(
            self._values[wanted],
            self._krylov.vectors(S),
            torch.hypot(self._krylov.residuals(S), self._krylov.asymmetric_part(S)),
            status,
            self._krylov.num_matvecs,
        )

    def companions(self, count: int, *, within: float) -> Tensor:  # (n, at most count)
        """Return the Ritz vectors next to the wanted ones whose values are within some distance of a wanted value."""
        wanted = self._wanted(self._k)
        beside = self._beside(count)
        distances = (self._values[beside, None] - self._values[wanted]).abs().amin(dim=1)
        return self._krylov.vectors(self._S[:, beside[distances <= within]])

    def _beside(self, count: int) -> Tensor:
        """Return the indices of the `count` most extreme Ritz values that are not wanted."""
        more = self._wanted(self._k + count)
        return more[~torch.isin(more, self._wanted(self._k))]

    def _solve(self) -> Status | None:
        """Solve the projected problem; return a status if the search cannot go on."""
        krylov = self._krylov
        if not krylov.finite:
            return Status.NONFINITE
        self._values, self._S = torch.linalg.eigh(krylov.projection)
        if krylov.dimension >= max(_MAX_BASIS, 4 * self._k):
            best = self._wanted(max(_MAX_BASIS // 2, 2 * self._k))
            krylov.compress(self._S[:, best], self._values[best])
            self._values, self._S = torch.linalg.eigh(krylov.projection)
        return None

    def _wanted(self, count: int) -> Tensor:
        """Return the indices of the `count` most extreme Ritz values, in the order that is reported."""
        descending = torch.arange(len(self._values)).flip(0)
        if self._which == "LA":
            return descending[:count]
        if self._which == "SA":
            return descending.flip(0)[:count]
        low = min(count // 2, len(descending) // 2)
        return torch.cat(
            [descending[: min(count - count // 2, len(descending) - low)], descending[len(descending) - low :]]
        )

    def _unfinished(self) -> Tensor | None:
        """Return the index of a Ritz pair that is to be improved, or None if the stop rule holds."""
        wanted = self._wanted(self._k)
        scale = self._values[wanted].abs().clamp_min(_SMALL * self._values.abs().max().item())
        residuals = self._krylov.residuals(self._S)
        rounding = 10 * torch.finfo(self._A.dtype).eps * self._krylov.norm
        open_pairs = wanted[residuals[wanted] > (self._rtol * scale).clamp_min(rounding)]
        if len(open_pairs):
            return open_pairs[0]
        if len(wanted) < self._k:
            return wanted[0]
        beside = self._beside(2 if self._which == "BE" else 1)
        open_pairs = beside[residuals[beside] > max(_NEXT, _NEXT_LOOSENESS * self._rtol) * scale.min()]
        return open_pairs[0] if len(open_pairs) else None

    def _follow(self, index: Tensor) -> bool:
        """Multiply the residual of a Ritz pair; where the basis is closed under A, a random vector, if one is left."""
        krylov = self._krylov
        direction = krylov.coupling(self._S[:, index])
        if krylov.num_directions and torch.linalg.vector_norm(direction) > 0:
            krylov.expand(direction)
            return True
        return self._explore(1) > 0

    def _explore(self, num_products: int) -> int:
        """Go on from a random vector for some products; return for how many there was room and budget."""
        for attempt in range(num_products):
            if not self._has_budget() or not self._krylov.finite:
                return attempt
            if attempt == 0:
                # Where the basis spans nearly all this adds nothing, and one of its own directions is next.
                self._krylov.add(self._random())
            if not self._krylov.num_directions:
                return attempt
            self._krylov.expand()
        return num_products

    def _agrees(self, seen: Tensor | None) -> bool:
        """Whether the values are those before the last look."""
        if seen is None:
            return False
        now = self._values[self._wanted(self._k)]
        return bool(((now - seen).abs() <= self._rtol * now.abs().max()).all())

    def _spans_less_than_all(self) -> bool:
        return self._krylov.dimension < self._A.shape[0]

    def _has_budget(self) -> bool:
        return self._krylov.num_matvecs < self._max_matvecs

    def _random(self) -> Tensor:
        return torch.randn(self._A.shape[0], generator=self._generator, dtype=self._A.dtype, device=self._A.device)

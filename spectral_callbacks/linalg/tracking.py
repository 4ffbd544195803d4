"""Eigenpairs of a matrix that changes slowly, such as the Hessian along a training run."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_callbacks.linalg.eigsh import Search, Which, check_search
from spectral_callbacks.linalg.operator import LinearOperator
from spectral_callbacks.linalg.result import Eigenpairs, Status

_COMPANIONS = 2  # eigenvectors kept beyond those asked for
_LEAD = 0.5  # step of the extrapolation, in units of the last change; 0.3 to 0.8 cost the same
_ALIGNED = 0.7  # overlap below which two searches did not find the same eigenvector
_NEAR = 0.2  # relative distance at which an eigenvalue may overtake a wanted one by the next search


class Tracker:
    """`eigsh` again and again, each time from where the last search ended.

    A search starts from the last eigenvectors, each moved on by half its last change, and from up to two more whose
    eigenvalues are within 20 % and could overtake. The first and then every tenth search also look on from a random
    vector, so that a direction none of them has a part in cannot stay hidden for long.

    Args:
        k: Number of pairs.
        which: As in `eigsh`.
        rtol: As in `eigsh`.
        max_matvecs: Products that one search may spend.
        look_every: How many searches come to one look; 1 where matrices differ by more than a small change.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> from spectral_callbacks.linalg import Matrix
        >>> tracker, generator = Tracker(), torch.Generator().manual_seed(0)
        >>> A = torch.diag(torch.linspace(1.0, 10.0, 200) ** 2)
        >>> cold = tracker(Matrix(A), generator=generator)
        >>> warm = tracker(Matrix(1.01 * A), generator=generator)
        >>> warm.num_matvecs < cold.num_matvecs
        True
    """

    def __init__(
        self, k: int = 1, *, which: Which = "LA", rtol: float = 3e-3, max_matvecs: int = 100, look_every: int = 10
    ) -> None:
        check_search(k, which=which, rtol=rtol, max_matvecs=max_matvecs)
        self._k = k
        self._which: Which = which
        self._rtol = rtol
        self._max_matvecs = max_matvecs
        self._look_every = look_every
        self._vectors: Tensor | None = None
        self._before: Tensor | None = None
        self._num_warm = 0

    def __call__(self, A: LinearOperator, *, generator: torch.Generator) -> Eigenpairs:
        """Find the eigenpairs of A, as `eigsh` does."""
        search = Search(
            A, min(self._k, A.shape[0]), which=self._which, rtol=self._rtol, max_matvecs=self._max_matvecs,
            generator=generator,
        )  # fmt: skip
        starts = self._starts(A)
        self._num_warm = self._num_warm + 1 if starts else 0
        pairs = search.run(starts, look=self._num_warm % self._look_every == 0)
        self._keep(search, pairs)
        return pairs

    def forget(self) -> None:
        """Let the next search start cold."""
        self._vectors = self._before = None

    def _starts(self, A: LinearOperator) -> list[Tensor]:
        known = self._vectors
        if known is None or (known.shape[0], known.dtype, known.device) != (A.shape[0], A.dtype, A.device):
            self.forget()
            return []
        starts = list(known.unbind(dim=1))
        if self._before is not None:
            overlaps = A.gram(self._before, known[:, : self._before.shape[1]]).diagonal().tolist()
            for index, overlap in enumerate(overlaps):
                if abs(overlap) > _ALIGNED:
                    before = self._before[:, index] if overlap > 0 else -self._before[:, index]
                    starts[index] = starts[index] + _LEAD * (starts[index] - before)
        return starts

    def _keep(self, search: Search, pairs: Eigenpairs) -> None:
        if pairs.status not in (Status.CONVERGED, Status.BUDGET):
            self.forget()
            return
        self._before = None if self._vectors is None else self._vectors[:, : self._k].clone()
        companions = search.companions(_COMPANIONS, within=_NEAR * pairs.values.abs().min().item())
        self._vectors = torch.cat([pairs.vectors, companions], dim=1)

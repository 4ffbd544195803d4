"""Vectors spread over two processes: each holds its rows, and nothing but `gram` speaks with the other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from spectral_callbacks.linalg import Eigenpairs, LinearOperator, Status, Tracker, eigsh
from spectral_callbacks.linalg.eigsh import Which
from tests import oracles
from tests.problems import SPECTRA, symmetric

NUM_RANKS = 2


class Group:
    """Collectives of threads that stand for processes; a rank that does not come breaks the others' wait."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(NUM_RANKS, timeout=20)
        self._shares: list[Tensor] = [torch.empty(0)] * NUM_RANKS

    def gather(self, rank: int, share: Tensor) -> list[Tensor]:
        self._shares[rank] = share
        self._barrier.wait()
        shares = list(self._shares)
        self._barrier.wait()
        return shares


class Shard(LinearOperator):
    """The rows of a symmetric matrix that one rank holds."""

    def __init__(self, A: Tensor, rank: int, group: Group, *, reduce: bool = True) -> None:
        self._rows = A.tensor_split(NUM_RANKS)[rank]
        self._rank, self._group, self._reduce = rank, group, reduce
        self.shape = (len(self._rows), len(self._rows))
        self.dtype = A.dtype
        self.device = A.device

    def matmat(self, X: Tensor) -> Tensor:
        return self._rows @ torch.cat(self._group.gather(self._rank, X))

    def gram(self, X: Tensor, Y: Tensor) -> Tensor:
        local = X.mT @ Y
        return torch.stack(self._group.gather(self._rank, local)).sum(0) if self._reduce else local


def _on_every_rank(search: Callable[[int, Group], list[Eigenpairs]]) -> list[list[Eigenpairs]]:
    group = Group()
    with ThreadPoolExecutor(NUM_RANKS) as ranks:
        running = [ranks.submit(search, rank, group) for rank in range(NUM_RANKS)]
        return [run.result() for run in running]


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("which", ["LA", "SA", "BE"])
@pytest.mark.parametrize("name", ["indefinite", "repeated", "clustered"])
def test_ranks_decide_alike_and_find_the_eigenvalues_of_the_whole(name: str, which: Which, k: int) -> None:
    A = symmetric(SPECTRA[name])

    def search(rank: int, group: Group) -> list[Eigenpairs]:
        shard, generator = Shard(A, rank, group), torch.Generator().manual_seed(rank)
        tracker = Tracker(k, which=which, rtol=1e-3)
        return [
            eigsh(shard, k, which=which, rtol=1e-3, generator=generator),
            *(tracker(shard, generator=generator) for _ in range(3)),
        ]

    for pairs in zip(*_on_every_rank(search), strict=True):
        assert len({p.num_matvecs for p in pairs}) == len({p.status for p in pairs}) == 1
        assert all(torch.equal(p.values, pairs[0].values) for p in pairs)
        X = torch.cat([p.vectors for p in pairs])
        torch.testing.assert_close(X.mT @ X, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-12)
        residuals = torch.linalg.vector_norm(A @ X - X * pairs[0].values, dim=0)
        torch.testing.assert_close(residuals, pairs[0].residuals, rtol=0, atol=1e-12)
        assert pairs[0].status is Status.CONVERGED
        assert oracles.relative_error(pairs[0].values, oracles.extreme_eigenvalues(A, k, which)) <= 1e-4


def test_inner_products_that_stay_local_are_noticed() -> None:
    """One rank alone would make two searches of one: they part, or find what is no eigenvalue of the whole."""
    A = symmetric(SPECTRA["indefinite"])

    def search(rank: int, group: Group) -> list[Eigenpairs]:
        shard = Shard(A, rank, group, reduce=False)
        return [eigsh(shard, rtol=1e-3, max_matvecs=8, generator=torch.Generator().manual_seed(rank))]

    try:
        [[first], [second]] = _on_every_rank(search)
    except threading.BrokenBarrierError:
        return
    found = Status.CONVERGED is first.status is second.status and torch.equal(first.values, second.values)
    assert not found

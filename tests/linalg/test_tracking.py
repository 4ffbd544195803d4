from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectral_callbacks.linalg import Eigenpairs, Matrix, Status, Tracker
from spectral_callbacks.linalg.eigsh import Which
from tests import oracles
from tests.problems import SPECTRA, Counting, Diagonal, Scaled, symmetric

ENDS: tuple[Which, ...] = ("LA", "SA", "BE")


def _seeded(seed: int = 100) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _drifting(num: int, *, n: int = 80) -> list[Tensor]:
    """Symmetric matrices along a straight line, with a spectrum that decays from both its ends."""
    decay = 10.0 ** torch.linspace(0, -4, n // 2)
    A = symmetric(torch.cat([4 * decay, -3 * decay]))
    drift = symmetric(torch.linspace(-1.0, 1.0, n), seed=1)
    return [A + 0.02 * i * drift for i in range(num)]


@pytest.mark.parametrize(("k", "which", "share"), [(1, "LA", 0.4), (1, "SA", 0.4), (3, "LA", 0.7), (3, "BE", 0.8)])
def test_a_warm_search_finds_the_same_for_fewer_products(k: int, which: Which, share: float) -> None:
    tracker, generator = Tracker(k, which=which), _seeded()
    warm, cold = [], []
    for matrix in _drifting(20, n=400):
        A = Counting(Matrix(matrix))
        pairs = tracker(A, generator=generator)
        assert pairs.status is Status.CONVERGED
        assert oracles.relative_error(pairs.values, oracles.extreme_eigenvalues(matrix, k, which)) <= 1e-3
        assert A.num_matvecs == pairs.num_matvecs
        warm.append(pairs.num_matvecs)
        cold.append(Tracker(k, which=which)(Matrix(matrix), generator=generator).num_matvecs)
    assert sum(warm[1:]) < share * sum(cold[1:])


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("which", ENDS)
def test_a_new_leading_direction_that_nothing_known_has_a_part_in_is_found_within_ten_searches(
    which: Which, k: int
) -> None:
    sign = -1.0 if which == "SA" else 1.0
    d = torch.zeros(50, dtype=torch.float64)  # three different eigenvalues: the first search ends with exact vectors
    d[:2] = sign * torch.tensor([10.0, 1.0])
    tracker, generator = Tracker(k, which=which), _seeded()
    tracker(Diagonal(d), generator=generator)
    d[7] = sign * 20.0
    found = [round(tracker(Diagonal(d), generator=generator).values[0].item(), 9) for _ in range(10)]
    assert found[-1] == pytest.approx(sign * 20.0, rel=1e-4)
    assert found == sorted(found, key=abs), "what was found once is not lost again"


def test_without_its_memory_a_search_is_a_cold_one() -> None:
    A, B = (Matrix(matrix) for matrix in _drifting(2))
    tracker = Tracker(rtol=1e-3)
    tracker(A, generator=_seeded())
    tracker.forget()
    _assert_same(tracker(B, generator=_seeded(1)), Tracker(rtol=1e-3)(B, generator=_seeded(1)))


def test_another_dimension_starts_cold() -> None:
    small, large = (Matrix(_drifting(1, n=n)[0]) for n in (40, 80))
    tracker = Tracker(2, rtol=1e-3)
    tracker(small, generator=_seeded())
    _assert_same(tracker(large, generator=_seeded(1)), Tracker(2, rtol=1e-3)(large, generator=_seeded(1)))


@pytest.mark.parametrize("k", [1, 3])
def test_a_search_that_failed_is_forgotten(k: int) -> None:
    good = _drifting(1)[0]
    broken = good.clone()
    broken[0, 0] = torch.nan
    skewed = good + torch.randn(good.shape, dtype=torch.float64).triu(1) * 5
    for bad, status in ((broken, Status.NONFINITE), (skewed, Status.BREAKDOWN)):
        tracker = Tracker(k, rtol=1e-3)
        tracker(Matrix(good), generator=_seeded())
        assert tracker(Matrix(bad), generator=_seeded()).status is status
        _assert_same(
            tracker(Matrix(good), generator=_seeded(1)), Tracker(k, rtol=1e-3)(Matrix(good), generator=_seeded(1))
        )


def test_a_search_that_ran_out_of_products_is_carried_on_by_the_next() -> None:
    A = Diagonal(torch.linspace(-1.0, 1.0, 300))
    tracker, generator = Tracker(rtol=3e-3, max_matvecs=15), _seeded()
    errors = []
    for _ in range(6):
        pairs = tracker(A, generator=generator)
        assert pairs.num_matvecs <= 15
        errors.append(1 - pairs.values.item())
    assert errors[-1] < 0.3 * errors[0]


def test_more_pairs_than_dimensions_are_as_many_as_there_are() -> None:
    pairs = Tracker(5)(Matrix(torch.diag(torch.tensor([3.0, 2.0, 1.0]))), generator=_seeded())
    assert pairs.status is Status.CONVERGED
    torch.testing.assert_close(pairs.values, torch.tensor([3.0, 2.0, 1.0]).double(), rtol=1e-6, atol=0)


def test_a_matrix_that_vanishes_and_comes_back_is_followed() -> None:
    A = _drifting(1)[0]
    tracker, generator = Tracker(2, rtol=1e-3), _seeded()
    for matrix in (A, 0 * A, 0 * A, A):
        pairs = tracker(Matrix(matrix), generator=generator)
        assert pairs.status is Status.CONVERGED
        torch.testing.assert_close(pairs.values, oracles.extreme_eigenvalues(matrix, 2, "LA"), rtol=1e-5, atol=1e-12)


def test_another_dtype_is_followed() -> None:
    A = _drifting(1)[0]
    tracker, generator = Tracker(rtol=1e-3), _seeded()
    for dtype in (torch.float64, torch.float32, torch.float64):
        pairs = tracker(Matrix(A.to(dtype)), generator=generator)
        assert pairs.vectors.dtype == dtype
        assert oracles.relative_error(pairs.values, oracles.extreme_eigenvalues(A, 1, "LA")) <= 1e-5


@pytest.mark.parametrize("which", ENDS)
def test_no_inner_product_is_taken_outside_gram(which: Which) -> None:
    scale = torch.rand(80, dtype=torch.float64, generator=_seeded(1)) * 5 + 0.1
    tracker, generator = Tracker(3, which=which, rtol=1e-3), _seeded()
    for matrix in _drifting(12):
        pairs = tracker(Scaled(matrix, scale), generator=generator)
        X = scale[:, None] * pairs.vectors
        assert pairs.status is Status.CONVERGED
        assert oracles.relative_error(pairs.values, oracles.extreme_eigenvalues(matrix, 3, which)) <= 1e-4
        torch.testing.assert_close(X.mT @ X, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k=0 eigenpairs were asked for"),
        ({"which": "LM"}, "which='LM' must be one of 'LA', 'SA', 'BE'"),
        ({"rtol": 2.0}, r"rtol=2\.0 must lie between 0 and 1"),
        ({"k": 3, "max_matvecs": 2}, "max_matvecs=2 must be at least k=3"),
    ],
)
def test_a_bad_setting_is_named_at_once(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tracker(**arguments)  # pyright: ignore[reportArgumentType]


def test_each_search_looks_at_the_matrix_it_is_given() -> None:
    tracker, generator = Tracker(rtol=1e-3), _seeded()
    A = symmetric(SPECTRA["indefinite"])
    for factor in (1.0, 3.0, 0.5):
        value = tracker(Matrix(factor * A), generator=generator).values.item()
        assert value == pytest.approx(factor * 3.0, rel=1e-5)


def _assert_same(first: Eigenpairs, second: Eigenpairs) -> None:
    assert first.num_matvecs == second.num_matvecs
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.vectors, second.vectors)


def test_sameness_sees_a_planted_difference() -> None:
    pairs = Tracker(2)(Matrix(_drifting(1)[0]), generator=_seeded())
    other = Tracker(2)(Matrix(_drifting(1)[0]), generator=_seeded(1))
    _assert_same(pairs, pairs)
    with pytest.raises(AssertionError):
        _assert_same(pairs, other)


def test_where_every_search_looks_a_new_leading_direction_is_seen_at_once() -> None:
    """Of matrices that have nothing to do with each other, as the Hessians of different batches may have."""
    generator = torch.Generator().manual_seed(0)
    first = torch.cat([torch.tensor([4.0, 3.0]), torch.linspace(-1.0, 1.0, 58)])
    second = torch.cat([torch.tensor([4.0, 3.0]), torch.linspace(-1.0, 1.0, 57), torch.tensor([5.0])])
    tracker = Tracker(look_every=1)
    for diagonal in (first, second, first, second):
        pairs = tracker(Diagonal(diagonal.double()), generator=generator)
        assert pairs.values.item() == pytest.approx(diagonal.max().item(), rel=1e-4)

"""Outliers, on random matrices whose number of them and whose edge are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spectral_callbacks.metrics import Outliers, outliers


def wishart(n: int, p: int, *spikes: float, seed: int = 0) -> Tensor:
    """Eigenvalues of XᵀX / n, descending; the covariance has the eigenvalues 1 + spike, the others are 1."""
    X = torch.randn(n, p, generator=torch.Generator().manual_seed(seed))
    X[:, : len(spikes)] *= (1 + torch.tensor(spikes)).sqrt()
    return torch.linalg.eigvalsh(X.mT @ X / n).flip(0)


def goe(n: int, seed: int = 0) -> Tensor:
    A = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.eigvalsh(A + A.mT).flip(0) / math.sqrt(2 * n)


def clusters(num_classes: int, dimension: int = 20, num_samples: int = 20_000, seed: int = 0) -> Tensor:
    """Of the Hessian of softmax regression at W = 0 on clusters around orthogonal means of norm 4: A ⊗ XᵀX / N."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(num_classes, (num_samples,), generator=generator)
    X = torch.randn(num_samples, dimension, generator=generator, dtype=torch.float64)
    X[torch.arange(num_samples), y] += 4.0
    A = (torch.eye(num_classes, dtype=torch.float64) - 1 / num_classes) / num_classes
    return torch.linalg.eigvalsh(torch.kron(A, X.mT @ X / num_samples)).flip(0)


# θ -> outliers, and where one is: it separates from the bulk only beyond θ = √γ = 0.5
SPIKES: dict[float, tuple[int, float | None]] = {0.3: (0, None), 1.0: (1, 2.5), 3.0: (1, 13 / 3)}


@pytest.mark.parametrize("k", [20, 30])
@pytest.mark.parametrize("spike", SPIKES)
@pytest.mark.parametrize("seed", range(4))
def test_a_spike_is_an_outlier_only_beyond_the_phase_transition(spike: float, seed: int, k: int) -> None:
    count, place = SPIKES[spike]
    values = wishart(2000, 500, spike, seed=seed)
    found = outliers(values[:k], size=500)
    assert found.count == count
    assert found.bulk_edge == pytest.approx(2.25, abs=0.06)  # (1 + √γ)²
    assert (found.gap > 5) == (count == 1)
    if place is not None:
        assert values[0].item() == pytest.approx(place, rel=0.1)


def test_the_gap_grows_with_the_spike() -> None:
    gaps = [outliers(wishart(2000, 500, spike)[:25], size=500).gap for spike in (1.0, 3.0, 9.0)]
    assert gaps == sorted(gaps)
    assert gaps[-1] > 100


def test_spikes_of_different_size_are_counted_together() -> None:
    found = outliers(wishart(2000, 500, 1.5, 3.0, 8.0, 8.0, 8.0)[:25], size=500)
    assert found.count == 5


@pytest.mark.parametrize("k", [20, 25, 30])
@pytest.mark.parametrize(("num_classes", "place"), [(3, 2.111), (4, 1.25)])
@pytest.mark.parametrize("seed", range(3))
def test_clusters_have_k_times_k_less_one_outliers(num_classes: int, place: float, k: int, seed: int) -> None:
    values = clusters(num_classes, seed=seed)
    count = num_classes * (num_classes - 1)
    found = outliers(values[:k], size=20 * num_classes)
    assert found.count == count
    assert found.gap > 50
    torch.testing.assert_close(values[:count], torch.full((count,), place, dtype=torch.float64), rtol=0.04, atol=0.0)
    assert found.bulk_edge == pytest.approx(1 / num_classes, rel=0.1)


def test_more_dimensions_move_only_the_bulk() -> None:
    narrow, wide = (outliers(clusters(3, dimension)[:25], size=3 * dimension) for dimension in (20, 40))
    assert narrow.count == wide.count == 6


def test_false_alarms_are_rare() -> None:
    lists = [wishart(300, 100, seed=seed) for seed in range(100)]
    lists += [wishart(100, 200, seed=seed) for seed in range(50)]
    lists += [goe(100, seed=seed) for seed in range(100)]
    alarms = [outliers(values[:25], size=len(values)).count != 0 for values in lists]
    assert sum(alarms) == 0  # of 250; in 2,000 others there was none


def test_the_edge_of_the_semicircle_is_found() -> None:
    edges = torch.tensor([outliers(goe(200, seed)[:25], size=200).bulk_edge for seed in range(20)])
    assert edges.mean().item() == pytest.approx(2.0, abs=0.02)


def test_a_bulk_of_equal_eigenvalues_is_a_bulk() -> None:
    values = torch.tensor([3.0] * 4 + [1.0] * 20)
    found = outliers(values, size=100)
    assert found.count == 4
    assert found.bulk_edge == pytest.approx(1.0)
    assert outliers(torch.ones(24), size=100).count == 0
    assert outliers(torch.zeros(24), size=100) == Outliers(0, 0.0, 0.0)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_count_and_gap_do_not_depend_on_units_or_shift(factor: float, shift: float) -> None:
    values = wishart(2000, 500, 1.0, 3.0)[:25].double()
    plain, moved = outliers(values, size=500), outliers(factor * (values + shift), size=500)
    assert moved.count == plain.count == 2
    assert moved.gap == pytest.approx(plain.gap, rel=1e-6)
    assert moved.bulk_edge == pytest.approx(factor * (plain.bulk_edge + shift), rel=1e-6)


UNSEEN: dict[str, Tensor] = {
    "fewer than eight": wishart(2000, 500, 3.0)[:7],
    "more outliers than bulk": clusters(4)[:15],
    "a geometric decay": 0.7 ** torch.arange(25.0),
    "a power law": 1 / torch.arange(1.0, 41.0) ** 2,
    "none": torch.zeros(0),
}


@pytest.mark.parametrize("kind", UNSEEN)
def test_a_list_without_a_bulk_has_no_count(kind: str) -> None:
    found = outliers(UNSEEN[kind], size=500)
    assert found.count is None
    assert math.isnan(found.bulk_edge)
    assert math.isnan(found.gap)


def test_the_lower_half_of_a_spectrum_is_no_bulk_edge() -> None:
    values = clusters(3, dimension=10)  # 6 outliers, 14 in the bulk, 10 zeros
    assert outliers(values, size=30).count == 6


BAD: dict[str, tuple[Tensor, int]] = {
    "ascending": (torch.arange(10.0), 100),
    "not finite": (torch.tensor([math.nan] * 10), 100),
    "a matrix": (torch.eye(10), 100),
    "more than the matrix has": (torch.ones(10), 9),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_list_of_the_largest_eigenvalues_is_refused(kind: str) -> None:
    values, size = BAD[kind]
    with pytest.raises(ValueError, match="pass the largest ones in descending order"):
        outliers(values, size=size)

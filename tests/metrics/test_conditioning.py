"""Condition numbers and unfitted modes, against theory and against gradient descent itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spectral_callbacks.metrics import condition_number, unfitted_modes


def gaussian(n: int, p: int, seed: int = 0) -> Tensor:
    return torch.randn(n, p, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("p", [25, 50, 200, 400])
def test_a_random_matrix_has_the_condition_number_of_theory(p: int) -> None:
    n = 100
    theory = (math.sqrt(n) + math.sqrt(p)) / abs(math.sqrt(n) - math.sqrt(p))
    median = torch.tensor([condition_number(gaussian(n, p, seed), cutoff=1e-12) for seed in range(9)]).median().item()
    assert 0.85 * theory < median < theory  # the extremes of finite matrices lie inside the limit


def test_a_square_random_matrix_has_edelmans_mean_logarithm() -> None:
    n, draws = 100, 100
    logs = torch.tensor([math.log(condition_number(gaussian(n, n, seed), cutoff=1e-12)) for seed in range(draws)])
    standard_error = logs.std().item() / math.sqrt(draws)
    assert abs(logs.mean().item() - math.log(n) - 1.537) < 3 * standard_error


def test_it_peaks_where_features_are_as_many_as_samples() -> None:
    n, d = 100, 20
    median: dict[int, float] = {}
    for p in (50, 90, 100, 110, 200):
        kappas = []
        for seed in range(5):
            X, W = gaussian(n, d, seed), gaussian(d, p, 100 + seed)
            kappas.append(condition_number((X @ W).relu() / math.sqrt(p), cutoff=1e-12))
        median[p] = torch.tensor(kappas).median().item()
    assert max(median, key=lambda p: median[p]) == 100
    assert median[100] > 4 * median[90] > 4 * median[50]
    assert median[100] > 4 * median[110] > 4 * median[200]


def test_values_and_matrix_agree_and_zeros_do_not_count() -> None:
    Z = gaussian(30, 10)
    Z = torch.cat([Z, Z[:, :3]], dim=1)  # rank 10
    values = torch.linalg.svdvals(Z)
    assert condition_number(Z, cutoff=1e-10) == condition_number(values, cutoff=1e-10)
    assert condition_number(Z, cutoff=1e-10) == pytest.approx((values[0] / values[9]).item())


def test_what_lies_at_the_cutoff_counts_as_zero() -> None:
    values = torch.tensor([4.0, 2.0, 1.0])
    assert condition_number(values, cutoff=0.25) == 2.0
    assert condition_number(values, cutoff=0.24) == 4.0
    assert condition_number(torch.tensor([3.0, 1.0, -9.0]), cutoff=0.0) == 3.0


@pytest.mark.parametrize("values", [torch.zeros(3), torch.zeros(0), torch.tensor([-1.0])])
def test_without_a_positive_value_there_is_no_condition_number(values: Tensor) -> None:
    assert math.isnan(condition_number(values, cutoff=1e-3))


@pytest.mark.parametrize("num_steps", [0, 1, 10, 100, 1000])
def test_the_unfitted_modes_are_those_where_gradient_descent_has_an_error_left(num_steps: int) -> None:
    n, p = 40, 20
    Z, y = gaussian(n, p, 1), gaussian(n, 1, 2)[:, 0]
    U, s, Vh = torch.linalg.svd(Z, full_matrices=False)
    learning_rate = 1.0 / s[0].item() ** 2
    theta = torch.zeros(p, dtype=torch.float64)
    for _ in range(num_steps):
        theta = theta - learning_rate * Z.mT @ (Z @ theta - y)
    closed_form = Vh.mT @ ((1 - (1 - learning_rate * s**2) ** num_steps) / s * (U.mT @ y))
    torch.testing.assert_close(theta, closed_form, rtol=0.0, atol=1e-10)
    optimum = (U.mT @ y) / s
    left = ((Vh @ theta - optimum) / optimum).abs()
    expected = (left > 1 / math.e).double().mean().item()
    assert unfitted_modes(s**2, learning_rate, num_steps) == expected


def test_a_mode_beyond_the_edge_of_stability_is_not_fitted() -> None:
    assert unfitted_modes(torch.tensor([1.0, 2.5]), learning_rate=1.0, num_steps=50) == 0.5


def test_without_steps_or_learning_rate_nothing_is_fitted() -> None:
    values = torch.tensor([1.0, 0.1])
    assert unfitted_modes(values, learning_rate=0.5, num_steps=0) == 1.0
    assert unfitted_modes(values, learning_rate=0.0, num_steps=50) == 1.0
    assert math.isnan(unfitted_modes(torch.zeros(0), learning_rate=0.5, num_steps=5))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cutoff=1\.5 must lie between 0 and 1"):
        condition_number(torch.ones(3), cutoff=1.5)
    with pytest.raises(ValueError, match=r"shape \(2, 2, 2\); pass"):
        condition_number(torch.ones(2, 2, 2), cutoff=0.1)
    with pytest.raises(ValueError, match="num_steps=-1"):
        unfitted_modes(torch.ones(3), learning_rate=0.1, num_steps=-1)
    with pytest.raises(ValueError, match=r"learning_rate=-0\.1"):
        unfitted_modes(torch.ones(3), learning_rate=-0.1, num_steps=1)

"""Imbalance, excess energy and rate of factors, against dense algebra and laws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spectral_callbacks.metrics import apparent_rank, excess_energy, imbalance, product_singular_values, rate_exponent


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


SHAPES = [(9, 7, 3), (7, 9, 3), (2, 9, 4), (9, 2, 4), (3, 3, 3), (1, 1, 1), (5, 5, 8)]


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_singular_values_of_the_product_are_those_of_the_dense_product(m: int, n: int, k: int) -> None:
    F, G = random(m, k), random(n, k, seed=1)
    dense = torch.linalg.svdvals(F @ G.T)
    found = product_singular_values(F, G)
    shared = min(m, n, k)
    torch.testing.assert_close(found[:shared], dense[:shared])
    assert found[shared:].abs().max() < 1e-12 if len(found) > shared else True


def test_tiny_singular_values_are_told_from_none() -> None:
    """1e-6 beside 1 in the factors is 1e-12 beside 1 in the product."""
    Q, P = torch.linalg.qr(random(40, 2)).Q, torch.linalg.qr(random(30, 2, seed=1)).Q
    s = torch.tensor([1.0, 1e-6], dtype=torch.float64)
    found = product_singular_values(Q * s, P * s)
    torch.testing.assert_close(found, s**2, rtol=1e-3, atol=0)


def test_a_tall_product_is_never_formed() -> None:
    """2,000,000² numbers would not fit."""
    F = torch.ones(2_000_000, 1)
    assert product_singular_values(F, F).item() == pytest.approx(2e6)


def test_imbalance_is_the_difference_of_the_gram_matrices() -> None:
    F, G = random(9, 3), random(7, 3, seed=1)
    expected = [[sum(F[i, a] * F[i, b] for i in range(9)) - sum(G[j, a] * G[j, b] for j in range(7)) for b in range(3)]
                for a in range(3)]  # fmt: skip
    torch.testing.assert_close(imbalance(F, G), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(imbalance(G, F), -imbalance(F, G))


def test_low_precision_is_summed_in_double() -> None:
    F = random(1000, 1).bfloat16()
    assert imbalance(F, F[:1]).dtype == torch.float64
    assert imbalance(F, 0 * F).item() == pytest.approx(F.double().square().sum().item(), rel=1e-12)


def test_gradient_descent_conserves_imbalance_to_the_order_of_its_step() -> None:
    """F' and G' of gradient flow leave Δ alone; a step of size η moves it by η² (GᵀEᵀE G - FᵀE EᵀF)."""
    F, G, M = random(6, 2), random(5, 2, seed=1), random(6, 5, seed=2)
    before = imbalance(F, G)
    moved = []
    for eta in (1e-2, 1e-3):
        E = F @ G.T - M
        after = imbalance(F - eta * E @ G, G - eta * E.T @ F)
        exact = eta**2 * (G.T @ E.T @ E @ G - F.T @ E @ E.T @ F)
        torch.testing.assert_close(after - before, exact, rtol=1e-6, atol=1e-12)
        moved.append((after - before).norm().item())
    assert moved[0] / moved[1] == pytest.approx(100, rel=1e-3)


def test_scalar_factors_keep_their_imbalance_over_a_long_run() -> None:
    """f² - g² stays at .24 within .1 % over 2,000 steps at η = .1."""
    f, g = torch.tensor([[0.5]]).double(), torch.tensor([[0.1]]).double()
    before = imbalance(f, g).item()
    for _ in range(2000):
        f, g = f - 0.1 * (f * g) * g, g - 0.1 * (f * g) * f
    assert before == pytest.approx(0.24)
    assert imbalance(f, g).item() == pytest.approx(0.24, rel=1e-3)


def test_excess_energy_is_the_square_distance_to_the_nearest_matrix_of_that_rank() -> None:
    F, G = random(9, 4), random(7, 4, seed=1)
    W = F @ G.T
    U, s, Vh = torch.linalg.svd(W)
    for rank in range(6):
        nearest = U[:, :rank] * s[:rank] @ Vh[:rank]
        found = excess_energy(product_singular_values(F, G), rank)
        assert found == pytest.approx((W - nearest).square().sum().item(), rel=1e-9, abs=1e-20)


@pytest.mark.parametrize(
    ("values", "rank"),
    [
        ([1.0, 0.9, 1e-3, 5e-4], 2),
        ([1.0, 1e-3, 5e-4], 1),
        ([1.0, 1.0, 1.0], 3),
        ([3.0, 2.0, 1e-300, 0.0], 2),
        ([1.0, 1e-2, 1e-17, 1e-40], 2),
        ([5.0], 1),
        ([0.0, 0.0], 2),
    ],
)
def test_the_apparent_rank_is_where_the_values_fall_most(values: list[float], rank: int) -> None:
    assert apparent_rank(torch.tensor(values, dtype=torch.float64)) == rank


@pytest.mark.parametrize("exponent", [-2.0, -1.0, 0.5])
def test_a_power_law_has_its_exponent(exponent: float) -> None:
    steps = [10, 20, 50, 100, 1000]
    found = rate_exponent(steps, [3.0 * step**exponent for step in steps])
    assert found.value == pytest.approx(exponent, abs=1e-12)
    assert found.error < 1e-10
    assert found.num_samples == 5


def test_the_error_of_the_exponent_is_the_spread_of_repeated_runs() -> None:
    """Lognormal deviations of size .1 from a power law: the square error has no bias, with as few as 6 points."""
    generator = torch.Generator().manual_seed(0)
    steps = [float(step) for step in torch.logspace(2, 3, 6, dtype=torch.float64).tolist()]
    x = torch.tensor(steps).double().log()
    variance = 0.1**2 / (x - x.mean()).square().sum().item()
    found = []
    for _ in range(1000):
        noise = 0.1 * torch.randn(6, generator=generator, dtype=torch.float64)
        found.append(rate_exponent(steps, [s**-2 * math.exp(e) for s, e in zip(steps, noise.tolist(), strict=True)]))
    slopes = torch.tensor([one.value for one in found], dtype=torch.float64)
    squares = torch.tensor([one.error**2 for one in found], dtype=torch.float64)
    assert squares.mean().item() == pytest.approx(variance, rel=4 * math.sqrt(2 / 4 / 1000))  # chi-square of 4
    assert slopes.var().item() == pytest.approx(variance, rel=4 * math.sqrt(2 / 1000))
    assert abs(slopes.mean().item() + 2) < 4 * math.sqrt(variance / 1000)


def test_two_points_have_a_slope_of_unknown_error() -> None:
    found = rate_exponent([1, 10], [1.0, 0.1])
    assert found.value == pytest.approx(-1)
    assert found.error == math.inf


@pytest.mark.parametrize(
    ("steps", "values", "message"),
    [
        ([1], [1.0], "1 steps and 1 values: give at least two different steps"),
        ([5, 5], [1.0, 2.0], "2 steps and 2 values"),
        ([1, 2, 3], [1.0, 2.0], "3 steps and 2 values"),
        ([0, 1], [1.0, 1.0], "must be positive and finite"),
        ([1, 2], [1.0, -1.0], "must be positive and finite"),
        ([1, 2], [1.0, math.nan], "must be positive and finite"),
    ],
)
def test_what_has_no_slope_is_refused(steps: list[float], values: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rate_exponent(steps, values)


@pytest.mark.parametrize(("F", "G"), [((3,), (3, 1)), ((3, 2), (3, 1)), ((3, 2, 1), (3, 2))])
def test_what_are_no_factors_is_refused(F: tuple[int, ...], G: tuple[int, ...]) -> None:
    for function in (imbalance, product_singular_values):
        with pytest.raises(ValueError, match=r"are no factors of F Gᵀ: pass \(m, k\) and \(n, k\)"):
            function(torch.ones(F), torch.ones(G))


def test_a_negative_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="rank=-1 must be 0 or more"):
        excess_energy(torch.ones(3), -1)

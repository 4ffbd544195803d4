"""The sequential test for a change of slope, against brute force, on series without and with a change."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from spectral_callbacks.metrics.representations import change_points
from spectral_callbacks.metrics.representations.change_points import line_fit, slope_change, slope_nonzero

Array = NDArray[np.float64]


def ar1(shape: tuple[int, ...], phi: float, *, seed: int, correlation: float = 0.0) -> Array:  # (..., n, 2)
    noise = np.random.default_rng(seed).standard_normal((*shape, 2))
    noise[..., 1] = correlation * noise[..., 0] + math.sqrt(1 - correlation**2) * noise[..., 1]
    for t in range(1, shape[-1]):
        noise[..., t, :] = phi * noise[..., t - 1, :] + math.sqrt(1 - phi**2) * noise[..., t, :]
    return noise


def axis(kind: str, n: int) -> Array:
    """ln(1 + step) of a run measured at geometric steps, or at even ones."""
    return np.log1p(np.arange(n) * 50.0) if kind == "even" else np.log1p(np.round(10 * 1.1 ** np.arange(n)))


def marginal_likelihood(
    X: Array,  # (n, q)
    V: Array,  # (n, n), covariance of the noise up to that of the channels
    Y: Array,  # (n, p)
) -> float:
    """ln of it with coefficients and channel covariance integrated out, densely."""
    p, df = Y.shape[1], len(Y) - X.shape[1]
    inverse = np.linalg.inv(V)
    information = X.T @ inverse @ X
    S = Y.T @ (inverse - inverse @ X @ np.linalg.solve(information, X.T @ inverse)) @ Y
    logdets = [float(np.linalg.slogdet(m)[1]) for m in (V, information, S)]
    return -p / 2 * (logdets[0] + logdets[1]) - df / 2 * logdets[2]


def brute_force(
    x: Array,
    Y: Array,
    null: Array,  # (n, q)
    regressors: dict[int, tuple[Array, float]],  # place -> (regressor, prior)
) -> tuple[float, int]:
    """ln Bayes factor and best place: every place, size of effect and φ by its own dense covariance matrix."""
    lags = np.abs(np.subtract.outer(np.arange(len(x)), np.arange(len(x))))
    nothing, something = [], {place: [] for place in regressors}
    for phi in change_points.PHI:
        stationary = phi**lags / (1 - phi**2)
        nothing.append(marginal_likelihood(null, stationary, Y))
        for place, (w, prior) in regressors.items():
            something[place] += [
                marginal_likelihood(null, stationary + kappa**2 * np.outer(w, w), Y) + math.log(prior / 3)
                for kappa in (0.1, 1.0, 10.0)
            ]
    later = 1 - sum(prior for _, prior in regressors.values())
    each = {place: np.logaddexp.reduce(values) for place, values in something.items()}
    total = np.logaddexp.reduce([*each.values(), math.log(max(later, 1e-300)) + np.logaddexp.reduce(nothing)])
    return float(total - np.logaddexp.reduce(nothing)), max(each, key=lambda place: each[place])


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("kind", ["geometric", "even"])
def test_evidence_equals_brute_force_over_places_effects_and_autocorrelations(kind: str, channels: int):
    x = axis(kind, 14)
    Y = (ar1((14,), 0.5, seed=3) + np.array([1.0, -1.0]) * np.abs(np.arange(14) - 7)[:, None])[:, :channels]
    u = (x - x[0]) * 13 / (x[-1] - x[0])
    hinges = {
        k: (np.clip(u - u[k], 0, None), 2 / 6 / 2 if k < 4 else 2 / 12 / 4 if k < 8 else 2 / 20 / 8)
        for k in range(2, 12)
    }
    expected = brute_force(x, Y, np.stack([np.ones(14), x], 1), hinges)
    got = slope_change(x, Y)
    # The scale of x in the null hypothesis, of Y, and the floor of the noise cancel.
    assert float(got.log_bayes_factor) == pytest.approx(expected[0], abs=1e-6)
    assert int(got.place) == expected[1]
    level, _ = brute_force(x, Y, np.ones((14, 1)), {0: (u, 1.0)})
    assert float(slope_nonzero(x, Y)) == pytest.approx(level, abs=1e-6)


def test_with_known_bends_the_null_hypothesis_bends_there():
    x, t = axis("geometric", 30), np.arange(30)
    Y = ar1((30,), 0.3, seed=1)
    u = (x - x[0]) * 29 / (x[-1] - x[0])
    first, second = np.minimum(u, u[12]), np.clip(u - u[12], 0, None)
    expected, _ = brute_force(x, Y, np.stack([np.ones(30), first], 1), {0: (second, 1.0)})
    assert float(slope_nonzero(x, Y, bends=[12])) == pytest.approx(expected, abs=1e-6)
    bent = Y * 0.1 + (np.abs(u - u[12]) * 0.5)[:, None]
    assert slope_change(x, bent).log_bayes_factor > 10
    assert slope_change(x, bent, bends=[12]).log_bayes_factor < 2
    assert slope_change(x, bent + np.clip(t - 20, 0, None)[:, None], bends=[12]).place == pytest.approx(20, abs=1)


def test_lines_units_and_mixtures_of_the_channels_do_not_matter():
    x, Y = axis("even", 25), ar1((25,), 0.5, seed=2)
    mixed = Y @ np.array([[3.0, 1e3], [-1.0, 2e3]]) + np.array([5.0, -100.0]) + np.outer(x, [2.0, -30.0])
    np.testing.assert_allclose(slope_change(x, mixed)[0], slope_change(x, Y)[0], atol=1e-5)
    np.testing.assert_allclose(slope_change(7 * x + 1, Y)[0], slope_change(x, Y)[0], atol=1e-8)


def test_an_exact_line_is_no_change_and_an_exact_kink_is_one_at_its_place():
    x = axis("geometric", 30)
    for y in (np.full(30, 0.1), 0.3 * x - 1, np.zeros(30)):
        assert slope_change(x, y[:, None])[0] < 0.1
        assert slope_change(x, np.stack([y, -2 * y], 1))[0] < 0.1
    assert slope_nonzero(x, np.full((30, 1), 0.1)) < 0.1
    kink = np.abs(x - x[12])[:, None]
    change = slope_change(x[:17], kink[:17])
    assert change.log_bayes_factor > 6
    assert change.place == 12


def test_too_few_values_are_no_evidence():
    Y = ar1((4,), 0.0, seed=0)
    for n in range(1, 5):
        assert slope_change(axis("even", n), Y[:n])[0] == 0
    assert slope_nonzero(axis("even", 3), Y[:3]) == 0


def alarms(x: Array, Y: Array, every: int) -> tuple[Array, Array]:
    """The largest evidence ever, of both tests, on each series of a batch."""
    looks = range(4, len(x) + 1, every)
    bends = [slope_change(x[:n], Y[:, :n]).log_bayes_factor for n in looks]
    return np.max(bends, 0), np.max([slope_nonzero(x[:n], Y[:, :n]) for n in looks], 0)


def assert_false_alarms(kind: str, n: int, phi: float, *, series: int, every: int, correlation: float) -> None:
    Y = ar1((series, n), phi, seed=n, correlation=correlation)
    for channels in (1, 2):
        bend, slope = alarms(axis(kind, n), Y[..., :channels], every)
        for rate, chance in ((0.05, 0.0), (0.01, 2 * math.sqrt(0.01 / series))):
            threshold = math.log(2 / rate)
            assert np.mean((bend > threshold) | (slope > threshold)) <= rate + chance


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("kind", ["geometric", "even"])
def test_false_alarms_in_a_whole_run_stay_below_the_rate(kind: str, phi: float):
    assert_false_alarms(kind, 30, phi, series=1000, every=3, correlation=0.7)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "phi"), [(30, 0.0), (30, 0.5), (30, 0.8), (90, 0.0), (90, 0.5), (90, 0.8), (200, 0.8)])
@pytest.mark.parametrize("kind", ["geometric", "even"])
def test_false_alarms_in_long_runs_stay_below_the_rate(kind: str, phi: float, n: int):
    assert_false_alarms(kind, n, phi, series=1000, every=1 if n == 30 else n // 30, correlation=0.0)


@pytest.mark.parametrize("phi", [0.0, 0.5])
def test_the_slope_of_a_line_is_known_within_its_error(phi: float):
    x, noise = axis("geometric", 60), ar1((400, 60), phi, seed=5)[..., 0]
    fits = [line_fit(x, 0.7 * x + y) for y in noise]
    z = np.array([(fit.slope - 0.7) / fit.error for fit in fits])
    assert abs(z.mean()) < 3 * z.std() / 20
    assert 0.85 < z.std() < 1.25


def test_a_line_without_noise_or_with_few_values():
    x = axis("even", 10)
    assert line_fit(x, 3 * x + 1).slope == pytest.approx(3)
    assert line_fit(x, np.ones(10)).slope == pytest.approx(0, abs=1e-12)
    assert math.isnan(line_fit(x[:3], x[:3]).error)
    assert math.isnan(line_fit(x[:1], x[:1]).slope)

"""Has the slope of a noisy, autocorrelated series changed? A sequential test that may be looked at after each value.

The null hypothesis is one straight line plus Gaussian AR(1) noise, y_t = a + b x_t + u_t, u_t = φ u_{t-1} + e_t, of
unknown level, slope, noise level and φ; of several channels at once, with noises that may be correlated. Conditioned
on the first value and with φ given, this is an ordinary regression of y_t - φ y_{t-1}. A further regressor w (a hinge
at a candidate, for a change of slope) with a normal coefficient of κ noise standard deviations a priori, and the
right-Haar prior on all that the null hypothesis leaves open, turn it into a Bayes factor in closed form: with n values
after the first, q null regressors, p channels, c = κ² |w|² and R² the share of the residual that w explains,

    ln B = -p/2 ln(1 + c) - (n - q)/2 ln(1 - R² c/(1 + c)).

It is averaged over φ, κ and the candidates. A Bayes factor is a martingale with mean 1 under its null hypothesis, so
that it exceeds 1/ε *ever*, in a series of any length, with probability at most ε (Ville's inequality; Pérez-Ortiz et
al. 2022, arXiv:2208.07610, for the invariant priors). Nothing is calibrated by simulation, and no length of the run is
assumed. As φ is averaged over too, the bound holds on the average over φ, not for each: simulation (see the tests)
stays below it at each φ up to 0.8. Noise beyond 0.9, near a random walk, raises more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

PHI = np.array([0.0, 0.2, 0.4, 0.6, 0.8])  # autocorrelations averaged over
_KAPPA = np.array([0.1, 1.0, 10.0])  # effects, in noise standard deviations a measurement
_TINY = 1e-290  # stands for 0 in logarithms and divisors
_PER_OCTAVE = 8  # candidates for a change: all up to the 16th value, then every 2nd, 4th, ...
_FLOOR = 1e-9  # noise always granted, relative to the largest deviation from the mean: an exact line is no news
_TIED = 1e-9  # share of its variance that a channel is granted of its own: one may be a multiple of the other
_ROUNDING = 1e-12  # relative to the values themselves


class Change(NamedTuple):
    """Evidence for a change of slope.

    Attributes:
        log_bayes_factor: ln of change against no change, (...,).
        place: Index of the most likely turn, the last value on the old line, (...,); -1 where there are too few values.
    """

    log_bayes_factor: Array
    place: NDArray[np.int64]


class Line(NamedTuple):
    """A straight line through autocorrelated values.

    Attributes:
        slope: Per unit of x.
        error: Its standard error, by generalised least squares with the likeliest φ of `PHI`; NaN below 4 values.
    """

    slope: float
    error: float


def slope_change(
    x: Array,  # (n,), increasing
    series: Array,  # (..., n, p): p channels
    *,
    bends: Sequence[int] = (),
) -> Change:
    """Return the evidence that the slope changed somewhere, against one line plus AR(1) noise.

    The prior of the place gives the k-th octave of values 2/((k + 1)(k + 2)), so that no length is assumed. Costs n
    times 20 to 100 candidates, one or two milliseconds for a few hundred values.

    Args:
        x: Where the values were taken.
        series: The values.
        bends: Indices of known changes of slope. A further one is sought after the last; the values before it tell of
            the noise.

    Example:
        >>> x = np.arange(40.0)
        >>> bent = np.abs(x - 20) + 0.1 * np.cos(9 * x**2)
        >>> change = slope_change(x, bent[:, None])
        >>> bool(change.log_bayes_factor > 20), int(change.place)
        (True, 20)
    """
    start = bends[-1] if bends else 0
    index, prior = _candidates(len(x) - start)
    x = _in_measurements(x)
    hinges = np.clip(x[:, None] - x[index + start], 0.0, None)
    evidence = _log_bayes_factors(series, _pieces(x, bends), hinges, prior) if len(index) else None
    if evidence is None:
        return Change(np.zeros(series.shape[:-2]), np.full(series.shape[:-2], -1))
    each, later = evidence
    total = np.logaddexp(np.logaddexp.reduce(each, axis=-1), later)
    return Change(total, index[each.argmax(-1)] + start)


def slope_nonzero(
    x: Array,  # (n,), increasing
    series: Array,  # (..., n, p): p channels
    *,
    bends: Sequence[int] = (),
) -> Array:  # (...,)
    """Return ln of the Bayes factor of a line with a slope against a level without, both plus AR(1) noise.

    Args:
        x: Where the values were taken.
        series: The values.
        bends: Indices of known changes of slope. The slope after the last is tested; the values before it tell of the
            noise.

    Example:
        >>> x = np.arange(12.0)
        >>> bool(slope_nonzero(x, np.cos(9 * x**2)[:, None]) < 0)
        True
    """
    x = _in_measurements(x)
    pieces = _pieces(x, bends)
    evidence = _log_bayes_factors(series, pieces[:, :-1], pieces[:, -1:], np.ones(1))
    return np.zeros(series.shape[:-2]) if evidence is None else evidence[0][..., 0]


def line_fit(
    x: Array,  # (n,), increasing
    y: Array,  # (n,)
) -> Line:
    """Return the slope of y against x with a standard error that knows of autocorrelation.

    Example:
        >>> slope, error = line_fit(np.arange(5.0), np.array([0.0, 2.1, 3.9, 6.0, 8.0]))
        >>> round(slope, 1), bool(0 < error < 0.1)
        (2.0, True)
    """
    if len(x) < 4:
        return Line(float(np.polyfit(x - x[0], y, 1)[0]) if len(x) > 1 else math.nan, math.nan)
    x, y = x - x[0], y - y.mean()
    null, best = _pieces(x, ()), -math.inf
    fitted = Line(math.nan, math.nan)
    for phi in PHI:
        q, r = np.linalg.qr(_whitened(null, phi))
        z = _whitened(y[:, None], phi)[:, 0]
        rest = z - q @ (q.T @ z)
        variance = float(rest @ rest) / (len(x) - 2)
        likelihood = _log_likelihood(phi, r, np.log(max(variance, _TINY)), len(x) - 2, 1)
        if likelihood > best:
            best, fitted = likelihood, Line(float(q[:, 1] @ z / r[1, 1]), math.sqrt(variance) / abs(float(r[1, 1])))
    return fitted


def _in_measurements(x: Array) -> Array:
    """Shift to start at 0 and scale to a mean distance of 1."""
    return (x - x[0]) * ((len(x) - 1) / (x[-1] - x[0])) if len(x) > 1 else x - x[0]


def _pieces(
    x: Array,  # (n,)
    bends: Sequence[int],
) -> Array:  # (n, 2 + bends)
    """Return a basis of the continuous lines with these bends: 1, and for each piece one that is flat outside it."""
    edges = x[[0, *bends, -1]]
    return np.stack([np.ones_like(x), *(np.clip(x, a, b) - a for a, b in itertools.pairwise(edges))], 1)


def _candidates(n: int) -> tuple[NDArray[np.int64], Array]:
    """Return the candidates that at least two of n values follow, and their prior probabilities."""
    index, prior, octave = [], [], 1
    while 2**octave < n - 2:
        members = np.arange(2**octave, 2 ** (octave + 1), max(1, 2**octave // _PER_OCTAVE))
        index.append(members)
        prior.append(np.full(len(members), 2 / ((octave + 1) * (octave + 2)) / len(members)))
        octave += 1
    if not index:
        return np.empty(0, np.int64), np.empty(0)
    places, weights = np.concatenate(index), np.concatenate(prior)
    return places[places < n - 2], weights[places < n - 2]


def _log_bayes_factors(
    series: Array,  # (..., n, p)
    null: Array,  # (n, q)
    regressors: Array,  # (n, T)
    prior: Array,  # (T,), sums to at most 1
) -> tuple[Array, float] | None:  # (..., T)
    """Return ln of prior times Bayes factor of each regressor, and of what the prior leaves to later ones.

    None with too few values.
    """
    n, p = series.shape[-2:]
    df = n - null.shape[1]
    if df < p + 1:
        return None
    y = series - series.mean(-2, keepdims=True)
    scale = np.maximum(np.abs(y).max(-2, keepdims=True), _ROUNDING * np.abs(series).max(-2, keepdims=True))
    y = y / np.where(scale > 0, scale, 1.0)
    floor = n * _FLOOR**2
    of_null, of_each = [], []
    for phi in PHI:
        q, r = np.linalg.qr(_whitened(null, phi))
        residual, w = (a - q @ (q.T @ a) for a in (_whitened(y, phi), _whitened(regressors, phi)))
        S = residual.swapaxes(-1, -2) @ residual
        S = S * (1 + _TIED * np.eye(p)) + floor * np.eye(p)
        square = np.maximum((w**2).sum(0), _TINY)
        score = w.T @ residual  # (..., T, p)
        r2 = np.clip((score @ np.linalg.inv(S) * score).sum(-1) / square, 0.0, 1.0)
        log_null = _log_likelihood(phi, r, np.linalg.slogdet(S)[1], df, p)
        c = _KAPPA[:, None] ** 2 * square  # (K, T)
        factors = -p / 2 * np.log1p(c) - df / 2 * np.log1p(-r2[..., None, :] * (c / (1 + c)))
        of_null.append(log_null)
        of_each.append(log_null[..., None] + np.logaddexp.reduce(factors, axis=-2) - math.log(len(_KAPPA)))
    whole = np.logaddexp.reduce(of_null, axis=0) - math.log(len(PHI))
    each = np.logaddexp.reduce(of_each, axis=0) - math.log(len(PHI)) - whole[..., None] + np.log(prior)
    later = max(1 - float(prior.sum()), _TINY)
    return each, math.log(later)


def _log_likelihood(
    phi: float,
    r: Array,  # (q, q), RᵀR = Xᵀ V⁻¹ X of the null regressors
    log_det: Array,  # (...,), of the residual moments
    df: int,
    p: int,
) -> Array:  # (...,)
    """Return ln of the likelihood with coefficients and covariance of the channels integrated out (REML)."""
    return p * (math.log1p(-phi * phi) / 2 - np.log(np.abs(np.diag(r))).sum()) - df / 2 * log_det


def _whitened(
    a: Array,  # (..., n, k)
    phi: float,
) -> Array:
    """Return L⁻¹ a, where L Lᵀ is the correlation of stationary AR(1) noise, but for the factor 1 - φ²."""
    return np.concatenate([math.sqrt(1 - phi * phi) * a[..., :1, :], a[..., 1:, :] - phi * a[..., :-1, :]], -2)

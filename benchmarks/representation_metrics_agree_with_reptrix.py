"""Ranks and exponents agree with reptrix where it computes the same, to a rounding of float64, and are right elsewhere.

Gaussian features in float32 with eigenvalues i^-1 of their covariance, d = 512, N = 500 to 10,000 samples; LiDAR has
d = 64, and 10 augmentations of each object. The truth is the definition on these very samples, by a singular value
decomposition or a generalised eigenproblem in float64. Conventions that reptrix 0.1.0 has of its own are given to it:
1e-7 beside every share of an entropy, and no division in the covariances of LiDAR. What stays is

  - what it calls RankMe: an effective rank, of the eigenvalues of the centred covariance. That of its paper takes the
    singular values of the features with their mean, and is another number;
  - LiDAR: it takes the principal components of the matrix whose eigenvalues are meant, which squares them;
  - alpha-ReQ: it adds 1 to the range it is given, in place: the same array, given again, is another range.

Costs are CPU time on one thread. Ours include a standard error, for which theirs have no counterpart, and are computed
in float64: below some 2,000 samples that is slower than theirs. A look at a layer takes all ranks and the exponent from
one spectrum, where reptrix decomposes for each of its two.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import statistics
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from _measure import Claims, Timed, median_seconds, options, table, taking_turns
from _peers import missing
from spectral_callbacks.linalg import Estimate
from spectral_callbacks.metrics.representations.alpha_req import alpha_req, power_law_fit
from spectral_callbacks.metrics.representations.lidar import lidar
from spectral_callbacks.metrics.representations.moments import feature_spectrum
from spectral_callbacks.metrics.representations.ranks import RANKS, effective_rank, rankme

SIZES = (500, 1000, 2000, 10_000)
WIDTH, WIDTH_OF_LIDAR, AUGMENTATIONS = 512, 64, 10
DELTA = 1e-4
EPSILON = 1e-7  # of RankMe's paper; reptrix has it in every entropy
FIRST, LAST = 11, 100  # ranks of the fit, both included
OURS, THEIRS = "ours", "reptrix"


@dataclasses.dataclass(frozen=True)
class Metric:
    """One number, by both packages and by its definition.

    Attributes:
        name: What it is called.
        features: N -> what it is of.
        ours: features -> value.
        theirs: features -> value.
        truth: features -> value.
        their_truth: features -> value under the conventions of reptrix, where it has its own.
        agrees: Whether reptrix means the same.
    """

    name: str
    features: Callable[[int], Tensor]
    ours: Callable[[Tensor], Estimate]
    theirs: Callable[[Tensor], float]
    truth: Callable[[Tensor], float]
    their_truth: Callable[[Tensor], float]
    agrees: bool


def peer(module: str) -> Any:
    """Import a module of reptrix, whose types are not to be checked."""
    return importlib.import_module(f"reptrix.{module}")


@functools.lru_cache(maxsize=1)
def planted(num_samples: int) -> Tensor:  # (N, 512)
    """Draw features whose covariance has the eigenvalues 1/i in a random basis, with a mean of 0.1 each."""
    generator = torch.Generator().manual_seed(num_samples)
    Q, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=generator))
    deviations = torch.arange(1, WIDTH + 1, dtype=torch.float64).rsqrt()
    drawn = torch.randn(num_samples, WIDTH, dtype=torch.float64, generator=generator)
    return (drawn * deviations @ Q + 0.1).float()


@functools.lru_cache(maxsize=1)
def objects(num_samples: int) -> Tensor:  # (N, 64)
    """Draw ten augmentations of each object; the objects scatter by 10/i along the axes, the augmentations by 1."""
    generator = torch.Generator().manual_seed(num_samples)
    deviations = (10 / torch.arange(1, WIDTH_OF_LIDAR + 1, dtype=torch.float64)).sqrt()
    means = torch.randn(num_samples // AUGMENTATIONS, WIDTH_OF_LIDAR, dtype=torch.float64, generator=generator)
    scatter = torch.randn(num_samples, WIDTH_OF_LIDAR, dtype=torch.float64, generator=generator)
    return ((means * deviations).repeat_interleave(AUGMENTATIONS, 0) + scatter).float()


def exp_entropy(values: np.ndarray, epsilon: float = 0.0) -> float:
    """Return exp(-Σ p ln p)."""
    shares = values / values.sum() + epsilon
    shares = shares[shares > 0]
    return math.exp(-(shares * np.log(shares)).sum())


def singular_values(features: Tensor, *, center: bool) -> np.ndarray:
    """Return them by LAPACK in float64."""
    x = features.double().numpy()
    return np.linalg.svd(x - x.mean(0) if center else x, compute_uv=False)


def effective_rank_by_definition(features: Tensor, epsilon: float = 0.0) -> float:
    """Return that of the eigenvalues of the covariance."""
    return exp_entropy(singular_values(features, center=True) ** 2, epsilon)


def rankme_by_definition(features: Tensor) -> float:
    """Return that of the singular values, as in Garrido et al. 2023."""
    return exp_entropy(singular_values(features, center=False), EPSILON)


def alpha_by_definition(features: Tensor) -> float:
    """Return the slope of the least squares fit with weights 1/i, by numpy."""
    ranks = np.arange(FIRST, LAST + 1)
    logs = np.log(singular_values(features, center=True)[ranks - 1] ** 2)
    return float(-np.polyfit(np.log(ranks), logs, 1, w=ranks**-0.5)[0])


def lidar_by_definition(features: Tensor, *, epsilon: float = 0.0) -> float:
    """Return that of the generalised eigenvalues of the two covariances."""
    x = features.double().numpy().reshape(-1, AUGMENTATIONS, WIDTH_OF_LIDAR)
    means = x.mean(1)
    between = np.cov(means.T)
    rest = (x - means[:, None]).reshape(-1, WIDTH_OF_LIDAR)
    within = rest.T @ rest / (len(rest) - len(means)) + DELTA * np.eye(WIDTH_OF_LIDAR)
    return exp_entropy(scipy.linalg.eigh(between, within, eigvals_only=True).clip(0), epsilon)


def our_lidar(features: Tensor) -> Estimate:
    """Return ours."""
    return lidar(features, torch.arange(len(features)) // AUGMENTATIONS, delta=DELTA)


def their_lidar(features: Tensor) -> float:
    """Return theirs; what it adds to the sums within an object is what we add to their mean."""
    delta = DELTA * (AUGMENTATIONS - 1)
    num_objects = len(features) // AUGMENTATIONS
    return float(peer("lidar").get_lidar(features, num_objects, AUGMENTATIONS, del_sigma_augs=delta))


METRICS = (
    Metric(
        "effective rank",
        planted,
        effective_rank,
        lambda x: float(peer("rankme").get_rankme(x)),
        effective_rank_by_definition,
        functools.partial(effective_rank_by_definition, epsilon=EPSILON),
        agrees=True,
    ),
    Metric(
        "alpha-ReQ",
        planted,
        functools.partial(alpha_req, fit_range=(FIRST, LAST)),
        lambda x: float(peer("alpha").get_alpha(x)[0]),
        alpha_by_definition,
        alpha_by_definition,
        agrees=True,
    ),
    Metric(
        "RankMe",
        planted,
        rankme,
        lambda x: float(peer("rankme").get_rankme(x)),
        rankme_by_definition,
        rankme_by_definition,
        agrees=False,
    ),
    Metric(
        "LiDAR",
        objects,
        our_lidar,
        their_lidar,
        lidar_by_definition,
        functools.partial(lidar_by_definition, epsilon=EPSILON),
        agrees=False,
    ),
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A metric at one N: relative errors, and CPU seconds."""

    truth: float
    error_bar: float
    theirs: float
    our_error: float
    their_error: float
    our_seconds: float
    their_seconds: float


def compare(metric: Metric, num_samples: int, repetitions: int) -> Outcome:
    """Let both compute a metric in turns."""
    features = metric.features(num_samples)
    truth, their_truth = metric.truth(features), metric.their_truth(features)
    calls: Mapping[str, Callable[[int], float]] = {
        OURS: lambda _: metric.ours(features).value,
        THEIRS: lambda _: metric.theirs(features),
    }
    runs: dict[str, list[Timed[float]]] = taking_turns(calls, repetitions)
    ours, theirs = (statistics.median(run.result for run in runs[name]) for name in (OURS, THEIRS))
    return Outcome(
        truth,
        metric.ours(features).error,
        theirs,
        abs(ours / truth - 1),
        abs(theirs / their_truth - 1),
        median_seconds(runs[OURS]),
        median_seconds(runs[THEIRS]),
    )


def looks(num_samples: int, repetitions: int) -> tuple[float, float]:
    """Return the CPU seconds of all metrics of a spectrum, ours, and of both that reptrix has."""
    features = planted(num_samples)

    def ours(_: int) -> None:
        spectrum = feature_spectrum(features)
        for rank in RANKS.values():
            rank(spectrum)
        power_law_fit(spectrum)

    def theirs(_: int) -> None:
        peer("rankme").get_rankme(features)
        peer("alpha").get_alpha(features)

    runs = taking_turns({OURS: ours, THEIRS: theirs}, repetitions)
    return median_seconds(runs[OURS]), median_seconds(runs[THEIRS])


def second_fit_moves(features: Tensor) -> tuple[float, float]:
    """Return by how much alpha moves when the same range is passed again: ours, and theirs."""
    theirs, ours = np.arange(FIRST - 1, LAST), (FIRST, LAST)
    first, second = (float(peer("alpha").get_alpha(features, fit_range=theirs)[0]) for _ in range(2))
    own = [alpha_req(features, fit_range=ours).value for _ in range(2)]
    return abs(own[1] / own[0] - 1), abs(second / first - 1)


def main() -> None:
    """Measure, print, judge."""
    quick = options(__doc__).quick
    if (reason := missing("reptrix") or missing("matplotlib")) is not None:  # the first imports the second
        print(f"skipped: {reason}")
        return
    warnings.filterwarnings("ignore", ".*(is biased by|likely too|hangs on delta)")  # of few samples
    claims, rows = Claims(judge_costs=not quick), []
    sizes = SIZES[:2] if quick else SIZES
    for module in ("rankme", "alpha", "lidar"):
        peer(module)  # the first import takes longer than what is measured
    repetitions = {num_samples: 1 if quick else 7 if num_samples < SIZES[-1] else 3 for num_samples in sizes}
    for metric in METRICS:
        outcomes = [compare(metric, num_samples, repetitions[num_samples]) for num_samples in sizes]
        for num_samples, seen in zip(sizes, outcomes, strict=True):
            rows.append([
                f"{metric.name}, N={num_samples}",
                f"{seen.truth:.6g}",
                f"{seen.error_bar:.2g}",
                f"{seen.theirs:.6g}",
                f"{seen.our_error:.0e}",
                f"{seen.their_error:.0e}",
                f"{1e3 * seen.our_seconds:.0f} ms",
                f"{1e3 * seen.their_seconds:.0f} ms",
                f"{seen.our_seconds / seen.their_seconds:.2f}",
            ])  # fmt: skip
        ours, theirs = (
            max(errors) for errors in zip(*((seen.our_error, seen.their_error) for seen in outcomes), strict=True)
        )
        claims.at_most(f"{metric.name}: our relative error, worst", ours, 1e-10, cost=False)
        if metric.agrees:
            claims.at_most(f"{metric.name}: reptrix's, which means the same, worst", theirs, 1e-5, cost=False)
            claims.at_most(f"{metric.name}: our error / reptrix's, worst of both", ours / theirs, 0.01, cost=False)
            last = outcomes[-1]
            claims.at_most(f"{metric.name}, N={sizes[-1]}: ours / reptrix", last.our_seconds / last.their_seconds, 1.0)
    for num_samples in sizes:
        ours, theirs = looks(num_samples, repetitions[num_samples])
        times = [f"{1e3 * ours:.0f} ms", f"{1e3 * theirs:.0f} ms", f"{ours / theirs:.2f}"]
        if num_samples == SIZES[-1]:
            claims.at_most(f"one look, N={num_samples}: ours / reptrix", ours / theirs, 0.8)
        rows.append([f"one look: {len(RANKS) + 1} numbers, its 2, N={num_samples}", "", "", "", "", "", *times])
    ours, theirs = second_fit_moves(planted(SIZES[1]))
    header = ("d = 512, LiDAR 64", "truth", "our ±", THEIRS, "our error", "reptrix's", OURS, THEIRS, "ours / it")
    table(header, rows)
    print(f"\nalpha-ReQ, same range given twice: ours moves by {ours:.0e}, reptrix's by {theirs:.0e}")
    claims.at_most("alpha-ReQ moves when it is called again by", ours, 0.0, cost=False)
    claims.settle()


if __name__ == "__main__":
    main()

"""Ranks of features: closed forms, what a finite sample does to them, and whether their errors say so."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spectral_callbacks.linalg import Estimate
from spectral_callbacks.metrics.eigenvalues import (
    effective_rank_of_eigenvalues,
    entropy_of_eigenvalues,
    participation_ratio_of_eigenvalues,
    stable_rank_of_eigenvalues,
)
from spectral_callbacks.metrics.representations.alpha_req import power_law_fit
from spectral_callbacks.metrics.representations.moments import feature_spectrum
from spectral_callbacks.metrics.representations.ranks import (
    RANKS,
    effective_rank,
    participation_ratio,
    rankme,
    spectral_entropy,
    stable_rank,
    unbiased_participation_ratio,
)
from spectral_callbacks.metrics.representations.spectrum import FeatureSpectrum
from tests.metrics.representations.planted import exact, gaussian, power_law

FUNCTIONS: dict[str, Callable[[Tensor], Estimate]] = {
    "rankme": rankme,
    "effective_rank": effective_rank,
    "participation_ratio": participation_ratio,
    "unbiased_participation_ratio": unbiased_participation_ratio,
    "stable_rank": stable_rank,
    "spectral_entropy": spectral_entropy,
}
OF_EIGENVALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "rankme": lambda e: effective_rank_of_eigenvalues(e.sqrt()),
    "effective_rank": effective_rank_of_eigenvalues,
    "participation_ratio": participation_ratio_of_eigenvalues,
    "unbiased_participation_ratio": participation_ratio_of_eigenvalues,
    "stable_rank": stable_rank_of_eigenvalues,
    "spectral_entropy": entropy_of_eigenvalues,
}
METRICS = {**RANKS, "alpha_req": power_law_fit}


def of_population(name: str, eigenvalues: Tensor, alpha: float) -> float:
    if name == "alpha_req":
        return alpha
    return OF_EIGENVALUES[name](eigenvalues).item()


def values_of(name: str, spectra: list[FeatureSpectrum]) -> Tensor:
    """Values without errors, which take longer."""
    if name == "unbiased_participation_ratio":
        values = [RANKS[name](spectrum).value for spectrum in spectra]
    else:
        basis = [s.second_moment_eigenvalues if name == "rankme" else s.eigenvalues for s in spectra]
        values = [OF_EIGENVALUES[name](eigenvalues).item() for eigenvalues in basis]
    return torch.tensor(values, dtype=torch.float64)


def mean_of(name: str, eigenvalues: Tensor, n: int, count: int) -> tuple[float, float]:
    """Mean over draws, and its standard error."""
    generator = torch.Generator().manual_seed(n)
    spectra = [feature_spectrum(gaussian(eigenvalues, n, generator)) for _ in range(count)]
    values = values_of(name, spectra)
    return values.mean().item(), values.std().item() / math.sqrt(count)


# ---- Closed forms


@pytest.mark.parametrize(
    ("alpha", "effective", "of_roots", "participation"),
    [(1.0, 117.2312, 409.5545, 28.2808), (2.0, 5.0561, 117.2312, 2.4941)],
    ids=["alpha = 1", "alpha = 2"],
)
def test_power_laws(alpha: float, effective: float, of_roots: float, participation: float) -> None:
    eigenvalues = power_law(512, alpha)
    spectrum = feature_spectrum(exact(eigenvalues, 1024))
    assert RANKS["effective_rank"](spectrum).value == pytest.approx(effective, abs=1e-4)
    assert RANKS["participation_ratio"](spectrum).value == pytest.approx(participation, abs=1e-4)
    assert RANKS["stable_rank"](spectrum).value == pytest.approx(eigenvalues.sum().item(), rel=1e-9)
    assert RANKS["spectral_entropy"](spectrum).value == pytest.approx(math.log(effective), abs=1e-5)
    # With ε, p_k adds up to 1 + 512e-7.
    p = eigenvalues.sqrt() / eigenvalues.sqrt().sum() + 1e-7
    found = RANKS["rankme"](spectrum).value
    assert found == pytest.approx(math.exp(-(p * p.log()).sum().item()), rel=1e-9)
    assert found == pytest.approx(of_roots, rel=3e-3)
    assert found > of_roots + 1e-3


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - {"spectral_entropy", "unbiased_participation_ratio"}))
@pytest.mark.parametrize("count", [1, 4, 9])
def test_equal_eigenvalues_count_one_each(name: str, count: int) -> None:
    eigenvalues = torch.cat([torch.full((count,), 0.3), torch.zeros(11)]).double()
    found = RANKS[name](feature_spectrum(exact(eigenvalues, 600)))
    assert found.value == pytest.approx(count, rel=1e-4 if name == "rankme" else 1e-9)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", [(50, 9), (9, 50)], ids=["n > d", "n < d"])
def test_features_on_a_line_have_rank_one(name: str, shape: tuple[int, int]) -> None:
    line = torch.linspace(-1, 1, shape[0])[:, None] * torch.linspace(1, 2, shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the unbiased one of nine samples
        found = FUNCTIONS[name](line)
    expected = 0.0 if name == "spectral_entropy" else 1.0
    assert found.value == pytest.approx(expected, abs=1e-4)


def test_rankme_counts_the_mean_and_effective_rank_does_not() -> None:
    x = torch.randn(2000, 128, generator=torch.Generator().manual_seed(0))
    assert rankme(x + 10).value == pytest.approx(25.6, abs=0.1)
    assert rankme(x).value == pytest.approx(126.95, abs=0.1)
    assert effective_rank(x + 10).value == pytest.approx(effective_rank(x).value, rel=1e-5)
    uncentred = feature_spectrum(x + 10).estimate(effective_rank_of_eigenvalues, center=False)
    assert uncentred.value == pytest.approx(1.108, abs=2e-3)


# ---- What a finite sample does

TEN_IN_NOISE = torch.cat([torch.full((10,), 1.0 + 1e-4), torch.full((118,), 1e-4)]).double()
EXPECTED = {
    "participation_ratio": (9.22, 9.93),
    "unbiased_participation_ratio": (10.02, 10.02),
    "effective_rank": (9.67, 10.07),
    "rankme": (16.3, 18.0),
}


@pytest.mark.parametrize("n", [128, 1024])
@pytest.mark.parametrize("name", EXPECTED)
def test_ten_directions_in_noise(name: str, n: int) -> None:
    mean, error = mean_of(name, TEN_IN_NOISE, n, 10)
    assert abs(mean - EXPECTED[name][n == 1024]) < 4 * error + 0.05  # as many digits as given


@pytest.mark.parametrize("n", [64, 128, 256, 1024])
def test_flat_spectra_are_seen_as_theory_says(n: int) -> None:
    flat = torch.ones(128).double()
    mean, error = mean_of("participation_ratio", flat, n, 6)
    assert mean == pytest.approx((n - 1) * 128 / (n - 1 + 128), rel=0.01)
    mean, error = mean_of("unbiased_participation_ratio", flat, n, 6)
    assert abs(mean - 128) < 4 * error + 0.1
    mean, _ = mean_of("rankme", flat, n, 2)
    assert mean == pytest.approx({64: 59, 128: 103, 256: 118, 1024: 126}[n], abs=1)


@pytest.mark.parametrize(("n", "d", "value"), [(1000, 100, 94.93), (200, 100, 77.62), (50, 512, 46.7)])
def test_effective_rank_of_a_flat_spectrum(n: int, d: int, value: float) -> None:
    mean, error = mean_of("effective_rank", torch.ones(d).double(), n, 4)
    assert abs(mean - value) < 4 * error + 0.3
    if n >= 2 * d:
        assert mean == pytest.approx(d * math.exp(-d / (2 * n)), rel=0.01)


# ---- Without bias


def test_the_unbiased_participation_ratio_is_made_of_u_statistics() -> None:
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).exp()
    above = below = 0.0
    for i, j, k, m in itertools.permutations(range(len(x)), 4):
        first, second = x[i] - x[j], x[k] - x[m]
        above += (first @ first * (second @ second)).item()
        below += (first @ second).item() ** 2
    for features in (x, torch.cat([x, torch.zeros(7, 9)], 1)):
        found = RANKS["unbiased_participation_ratio"](feature_spectrum(features))
        assert found.value == pytest.approx(above / below, rel=1e-10)


def test_the_unbiased_participation_ratio_needs_four_samples() -> None:
    with pytest.raises(ValueError, match="at least 4"):
        unbiased_participation_ratio(torch.eye(3))


# ---- Errors


def relu_features(n: int, generator: torch.Generator) -> Tensor:
    mixing = torch.randn(48, 48, generator=torch.Generator().manual_seed(0)) * power_law(48, 0.5).float()
    return (torch.randn(n, 48, generator=generator) @ mixing.mT / 2 + 0.3).relu()


def clustered_features(n: int, generator: torch.Generator) -> Tensor:
    centers = torch.randn(6, 48, generator=torch.Generator().manual_seed(0))
    which = torch.randint(6, (n,), generator=generator)
    return centers[which] + 0.2 * torch.randn(n, 48, generator=generator)


def gaussian_features(n: int, generator: torch.Generator) -> Tensor:
    return gaussian(power_law(48, 1.0), n, generator)


@pytest.mark.parametrize("kind", [relu_features, clustered_features, gaussian_features])
def test_standard_errors_are_the_spread_over_draws(kind: Callable[[int, torch.Generator], Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    spectra = [feature_spectrum(kind(600, generator)) for _ in range(60)]
    for name, rank in RANKS.items():
        found = [rank(spectrum) for spectrum in spectra[:8]]
        spread = values_of(name, spectra).std().item()
        error = math.sqrt(sum(e.standard_error**2 for e in found) / len(found))
        assert 0.75 < error / spread < 1.5, name


@pytest.mark.parametrize(("d", "n", "alpha"), [(128, 64, 0.0), (128, 256, 0.0), (512, 128, 0.5)])
def test_the_unbiased_participation_ratio_knows_its_error_where_pairs_make_it(d: int, n: int, alpha: float) -> None:
    generator = torch.Generator().manual_seed(1)
    spectra = [feature_spectrum(gaussian(power_law(d, alpha), n, generator)) for _ in range(50)]
    found = [RANKS["unbiased_participation_ratio"](spectrum) for spectrum in spectra]
    spread = torch.tensor([e.value for e in found]).std().item()
    assert 0.75 < math.sqrt(sum(e.standard_error**2 for e in found) / 50) / spread < 1.3


def test_a_warning_names_samples_bias_and_remedy_once() -> None:
    few = torch.randn(60, 40, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match=r"effective_rank=.* num_samples=60: .*estimated at -\d+% .*about \d+") as seen:
        found = effective_rank(few)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    assert found.error > 0.05 * found.value
    with pytest.warns(UserWarning, match="unknown") as seen:
        participation_ratio(few[:3])
    assert len(seen) == 1


BAD = {
    "constant": (torch.full((30, 4), 0.1), "constant"),
    "a single sample": (torch.ones(1, 4), "a single sample has no covariance"),
    "NaN": (torch.full((30, 4), math.nan), "30 of 30 rows"),
    "a vector": (torch.ones(4), "shape"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_has_no_rank_is_refused(name: str, bad: str) -> None:
    features, says = BAD[bad]
    with pytest.raises(ValueError, match=says):
        FUNCTIONS[name](features)


# ---- The bias law


def covered(d: int, sizes: tuple[int, ...], num_draws: int) -> dict[str, Tensor]:
    """Share of draws, (α, n), whose interval of two errors has the truth in it, or that say that n is too small."""
    cells: dict[str, list[float]] = {name: [] for name in METRICS}
    generator = torch.Generator().manual_seed(0)
    for alpha, n in itertools.product((0.5, 1.0, 2.0), sizes):
        eigenvalues = power_law(d, alpha)
        spectra = [feature_spectrum(gaussian(eigenvalues, n, generator)) for _ in range(num_draws)]
        for name, metric in METRICS.items():
            truth = of_population(name, eigenvalues, alpha)
            found = [metric(spectrum) for spectrum in spectra]
            kept = [e.is_too_biased or abs(e.value - truth) <= 2 * e.error for e in found]
            cells[name].append(sum(kept) / num_draws)
    return {name: torch.tensor(shares).view(3, -1) for name, shares in cells.items()}


def test_an_interval_has_the_truth_in_it_or_says_that_samples_are_too_few() -> None:
    for name, shares in covered(64, (32, 64, 96, 128, 256, 1024), 5).items():
        assert shares.mean() > 0.88, (name, shares)  # 95 % of 90 draws, less three standard deviations
        assert shares.min() >= 0.4, (name, shares)


@pytest.mark.slow
def test_the_bias_law_of_512_features() -> None:
    for name, shares in covered(512, (256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192), 12).items():
        assert shares.mean() > 0.91, (name, shares)  # 95 % of 324 draws, less three standard deviations
        assert shares.min() >= 0.6, (name, shares)


def test_plenty_of_samples_leave_no_warning() -> None:
    features = gaussian(power_law(48, 1.0), 4000, torch.Generator().manual_seed(0))
    for name, function in FUNCTIONS.items():
        found = function(features)
        assert abs(found.value - of_population(name, power_law(48, 1.0), 1.0)) < 3 * found.error, name

"""The size of the gradient noise, against dense covariance matrices, and estimates against their own errors."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from spectral_callbacks.linalg import Estimate
from spectral_callbacks.metrics import jackknife
from spectral_callbacks.metrics.gradient_noise import GradientMoments, gradient_norm, mean_pairwise_cosine
from spectral_callbacks.metrics.pair_mean import PairMean


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def of(g: Tensor, dataset_size: int | None = None) -> GradientMoments:
    return GradientMoments.from_gram(g @ g.mT, dataset_size=dataset_size)


@dataclasses.dataclass(frozen=True)
class Planted:
    """Gaussian gradients with |G|² = 1 and tr Σ = 100, so that the noise scale is 100."""

    spectrum: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "spectrum", 100 * self.spectrum / self.spectrum.sum())

    def looks(self, num_samples: int, repetitions: int) -> list[GradientMoments]:
        return [of(g) for g in self.draws(num_samples, repetitions)]

    def draws(self, num_samples: int, repetitions: int) -> Iterator[Tensor]:  # (num_samples, n)
        generator = torch.Generator().manual_seed(num_samples)
        n = len(self.spectrum)
        for _ in range(repetitions):
            mean = torch.nn.functional.normalize(torch.randn(n, dtype=torch.float64, generator=generator), dim=0)
            noise = torch.randn(num_samples, n, dtype=torch.float64, generator=generator)
            yield noise * self.spectrum.sqrt() + mean


PLANTED = {
    "flat, 200": Planted(torch.ones(200, dtype=torch.float64)),
    "flat, 1000": Planted(torch.ones(1000, dtype=torch.float64)),
    "1/√i, 1000": Planted(torch.arange(1, 1001).double() ** -0.5),
}


def assert_honest(estimates: list[Estimate], truth: float, *, within: float = 0.12) -> None:
    """The mean is the truth by a z-test, and the errors are the spread."""
    values, errors = torch.tensor([(e.value, e.error) for e in estimates], dtype=torch.float64).unbind(1)
    z = (values.mean().item() - truth) / (values.std().item() / math.sqrt(len(values)))
    assert abs(z) < 3
    assert errors.square().mean().sqrt().item() == pytest.approx(values.std().item(), rel=within)


# ---- Closed forms


def test_six_samples_have_the_noise_scale_in_closed_form() -> None:
    g = torch.tensor([[1.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 4], [0, 0, 0, 0], [0, 0, 1, 1]])
    moments = of(g.double())
    assert moments.square == pytest.approx(32 / 6, abs=1e-6)
    assert gradient_norm(g @ g.mT).value ** 2 == pytest.approx(46 / 36, abs=1e-6)
    assert moments.trace().value == pytest.approx(4.866667, abs=1e-6)
    assert moments.squared_signal().value == pytest.approx(0.466667, abs=1e-6)
    assert moments.noise_scale().value == pytest.approx(10.428571, abs=1e-6)
    assert moments.signal_to_noise().value == pytest.approx(1 / 10.428571, abs=1e-6)


def test_the_trace_is_that_of_the_unbiased_covariance_matrix() -> None:
    g = randn(9, 5) + 1
    assert of(g).trace().value == pytest.approx(torch.cov(g.mT).trace().item(), rel=1e-12)
    N, m, square = 9, g.square().sum(1).mean().item(), g.mean(0).square().sum().item()
    assert of(g).signal == pytest.approx((N * square - m) / (N - 1), rel=1e-12)


def test_the_pair_mean_and_its_parts_are_those_of_sums_over_different_samples() -> None:
    N = 6
    K = randn(N, N)
    K = K + K.mT
    f = randn(N, seed=1)

    def mean(term: Callable[..., Tensor], order: int) -> float:
        return torch.stack([term(*chosen) for chosen in itertools.permutations(range(N), order)]).mean().item()

    two = mean(lambda i, j: K[i, j] ** 2, 2)
    three = mean(lambda i, j, k: K[i, j] * K[i, k], 3)
    four = mean(lambda i, j, k, m: K[i, j] * K[k, m], 4)
    found = PairMean.of(K)
    assert found.value == pytest.approx(mean(lambda i, j: K[i, j], 2))
    assert found.linear == pytest.approx(4 / N * max(three - four, 0))
    assert found.quadratic == pytest.approx(2 / (N * (N - 1)) * max(two - 2 * three + four, 0))
    product = f.mean().item() * found.value
    assert found.covariance_with(f) == pytest.approx(product - mean(lambda i, j, k: f[i] * K[j, k], 3))


def test_the_diagonal_plays_no_part_in_a_pair_mean() -> None:
    K = randn(8, 5) @ randn(8, 5).mT
    other = K + torch.diag(torch.full((8,), 1e6, dtype=torch.float64))
    assert PairMean.of(other).estimate() == PairMean.of(K).estimate()


def test_jackknife_counts_the_quadratic_part_twice() -> None:
    ours, usual = [], []
    for g in randn(200, 24, 50):
        K = g @ g.mT
        ours.append(PairMean.of(K).variance())
        usual.append(jackknife(lambda i, K=K: PairMean.of(K[i][:, i]).value, 24, dataset_size=10**9) ** 2)
    theory = 2 * 50 / (24 * 23)
    assert sum(usual) / 200 == pytest.approx(2 * theory, rel=0.1)
    assert theory < sum(ours) / 200 < 1.4 * theory  # the linear part, which is 0, is cut there


# ---- Estimates against their own errors


@pytest.mark.parametrize("num_samples", [16, 64])
@pytest.mark.parametrize("planted", PLANTED)
def test_estimates_are_unbiased_and_their_errors_are_the_spread(planted: str, num_samples: int) -> None:
    looks = PLANTED[planted].looks(num_samples, 400)
    assert_honest([look.trace() for look in looks], 100)
    # The parts of the variance are cut at 0, which makes it too large where it is hardly known.
    assert_honest([look.squared_signal() for look in looks], 1, within=0.25)


def test_signal_to_noise_is_known_to_its_error() -> None:
    assert_honest([look.signal_to_noise() for look in PLANTED["flat, 1000"].looks(64, 400)], 0.01)


def test_a_clear_signal_to_noise_ratio_is_known_to_its_error() -> None:
    estimates = [of(g).signal_to_noise() for g in randn(400, 64, 50) + 1]
    values, errors = torch.tensor([(e.value, e.error) for e in estimates], dtype=torch.float64).unbind(1)
    assert values.mean().item() == pytest.approx(1, abs=0.02)
    assert errors.mean().item() == pytest.approx(values.std().item(), rel=0.1)


def test_the_norm_of_the_mean_gradient_is_that_of_the_samples_and_varies_by_its_error() -> None:
    draws = list(PLANTED["flat, 1000"].draws(32, 400))
    norms = [gradient_norm(g @ g.mT) for g in draws]
    for norm, g in zip(norms[:10], draws, strict=False):
        assert norm.value == pytest.approx(g.mean(0).norm().item())
    assert_honest(norms, math.sqrt(1 + 100 / 32), within=0.15)


def test_the_mean_cosine_is_known_to_its_error() -> None:
    draws = [g * randn(32, 1).abs() for g in PLANTED["flat, 1000"].draws(32, 400)]  # which no length changes
    cosines = [mean_pairwise_cosine(g @ g.mT) for g in draws]
    unit = torch.nn.functional.normalize(draws[0], dim=1)
    expected = [(unit[i] @ unit[j]).item() for i in range(32) for j in range(32) if i != j]
    assert cosines[0].value == pytest.approx(sum(expected) / len(expected))
    # E cos of μ + x, x Gaussian in 1000 dimensions: |E(unit)|², to 1/n
    assert_honest(cosines, 1 / 101, within=0.15)


@pytest.mark.parametrize("dataset_size", [30, 100])
def test_draws_from_a_dataset_estimate_what_the_whole_dataset_has(dataset_size: int) -> None:
    everyone = randn(dataset_size, 40) + 0.3
    whole = of(everyone, dataset_size)
    assert whole.trace().value == pytest.approx(torch.cov(everyone.mT, correction=0).trace().item())
    assert whole.signal == pytest.approx(everyone.mean(0).square().sum().item())
    generator = torch.Generator().manual_seed(0)
    chosen = [torch.randperm(dataset_size, generator=generator)[:20] for _ in range(1000)]
    looks = [of(everyone[i], dataset_size) for i in chosen]
    assert_honest([look.trace() for look in looks], whole.trace().value, within=0.15)
    assert_honest([look.squared_signal() for look in looks], whole.signal, within=0.15)
    norms = [gradient_norm(everyone[i] @ everyone[i].mT, dataset_size=dataset_size) for i in chosen]
    spread = torch.tensor([norm.value for norm in norms]).std().item()
    assert sum(norm.error for norm in norms) / len(norms) == pytest.approx(spread, rel=0.15)


def test_the_share_of_a_sample_with_itself_is_as_well_known_as_its_norm() -> None:
    own = randn(20).abs()
    moments = GradientMoments.from_gram(torch.diag(own), dataset_size=40)  # orthogonal: |ḡ|² of the 40 is m/40
    assert moments.signal == pytest.approx(own.mean().item() / 40)
    error = math.sqrt(own.var().item() / 20 * (1 - 20 / 40))
    assert moments.squared_signal().error == pytest.approx(error / 40)
    assert moments.trace().error == pytest.approx(error * 39 / 40)


def test_the_whole_dataset_is_no_estimate() -> None:
    g = randn(12, 30) + 1
    moments, gram = of(g, 12), g @ g.mT
    assert moments.trace().error == moments.squared_signal().error == moments.signal_to_noise().error == 0
    assert gradient_norm(gram, dataset_size=12).error == mean_pairwise_cosine(gram, dataset_size=12).error == 0
    value, error, low, high = moments.noise_scale()
    assert error == 0
    expected = torch.cov(g.mT, correction=0).trace().item() / g.mean(0).square().sum().item()
    assert (value, low, high) == pytest.approx((expected,) * 3)


# ---- The noise scale


@pytest.mark.parametrize("planted", PLANTED)
def test_the_noise_scale_of_32_samples_is_covered_by_its_interval(planted: str) -> None:
    looks = PLANTED[planted].looks(32, 1600)
    scales = [look.noise_scale() for look in looks]
    assert sum(look.trace().value for look in looks) / sum(look.signal for look in looks) == pytest.approx(
        100, rel=0.03
    )
    assert 0.93 <= sum(scale.low <= 100 <= scale.high for scale in scales) / 1600 <= 0.97
    for scale in scales:
        assert scale.low <= scale.value <= scale.high


@pytest.mark.parametrize("num_samples", [16, 64, 128])
def test_the_interval_is_neither_short_nor_idle_at_other_numbers_of_samples(num_samples: int) -> None:
    for planted in ("flat, 1000", "1/√i, 1000"):
        scales = [look.noise_scale() for look in PLANTED[planted].looks(num_samples, 200)]
        assert sum(scale.low <= 100 <= scale.high for scale in scales) / 200 >= 0.91
        if num_samples > 16:
            assert sum(math.isfinite(scale.high) for scale in scales) / 200 > 0.95
            assert sum(scale.low < 100 * 1.6 < scale.high for scale in scales) / 200 < 0.9


def test_the_interval_of_two_errors_does_not_cover() -> None:
    scales = [look.noise_scale() for look in PLANTED["flat, 200"].looks(32, 400)]
    covered = sum(abs(scale.value - 100) <= 2 * scale.error for scale in scales if math.isfinite(scale.value))
    assert covered / 400 < 0.93


def test_the_error_is_that_of_the_ratio_where_the_signal_is_clear() -> None:
    looks = [of(g) for g in randn(400, 32, 50) + 1]
    scales = torch.tensor([look.noise_scale()[:2] for look in looks], dtype=torch.float64)
    assert scales[:, 1].mean().item() == pytest.approx(scales[:, 0].std().item(), rel=0.1)
    low, high = torch.tensor([look.noise_scale()[2:] for look in looks]).mean(0).tolist()
    assert high - low == pytest.approx(4 * scales[:, 1].mean().item(), rel=0.1)


def test_without_a_significant_signal_the_interval_is_unbounded() -> None:
    looks = [of(g) for g in randn(100, 32, 50)]
    scales = [look.noise_scale() for look in looks]
    assert sum(scale.high == math.inf for scale in scales) >= 95
    for look, scale in zip(looks, scales, strict=True):
        assert (scale.value == math.inf) == (look.signal <= 0)
        assert scale.low > 0


# ---- Averages over looks


def test_numerator_and_denominator_averaged_apart_give_the_ratio_and_averaged_ratios_do_not() -> None:
    looks = PLANTED["flat, 1000"].looks(16, 1600)
    average, ratios = looks[0], looks[0].noise_scale().value
    for j, look in enumerate(looks[1:], start=2):
        average = average.averaged(look, 0.999, same_samples=False)
        ratios += (look.trace().value / look.signal - ratios) / j
    assert average.noise_scale().value == pytest.approx(100, rel=0.03)
    assert average.noise_scale().low < 100 < average.noise_scale().high
    assert average.noise_scale().error < 3
    assert abs(ratios - 100) > 10


def test_an_average_weighs_the_looks_exponentially_from_the_first_on() -> None:
    looks = PLANTED["flat, 200"].looks(8, 5)
    weights = torch.tensor([0.7**4, 0.7**3, 0.7**2, 0.7, 1], dtype=torch.float64)
    weights /= weights.sum()
    average = looks[0]
    for look in looks[1:]:
        average = average.averaged(look, 0.7, same_samples=False)
    assert average.signal == pytest.approx(sum(w.item() * x.signal for w, x in zip(weights, looks, strict=True)))
    assert average.square == pytest.approx(sum(w.item() * x.square for w, x in zip(weights, looks, strict=True)))
    expected = sum(
        (w**2 * x.covariance for w, x in zip(weights, looks, strict=True)), torch.zeros(2, 2, dtype=torch.float64)
    )
    torch.testing.assert_close(average.covariance, expected)


def test_an_average_of_independent_looks_is_known_to_its_error() -> None:
    looks = PLANTED["flat, 1000"].looks(16, 1200)
    averages = []
    for j in range(0, 1200, 4):
        average = looks[j]
        for look in looks[j + 1 : j + 4]:
            average = average.averaged(look, 1.0, same_samples=False)
        averages.append(average)
    assert_honest([average.squared_signal() for average in averages], 1, within=0.2)
    assert_honest([average.trace() for average in averages], 100)


def test_looks_at_the_same_samples_do_not_make_the_average_better_known() -> None:
    look = of(randn(16, 30) + 1)
    again = look.averaged(look, 0.9, same_samples=True)
    torch.testing.assert_close(again.covariance, look.covariance)
    assert again.noise_scale() == pytest.approx(look.noise_scale())
    half = dataclasses.replace(look, covariance=look.covariance / 4)  # errors that are half of the others'
    both = look.averaged(half, 1.0, same_samples=True).covariance
    assert (torch.linalg.eigvalsh(both - (0.75**2) * look.covariance) >= -1e-12).all()


def test_decay_0_forgets() -> None:
    old, new = of(torch.full((2, 1), math.pi)), of(randn(16, 30))
    assert old.averaged(new, 0.0, same_samples=True).noise_scale() == new.noise_scale()
    for decay in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="decay"):
            old.averaged(new, decay, same_samples=True)


# ---- Where there is little to know


def test_a_single_sample_says_only_its_norm() -> None:
    moments = of(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    assert moments.square == 25
    for estimate in (moments.trace(), moments.squared_signal(), moments.signal_to_noise()):
        assert math.isnan(estimate.value)
        assert estimate.error == math.inf
    value, error, low, high = moments.noise_scale()
    assert math.isnan(value)
    assert (error, low, high) == (math.inf, 0, math.inf)
    norm = gradient_norm(torch.tensor([[25.0]]))
    assert (norm.value, norm.error) == (5, math.inf)


@pytest.mark.parametrize("num_samples", [2, 3])
def test_two_or_three_samples_have_estimates_without_errors(num_samples: int) -> None:
    g = randn(num_samples, 6) + 1
    moments = of(g)
    assert moments.trace().value == pytest.approx(torch.cov(g.mT).trace().item())
    assert moments.trace().error == moments.squared_signal().error == math.inf
    assert moments.noise_scale()[2:] == (0, math.inf)
    assert mean_pairwise_cosine(g @ g.mT).error == math.inf


def test_equal_gradients_have_no_noise() -> None:
    g = randn(1, 5).expand(8, 5)
    moments = of(g)
    assert moments.trace().value == pytest.approx(0, abs=1e-12)
    assert moments.noise_scale() == pytest.approx((0, 0, 0, 0), abs=1e-6)
    assert mean_pairwise_cosine(g @ g.mT).value == pytest.approx(1)
    assert mean_pairwise_cosine(g @ g.mT).error == pytest.approx(0, abs=1e-12)


def test_gradients_that_are_zero_have_no_noise_scale() -> None:
    moments = of(torch.zeros(8, 5))
    assert moments.trace().value == moments.squared_signal().value == 0
    assert math.isnan(moments.noise_scale().value)
    assert math.isnan(moments.signal_to_noise().value)
    assert math.isnan(mean_pairwise_cosine(torch.zeros(8, 8)).value)
    assert gradient_norm(torch.zeros(8, 8)).value == 0


def test_samples_without_a_gradient_have_no_cosine() -> None:
    g = randn(8, 5)
    some = torch.cat([g, torch.zeros(3, 5)])
    assert mean_pairwise_cosine(some @ some.mT) == mean_pairwise_cosine(g @ g.mT)
    assert mean_pairwise_cosine(some @ some.mT, dataset_size=11).error == 0
    half = mean_pairwise_cosine(g @ g.mT, dataset_size=16)
    assert mean_pairwise_cosine(some @ some.mT, dataset_size=22) == half


def test_units_scale_what_has_units() -> None:
    g = randn(16, 20) + 0.5
    one, thousand = of(g), of(1000 * g)
    assert thousand.noise_scale() == pytest.approx(one.noise_scale())
    assert thousand.signal_to_noise().error == pytest.approx(one.signal_to_noise().error)
    assert thousand.trace().error == pytest.approx(1e6 * one.trace().error)

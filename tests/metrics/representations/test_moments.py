"""Features in batches have the spectrum of all at once."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from spectral_callbacks.metrics.representations.moments import FeatureMoments, feature_spectrum
from spectral_callbacks.metrics.representations.ranks import RANKS
from spectral_callbacks.metrics.representations.row_sample import RowSample

SHAPES = [(40, 300), (300, 300), (301, 300), (900, 30), (1500, 30), (2600, 30)]
BATCHES = {"one": [10**6], "ones": [1] * 30, "uneven": [1, 700, 3], "blocks": [1024, 1024]}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def far_from_zero(n: int, d: int) -> Tensor:
    """Features with deviations from 1 to 1/30 in some frame and the mean 100, in float32."""
    generator = seeded(n)
    frame = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    return torch.randn(n, d, generator=generator) * torch.logspace(0, -1.5, d) @ frame + 100


def in_batches(features: Tensor, sizes: list[int]) -> Iterator[Tensor]:
    start = 0
    for size in [*sizes, len(features)]:
        yield features[start : start + size]
        start += size


def collected(features: Tensor, sizes: list[int], num_kept: int = 1024) -> FeatureMoments:
    moments = FeatureMoments(num_kept, generator=seeded())
    for batch in in_batches(features, sizes):
        moments.update(batch)
    return moments


def dense(features: Tensor, *, center: bool) -> Tensor:
    """Squared singular values of all rows in float64, divided by n."""
    x = features.double()
    x = x - x.mean(0) if center else x
    values = torch.linalg.svdvals(x).square() / len(x)
    return values[: min(len(x) - center, x.shape[1])]


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_spectrum_is_that_of_all_rows_at_once(shape: tuple[int, int], batches: str) -> None:
    features = far_from_zero(*shape)
    spectrum = collected(features, BATCHES[batches]).spectrum()
    torch.testing.assert_close(spectrum.eigenvalues, dense(features, center=True), rtol=1e-10, atol=1e-14)
    atol = 1e-14 * dense(features, center=False)[0].item()  # |x̄|² is 1e7 times as large as they are
    found = spectrum.second_moment_eigenvalues
    torch.testing.assert_close(found, dense(features, center=False)[: len(found)], rtol=1e-10, atol=atol)
    x = features.double() - features.double().mean(0)
    assert spectrum.fourth_moment == pytest.approx(x.square().sum(1).square().mean().item(), rel=1e-12)
    assert (spectrum.num_samples, spectrum.num_features) == shape


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("shape", [(40, 60), (900, 30), (2600, 30)], ids=str)
def test_streaming_equals_one_shot(shape: tuple[int, int], batches: str) -> None:
    features = far_from_zero(*shape)
    streamed, at_once = (collected(features, BATCHES[name]).spectrum() for name in (batches, "one"))
    torch.testing.assert_close(streamed.eigenvalues, at_once.eigenvalues, rtol=1e-10, atol=0)
    for rank in RANKS.values():
        found, expected = rank(streamed), rank(at_once)
        assert found.value == pytest.approx(expected.value, rel=1e-9)
        assert found.error == pytest.approx(expected.error, rel=1e-6)


def test_raw_moments_in_float32_would_not_do() -> None:
    features = far_from_zero(2600, 30)
    raw = features.mT @ features / len(features) - torch.outer(features.mean(0), features.mean(0))
    wrong = torch.linalg.eigvalsh(raw.double()).flip(0)
    assert not torch.allclose(wrong, dense(features, center=True), rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_any_floating_point_type_is_taken_as_it_is(dtype: torch.dtype) -> None:
    features = far_from_zero(50, 20).sub(100).to(dtype)
    found = feature_spectrum(features)
    torch.testing.assert_close(found.eigenvalues, dense(features, center=True), rtol=1e-10, atol=0)


def test_rows_are_copies_and_no_part_of_a_graph() -> None:
    features = far_from_zero(30, 50).requires_grad_()
    moments = FeatureMoments(generator=seeded())
    moments.update(features)
    before = moments.spectrum().eigenvalues.clone()
    with torch.no_grad():
        features.zero_()
    assert torch.equal(moments.spectrum().eigenvalues, before)
    assert not moments.rows().requires_grad
    assert not moments.rows().eq(0).any()


def test_inference_mode_makes_no_difference() -> None:
    features = far_from_zero(80, 20)
    with torch.inference_mode():
        inside = RANKS["effective_rank"](collected(features, [30, 30]).spectrum())
    assert inside == RANKS["effective_rank"](collected(features, [30, 30]).spectrum())


# ---- The rows that are kept


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("n", [5, 64, 65, 2600])
def test_the_same_rows_are_kept_whatever_the_batches_and_the_features(n: int, batches: str) -> None:
    index = torch.arange(float(n))[:, None]
    narrow = collected(index + torch.zeros(1, 3), BATCHES[batches], num_kept=64).rows()[:, 0]
    wide = collected(index + torch.zeros(1, 80), BATCHES["one"], num_kept=64).rows()[:, 0]
    assert torch.equal(narrow, wide)
    assert (narrow.diff() > 0).all()
    assert len(narrow) == min(n, 64)


def test_every_row_is_kept_as_often_as_another() -> None:
    counts, looks = torch.zeros(20), 800
    generator = seeded()
    for _ in range(looks):
        sample = RowSample(5, generator=generator)
        for batch in torch.arange(20)[:, None].split(7):
            sample.update(batch)
        counts[sample.rows[:, 0]] += 1
    z = (counts - looks / 4) / math.sqrt(looks * 3 / 16)
    assert z.abs().max() < 4
    assert z.square().sum() < 45  # chi-squared, 19 degrees of freedom


def test_the_row_sample_takes_nothing_of_the_global_generator() -> None:
    before = torch.get_rng_state()
    collected(far_from_zero(50, 4), [7])
    assert torch.equal(torch.get_rng_state(), before)


# ---- Bounded memory


@pytest.mark.slow
def test_many_features_go_through_in_bounded_memory() -> None:
    import resource

    d, moments = 1024, FeatureMoments(256, generator=seeded())
    moments.update(torch.randn(2048, d, generator=seeded()))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    generator = seeded(1)
    for _ in range(60):
        moments.update(torch.randn(2048, d, generator=generator))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert moments.num_samples * d * 8 > 2**29
    assert grown < 64 * 1024
    assert len(moments.rows()) == 256


# ---- What is no features


@pytest.mark.parametrize("shape", [(3, 5), (40, 5), (2000, 5)], ids=str)
@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_constant_features_have_no_spectrum(shape: tuple[int, int], value: float) -> None:
    constant = torch.full(shape, value) * torch.linspace(0.1, 1.3, 5)
    with pytest.raises(ValueError, match="constant"):
        feature_spectrum(constant)
    moments = collected(constant, [1, 1, 700])
    with pytest.raises(ValueError, match="constant"):
        moments.spectrum()


@pytest.mark.parametrize("scale", [1e160, 1e100, 1e-100])
@pytest.mark.parametrize("shape", [(9, 30), (30, 9)], ids=str)
def test_features_whose_moments_float64_cannot_hold_are_refused(shape: tuple[int, int], scale: float) -> None:
    with pytest.raises(ValueError, match=r"fourth powers of that do not fit into float64; divide all by the largest"):
        feature_spectrum(scale * far_from_zero(*shape).double())


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_all_that_float32_can_hold_has_a_spectrum(scale: float) -> None:
    features = far_from_zero(50, 20).sub(100)
    for rank in RANKS.values():
        found, expected = (rank(feature_spectrum(factor * features)) for factor in (scale, 1.0))
        assert found.value == pytest.approx(expected.value, rel=1e-5)
        assert found.error == pytest.approx(expected.error, rel=1e-3)


def test_a_single_sample_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="a single sample has no covariance"):
        feature_spectrum(torch.ones(1, 4))
    with pytest.raises(ValueError, match="0 samples"):
        FeatureMoments(generator=seeded()).spectrum()
    with pytest.raises(ValueError, match="no rows"):
        FeatureMoments(generator=seeded()).rows()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_counted_and_not_added(bad: float) -> None:
    moments = FeatureMoments(generator=seeded())
    moments.update(torch.eye(4))
    broken = torch.ones(6, 4)
    broken[1, 2] = broken[4, 0] = broken[4, 1] = bad
    with pytest.raises(ValueError, match="2 of 6 rows"):
        moments.update(broken)
    assert moments.num_samples == 4


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        (torch.ones(3, 5), "d=5 features after one with 4"),
        (torch.ones(3), "shape"),
        (torch.ones(3, 4, 2), "shape"),
        (torch.ones(3, 0), "shape"),
        (torch.ones(3, 4, dtype=torch.long), "type"),
        (torch.ones(3, 4, dtype=torch.complex64), "type"),
    ],
    ids=["another d", "one dimension", "three dimensions", "no features", "integers", "complex"],
)
def test_what_is_no_batch_of_features_is_refused(batch: Tensor, says: str) -> None:
    moments = FeatureMoments(generator=seeded())
    moments.update(torch.eye(4))
    with pytest.raises(ValueError, match=says):
        moments.update(batch)
    moments.update(torch.ones(0, 4))
    assert moments.num_samples == 4


def test_at_least_two_rows_are_kept() -> None:
    with pytest.raises(ValueError, match="num_kept=1"):
        FeatureMoments(1, generator=seeded())

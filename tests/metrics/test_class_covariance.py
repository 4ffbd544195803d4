"""The covariance of the gradients resolved by class, against dense matrices in parameter space."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from torch import Tensor

from spectral_callbacks.linalg import Estimate
from spectral_callbacks.metrics import outliers
from spectral_callbacks.metrics.class_covariance import ClassCovariance, class_covariance
from spectral_callbacks.metrics.covariance_spectrum import covariance_spectrum
from spectral_callbacks.metrics.gradient_noise import GradientMoments


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def of(g: Tensor, labels: Tensor, **kwargs: int) -> ClassCovariance:
    return class_covariance(g @ g.mT, labels, **kwargs)


def dense(g: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """W and B, (n, n)."""
    n = g.shape[1]
    W, B = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
    for c in labels.unique():
        own = g[labels == c]
        away = own.mean(0) - g.mean(0)
        B += len(own) / len(g) * torch.outer(away, away)
        for x in own:
            W += torch.outer(x - own.mean(0), x - own.mean(0)) / len(g)
    return W, B


LABELS = {
    "balanced": torch.arange(12) % 3,
    "unbalanced": torch.tensor([7, 7, 7, 7, 7, 7, 7, -2, -2, 3, 3, 3]),
    "a class of one": torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2]),
    "one class": torch.zeros(12, dtype=torch.int64),
    "all classes of one": torch.arange(12),
}


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("n", [5, 40])
def test_the_spectra_are_those_of_the_matrices_in_parameter_space(labels: str, n: int) -> None:
    g, y = randn(12, n) + 1, LABELS[labels]
    found = of(g, y)
    assert found.num_classes == len(y.unique())
    assert found.counts.tolist() == [(y == c).sum().item() for c in y.unique()]
    for values, matrix in zip((found.within, found.between), dense(g, y), strict=True):
        expected = torch.linalg.eigvalsh(matrix).flip(0)
        k = min(len(values), n)
        torch.testing.assert_close(values[:k], expected[:k], rtol=1e-10, atol=1e-12)
        assert values[k:].sum().item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("labels", LABELS)
def test_within_and_between_add_up_to_the_covariance(labels: str) -> None:
    g, y = randn(12, 30) + 1, LABELS[labels]
    found = of(g, y)
    whole = covariance_spectrum(g @ g.mT).sum().item()
    assert (found.within.sum() + found.between.sum()).item() == pytest.approx(whole, rel=1e-12)
    unbiased = GradientMoments.from_gram(g @ g.mT).trace().value
    if labels == "all classes of one":
        assert math.isnan(found.within_trace.value)
        assert math.isnan(found.between_trace.value)
        assert found.within_trace.error == math.inf
    else:
        assert found.within_trace.value + found.between_trace.value == pytest.approx(unbiased, rel=1e-12)


def test_the_means_of_the_classes_span_one_direction_less_than_there_are() -> None:
    y = torch.arange(60) % 6
    found = of(randn(60, 100) + 5 * randn(6, 100, seed=1)[y], y)
    assert (found.between[:5] > 1).all()
    assert found.between[5] < 1e-10


def test_classes_are_outliers_of_the_whole_spectrum_and_not_of_the_part_within() -> None:
    y = torch.arange(600) % 6
    g = randn(600, 150) + randn(6, 150, seed=1)[y]
    found = of(g, y)
    assert outliers(covariance_spectrum(g @ g.mT)[:25], size=150).count == 5
    assert outliers(found.within[:25], size=150).count == 0
    torch.testing.assert_close(covariance_spectrum(g @ g.mT)[:5], found.between[:5], rtol=0.05, atol=1.3)


@functools.cache
def planted(repetitions: int, apart: float) -> tuple[list[ClassCovariance], float, float]:
    """Draws of 64 from four classes of different size and noise; true tr W and tr B."""
    generator = torch.Generator().manual_seed(0)
    share = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    scale = torch.tensor([0.05, 0.07, 0.09, 0.11], dtype=torch.float64)
    means = apart * randn(4, 300, seed=1)
    found = []
    for _ in range(repetitions):
        y = torch.multinomial(share, 64, replacement=True, generator=generator)
        noise = torch.randn(64, 300, dtype=torch.float64, generator=generator)
        found.append(of(noise * scale[y, None] + means[y], y))
    away = means - share @ means
    return found, 300 * (share @ scale**2).item(), (share @ away.square().sum(1)).item()


@pytest.mark.parametrize("apart", [0.0, 0.15])
def test_the_traces_are_unbiased(apart: float) -> None:
    found, within, between = planted(300, apart)
    for estimates, truth in (([f.within_trace for f in found], within), ([f.between_trace for f in found], between)):
        values = torch.tensor([e.value for e in estimates], dtype=torch.float64)
        assert abs(values.mean().item() - truth) < 3 * values.std().item() / math.sqrt(300)


def test_the_errors_are_the_spread() -> None:
    found, _, _ = planted(300, 0.15)
    for estimates in ([f.within_trace for f in found], [f.between_trace for f in found]):
        values, errors = torch.tensor([(e.value, e.error) for e in estimates], dtype=torch.float64).unbind(1)
        assert errors.square().mean().sqrt().item() == pytest.approx(values.std().item(), rel=0.2)


def test_the_sample_has_less_within_and_more_between_than_the_distribution() -> None:
    found, within, between = planted(300, 0.15)
    assert sum(f.within.sum().item() for f in found) / 300 < 0.97 * within
    assert sum(f.between.sum().item() for f in found) / 300 > between


@pytest.mark.parametrize("labels", LABELS)
def test_the_whole_dataset_is_no_estimate(labels: str) -> None:
    found = of(randn(12, 5), LABELS[labels], dataset_size=12)
    assert found.within_trace == Estimate(found.within.sum().item(), 0.0, num_samples=12)
    assert found.between_trace == Estimate(found.between.sum().item(), 0.0, num_samples=12)


def test_draws_from_a_dataset_estimate_what_the_whole_dataset_has() -> None:
    y = torch.arange(60) % 3
    g = randn(60, 30) + 0.5 * randn(3, 30, seed=1)[y]
    whole = of(g, y, dataset_size=60)
    generator = torch.Generator().manual_seed(0)
    found = [
        of(g[i], y[i], dataset_size=60) for i in (torch.randperm(60, generator=generator)[:30] for _ in range(400))
    ]
    for part in ("within_trace", "between_trace"):
        values = torch.tensor([dataclasses.asdict(f)[part]["value"] for f in found], dtype=torch.float64)
        truth = dataclasses.asdict(whole)[part]["value"]
        assert abs(values.mean().item() - truth) < 3 * values.std().item() / 20
        assert truth != pytest.approx(dataclasses.asdict(of(g, y))[part]["value"], rel=0.01)


def test_labels_that_are_no_classes_of_the_samples_are_refused() -> None:
    for labels in (torch.zeros(3, dtype=torch.int64), torch.zeros(4), torch.zeros(4, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match="labels"):
            class_covariance(torch.eye(4), labels)
    with pytest.raises(ValueError, match="shape"):
        class_covariance(torch.ones(2, 3), torch.zeros(2, dtype=torch.int64))

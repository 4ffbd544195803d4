"""CKA, against the definitions with dense matrices, and its error against the jackknife and the spread over draws."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import Tensor

from spectral_callbacks.metrics.representations.cka import _overlaps, cka

FORMS = pytest.mark.parametrize("unbiased", [True, False], ids=["unbiased", "biased"])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense_hsic(K: Tensor, L: Tensor, unbiased: bool) -> Tensor:
    """As printed by Song et al. 2012, equation 5, and Gretton et al. 2005."""
    n = len(K)
    one = torch.ones(n, dtype=torch.float64)
    if not unbiased:
        H = torch.eye(n, dtype=torch.float64) - 1 / n
        return (K @ H @ L @ H).trace() / (n - 1) ** 2
    K, L = K.clone().fill_diagonal_(0), L.clone().fill_diagonal_(0)
    products = (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
    return ((K @ L).trace() + products - 2 / (n - 2) * (one @ K @ L @ one)) / (n * (n - 3))


def dense_cka(X: Tensor, Y: Tensor, unbiased: bool) -> float:
    K, L = X @ X.mT, Y @ Y.mT
    own = dense_hsic(K, K, unbiased) * dense_hsic(L, L, unbiased)
    return (dense_hsic(K, L, unbiased) / own.sqrt()).item()


def related(n: int, d: int, e: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features that share their first two, with heavy tails and means of their own."""
    X, Y = randn(n, d, seed=2 * seed), randn(n, e, seed=2 * seed + 1)
    Y[:, :2] += X[:, :2]
    return X**3 + 1, Y**3 - 2


SHAPES = pytest.mark.parametrize(
    ("n", "d", "e"), [(5, 2, 3), (12, 3, 5), (20, 60, 3), (20, 30, 40), (60, 3, 2)], ids=str
)


@FORMS
@SHAPES
def test_it_is_the_definition(n: int, d: int, e: int, unbiased: bool) -> None:
    X, Y = related(n, d, e, seed=n)
    assert cka(X, Y, unbiased=unbiased).value == pytest.approx(dense_cka(X, Y, unbiased), rel=1e-10)


@FORMS
@SHAPES
def test_the_error_is_the_jackknife(n: int, d: int, e: int, unbiased: bool) -> None:
    X, Y = related(n, d, e, seed=n)
    rest = [torch.arange(n) != i for i in range(n)]
    left = torch.tensor([dense_cka(X[some], Y[some], unbiased) for some in rest], dtype=torch.float64)
    expected = math.sqrt((n - 1) * left.var(correction=0).item())
    found = cka(X, Y, unbiased=unbiased)
    assert found.error == pytest.approx(expected, rel=1e-8)
    assert found.num_samples == n


@pytest.mark.parametrize("n", [7, 40], ids=str)
def test_both_sides_give_the_same(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    X, Y = related(n, 6, 9, seed=3)
    wide = torch.cat([X, torch.zeros(n, 500, dtype=torch.float64)], dim=1)  # the same K, by the other side
    whole = _overlaps(wide, Y)
    monkeypatch.setattr(sys.modules[cka.__module__], "_BLOCK", 3 * n)  # in blocks of three rows
    for found, blocked, expected in zip(_overlaps(X, Y), _overlaps(wide, Y), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(blocked, expected, rtol=1e-12, atol=0)


@FORMS
def test_shift_scale_and_rotation_change_nothing(unbiased: bool) -> None:
    X = randn(30, 8)
    Q = torch.linalg.qr(randn(8, 8, seed=1)).Q
    assert cka(X, 3 * X @ Q + 1, unbiased=unbiased).value == pytest.approx(1, abs=1e-12)
    Y = randn(30, 5, seed=2) + X[:, :5]
    expected = cka(X, Y, unbiased=unbiased)
    for scale in (1e-150, 1e150):
        moved = cka(scale * X @ Q, 3 * Y + 1, unbiased=unbiased)
        assert moved.value == pytest.approx(expected.value, rel=1e-10)
        assert moved.error == pytest.approx(expected.error, rel=1e-8)


@FORMS
def test_a_mean_of_100_in_float32_is_no_matter(unbiased: bool) -> None:
    X, Y = (Z.float() + 100 for Z in (randn(200, 20), randn(200, 30, seed=1)))
    centered = [Z.double() - Z.double().mean(0) for Z in (X, Y)]
    expected = dense_cka(centered[0], centered[1], unbiased)
    assert cka(X, Y, unbiased=unbiased).value == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("n", "biased", "largest"), [(64, 0.891, 0.08), (256, 0.668, 0.02), (1024, 0.333, 0.006)], ids=["64", "256", "1024"]
)
def test_independent_representations(n: int, biased: float, largest: float) -> None:
    X, Y = randn(n, 512), randn(n, 512, seed=1)
    of_pairs = cka(X, Y)
    assert cka(X, Y, unbiased=False).value == pytest.approx(biased, abs=0.005)
    assert abs(of_pairs.value) < min(3 * of_pairs.error, largest)


@FORMS
@pytest.mark.parametrize("common", ["falling", "flat", "none"])
def test_the_error_is_the_spread(common: str, unbiased: bool) -> None:
    def draw(seed: int) -> tuple[Tensor, Tensor]:
        X, Y = randn(80, 12, seed=2 * seed), randn(80, 12, seed=2 * seed + 1)
        if common == "none":
            return X, Y
        weights = torch.arange(1, 13, dtype=torch.float64) ** (-1.0 if common == "falling" else 0.0)
        return X * weights, (X + Y) * weights

    found = [cka(*draw(seed), unbiased=unbiased) for seed in range(200)]
    values, errors = torch.tensor([(f.value, f.error) for f in found], dtype=torch.float64).unbind(1)
    ratio = (errors.square().mean().sqrt() / values.std()).item()
    # What is of second order in the samples counts twice.
    low, high = {"falling": (0.88, 1.12), "flat": (1.0, 1.35), "none": (1.2, 1.75)}[common]
    assert low < ratio < high
    if unbiased and common == "none":
        assert abs(values.mean().item()) < 3 * values.std().item() / math.sqrt(len(values))


def test_four_samples_have_a_value_and_no_error() -> None:
    found = cka(randn(4, 3), randn(4, 2, seed=1))
    assert abs(found.value) <= 1
    assert found.error == math.inf


def test_one_sample_that_decides_has_no_error() -> None:
    X, Y = randn(20, 3), randn(20, 3, seed=1)
    X[7] *= 1e4
    assert cka(X, Y).error == math.inf
    assert cka(Y, X).error == math.inf


def test_bad_input_is_refused() -> None:
    X = randn(8, 3)
    broken = X.clone()
    broken[3, 1] = math.nan
    with pytest.raises(ValueError, match="X has 8 samples, Y 7"):
        cka(X, X[1:])
    with pytest.raises(ValueError, match="X holds n=3 samples; at least 4"):
        cka(X[:3], X[:3])
    with pytest.raises(ValueError, match="Y has entries that are not finite"):
        cka(X, broken)
    with pytest.raises(ValueError, match="X is constant"):
        cka(torch.full((8, 3), 0.1), X)
    with pytest.raises(ValueError, match=r"Y has shape \(8,\)"):
        cka(X, X[:, 0])
    with pytest.raises(ValueError, match=r"X has shape \(8, 0\)"):
        cka(X[:, :0], X)
    with pytest.raises(ValueError, match=r"type torch\.int64"):
        cka(torch.eye(8, dtype=torch.int64), X)


def test_samples_that_are_equally_far_apart_have_no_unbiased_form() -> None:
    one_hot = 5 * torch.eye(8)
    with pytest.raises(ValueError, match="Y: all 8 samples are equally far apart"):
        cka(randn(8, 3), one_hot)
    assert 0 < cka(randn(8, 3), one_hot, unbiased=False).value < 1

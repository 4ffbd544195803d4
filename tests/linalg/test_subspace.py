from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spectral_callbacks.linalg import Matrix
from spectral_callbacks.linalg.subspace import (
    Complement,
    Normalized,
    dimension,
    orthonormalize,
    rademacher,
    whole_space,
)
from tests.problems import SPECTRA, Diagonal, Scaled, symmetric

SCALE = torch.linspace(1.0, 4.0, 65, dtype=torch.float64)  # the first is 1: one row, one unit of dimension


def _defects(Y: Tensor, Q: Tensor, R: Tensor, M: Tensor) -> tuple[float, float]:
    orthonormal = (Q.mT @ M @ Q - torch.eye(Q.shape[1], dtype=Q.dtype)).abs().max().item()
    return orthonormal, ((Y - Q @ R.to(Q)).abs().max() / Y.abs().max()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [1.0, 0.1])
def test_columns_of_any_size_become_orthonormal(dtype: torch.dtype, decay: float, generator: torch.Generator) -> None:
    """Decay 0.1 spans more digits than a Gram matrix of all columns could hold."""
    n, k = 65, 6
    Y = torch.randn(n, k, dtype=dtype, generator=generator) * decay ** torch.arange(k)
    for operator in (Matrix(torch.eye(n, dtype=dtype)), Scaled(torch.eye(n, dtype=dtype), SCALE.to(dtype))):
        Q, R = orthonormalize(operator, Y)
        M = operator.gram(torch.eye(n, dtype=dtype), torch.eye(n, dtype=dtype))
        assert R.shape == (k, k)
        assert torch.equal(R, R.triu())
        assert max(_defects(Y, Q, R, M)) <= 20 * torch.finfo(dtype).eps


def test_columns_that_repeat_others_add_nothing(generator: torch.Generator) -> None:
    Y = torch.randn(40, 3, dtype=torch.float64, generator=generator)
    Y = torch.cat([Y, Y @ torch.ones(3, 2, dtype=torch.float64), torch.zeros(40, 1, dtype=torch.float64)], dim=1)
    Q, R = orthonormalize(Matrix(torch.eye(40, dtype=torch.float64)), Y)
    assert R.shape == (3, 6)
    assert max(_defects(Y, Q, R, torch.eye(40, dtype=torch.float64))) <= 1e-14


def test_a_basis_of_the_whole_space_spans_it(generator: torch.Generator) -> None:
    A = Scaled(symmetric(SPECTRA["graded"]), SCALE[:60])
    assert dimension(A) == 60
    Q = whole_space(A, generator)
    torch.testing.assert_close(A.gram(Q, Q), torch.eye(60, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_complement_is_the_operator_between_projections(generator: torch.Generator) -> None:
    A = symmetric(SPECTRA["indefinite"])
    X = orthonormalize(Matrix(A), torch.randn(len(A), 3, dtype=torch.float64, generator=generator))[0]
    P = torch.eye(len(A), dtype=torch.float64) - X @ X.mT
    torch.testing.assert_close(Complement(Matrix(A), X).to_dense(), P @ A @ P)


@pytest.mark.parametrize("exponent", [-100, 0, 100])
def test_a_normalized_operator_is_the_same_in_any_unit(exponent: int, generator: torch.Generator) -> None:
    A = symmetric(SPECTRA["graded"]).float()
    X = torch.randn(len(A), 3, generator=generator)
    for operator in (Matrix(2.0**exponent * A), Scaled(2.0**exponent * A, SCALE[:60].float())):
        normalized = Normalized(operator)
        first, second = normalized.matmat(X), normalized.matmat(2 * X)
        assert math.log2(normalized.unit).is_integer()
        assert 1e-3 < operator.gram(first, first).trace() < 1e3
        assert torch.equal(second, 2 * first)
        assert torch.equal(first * normalized.unit, operator.matmat(X))


def test_zero_is_its_own_normalization(generator: torch.Generator) -> None:
    normalized = Normalized(Diagonal(torch.zeros(5)))
    assert not normalized.matmat(torch.randn(5, 2, generator=generator)).any()
    assert normalized.unit == 1.0


def test_signs_are_balanced_and_independent(generator: torch.Generator) -> None:
    Z = rademacher(Diagonal(torch.ones(10_000)), 4, generator)
    assert torch.equal(Z.abs(), torch.ones_like(Z))
    overlaps = Z.mT @ Z / 100 - 100 * torch.eye(4)
    assert (overlaps.abs() < 4).all()
    assert (Z.sum(0).abs() / 100 < 4).all()

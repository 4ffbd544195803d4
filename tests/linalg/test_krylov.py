from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectral_callbacks.linalg import Matrix
from spectral_callbacks.linalg.krylov import Krylov
from tests.problems import SPECTRA, Counting, Scaled, symmetric


def _identity(krylov: Krylov) -> Tensor:
    return torch.eye(krylov.dimension, dtype=torch.float64)


def _broken_laws(krylov: Krylov, A: Tensor, weight: Tensor | None = None) -> list[str]:
    """Of A Q = V H: Q orthonormal in the inner product, QᵀA Q the projection, and the rest as long as it says."""
    tolerance = 1e-11 * A.abs().max().item()
    M = torch.eye(len(A), dtype=torch.float64) if weight is None else torch.diag(weight)
    Q = krylov.vectors(_identity(krylov))
    T = krylov.projection
    rest = A @ Q - Q @ T
    coupling = krylov.coupling(_identity(krylov))
    laws = {
        "orthonormal": (Q.mT @ M @ Q - _identity(krylov), 1e-12),
        "projection": (Q.mT @ M @ A @ Q - T, tolerance),
        "rest outside": (Q.mT @ M @ rest, tolerance),
        "coupling": (rest.mT @ M @ rest - coupling.mT @ coupling, tolerance),
        "residuals": ((M @ rest**2).sum(0) - krylov.residuals(_identity(krylov)) ** 2, tolerance),
    }
    return [law for law, (defect, limit) in laws.items() if not (defect.abs() <= limit).all()]


@pytest.mark.parametrize("name", SPECTRA)
def test_a_lanczos_basis_satisfies_AQ_equals_VH(name: str) -> None:  # noqa: N802
    A = symmetric(SPECTRA[name])
    krylov = Krylov(Matrix(A))
    krylov.add(torch.randn(len(A), dtype=torch.float64))
    for step in range(1, 30):
        if not krylov.num_directions:
            break
        krylov.expand()
        assert krylov.dimension == krylov.num_matvecs == step
        assert not _broken_laws(krylov, A)


def test_directions_may_be_added_multiplied_and_compressed_in_any_order() -> None:
    A = symmetric(SPECTRA["indefinite"])
    krylov = Krylov(Matrix(A))
    draws = torch.Generator().manual_seed(1)
    for round_ in range(4):
        for _ in range(3):
            assert krylov.add(torch.randn(len(A), dtype=torch.float64, generator=draws))
        for _ in range(6):
            krylov.expand(torch.randn(krylov.num_directions, dtype=torch.float64, generator=draws))
            assert not _broken_laws(krylov, A)
        values, S = torch.linalg.eigh(krylov.projection)
        kept = values.abs().argsort(descending=True)[: 4 + round_]
        directions = krylov.num_directions
        krylov.compress(S[:, kept], values[kept])
        assert krylov.dimension == 4 + round_
        assert krylov.num_directions == directions
        assert not _broken_laws(krylov, A)
    assert krylov.num_matvecs == 24


def test_the_laws_hold_in_the_inner_product_of_gram() -> None:
    scale = torch.linspace(0.1, 4.0, 66, dtype=torch.float64)
    A = Scaled(symmetric(SPECTRA["repeated"]), torch.cat([scale, torch.ones(3).double()]))
    krylov = Krylov(A)
    for _ in range(2):
        krylov.add(torch.randn(69, dtype=torch.float64))
    for _ in range(20):
        krylov.expand()
    weight = torch.cat([scale, torch.ones(3).double()]).square()
    assert not _broken_laws(krylov, A.to_dense(), weight)
    assert "orthonormal" in _broken_laws(krylov, A.to_dense())


def test_the_laws_see_a_planted_error() -> None:
    A = symmetric(SPECTRA["indefinite"])
    krylov = Krylov(Matrix(A))
    krylov.add(torch.randn(len(A), dtype=torch.float64))
    for _ in range(5):
        krylov.expand()
    assert not _broken_laws(krylov, A)
    assert set(_broken_laws(krylov, A + 1e-6)) == {"projection", "rest outside", "coupling", "residuals"}


def test_what_lies_in_the_basis_adds_no_direction() -> None:
    A = symmetric(SPECTRA["positive"])
    krylov = Krylov(Matrix(A))
    x, y = torch.randn(2, len(A), dtype=torch.float64)
    assert krylov.add(x)
    assert krylov.add(y)
    for repeated in (x, -3 * x, x - 2 * y, x + 1e-10 * y, 0 * x, torch.full_like(x, torch.nan)):
        assert not krylov.add(repeated)
    assert krylov.num_directions == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_invariant_subspace_closes(dtype: torch.dtype) -> None:
    A = Counting(Matrix(symmetric(torch.tensor([2.0, 1.0] + [0.0] * 30)).to(dtype)))
    krylov = Krylov(A)
    krylov.add(torch.randn(32, dtype=dtype))
    for _ in range(3):
        assert krylov.num_directions == 1
        krylov.expand()
    assert krylov.num_directions == 0
    assert A.num_matvecs == 3
    torch.testing.assert_close(
        torch.linalg.eigvalsh(krylov.projection), torch.tensor([0.0, 1.0, 2.0]).double(), rtol=1e-5, atol=1e-5
    )


def test_asymmetry_is_rounding_for_a_symmetric_matrix_and_large_for_another() -> None:
    A = symmetric(SPECTRA["indefinite"])
    asymmetries = []
    for matrix in (A, A + 0.5 * torch.randn(A.shape, dtype=torch.float64)):
        krylov = Krylov(Matrix(matrix))
        krylov.add(torch.ones(len(A), dtype=torch.float64))
        for _ in range(6):
            krylov.expand()
        asymmetries.append(krylov.asymmetry)
    assert asymmetries[0] < 1e-12
    assert asymmetries[1] > 0.05


def test_a_product_that_is_not_finite_is_remembered() -> None:
    krylov = Krylov(Matrix(torch.tensor([[torch.nan, 0.0], [0.0, 1.0]])))
    krylov.add(torch.ones(2))
    assert krylov.finite
    krylov.expand()
    assert not krylov.finite
    assert krylov.num_matvecs == 1

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spectral_callbacks.linalg import Matrix, Status, eigsh
from tests import oracles, problems


@pytest.mark.parametrize("name", problems.SPECTRA)
def test_a_symmetric_matrix_has_the_spectrum_prescribed(name: str) -> None:
    spectrum = problems.SPECTRA[name]
    A = problems.symmetric(spectrum)
    assert torch.equal(A, A.mT)
    torch.testing.assert_close(
        torch.linalg.eigvalsh(A).flip(0), spectrum, rtol=0, atol=1e-13 * spectrum.abs().max().item()
    )


def test_the_spectra_are_what_their_names_say() -> None:
    spectra = problems.SPECTRA
    assert spectra["indefinite"].abs().argmax() == len(spectra["indefinite"]) - 1
    assert spectra["indefinite"][0] > 0
    assert (spectra["repeated"] == spectra["repeated"][0]).sum() == 3
    assert 0 < spectra["clustered"][0] - spectra["clustered"][2] < 1e-5
    assert (spectra["rank deficient"] == 0).sum() > len(spectra["rank deficient"]) / 2
    assert spectra["graded"][0] / spectra["graded"][-1] > 1e7
    assert spectra["negative"].max() < 0


def test_a_counting_operator_counts_columns() -> None:
    A = problems.Counting(problems.Diagonal(torch.arange(3.0)))
    A.matmat(torch.ones(3, 2))
    A.matmat(torch.ones(3, 1))
    assert A.num_matvecs == 3


def test_a_scaled_operator_has_the_eigenvalues_of_the_matrix_it_scales() -> None:
    A = problems.symmetric(problems.SPECTRA["indefinite"])
    scaled = problems.Scaled(A, torch.linspace(0.1, 5.0, len(A), dtype=torch.float64))
    eigenvalues = torch.linalg.eigvals(scaled.to_dense()).real.sort(descending=True).values
    torch.testing.assert_close(eigenvalues, problems.SPECTRA["indefinite"], rtol=0, atol=1e-10)
    X = torch.randn(len(A), 3, dtype=torch.float64)
    torch.testing.assert_close(scaled.gram(X, scaled.matmat(X)), scaled.gram(scaled.matmat(X), X))


def test_a_scaled_operator_exposes_inner_products_outside_gram(generator: torch.Generator) -> None:
    """Taken with the plain inner product, as a stray norm would, it is seen to be no symmetric operator."""
    A = problems.symmetric(problems.SPECTRA["indefinite"])
    scaled = problems.Scaled(A, torch.linspace(0.1, 5.0, len(A), dtype=torch.float64))
    assert eigsh(Matrix(scaled.to_dense()), generator=generator).status is Status.BREAKDOWN


def test_closed_forms_are_the_second_derivatives() -> None:
    X = torch.randn(7, 3, dtype=torch.float64)

    quadratic = problems.Quadratic(problems.symmetric(problems.SPECTRA["indefinite"]))
    torch.testing.assert_close(oracles.dense_hessian(quadratic, [quadratic.w]), quadratic.A)

    W, Y = torch.randn(2, 3, dtype=torch.float64, requires_grad=True), torch.randn(7, 2, dtype=torch.float64)
    H = oracles.dense_hessian(lambda: (X @ W.mT - Y).square().sum(dim=1).mean(), [W])
    torch.testing.assert_close(problems.linear_regression_hessian(X, 2), H)

    w, y = torch.randn(3, dtype=torch.float64, requires_grad=True), torch.randint(0, 2, (7,)).double()
    H = oracles.dense_hessian(lambda: F.binary_cross_entropy_with_logits(X @ w, y), [w])
    torch.testing.assert_close(problems.logistic_regression_hessian(X, w.detach()), H)

    a, b = nn.Parameter(torch.tensor(2.0).double()), nn.Parameter(torch.tensor(-0.5).double())
    H = oracles.dense_hessian(lambda: (a * b - 3).square() / 2, [a, b])
    torch.testing.assert_close(problems.deep_linear_hessian(2.0, -0.5, 3.0), H)

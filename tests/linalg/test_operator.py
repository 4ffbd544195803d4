from __future__ import annotations

import pytest
import torch

from spectral_callbacks.linalg import LinearOperator, Matrix


def test_a_matrix_is_the_operator_of_its_products() -> None:
    B = torch.randn(4, 3)
    A = Matrix(B)
    assert A.shape == (4, 3)
    assert torch.equal(A.to_dense(), B)
    assert torch.equal(A.matmat(torch.ones(3, 2)), B @ torch.ones(3, 2))


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.ones(3), r"matrix has shape \(3,\) and dtype torch\.float32; pass a real 2-D tensor\."),
        (torch.ones(2, 2, dtype=torch.complex64), r"matrix has shape \(2, 2\) and dtype torch\.complex64; pass a real"),
    ],
)
def test_what_is_no_real_matrix_is_refused(matrix: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Matrix(matrix)


def test_inner_products_are_those_of_the_columns() -> None:
    X, Y = torch.randn(5, 2), torch.randn(5, 3)
    gram = Matrix(torch.eye(5)).gram(X, Y)
    expected = torch.stack([torch.stack([x @ y for y in Y.unbind(1)]) for x in X.unbind(1)])
    torch.testing.assert_close(gram, expected)


def test_an_operator_without_products_is_none() -> None:
    with pytest.raises(TypeError, match="abstract"):
        LinearOperator()  # pyright: ignore[reportAbstractUsage]

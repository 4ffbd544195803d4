from __future__ import annotations

import importlib

import numpy as np
import pytest
import scipy.fft
import torch
from torch import Tensor

from spectral_callbacks.linalg import dct, dct_basis, inverse_dct

WIDTHS = (1, 2, 3, 4, 7, 8, 64, 129, 512, 513)
FFT_ALWAYS, FFT_NEVER = 1, 10**9
file = importlib.import_module("spectral_callbacks.linalg.dct")


@pytest.fixture(params=[FFT_ALWAYS, FFT_NEVER], ids=["fft", "product"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "_MIN_FFT", request.param)


def _rows(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


def _scipy(X: Tensor) -> Tensor:
    return torch.from_numpy(np.asarray(scipy.fft.dct(X.double().numpy(), type=2, norm="ortho")))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("n", WIDTHS)
def test_it_is_scipys_orthonormal_transform_of_type_two(n: int) -> None:
    X = _rows(5, n)
    torch.testing.assert_close(dct(X), _scipy(X), rtol=0, atol=1e-14)
    torch.testing.assert_close(X @ dct_basis(n, torch.float64), _scipy(X), rtol=0, atol=1e-14)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("n", WIDTHS)
def test_the_inverse_undoes_it_and_is_its_adjoint(n: int) -> None:
    X, Y = _rows(5, n), _rows(6, n)[:5]
    torch.testing.assert_close(inverse_dct(dct(X)), X, rtol=0, atol=1e-14)
    torch.testing.assert_close((dct(X) * Y).sum(), (X * inverse_dct(Y)).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("n", WIDTHS)
def test_it_keeps_the_norm_of_every_row(n: int) -> None:
    X = _rows(5, n)
    torch.testing.assert_close(dct(X).norm(dim=1), X.norm(dim=1), rtol=1e-14, atol=0)


@pytest.mark.parametrize("rows", [0, 1, 127, 128, 129, 300])
def test_blocks_of_rows_leave_no_seam(rows: int) -> None:
    X = _rows(rows, 600)
    torch.testing.assert_close(dct(X), _scipy(X), rtol=0, atol=1e-13)
    torch.testing.assert_close(inverse_dct(dct(X)), X, rtol=0, atol=1e-13)


@pytest.mark.usefixtures("path")
def test_columns_of_a_wide_matrix_are_rows_of_its_transpose() -> None:
    X = _rows(40, 300)
    torch.testing.assert_close(dct(X.t()), _scipy(X.t().contiguous()), rtol=0, atol=1e-13)
    torch.testing.assert_close(inverse_dct(dct(X.t())), X.t(), rtol=0, atol=1e-13)


@pytest.mark.usefixtures("path")
def test_leading_dimensions_are_kept() -> None:
    X = _rows(2, 3, 9)
    torch.testing.assert_close(dct(X), _scipy(X), rtol=0, atol=1e-14)
    torch.testing.assert_close(dct(X[0, 0]), _scipy(X)[0, 0], rtol=0, atol=1e-14)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(("dtype", "atol"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3), (torch.float32, 2e-6)])
def test_half_types_lose_only_their_own_rounding(dtype: torch.dtype, atol: float) -> None:
    X = _rows(5, 64, dtype=dtype)
    assert dct(X).dtype == dtype
    torch.testing.assert_close(dct(X).double(), _scipy(X), rtol=0, atol=atol)
    torch.testing.assert_close(dct(X).double(), dct(X.float()).to(dtype).double(), rtol=0, atol=0)


def test_the_basis_is_orthonormal_to_the_last_digits_in_every_precision() -> None:
    for dtype, atol in ((torch.float64, 1e-14), (torch.float32, 3e-7)):
        Q = dct_basis(768, dtype)
        torch.testing.assert_close((Q.mT.double() @ Q.double()), torch.eye(768).double(), rtol=0, atol=atol)


def test_two_widths_have_each_their_own_basis_and_one_width_has_one() -> None:
    assert dct_basis(16).shape == (16, 16)
    assert dct_basis(24).shape == (24, 24)
    assert dct_basis(16) is dct_basis(16)


@pytest.mark.usefixtures("path")
def test_gradients_flow_through_it() -> None:
    X = _rows(3, 8).requires_grad_()
    assert torch.autograd.gradcheck(dct, (X,))
    assert torch.autograd.gradcheck(inverse_dct, (X,))


@pytest.mark.usefixtures("path")
def test_what_is_cached_in_inference_serves_training() -> None:
    with torch.inference_mode():
        dct(_rows(2, 37))
    X = _rows(2, 37).requires_grad_()
    dct(X).square().sum().backward()
    torch.testing.assert_close(X.grad, 2 * X.detach(), rtol=1e-12, atol=1e-12)

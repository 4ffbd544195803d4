"""What one step did, against dense float64 arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from spectral_callbacks.metrics import Update
from spectral_callbacks.metrics.update import update_products


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.complex64, torch.complex128]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_numbers_are_those_of_real_vectors_in_double_precision(dtype: torch.dtype) -> None:
    w, g = random(4, 5, seed=0, dtype=dtype), random(4, 5, seed=1, dtype=dtype)
    u = w - 0.01 * g - 0.003 * random(4, 5, seed=2, dtype=dtype)
    found = Update.of(w, u, g)
    if dtype.is_complex:
        w, u, g = (torch.view_as_real(t) for t in (w, u, g))
    w, u, g = (t.double().flatten() for t in (w, u, g))
    step = u - w
    assert found.norm == pytest.approx(step.norm().item(), rel=1e-12)
    assert found.to_weight == pytest.approx((step.norm() / w.norm()).item(), rel=1e-12)
    assert found.effective_lr == pytest.approx((step.norm() / g.norm()).item(), rel=1e-12)
    assert found.gradient_cosine == pytest.approx(torch.cosine_similarity(step, -g, dim=0).item(), rel=1e-9)


def test_steepest_descent_has_cosine_one_and_ascent_minus_one() -> None:
    w, g = random(7, seed=0), random(7, seed=1)
    assert Update.of(w, w - 0.1 * g, g).gradient_cosine == pytest.approx(1)
    assert Update.of(w, w + 0.1 * g, g).gradient_cosine == pytest.approx(-1)
    assert Update.of(w, w + 0.1 * g, g, maximize=True).gradient_cosine == pytest.approx(1)


def test_the_update_of_several_tensors_is_that_of_their_entries_in_a_row() -> None:
    w, g = random(9, seed=0), random(9, seed=1)
    u = w - 0.1 * g.sign()
    parts = [Update.of(w[part], u[part], g[part]) for part in (slice(0, 4), slice(4, 9))]
    whole, joined = Update.of(w, u, g), parts[0] + parts[1]
    for name in ("step", "weight", "gradient", "descent"):
        assert getattr(joined, name) == pytest.approx(getattr(whole, name), rel=1e-12)


def test_large_tensors_are_summed_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    w, g = random(10, 3, seed=0), random(10, 3, seed=1)
    whole = update_products(w, w - g, g)
    monkeypatch.setattr("spectral_callbacks.metrics.update._BLOCK", 7)
    torch.testing.assert_close(update_products(w, w - g, g), whole)


def test_sparse_and_transposed_gradients_are_read_in_the_order_of_the_weights() -> None:
    w, g = random(4, 3, seed=0), random(4, 3, seed=1)
    dense = update_products(w, w - g, g)
    torch.testing.assert_close(update_products(w, w - g, g.to_sparse()), dense)
    torch.testing.assert_close(update_products(w, w - g, g.T.contiguous().T), dense)


def test_gradients_whose_squares_vanish_in_single_precision_have_a_norm() -> None:
    w, g = torch.zeros(3), torch.full((3,), 1e-30)
    assert Update.of(w, w - g, g).effective_lr == pytest.approx(1)


def test_sharded_parameters_are_seen_whole() -> None:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        w, g = random(4, 3, seed=0), random(4, 3, seed=1)
        sharded = [distribute_tensor(t, mesh, [Shard(0)]) for t in (w, w - g, g)]
        torch.testing.assert_close(update_products(*sharded), update_products(w, w - g, g))
    finally:
        distributed.destroy_process_group()


def test_what_is_divided_by_zero_is_none() -> None:
    zero, one = torch.zeros(2), torch.ones(2)
    still = Update.of(zero, zero, zero)
    assert (still.to_weight, still.gradient_cosine, still.effective_lr) == (None, None, None)
    assert Update.of(one, one, one).gradient_cosine is None
    assert Update.of(one, 2 * one, zero).effective_lr is None


def test_a_step_is_skipped_if_nothing_moved_under_a_gradient_that_overflowed() -> None:
    one = torch.ones(2)
    assert Update.of(one, one, one / 0).was_skipped
    assert not Update.of(one, one, one).was_skipped
    assert not Update.of(one, one * math.nan, one / 0).was_skipped
    assert not Update.of(one, one, one / 0).is_finite

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectral_callbacks.optim.error_feedback import ERROR_FEEDBACKS, quantize
from spectral_callbacks.optim.lines import Lines


def _uniform(*shape: int) -> Tensor:
    return 2 * torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 1


def _relative_error(X: Tensor) -> float:
    levels, scales = quantize(X)
    return float((levels * scales - X).norm() / X.norm())


def test_the_round_trip_loses_what_255_levels_must() -> None:
    """Even rounding of a uniform number over 127 levels a side: a step / √12, relative to 1 / √3."""
    assert _relative_error(_uniform(64, 512)) == pytest.approx(1 / 254, rel=0.02)


def test_no_entry_is_off_by_more_than_half_a_step_of_its_own_line() -> None:
    X = _uniform(16, 64) * torch.logspace(-6, 6, 16, dtype=torch.float64)[:, None]
    levels, scales = quantize(X)
    assert levels.dtype == torch.int8
    assert scales.shape == (16, 1)
    assert bool(((levels * scales - X).abs() <= X.abs().amax(dim=1, keepdim=True) / 254 * (1 + 1e-12)).all())


def test_it_is_symmetric_and_reaches_the_largest_entry_on_either_side() -> None:
    X = _uniform(8, 32)
    assert torch.equal(quantize(-X)[0], -quantize(X)[0])
    assert torch.equal(quantize(X)[0].abs().amax(dim=1), torch.full((8,), 127, dtype=torch.int8))


def test_halves_are_rounded_without_a_bias() -> None:
    halves = torch.cat([torch.tensor([127.0]), torch.arange(-100, 100) + 0.5]).double()[None]
    levels, _ = quantize(halves)
    assert float((levels.double() - halves)[0, 1:].mean()) == 0


def test_lines_of_zeros_and_of_tiny_numbers_stay_finite() -> None:
    levels, scales = quantize(torch.tensor([[0.0, 0.0], [1e-44, 0.0], [1e38, -3e38]]))
    assert torch.isfinite(levels * scales).all()
    assert torch.equal(levels[0], torch.zeros(2, dtype=torch.int8))


@pytest.mark.parametrize(("name", "bytes_an_entry"), [("none", 0), ("full", 4), ("8bit", 1)])
def test_what_is_kept_comes_back_and_costs_what_is_said(name: str, bytes_an_entry: int) -> None:
    lines = Lines(torch.zeros(256, 64))
    feedback = ERROR_FEEDBACKS[name]
    state = feedback.empty(lines, torch.float32)
    size = sum(value.nbytes for value in state.values())
    assert bytes_an_entry * 256 * 64 <= size <= (bytes_an_entry + 0.1 * bool(state)) * 256 * 64
    if name == "none":
        assert feedback.recall(state) is None
        return
    recalled = feedback.recall(state)
    assert recalled is not None
    assert not recalled.any()
    error = _uniform(256, 64).float()
    feedback.keep(state, error)
    torch.testing.assert_close(feedback.recall(state), error, rtol=0, atol=0 if name == "full" else 1 / 250)

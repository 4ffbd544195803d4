from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from spectral_callbacks.probe.randomness import RandomState, seed_generators


def draw() -> tuple[list[float], ...]:
    """Draw from every global generator, normals included: numpy and `random` keep every second one for later."""
    return (
        torch.rand(3).tolist(),
        torch.randn(3).tolist(),
        np.random.rand(3).tolist(),
        np.random.standard_normal(1).tolist(),
        [random.random(), random.gauss(0, 1)],
    )


@pytest.mark.parametrize("num_normals_before", [0, 1])
def test_restoring_repeats_every_stream_half_used_normals_included(num_normals_before: int) -> None:
    for _ in range(num_normals_before):
        np.random.standard_normal()
        random.gauss(0, 1)
    state = RandomState.capture()
    expected = draw()
    draw()
    state.restore()
    assert draw() == expected


def test_a_state_can_be_restored_again_and_again() -> None:
    state = RandomState.capture()
    expected = draw()
    for _ in range(3):
        state.restore()
        assert draw() == expected


def test_capturing_moves_no_stream() -> None:
    seed_generators(5)
    expected = draw()
    seed_generators(5)
    RandomState.capture()
    assert draw() == expected


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 7, 2**63 - 1])
def test_equal_seeds_give_equal_streams(seed: int) -> None:
    seed_generators(seed)
    expected = draw()
    draw()
    seed_generators(seed)
    assert draw() == expected


def test_different_seeds_give_different_streams() -> None:
    seed_generators(0)
    first = draw()
    seed_generators(1)
    assert all(a != b for a, b in zip(first, draw(), strict=True))


def pending_seeds() -> list[object]:
    """Return what torch will do once CUDA is used for the first time."""
    return [*torch.cuda._queued_calls, *torch.cuda._lazy_seed_tracker.get_calls()]


@pytest.fixture
def unused_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_initialized():
        pytest.skip("CUDA is in use already")
    monkeypatch.setattr(torch.cuda, "_lazy_seed_tracker", torch.cuda._LazySeedTracker())


@pytest.mark.usefixtures("unused_cuda")
def test_cuda_is_neither_initialised_nor_left_a_seed_for_later() -> None:
    pending = pending_seeds()
    state = RandomState.capture()
    seed_generators(3)
    state.restore()
    assert not torch.cuda.is_initialized()
    assert pending_seeds() == pending


@pytest.mark.usefixtures("unused_cuda")
def test_the_seed_that_torch_would_leave_is_seen() -> None:
    pending = pending_seeds()
    state = RandomState.capture()
    torch.manual_seed(3)
    state.restore()
    assert pending_seeds() != pending

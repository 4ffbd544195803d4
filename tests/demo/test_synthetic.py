"""What the demo's synthetic data share."""

from __future__ import annotations

import pytest
import torch

from spectral_callbacks.demo.synthetic import WholeBatch, data_generator


def numbers(generator: torch.Generator) -> list[float]:
    return torch.rand(1000, dtype=torch.float64, generator=generator).tolist()


def test_data_share_no_number_with_a_model_of_the_same_seed() -> None:
    """Not even shifted; a CPU generator drops the upper half of a seed, so that far apart is not enough."""
    for seed in (0, 1, 12345):
        assert not set(numbers(data_generator(seed))) & set(numbers(torch.Generator().manual_seed(seed)))


def test_data_are_fixed_by_their_seed() -> None:
    assert numbers(data_generator(3)) == numbers(data_generator(3)) != numbers(data_generator(4))


def test_an_epoch_is_the_whole_batch_so_many_times_and_draws_no_global_number() -> None:
    x, y = torch.arange(6.0).view(3, 2), torch.arange(3)
    state = torch.get_rng_state()
    batches = list(WholeBatch(x, y, steps_per_epoch=4).loader())
    torch.testing.assert_close(torch.get_rng_state(), state, rtol=0, atol=0)
    assert len(batches) == 4
    assert all(torch.equal(batch[0], x) and torch.equal(batch[1], y) for batch in batches)


def test_an_epoch_without_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match=r"steps_per_epoch=0 must be at least 1"):
        WholeBatch(torch.zeros(1), torch.zeros(1), steps_per_epoch=0)

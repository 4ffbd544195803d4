"""The demo's regression problem."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spectral_callbacks.demo.regression import RegressionDataModule, Regressor


def batches(data: RegressionDataModule) -> list[list[Tensor]]:
    data.setup("fit")
    return [list(batch) for batch in data.train_dataloader()]


def test_targets_are_the_sine_of_the_first_input_and_half_the_second() -> None:
    ((x, y),) = batches(RegressionDataModule(batch_size=0))
    assert (x.shape, y.shape, x.dtype, y.dtype) == ((20, 5), (20,), torch.float64, torch.float64)
    expected = [math.sin(row[0]) + 0.5 * row[1] for row in x.tolist()]
    torch.testing.assert_close(y, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-14)


def test_inputs_are_gaussian() -> None:
    ((x, _),) = batches(RegressionDataModule(batch_size=0, num_samples=4000))
    assert x.mean(0).abs().max() < 4 / 4000**0.5
    assert (x.var(0) - 1).abs().max() < 4 * (2 / 4000) ** 0.5
    assert x.square().square().mean().item() == pytest.approx(3, abs=4 * (96 / 20000) ** 0.5)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_batches_are_a_permutation_of_the_full_batch(batch_size: int) -> None:
    ((x, _),) = batches(RegressionDataModule(batch_size=0))
    pieces = torch.cat([x for x, _ in batches(RegressionDataModule(batch_size=batch_size))])
    assert not torch.equal(pieces, x)
    assert sorted(map(tuple, pieces.tolist())) == sorted(map(tuple, x.tolist()))


def test_samples_are_fixed_by_the_seed_whatever_the_global_state_and_leave_it_alone() -> None:
    state = torch.get_rng_state()
    first = batches(RegressionDataModule(batch_size=4, seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(3)
    torch.testing.assert_close(batches(RegressionDataModule(batch_size=4, seed=1)), first, rtol=0, atol=0)
    assert not torch.equal(batches(RegressionDataModule(batch_size=4, seed=2))[0][0], first[0][0])


def test_validation_shares_no_sample_with_training() -> None:
    data = RegressionDataModule(batch_size=0)
    ((x, _),) = batches(data)
    ((others, _),) = list(data.val_dataloader())
    assert others.shape == (20, 5)
    assert not set(map(tuple, x.tolist())) & set(map(tuple, others.tolist()))


def test_the_network_has_one_hidden_layer_of_tanh_units_with_torchs_own_initial_weights() -> None:
    model = Regressor()
    assert [type(layer) for layer in model.net] == [torch.nn.Linear, torch.nn.Tanh, torch.nn.Linear]
    assert [tuple(p.shape) for p in model.parameters()] == [(30, 5), (30,), (1, 30), (1,)]
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    torch.manual_seed(3)
    expected = torch.nn.Sequential(torch.nn.Linear(5, 30), torch.nn.Tanh(), torch.nn.Linear(30, 1)).double()
    torch.manual_seed(3)
    for found, wanted in zip(Regressor().net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log..` but the `self.trainer` reference:UserWarning")
def test_the_loss_is_half_the_mean_squared_error() -> None:
    model = Regressor(width=4)
    x = torch.randn(6, 5, dtype=torch.float64)
    y = torch.randn(6, dtype=torch.float64)
    expected = sum((f - t) ** 2 / 2 for f, t in zip(model(x).tolist(), y.tolist(), strict=True)) / 6
    assert model.training_step((x, y), 0).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("wrong", [{"num_samples": 0}, {"num_inputs": 1}])
def test_a_problem_without_samples_or_a_second_input_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"must be at least 1, and num_inputs=\d+ at least 2"):
        RegressionDataModule(**wrong)


@pytest.mark.parametrize("batch_size", [-1, 21])
def test_a_batch_size_out_of_range_is_refused(batch_size: int) -> None:
    with pytest.raises(ValueError, match=rf"batch_size={batch_size} must lie between 1 and num_samples=20"):
        RegressionDataModule(batch_size=batch_size)

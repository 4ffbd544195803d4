"""Over-parameterised matrix sensing converges as the theory says, and one step mends it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from spectral_callbacks.callbacks import FactorImbalance
from spectral_callbacks.demo import LowRankDataModule, MatrixSensing
from spectral_callbacks.init import rebalance_layers_
from tests.callbacks.runs import fit, series

ETA = 0.2


def problem(**options: Any) -> tuple[Tensor, Tensor]:
    data = LowRankDataModule(**options)
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def module(seed: int = 0, **options: Any) -> MatrixSensing:
    torch.manual_seed(seed)
    return MatrixSensing(**options)


def descend_symmetric(X: Tensor, M: Tensor, steps: int) -> Tensor:
    """X <- X - η (X Xᵀ - M) X, as the paper writes it."""
    for _ in range(steps):
        X = X - ETA * (X @ (X.T @ X) - M @ X)
    return X


def descend(F: Tensor, G: Tensor, M: Tensor, steps: int, until: float = 0.0) -> tuple[Tensor, Tensor, int]:
    """F <- F - η E G and G <- G - η Eᵀ F at once, until the loss is so small; returns the number of steps too."""
    for step in range(steps):
        E = F @ G.T - M
        if step % 100 == 0 and E.square().sum() < until:
            return F, G, step
        F, G = F - ETA * E @ G, G - ETA * E.T @ F
    return F, G, steps


def factors(net: MatrixSensing) -> tuple[Tensor, Tensor]:
    return net.second.weight.detach().clone(), net.first.weight.detach().T.clone()


def train(net: MatrixSensing, batch: tuple[Tensor, Tensor], steps: int) -> float:
    (optimizer,) = [net.configure_optimizers()]
    for _ in range(steps):
        optimizer.zero_grad()
        (net.error(batch) / (4 if net.symmetric else 2)).backward()
        optimizer.step()
    return net.error(batch).item()


# ---- The module descends as the paper does


def test_two_factors_move_as_in_the_paper() -> None:
    batch = problem()
    net = module()
    F, G, _ = descend(*factors(net), batch[1], 50)
    train(net, batch, 50)
    torch.testing.assert_close(factors(net), (F, G), rtol=1e-12, atol=1e-14)


def test_symmetric_factors_move_as_in_the_paper() -> None:
    batch = problem(symmetric=True)
    net = module(symmetric=True)
    X = descend_symmetric(net.second.weight.detach().clone(), batch[1], 50)
    train(net, batch, 50)
    torch.testing.assert_close(net.second.weight.detach(), X, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_trainer_takes_the_same_steps(symmetric: bool) -> None:
    data: Any = LowRankDataModule(symmetric=symmetric, steps_per_epoch=5)
    trained, net = module(symmetric=symmetric), module(symmetric=symmetric)
    fit(trained, data=data, max_epochs=2)
    train(net, problem(symmetric=symmetric), 10)
    torch.testing.assert_close(factors(trained), factors(net), rtol=0, atol=0)


def test_the_factors_begin_at_the_scales_that_are_asked_for() -> None:
    F, G = factors(module(size=400, width=300, alpha=0.5))
    assert F.std().item() == pytest.approx(0.5 / 20, rel=0.02)
    assert G.std().item() == pytest.approx(0.5 / 20 / 3, rel=0.02)


# ---- The measurements


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_target_has_the_rank_and_unit_singular_values(symmetric: bool) -> None:
    _, M = problem(size=8, rank=3, symmetric=symmetric)
    expected = torch.tensor([1.0] * 3 + [0.0] * 5, dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.svdvals(M), expected)
    assert torch.equal(M, M.T) == symmetric or torch.allclose(M, M.T) == symmetric


def test_gaussian_measurements_keep_the_norm_on_average() -> None:
    sensors, seen = problem(size=6, rank=2, num_measurements=4000)
    _, M = problem(size=6, rank=2)
    assert seen.shape == (4000,)
    torch.testing.assert_close(seen, torch.einsum("ijk,jk->i", sensors, M))
    assert seen.square().sum().item() == pytest.approx(2, rel=5 * math.sqrt(2 / 4000))  # chi-square


def test_exact_width_recovers_the_matrix_from_gaussian_measurements() -> None:
    batch = problem(size=8, rank=1, num_measurements=200)
    net = module(size=8, width=1, alpha=1.0, lr=ETA)
    assert train(net, batch, 300) < 1e-12
    _, M = problem(size=8, rank=1)
    assert (net() - M).norm().item() < 1e-6


# ---- The laws


def test_a_scalar_factor_of_nothing_shrinks_by_its_law() -> None:
    """x <- x - η x³: 2 η t x² tends to 1."""
    x, t = torch.ones(1, 1, dtype=torch.float64), 3000
    x = descend_symmetric(x, torch.zeros(1, 1, dtype=torch.float64), t)
    assert 2 * ETA * t * x.item() ** 2 == pytest.approx(1, rel=0.01)


def test_over_parameterised_symmetric_factors_are_cursed() -> None:
    """The loss is (k - r) / (4 η² t²) within 1 %."""
    batch, t = problem(symmetric=True), 3000
    X = module(symmetric=True, alpha=1.0).second.weight.detach().clone()
    losses = []
    for steps in (t // 10, t - t // 10):
        X = descend_symmetric(X, batch[1], steps)
        losses.append((X @ X.T - batch[1]).square().sum().item())
    assert losses[-1] == pytest.approx((5 - 3) / (4 * ETA**2 * t**2), rel=0.01)
    assert math.log(losses[1] / losses[0]) / math.log(10) == pytest.approx(-2, abs=0.03)


def test_symmetric_factors_of_the_right_width_are_not() -> None:
    batch = problem(symmetric=True)
    assert train(module(symmetric=True, width=3), batch, 200) < 1e-20


@pytest.mark.slow
@pytest.mark.parametrize(("alpha", "rate"), [(0.2, (0.9, 1.9)), (0.5, (0.9, 1.9)), (1.0, (0.9, 1.9))])
def test_unequal_factors_converge_at_a_rate_of_alpha_squared(alpha: float, rate: tuple[float, float]) -> None:
    _, M = problem()
    F, G, start = descend(*factors(module(alpha=alpha)), M, 20_000, until=1e-8)
    first = (F @ G.T - M).square().sum().item()
    F, G, more = descend(F, G, M, 20_000, until=1e-24)
    last = (F @ G.T - M).square().sum().item()
    assert start < 20_000
    measured = math.log(first / last) / more / (ETA * alpha**2)
    assert rate[0] < measured < rate[1]


def test_rebalancing_once_lets_the_loss_fall_by_fifteen_powers_of_ten_in_a_hundred_steps() -> None:
    batch = problem()
    net = module(alpha=0.1)
    before = train(net, batch, 600)
    unmodified = copy.deepcopy(net)
    rebalance_layers_(net.first, net.second, beta=1.0)
    assert net.error(batch).item() == pytest.approx(before, rel=1e-9)
    assert train(net, batch, 100) < 1e-15 * before
    assert train(unmodified, batch, 100) > 0.1 * before


@pytest.mark.slow
def test_without_it_the_same_takes_more_than_ten_thousand_steps() -> None:
    batch = problem()
    net = module(alpha=0.1)
    before = train(net, batch, 600)
    F, G, _ = descend(*factors(net), batch[1], 10_000)
    assert (F @ G.T - batch[1]).square().sum().item() > 1e-15 * before


# ---- As it is seen in training


def test_the_callback_tells_the_curse_from_its_remedy() -> None:
    data: Any = LowRankDataModule(symmetric=True, steps_per_epoch=100)
    callback = FactorImbalance([("first", "second")], rank=3, every_n_steps="geometric", on_error="raise")
    fit(module(symmetric=True, alpha=1.0), callback, data=data, max_steps=601, max_epochs=-1)
    last = callback.history[-1]
    assert last["imbalance/rate_exponent/first-second"] == pytest.approx(-2, abs=0.1)
    assert last["imbalance/rate_exponent"] == pytest.approx(-2, abs=0.1)
    assert 0 < last["imbalance/rate_exponent_error"] < 0.05
    assert set(series(callback, "imbalance/frobenius/first-second")) == {0.0}


def test_the_module_rebalances_itself_before_the_step_that_is_named() -> None:
    data: Any = LowRankDataModule(steps_per_epoch=5)
    callback = FactorImbalance([("first", "second")], every_n_steps=1, on_error="raise")
    net = module(rebalance_at=3, beta=2.0)
    fit(net, callback, data=data, max_steps=5, max_epochs=-1)
    sizes = series(callback, "imbalance/frobenius/first-second")
    assert max(sizes[:4]) < 0.1
    assert sizes[4] == pytest.approx(4 * math.sqrt(5), rel=0.05), "FᵀF = 4 I, and G is small"


BAD: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (LowRankDataModule, {"rank": 0}, r"rank=0 must lie between 1 and size=50"),
    (LowRankDataModule, {"rank": 5, "size": 4}, r"rank=5 must lie between 1 and size=4"),
    (LowRankDataModule, {"num_measurements": -1}, r"num_measurements=-1 must not be negative"),
    (MatrixSensing, {"lr": 0.0}, r"lr=0.0 must be positive"),
    (MatrixSensing, {"alpha": -1.0}, r"alpha=-1.0 must be positive"),
    (MatrixSensing, {"symmetric": True, "rebalance_at": 3}, r"rebalance_at goes with two factors"),
]


@pytest.mark.parametrize(("make", "options", "message"), BAD)
def test_bad_settings_are_refused(make: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)

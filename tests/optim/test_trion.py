from __future__ import annotations

import copy
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spectral_callbacks.optim import Trion
from spectral_callbacks.optim.newton_schulz import newton_schulz
from spectral_callbacks.stability import NoThresholdError, edges
from tests.optim import dct_oracle


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _matrix(W: Tensor) -> np.ndarray[Any, Any]:
    return W.detach().reshape(W.shape[0], -1).numpy().copy()


@pytest.mark.parametrize("scale", ["kj", "kimi", "dion", "none"])
@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (4, 2, 3, 3)])
def test_it_is_the_papers_recursion(shape: tuple[int, ...], scale: Any) -> None:
    w = nn.Parameter(_normal(*shape))
    oracle = dct_oracle.Trion(r=2, weight_decay=0.1, scale=scale)
    optimizer = Trion([w], weight_decay=0.1, rank=2, scale=scale)
    expected = _matrix(w)
    for t in range(30):
        w.grad = _normal(*shape, seed=t)
        expected = oracle.step(expected, _matrix(w.grad))
        optimizer.step()
        np.testing.assert_allclose(_matrix(w), expected, rtol=0, atol=2e-13)


@pytest.mark.parametrize("shape", [(12, 5), (5, 5)])
def test_newton_schulz_is_its_polynomial_of_the_singular_values(shape: tuple[int, int]) -> None:
    X = _normal(*shape)
    for count in (1, 5):
        expected = dct_oracle.newton_schulz(X.numpy(), count)
        np.testing.assert_allclose(newton_schulz(X, count).numpy(), expected, rtol=0, atol=1e-12)


def test_five_iterations_take_singular_values_from_a_hundredth_on_near_one() -> None:
    """Of diag(cos θ, sin θ), whose Frobenius norm is 1."""
    angles = torch.linspace(math.asin(0.01), math.pi / 4, 2000, dtype=torch.float64)
    values = torch.stack([angles.sin(), angles.cos()], dim=1)
    mapped = torch.stack([newton_schulz(torch.diag(pair)).diagonal() for pair in values])
    assert float(mapped.min()) == pytest.approx(0.6818, abs=1e-4)
    assert float(mapped.max()) == pytest.approx(1.1344, abs=1e-4)


def test_a_matrix_of_zeros_stays_one() -> None:
    assert torch.equal(newton_schulz(torch.zeros(3, 2)), torch.zeros(3, 2))


def test_it_moves_along_the_momentum_and_forgets_only_what_it_used() -> None:
    w = nn.Parameter(_normal(8, 6))
    optimizer = Trion([w], momentum=0.9, rank=2)
    G = w.grad = _normal(8, 6, seed=1)
    optimizer.step()
    M = optimizer.state[w]["momentum_buffer"]
    S, left = G @ torch.from_numpy(dct_oracle.cosines(6)), M @ torch.from_numpy(dct_oracle.cosines(6))
    chosen = optimizer.state[w]["columns"].long()
    others = [k for k in range(6) if k not in chosen.tolist()]
    torch.testing.assert_close(left[:, chosen], 0.9 * S[:, chosen], rtol=0, atol=1e-14)
    torch.testing.assert_close(left[:, others], S[:, others], rtol=0, atol=1e-14)


@pytest.mark.parametrize("lr", [0.02, torch.tensor(0.02, dtype=torch.float64)])
def test_vectors_step_as_in_adamw_with_settings_of_their_own(lr: float | Tensor) -> None:
    ours, theirs = nn.Parameter(_normal(5)), nn.Parameter(_normal(5))
    optimizer = Trion([ours], lr=lr, weight_decay=0.1, adamw_lr=0.01, adamw_betas=(0.8, 0.9), adamw_eps=1e-6)
    reference = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6)
    for t in range(20):
        ours.grad = theirs.grad = _normal(5, seed=t)
        optimizer.step()
        reference.step()
    assert torch.equal(ours, theirs)


def test_nothing_moves_at_learning_rate_zero() -> None:
    parameters = [nn.Parameter(_normal(4, 3)), nn.Parameter(_normal(5))]
    optimizer = Trion(parameters, lr=0.0, weight_decay=0.5)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(parameters[0], _normal(4, 3))
    assert torch.equal(parameters[1], _normal(5))


def test_it_climbs_where_it_maximizes() -> None:
    up, down = nn.Parameter(_normal(6, 4)), nn.Parameter(_normal(6, 4))
    climber, other = Trion([up], maximize=True), Trion([down])
    for t in range(5):
        up.grad, down.grad = _normal(6, 4, seed=t), -_normal(6, 4, seed=t)
        climber.step()
        other.step()
    assert torch.equal(up, down)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_resumed_run_is_the_run(dtype: torch.dtype) -> None:
    def run(w: nn.Parameter, b: nn.Parameter, optimizer: Trion, steps: range) -> None:
        for t in steps:
            w.grad, b.grad = _normal(6, 4, seed=t).to(dtype), _normal(4, seed=t).to(dtype)
            optimizer.step()

    w, b = nn.Parameter(_normal(6, 4).to(dtype)), nn.Parameter(_normal(4).to(dtype))
    optimizer = Trion([w, b])
    run(w, b, optimizer, range(4))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    v, c = copy.deepcopy(w), copy.deepcopy(b)
    resumed = Trion([v, c])
    resumed.load_state_dict(torch.load(file, weights_only=True))
    run(w, b, optimizer, range(4, 9))
    run(v, c, resumed, range(4, 9))
    assert torch.equal(w, v)
    assert torch.equal(b, c)
    assert resumed.state[v]["columns"].dtype == torch.int32


def test_diagnostics_are_those_of_the_momentum() -> None:
    w, b = nn.Parameter(_normal(8, 6)), nn.Parameter(_normal(3))
    optimizer = Trion([w, b], rank=2)
    optimizer.observe()
    previous: set[int] = set()
    M = torch.zeros(8, 6, dtype=torch.float64)
    for t in range(5):
        w.grad, b.grad = _normal(8, 6, seed=t), _normal(3)
        optimizer.step()
        S = (M + w.grad) @ torch.from_numpy(dct_oracle.cosines(6))
        columns = optimizer.state[w]["columns"].tolist()
        found = optimizer.diagnostics(w)
        assert float(found["captured_energy"]) == pytest.approx(float(S[:, columns].square().sum() / S.square().sum()))
        assert float(found["column_churn"]) == len(set(columns) - previous) / 2
        previous, M = set(columns), optimizer.state[w]["momentum_buffer"].clone()
    assert not optimizer.diagnostics(b)


def test_it_has_no_threshold() -> None:
    with pytest.raises(NoThresholdError, match="orthogonalizes"):
        edges(Trion([nn.Parameter(torch.zeros(3, 2))]))


def test_two_widths_a_convolution_and_a_vector_train_together_and_gradients_stay() -> None:
    parameters = [nn.Parameter(_normal(*shape)) for shape in [(64, 24), (64, 16), (4, 3, 3, 3), (7,)]]
    before = [p.detach().clone() for p in parameters]
    optimizer = Trion(parameters)
    for p in parameters:
        p.grad = _normal(*p.shape, seed=3)
    optimizer.step()
    for p, was in zip(parameters, before, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, _normal(*p.shape, seed=3))
        assert not torch.equal(p, was)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"momentum": -0.1}, "momentum is -0.1"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"rank": 0}, "rank is 0"),
        ({"scale": "muon"}, "scale is 'muon', and must be one of kj"),
        ({"num_iterations": 0}, "num_iterations is 0"),
        ({"num_iterations": True}, "num_iterations is True"),
        ({"basis": "svd"}, "basis is 'svd'"),
        ({"adamw_lr": -1e-3}, "adamw_lr is -0.001"),
        ({"adamw_betas": (0.9, 1.0)}, r"adamw_betas\[1\] is 1.0"),
        ({"adamw_eps": -1.0}, "adamw_eps is -1.0"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trion([nn.Parameter(torch.zeros(2, 2))], **settings)


def test_a_scheduler_changes_the_rate_of_what_is_no_matrix_in_proportion() -> None:
    schedule = [1.0, 0.5, 0.25]
    bias, expected = nn.Parameter(_normal(5)), nn.Parameter(_normal(5))
    optimizer = Trion([bias], lr=0.02, adamw_lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule[min(step, 2)])
    yardstick = torch.optim.AdamW([expected], lr=0.01, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)
    for step, share in enumerate(schedule):
        yardstick.param_groups[0]["lr"] = 0.01 * share
        bias.grad = expected.grad = _normal(5, seed=step)
        optimizer.step()
        yardstick.step()
        scheduler.step()
        torch.testing.assert_close(bias, expected, rtol=1e-14, atol=0)

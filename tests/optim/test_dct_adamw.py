from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spectral_callbacks.optim import DCTAdamW
from tests.optim import dct_oracle

FEEDBACKS = ("none", "full", "8bit")
AFTER_1 = """0.11284457042849443 -0.19422649734135716 0.2987024348887913 0.38715542952761345 -0.5057735026792624
    0.6012975651138618 0.712844570468656 -0.7942264973211236 0.8987024348890968 0.9871554295090189 -1.1057735026870619
    1.2012975651168576"""
AFTER_10 = """0.2278659653781511 -0.14254880994999786 0.28703641472185315 0.27202541385853773 -0.5575251689726961
    0.61292424819607 0.8276116167684499 -0.7426049463135544 0.887178490604441 0.8719303445146285 -1.1575776223867837
    1.2129144107118046"""


def _normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _lines(W: Tensor) -> np.ndarray[Any, Any]:
    matrix = W.detach().reshape(W.shape[0], -1).numpy().copy()
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


def _steps(optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Step on gradients that depend on the step and on the parameter's place alone."""
    for t in steps:
        for i, p in enumerate(optimizer.param_groups[0]["params"]):
            p.grad = _normal(*p.shape, seed=100 * t + i, dtype=p.dtype)
        optimizer.step()


def test_the_golden_trajectory() -> None:
    W = torch.arange(1, 13).double().reshape(4, 3) / 10 * torch.tensor([1.0, -1.0, 1.0]).double()
    target = torch.cos(torch.arange(12).double()).reshape(4, 3)
    right = torch.tensor([[2, 0.5, 0], [0.5, 1, 0.2], [0, 0.2, 0.5]], dtype=torch.float64)
    w = nn.Parameter(W)
    optimizer = DCTAdamW([w], lr=1e-2, weight_decay=0.0, rank=2)
    seen = []
    for _ in range(10):
        w.grad = torch.arange(1, 5).double()[:, None] * ((w.detach() - target) @ right)
        optimizer.step()
        seen.append(w.detach().flatten().clone())
    for after, golden in ((seen[0], AFTER_1), (seen[9], AFTER_10)):
        expected = torch.tensor([float(x) for x in golden.split()], dtype=torch.float64)
        torch.testing.assert_close(after, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (5, 2, 3, 3), (6, 6)])
def test_it_is_the_papers_recursion_while_columns_come_and_go(
    shape: tuple[int, ...], feedback: Any, every: int
) -> None:
    w = nn.Parameter(_normal(*shape))
    optimizer = DCTAdamW([w], lr=0.01, rank=2, weight_decay=0.1, refresh_every=every, error_feedback=feedback)
    oracle = dct_oracle.DctAdamW(r=2, lr=0.01, weight_decay=0.1, every=every, feedback=feedback)
    expected = _lines(w)
    for t in range(30):
        w.grad = _normal(*shape, seed=t)
        expected = oracle.step(expected, _lines(w.grad))
        optimizer.step()
        np.testing.assert_allclose(_lines(w), expected, rtol=0, atol=1e-12)
    assert len({tuple(columns) for columns in oracle.kept}) > 3


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (5, 2, 3, 3)])
def test_the_identity_basis_in_full_rank_is_adamw(shape: tuple[int, ...]) -> None:
    ours, theirs = nn.Parameter(_normal(*shape)), nn.Parameter(_normal(*shape))
    optimizer = DCTAdamW([ours], lr=1e-2, rank=1.0, basis="identity")
    reference = torch.optim.AdamW([theirs], lr=1e-2)
    for t in range(100):
        ours.grad = theirs.grad = _normal(*shape, seed=t) * torch.logspace(-6, 2, shape[-1], dtype=torch.float64)
        optimizer.step()
        reference.step()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("settings", [{}, {"foreach": False}, {"foreach": True}, {"maximize": True}, {"lr": "tensor"}])
def test_what_is_no_matrix_steps_as_adamw_to_the_last_bit(settings: dict[str, Any], dtype: torch.dtype) -> None:
    shapes = [(5,), (), (1, 7), (7, 1)] + [(4, 3)] * dtype.is_complex
    settings = {"lr": 1e-2, "weight_decay": 0.1, **settings}
    if settings["lr"] == "tensor":
        settings["lr"] = torch.tensor(1e-2)
    ours = [nn.Parameter(_normal(*shape, dtype=dtype)) for shape in shapes]
    theirs = copy.deepcopy(ours)
    optimizer, reference = DCTAdamW(ours, **settings), torch.optim.AdamW(theirs, **settings)
    _steps(optimizer, range(20))
    _steps(reference, range(20))
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        assert set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"}


def test_the_first_step_of_a_fresh_column_is_the_learning_rate() -> None:
    """By the step's own correction it would be 2.5 times as long at step 1000."""
    Q = torch.from_numpy(dct_oracle.cosines(4))
    w = nn.Parameter(torch.zeros(5, 4, dtype=torch.float64))
    optimizer = DCTAdamW([w], lr=1e-2, weight_decay=0.0, rank=1)
    before = w.detach().clone()
    for t in range(1001):
        w.grad = torch.ones(5, 1, dtype=torch.float64) * Q[:, 0 if t < 1000 else 2]
        before = w.detach().clone()
        optimizer.step()
    torch.testing.assert_close((w.detach() - before) @ Q[:, 2], torch.full((5,), -1e-2).double(), rtol=1e-6, atol=0)
    assert optimizer.state[w]["ages"].tolist() == [1]


def test_every_parameter_counts_its_own_steps() -> None:
    early, late = nn.Parameter(_normal(6, 4)), nn.Parameter(_normal(6, 4))
    optimizer = DCTAdamW([early, late], refresh_every=3, rank=2)
    alone = nn.Parameter(_normal(6, 4))
    other = DCTAdamW([alone], refresh_every=3, rank=2)
    for t in range(12):
        early.grad = _normal(6, 4, seed=t)
        late.grad = alone.grad = _normal(6, 4, seed=50 + t) if t >= 5 else None
        optimizer.step()
        other.step()
    assert torch.equal(late, alone)
    assert float(optimizer.state[late]["step"]) == 7


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_it_climbs_where_it_maximizes(shape: tuple[int, int], feedback: Any) -> None:
    up, down = nn.Parameter(_normal(*shape)), nn.Parameter(_normal(*shape))
    climber = DCTAdamW([up], maximize=True, error_feedback=feedback)
    other = DCTAdamW([down], error_feedback=feedback)
    for t in range(5):
        up.grad, down.grad = _normal(*shape, seed=t), -_normal(*shape, seed=t)
        climber.step()
        other.step()
    assert torch.equal(up, down)


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("basis", ["dct", "identity"])
def test_gradients_are_left_as_they_are(basis: Any, feedback: Any) -> None:
    parameters = [nn.Parameter(_normal(*shape)) for shape in [(64, 24), (16, 64), (4, 3, 3, 3), (9, 9), (7,), ()]]
    for maximize in (False, True):
        optimizer = DCTAdamW(parameters, basis=basis, error_feedback=feedback, maximize=maximize)
        for p in parameters:
            p.grad = _normal(*p.shape, seed=3)
        kept = [p.grad for p in parameters]
        optimizer.step()
        optimizer.step()
        for p, grad in zip(parameters, kept, strict=True):
            assert grad is not None
            assert p.grad is grad
            assert torch.equal(grad, _normal(*p.shape, seed=3))


def test_two_widths_convolutions_and_embeddings_all_train() -> None:
    """In the published code two widths are an error, and the filters of a convolution never move."""
    parameters = [nn.Parameter(_normal(*shape)) for shape in [(64, 24), (64, 16), (4, 3, 3, 3), (40_000, 4)]]
    before = [p.detach().clone() for p in parameters]
    optimizer = DCTAdamW(parameters, rank=0.5)
    _steps(optimizer, range(2))
    for p, was in zip(parameters, before, strict=True):
        assert not torch.equal(p, was)
    assert [optimizer.state[p]["exp_avg"].shape for p in parameters] == [(64, 12), (64, 8), (27, 2), (40_000, 2)]


def test_a_filter_stored_channels_last_moves_like_any_other() -> None:
    plain = nn.Parameter(_normal(6, 4, 3, 3))
    other = nn.Parameter(_normal(6, 4, 3, 3).contiguous(memory_format=torch.channels_last))
    for p in (plain, other):
        _steps(DCTAdamW([p], rank=2), range(5))
    torch.testing.assert_close(plain, other, rtol=0, atol=1e-14)


def test_a_short_memory_error_feedback_brings_back_all_that_was_left_out() -> None:
    """What was projected over all steps, and the error that is left, are the sum of the gradients."""
    w = nn.Parameter(_normal(9, 6))
    optimizer = DCTAdamW([w], lr=1e-9, rank=1, error_feedback="full", betas=(0.0, 0.999))
    Q = torch.from_numpy(dct_oracle.cosines(6))
    projected = torch.zeros(9, 6, dtype=torch.float64)
    for t in range(10):
        w.grad = _normal(9, 6, seed=t)
        optimizer.step()
        state = optimizer.state[w]
        projected += state["exp_avg"] @ Q[:, state["columns"].long()].T
    total = sum(_normal(9, 6, seed=t) for t in range(10))
    torch.testing.assert_close(projected + optimizer.state[w]["error"], total, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_a_resumed_run_is_the_run(feedback: Any, dtype: torch.dtype) -> None:
    ps = [nn.Parameter(_normal(*shape, dtype=dtype)) for shape in [(16, 8), (8, 16), (4, 3, 3, 3), (5,)]]
    optimizer = DCTAdamW(ps, error_feedback=feedback, refresh_every=3, rank=2)
    _steps(optimizer, range(8))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    qs = copy.deepcopy(ps)
    resumed = DCTAdamW(qs, error_feedback=feedback, refresh_every=3, rank=2)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    copied, unpickled = copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))
    for each in (optimizer, resumed, copied, unpickled):
        _steps(each, range(8, 13))
        assert type(each) is DCTAdamW
    for other in (resumed, copied, unpickled):
        for p, q in zip(ps, other.param_groups[0]["params"], strict=True):
            assert torch.equal(p, q)
            for name, value in optimizer.state[p].items():
                assert isinstance(value, Tensor)
                assert value.dtype == other.state[q][name].dtype
                assert torch.equal(value, other.state[q][name])


def test_an_older_state_is_filled_up() -> None:
    w = nn.Parameter(_normal(6, 4))
    optimizer = DCTAdamW([w, nn.Parameter(_normal(3))])
    _steps(optimizer, range(3))
    saved = optimizer.state_dict()
    for name in ("maximize", "foreach"):
        del saved["param_groups"][0][name]
    saved["state"] = {i: {**held, "step": float(held["step"])} for i, held in saved["state"].items()}
    optimizer.load_state_dict(saved)
    _steps(optimizer, range(3, 5))
    assert torch.equal(optimizer.state[w]["step"], torch.tensor(5.0))


def test_a_state_of_another_precision_is_loaded_in_ones_own() -> None:
    w = nn.Parameter(_normal(6, 4))
    optimizer = DCTAdamW([w, nn.Parameter(_normal(3))], error_feedback="8bit")
    _steps(optimizer, range(3))
    for dtype, working in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        v, b = nn.Parameter(_normal(6, 4, dtype=dtype)), nn.Parameter(_normal(3, dtype=dtype))
        other = DCTAdamW([v, b], error_feedback="8bit")
        other.load_state_dict(optimizer.state_dict())
        _steps(other, range(3, 5))
        types = {name: value.dtype for name, value in other.state[v].items() if name != "step"}
        ints = {"columns": torch.int32, "ages": torch.int32, "error": torch.int8}
        assert types == {"exp_avg": working, "exp_avg_sq": working, "error_scale": working, **ints}
        assert other.state[b]["exp_avg"].dtype == dtype


def test_half_types_are_computed_in_float32() -> None:
    w, exact = nn.Parameter(_normal(16, 8, dtype=torch.bfloat16)), nn.Parameter(_normal(16, 8, dtype=torch.float32))
    exact.data.copy_(w.data)
    optimizer, other = DCTAdamW([w], lr=0.1), DCTAdamW([exact], lr=0.1)
    w.grad = _normal(16, 8, seed=1, dtype=torch.bfloat16)
    exact.grad = w.grad.float()
    optimizer.step()
    other.step()
    assert optimizer.state[w]["exp_avg"].dtype == torch.float32
    assert torch.equal(w, exact.to(torch.bfloat16))


def test_an_eighth_of_the_columns_costs_less_than_one_and_a_half_bytes_a_parameter() -> None:
    """The shapes of GPT-2 small, every side an eighth as long."""
    block = [(96,), (96,), (288, 96), (288,), (96, 96), (96,), (96,), (96,), (384, 96), (384,), (96, 384), (96,)]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in [(6282, 96), (128, 96), *block * 12, (96,), (96,)]]
    optimizer = DCTAdamW(parameters)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    size = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    assert size / sum(p.numel() for p in parameters) <= 1.5


@pytest.mark.parametrize(("rank", "columns"), [(2, 2), (100, 8), (1, 1), (1.0, 8), (0.5, 4), (0.01, 1), (0.3, 2)])
def test_a_rank_is_a_count_or_a_share_of_the_width(rank: float, columns: int) -> None:
    w = nn.Parameter(_normal(9, 8))
    optimizer = DCTAdamW([w], rank=rank)
    _steps(optimizer, range(1))
    assert optimizer.state[w]["columns"].shape == (columns,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": torch.tensor([0.1, 0.2])}, "Tensor lr must be 1-element"),
        ({"lr": torch.tensor(0.1), "foreach": True}, "lr as a Tensor is not supported"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] is 1.0"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] is -0.1"),
        ({"eps": -1e-8}, "eps is -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": -3}, "rank is -3"),
        ({"rank": True}, "rank is True"),
        ({"rank": 0.0}, "rank is 0.0"),
        ({"rank": 1.5}, "rank is 1.5"),
        ({"rank": float("nan")}, "rank is nan"),
        ({"refresh_every": 0}, "refresh_every is 0"),
        ({"refresh_every": True}, "refresh_every is True"),
        ({"refresh_every": 1.5}, "refresh_every is 1.5"),
        ({"basis": "svd"}, "basis is 'svd', and must be one of dct, identity"),
        ({"error_feedback": "4bit"}, "error_feedback is '4bit', and must be one of none, full, 8bit"),
    ],
)
def test_a_wrong_setting_is_named_also_in_a_group(settings: dict[str, Any], message: str) -> None:
    w = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=message):
        DCTAdamW([w], **settings)
    with pytest.raises(ValueError, match=message):
        DCTAdamW([{"params": [w], **settings}])


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_diagnostics_tell_of_the_columns(feedback: Any) -> None:
    w, b = nn.Parameter(_normal(9, 6)), nn.Parameter(_normal(3))
    optimizer = DCTAdamW([w, b], rank=2, refresh_every=2, error_feedback=feedback)
    _steps(optimizer, range(1))
    assert not optimizer.diagnostics(w)
    optimizer.observe()
    Q = torch.from_numpy(dct_oracle.cosines(6))
    before, churn = optimizer.state[w]["columns"].tolist(), 1.0
    error = optimizer.state[w].get("error", torch.zeros(9, 6)) * optimizer.state[w].get("error_scale", 1.0)
    for t in range(1, 8):
        _steps(optimizer, range(t, t + 1))
        assert w.grad is not None
        A = w.grad + error
        state, found = optimizer.state[w], optimizer.diagnostics(w)
        S = A @ Q[:, state["columns"].long()]
        assert float(found["captured_energy"]) == pytest.approx(float(S.square().sum() / A.square().sum()), rel=1e-10)
        if t % 2 == 0:
            churn = len(set(state["columns"].tolist()) - set(before)) / 2
            before = state["columns"].tolist()
        assert float(found["column_churn"]) == churn
        if feedback == "none":
            assert "error_feedback_norm" not in found
        else:
            left_out = float((A.square().sum() - S.square().sum()).sqrt())
            assert float(found["error_feedback_norm"]) == pytest.approx(left_out, rel=1e-10)
            error = state["error"] * state.get("error_scale", 1.0)
    assert not optimizer.diagnostics(b)


def test_observing_changes_no_step() -> None:
    w, v = nn.Parameter(_normal(9, 6)), nn.Parameter(_normal(9, 6))
    observed, other = DCTAdamW([w], error_feedback="full"), DCTAdamW([v], error_feedback="full")
    observed.observe()
    for optimizer in (observed, other):
        _steps(optimizer, range(5))
    assert torch.equal(w, v)


@pytest.mark.parametrize("before", ["none", "full", "8bit"])
@pytest.mark.parametrize("after", ["none", "full", "8bit"])
def test_error_feedback_that_changes_in_the_middle_starts_without_an_error(before: Any, after: Any) -> None:
    """As if the error of the other kind had been forgotten; the same kind goes on with what it has."""
    generator = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.randn(6, 4, dtype=torch.float64, generator=generator))
    optimizer = DCTAdamW([w], lr=0.1, rank=2, error_feedback=before)
    w.grad = torch.randn(6, 4, dtype=torch.float64, generator=generator)
    optimizer.step()
    twin = nn.Parameter(w.detach().clone())
    other = DCTAdamW([twin], lr=0.1, rank=2, error_feedback=after)
    twin.grad = torch.zeros_like(twin)
    other.step()  # makes the state, with no error in it
    for name in ("step", "columns", "ages", "exp_avg", "exp_avg_sq"):
        other.state[twin][name] = optimizer.state[w][name].clone()
    twin.data.copy_(w)
    if before == after:
        other.state[twin] = {name: value.clone() for name, value in optimizer.state[w].items()}
    optimizer.param_groups[0]["error_feedback"] = after
    for _ in range(3):
        w.grad = torch.randn(6, 4, dtype=torch.float64, generator=generator)
        twin.grad = w.grad.clone()
        optimizer.step()
        other.step()
    assert torch.equal(w, twin)
    assert optimizer.state[w].keys() == other.state[twin].keys()

from __future__ import annotations

import copy
import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spectral_callbacks.optim import DiffGrad, blocks, compiled, diffgrad_kernel, friction
from tests.optim.golden import START, quartic_gradient

ETA = 1e-2

GOLDEN = {
    "plain": (
        {},
        [0.9453416905142479, -1.9435298116309925, 2.9498233080646608, -3.9500829611169053],
    ),
    "decoupled decay": (
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        [0.9355591489937052, -1.923425400476907, 2.9202310958533535, -3.9104958884286747],
    ),
    "coupled decay": (
        {"weight_decay": 0.1},
        [0.9452575774632364, -1.943515150943315, 2.949032150799071, -3.9490223887347744],
    ),
}

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "forgetful": {"betas": (0.9, 0.8)},
    "amsgrad": {"betas": (0.9, 0.8), "amsgrad": True},
    "coupled decay": {"weight_decay": 0.1},
    "decoupled decay": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "relative": {"friction": "relative", "eps": 0.1},
    "relative, amsgrad": {"friction": "relative", "eps": 0.1, "betas": (0.9, 0.8), "amsgrad": True},
    "no averages": {"betas": (0.0, 0.0), "eps": 1.0},
    "other rates": {"lr": 0.3, "betas": (0.5, 0.7), "eps": 1e-3},
}

PATHS: dict[str, dict[str, Any]] = {
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    "blocks": {},
    "plain blocks": {},
    "capturable": {"capturable": True},
    "capturable foreach": {"capturable": True, "foreach": True},
    "differentiable": {"differentiable": True},
    "fused": {"fused": True},
}

ALL_PATHS = [pytest.param(name, marks=pytest.mark.slow) if name == "fused" else name for name in PATHS]


@pytest.fixture
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The settings that choose a path, with blocks and kernels of a few entries."""
    monkeypatch.setattr(blocks, "BLOCK", 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(diffgrad_kernel, "_WORTH_A_KERNEL", 2)
    if request.param == "plain blocks":
        monkeypatch.setattr(friction, "_fused_adam", None)
    if request.param == "fused":
        monkeypatch.setattr(diffgrad_kernel, "_kernel", compiled.FlatKernel(diffgrad_kernel.diffgrad_kernel))
    return PATHS[request.param]


def transcribed(
    w: np.ndarray,
    gradients: Sequence[np.ndarray] | Callable[[np.ndarray], np.ndarray],
    num_steps: int,
    *,
    lr: float = ETA,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    amsgrad: bool = False,
    friction: str = "absolute",
) -> tuple[np.ndarray, np.ndarray]:
    """The paper's recursion, in numpy: the weights and the friction of the last step."""
    m, v, largest, before, xi = (np.zeros_like(w) for _ in range(5))
    for t in range(1, num_steps + 1):
        g = gradients(w) if callable(gradients) else gradients[t - 1]
        g = -g if maximize else g
        if decoupled_weight_decay:
            w = w - lr * weight_decay * w
        else:
            g = g + weight_decay * w
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        largest = np.maximum(largest, v)
        m_hat = m / (1 - betas[0] ** t)
        v_hat = (largest if amsgrad else v) / (1 - betas[1] ** t)
        change = np.abs(before - g)
        if friction == "relative":
            change = change / (np.sqrt(v_hat) + eps)
        xi = 1 / (1 + np.exp(-change))
        w = w - lr * xi * m_hat / (np.sqrt(v_hat) + eps)
        before = g
    return w, xi


def shrinking(num_steps: int, *shape: int, seed: int = 0) -> list[Tensor]:
    """Gradients of both signs that get smaller, so that v shrinks in the end and AMSGrad has something to hold."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) * 0.8**t for t in range(num_steps)]


def stepped(
    w: Tensor, gradients: Sequence[Tensor] | Callable[[Tensor], Tensor], num_steps: int, **settings: Any
) -> Any:
    """The weights after some steps, and the optimizer, observed."""
    p = w.clone()
    optimizer = DiffGrad([p], **{"lr": ETA, **settings})
    optimizer.observe()
    for t in range(num_steps):
        p.grad = gradients(p.detach()) if callable(gradients) else gradients[t].clone()
        optimizer.step()
    return p, optimizer


@pytest.mark.parametrize("path", ALL_PATHS, indirect=True)
@pytest.mark.parametrize("name", GOLDEN)
def test_it_follows_the_golden_trajectories(name: str, path: dict[str, Any]) -> None:
    settings, end = GOLDEN[name]
    p, _ = stepped(START, quartic_gradient, 10, **settings, **path)
    torch.testing.assert_close(p, torch.tensor(end, dtype=torch.float64), rtol=1e-14, atol=1e-14)


def test_the_golden_trajectory_holds_at_every_step() -> None:
    first = [0.9907585818371781, -1.9900001670233092, 2.99475020865019, -3.995007115192582]
    second = [0.985642674248403, -1.984693941650255, 2.989749600199997, -3.990014343566986]
    for num_steps, end in ((1, first), (2, second)):
        p, _ = stepped(START, quartic_gradient, num_steps)
        torch.testing.assert_close(p, torch.tensor(end, dtype=torch.float64), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_the_previous_gradient_is_a_copy(*, set_to_none: bool) -> None:
    """Kept by reference it would be the present one wherever gradients keep their memory: 0.8770 at step 2."""
    w = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = DiffGrad([w], lr=0.1)
    for expected in (0.9268941429, 0.8752070060, 0.8242288677, 0.7735090895, 0.7231128491):
        optimizer.zero_grad(set_to_none=set_to_none)
        (w.square() / 2).sum().backward()
        optimizer.step()
        assert w.item() == pytest.approx(expected, abs=6e-11)


@pytest.mark.parametrize("path", ALL_PATHS, indirect=True)
@pytest.mark.parametrize("name", SETTINGS)
def test_it_is_its_recursion(name: str, path: dict[str, Any]) -> None:
    settings = SETTINGS[name]
    w, gradients = torch.linspace(-2, 3, 14, dtype=torch.float64).view(7, 2), shrinking(25, 7, 2)
    p, optimizer = stepped(w, gradients, 25, **settings, **path)
    expected, xi = transcribed(w.numpy(), [g.numpy() for g in gradients], 25, **settings)
    torch.testing.assert_close(p, torch.from_numpy(expected), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(optimizer.diagnostics(p)["friction"], torch.from_numpy(xi), rtol=1e-14, atol=1e-14)


def test_every_setting_matters() -> None:
    """A transcription that left one out would not notice that the optimizer does."""
    w, gradients = np.linspace(-2, 3, 7), [g.numpy() for g in shrinking(25, 7)]
    ends = [transcribed(w, gradients, 25, **settings)[0] for settings in SETTINGS.values()]
    assert all(np.abs(a - b).max() > 1e-4 for i, a in enumerate(ends) for b in ends[:i])


@pytest.mark.parametrize("path", ["loop", "foreach", "blocks", "plain blocks", "capturable"], indirect=True)
@pytest.mark.parametrize("name", ["plain", "coupled decay", "decoupled decay", "amsgrad", "maximize"])
def test_without_friction_it_is_adam(name: str, path: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SETTINGS[name]
    # ξ = 1 / (1 + exp(-|Δg|)) with the exponential at 0
    monkeypatch.setattr(Tensor, "exp_", lambda t: t.fill_(0.0))
    monkeypatch.setattr(torch, "_foreach_exp_", lambda tensors: [t.fill_(0.0) for t in tensors])
    gradients = shrinking(100, 9)
    w = torch.linspace(-2, 3, 9, dtype=torch.float64)
    p, _ = stepped(w, gradients, 100, **settings, **path)
    adam = torch.optim.Adam([w], **{"lr": ETA, **settings})
    for gradient in gradients:
        w.grad = gradient
        adam.step()
    torch.testing.assert_close(p, w, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("path", ALL_PATHS, indirect=True)
def test_an_observed_step_is_the_same_step(path: dict[str, Any]) -> None:
    gradients = shrinking(6, 7)
    ends = []
    for observed in (False, True):
        p = torch.linspace(-2, 3, 7)
        optimizer = DiffGrad([p], lr=ETA, **path)
        assert optimizer.diagnostics(p) == {}
        for gradient in gradients:
            if observed:
                optimizer.observe()
            p.grad = gradient.float()
            optimizer.step()
        assert (set(optimizer.diagnostics(p)) == {"friction"}) == observed
        assert set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq", "previous_grad"}
        ends.append([p, *optimizer.state[p].values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_tiny_gradients_move_as_far_as_adam_would_move_them() -> None:
    """ε stands beside √v̂: beside √v it would slow these ten steps down 8 and 14 times."""
    for size, moved in ((1e-8, 2.50e-2), (1e-10, 4.95e-4)):
        w = torch.zeros(1, dtype=torch.float64)
        p, _ = stepped(w, [torch.full((1,), size, dtype=torch.float64)] * 10, 10)
        assert -p.item() == pytest.approx(moved, rel=2e-3)


def first_valley(x: Tensor) -> Tensor:
    """F₁' of F₁ = (x + 0.3)² for x ≤ 0, else (x - 0.2)² + 0.05: the lower minimum is the left one."""
    return torch.where(x <= 0, 2 * (x + 0.3), 2 * (x - 0.2))


def second_valley(x: Tensor) -> Tensor:
    """F₂' of F₂ = -40 x - 35.15 for x ≤ -0.9, else x³ + x sin 8x + 0.85."""
    return torch.where(x <= -0.9, torch.tensor(-40.0), 3 * x**2 + torch.sin(8 * x) + 8 * x * torch.cos(8 * x))


@pytest.mark.parametrize(
    ("gradient", "ours", "adams"), [(first_valley, -0.3001, 0.2001), (second_valley, -0.6430, 0.0001)]
)
def test_it_stays_in_the_deeper_valley_where_adam_leaves_it(
    gradient: Callable[[Tensor], Tensor], ours: float, adams: float
) -> None:
    start, settings = torch.full((1,), -1.0, dtype=torch.float64), {"lr": 0.1, "betas": (0.95, 0.999)}
    p, _ = stepped(start, gradient, 300, **settings)
    assert p.item() == pytest.approx(ours, abs=1e-4)
    w = start.clone()
    adam = torch.optim.Adam([w], **settings)
    for _ in range(300):
        w.grad = gradient(w)
        adam.step()
    assert w.item() == pytest.approx(adams, abs=1e-4)


def test_the_relative_friction_does_not_see_the_scale_of_the_loss() -> None:
    gradients = shrinking(10, 5)
    frictions = {}
    for kind in ("absolute", "relative"):
        frictions[kind] = []
        for scale in (1.0, 1e-3):
            scaled = [scale * g for g in gradients]
            p, optimizer = stepped(torch.zeros(5, dtype=torch.float64), scaled, 10, eps=0.0, friction=kind)
            frictions[kind].append(optimizer.diagnostics(p)["friction"])
    torch.testing.assert_close(*frictions["relative"], rtol=1e-13, atol=0)
    assert (frictions["absolute"][1] - 0.5).abs().max() < 1e-3 < (frictions["absolute"][0] - 0.5).abs().min()


@pytest.mark.parametrize("path", ["loop", "foreach", "blocks", "plain blocks"], indirect=True)
@pytest.mark.parametrize("settings", [{}, {"amsgrad": True, "weight_decay": 0.1}], ids=["plain", "amsgrad and decay"])
def test_complex_numbers_are_pairs_of_real_ones(settings: dict[str, Any], path: dict[str, Any]) -> None:
    gradients = shrinking(10, 5, 2)
    w = torch.linspace(-1, 2, 10, dtype=torch.float64).view(5, 2)
    pairs, observed_pairs = stepped(w, gradients, 10, **settings, **path)
    p, optimizer = stepped(
        torch.view_as_complex(w), [torch.view_as_complex(g) for g in gradients], 10, **settings, **path
    )
    assert torch.equal(torch.view_as_real(p), pairs)
    friction = optimizer.diagnostics(p)["friction"]
    assert torch.equal(friction, observed_pairs.diagnostics(pairs)["friction"])


def laid_out() -> Iterator[Tensor]:
    yield torch.linspace(-1, 1, 48, dtype=torch.float64).view(2, 3, 4, 2).to(memory_format=torch.channels_last)
    yield torch.linspace(-1, 1, 30, dtype=torch.float64).view(5, 6).t()
    yield torch.linspace(-1, 1, 60, dtype=torch.float64).view(6, 10)[:, ::2]
    yield torch.tensor(0.7, dtype=torch.float64)
    yield torch.zeros(0, 3, dtype=torch.float64)
    yield torch.linspace(-1, 1, 10)
    yield torch.linspace(-1, 1, 10).half()


@pytest.mark.parametrize(
    "path", ["foreach", "blocks", "plain blocks", pytest.param("fused", marks=pytest.mark.slow)], indirect=True
)
def test_layouts_shapes_and_dtypes_mix(path: dict[str, Any]) -> None:
    ends = []
    loop: dict[str, Any] = {"foreach": False}
    for settings in (loop, path):
        parameters = [*laid_out(), torch.ones(3)]
        optimizer = DiffGrad(parameters, lr=ETA, eps=1e-3, **settings)
        for t in range(5):
            for i, p in enumerate(parameters[:-1]):  # the last one never has a gradient
                p.grad = None if t % 2 and i == 1 else shrinking(5, *p.shape, seed=i)[t].to(p.dtype)
            optimizer.step()
        assert parameters[-1] not in optimizer.state
        assert optimizer.state[parameters[1]]["step"] == 3  # counted by parameter
        ends.append(parameters)
    for a, b in zip(*ends, strict=True):
        tolerance = 1e-13 if a.dtype == torch.float64 else 1e-3 if a.dtype == torch.float16 else 1e-6
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("path", ["loop", "foreach", "blocks", "plain blocks"], indirect=True)
def test_the_previous_gradient_may_be_kept_in_less(path: dict[str, Any]) -> None:
    gradients = [g.bfloat16().double() for g in shrinking(8, 7)]  # so that keeping them so changes nothing
    w = torch.linspace(-2, 3, 7, dtype=torch.float64)
    full, _ = stepped(w, gradients, 8, **path)
    p, optimizer = stepped(w, gradients, 8, previous_grad_dtype="bfloat16", **path)
    assert optimizer.state[p]["previous_grad"].dtype == torch.bfloat16
    torch.testing.assert_close(p, full, rtol=1e-15, atol=1e-15)
    rounded, _ = stepped(w, shrinking(8, 7), 8, previous_grad_dtype=torch.bfloat16, **path)
    exact, _ = stepped(w, shrinking(8, 7), 8, **path)
    assert 0 < (rounded - exact).abs().max() < 8 * ETA * 2**-8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_loaded_state_keeps_the_dtype_of_the_previous_gradient(dtype: torch.dtype) -> None:
    gradients = [g.float() for g in shrinking(6, 5)]
    ends = []
    for interrupted in (False, True):
        p = torch.linspace(-1, 1, 5)
        optimizer = DiffGrad([p], lr=ETA, previous_grad_dtype=dtype)
        for t, gradient in enumerate(gradients):
            if interrupted and t == 3:
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                optimizer = DiffGrad([p], lr=99.0, previous_grad_dtype=dtype)
                optimizer.load_state_dict(torch.load(file, weights_only=True))
            p.grad = gradient.clone()
            optimizer.step()
        assert optimizer.state[p]["previous_grad"].dtype == dtype
        ends.append(p)
    assert torch.equal(*ends)


def test_a_loaded_state_shares_no_memory_and_heeds_the_hooks() -> None:
    p, optimizer = stepped(torch.ones(3), [torch.ones(3)], 1)
    saved = copy.deepcopy(optimizer.state_dict())
    other = DiffGrad([p.clone()])

    def doubled(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict = copy.deepcopy(state_dict)
        state_dict["state"][0]["previous_grad"] *= 2
        return state_dict

    other.register_load_state_dict_pre_hook(doubled)
    other.load_state_dict(saved)
    [state] = other.state.values()
    assert torch.equal(state["previous_grad"], torch.full((3,), 2.0))
    state["previous_grad"].zero_()
    assert torch.equal(saved["state"][0]["previous_grad"], torch.ones(3))
    other.load_state_dict(saved)  # the hook of the first loading is gone, the user's is not
    assert len(other._optimizer_load_state_dict_pre_hooks) == 1


def test_an_older_state_is_completed() -> None:
    p, optimizer = stepped(torch.ones(3), [torch.ones(3)] * 2, 2)
    old = copy.deepcopy(optimizer.state_dict())
    for name in set(old["param_groups"][0]) - {"params", "lr", "betas", "eps", "weight_decay"}:
        del old["param_groups"][0][name]
    old["state"][0]["step"] = 2
    loaded = DiffGrad([p.clone()])
    loaded.load_state_dict(old)
    [state] = loaded.state.values()
    assert torch.equal(state["step"], torch.tensor(2.0))
    assert {**optimizer.param_groups[0], "params": 0} == {**loaded.param_groups[0], "params": 0}


def test_amsgrad_may_be_turned_on_and_off() -> None:
    p, optimizer = stepped(torch.ones(3), [torch.ones(3)] * 2, 2)
    for amsgrad in (True, False, True):
        optimizer.param_groups[0]["amsgrad"] = amsgrad
        optimizer.step()
    assert "max_exp_avg_sq" in optimizer.state[p]


@pytest.mark.parametrize("path", ["blocks", "loop", "foreach", "capturable"], indirect=True)
def test_the_learning_rate_may_be_a_tensor(path: dict[str, Any]) -> None:
    w, gradients = torch.linspace(-1, 1, 5, dtype=torch.float64), shrinking(5, 5)
    lr = torch.tensor([ETA], dtype=torch.float64)
    settings = {"weight_decay": 0.1, "decoupled_weight_decay": True, **path}
    a, b = stepped(w, gradients, 5, **settings)[0], stepped(w, gradients, 5, **{**settings, "lr": lr})[0]
    torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)
    assert lr.item() == ETA


def test_the_step_has_a_derivative_by_the_learning_rate() -> None:
    """Through three steps, against a difference quotient."""

    def end(lr: Tensor) -> Tensor:
        w = torch.linspace(-1, 1, 4, dtype=torch.float64).requires_grad_()
        p = w.clone()
        optimizer = DiffGrad([p], lr=lr, differentiable=True, amsgrad=True, weight_decay=0.1)
        for gradient in shrinking(3, 4):
            p.grad = gradient + p
            optimizer.step()
        return p.square().sum()

    assert torch.autograd.gradcheck(end, torch.tensor(0.1, dtype=torch.float64, requires_grad=True))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"lr": -1.0}, r"lr is -1\.0"),
    ({"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
    ({"betas": (1.0, 0.9)}, r"betas\[0\] is 1\.0"),
    ({"betas": (0.9, -0.1)}, r"betas\[1\] is -0\.1"),
    ({"betas": (0.9,)}, "betas is"),
    ({"eps": -1e-8}, "eps is"),
    ({"weight_decay": math.nan}, "weight_decay is nan"),
    ({"friction": "absolut"}, "friction is 'absolut'"),
    ({"previous_grad_dtype": "half16"}, "previous_grad_dtype is 'half16'"),
    ({"previous_grad_dtype": torch.int32}, "previous_grad_dtype is"),
    ({"fused": True, "foreach": True}, "fused is True"),
    ({"fused": True, "differentiable": True}, "fused is True"),
]


@pytest.mark.parametrize(("settings", "says"), WRONG, ids=lambda x: str(x))
def test_a_wrong_setting_is_named(settings: dict[str, Any], says: str) -> None:
    w = torch.ones(1)
    with pytest.raises(ValueError, match=says):
        DiffGrad([w], **settings)
    if len(settings) == 1:
        with pytest.raises(ValueError, match=says):
            DiffGrad([{"params": [w], **settings}])
        optimizer = DiffGrad([w])
        with pytest.raises(ValueError, match=says):
            optimizer.add_param_group({"params": [torch.ones(1)], **settings})
        assert len(optimizer.param_groups) == 1


def test_a_sparse_gradient_is_refused() -> None:
    w = torch.ones(3)
    w.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match=r"DiffGrad does not support sparse gradients"):
        DiffGrad([w]).step()


def test_a_graph_is_not_captured_without_capturable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    w = torch.ones(1)
    w.grad = torch.ones(1)
    with pytest.raises(RuntimeError, match="capturable=True"):
        DiffGrad([w]).step()
    DiffGrad([w], capturable=True).step()


def test_without_a_compiler_fused_is_the_default_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Callable[..., None]:
        def run(*_: Any) -> None:
            raise RuntimeError("no compiler")

        return run

    monkeypatch.setattr(torch, "compile", fail)
    monkeypatch.setattr(diffgrad_kernel, "_WORTH_A_KERNEL", 2)
    monkeypatch.setattr(diffgrad_kernel, "_kernel", compiled.FlatKernel(diffgrad_kernel.diffgrad_kernel))
    gradients, w = shrinking(3, 9), torch.linspace(-1, 1, 9, dtype=torch.float64)
    with pytest.warns(UserWarning, match="diffgrad_kernel could not be compiled") as caught:
        p, _ = stepped(w, gradients, 3, fused=True)
    assert len(caught) == 1
    assert torch.equal(p, stepped(w, gradients, 3)[0])


@pytest.mark.slow
def test_the_kernel_is_compiled_once_for_all_shapes_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(diffgrad_kernel, "_kernel", compiled.FlatKernel(diffgrad_kernel.diffgrad_kernel))
    parameters = [torch.ones(diffgrad_kernel._WORTH_A_KERNEL + n) for n in (0, 5, 1001)] + [torch.ones(100, 200)]
    optimizer = DiffGrad(parameters, fused=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t in range(4):
            optimizer.param_groups[0]["lr"] = 10.0**-t
            for p in parameters:
                p.grad = torch.ones_like(p)
            optimizer.step()
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("path", ALL_PATHS, indirect=True)
def test_a_graph_that_needs_the_weights_as_they_were_notices_the_step(path: dict[str, Any]) -> None:
    p = nn.Parameter(torch.ones(9))
    loss = p.square().sum()
    p.grad = torch.ones(9)
    with torch.no_grad():
        DiffGrad([p], **{**path, "differentiable": False}).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("settings", [{}, {"foreach": True}, {"capturable": True}], ids=str)
def test_a_compiled_step_is_one_graph_and_one_for_the_state(settings: dict[str, Any]) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    w = torch.linspace(-1, 1, 5, dtype=torch.float64)
    p, lr = w.clone(), torch.tensor(ETA, dtype=torch.float64)
    optimizer = DiffGrad([p], lr=lr, **settings)
    step = torch.compile(lambda: optimizer.step(), fullgraph=True, backend="eager")
    gradients = shrinking(6, 5)
    p.grad = torch.zeros_like(p)
    for gradient in gradients:
        p.grad.copy_(gradient)
        step()
        lr.mul_(0.5)  # as a scheduler does
    assert counters["stats"]["unique_graphs"] <= 2
    eager = w.clone()
    optimizer = DiffGrad([eager], lr=ETA)
    for t, gradient in enumerate(gradients):
        optimizer.param_groups[0]["lr"] = ETA * 0.5**t
        eager.grad = gradient
        optimizer.step()
    torch.testing.assert_close(p, eager, rtol=1e-13, atol=1e-13)

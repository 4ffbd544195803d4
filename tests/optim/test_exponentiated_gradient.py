"""Exponentiated gradient descent."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectral_callbacks.init import log_normal_weights_, split_bias
from spectral_callbacks.optim import ExponentiatedGradient
from spectral_callbacks.stability import NoThresholdError, edges
from tests.optim.golden import START, quartic_gradient

SETTINGS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.5},
    {"momentum": 0.9, "nesterov": True},
    {"weight_decay": 0.3},
    {"weight_decay": 0.3, "momentum": 0.9, "maximize": True},
    {"max_log_step": 0.02},
    {"temperature": 0.1, "seed": 3},
    {"lr": torch.tensor(0.05)},
]


def paper(w: Tensor, gradients: list[Tensor], lr: float, **settings: Any) -> Tensor:
    """The authors' loop (linclab/EG_optimiser, sgd_eg.py), with our clamp and the direction of `maximize`."""
    mu, damp = settings.get("momentum", 0.0), settings.get("dampening", 0.0)
    buffer = None
    for g in gradients:
        d = -g if settings.get("maximize") else g
        d = d + settings.get("weight_decay", 0.0) * torch.sign(w)
        if mu:
            buffer = d.clone() if buffer is None else mu * buffer + (1 - damp) * d
            d = d + mu * buffer if settings.get("nesterov") else buffer
        bound = settings.get("max_log_step", 0.3)
        w = w * torch.exp(torch.clip(-lr * torch.sign(w) * d, -bound, bound))
    return w


def leaves(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,), (), (2, 1, 3)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def train(
    parameters: list[Tensor], num_steps: int = 5, first: int = 0, optimizer: Any = None, **settings: Any
) -> torch.optim.Optimizer:
    """Step on gradients that are fixed by the step and the parameter."""
    optimizer = optimizer or ExponentiatedGradient(parameters, **{"lr": 0.05, **settings})
    for step in range(first, first + num_steps):
        for i, p in enumerate(parameters):
            p.grad = gradient(p, step, i)
        optimizer.step()
    return optimizer


def gradient(p: Tensor, step: int, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + index)
    return torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def test_golden_trajectory_of_the_quartic() -> None:
    w = START.clone().requires_grad_()
    optimizer = ExponentiatedGradient([w], lr=1e-2)
    seen = []
    for _ in range(10):
        w.grad = quartic_gradient(w.detach())
        optimizer.step()
        seen.append(w.detach().clone())
    step1 = [0.9753099120283326, -1.7916682705930564, 2.997001499500125, -3.9999997200000097]
    step10 = [0.8626110951827268, -1.1646690884831925, 2.970546070137109, -3.9999972000014834]
    torch.testing.assert_close(seen[0], torch.tensor(step1, dtype=torch.float64), rtol=1e-14, atol=0)
    torch.testing.assert_close(seen[9], torch.tensor(step10, dtype=torch.float64), rtol=1e-14, atol=0)


def test_a_constant_gradient_multiplies_by_an_exponential() -> None:
    w = torch.tensor([0.5, -0.5, 2.0], dtype=torch.float64, requires_grad=True)
    optimizer = ExponentiatedGradient([w], lr=0.1)
    for _ in range(10):
        w.grad = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
        optimizer.step()
    expected = torch.tensor([0.5 / math.e, -0.5 * math.e, 2 * math.e], dtype=torch.float64)
    torch.testing.assert_close(w.detach(), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("settings", [s for s in SETTINGS if "temperature" not in s and "lr" not in s], ids=str)
def test_every_step_is_that_of_the_paper(settings: dict[str, Any]) -> None:
    parameters = leaves()
    before = [p.detach().clone() for p in parameters]
    train(parameters, **settings)
    for i, (w, p) in enumerate(zip(before, parameters, strict=True)):
        expected = paper(w, [gradient(p, step, i) for step in range(5)], 0.05, **settings)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("path", ["foreach", "differentiable", "observed"])
def test_every_path_takes_the_same_steps(path: str, settings: dict[str, Any]) -> None:
    blocked, other = leaves(), leaves()
    train(blocked, foreach=False, **settings)
    if path == "observed":
        optimizer = ExponentiatedGradient(other, **{"lr": 0.05, **settings})
        optimizer.observe()
        train(other, optimizer=optimizer)
    elif path == "differentiable":
        other = [p.detach().clone() for p in other]
        train(other, differentiable=True, **settings)
    else:
        train(other, foreach=True, **settings)
    for a, b in zip(blocked, other, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-14, atol=0)


def test_blocks_and_odd_layouts_are_moved_whole() -> None:
    n = 2**18 + 3
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(n, generator=generator).requires_grad_()
    transposed = torch.randn(4, 3, generator=generator).t().requires_grad_()
    strided = torch.randn(6, 4, generator=generator)[::2].detach().requires_grad_()
    parameters = [w, transposed, strided]
    before = [p.detach().double() for p in parameters]
    gradients = [torch.randn(p.shape, generator=generator) for p in parameters]
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g.clone()
    ExponentiatedGradient(parameters, lr=0.1, momentum=0.5).step()
    for p, b, g in zip(parameters, before, gradients, strict=True):
        torch.testing.assert_close(p.detach(), paper(b, [g.double()], 0.1).float(), rtol=1e-6, atol=0)
        assert torch.equal(p.grad, g)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9, "nesterov": True}], ids=str)
def test_gradients_flow_through_the_step(settings: dict[str, Any]) -> None:
    def stepped(w: Tensor, g: Tensor, lr: Tensor) -> Tensor:
        p = w.clone()
        p.grad = g
        optimizer = ExponentiatedGradient([p], lr=lr, differentiable=True, max_log_step=math.inf, **settings)
        for _ in range(2):
            optimizer.step()
        return p

    w, g = leaves()[0], gradient(leaves()[0], 0, 0).requires_grad_()
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(stepped, (w, g, lr))


def test_decay_is_a_factor_a_step() -> None:
    w = torch.tensor([1.5, -0.25], dtype=torch.float64, requires_grad=True)
    optimizer = ExponentiatedGradient([w], lr=0.1, weight_decay=0.5)
    for _ in range(7):
        w.grad = torch.zeros(2, dtype=torch.float64)
        optimizer.step()
    expected = torch.tensor([1.5, -0.25], dtype=torch.float64) * math.exp(-7 * 0.1 * 0.5)
    torch.testing.assert_close(w.detach(), expected, rtol=1e-14, atol=0)


def test_no_step_is_longer_than_the_clamp_and_no_sign_flips() -> None:
    w = torch.tensor([1.0, -2.0], requires_grad=True)
    optimizer = ExponentiatedGradient([w], lr=100.0)
    w.grad = torch.tensor([1e30, 1e30])
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.tensor([math.exp(-0.3), -2 * math.exp(0.3)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_weight_neither_underflows_to_zero_nor_overflows(dtype: torch.dtype) -> None:
    range_ = torch.finfo(dtype)
    w = torch.tensor([range_.tiny, -range_.tiny, range_.max, -range_.max], dtype=dtype, requires_grad=True)
    before = w.detach().clone()
    w.grad = torch.tensor([1, -1, -1, 1], dtype=dtype)  # all outwards
    optimizer = ExponentiatedGradient([w], lr=0.3)
    optimizer.step()
    assert torch.equal(w.detach(), before)
    w.grad = -w.grad  # and they come back
    optimizer.step()
    torch.testing.assert_close(w.abs()[:2].float(), before.abs()[:2].float() * math.exp(0.3), rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_round_once_a_step(dtype: torch.dtype) -> None:
    parameters = leaves(dtype)
    before = [p.detach().clone() for p in parameters]
    train(parameters, num_steps=1, lr=0.2)
    for i, (b, p) in enumerate(zip(before, parameters, strict=True)):
        exact = paper(b.double(), [gradient(p, 0, i).double()], 0.2)
        error = (p.detach().double() - exact).abs() / exact.abs()
        assert error.max() <= torch.finfo(dtype).eps / 2 * 1.001


@pytest.mark.parametrize("wrong", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("names", [True, False])
def test_a_gradient_that_is_not_finite_stops_the_whole_step(wrong: float, names: bool) -> None:
    net = log_normal_weights_(nn.Linear(3, 2, bias=False))
    other = torch.ones(2, requires_grad=True)
    pairs: Any = [("net.weight", net.weight), ("other", other)] if names else [net.weight, other]
    optimizer = ExponentiatedGradient(pairs, momentum=0.9)
    before = net.weight.detach().clone()
    net.weight.grad, other.grad = torch.ones(2, 3), torch.tensor([1.0, wrong])
    with pytest.raises(RuntimeError, match="gradient of " + ("'other'" if names else r"parameter 1 of group 0 .*\(2,")):
        optimizer.step()
    assert torch.equal(net.weight, before)
    assert not optimizer.state
    other.grad = torch.ones(2)
    optimizer.step()
    assert not torch.equal(net.weight, before)


def test_a_zero_is_refused_with_its_name_and_the_remedy() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    with pytest.raises(ValueError, match=r"never moves a weight that is zero, and some are in '1\.bias'.*split_bias"):
        ExponentiatedGradient(net.named_parameters())
    with pytest.raises(ValueError, match=r"in parameter 3 of group 0 \(shape \(2,\)\)"):
        ExponentiatedGradient(net.parameters())
    ExponentiatedGradient(split_bias(net).named_parameters())


def test_a_group_with_a_zero_is_not_added() -> None:
    optimizer = ExponentiatedGradient([torch.ones(1, requires_grad=True)])
    with pytest.raises(ValueError, match="parameter 0 of group 1"):
        optimizer.add_param_group({"params": [torch.zeros(2, requires_grad=True)]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("renewed", [False, True])
def test_a_zero_that_was_loaded_later_is_refused_by_the_first_step(renewed: bool) -> None:
    w = torch.ones(2, requires_grad=True)
    optimizer = ExponentiatedGradient([w])
    w.grad = torch.ones(2)
    if renewed:
        optimizer.step()
        optimizer = copy.deepcopy(optimizer)
        [w] = optimizer.param_groups[0]["params"]
        w.grad = torch.ones(2)
    with torch.no_grad():
        w[1] = 0
    with pytest.raises(ValueError, match="never moves a weight that is zero"):
        optimizer.step()


def test_a_complex_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"trains real parameters, and parameter 0 .* is complex"):
        ExponentiatedGradient([torch.ones(2, dtype=torch.complex64)])


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": -1.0}, {"momentum": 1.0}, {"momentum": -0.1}, {"dampening": 1.0}, {"weight_decay": -1.0},
        {"max_log_step": 0.0}, {"temperature": -1.0}, {"seed": -1}, {"nesterov": True},
    ],
    ids=str,
)  # fmt: skip
def test_a_setting_out_of_its_range_is_refused_by_name(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=rf"^{name} is"):
        ExponentiatedGradient([torch.ones(1)], **settings)
    with pytest.raises(ValueError, match=rf"^{name} is"):
        ExponentiatedGradient([{"params": [torch.ones(1)], **settings}])


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"momentum": 0.9, "temperature": 0.1}], ids=str)
@pytest.mark.parametrize("way", ["weights_only", "deepcopy", "pickle"])
def test_a_resumed_run_is_bit_identical(way: str, settings: dict[str, Any]) -> None:
    whole, part = leaves(), leaves()
    train(whole, num_steps=9, **settings)
    optimizer = train(part, num_steps=4, **settings)
    if way == "weights_only":
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        optimizer = ExponentiatedGradient(part, lr=1.0)
        optimizer.load_state_dict(loaded)
    else:
        for p in part:
            p.grad = None
        again: Callable[[Any], Any] = copy.deepcopy if way == "deepcopy" else lambda o: pickle.loads(pickle.dumps(o))
        optimizer = again(optimizer)
        part = optimizer.param_groups[0]["params"]
    train(part, 5, first=4, optimizer=optimizer)
    assert all(torch.equal(a, b) for a, b in zip(whole, part, strict=True))


def test_state_holds_what_is_needed_and_no_more() -> None:
    cases: list[tuple[dict[str, Any], set[str]]] = [
        ({}, set()), ({"momentum": 0.9}, {"momentum_buffer"}), ({"temperature": 1.0}, {"step"}),
    ]  # fmt: skip
    for settings, names in cases:
        optimizer = train(leaves(), num_steps=1, **settings)
        assert {name for state in optimizer.state.values() for name in state} == names


def test_noise_samples_the_law_of_its_langevin_dynamics() -> None:
    """With g = sign(w) (ln |w| - m) the logarithm is an AR(1) of factor 1 - lr, of variance T / (1 - lr / 2)."""
    n, m, temperature, lr = 4000, 0.3, 0.4, 0.2
    w = torch.full((n,), math.exp(m), dtype=torch.float64)
    w[::2] *= -1
    w.requires_grad_()
    optimizer = ExponentiatedGradient([w], lr=lr, temperature=temperature, max_log_step=math.inf)
    state = torch.get_rng_state()
    samples = []
    for step in range(60):
        w.grad = w.detach().sign() * (w.detach().abs().log() - m)
        optimizer.step()
        if step >= 29 and step % 30 == 29:
            samples.append(w.detach().abs().log())
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.cat(samples)
    variance = temperature / (1 - lr / 2)
    assert abs(x.mean() - m) < 4 * math.sqrt(variance / len(x))
    assert abs(x.var() / variance - 1) < 4 * math.sqrt(2 / len(x))
    assert torch.equal(w.detach().sign(), torch.where(torch.arange(n) % 2 == 0, -1.0, 1.0).double())


def test_noise_differs_by_seed_step_and_parameter() -> None:
    def moves(seed: int) -> list[Tensor]:
        ps = [torch.ones(3, requires_grad=True) for _ in range(2)]
        optimizer = ExponentiatedGradient(ps, temperature=0.1, seed=seed)
        found = []
        for _ in range(2):
            for p in ps:
                p.grad = torch.zeros(3)
            before = [p.detach().clone() for p in ps]
            optimizer.step()
            found += [p.detach() / b for p, b in zip(ps, before, strict=True)]
        return found

    every = torch.stack(moves(0) + moves(1)).round(decimals=5)
    assert len(every.unique(dim=0)) == 8
    assert torch.equal(torch.stack(moves(0)), torch.stack(moves(0)))


def growth(settings: dict[str, Any], lr: float) -> float:
    """Return by what factor a perturbation of 1e-6 of the resting point grows from step 150 to step 450."""
    H, rest = problem()
    force = settings.get("weight_decay", 0.0) * rest.sign()  # of the decay, which the gradient balances at rest
    w = (rest * (1 + 1e-6 * torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64))).requires_grad_()
    optimizer = ExponentiatedGradient([w], lr=lr, **settings)
    sizes = []
    for step in range(451):
        w.grad = (H @ (w.detach() - rest) - force) * (-1 if settings.get("maximize") else 1)
        optimizer.step()
        if step in (150, 450):
            sizes.append((w.detach() - rest).norm().item())
    return sizes[1] / sizes[0]


def problem() -> tuple[Tensor, Tensor]:
    H = torch.tensor([[3.0, 0.5, -0.2], [0.5, 1.0, 0.3], [-0.2, 0.3, 0.4]], dtype=torch.float64)
    return H, torch.tensor([0.7, -1.3, 2.0], dtype=torch.float64)


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.5, "dampening": 0.5},
        {"weight_decay": 0.4}, {"weight_decay": 0.4, "momentum": 0.9}, {"maximize": True}, {"dampening": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_the_edge_of_its_stability_rule_is_where_training_turns(settings: dict[str, Any]) -> None:
    H, rest = problem()
    [[edge]] = edges(ExponentiatedGradient([rest], lr=1.0, **settings))
    assert edge.preconditioner is not None
    root = edge.preconditioner.sqrt()
    at_edge = edge.threshold / torch.linalg.eigvalsh(root[:, None] * H * root)[-1].item()
    assert edge.ascends == settings.get("maximize", False)
    assert growth(settings, at_edge * (1 - 1e-3)) < 0.9
    assert growth(settings, at_edge * (1 + 1e-3)) > 1.1


def test_the_edge_is_in_the_metric_of_the_magnitudes() -> None:
    w = torch.tensor([0.5, -2.0])
    [[edge]] = edges(ExponentiatedGradient([w], lr=0.3, momentum=0.5, weight_decay=0.1))
    assert torch.equal(edge.preconditioner, w.abs())  # pyright: ignore[reportArgumentType]
    assert (edge.threshold, edge.learning_rate, edge.shift, edge.weight_decay) == (3.0, 0.3, 0.0, 0.0)


def test_diagnostics_of_signs_magnitudes_and_the_last_step() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(2000, generator=generator).mul(0.5).exp().requires_grad_()
    optimizer = ExponentiatedGradient([w], lr=0.1)
    assert "sign_flips" not in optimizer.diagnostics(w)
    optimizer.observe()
    w.grad = torch.linspace(-2, 1, 2000)
    optimizer.step()
    found = {name: value.item() for name, value in optimizer.diagnostics(w).items()}
    assert found["sign_flips"] == 0
    assert found["zero_share"] == 0
    assert found["max_log_step"] == pytest.approx(0.2)
    logarithms = w.detach().abs().log()
    assert found["log_abs_mean"] == pytest.approx(logarithms.mean().item(), abs=1e-6)
    assert found["log_abs_std"] == pytest.approx(logarithms.std(correction=0).item(), rel=1e-5)
    assert found["log_normality"] < 0.03
    with torch.no_grad():
        w[:3] *= -1
        w[3] = 0
    later = optimizer.diagnostics(w)
    assert (later["sign_flips"].item(), later["zero_share"].item()) == (4, pytest.approx(1 / 2000, abs=1e-6))
    with torch.no_grad():
        w.copy_(torch.linspace(1, 2, 2000).exp())  # uniform logarithms are 0.058 from a normal law
    assert optimizer.diagnostics(w)["log_normality"].item() == pytest.approx(0.0572, abs=1e-3)
    assert "observations" not in str(optimizer.state_dict())


def test_no_ratio_is_claimed_after_step_is_overridden() -> None:
    class Other(ExponentiatedGradient):
        def step(self, closure: Any = None) -> Any:
            return None

    with pytest.raises(NoThresholdError):
        edges(Other([torch.ones(1)]))

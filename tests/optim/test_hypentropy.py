"""Mirror descent by the hypentropy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from spectral_callbacks.optim import ExponentiatedGradient, HypentropyGD
from spectral_callbacks.stability import edges
from tests.optim.golden import START, quartic_gradient

SETTINGS = [
    {},
    {"weight_decay": 0.3},
    {"maximize": True},
    {"beta": 0.1},
    {"max_log_step": 0.02},
    {"lr": torch.tensor(0.05)},
]
OF_THE_PAPER = SETTINGS[:-1]


def paper(w: Tensor, gradients: list[Tensor], lr: float, **settings: Any) -> Tensor:
    """The mirror step itself, with our clamp."""
    beta, bound = settings.get("beta", 1.0), settings.get("max_log_step", 0.3)
    for g in gradients:
        g = (-g if settings.get("maximize") else g) + settings.get("weight_decay", 0.0) * w
        w = beta * torch.sinh(torch.asinh(w / beta) - torch.clip(lr * g, -bound, bound))
    return w


def leaves() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,), (), (2, 1, 3)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def gradients(p: Tensor, num_steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(p.numel())
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64) for _ in range(num_steps)]


def train(parameters: list[Tensor], num_steps: int = 5, **settings: Any) -> HypentropyGD:
    optimizer = HypentropyGD(parameters, **{"lr": 0.05, **settings})
    for step in range(num_steps):
        for p in parameters:
            p.grad = gradients(p, num_steps)[step]
        optimizer.step()
    return optimizer


def test_golden_trajectory_of_the_quartic() -> None:
    """c = 1/4 in the two-weight form is β = 1 here."""
    w = START.clone().requires_grad_()
    optimizer = HypentropyGD([w], lr=1e-2, beta=1.0)
    seen = []
    for _ in range(10):
        w.grad = quartic_gradient(w.detach())
        optimizer.step()
        seen.append(w.detach().clone())
    step1 = [0.964953494254144, -1.7656483936301217, 2.9968392218129107, -3.999999711382616]
    step10 = [0.8152910584107779, -1.1080255778529837, 2.968967439631268, -3.999997113827581]
    torch.testing.assert_close(seen[0], torch.tensor(step1, dtype=torch.float64), rtol=1e-14, atol=0)
    torch.testing.assert_close(seen[9], torch.tensor(step10, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("settings", OF_THE_PAPER, ids=str)
def test_every_step_is_the_mirror_step(settings: dict[str, Any]) -> None:
    parameters = leaves()
    before = [p.detach().clone() for p in parameters]
    train(parameters, **settings)
    for w, p in zip(before, parameters, strict=True):
        torch.testing.assert_close(p.detach(), paper(w, gradients(p, 5), 0.05, **settings), rtol=1e-13, atol=1e-15)


def test_two_exponentiated_weights_of_opposite_signs_are_one_hypentropy_weight() -> None:
    """EG± steps u and -v; their product keeps its value c, and β = 2√c."""
    [w, *_] = leaves()
    c = 0.3
    u = ((w.detach().square() + 4 * c).sqrt() + w.detach()) / 2
    v = u - w.detach()
    u.requires_grad_()
    minus_v = (-v).requires_grad_()
    pair = ExponentiatedGradient([u, minus_v], lr=0.05)
    one = HypentropyGD([w], lr=0.05, beta=2 * math.sqrt(c))
    for g in gradients(w, 50):
        u.grad, minus_v.grad, w.grad = g, g, g
        pair.step()
        one.step()
        torch.testing.assert_close((u + minus_v).detach(), w.detach(), rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(-(u * minus_v).detach(), torch.full_like(u, c), rtol=1e-12, atol=0)


def test_large_weights_move_by_factors_and_small_ones_by_sums() -> None:
    large, small = torch.tensor([1e6, -1e6]).double(), torch.tensor([1e-6, 0.0]).double()
    w = torch.cat([large, small]).requires_grad_()
    w.grad = torch.tensor([1.0, 1.0, 1e-5, 1e-5], dtype=torch.float64)
    HypentropyGD([w], lr=0.1, beta=2.0).step()
    expected = torch.cat([large * torch.tensor([math.exp(-0.1), math.exp(0.1)]).double(), small - 0.1 * 2.0 * 1e-5])
    torch.testing.assert_close(w.detach(), expected, rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("path", ["foreach", "differentiable"])
def test_every_path_takes_the_same_steps(path: str, settings: dict[str, Any]) -> None:
    blocked, other = leaves(), leaves()
    train(blocked, foreach=False, **settings)
    if path == "differentiable":
        other = [p.detach().clone() for p in other]
    train(other, **{path: True}, **settings)
    for a, b in zip(blocked, other, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-13, atol=1e-15)


def test_gradients_flow_through_the_step() -> None:
    def stepped(w: Tensor, g: Tensor, lr: Tensor) -> Tensor:
        p = w.clone()
        p.grad = g
        HypentropyGD([p], lr=lr, weight_decay=0.1, differentiable=True, max_log_step=math.inf).step()
        return p

    [w, *_] = leaves()
    g, lr = gradients(w, 1)[0].requires_grad_(), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(stepped, (w, g, lr))


def test_without_a_gradient_no_bit_moves() -> None:
    w = torch.randn(1000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    before = w.detach().clone()
    w.grad = torch.zeros(1000)
    HypentropyGD([w], lr=0.1, beta=0.3).step()
    assert torch.equal(w.detach(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_round_once_a_step(dtype: torch.dtype) -> None:
    w = torch.randn(100, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    g = torch.randn(100, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = paper(w.detach().double(), [g.double()], 0.2)
    w.grad = g
    HypentropyGD([w], lr=0.2).step()
    spacing = torch.finfo(dtype).eps * exact.abs().clamp(min=1e-2)
    assert ((w.detach().double() - exact).abs() <= spacing / 2 * 1.01).all()


def test_a_gradient_that_is_not_finite_stops_the_whole_step() -> None:
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = HypentropyGD([a, b])
    a.grad, b.grad = torch.ones(2), torch.tensor([0.0, math.inf])
    with pytest.raises(RuntimeError, match=r"took no step: the gradient of parameter 1 of group 0"):
        optimizer.step()
    assert torch.equal(a.detach(), torch.ones(2))


@pytest.mark.parametrize(
    "settings", [{"lr": -1.0}, {"beta": 0.0}, {"weight_decay": -1.0}, {"max_log_step": 0.0}], ids=str
)
def test_a_setting_out_of_its_range_is_refused_by_name(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=rf"^{name} is"):
        HypentropyGD([torch.ones(1)], **settings)


def test_it_keeps_no_state() -> None:
    assert not train(leaves()).state


@pytest.mark.parametrize("settings", [{}, {"beta": 0.2}, {"weight_decay": 0.4}, {"maximize": True}], ids=str)
def test_the_edge_of_its_stability_rule_is_where_training_turns(settings: dict[str, Any]) -> None:
    H = torch.tensor([[3.0, 0.5, -0.2], [0.5, 1.0, 0.3], [-0.2, 0.3, 0.4]], dtype=torch.float64)
    rest = torch.tensor([0.7, -1.3, 0.01], dtype=torch.float64)
    [[edge]] = edges(HypentropyGD([rest], lr=1.0, **settings))
    assert edge.preconditioner is not None
    root = edge.preconditioner.sqrt()
    decayed = H + edge.weight_decay * torch.eye(3)
    at_edge = edge.threshold / torch.linalg.eigvalsh(root[:, None] * decayed * root)[-1].item()
    assert edge.ascends == settings.get("maximize", False)

    def growth(lr: float) -> float:
        w = (rest + 1e-6 * torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)).requires_grad_()
        optimizer = HypentropyGD([w], lr=lr, **settings)
        sizes = []
        for step in range(451):
            force = settings.get("weight_decay", 0.0) * rest  # of the decay, which the gradient balances at rest
            w.grad = (H @ (w.detach() - rest) - force) * (-1 if settings.get("maximize") else 1)
            optimizer.step()
            if step in (150, 450):
                sizes.append((w.detach() - rest).norm().item())
        return sizes[1] / sizes[0]

    assert growth(at_edge * (1 - 1e-3)) < 0.9
    assert growth(at_edge * (1 + 1e-3)) > 1.1


def test_diagnostics_tell_which_weights_move_by_factors() -> None:
    w = torch.tensor([0.1, -0.2, 3.0, -4.0])
    assert HypentropyGD([w], beta=1.0).diagnostics(w)["multiplicative_share"].item() == 0.5

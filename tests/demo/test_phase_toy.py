"""The toy of three phases."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from spectral_callbacks.demo import PhaseToy
from tests.callbacks.runs import make_trainer

SKEWED = (40, 20, 13, 10, 8, 7, 6, 5)


def toy(seed: int = 0, **options: Any) -> PhaseToy:
    torch.manual_seed(seed)
    return PhaseToy(**options)


def factors(module: PhaseToy) -> tuple[Tensor, Tensor]:
    """Representations (N, d) and head (d, k)."""
    return module.encoder.weight.detach().T.clone(), module.head.weight.detach().T.clone()


def descend(F: Tensor, W: Tensor, counts: tuple[int, ...], num_steps: int) -> tuple[Tensor, Tensor]:
    """Gradient descent on both at once, the derivative of the summed cross-entropy written out."""
    classes = torch.cat([torch.full((count,), c) for c, count in enumerate(counts)])
    one_hot = torch.nn.functional.one_hot(classes).double()
    lr = 0.5 / math.sqrt(len(classes))
    for _ in range(num_steps):
        error = torch.softmax(F @ W, 1) - one_hot
        F, W = F - lr * error @ W.T, W - lr * F.T @ error
    return F, W


def effective_rank(F: Tensor) -> float:
    shares = torch.linalg.svdvals(F - F.mean(0)).square()
    shares = shares / shares.sum()
    return math.exp(-(shares * shares.log()).sum().item())


@pytest.mark.parametrize(("counts", "width"), [(SKEWED, 3), ((4, 4, 4), 2)], ids=["skewed", "uniform"])
def test_a_trainer_takes_the_steps_that_are_written_out(counts: tuple[int, ...], width: int) -> None:
    module = toy(counts=counts, width=width, steps_per_epoch=7)
    F, W = descend(*factors(module), counts, 20)
    make_trainer(max_steps=20, max_epochs=-1).fit(module)
    torch.testing.assert_close(factors(module), (F, W), rtol=1e-12, atol=1e-14)


def test_the_logged_loss_is_the_mean_of_the_samples() -> None:
    module = toy(steps_per_epoch=1)
    inputs, classes = next(iter(module.train_dataloader()))
    expected = torch.nn.functional.cross_entropy(module(inputs), classes).item()
    trainer = make_trainer(max_steps=1, max_epochs=-1)
    trainer.fit(module)
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(expected)


def test_the_encoder_gives_each_sample_a_representation_of_its_own() -> None:
    module = toy(counts=(3, 2), width=2)
    inputs, classes = next(iter(module.train_dataloader()))
    assert torch.equal(module.encoder(inputs), factors(module)[0])
    assert classes.tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_effective_rank_of_skewed_classes_falls_and_rises(seed: int) -> None:
    F, W = factors(toy(seed))
    ranks = [effective_rank(F)]
    for num_steps in (20, 480):
        F, W = descend(F, W, SKEWED, num_steps)
        ranks.append(effective_rank(F))
    assert ranks[1] < ranks[0] - 0.2
    assert ranks[2] > ranks[1] + 0.2


def test_it_falls_once_more_in_the_draw_of_the_config() -> None:
    F, W = factors(toy(167))
    ranks = [effective_rank(F)]
    for num_steps in (20, 43, 937):
        F, W = descend(F, W, SKEWED, num_steps)
        ranks.append(effective_rank(F))
    assert ranks == pytest.approx([2.882, 2.429, 2.954, 2.919], abs=2e-3)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_that_of_four_equal_classes_in_the_plane_ends_at_two(seed: int) -> None:
    counts = (18, 18, 18, 18)
    F, _ = descend(*factors(toy(seed, counts=counts, width=2)), counts, 1000)
    assert effective_rank(F) == pytest.approx(2, abs=2e-3)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"counts": [5]}, r"counts=\[5\] must name two classes or more"),
    ({"counts": [5, 0]}, r"counts=\[5, 0\] must name two classes or more, each with a sample"),
    ({"width": 0}, r"width=0 must be at least 1"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=["one class", "an empty class", "width"])
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PhaseToy(**options)

"""Digits learned by exponentiated gradient descent."""

from __future__ import annotations

import pytest
import torch

from spectral_callbacks.demo import Classifier, DaleClassifier, DigitsDataModule
from spectral_callbacks.optim import ExponentiatedGradient


def train(model: Classifier, optimizer: torch.optim.Optimizer, seed: int, num_epochs: int = 30) -> tuple[float, int]:
    """Return the test accuracy, and the number of weights whose sign differs at some step from that at the start."""
    data = DigitsDataModule(batch_size=64, num_train=1437, seed=seed)
    data.setup("fit")
    signs = [p.detach().sign() for p in model.parameters()]
    flipped = [torch.zeros_like(s, dtype=torch.bool) for s in signs]
    loader = data.train_dataloader()
    for _ in range(num_epochs):
        for x, y in loader:
            optimizer.zero_grad()
            model.loss(model(x), y).backward()
            optimizer.step()
            for flip, sign, p in zip(flipped, signs, model.parameters(), strict=True):
                flip |= p.detach().sign() != sign
    ((x, y),) = list(data.val_dataloader())
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item(), sum(int(flip.sum()) for flip in flipped)


@pytest.mark.parametrize("same_sign_inputs", [False, True])
def test_no_weight_is_zero_and_signs_follow_the_law(same_sign_inputs: bool) -> None:
    model = DaleClassifier(widths=[16], same_sign_inputs=same_sign_inputs)
    assert not any((p == 0).any() for p in model.parameters())
    agree = all((p.sign() == p.sign()[:1]).all() for p in model.parameters() if p.ndim == 2)
    assert agree == same_sign_inputs
    assert model.hparams["same_sign_inputs"] == same_sign_inputs
    assert model.hparams["widths"] == [16]


def test_it_learns_in_two_epochs_without_a_sign_flip() -> None:
    model = DaleClassifier()
    accuracy, flips = train(model, ExponentiatedGradient(model.parameters(), momentum=0.9), seed=0, num_epochs=2)
    assert accuracy > 0.8
    assert flips == 0


@pytest.mark.slow
def test_exponentiated_gradient_is_within_two_points_of_sgd_and_flips_no_sign() -> None:
    accuracies, of_sgd = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        model = DaleClassifier()
        accuracy, flips = train(model, ExponentiatedGradient(model.parameters(), lr=0.3, momentum=0.9), seed)
        assert flips == 0
        accuracies.append(accuracy)
        torch.manual_seed(seed)
        plain = Classifier([128, 128], "relu")
        accuracy, flips = train(plain, torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9), seed)
        assert flips > 0  # what is counted can be seen
        of_sgd.append(accuracy)
    assert sum(accuracies) / 3 > sum(of_sgd) / 3 - 0.02
    assert min(accuracies) > 0.94

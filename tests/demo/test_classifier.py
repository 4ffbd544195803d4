"""The demo's network and losses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spectral_callbacks.demo import Classifier
from spectral_callbacks.demo.classifier import squared_loss


def test_squared_loss_is_half_the_mean_squared_distance_to_the_one_hot_targets() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(7, 3, dtype=torch.float64, generator=generator)
    targets = torch.randint(3, (7,), generator=generator)
    total = 0.0
    for row, target in zip(outputs.tolist(), targets.tolist(), strict=True):
        total += sum((value - (column == target)) ** 2 for column, value in enumerate(row)) / 2
    torch.testing.assert_close(squared_loss(outputs, targets).item(), total / 7, rtol=1e-12, atol=0)


def test_hessian_of_squared_loss_in_the_outputs_is_the_identity_over_the_number_of_samples() -> None:
    outputs = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 2, 1, 1])
    hessian = torch.autograd.functional.hessian(lambda f: squared_loss(f, targets), outputs)
    torch.testing.assert_close(torch.as_tensor(hessian).reshape(12, 12), torch.eye(12, dtype=torch.float64) / 4)


@pytest.mark.parametrize(("activation", "kind"), [("tanh", nn.Tanh), ("relu", nn.ReLU), ("gelu", nn.GELU)])
def test_every_hidden_layer_has_its_width_and_is_followed_by_the_activation(
    activation: str, kind: type[nn.Module]
) -> None:
    model = Classifier(widths=[5, 7], activation=activation, num_features=3, num_classes=2)  # pyright: ignore[reportArgumentType]
    assert [tuple(p.shape) for p in model.net.parameters() if p.ndim == 2] == [(5, 3), (7, 5), (2, 7)]
    assert [type(layer) for layer in model.net] == [nn.Linear, kind, nn.Linear, kind, nn.Linear]


def test_no_hidden_layer_is_a_linear_classifier() -> None:
    assert [type(layer) for layer in Classifier(widths=[]).net] == [nn.Linear]


def test_an_unknown_activation_or_loss_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"activation='sine' must be one of 'tanh', 'relu', 'gelu'"):
        Classifier(activation="sine")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"loss='hinge' must be one of 'cross_entropy', 'squared'"):
        Classifier(loss="hinge")  # pyright: ignore[reportArgumentType]

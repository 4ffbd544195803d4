"""A multilayer perceptron that classifies vectors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["tanh", "relu", "gelu"]
Loss = Literal["cross_entropy", "squared"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}
_FALLBACK_LR = 0.1


def squared_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over the samples of half the squared distance to the one-hot target.

    For outputs f_i and one-hot targets y_i this is 1/(2n) Σ_i ‖f_i - y_i‖², so that the Hessian in the outputs of one
    sample is the identity over n.

    Args:
        outputs: Scores, (n, c).
        targets: Classes, (n,), from 0 to c - 1.

    Returns:
        The loss, ().

    Example:
        >>> squared_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([0]))
        tensor(2.)
    """
    one_hot = F.one_hot(targets, outputs.shape[1]).to(outputs.dtype)
    return (outputs - one_hot).square().sum(1).mean() / 2


_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cross_entropy": F.cross_entropy, "squared": squared_loss}


class Classifier(pl.LightningModule):
    """A multilayer perceptron; logs loss and accuracy as `train/...` and `val/...`.

    A batch begins with inputs (n, num_features) and classes (n,); what comes after these is not looked at.

    Args:
        widths: Number of units of each hidden layer.
        activation: What follows each hidden layer.
        loss: "cross_entropy", or "squared" for `squared_loss`, whose sharpness stays at the edge of stability under
            full-batch gradient descent. Cross-entropy loses its curvature as it separates the classes.
        num_features: Length of an input vector.
        num_classes: Number of classes.

    Example:
        >>> Classifier(widths=[32], loss="squared")(torch.zeros(5, 64)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        widths: Sequence[int] = (100, 100),
        activation: Activation = "tanh",
        loss: Loss = "cross_entropy",
        num_features: int = 64,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        if activation not in get_args(Activation):
            raise ValueError(f"activation={activation!r} must be one of {', '.join(map(repr, get_args(Activation)))}.")
        if loss not in get_args(Loss):
            raise ValueError(f"loss={loss!r} must be one of {', '.join(map(repr, get_args(Loss)))}.")
        self.save_hyperparameters()
        self.loss = _LOSSES[loss]
        sizes = [num_features, *widths]
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), _ACTIVATIONS[activation]()]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of a batch, (n, features) -> (n, classes)."""
        return self.net(x)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return self._evaluate(batch, "train")

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Log the loss and the accuracy of a batch."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Log the loss and the accuracy of a batch."""
        self._evaluate(batch, "test")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD with learning rate 0.1; the `optimizer` section of a config takes its place."""
        return torch.optim.SGD(self.parameters(), lr=_FALLBACK_LR)

    def _evaluate(self, batch: Sequence[Tensor], stage: str) -> Tensor:
        x, y = batch[:2]
        outputs = self(x)
        loss = self.loss(outputs, y)
        accuracy = (outputs.argmax(1) == y).float().mean()
        self.log_dict({f"{stage}/loss": loss, f"{stage}/accuracy": accuracy}, batch_size=len(y))
        return loss

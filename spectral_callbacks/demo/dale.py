"""A classifier that multiplicative updates can train."""

from __future__ import annotations

from collections.abc import Sequence

from spectral_callbacks.demo.classifier import Activation, Classifier, Loss
from spectral_callbacks.init import log_normal_weights_, split_bias


class DaleClassifier(Classifier):
    """A `Classifier` without a zero: log-normal weights, and each bias a sum of a positive and a negative part.

    Under `ExponentiatedGradient` no weight ever changes its sign. As its biases are parametrized, it is not pickled,
    so that processes have to be started by a script ("ddp"), not spawned.

    Args:
        widths: Number of units of each hidden layer.
        activation: What follows each hidden layer.
        loss: See `Classifier`.
        num_features: Length of an input vector.
        num_classes: Number of classes.
        same_sign_inputs: Whether every unit excites all units of the next layer or inhibits all, as by Dale's law;
            otherwise each weight has a sign of its own.

    Example:
        >>> model = DaleClassifier(widths=[32])
        >>> any(bool((p == 0).any()) for p in model.parameters())
        False
    """

    def __init__(
        self,
        widths: Sequence[int] = (128, 128),
        activation: Activation = "relu",
        loss: Loss = "cross_entropy",
        num_features: int = 64,
        num_classes: int = 10,
        same_sign_inputs: bool = False,
    ) -> None:
        super().__init__(widths, activation, loss, num_features, num_classes)
        self.save_hyperparameters()
        log_normal_weights_(self, same_sign_inputs=same_sign_inputs)
        split_bias(self)

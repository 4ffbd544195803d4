"""The loss that is differentiated: the module's training step run again, or a function of the user's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from spectral_callbacks.callbacks.batches import FrozenBatch
from spectral_callbacks.callbacks.muting import Precision, precision_of

Loss = Callable[[pl.LightningModule, Any], Tensor]


def loss_of(trainer: pl.Trainer, loss: Loss | None, precision: Precision) -> Callable[[Any, FrozenBatch], Tensor]:
    """Return the function of module and frozen batch that a probe differentiates.

    The precision is that of the loss alone: under autocast the inner products of an eigenvalue search are wrong.
    """

    def in_precision(module: Any, frozen: FrozenBatch) -> Tensor:
        with precision_of(trainer, precision):
            return training_loss(module, frozen) if loss is None else own_loss(loss, module, frozen)

    return in_precision


def own_loss(loss: Loss, module: pl.LightningModule, frozen: FrozenBatch) -> Tensor:  # ()
    """Call a loss of the user's.

    Raises:
        ValueError: If it returns no tensor.
    """
    value = loss(module, frozen.batch)
    if not isinstance(value, Tensor):
        raise ValueError(f"loss= returned {type(value).__name__}; return a scalar Tensor.")
    return value


def training_loss(module: pl.LightningModule, frozen: FrozenBatch) -> Tensor:  # ()
    """Run the module's training step again and return its loss.

    Raises:
        ValueError: If the training step returns no loss.
    """
    arguments = [frozen.batch]
    if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2):
        arguments.append(frozen.batch_idx)
    output = module.training_step(*arguments)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"training_step returned {type(output).__name__} without a loss; return a scalar Tensor, or pass loss=."
        )
    return loss


def fetches_batches(module: pl.LightningModule) -> bool:
    """Return whether the training step takes the loader's iterator, so that running it again would eat batches."""
    return is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True)

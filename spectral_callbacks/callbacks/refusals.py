"""Refusals: runs that a diagnostic cannot be taken of, and why."""

from __future__ import annotations

import lightning.pytorch as pl

from spectral_callbacks.callbacks.batches import Data
from spectral_callbacks.callbacks.loss import Loss, fetches_batches


def refusal(trainer: pl.Trainer, module: pl.LightningModule, *, optimizer: int) -> str | None:
    """Return why a run cannot be measured at all, or None."""
    if trainer.world_size > 1:
        return (
            f"this diagnostic does not run on several processes yet, and the trainer has {trainer.world_size}. "
            "Use devices=1 for a run that is measured."
        )
    if optimizer >= len(trainer.optimizers):
        return f"optimizer={optimizer}, but the module configures {len(trainer.optimizers)}. Pass an index below that."
    owned = {id(p) for group in trainer.optimizers[optimizer].param_groups for p in group["params"]}
    if not any(id(p) in owned for p in module.parameters()):
        return f"optimizer {optimizer} holds no parameter of the module, so it trains nothing to be measured."
    return None


def refusal_of_loss(module: pl.LightningModule, loss: Loss | None) -> str | None:
    """Return why the loss cannot be run again, or None."""
    if loss is None and not module.automatic_optimization:
        return (
            "under manual optimization training_step steps the optimizers itself and is not run again. Pass "
            "loss=(pl_module, batch) -> scalar Tensor."
        )
    return None


def refusal_of_batches(module: pl.LightningModule, *, loss: Loss | None, data: Data) -> str | None:
    """Return why there are no batches to be measured on, or None."""
    if fetches_batches(module) and (loss is None or data in ("fixed", "current")):
        return (
            "training_step fetches its own batches (dataloader_iter), so it is not run again and none is at hand. "
            "Pass loss=, and a DataLoader as data=."
        )
    return None

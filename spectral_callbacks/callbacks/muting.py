"""The Lightning half of isolation: what a training step says is not heard, and its precision is chosen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger

Precision = Literal["full", "training"]
_MUTED = ("log", "log_dict", "print")


@contextlib.contextmanager
def muted(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """Let `log`, `log_dict`, `print` and every logger of the module do nothing."""
    loggers = trainer.loggers
    own = {name: module.__dict__[name] for name in _MUTED if name in module.__dict__}
    trainer.loggers = [DummyLogger() for _ in loggers]
    module.__dict__.update(dict.fromkeys(_MUTED, _ignore))
    try:
        yield
    finally:
        for name in _MUTED:
            del module.__dict__[name]
        module.__dict__.update(own)
        trainer.loggers = loggers


@contextlib.contextmanager
def precision_of(trainer: pl.Trainer, precision: Precision) -> Iterator[None]:
    """Enter the forward context of training, with autocast on ("training") or off ("full")."""
    device_type = trainer.strategy.root_device.type
    with trainer.precision_plugin.forward_context():
        if precision == "training":
            yield
        else:
            with torch.autocast(device_type, enabled=False):
                yield


def _ignore(*args: Any, **kwargs: Any) -> None:
    del args, kwargs

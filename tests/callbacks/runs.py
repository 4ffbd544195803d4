"""Small runs that the tests of the callbacks share."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from spectral_callbacks.callbacks import SpectralCallback

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def sgd(lr: float = 0.1, **options: Any) -> MakeOptimizer:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, **options)


def samples(num_samples: int = 32, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_samples, 3, generator=generator)
    return TensorDataset(x, torch.stack([x.prod(1).tanh(), x.sum(1).sin()], dim=1))


def loader(num_samples: int = 32, batch_size: int = 8, **options: Any) -> DataLoader[Any]:
    return DataLoader(samples(num_samples), batch_size=batch_size, **options)


class Regression(pl.LightningModule):
    """A smooth net small enough for a dense Hessian: 26 parameters."""

    def __init__(self, optimizer: MakeOptimizer = sgd()) -> None:  # noqa: B008
        super().__init__()
        self.net: nn.Sequential = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.make_optimizer = optimizer
        self.num_runs = 0

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (self.net(x) - y).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=False)
        return loss

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


def plain_loss(module: pl.LightningModule, batch: Any) -> Tensor:
    """A loss= that repeats `Regression`'s."""
    assert isinstance(module, Regression)
    return module.loss(batch)


def make_trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        },
        callbacks=list(callbacks),
    )


def fit(
    module: pl.LightningModule,
    *callbacks: pl.Callback,
    data: Iterable[Any] | None = None,
    ckpt_path: str | None = None,
    **options: Any,
) -> pl.Trainer:
    """Train on four batches, or on those given."""
    trainer = make_trainer(*callbacks, **options)
    trainer.fit(module, loader() if data is None else data, ckpt_path=ckpt_path)
    return trainer


def steps(callback: SpectralCallback) -> list[float]:
    return [entry["step"] for entry in callback.history]


def series(callback: SpectralCallback, tag: str) -> list[float]:
    return [entry[tag] for entry in callback.history]


class Watch(pl.Callback):
    """Calls a function before every batch, once all spectral callbacks before it in the list have measured."""

    def __init__(self, see: Callable[[pl.Trainer, pl.LightningModule, Any], None]) -> None:
        self.see = see

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.see(trainer, pl_module, batch)


def complaints(warned: Iterable[warnings.WarningMessage]) -> list[str]:
    """Return what spectral callbacks said, without Lightning's own warnings."""
    return [str(w.message) for w in warned if re.match(r"\w+\('[\w/.-]+'\): ", str(w.message))]

"""A net that does in its training step all that users do."""

from __future__ import annotations

import collections
import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

NUM_CLASSES = 3


class Meter:
    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def update(self, value: float) -> None:
        self.total += value
        self.count += 1


class Everything(pl.LightningModule):
    """Convolution, batch norm, LSTM, transformer, dropout, spectral norm, metrics, random numbers and state."""

    def __init__(self, optimizer: str = "SGD") -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2))
        self.lstm = nn.LSTM(16, 8, batch_first=True)
        layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=8, dropout=0.2, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.last = nn.utils.parametrizations.spectral_norm(nn.Linear(8, NUM_CLASSES))
        self.head = nn.Sequential(nn.LayerNorm(8), nn.Dropout(0.2), self.last)
        self.teacher = nn.Linear(8, NUM_CLASSES).requires_grad_(False)
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=NUM_CLASSES)
        self.val_accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=NUM_CLASSES)
        self.register_buffer("ema", torch.zeros(NUM_CLASSES))
        self.ema: Tensor
        self.optimizer = optimizer
        self.num_calls = 0
        self.losses: list[float] = []
        self.recent: collections.deque[float] = collections.deque(maxlen=20)
        self.by_class: dict[int, list[int]] = {}
        self.meter = Meter()
        self.generator = torch.Generator().manual_seed(1)
        self.numpy_generator = np.random.default_rng(1)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.lstm(self.conv(x).flatten(2))
        return self.encoder(h).mean(1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        x = x + 0.1 * torch.randn_like(x) * (1 + random.random()) + 0.1 * np.random.rand()
        x = x + 0.1 * torch.randn(x.shape, generator=self.generator) * self.numpy_generator.random()
        features = self(x)
        scores = self.head(features)
        for t, s in zip(self.teacher.parameters(), self.last.parameters(), strict=False):
            t.data.mul_(0.9).add_(s.data.mean(), alpha=0.1)
        with torch.no_grad():
            target = self.teacher(features).softmax(-1)
        loss = F.cross_entropy(scores, y) + 0.1 * F.mse_loss(scores.softmax(-1), target)
        self.num_calls += 1
        self.losses.append(loss.item())
        self.recent.append(loss.item())
        self.meter.update(loss.item())
        for label in y.tolist():
            self.by_class.setdefault(label, []).append(batch_idx)
        self.ema.mul_(0.9).add_(scores.detach().float().mean(0), alpha=0.1)
        self.accuracy(scores, y)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log_dict({"calls": float(self.num_calls), "ema": self.ema.norm()})
        return {"loss": loss, "scores": scores.detach()}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        scores = self.head(self(x))
        self.val_accuracy(scores, y)
        self.log("val_accuracy", self.val_accuracy)
        self.log("val_loss", F.cross_entropy(scores, y), prog_bar=True)

    def val_dataloader(self) -> Any:
        return images(seed=1)

    def configure_optimizers(self) -> Any:
        if self.optimizer == "SGD":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(
                self.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3
            )
        else:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)]


def cross_entropy(module: pl.LightningModule, batch: Any) -> Tensor:
    """A loss= for it."""
    assert isinstance(module, Everything)
    x, y = batch
    return F.cross_entropy(module.head(module(x)), y)


def images(seed: int = 0, *, shuffle: bool = False) -> DataLoader[Any]:
    """Four batches, the last of them short."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(22, 1, 6, 6, generator=generator), torch.randint(NUM_CLASSES, (22,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=6, shuffle=shuffle)

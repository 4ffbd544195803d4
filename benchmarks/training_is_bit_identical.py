"""Training with Sharpness(every_n_steps=1) is training without it, bit for bit.

One module with a convolution, BatchNorm, an LSTM, a TransformerEncoder layer, dropout and a torchmetrics object is
trained twice from the same seed, in float32, under bfloat16 autocast, and with gradients accumulated over three
batches. Compared are parameters, buffers, the optimizer's state, the random generators of torch, numpy and Python,
and what the module itself logged. The last row is the control: a callback that takes a Hessian product unisolated,
which the comparison must notice.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from _measure import Claims, options, table
from spectral_callbacks import Sharpness


class Everything(pl.LightningModule):
    """A sequence classifier that holds about every kind of state a module can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 16, 3, padding=1)
        self.norm = nn.BatchNorm1d(16)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, dropout=0.1, batch_first=True)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(16, 5)
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=5)
        self.average: Tensor
        self.register_buffer("average", torch.zeros(16))
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:  # (batch, 4, length) -> (batch, 5)
        """Return the logits."""
        x = F.gelu(self.norm(self.conv(x))).transpose(1, 2)
        x = self.encoder(self.lstm(x)[0]).mean(1)
        self.average.lerp_(x.detach().float().mean(0), 0.1)
        return self.head(self.dropout(x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss, having drawn from every generator and written to every kind of state."""
        x, y = batch
        x = x + 0.01 * torch.randn_like(x) + 0.01 * np.random.randn() + 0.01 * random.gauss(0, 1)
        outputs = self(x)
        loss = F.cross_entropy(outputs, y)
        self.losses.append(loss.item())
        self.accuracy(outputs, y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Return AdamW with a schedule."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


class Careless(pl.Callback):
    """What a Hessian product looks like when nobody isolates it."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Run the training step once more and differentiate it twice."""
        parameters = list(pl_module.parameters())
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            loss = pl_module.training_step(batch, batch_idx)
        gradient = torch.autograd.grad(loss, parameters, create_graph=True)
        torch.autograd.grad(gradient, parameters, [torch.randn_like(p) for p in parameters])


@dataclasses.dataclass(frozen=True)
class Trace:
    """All that a run leaves behind, by kind: name -> value."""

    parameters: dict[str, Any]
    buffers: dict[str, Any]
    optimizer: dict[str, Any]
    random: dict[str, Any]
    logged: dict[str, Any]


KINDS = tuple(field.name for field in dataclasses.fields(Trace))


def train(callback: pl.Callback | None, settings: dict[str, Any]) -> Trace:
    """Train from seed 0 and return the trace."""
    pl.seed_everything(0, verbose=False)
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(96, 4, 12, generator=generator), torch.randint(5, (96,), generator=generator))
    loader = DataLoader(data, batch_size=16, shuffle=True)
    module = Everything()
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, gradient_clip_val=1.0, callbacks=[callback] if callback else [], **settings,
    )  # fmt: skip
    trainer.fit(module, loader)
    own = {name: value for name, value in trainer.callback_metrics.items() if name.startswith(("loss", "accuracy"))}
    return Trace(
        parameters=dict(module.named_parameters()),
        buffers=dict(module.named_buffers()),
        optimizer=flattened(trainer.optimizers[0].state_dict()),
        random={"torch": torch.get_rng_state(), "numpy": str(np.random.get_state()), "python": random.getstate()},
        logged=own | {"losses": module.losses, "accuracy": flattened(vars(module.accuracy)["_computed"])},
    )


def flattened(value: Any, name: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts and lists by path."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return {name: value}
    return {path: leaf for key, child in items for path, leaf in flattened(child, f"{name}/{key}").items()}


def num_different(one: dict[str, Any], other: dict[str, Any]) -> int:
    """Count the entries that differ in a single bit, or that only one has."""
    return len(one.keys() ^ other.keys()) + sum(not same(one[key], other[key]) for key in one.keys() & other.keys())


def same(one: Any, other: Any) -> bool:
    """Return whether two values are the same to the bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    return one == other


def main() -> None:
    """Train, compare, judge."""
    options(__doc__)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", module="torch")
    settings: dict[str, dict[str, Any]] = {
        "float32": {},
        "bf16-mixed": {"precision": "bf16-mixed"},
        "accumulation 3": {"accumulate_grad_batches": 3},
    }
    cases: list[tuple[str, Callable[[], pl.Callback], dict[str, Any]]] = [
        (name, lambda: Sharpness(every_n_steps=1, on_error="raise"), options) for name, options in settings.items()
    ]
    cases.append(("control: no isolation", Careless, {}))
    claims, rows = Claims(), []
    for name, build, trainer_options in cases:
        callback = build()
        without, having = train(None, trainer_options), train(callback, trainer_options)
        different = {kind: num_different(getattr(without, kind), getattr(having, kind)) for kind in KINDS}
        measured = "-"
        if isinstance(callback, Sharpness):
            num_steps = 2 * math.ceil(6 / trainer_options.get("accumulate_grad_batches", 1))
            num_measured = sum(math.isfinite(reading["sharpness/lambda_max"]) for reading in callback.history)
            measured = str(num_measured)
            claims.at_most(f"{name}: entries that differ", sum(different.values()), 0, cost=False)
            claims.at_most(f"{name}: steps without a measurement", num_steps - num_measured, 0, cost=False)
        else:
            claims.at_most(f"{name}: kinds that do not differ", sum(n == 0 for n in different.values()), 0, cost=False)
        shares = (f"{num} of {len(getattr(without, kind))}" for kind, num in different.items())
        rows.append([name, measured, *shares])
    table(("run", "measurements", *(f"{kind} differ" for kind in KINDS)), rows)
    claims.settle()


if __name__ == "__main__":
    main()

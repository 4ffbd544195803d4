"""Training runs as records of all that they did, and how two of them differ."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor


def plain(value: Any) -> Any:
    """Return a value as nested lists, dicts and scalars that compare by value, tensors bit for bit."""
    if isinstance(value, Tensor):
        bits = value.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        return [str(value.dtype), list(value.shape), hashlib.sha256(bits).hexdigest()]
    if isinstance(value, np.ndarray):
        return [str(value.dtype), value.tolist()]
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)) or type(value).__name__ == "deque":
        return [plain(entry) for entry in value]
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, torch.Generator):
        return plain(value.get_state())
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if callable(value) or isinstance(value, (pl.Trainer, type)):
        return type(value).__name__
    if hasattr(value, "__dict__") and type(value).__module__.startswith("tests."):
        return plain(vars(value))
    return repr(value) if not isinstance(value, (int, float, str, bool, type(None))) else value


def randomness() -> Any:
    return plain([torch.get_rng_state(), np.random.get_state(), random.getstate()])


class Recorder(pl.Callback):
    """Writes down what every step looked like; stands behind the callbacks that are tested."""

    def __init__(self) -> None:
        self.steps: list[Any] = []
        self.epochs: list[Any] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.steps.append([batch_idx, plain(batch), randomness(), [m.training for m in pl_module.modules()]])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps.append([plain(outputs), [plain(p.grad) for p in pl_module.parameters()]])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epochs.append([randomness(), trainer.global_step])


@dataclasses.dataclass(frozen=True)
class Record:
    """What a run left behind, part by part."""

    parts: dict[str, Any]
    columns: frozenset[str]
    rows: list[dict[str, str]]

    def differences(self, other: Record) -> set[str]:
        """Return the parts in which another run differs; columns that only it has are its own affair."""
        parts = {name for name in self.parts if self.parts[name] != other.parts[name]}
        return parts | ({"log"} if self.own_rows(self.columns) != other.own_rows(self.columns) else set())

    def own_rows(self, columns: frozenset[str]) -> list[list[tuple[str, str]]]:
        """Return the rows of the CSV log that say something in these columns."""
        rows = [[(name, row.get(name, "")) for name in sorted(columns)] for row in self.rows]
        return [row for row in rows if any(value for name, value in row if name not in ("step", "epoch"))]


def record(
    folder: Path,
    make_module: Callable[[], pl.LightningModule],
    make_data: Callable[[], Any],
    callbacks: Iterable[pl.Callback] = (),
    *,
    own_tags: Callable[[str], bool] = lambda tag: False,
    **options: Any,
) -> Record:
    """Train from fixed seeds, and write down everything.

    Args:
        folder: For the log.
        make_module: Makes the module.
        make_data: Makes the loader of training.
        callbacks: That are tested.
        own_tags: Says of a metric's name whether it belongs to them.
        **options: Of the trainer.
    """
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    module, data, recorder = make_module(), make_data(), Recorder()
    logger = CSVLogger(folder, name="run")
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 1,
            **options,
        },
        logger=logger,
        callbacks=[*callbacks, recorder],
    )
    trainer.fit(module, data)
    logger.save()
    log = Path(logger.log_dir) / "metrics.csv"
    rows = list(csv.DictReader(log.read_text().splitlines())) if log.exists() else []
    metrics = {name: plain(v) for name, v in trainer.callback_metrics.items() if not own_tags(name)}
    hidden = ("_parameters", "_buffers", "_modules", "_trainer", "_torchdynamo_wrapper_id")
    return Record(
        parts={
            "parameters": plain(dict(module.named_parameters())),
            "buffers": plain(dict(module.named_buffers())),
            "optimizers": plain([optimizer.state_dict() for optimizer in trainer.optimizers]),
            "schedulers": plain([config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]),
            "random numbers": [randomness(), recorder.epochs],
            "steps": recorder.steps,
            "metrics": metrics,
            "progress bar": plain({k: v for k, v in trainer.progress_bar_metrics.items() if not own_tags(k)}),
            "attributes": [
                {name: plain(value) for name, value in vars(m).items() if name not in hidden} for m in module.modules()
            ],
            "modes": [m.training for m in module.modules()],
            "progress": plain(trainer.fit_loop.state_dict()),
        },
        columns=frozenset(rows[0]) if rows else frozenset(),
        rows=rows,
    )

"""What a sweep compares: metrics of its runs, side by side."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl

_ENTRY = re.compile(r"(?P<tag>[^@\s]+)(@(?P<step>\d+))?")
_ASIDE = re.compile(r"^cost/|[_/](residual|error|status|num_matvecs)$")

_WIDTH_IN_LOG = 160


class Report(pl.Callback):
    """Notes the metrics of one run that a sweep compares.

    Args:
        entries: Tags, each optionally followed by `@` and a step: the value that the metric had after so many optimizer
            steps. A tag alone is its value at the end. None for every tag at the end, but errors and costs.

    Raises:
        ValueError: If an entry is malformed.

    Example:
        >>> Report(["val/loss", "val/loss@1000"]).entries
        ('val/loss', 'val/loss@1000')
    """

    def __init__(self, entries: Sequence[str] | None) -> None:
        self.entries = None if entries is None else tuple(entries)
        self._tags: dict[int, list[tuple[str, str]]] = {}  # step -> (entry, tag)
        self._noted: dict[str, float] = {}
        for entry in self.entries or ():
            match = _ENTRY.fullmatch(entry)
            if match is None:
                raise ValueError(f"report entry {entry!r} must be a tag, or tag@step, for example val/loss@1000.")
            if match["step"]:
                self._tags.setdefault(int(match["step"]), []).append((entry, match["tag"]))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note what is asked for of this step."""
        self._note(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note what validation after this step has changed."""
        self._note(trainer)

    def values(self, trainer: pl.Trainer) -> dict[str, float]:
        """Return the entries of a run that is over; those it did not log are left out."""
        final = {tag: value.item() for tag, value in sorted(trainer.callback_metrics.items())}
        if self.entries is None:
            return {tag: value for tag, value in final.items() if not _ASIDE.search(tag)}
        return {entry: value for entry in self.entries if (value := (final | self._noted).get(entry)) is not None}

    def _note(self, trainer: pl.Trainer) -> None:
        for entry, tag in self._tags.get(trainer.global_step, ()):
            if tag in trainer.callback_metrics:
                self._noted[entry] = trainer.callback_metrics[tag].item()


def show(runs: Mapping[str, Mapping[str, float]], title: str) -> None:
    """Print one row an entry and one column a run, as a table where rich is installed."""
    entries = list(dict.fromkeys(entry for values in runs.values() for entry in values))
    rows = [[entry, *(f"{v[entry]:.4g}" if entry in v else "" for v in runs.values())] for entry in entries]
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        table = [["", *runs], *rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        print(title)
        for row in table:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    drawn = Table(title=title, title_justify="left")
    drawn.add_column("", no_wrap=True)
    for name in runs:
        drawn.add_column(name, justify="right", overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    Console(width=None if sys.stdout.isatty() else _WIDTH_IN_LOG).print(drawn)

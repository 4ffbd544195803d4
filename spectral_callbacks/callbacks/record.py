"""Where readings go: to every logger, to the metrics that monitors watch, and to the history."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from spectral_callbacks.callbacks.reading import Picture, Reading
from spectral_callbacks.tags import Chart, check_tag, layout, rename


def logging_step(trainer: pl.Trainer) -> int:
    """Return the step that Lightning's own monitors log at: batches that ended in an optimizer step."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def record(trainer: pl.Trainer, readings: Mapping[str, Reading], step: int) -> None:
    """Send numbers to every logger and to `trainer.callback_metrics`, all else to TensorBoard."""
    if not readings:
        return
    pictures = {check_tag(tag): reading for tag, reading in readings.items() if isinstance(reading, Picture)}
    scalars = {check_tag(tag): float(reading) for tag, reading in readings.items() if not isinstance(reading, Picture)}
    for logger in trainer.loggers:
        logger.log_metrics(scalars, step=step)
        if isinstance(logger, TensorBoardLogger):
            for tag, picture in pictures.items():
                picture.write(logger.experiment, tag, step)
    trainer.callback_metrics.update({tag: torch.tensor(value) for tag, value in scalars.items()})


def draw_layout(trainer: pl.Trainer, charts: Iterable[tuple[str, tuple[Chart, ...]]]) -> None:
    """Tell TensorBoard which tags belong in one chart, for each callback's name."""
    sections = {
        name: tuple(
            dataclasses.replace(chart, tags=tuple(rename(tag, name) for tag in chart.tags)) for chart in own_charts
        )
        for name, own_charts in charts
    }
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and sections:
            logger.experiment.add_custom_scalars(layout(sections))

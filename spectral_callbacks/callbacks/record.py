"""Where readings go: to every logger, to the metrics that monitors watch, and to the history."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from spectral_callbacks.callbacks.reading import Reading, Spectrum
from spectral_callbacks.tags import Chart, check_tag, layout, rename


def logging_step(trainer: pl.Trainer) -> int:
    """Return the step that Lightning's own monitors log at: batches that ended in an optimizer step."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def record(trainer: pl.Trainer, readings: Mapping[str, Reading], step: int) -> None:
    """Send scalars to every logger and to `trainer.callback_metrics`, spectra to TensorBoard.

    A spectrum is a histogram under its tag, and under `<tag>_points` a tensor of eigenvalues and weights.
    """
    if not readings:
        return
    spectra = {check_tag(tag): reading for tag, reading in readings.items() if isinstance(reading, Spectrum)}
    scalars = {check_tag(tag): float(reading) for tag, reading in readings.items() if not isinstance(reading, Spectrum)}
    for logger in trainer.loggers:
        logger.log_metrics(scalars, step=step)
        if isinstance(logger, TensorBoardLogger):
            for tag, spectrum in spectra.items():
                _write(logger, tag, spectrum, step)
    trainer.callback_metrics.update({tag: torch.tensor(value) for tag, value in scalars.items()})


def _write(logger: TensorBoardLogger, tag: str, spectrum: Spectrum, step: int) -> None:
    edges, heights = spectrum.histogram()
    centers = (edges[:-1] + edges[1:]) / 2
    logger.experiment.add_histogram_raw(
        tag,
        min=edges[0].item(),
        max=edges[-1].item(),
        num=heights.sum().item(),
        sum=(heights @ centers).item(),
        sum_squares=(heights @ centers.square()).item(),
        bucket_limits=edges[1:].tolist(),
        bucket_counts=heights.tolist(),
        global_step=step,
    )
    logger.experiment.add_tensor(f"{tag}_points", spectrum.points(), step)


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

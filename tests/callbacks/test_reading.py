"""Spectra: where eigenvalues fall on the axis, and what TensorBoard is given."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util
from torch import Tensor

from spectral_callbacks.callbacks import SpectralCallback
from spectral_callbacks.callbacks.reading import Reading, Spectrum
from spectral_callbacks.probe import Probe
from tests.callbacks.runs import Regression, fit, steps


def spectrum(values: list[float], *, linear_below: float = 0.1, num_eigenvalues: int = 1000) -> Spectrum:
    nodes = torch.tensor(values, dtype=torch.float64)
    return Spectrum(nodes, torch.full_like(nodes, 1 / len(nodes)), num_eigenvalues, linear_below)


def position(value: float, linear_below: float) -> float:
    return math.copysign(math.log10(1 + abs(value) / linear_below), value)


@pytest.mark.parametrize("values", [[-3.0, 0.0, 0.05, 40.0], [1e-9, 1e9], [-5.0, -4.0, -1e-3], [2.0, 2.0]])
def test_every_eigenvalue_lies_in_the_bin_of_its_place_on_the_axis(values: list[float]) -> None:
    edges, heights = spectrum(values).histogram()
    assert (edges.diff() > 0).all()
    counts = torch.zeros_like(heights)
    for value in values:
        x = position(value, 0.1)
        [index] = {min(int((edges[1:] <= x).sum()), len(counts) - 1)}
        counts[index] += 1000 / len(values)
    assert torch.allclose(heights, torch.log10(1 + counts))


def test_one_outlier_is_seen_beside_a_bulk_of_a_million() -> None:
    bulk = Spectrum(torch.tensor([0.0, 9.0]), torch.tensor([1 - 1e-6, 1e-6]), 1_000_000, linear_below=1.0)
    _, heights = bulk.histogram()
    assert heights[0].item() == pytest.approx(6.0, abs=1e-5)
    assert heights[-1].item() == pytest.approx(math.log10(2))


class TwoSpectra(SpectralCallback):
    diagnostic = "two"

    def measure(self, probe: Probe) -> Mapping[str, Reading]:
        values = torch.linspace(-1.0, 1.0 + probe.step, 5, dtype=torch.float64)
        return {
            "two/density": Spectrum(values, torch.full((5,), 0.2, dtype=torch.float64), 10, 0.1),
            "two/number": float(probe.step),
            "other/number": 1.0,
        }


def points(events: EventAccumulator, tag: str) -> list[np.ndarray]:
    return [tensor_util.make_ndarray(event.tensor_proto) for event in events.Tensors(tag)]


def test_tensorboard_holds_the_histogram_and_the_points(tmp_path: Path) -> None:
    callback, logger = TwoSpectra(every_n_steps=2), TensorBoardLogger(tmp_path)
    trainer = fit(Regression(), callback, logger=[logger, CSVLogger(tmp_path)])
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0, "tensors": 0}).Reload()
    written = events.Histograms("two/density")
    assert [event.step for event in written] == steps(callback) == [0, 2]
    for event, found, entry in zip(written, points(events, "two/density_points"), callback.history, strict=True):
        edges, heights = entry["two/density"].histogram()
        assert list(event.histogram_value.bucket) == pytest.approx(heights.tolist())
        assert list(event.histogram_value.bucket_limit) == pytest.approx(edges[1:].tolist())
        assert event.histogram_value.min == pytest.approx(edges[0].item())
        assert torch.equal(torch.from_numpy(found.copy()), entry["two/density"].points())
    assert "two/density" not in trainer.callback_metrics
    assert trainer.callback_metrics["two/number"] == 2


def test_an_instance_with_a_name_of_its_own_keeps_all_its_tags_apart() -> None:
    usual, second = TwoSpectra(every_n_steps=2), TwoSpectra(every_n_steps=2, name="second")
    fit(Regression(), usual, second)
    own = {"step", "cost/overhead"}
    assert set(usual.history[0]) - own == {"two/density", "two/number", "other/number"}
    assert set(second.history[0]) - own == {"second/density", "second/number", "second/other/number"}


def test_the_points_are_on_the_cpu_and_without_a_graph() -> None:
    values: Tensor = torch.tensor([1.0, 2.0], requires_grad=True)
    assert not Spectrum(values, torch.tensor([0.5, 0.5]), 2, 0.1).points().requires_grad


BAD: dict[str, tuple[list[float], list[float], float, str]] = {
    "nothing": ([], [], 0.1, "at least one value"),
    "a weight too few": ([1.0, 2.0], [1.0], 0.1, "one weight for each"),
    "not a number": ([float("nan")], [1.0], 0.1, "not finite"),
    "an infinite weight": ([1.0], [float("inf")], 0.1, "not finite"),
    "no linear part": ([1.0], [1.0], 0.0, "linear_below=0.0 must be"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_spectrum_is_refused_when_it_is_made(kind: str) -> None:
    values, weights, linear_below, message = BAD[kind]
    with pytest.raises(ValueError, match=message):
        Spectrum(torch.tensor(values), torch.tensor(weights), 3, linear_below)


class Broken(TwoSpectra):
    def measure(self, probe: Probe) -> Mapping[str, Reading]:
        return {"two/density": Spectrum(torch.zeros(0), torch.zeros(0), 1, 0.1)}


def test_a_diagnostic_that_returns_no_spectrum_fails_and_training_goes_on(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="at least one value"):
        trainer = fit(Regression(), Broken(every_n_steps=1), logger=TensorBoardLogger(tmp_path))
    assert trainer.global_step == 4

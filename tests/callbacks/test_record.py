from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from spectral_callbacks.callbacks import Sharpness
from spectral_callbacks.callbacks.reading import Embedding, Text
from spectral_callbacks.tags import check_tag
from tests.callbacks.runs import Regression, fit, loader, series, steps

TAGS = {
    "sharpness/lambda_max", "sharpness/residual", "sharpness/two_over_lr", "sharpness/threshold",
    "sharpness/stability_ratio", "sharpness/directional_ratio", "sharpness/num_matvecs", "sharpness/status",
    "cost/overhead",
}  # fmt: skip


def rows_of(logger: CSVLogger) -> list[dict[str, str]]:
    logger.save()
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def events_of(logger: TensorBoardLogger) -> EventAccumulator:
    logger.experiment.flush()
    return EventAccumulator(logger.log_dir, size_guidance={"scalars": 0, "tensors": 0}).Reload()


def test_without_a_logger_the_history_has_it_all() -> None:
    callback = Sharpness(every_n_steps=1)
    fit(Regression(), callback, logger=False)
    assert steps(callback) == [0, 1, 2, 3]
    for entry in callback.history:
        assert set(entry) == {"step", *TAGS}
        assert all(isinstance(value, (int, float)) for value in entry.values())


def test_the_csv_log_holds_the_history(tmp_path: Path) -> None:
    callback, logger = Sharpness(every_n_steps=2), CSVLogger(tmp_path)
    fit(Regression(), callback, logger=logger)
    rows = [row for row in rows_of(logger) if row["sharpness/lambda_max"]]
    assert [int(row["step"]) for row in rows] == steps(callback)
    for row, entry in zip(rows, callback.history, strict=True):
        assert {tag: float(row[tag]) for tag in TAGS} == pytest.approx({tag: entry[tag] for tag in TAGS})


def test_the_event_file_of_tensorboard_holds_the_history_under_the_tags(tmp_path: Path) -> None:
    callback, logger = Sharpness(every_n_steps=2), TensorBoardLogger(tmp_path)
    fit(Regression(), callback, logger=logger, max_epochs=2)
    events = events_of(logger)
    assert set(events.Tags()["scalars"]) >= TAGS
    for tag in TAGS - {"cost/overhead"}:
        scalars = events.Scalars(tag)
        assert [event.step for event in scalars] == steps(callback)
        assert [event.value for event in scalars] == pytest.approx(series(callback, tag))
    assert len(events.Scalars("cost/overhead")) == len(callback.history) + 1  # and once at the end


def charts_of(events: EventAccumulator) -> dict[str, dict[str, list[str]]]:
    [event] = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout()  # pyright: ignore[reportAttributeAccessIssue]
    layout.ParseFromString(event.tensor_proto.string_val[0])
    return {
        category.title: {chart.title: list(chart.multiline.tag) for chart in category.chart}
        for category in layout.category
    }


def test_one_chart_draws_lambda_max_and_its_edge(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    fit(Regression(), Sharpness(every_n_steps=2), logger=logger)
    charts = charts_of(events_of(logger))
    assert charts["sharpness"]["lambda_max and the edge of stability"] == [
        "^sharpness/lambda_max$", "^sharpness/threshold$", "^sharpness/two_over_lr$",
    ]  # fmt: skip


def test_each_name_has_charts_of_its_own(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    callbacks = [Sharpness(every_n_steps=2), Sharpness(every_n_steps=2, mode="eval", name="sharpness_eval")]
    fit(Regression(), *callbacks, logger=logger)
    charts = charts_of(events_of(logger))
    assert set(charts) == {"sharpness", "sharpness_eval"}
    assert charts["sharpness_eval"]["stability ratio (1 is the edge)"] == [
        "^sharpness_eval/stability_ratio$", "^sharpness_eval/directional_ratio$",
    ]  # fmt: skip


def test_several_loggers_get_the_same(tmp_path: Path) -> None:
    callback = Sharpness(every_n_steps=1)
    first, second = CSVLogger(tmp_path, name="a"), TensorBoardLogger(tmp_path, name="b")
    fit(Regression(), callback, logger=[first, second])
    values = [float(row["sharpness/lambda_max"]) for row in rows_of(first) if row["sharpness/lambda_max"]]
    assert values == pytest.approx([event.value for event in events_of(second).Scalars("sharpness/lambda_max")])


class Notebook(Logger):
    """A logger of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "notebook"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


def test_loggers_get_plain_numbers_under_tags_of_the_grammar() -> None:
    logger = Notebook()
    fit(Regression(), Sharpness(every_n_steps=1, num_eigenvalues=2, lambda_min=True), logger=logger)
    ours = [line for _, line in logger.lines if any("/" in tag for tag in line)]
    assert ours
    for line in ours:
        assert all(check_tag(tag) and type(value) is float for tag, value in line.items())


def test_a_failure_reaches_the_loggers_too() -> None:
    class Broken(Sharpness):
        def measure(self, probe: Any) -> Any:
            raise KeyError("planted")

    logger = Notebook()
    with pytest.warns(UserWarning, match="planted"):
        fit(Regression(), Broken(every_n_steps=1), logger=logger)
    assert [line for line in logger.lines if "sharpness/status" in line[1]] == [(0, {"sharpness/status": 2.0})]


def test_readings_stay_apart_from_trainings_own_rows(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit(Regression(), Sharpness(every_n_steps=1), logger=logger, log_every_n_steps=1)
    losses = [(row["step"], row["train_loss"]) for row in rows_of(logger) if row["train_loss"]]
    assert [step for step, _ in losses] == ["0", "1", "2", "3"]


def test_a_checkpoint_is_chosen_by_the_ratio(tmp_path: Path) -> None:
    callback = Sharpness(every_n_steps=1)
    checkpoint = ModelCheckpoint(
        tmp_path, monitor="sharpness/stability_ratio", mode="min", every_n_train_steps=1, filename="{step}"
    )
    fit(Regression(), callback, checkpoint, enable_checkpointing=True, max_epochs=2)
    ratios = series(callback, "sharpness/stability_ratio")
    assert checkpoint.best_model_score is not None
    assert checkpoint.best_model_score.item() == pytest.approx(min(ratios))
    assert checkpoint.best_model_path.endswith(f"step={ratios.index(min(ratios)) + 1}.ckpt")


def test_training_can_be_stopped_by_the_ratio() -> None:
    stopping = EarlyStopping("sharpness/stability_ratio", stopping_threshold=1e9, check_on_train_epoch_end=True)
    trainer = fit(Regression(), Sharpness(every_n_steps=1), stopping, max_epochs=5)
    assert trainer.current_epoch == 1


def test_callback_metrics_hold_the_latest_reading_through_the_epochs() -> None:
    callback = Sharpness(every_n_steps=3)
    trainer = fit(Regression(), callback, max_epochs=2)
    latest = {tag: value.item() for tag, value in trainer.callback_metrics.items() if tag.startswith("sharpness/")}
    expected = {tag: value for tag, value in callback.history[-1].items() if tag.startswith("sharpness/")}
    assert latest == pytest.approx(expected, rel=1e-6)
    assert latest.keys() == expected.keys()


def test_fast_dev_run_logs_nothing_and_measures_once(tmp_path: Path) -> None:
    callback = Sharpness()
    fit(Regression(), callback, fast_dev_run=True, logger=CSVLogger(tmp_path))
    assert steps(callback) == [0]
    assert not list(tmp_path.rglob("*.csv"))


def test_the_sanity_check_emits_nothing() -> None:
    class Validated(Regression):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.trainer.sanity_checking:
                assert not logger.lines
                assert not callback.history

        def val_dataloader(self) -> Any:
            return loader()

    callback, logger = Sharpness(every_n_steps=1), Notebook()
    fit(Validated(), callback, logger=logger, num_sanity_val_steps=2)
    assert steps(callback) == [0, 1, 2, 3]


def test_validating_and_testing_emit_nothing() -> None:
    class Tested(Regression):
        def test_step(self, batch: Any, batch_idx: int) -> None: ...

        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    callback = Sharpness(every_n_steps=1)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_checkpointing=False,
        callbacks=[callback],
    )  # fmt: skip
    trainer.validate(Tested(), loader(), verbose=False)
    trainer.test(Tested(), loader(), verbose=False)
    assert not callback.history


class Showing(Sharpness):
    """Returns words and points."""

    def measure(self, probe: Any) -> Any:
        points = torch.arange(6.0).reshape(3, 2)
        return {
            "sharpness/words": Text(f"**step** {probe.step}"),
            "sharpness/points": Embedding(points, ["a", "b", "c"]),
            "sharpness/bare": Embedding(points),
        }


def test_words_and_points_reach_tensorboard_and_no_other_logger(tmp_path: Path) -> None:
    callback, logger, other = Showing(every_n_steps=2), TensorBoardLogger(tmp_path), Notebook()
    trainer = fit(Regression(), callback, logger=[logger, other])
    written = events_of(logger).Tensors("sharpness/words/text_summary")
    assert [(event.step, event.tensor_proto.string_val[0]) for event in written] == [
        *((step, f"**step** {step}".encode()) for step in (0, 2))
    ]
    for tag in ("points", "bare"):
        [folder] = Path(logger.log_dir).glob(f"00002/sharpness*{tag}")
        assert (folder / "tensors.tsv").read_text().split() == ["0.0", "1.0", "2.0", "3.0", "4.0", "5.0"]
        assert (folder / "metadata.tsv").exists() == (tag == "points")
    config = (Path(logger.log_dir) / "projector_config.pbtxt").read_text()
    assert config.count("tensor_path") == 4
    assert not any("sharpness/words" in line for _, line in other.lines)
    assert "sharpness/words" not in trainer.callback_metrics
    assert callback.history[0]["sharpness/words"] == Text("**step** 0")

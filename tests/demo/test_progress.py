"""The progress bar of a run."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest

from spectral_callbacks.demo import Classifier, DigitsDataModule, StepProgressBar


def train(tmp_path: Path, bar: StepProgressBar, model: pl.LightningModule | None = None) -> None:
    trainer = pl.Trainer(
        max_steps=5, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        callbacks=[bar], default_root_dir=tmp_path, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model or Classifier(widths=[3]), DigitsDataModule(batch_size=0, num_train=50))


def test_one_bar_counts_the_steps_of_all_epochs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, StepProgressBar(metrics=["train/loss"], refresh_rate=2))
    last = capsys.readouterr().err.rstrip().split("\r")[-1]
    assert "5/5" in last
    assert "loss=" in last


def test_a_disabled_bar_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bar = StepProgressBar()
    bar.disable()
    train(tmp_path, bar)
    assert "5/5" not in capsys.readouterr().err


def test_the_bar_is_closed_when_training_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Failing(Classifier):
        def on_before_zero_grad(self, optimizer: object) -> None:
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        train(tmp_path, StepProgressBar(), Failing(widths=[3]))
    assert capsys.readouterr().err.endswith("\n")


def test_a_refresh_rate_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"refresh_rate=0 must be at least 1"):
        StepProgressBar(refresh_rate=0)

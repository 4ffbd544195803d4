from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor

from spectral_callbacks.callbacks import Sharpness
from spectral_callbacks.callbacks.muting import muted, precision_of
from tests.callbacks.runs import Regression, Watch, fit, make_trainer


class Talkative(Regression):
    """Logs in every way there is."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("mean", loss, on_epoch=True, prog_bar=True)
        self.log_dict({"a": loss, "b": 2 * loss})
        self.print("loss", end="")
        assert self.logger is not None
        self.logger.log_metrics({"direct": loss.item()}, step=batch_idx)
        assert self.trainer.logger is not None
        self.trainer.logger.log_hyperparams({"x": 1})
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_scalar("experiment", loss.item(), batch_idx)
        return loss


def heard(tmp_path: Path, capsys: pytest.CaptureFixture[str], *callbacks: pl.Callback) -> tuple[Any, ...]:
    logger = CSVLogger(tmp_path, name=str(len(callbacks)))
    torch.manual_seed(0)
    capsys.readouterr()
    trainer = fit(Talkative(), *callbacks, logger=[logger, TensorBoardLogger(tmp_path)], log_every_n_steps=1)
    metrics = {k: v.item() for k, v in trainer.callback_metrics.items() if not k.startswith(("sharpness/", "cost/"))}
    logger.save()
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    names = rows[0].split(",")
    own = [[c for c, name in zip(row.split(","), names, strict=True) if "/" not in name] for row in rows]
    without_step = [[c for c, name in zip(row, own[0], strict=True) if name != "step"] for row in own]
    return capsys.readouterr().out, repr([row for row in without_step if any(row)]), metrics


def test_a_training_step_run_again_is_not_heard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = heard(tmp_path, capsys)
    measured = heard(tmp_path, capsys, Sharpness(every_n_steps=1, on_error="raise"))
    assert measured == plain


def test_silence_ends_also_after_an_exception(tmp_path: Path) -> None:
    module = Talkative()
    original = lambda *_, **__: None  # noqa: E731
    module.__dict__["log_dict"] = original
    trainer = make_trainer(logger=CSVLogger(tmp_path))
    loggers = trainer.loggers

    def speak() -> None:
        with muted(trainer, module):
            module.log("anything", 1.0)
            raise KeyError("planted")

    with pytest.raises(KeyError, match="planted"):
        speak()
    assert "log" not in module.__dict__
    assert module.__dict__["log_dict"] is original
    assert trainer.loggers is loggers


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_full_precision_is_the_parameters_own_and_training_precision_is_trainings(precision: Any) -> None:
    dtypes: list[torch.dtype] = []

    def see(trainer: pl.Trainer, module: Any, batch: Any) -> None:
        for asked in ("full", "training"):
            with precision_of(trainer, asked):
                dtypes.append(module.net(batch[0]).dtype)

    fit(Regression(), Watch(see), precision=precision, limit_train_batches=1)
    assert dtypes == [torch.float32, torch.float32 if precision == "32-true" else torch.bfloat16]

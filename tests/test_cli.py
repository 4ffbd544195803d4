"""The command line."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from spectral_callbacks import Sharpness
from spectral_callbacks.cli import config_folder, main, run
from spectral_callbacks.demo import Classifier, DigitsDataModule

torch.set_num_threads(1)

CONFIGS = sorted(config_folder().glob("*.yaml"))


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # seeding sets them; this restores them
        monkeypatch.setenv(variable, "0")
    return tmp_path


class Line(pl.LightningModule):
    """A module of a user's own, with its own data and optimizer."""

    def __init__(self, slope: float = 0.0) -> None:
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(slope))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return (self.slope * batch - batch).square().mean()

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        return DataLoader(torch.arange(4.0), batch_size=2)  # pyright: ignore[reportArgumentType]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)


def test_there_are_configs() -> None:
    assert {"edge_of_stability.yaml", "digits_sgd.yaml"} <= {config.name for config in CONFIGS}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_every_config_fits_as_it_is_and_measures_the_first_step(config: Path, in_empty_folder: Path) -> None:
    cli = run(["fit", "--config", str(config), "--trainer.max_steps=2"])
    assert cli.trainer.global_step == 2
    (sharpness,) = (c for c in cli.trainer.callbacks if isinstance(c, Sharpness))  # pyright: ignore[reportAttributeAccessIssue]
    assert sharpness.history[0]["step"] == 0
    assert 0 < sharpness.history[0]["sharpness/stability_ratio"] < 0.6
    assert list(in_empty_folder.glob("runs/*/version_0/events.out.tfevents.*"))


def test_the_optimizer_of_the_config_takes_the_place_of_the_models_own() -> None:
    optimizer = "--optimizer=torch.optim.SGD", "--optimizer.lr=0.25", "--optimizer.momentum=0.5"
    cli = run(["fit", *optimizer, "--trainer.fast_dev_run=1", "--trainer.accelerator=cpu"])
    (used,) = cli.trainer.optimizers
    assert isinstance(used, torch.optim.SGD)
    assert (used.defaults["lr"], used.defaults["momentum"]) == (0.25, 0.5)


def test_model_and_data_are_the_demos_unless_named() -> None:
    cli = run(["fit", "--trainer.fast_dev_run=1", "--trainer.accelerator=cpu"])
    assert isinstance(cli.model, Classifier)
    assert isinstance(cli.datamodule, DigitsDataModule)


def test_any_module_can_be_trained_and_watched() -> None:
    arguments = ["--model=tests.test_cli.Line", "--model.slope=3", "--data=null", "--trainer.fast_dev_run=1"]
    cli = run(["fit", *arguments, "--trainer.accelerator=cpu", "--trainer.callbacks=spectral_callbacks.Sharpness"])
    assert type(cli.model).__name__ == "Line"
    assert cli.datamodule is None
    (sharpness,) = (c for c in cli.trainer.callbacks if isinstance(c, Sharpness))  # pyright: ignore[reportAttributeAccessIssue]
    assert sharpness.history[0]["sharpness/lambda_max"] == pytest.approx(1.0)  # the mean of 2 x² over x = 0, 1


def test_demo_is_quiet_and_ends_with_the_summary_and_the_line_to_type(in_empty_folder: Path) -> None:
    options = ["--trainer.max_steps=80", "--data.num_train=100"]
    done = subprocess.run(
        [sys.executable, "-m", "spectral_callbacks.cli", "demo", *options],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": "/usr/bin:/bin"},
    )
    assert "measurements" in done.stdout
    assert "2, the last at step 40" in done.stdout
    assert done.stdout.rstrip().endswith("--logdir runs/edge_of_stability/version_0")
    bar = done.stderr.replace("\r", "\n").strip().splitlines()
    assert all("steps/s" in line for line in bar), done.stderr
    assert "80/80" in bar[-1]


def test_help_loads_neither_torch_nor_lightning() -> None:
    program = "import sys; from spectral_callbacks.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", program + "print(sorted({'torch', 'lightning'} & set(sys.modules)))"],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert all(command in done.stdout for command in ("fit", "validate", "test", "predict", "demo"))
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize(
    ("command", "missing", "extra"),
    [("fit", "jsonargparse", "cli"), ("demo", "jsonargparse", "cli"), ("demo", "sklearn", "demo")],
)
def test_a_missing_extra_is_reported_with_the_command_that_installs_it(
    command: str, missing: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec

    def found(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == missing else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    with pytest.raises(SystemExit) as stopped:
        main([command])
    assert stopped.value.code == 1
    assert f"pip install 'spectral-callbacks[{extra}]'" in capsys.readouterr().err


def test_an_unknown_command_is_refused_with_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train"])
    assert "invalid choice: 'train'" in capsys.readouterr().err

"""The command init-entropy: a checkpoint of step 0 whose weights give a layer its entropy."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from spectral_callbacks.cli import main, run
from spectral_callbacks.cli.init_entropy import first_inputs
from spectral_callbacks.demo import Classifier, DigitsDataModule
from spectral_callbacks.metrics.representations.diffusion_entropy import diffusion_entropy

pytestmark = pytest.mark.usefixtures("in_empty_folder")

SEEDED = ("--seed_everything=0", "--optimizer=DiffGrad")
STILL = [
    f"--trainer.{name}=false"
    for name in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
]
OWN = (
    "--model=tests.test_cli_entropy.Tokens",
    "--data=null",
    "--layer=embedding",
    "--target=2",
    "--sigma=1",
    "--num_samples=20",
)


class Tokens(pl.LightningModule):
    """A model of tokens, with batches of the user's own making.

    Args:
        batches: What a training batch is: "dict", "text", "ragged", or "none" for no batch.
    """

    def __init__(self, batches: str = "dict") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = torch.nn.Embedding(50, 4)
        self.batches = batches

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch["tokens"][0]).square().mean()

    def train_dataloader(self) -> DataLoader[Any]:
        tokens = torch.arange(32).reshape(8, 4)
        samples: list[Any] = {
            "dict": [{"weight": torch.tensor(1.0), "tokens": [row]} for row in tokens],
            "text": [f"sample {number}" for number in range(8)],
            "ragged": [row[: 1 + number // 4] for number, row in enumerate(tokens)],
            "none": [],
        }[self.batches]
        return DataLoader(samples, batch_size=4, collate_fn=self.collate)  # pyright: ignore[reportArgumentType]

    def collate(self, samples: list[Any]) -> Any:
        collated = torch.utils.data.default_collate(samples)
        if self.batches == "dict":
            collated["weight"] = torch.tensor(1.0)
        return collated

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Headless(Classifier):
    """A model whose training_step does not need a forward."""

    forward = torch.nn.Module.forward


class Weights(pl.Callback):
    """Notes the weights that training starts with."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 0:
            self.seen = {name: value.clone() for name, value in pl_module.state_dict().items()}


def entropy_of(model: Classifier, layer: str, num_samples: int, **kernel: float) -> float:
    data = DigitsDataModule()
    data.setup("fit")
    generator = torch.Generator().manual_seed(0)
    x = torch.stack([data.train_dataloader().dataset[i][0] for i in range(num_samples)])
    with torch.no_grad():
        features = model.net[: int(layer.rpartition(".")[2]) + 1](x)
    return diffusion_entropy(features, generator=generator, **kernel).value  # pyright: ignore[reportArgumentType]


def started(*arguments: str) -> dict[str, Tensor]:
    """The weights with which fit takes its first step."""
    noted = Weights()
    run(
        ["fit", *SEEDED, *STILL, "--trainer.limit_val_batches=0", "--trainer.max_steps=1", *arguments],
        callbacks=[noted],
    )
    return noted.seen


def test_fit_starts_from_the_checkpoint_as_from_weights_of_its_own_that_were_scaled(
    in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["init-entropy", "--layer", "net.3", "--target", "5", "--num_samples", "200", *SEEDED])
    printed = capsys.readouterr().out
    assert [path.name for path in in_empty_folder.iterdir()] == ["init.ckpt"]
    scale = float(re.search(r"Found:  scale (\S+) with", printed)[1])  # pyright: ignore[reportOptionalSubscript]
    assert "200 samples have at most 7.644" in printed
    own, scaled = started(), started("--ckpt_path=init.ckpt")
    for name, value in own.items():
        torch.testing.assert_close(scaled[name], value * (scale if value.ndim >= 2 else 1), rtol=1e-5, atol=0)
    model = Classifier.load_from_checkpoint("init.ckpt")
    assert all(torch.equal(value, scaled[name]) for name, value in model.state_dict().items())


def test_the_saved_model_has_the_entropy_on_data_of_its_kind(in_empty_folder: Path) -> None:
    """Of other samples than the ones the search saw, with the same number of them."""
    kernel = {"sigma": 2.5, "t": 2.0}
    options = [f"--{name}={value}" for name, value in kernel.items()]
    main(["init-entropy", "--layer=net.1", "--target=4", *options, "--num_samples=100", "--output=sub/a.ckpt"])
    model = Classifier.load_from_checkpoint("sub/a.ckpt")
    assert entropy_of(model, "net.1", 100, **kernel) == pytest.approx(4.0, abs=0.3)


def test_the_table_and_the_line_to_type_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["init-entropy", "--layer=net.3", "--target=5", "--output=a b.ckpt", "--seed_everything=0"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "Train from it:  spectral-callbacks fit --seed_everything=0 --ckpt_path 'a b.ckpt'"
    rows = [line.replace("│", " ").split() for line in lines if " scale " in line and "Found" not in line]
    scales, bits = [float(row[1]) for row in rows], [float(row[2]) for row in rows]
    assert 1.0 in scales
    assert scales == sorted(scales)
    found = re.fullmatch(r"Found:  scale (\S+) with (\S+) bits; 500 samples have at most 8\.966", lines[-2])
    assert found is not None
    assert float(found[2]) == bits[scales.index(pytest.approx(float(found[1]), rel=1e-3))]  # pyright: ignore[reportArgumentType]
    assert math.isclose(float(found[2]), 5.0, abs_tol=0.01)


def test_neither_the_callbacks_nor_the_loggers_of_a_config_run(in_empty_folder: Path) -> None:
    """Nor its own idea of a run: what fit would do in a dry run, or on several devices."""
    logger = "--trainer.logger=lightning.pytorch.loggers.TensorBoardLogger"
    more = ["--trainer.callbacks=Sharpness", logger, "--trainer.logger.save_dir=runs", "--trainer.fast_dev_run=true"]
    main(
        [
            "init-entropy",
            "--layer=net.1",
            "--target=3",
            "--sigma=2",
            "--num_samples=50",
            *more,
            "--trainer.precision=bf16-true",
        ]
    )
    assert [path.name for path in in_empty_folder.iterdir()] == ["init.ckpt"]
    saved = torch.load("init.ckpt", weights_only=False)
    assert saved["global_step"] == 0
    assert not saved["callbacks"]
    assert {value.dtype for value in saved["state_dict"].values()} == {torch.float32}


def test_inputs_are_the_first_floating_tensor_of_as_many_batches_as_it_takes() -> None:
    def batches() -> Iterator[list[Tensor]]:
        for number in range(3):
            yield [torch.zeros(4, dtype=torch.int64), torch.full((4, 2), float(number)), torch.ones(4)]
        raise AssertionError("a batch more than needed")

    inputs = first_inputs(batches(), 10)
    assert inputs.tolist() == [[float(number // 4)] * 2 for number in range(10)]


def test_tokens_of_nested_batches_are_taken_where_no_sample_is_floating(capsys: pytest.CaptureFixture[str]) -> None:
    main(["init-entropy", *OWN])
    assert "8 samples have at most 3\n" in capsys.readouterr().out
    assert Tokens.load_from_checkpoint("init.ckpt").batches == "dict"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer=net.33", "--target=5"], r"layer='net\.33' names no submodule of Classifier\. Close to it: 'net\.3'"),
        (["--layer=net.3", "--target=5", "--num_samples=1"], "num_samples is 1, and an entropy needs"),
        (
            ["--layer=net.3", "--target=4", "--sigma=1e9", "--num_samples=20"],
            r"is reached at no scale between 0\.001 and 1000",
        ),
        (
            ["--layer=net.3", "--target=3", "--num_samples=20", "--low=0.5", "--high=1", "--sigma=1e9"],
            r"is reached at no scale between 0\.5 and 1\.",
        ),
        (["--layer=net.3", "--target=3", "--num_samples=20", "--alpha=3"], r"alpha=3\.0 must lie between 0 and 1"),
        (["--layer=net.3", "--target=3", "--num_samples=20", "--atol=0"], r"atol is 0\.0 bits"),
        (["--layer=net.3", "--target=3", "--num_samples=20", "--sigma=wide"], "sigma is 'wide'. Choose a fixed width"),
        (["--layer=net.3", "--target=five"], "invalid float value: 'five'"),
        (["--target=5"], "the following arguments are required: --layer"),
        (["--layer=net.3", "--target=1", "--num_samples=20", "--output=/dev/null/a.ckpt"], r"File exists: '/dev/null'"),
        (["--layer=net.3", "--target=5", "--config=none.yaml"], r"none\.yaml"),
        (["--layer=net.3", "--target=5", "--model.width=3"], r"width"),
        (["--layer=net.3", "--target=5", "--model=tests.test_cli_entropy.Headless"], "Define one that takes"),
        ([*OWN, "--model.batches=text"], "a training batch is list without any tensor of samples"),
        (
            [*OWN, "--model.batches=ragged"],
            r"samples of the shapes \(1,\) and \(2,\): pass a num_samples that the first",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else value[-1],
)
def test_what_cannot_be_done_is_a_message_and_no_traceback(
    arguments: list[str], message: str, in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["init-entropy", *arguments])
    assert stopped.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(message, error), error
    assert not list(in_empty_folder.iterdir())


def test_help_says_how_to_train_from_the_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["init-entropy", "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "spectral-callbacks fit --config CONFIG --ckpt_path OUTPUT" in printed
    assert all(option in printed for option in ("--layer", "--target", "--sigma", "--num_samples", "--output"))


def test_it_is_a_command_of_the_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "spectral_callbacks.cli", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": "/usr/bin:/bin"},
    )
    assert "init-entropy" in done.stdout

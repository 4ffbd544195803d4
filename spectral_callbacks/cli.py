"""The command line: every config by a LightningCLI, and the demo."""

from __future__ import annotations

import argparse
import importlib.resources
import importlib.util
import logging
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

_DEMO = "edge_of_stability.yaml"
_COMMANDS = {
    "fit": "train: fit --config configs/digits_sgd.yaml",
    "validate": "evaluate on the validation data",
    "test": "evaluate on the test data",
    "predict": "run the model on data",
    "demo": "watch a small network reach the edge of stability, in a minute on one core",
}
_EXTRA_OF = {"jsonargparse": "cli", "docstring_parser": "cli", "sklearn": "demo"}  # module -> extra that brings it


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command.

    Lightning is imported once it is known what for, so that `--help` is immediate.

    Args:
        arguments: What follows the program's name; None for the process's own.
    """
    parser = argparse.ArgumentParser(
        prog="spectral-callbacks",
        description="Optimizer and stability diagnostics for PyTorch Lightning.",
        epilog="spectral-callbacks COMMAND --help lists the options of a command; demo takes those of fit.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in _COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    chosen, rest = parser.parse_known_args(arguments)
    try:
        if chosen.command == "demo":
            demo(rest)
        else:
            run([chosen.command, *rest])
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA_OF:
            raise
        parser.exit(1, f"{parser.prog}: {error}\n")


def run(arguments: Sequence[str]) -> LightningCLI:
    """Run a command of the LightningCLI.

    Model and data are the demo's unless `--model` and `--data`, or the config, name another LightningModule and
    LightningDataModule.

    Args:
        arguments: fit, validate, test or predict, and its options.

    Returns:
        The CLI after the run, with `trainer`, `model` and `datamodule`.

    Raises:
        ModuleNotFoundError: If the extra `cli` is not installed.
    """
    _require("jsonargparse", "docstring_parser")
    return _cli_class()(
        args=list(arguments),
        parser_kwargs={"prog": "spectral-callbacks"},
        save_config_kwargs={"overwrite": True},  # without a logger every run saves to the same folder
    )


def demo(arguments: Sequence[str]) -> None:
    """Train at the edge of stability, and say what was seen.

    Args:
        arguments: Options of fit that change the config.

    Raises:
        ModuleNotFoundError: If the extra `demo` is not installed.
    """
    _require("jsonargparse", "docstring_parser", "sklearn")
    import torch
    from lightning.pytorch.loggers import TensorBoardLogger

    from spectral_callbacks.callbacks import Sharpness
    from spectral_callbacks.demo.summary import show, summarize

    torch.set_num_threads(1)  # the network is too small for more, and fewer cores than threads would stall it
    warnings.filterwarnings("ignore", "GPU available but not used")  # and too small for a GPU
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    trainer = run(["fit", "--config", str(config_folder() / _DEMO), *arguments]).trainer
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue] - set by a connector
        if isinstance(callback, Sharpness):
            show(summarize(callback.history, name=callback.name), f"Summary of {callback.name}")
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            print(f"See it:  {_tensorboard()} --logdir {shlex.quote(os.path.relpath(logger.log_dir))}")


def config_folder() -> Path:
    """Return the folder of the configs: inside an installed package, beside the package in a checkout."""
    package = Path(str(importlib.resources.files("spectral_callbacks")))
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def _cli_class() -> type[LightningCLI]:
    from lightning.pytorch.cli import LightningCLI

    class SpectralCLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.set_defaults(
                {
                    "model": {"class_path": "spectral_callbacks.demo.Classifier"},
                    "data": {"class_path": "spectral_callbacks.demo.DigitsDataModule"},
                }
            )

        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            self.config = parser.parse_args(args)  # Lightning warns of arguments that do not come from sys.argv

        def instantiate_classes(self) -> None:
            # Lightning's own use of PyTorch.
            warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.", FutureWarning)
            with warnings.catch_warnings():
                # The `optimizer` of a config is there to take the place of the model's own.
                warnings.filterwarnings("ignore", ".*configure_optimizers` will be overridden")
                super().instantiate_classes()

        def after_instantiate_classes(self) -> None:
            from spectral_callbacks.demo import DigitsDataModule

            if isinstance(self.datamodule, DigitsDataModule):
                # Advice that does not apply to data in memory, and to full-batch training, whose epoch is one batch.
                warnings.filterwarnings("ignore", ".*does not have many workers")
                warnings.filterwarnings("ignore", ".*is smaller than the logging interval")

    return SpectralCLI


def _require(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(
                f"{module} is missing; it comes with pip install 'spectral-callbacks[{_EXTRA_OF[module]}]'", name=module
            )


def _tensorboard() -> str:
    """Return how to call the TensorBoard of this environment, also where the environment is not activated."""
    own = Path(sys.executable).with_name("tensorboard")
    on_path = shutil.which("tensorboard")
    return "tensorboard" if on_path and Path(on_path) == own else shlex.quote(os.path.relpath(own))


if __name__ == "__main__":
    main()

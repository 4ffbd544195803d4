"""A LightningCLI whose model and data are the demo's unless others are named."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spectral_callbacks.cli.installation import require

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

_OF_SWEEP = ("sweep", "report")  # keys of a config that are no options of a run
# Whose classes are found without their path, as --optimizer=DiffGrad: those that are imported are.
_BY_SHORT_NAME = ("spectral_callbacks.callbacks", "spectral_callbacks.demo", "spectral_callbacks.optim")


def run(arguments: Sequence[str], *, callbacks: Sequence[pl.Callback] = (), save_config: bool = True) -> LightningCLI:
    """Run a command of the LightningCLI.

    Model and data are the demo's unless `--model` and `--data`, or the config, name another LightningModule and
    LightningDataModule. Classes of this package need no path: `--optimizer=DiffGrad`. A config's `sweep` and `report`
    belong to the command `sweep`; other commands pass them over.

    Args:
        arguments: fit, validate, test or predict, and its options.
        callbacks: Added to those of the config.
        save_config: Whether the config of the run is saved beside its log.

    Returns:
        The CLI after the run, with `trainer`, `model` and `datamodule`.

    Raises:
        ModuleNotFoundError: If the extra `cli` is not installed.
    """
    require("jsonargparse", "docstring_parser")
    from lightning.pytorch.cli import SaveConfigCallback

    return _cli_class()(
        args=list(arguments),
        parser_kwargs={"prog": "spectral-callbacks"},
        save_config_callback=SaveConfigCallback if save_config else None,
        save_config_kwargs={"overwrite": True},  # without a logger every run saves to the same folder
        trainer_defaults={"callbacks": list(callbacks)},
    )


def quiet() -> None:
    """Silence what Lightning says of every run, warnings aside."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _cli_class() -> type[LightningCLI]:
    from lightning.pytorch.cli import LightningCLI

    for package in _BY_SHORT_NAME:
        importlib.import_module(package)

    class SpectralCLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.set_defaults(
                {
                    "model": {"class_path": "spectral_callbacks.demo.Classifier"},
                    "data": {"class_path": "spectral_callbacks.demo.DigitsDataModule"},
                }
            )
            for name in _OF_SWEEP:
                parser.add_argument(f"--{name}", type=Any, help="what the command sweep reads in a config")

        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            self.config = parser.parse_args(args)  # Lightning warns of arguments that do not come from sys.argv
            for name in _OF_SWEEP:  # not a part of this run, whose config is saved with its log
                self.config[self.config["subcommand"]].pop(name)

        def instantiate_classes(self) -> None:
            # Lightning's own use of PyTorch.
            warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.", FutureWarning)
            with warnings.catch_warnings():
                # The `optimizer` of a config is there to take the place of the model's own.
                warnings.filterwarnings("ignore", ".*configure_optimizers` will be overridden")
                super().instantiate_classes()

        def after_instantiate_classes(self) -> None:
            # Advice that does not apply to the demo's data in memory, and to full-batch training, whose epoch is one
            # batch.
            if self.datamodule is not None and type(self.datamodule).__module__.startswith("spectral_callbacks.demo."):
                warnings.filterwarnings("ignore", ".*does not have many workers")
                warnings.filterwarnings("ignore", ".*is smaller than the logging interval")

    return SpectralCLI

"""The demo: a run at the edge of stability, and what it showed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from spectral_callbacks.cli.installation import config_folder, require, tensorboard_command
from spectral_callbacks.cli.lightning_cli import quiet, run

_CONFIG = "edge_of_stability.yaml"


def demo(arguments: Sequence[str]) -> None:
    """Train at the edge of stability, and say what was seen.

    Args:
        arguments: Options of fit that change the config.

    Raises:
        ModuleNotFoundError: If the extra `demo` is not installed.
    """
    require("jsonargparse", "docstring_parser", "sklearn")
    import torch
    from lightning.pytorch.loggers import TensorBoardLogger

    from spectral_callbacks.callbacks import Sharpness
    from spectral_callbacks.demo.summary import show, summarize

    torch.set_num_threads(1)  # the network is too small for more, and fewer cores than threads would stall it
    warnings.filterwarnings("ignore", "GPU available but not used")  # and too small for a GPU
    quiet()
    trainer = run(["fit", "--config", str(config_folder() / _CONFIG), *arguments]).trainer
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue] - set by a connector
        if isinstance(callback, Sharpness):
            show(summarize(callback.history, name=callback.name), f"Summary of {callback.name}")
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            print(f"See it:  {tensorboard_command(logger.log_dir)}")

"""The command line: every config by a LightningCLI, several runs of one config, and the demo."""

from spectral_callbacks.cli.installation import config_folder
from spectral_callbacks.cli.lightning_cli import run
from spectral_callbacks.cli.main import main

__all__ = ["config_folder", "main", "run"]

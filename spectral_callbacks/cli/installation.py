"""What is installed where: the extras, the configs, TensorBoard."""

from __future__ import annotations

import importlib.resources
import importlib.util
import os
import shlex
import shutil
import sys
from pathlib import Path

EXTRA_OF = {"jsonargparse": "cli", "docstring_parser": "cli", "sklearn": "demo"}  # module -> extra that brings it


def require(*modules: str) -> None:
    """Refuse to go on without these modules.

    Raises:
        ModuleNotFoundError: If one is not installed; the message names the extra.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(
                f"{module} is missing; it comes with pip install 'spectral-callbacks[{EXTRA_OF[module]}]'", name=module
            )


def config_folder() -> Path:
    """Return the folder of the configs: inside an installed package, beside the package in a checkout."""
    package = Path(str(importlib.resources.files("spectral_callbacks")))
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def tensorboard_command(log_folder: str) -> str:
    """Return how to look at a log with the TensorBoard of this environment, also where it is not activated."""
    own = Path(sys.executable).with_name("tensorboard")
    on_path = shutil.which("tensorboard")
    program = "tensorboard" if on_path and Path(on_path) == own else shlex.quote(os.path.relpath(own))
    return f"{program} --logdir {shlex.quote(os.path.relpath(log_folder))}"

"""Optimizer and stability diagnostics for PyTorch Lightning.

Importing the package imports neither torch nor lightning: each public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectral_callbacks.callbacks import Sharpness as Sharpness
    from spectral_callbacks.callbacks import SpectralCallback as SpectralCallback
    from spectral_callbacks.linalg import Eigenpairs as Eigenpairs
    from spectral_callbacks.linalg import LinearOperator as LinearOperator
    from spectral_callbacks.linalg import Status as Status
    from spectral_callbacks.linalg import Tracker as Tracker
    from spectral_callbacks.linalg import eigsh as eigsh
    from spectral_callbacks.operators import Hessian as Hessian
    from spectral_callbacks.operators import Objective as Objective
    from spectral_callbacks.operators import ParameterSpace as ParameterSpace
    from spectral_callbacks.probe import Probe as Probe
    from spectral_callbacks.probe import undisturbed as undisturbed
    from spectral_callbacks.stability import Edge as Edge
    from spectral_callbacks.stability import stability_rule as stability_rule

__version__ = "0.1.0"

_HOMES = {
    "Sharpness": "callbacks",
    "SpectralCallback": "callbacks",
    "Eigenpairs": "linalg",
    "LinearOperator": "linalg",
    "Status": "linalg",
    "Tracker": "linalg",
    "eigsh": "linalg",
    "Hessian": "operators",
    "Objective": "operators",
    "ParameterSpace": "operators",
    "Probe": "probe",
    "undisturbed": "probe",
    "Edge": "stability",
    "stability_rule": "stability",
}
__all__ = [
    "Edge",
    "Eigenpairs",
    "Hessian",
    "LinearOperator",
    "Objective",
    "ParameterSpace",
    "Probe",
    "Sharpness",
    "SpectralCallback",
    "Status",
    "Tracker",
    "eigsh",
    "stability_rule",
    "undisturbed",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"spectral_callbacks.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'spectral_callbacks' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

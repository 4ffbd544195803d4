"""Optimizer and stability diagnostics for PyTorch Lightning.

Importing the package imports neither torch nor lightning: each public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectral_callbacks.callbacks import DiffusionEntropy as DiffusionEntropy
    from spectral_callbacks.callbacks import Embedding as Embedding
    from spectral_callbacks.callbacks import FactorImbalance as FactorImbalance
    from spectral_callbacks.callbacks import GradientCovariance as GradientCovariance
    from spectral_callbacks.callbacks import HessianSpectrum as HessianSpectrum
    from spectral_callbacks.callbacks import OptimizerState as OptimizerState
    from spectral_callbacks.callbacks import RepresentationGeometry as RepresentationGeometry
    from spectral_callbacks.callbacks import Sharpness as Sharpness
    from spectral_callbacks.callbacks import SpectralCallback as SpectralCallback
    from spectral_callbacks.callbacks import Spectrum as Spectrum
    from spectral_callbacks.callbacks import Text as Text
    from spectral_callbacks.callbacks import TraceStability as TraceStability
    from spectral_callbacks.init import log_normal_weights_ as log_normal_weights_
    from spectral_callbacks.init import rebalance_layers_ as rebalance_layers_
    from spectral_callbacks.init import scale_to_entropy_ as scale_to_entropy_
    from spectral_callbacks.init import split_bias as split_bias
    from spectral_callbacks.linalg import Density as Density
    from spectral_callbacks.linalg import Eigenpairs as Eigenpairs
    from spectral_callbacks.linalg import Estimate as Estimate
    from spectral_callbacks.linalg import LinearOperator as LinearOperator
    from spectral_callbacks.linalg import Status as Status
    from spectral_callbacks.linalg import Tracker as Tracker
    from spectral_callbacks.linalg import eigsh as eigsh
    from spectral_callbacks.linalg import frobenius_norm as frobenius_norm
    from spectral_callbacks.linalg import spectral_density as spectral_density
    from spectral_callbacks.linalg import trace as trace
    from spectral_callbacks.operators import GaussNewton as GaussNewton
    from spectral_callbacks.operators import Hessian as Hessian
    from spectral_callbacks.operators import Objective as Objective
    from spectral_callbacks.operators import ParameterSpace as ParameterSpace
    from spectral_callbacks.optim import DCTAdamW as DCTAdamW
    from spectral_callbacks.optim import DiffGrad as DiffGrad
    from spectral_callbacks.optim import ExponentiatedGradient as ExponentiatedGradient
    from spectral_callbacks.optim import HypentropyGD as HypentropyGD
    from spectral_callbacks.optim import Trion as Trion
    from spectral_callbacks.optim import multiplicative_langevin_sample as multiplicative_langevin_sample
    from spectral_callbacks.optim import multiplicative_score_matching_loss as multiplicative_score_matching_loss
    from spectral_callbacks.probe import Probe as Probe
    from spectral_callbacks.probe import undisturbed as undisturbed
    from spectral_callbacks.stability import Edge as Edge
    from spectral_callbacks.stability import Frame as Frame
    from spectral_callbacks.stability import NoThresholdError as NoThresholdError
    from spectral_callbacks.stability import NotSteppedYetError as NotSteppedYetError
    from spectral_callbacks.stability import ObservableOptimizer as ObservableOptimizer
    from spectral_callbacks.stability import edges as edges
    from spectral_callbacks.stability import no_threshold as no_threshold
    from spectral_callbacks.stability import stability_rule as stability_rule

__version__ = "0.1.0"

_HOMES = {
    "DiffusionEntropy": "callbacks",
    "Embedding": "callbacks",
    "FactorImbalance": "callbacks",
    "GradientCovariance": "callbacks",
    "HessianSpectrum": "callbacks",
    "OptimizerState": "callbacks",
    "RepresentationGeometry": "callbacks",
    "Sharpness": "callbacks",
    "SpectralCallback": "callbacks",
    "Spectrum": "callbacks",
    "Text": "callbacks",
    "TraceStability": "callbacks",
    "log_normal_weights_": "init",
    "rebalance_layers_": "init",
    "scale_to_entropy_": "init",
    "split_bias": "init",
    "Density": "linalg",
    "Eigenpairs": "linalg",
    "Estimate": "linalg",
    "LinearOperator": "linalg",
    "Status": "linalg",
    "Tracker": "linalg",
    "eigsh": "linalg",
    "frobenius_norm": "linalg",
    "spectral_density": "linalg",
    "trace": "linalg",
    "GaussNewton": "operators",
    "Hessian": "operators",
    "Objective": "operators",
    "ParameterSpace": "operators",
    "DCTAdamW": "optim",
    "DiffGrad": "optim",
    "ExponentiatedGradient": "optim",
    "HypentropyGD": "optim",
    "Trion": "optim",
    "multiplicative_langevin_sample": "optim",
    "multiplicative_score_matching_loss": "optim",
    "Probe": "probe",
    "undisturbed": "probe",
    "Edge": "stability",
    "Frame": "stability",
    "NoThresholdError": "stability",
    "NotSteppedYetError": "stability",
    "ObservableOptimizer": "stability",
    "edges": "stability",
    "no_threshold": "stability",
    "stability_rule": "stability",
}
__all__ = [
    "DCTAdamW",
    "Density",
    "DiffGrad",
    "DiffusionEntropy",
    "Edge",
    "Eigenpairs",
    "Embedding",
    "Estimate",
    "ExponentiatedGradient",
    "FactorImbalance",
    "Frame",
    "GaussNewton",
    "GradientCovariance",
    "Hessian",
    "HessianSpectrum",
    "HypentropyGD",
    "LinearOperator",
    "NoThresholdError",
    "NotSteppedYetError",
    "Objective",
    "ObservableOptimizer",
    "OptimizerState",
    "ParameterSpace",
    "Probe",
    "RepresentationGeometry",
    "Sharpness",
    "SpectralCallback",
    "Spectrum",
    "Status",
    "Text",
    "TraceStability",
    "Tracker",
    "Trion",
    "edges",
    "eigsh",
    "frobenius_norm",
    "log_normal_weights_",
    "multiplicative_langevin_sample",
    "multiplicative_score_matching_loss",
    "no_threshold",
    "rebalance_layers_",
    "scale_to_entropy_",
    "spectral_density",
    "split_bias",
    "stability_rule",
    "trace",
    "undisturbed",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"spectral_callbacks.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'spectral_callbacks' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

"""Stability of an optimizer on a quadratic: the metric it moves in and where its edge lies, one rule an optimizer."""

from spectral_callbacks.stability import torch_optim as torch_optim  # registers its rules
from spectral_callbacks.stability.edge import Edge as Edge
from spectral_callbacks.stability.edge import NoThresholdError as NoThresholdError
from spectral_callbacks.stability.edge import NotSteppedYetError as NotSteppedYetError
from spectral_callbacks.stability.edge import Rule as Rule
from spectral_callbacks.stability.edge import edges as edges
from spectral_callbacks.stability.edge import no_threshold as no_threshold
from spectral_callbacks.stability.edge import stability_rule as stability_rule
from spectral_callbacks.stability.frame import Frame as Frame
from spectral_callbacks.stability.observable import ObservableOptimizer as ObservableOptimizer

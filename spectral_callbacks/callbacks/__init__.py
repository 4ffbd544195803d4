"""Lightning callbacks, one a diagnostic."""

from spectral_callbacks.callbacks.base import SpectralCallback as SpectralCallback
from spectral_callbacks.callbacks.factor_imbalance import FactorImbalance as FactorImbalance
from spectral_callbacks.callbacks.gradient_covariance import GradientCovariance as GradientCovariance
from spectral_callbacks.callbacks.hessian_spectrum import HessianSpectrum as HessianSpectrum
from spectral_callbacks.callbacks.optimizer_state import OptimizerState as OptimizerState
from spectral_callbacks.callbacks.reading import Embedding as Embedding
from spectral_callbacks.callbacks.reading import Spectrum as Spectrum
from spectral_callbacks.callbacks.reading import Text as Text
from spectral_callbacks.callbacks.representations import DiffusionEntropy as DiffusionEntropy
from spectral_callbacks.callbacks.representations import RepresentationGeometry as RepresentationGeometry
from spectral_callbacks.callbacks.sharpness import Sharpness as Sharpness
from spectral_callbacks.callbacks.trace_stability import TraceStability as TraceStability

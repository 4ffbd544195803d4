"""Pure functions from tensors to numbers."""

from spectral_callbacks.metrics.conditioning import condition_number as condition_number
from spectral_callbacks.metrics.conditioning import unfitted_modes as unfitted_modes
from spectral_callbacks.metrics.jackknife import jackknife as jackknife
from spectral_callbacks.metrics.noise_alignment import alignment as alignment
from spectral_callbacks.metrics.outliers import Outliers as Outliers
from spectral_callbacks.metrics.outliers import outliers as outliers
from spectral_callbacks.metrics.sgd_stability import SampleHessians as SampleHessians
from spectral_callbacks.metrics.sgd_stability import directional_condition as directional_condition
from spectral_callbacks.metrics.sgd_stability import noise_fraction as noise_fraction
from spectral_callbacks.metrics.sgd_stability import sgd_threshold as sgd_threshold

"""What the features of samples are like: spectra and ranks, similarity, dimension, entropy, phases of training."""

from spectral_callbacks.metrics.representations.alpha_req import PowerLawFit as PowerLawFit
from spectral_callbacks.metrics.representations.alpha_req import alpha_req as alpha_req
from spectral_callbacks.metrics.representations.cka import cka as cka
from spectral_callbacks.metrics.representations.diffusion_entropy import diffusion_entropy as diffusion_entropy
from spectral_callbacks.metrics.representations.diffusion_information import (
    diffusion_mutual_information as diffusion_mutual_information,
)
from spectral_callbacks.metrics.representations.diffusion_kernel import diffusion_kernel as diffusion_kernel
from spectral_callbacks.metrics.representations.diffusion_kernel import kernel_width as kernel_width
from spectral_callbacks.metrics.representations.eigenbasis import BiasedEstimate as BiasedEstimate
from spectral_callbacks.metrics.representations.intrinsic_dimension import two_nn_dimension as two_nn_dimension
from spectral_callbacks.metrics.representations.label_groups import label_groups as label_groups
from spectral_callbacks.metrics.representations.lidar import lidar as lidar
from spectral_callbacks.metrics.representations.moments import FeatureMoments as FeatureMoments
from spectral_callbacks.metrics.representations.phases import Phase as Phase
from spectral_callbacks.metrics.representations.phases import PhaseChange as PhaseChange
from spectral_callbacks.metrics.representations.phases import PhaseDetector as PhaseDetector
from spectral_callbacks.metrics.representations.phases import detect_phases as detect_phases
from spectral_callbacks.metrics.representations.ranks import effective_rank as effective_rank
from spectral_callbacks.metrics.representations.ranks import participation_ratio as participation_ratio
from spectral_callbacks.metrics.representations.ranks import rankme as rankme
from spectral_callbacks.metrics.representations.ranks import spectral_entropy as spectral_entropy
from spectral_callbacks.metrics.representations.ranks import stable_rank as stable_rank
from spectral_callbacks.metrics.representations.ranks import (
    unbiased_participation_ratio as unbiased_participation_ratio,
)
from spectral_callbacks.metrics.representations.spectrum import FeatureSpectrum as FeatureSpectrum

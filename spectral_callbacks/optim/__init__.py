"""Optimizers and samplers: one update rule a file, each with its own stability rule."""

from spectral_callbacks.optim.dct_adamw import DCTAdamW as DCTAdamW
from spectral_callbacks.optim.diffgrad import DiffGrad as DiffGrad
from spectral_callbacks.optim.exponentiated_gradient import ExponentiatedGradient as ExponentiatedGradient
from spectral_callbacks.optim.hypentropy import HypentropyGD as HypentropyGD
from spectral_callbacks.optim.multiplicative_langevin import (
    multiplicative_langevin_sample as multiplicative_langevin_sample,
)
from spectral_callbacks.optim.multiplicative_langevin import reverse_diffusion as reverse_diffusion
from spectral_callbacks.optim.score_matching import (
    multiplicative_score_matching_loss as multiplicative_score_matching_loss,
)
from spectral_callbacks.optim.trion import Trion as Trion

"""Lightning callbacks, one a diagnostic."""

from spectral_callbacks.callbacks.base import SpectralCallback as SpectralCallback
from spectral_callbacks.callbacks.sharpness import Sharpness as Sharpness

"""What the features of a network are doing: their geometry and their entropy."""

from spectral_callbacks.callbacks.representations.diffusion_entropy import DiffusionEntropy as DiffusionEntropy
from spectral_callbacks.callbacks.representations.representation import RepresentationCallback as RepresentationCallback
from spectral_callbacks.callbacks.representations.representation_geometry import (
    RepresentationGeometry as RepresentationGeometry,
)

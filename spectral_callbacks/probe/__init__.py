"""One look at a model in training, without disturbing it."""

from spectral_callbacks.probe.activations import Layer as Layer
from spectral_callbacks.probe.activations import activations as activations
from spectral_callbacks.probe.activations import find_layers as find_layers
from spectral_callbacks.probe.backends import explain as explain
from spectral_callbacks.probe.backends import twice_differentiable as twice_differentiable
from spectral_callbacks.probe.batches import copied as copied
from spectral_callbacks.probe.batches import num_samples as num_samples
from spectral_callbacks.probe.batches import selected as selected
from spectral_callbacks.probe.batches import tensors_of as tensors_of
from spectral_callbacks.probe.isolation import Isolation as Isolation
from spectral_callbacks.probe.isolation import Mode as Mode
from spectral_callbacks.probe.isolation import undisturbed as undisturbed
from spectral_callbacks.probe.metric import Preconditioned as Preconditioned
from spectral_callbacks.probe.outputs import NoOutputsError as NoOutputsError
from spectral_callbacks.probe.outputs import named_module as named_module
from spectral_callbacks.probe.outputs import plain_name as plain_name
from spectral_callbacks.probe.probe import Probe as Probe
from spectral_callbacks.probe.randomness import seed_generators as seed_generators
from spectral_callbacks.probe.selftest import WrongDerivativeError as WrongDerivativeError
from spectral_callbacks.probe.selftest import check_reached as check_reached
from spectral_callbacks.probe.selftest import check_symmetry as check_symmetry
from spectral_callbacks.probe.selftest import unreached_parameters as unreached_parameters

"""Initialisers and re-parameterisations of layers."""

from spectral_callbacks.init.entropy import EntropyScale as EntropyScale
from spectral_callbacks.init.entropy import scale_to_entropy_ as scale_to_entropy_
from spectral_callbacks.init.log_normal import log_normal_ as log_normal_
from spectral_callbacks.init.log_normal import log_normal_weights_ as log_normal_weights_
from spectral_callbacks.init.rebalance import rebalance_ as rebalance_
from spectral_callbacks.init.rebalance import rebalance_layers_ as rebalance_layers_
from spectral_callbacks.init.rebalance import rebalanced as rebalanced
from spectral_callbacks.init.split_bias import SplitBias as SplitBias
from spectral_callbacks.init.split_bias import split_bias as split_bias

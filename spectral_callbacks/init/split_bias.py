"""Biases as sums of an excitatory and an inhibitory part, which multiplicative updates can carry across zero."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Module = TypeVar("Module", bound=nn.Module)
_NAMES = {"bias": "weight", "in_proj_bias": "in_proj_weight"}  # the second of nn.MultiheadAttention
_BOUND_OF_ZERO = 1e-4  # the authors' own, for biases that start at zero


class SplitBias(nn.Module):
    """The parametrization bias = positive + negative.

    Assigning to the bias of a layer splits the value: both parts are away from zero by `bound`, and their sum is it.

    Args:
        bound: Half the width of the uniform law that the undivided bias would have had.

    Example:
        >>> positive, negative = SplitBias(0.5).right_inverse(torch.tensor([0.25, -1.0]))
        >>> positive, negative
        (tensor([0.7500, 0.5000]), tensor([-0.5000, -1.5000]))
    """

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound = bound

    def forward(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Return the bias."""
        return positive + negative

    def right_inverse(self, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return two parts of opposite signs of a bias."""
        return bias.clamp(min=0) + self.bound, bias.clamp(max=0) - self.bound


def split_bias(module: Module, generator: torch.Generator | None = None) -> Module:
    """Replace every bias of a module by the sum of a positive and a negative parameter, drawn anew.

    A weight that is zero, as the biases of most norm layers are at the start, never moves by a multiplicative update,
    and no weight changes its sign; the sum of two parts of opposite signs does. They are uniform in (0, √2 b) and
    (-√2 b, 0), so that the mean of the bias is 0 and its variance b²/3, that of PyTorch's own uniform law, with
    b = 1/√fan_in. Where the bias is zero throughout or belongs to a norm layer, b = 1e-4. Doubles the memory of biases.

    A parametrization of PyTorch: the layer keeps its class, `layer.bias` is the sum, and the parts are the parameters
    `parametrizations.bias.original0` and `original1`. So `state_dict` needs a module that was split alike, a deep copy
    works, and pickling does not. Recurrent layers, whose biases have other names, are left as they are.

    Args:
        module: Any module, changed in place; biases that are split already are left.
        generator: Source of the parts; None for the global one.

    Returns:
        The module.

    References:
        Cornford et al. 2024, Brain-like learning with exponentiated gradients; github.com/linclab/EG_optimiser, whose
        wrapper keeps the sum as an attribute of the layer, so that it cannot be copied after a forward pass.

    Example:
        >>> layer = split_bias(torch.nn.Linear(3, 2), torch.Generator().manual_seed(0))
        >>> [name for name, _ in layer.named_parameters()]
        ['weight', 'parametrizations.bias.original0', 'parametrizations.bias.original1']
        >>> parts = layer.parametrizations.bias
        >>> bool((parts.original0 > 0).all()), bool((parts.original1 < 0).all())
        (True, True)
    """
    for layer in list(module.modules()):
        own = dict(layer.named_parameters(recurse=False))
        for name, weight in _NAMES.items():
            if name in own:
                _split(layer, name, _bound(own[name], own.get(weight)), generator)
    return module


def _bound(bias: Tensor, weight: Tensor | None) -> float:
    if weight is None or weight.ndim < 2 or not bias.any():
        return _BOUND_OF_ZERO
    return 1 / math.sqrt(weight[0].numel())


def _split(layer: nn.Module, name: str, bound: float, generator: torch.Generator | None) -> None:
    parametrize.register_parametrization(layer, name, SplitBias(bound))
    parts = dict(layer.get_submodule(f"parametrizations.{name}").named_parameters())
    smallest = torch.finfo(parts["original0"].dtype).tiny  # the uniform law of a generator includes 0
    with torch.no_grad():
        for part, sign in (("original0", 1), ("original1", -1)):
            drawn = torch.empty_like(parts[part]).uniform_(0, math.sqrt(2) * bound, generator=generator)
            parts[part].copy_(sign * drawn.clamp(min=smallest))

"""Features: what the last layer is given, and the curvature that the loss has in what it returns."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from spectral_callbacks.linalg import trace
from spectral_callbacks.metrics import condition_number, unfitted_modes
from spectral_callbacks.operators import GaussNewton
from spectral_callbacks.probe import Probe, named_module, plain_name, tensors_of

_CURVATURE_PROBES = 10  # products with the curvature in the layer's outputs
_SINGLE = 1e-8  # below float32's rounding error, above float64's
_COARSEST = 1e-4  # rounding error beyond which features are those of half precision
_ROUNDING = 32.0  # rounding errors of the features within which a singular value is none, relative to the largest


@dataclasses.dataclass(frozen=True)
class InputSpectrum:
    """The squared singular values of a layer's input.

    Entries that are off by a share ε shift singular values by about ε of the largest, whatever the shape: that one is
    at least the root mean square of the entries times the root of the longer side.

    Attributes:
        layer: Whose input it is.
        squares: (min(rows, columns),), descending, float64, on the CPU.
        cutoff: Singular values at or below this share of the largest are rounding.
    """

    layer: nn.Module
    squares: Tensor
    cutoff: float

    @property
    def condition_number(self) -> float:
        """The largest singular value over the smallest above the cut-off; NaN where features are not finite."""
        return condition_number(self.squares.sqrt(), cutoff=self.cutoff)


def unfitted_share(probe: Probe, seen: InputSpectrum) -> float:
    """Return the share of a linear layer's modes that so many steps of gradient descent would not have fitted.

    The loss counts as quadratic in the outputs of this layer, with the mean curvature that it has there now.

    Args:
        probe: An open one.
        seen: The spectrum of the layer's input.

    Raises:
        ValueError: If the layer is no `nn.Linear`, or the loss is no function of its outputs alone, or does not curve
            upward in them.
    """
    if not isinstance(seen.layer, nn.Linear):
        raise ValueError(f"{type(seen.layer).__name__} is no nn.Linear, and has no modes to be fitted.")
    names = {module: name for name, module in probe.module.named_modules()}
    at_layer = probe.seen_by(probe.generator, plain_name(names[seen.layer]))
    scale = output_scale(at_layer.gauss_newton(), probe.generator)
    if not scale > 0:
        raise ValueError(
            f"the loss has the mean curvature {scale:.3g} in the outputs of the layer, which is not upward."
        )
    modes = seen.squares[seen.squares > seen.cutoff**2 * seen.squares.max()]
    return unfitted_modes(scale * modes, max(probe.learning_rates()), probe.step)


def spectrum_of_features(probe: Probe, name: str | None, *, seed: int) -> InputSpectrum:
    """Return the spectrum of a layer's input over the batches.

    The feature matrix has a column for each entry of the last dimension and a row for each index of all the others,
    call by call and batch by batch. A linear layer with a bias has a column of ones among its features.

    Args:
        probe: An open one.
        name: Of the layer; the last `nn.Linear` that runs if None.
        seed: Of the dropout masks.

    Raises:
        ValueError: If the layer did not run; or is not linear, and its input neither (samples, features) nor (samples,
            positions, features); or the features are in half precision.
    """
    found = [_inputs(probe, name, batch, seed + index) for index, batch in enumerate(probe.batches)]
    ran = [(layer, rows) for layer, rows in found if layer is not None]
    if not ran:
        layer = "an nn.Linear" if name is None else repr(name)
        raise ValueError(f"the loss did not run {layer}. Pass as features= a layer that it runs.")
    rows = [x for _, calls in ran for x in calls]
    eps = max(torch.finfo(x.dtype).eps for x in rows)
    if eps > _COARSEST:
        raise ValueError(
            "the features are in half precision, whose rounding would pass for most of their small singular values; "
            "measure with precision='full'."
        )
    Z = torch.cat([x.to("cpu", torch.float64) for x in rows])
    return InputSpectrum(ran[-1][0], _squares(Z, exact=eps < _SINGLE), _ROUNDING * eps)


def _squares(Z: Tensor, *, exact: bool) -> Tensor:
    """Return the squared singular values; from the Gram matrix, ten times cheaper, only to half of float64's digits."""
    if not Z.isfinite().all():
        return torch.full((1,), torch.nan)
    if exact:
        return torch.linalg.svdvals(Z).square()
    gram = Z.mT @ Z if Z.shape[0] >= Z.shape[1] else Z @ Z.mT
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0.0)


def output_scale(gauss_newton: GaussNewton, generator: torch.Generator) -> float:
    """Return the mean second derivative of the loss by a single entry of the outputs, from products with random signs.

    A squared loss ½ (f - y)², averaged over N samples, has 1/N, exactly; others to about 1/√(10 · entries).
    """
    total, count = 0.0, 0
    for weight, A in zip(gauss_newton.weights, gauss_newton.output_curvatures(), strict=True):
        draws = [trace(A, num_matvecs=1, method="hutchinson", generator=generator) for _ in range(_CURVATURE_PROBES)]
        total += weight * sum(draw.value for draw in draws) / len(draws)
        count += A.shape[0]
    return total / count


def _inputs(probe: Probe, name: str | None, batch: Any, seed: int) -> tuple[nn.Module | None, list[Tensor]]:
    """Return the layer, if it ran, and what it was given in the course of one evaluation, call by call."""
    seen: dict[nn.Module, list[Tensor]] = {}

    def see(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        x = next((t for t in tensors_of([arguments, keywords]) if t.is_floating_point()), None)
        if x is not None:
            calls = seen.pop(layer, [])  # so that the layer that ran last is last in the dictionary
            seen[layer] = [*calls, _rows(layer, x.detach(), name)]

    if name is None:
        layers = [layer for layer in probe.module.modules() if isinstance(layer, nn.Linear)]
    else:
        layers = [named_module(probe.module, name, knob="features")]
    with contextlib.ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(see, with_kwargs=True).remove)
        probe.evaluate(batch, seed=seed)
    return list(seen.items())[-1] if seen else (None, [])


def _rows(layer: nn.Module, x: Tensor, name: str | None) -> Tensor:  # (rows, columns)
    """Return an input with all its dimensions but the last one in one."""
    if isinstance(layer, nn.Linear):
        x = x.reshape(-1, x.shape[-1])
        return x if layer.bias is None else torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    if x.ndim not in (2, 3) or isinstance(layer, _ConvNd):
        raise ValueError(
            f"the input of features={name!r}, {type(layer).__name__}, has the shape {tuple(x.shape)}, and a feature "
            "matrix is (samples, features) or (samples, positions, features); name a layer behind the pooling, for "
            "example the last nn.Linear."
        )
    return x.reshape(-1, x.shape[-1]).clone()

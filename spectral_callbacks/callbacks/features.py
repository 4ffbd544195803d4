"""Features: what the last layer is given, and the curvature that the loss has in what it returns."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from spectral_callbacks.metrics import condition_number, unfitted_modes
from spectral_callbacks.operators import GaussNewton
from spectral_callbacks.probe import Probe

_CURVATURE_PROBES = 10  # products with the curvature in the outputs, which cost no pass of the network
_SINGLE = 1e-8  # below float32's rounding error, above float64's
_COARSEST = 0.5  # cut-off of features in half precision, whose rounding would pass for all of them


@dataclasses.dataclass(frozen=True)
class FeatureSpectrum:
    """The squared singular values of a feature matrix.

    Attributes:
        squares: (min(rows, columns),), descending, float64, on the CPU.
        cutoff: Singular values at or below this share of the largest are rounding.
        num_rows: Samples, or whatever the dimensions before the last one count.
    """

    squares: Tensor
    cutoff: float
    num_rows: int


def conditioning(
    probe: Probe, name: str | None, gauss_newton: GaussNewton | None, *, seed: int
) -> dict[str, float] | None:
    """Return the condition number of a layer's input, and the share of its modes that training cannot have fitted.

    Args:
        probe: An open one.
        name: Of the layer; the last `nn.Linear` that runs if None.
        gauss_newton: Knows the curvature of the loss in the outputs; a mean of ½ (f - y)² over the rows if None.
        seed: Of the dropout masks.

    Returns:
        `features/condition_number` and `features/unfitted_modes`; NaN where features are not finite; None if the layer
        did not run.
    """
    seen = spectrum_of_features(probe, name, seed=seed)
    if seen is None:
        return None
    scale = 1 / seen.num_rows if gauss_newton is None else output_scale(gauss_newton, probe.generator)
    modes = seen.squares[seen.squares > seen.cutoff**2 * seen.squares.max()]
    return {
        "features/condition_number": condition_number(seen.squares.sqrt(), cutoff=seen.cutoff),
        "features/unfitted_modes": unfitted_modes(scale * modes, max(probe.learning_rates()), probe.step),
    }


def spectrum_of_features(probe: Probe, name: str | None, *, seed: int) -> FeatureSpectrum | None:
    """Return the spectrum of a layer's input over the batches.

    A linear layer with a bias has a column of ones among its features.

    Args:
        probe: An open one.
        name: Of the layer; the last `nn.Linear` that runs if None.
        seed: Of the dropout masks.

    Returns:
        None if the layer did not run.
    """
    rows: list[Tensor] = []
    for index, batch in enumerate(probe.batches):
        rows += _inputs(probe, name, batch, seed + index)
    if not rows:
        return None
    eps = max(torch.finfo(x.dtype).eps for x in rows)
    Z = torch.cat([x.to("cpu", torch.float64) for x in rows])
    return FeatureSpectrum(_squares(Z, exact=eps < _SINGLE), min(max(Z.shape) * eps, _COARSEST), len(Z))


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
    zero = torch.zeros(gauss_newton.shape[0], dtype=gauss_newton.dtype, device=gauss_newton.device)
    shapes = gauss_newton.jvp(zero)
    total, count = 0.0, 0
    for _ in range(_CURVATURE_PROBES):
        signs = [[_signs(output, generator) for output in outputs] for outputs in shapes]
        for weight, z, Az in zip(gauss_newton.weights, signs, gauss_newton.output_curvature(signs), strict=True):
            for x, y in zip(z, Az, strict=True):
                total += weight * (x * y).sum().item()
                count += x.numel()
    return total / count


def output_shape(gauss_newton: GaussNewton) -> tuple[int, int]:
    """Return how many classes and samples there are, for outputs (samples, classes); (1, samples) for any others."""
    zero = torch.zeros(gauss_newton.shape[0], dtype=gauss_newton.dtype, device=gauss_newton.device)
    first = [outputs[0] for outputs in gauss_newton.jvp(zero)]
    return first[0].shape[1] if first[0].ndim == 2 else 1, sum(len(z) if z.ndim else 1 for z in first)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return 2.0 * torch.randint(2, like.shape, generator=generator, device=like.device).to(like.dtype) - 1


def _inputs(probe: Probe, name: str | None, batch: Any, seed: int) -> list[Tensor]:
    """Return what the layer was given in the course of one evaluation, each call as (rows, columns)."""
    seen: dict[str, list[Tensor]] = {}

    def see(dotted: str, layer: nn.Module, x: Tensor) -> None:
        z = x.detach().reshape(-1, x.shape[-1])
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            z = torch.cat([z, z.new_ones(len(z), 1)], dim=1)
        calls = seen.pop(dotted, [])  # so that the layer that ran last is last in the dictionary
        seen[dotted] = [*calls, z]

    with contextlib.ExitStack() as hooks:
        for dotted, layer in probe.module.named_modules():
            if dotted == name or (name is None and isinstance(layer, nn.Linear)):
                handle = layer.register_forward_pre_hook(_watching(dotted, see))
                hooks.callback(handle.remove)
        probe.evaluate(batch, seed=seed)
    return list(seen.values())[-1] if seen else []


def _watching(dotted: str, see: Any) -> Any:
    def hook(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        if arguments and isinstance(arguments[0], Tensor) and arguments[0].is_floating_point():
            see(dotted, layer, arguments[0])

    return hook

"""Initial weights by the diffusion spectral entropy of a layer: one factor for all of them that gives the target."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from spectral_callbacks.init.scale_search import Look, UnreachedError, search_scale
from spectral_callbacks.metrics.representations.diffusion_entropy import diffusion_entropy

_NAMED_WIDTHS = ("official", "sqrt_dim")  # that do not follow the scale of the features
_MULTIDIMENSIONAL_NORMS = (nn.LayerNorm, nn.RMSNorm)  # the norm layers whose gain may have two or more dimensions


@dataclasses.dataclass(frozen=True)
class EntropyScale:
    """The scale of the weights at which a layer has the entropy that was asked for.

    Attributes:
        scale: What every weight was multiplied by.
        entropy: Diffusion spectral entropy of the layer there, in bits.
        tried: (scale, entropy) of every look at the module, in the order of the search; the last is the one found.
    """

    scale: float
    entropy: float
    tried: tuple[Look, ...]


@torch.no_grad()
def scale_to_entropy_(
    module: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],  # (n, ...) each
    *,
    layer: str,
    target: float,
    sigma: float | Literal["official", "sqrt_dim"],
    t: float = 1,
    alpha: float = 0.0,
    max_samples: int = 10_000,
    low: float = 1e-3,
    high: float = 1e3,
    atol: float = 0.01,
    generator: torch.Generator,
) -> EntropyScale:
    """Multiply all weights of a module by one factor, in place, so that a layer's outputs have the entropy `target`.

    The diffusion spectral entropy counts, in bits, how many groups of samples a layer tells apart at the width `sigma`:
    0 for one, log₂ n for all n. With a fixed sigma it grows with the spread of the outputs, and so with the scale of
    the weights: near 0 the layer starts by confusing all samples, near log₂ n it keeps every one to itself. The paper
    proposes it as a guide for the initialisation.

    Scaled is every trainable parameter of two or more dimensions, also behind the layer, once where several layers
    share it. Biases, the gains of norm layers and frozen parameters stay. A norm layer between the weights and the
    layer takes the scale away, and with it what can be reached; a weight that is a product of parameters, by a
    parametrization, is scaled as often as there are factors in it.

    The entropy need not be monotone in the scale: a saturating activation may lower it again. Of several scales with
    the target, the nearest to 1 is found, up to a factor of 2: see `search_scale`.

    The module runs in eval mode, under `no_grad`; batch norm so uses its running statistics, which are 0 and 1 at the
    start. Modes, buffers, gradients and torch's global random generators are as before; after an error the weights too,
    bit for bit.

    Args:
        module: Any module; on the device of the inputs.
        inputs: n samples along the first dimension, or a tuple of positional arguments; some hundred samples suffice,
            and all runs that are compared need the same n, as the entropy grows with it.
        layer: Name of a submodule, as in `named_modules`; "" is the module itself. Its output, one tensor (n, ...), is
            flattened to (n, d).
        target: Bits, between 0 and log₂ n.
        sigma: Width of the kernel, see `diffusion_entropy`; "official" is the paper's 10. There is no default:
            that of `diffusion_entropy`, "median", follows the scale, so that the entropy does not depend on it.
        t: Diffusion time, see `diffusion_entropy`.
        alpha: Anisotropy of the kernel, see `diffusion_entropy`.
        max_samples: Of more samples, a random subset of this size is looked at, the same at every scale.
        low: Smallest scale.
        high: Largest scale.
        atol: Accepted distance from the target, in bits.
        generator: Source of the subset, and of the random vectors of `diffusion_entropy`, on the CPU; both are the same
            at every scale.

    Returns:
        The scale, and all that was tried. Cost: a forward pass of all n samples and n³ operations a look, about 15
        looks.

    Raises:
        ValueError: If no scale gives the target, with what can be reached; if sigma follows the scale; if the layer
            does not exist, does not run exactly once, or returns something else than one tensor (n, ...).

    References:
        Liao et al. 2024, Assessing neural network representations during training using noise-resilient diffusion
        spectral entropy, arXiv:2312.04823.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.randn(64, 8, generator=generator)
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        >>> found = scale_to_entropy_(net, x, layer="1", target=3.0, sigma=1.0, generator=generator)
        >>> abs(found.entropy - 3.0) < 0.01, found.tried[-1] == (found.scale, found.entropy)
        (True, True)
    """
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    num_samples = _num_samples(arguments)
    bits = math.log2(min(num_samples, max_samples))
    if isinstance(sigma, str) and sigma not in _NAMED_WIDTHS:
        follows = (
            ", which follows the scale of the features, so that their entropy is the same at every scale of the weights"
        )
        raise ValueError(
            f"sigma is {sigma!r}{follows if sigma == 'median' else ''}. Choose a fixed width: a number, 'official' "
            "(10) or 'sqrt_dim'."
        )
    if not 0 < target < bits:
        raise ValueError(
            f"target is {target!r} bits, and must lie between 0 and log2 n = {bits:.4g}: the entropy of {num_samples} "
            "samples takes no other value. Choose a smaller target or pass more samples."
        )
    if not 0 < low <= 1 <= high < math.inf:
        raise ValueError(f"low={low!r} and high={high!r} must be finite and positive, with 1 between them.")
    if not atol > 0:
        raise ValueError(f"atol is {atol!r} bits, and must be positive.")
    watched, weights = _submodule(module, layer), _weights(module)
    originals = [weight.clone() for weight in weights]
    seed = int(torch.randint(2**63 - 1, (), generator=generator))

    def entropy_at(scale: float) -> float:
        for weight, original in zip(weights, originals, strict=True):
            weight.copy_(original * scale)
        features = _features(module, watched, arguments, layer)
        if not features.isfinite().all():
            return math.nan
        return diffusion_entropy(
            features,
            sigma=sigma,
            t=t,
            alpha=alpha,
            max_samples=max_samples,
            generator=torch.Generator().manual_seed(seed),
        ).value

    found = False
    try:
        looks = search_scale(entropy_at, target, low=low, high=high, atol=atol)
        found = True
    except UnreachedError as error:
        raise ValueError(_unreached(layer, target, bits, error)) from error
    finally:
        if not found:
            for weight, original in zip(weights, originals, strict=True):
                weight.copy_(original)
    return EntropyScale(*looks[-1], tuple(looks))


def _unreached(layer: str, target: float, bits: float, error: UnreachedError) -> str:
    """Return what was asked for, what can be had, and what to do."""
    finite = [(scale, entropy) for scale, entropy in error.looks if not math.isnan(entropy)]
    infinite = [scale for scale, entropy in error.looks if math.isnan(entropy)]
    if not finite:
        return (
            f"the outputs of layer={layer!r} are not finite as the module is. Look for NaN or infinity in the inputs "
            "and the weights."
        )
    scales, entropies = zip(*finite, strict=True)
    beyond = f" At scale {infinite[0]:g} its outputs are not finite." if infinite else ""
    return (
        f"{error}. The entropy of layer={layer!r} lies between {min(entropies):.4g} and "
        f"{max(entropies):.4g} bits at the scales looked at, {min(scales):g} to {max(scales):g}; log2 n is {bits:.4g}."
        f"{beyond} Choose a target in between, another sigma or a wider range of scales, and after a jump a larger "
        "atol. Where the entropy is the same at all scales, no weight before the layer changes its outputs: a norm "
        "layer may lie in between."
    )


def _num_samples(arguments: tuple[Tensor, ...]) -> int:
    shapes = [tuple(argument.shape) for argument in arguments]
    if not shapes or not all(shapes) or len({shape[0] for shape in shapes}) > 1 or shapes[0][0] < 2:
        raise ValueError(f"inputs have the shapes {shapes}, and must hold the same two or more samples in dimension 0.")
    return shapes[0][0]


def _submodule(module: nn.Module, name: str) -> nn.Module:
    by_name = dict(module.named_modules(remove_duplicate=False))
    if name in by_name:
        return by_name[name]
    close = difflib.get_close_matches(name, by_name, n=3, cutoff=0.5) or [dotted for dotted in by_name if dotted][:5]
    hint = f"Close to it: {', '.join(map(repr, close))}; " if close else ""
    raise ValueError(
        f'layer={name!r} names no submodule of {type(module).__name__}. {hint}layer="" is the module itself.'
    )


def _weights(module: nn.Module) -> list[nn.Parameter]:
    """Return what is scaled, each once however often it is used."""
    gains = {
        id(gain)
        for norm in module.modules()
        if isinstance(norm, _MULTIDIMENSIONAL_NORMS)
        for gain in norm.parameters(recurse=False)
    }
    lazy = [name for name, parameter in module.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ValueError(f"the parameter {lazy[0]} has no shape yet: run the module once on the inputs first.")
    weights = [p for p in module.parameters() if p.ndim >= 2 and p.requires_grad and id(p) not in gains]
    if not weights:
        raise ValueError(
            f"{type(module).__name__} has no trainable parameter of two or more dimensions, so that there is nothing "
            "to scale. Unfreeze its weights."
        )
    return weights


def _features(
    module: nn.Module, watched: nn.Module, arguments: tuple[Tensor, ...], layer: str
) -> Tensor:  # (n, d), what the layer returns
    outputs: list[object] = []
    handle = watched.register_forward_hook(lambda _module, _arguments, output: outputs.append(output))
    try:
        with _without_trace(module):
            module(*arguments)
    finally:
        handle.remove()
    num_samples = len(arguments[0])
    if len(outputs) != 1:
        raise ValueError(
            f"layer={layer!r} runs {len(outputs)} times in one forward pass, and must run once. Name a layer around it."
        )
    (output,) = outputs
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.shape[:1] != (num_samples,):
        found = f"a {output.dtype} of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output)
        raise ValueError(
            f"layer={layer!r} returns {found}, and must return one floating tensor with the {num_samples} samples in "
            "its first dimension. Name a layer inside or behind it that does."
        )
    return output.flatten(1) if output.ndim > 1 else output[:, None]


@contextlib.contextmanager
def _without_trace(module: nn.Module) -> Iterator[None]:
    """Put the module in eval mode, and bring modes, buffers and torch's generators back."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        try:
            module.eval()
            yield
        finally:
            for submodule, mode in modes:
                submodule.training = mode
            for buffer, kept in buffers:
                buffer.copy_(kept)

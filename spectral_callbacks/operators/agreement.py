"""Agreement: whether what is said of single samples adds up to what autograd says of a batch, and of parts of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from spectral_callbacks.operators.factors import Factor
from spectral_callbacks.operators.graphs import dense_gradients
from spectral_callbacks.operators.layout import Layout
from spectral_callbacks.operators.parameters import ParameterSpace
from spectral_callbacks.operators.uses import Uses, find_uses
from spectral_callbacks.operators.watch import FactorStream, watch

_ROUNDING = 3.0  # in units of √ε: between the sum of the samples' gradients and the gradient of the same pass
_LAYER = 2.0  # in units of ε of the operations: they may compute in another precision than the parameters'
_MEAN = 0.02  # relative, between passes over a batch and a part of it; the rounding of bfloat16 stays below 0.002
_ROOM = 0.01  # in units of the root mean square over the samples: near a minimum the gradients of most are rounding
_SPREADS = 5.0  # errors by which means over several seeds may differ

Run = Callable[..., Tensor]
"""(indices (m,) of samples or None for all, *, seed=0, in_eval_mode=False) -> loss () of these as a batch."""


def disagreeing(
    space: ParameterSpace,
    treated: Callable[[Uses], tuple[Uses, Sequence[Layout]]],
    run: Run,
    num_samples: int,
    seeds: range,
    *,
    in_eval_mode: bool,
) -> dict[int, str]:
    """Compare sums of the samples' gradients with gradients: over the batch, and over parts of it that run alone.

    The parts are the first sample, the last one, and a random half.

    Args:
        space: The parameters.
        treated: Returns the uses whose samples can be told apart, with their layouts.
        run: Evaluates the loss on some of the samples.
        num_samples: N, in the batch.
        seeds: Of the random numbers; means over them are compared.
        in_eval_mode: Whether the module runs in eval mode.

    Returns:
        Index of a parameter by which they disagree -> in what way.

    Raises:
        ValueError: If all parameters disagree on parts of the batch: then the loss is not the mean over its samples.
    """
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(1))  # not those replaced before
    parts = [torch.tensor([i]) for i in dict.fromkeys((0, num_samples - 1))]
    parts.append(order[: (num_samples + 1) // 2].sort().values)
    shares = torch.zeros(num_samples, 1 + len(parts))
    shares[:, 0] = 1
    for column, part in enumerate(parts, start=1):
        shares[part, column] = num_samples / len(part)
    comparisons: list[dict[int, _Comparison]] = [{} for _ in range(1 + len(parts))]
    epsilon = 0.0
    for seed in seeds:
        alone = [dense_gradients(run(part, seed=seed, in_eval_mode=in_eval_mode), space.tensors) for part in parts]
        loss = run(None, seed=seed, in_eval_mode=in_eval_mode)
        uses, layouts = treated(find_uses(loss, space.tensors))
        epsilon = max([epsilon, *(torch.finfo(use.output_dtype).eps for use in uses.uses)])
        sums, together = _sums(space, uses, layouts, loss, shares)
        for parameter, (values, rms) in sums.items():
            for comparison, value, truth in zip(comparisons, values, [together, *alone], strict=True):
                comparison.setdefault(parameter, _Comparison(rms)).add(value, truth[parameter])
    margin = max(_LAYER * epsilon, _ROUNDING * math.sqrt(max(torch.finfo(p.dtype).eps for p in space.tensors)))
    off = {p for p, comparison in comparisons[0].items() if comparison.excess(margin, margin) > 0}
    wrong = dict.fromkeys(sorted(off), "its samples' gradients do not add up to the gradient")
    for part, comparison in zip(parts, comparisons[1:], strict=True):
        rest = {p: found for p, found in comparison.items() if p not in wrong}
        off = {p for p, found in rest.items() if found.excess(_MEAN, _ROOM) > 0}
        if off and off >= {p for p, found in rest.items() if found.is_weighty(rest.values())}:
            _refuse_other_than_mean(rest.values(), num_samples, len(part))
        wrong |= dict.fromkeys(sorted(off), "its samples cannot be told apart")
    return wrong


class _Comparison:
    """Of two ways to one vector, averaged over seeds.

    Args:
        rms: Root mean square of the norms of the samples' gradients.
    """

    def __init__(self, rms: float) -> None:
        self._rms = rms
        self._count = 0
        self._total: Tensor | float = 0.0
        self._squares = 0.0
        self.norms = (0.0, 0.0)

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add what one seed gave."""
        difference = (a - b).double()
        self._count += 1
        self._total = self._total + difference
        self._squares += difference.square().sum().item()
        first, second = (torch.linalg.vector_norm(t).item() for t in (a, b))
        self.norms = (self.norms[0] + first, self.norms[1] + second)

    def excess(self, margin: float, room: float) -> float:
        """Return by how much they differ more than a share of their norm, one of the samples' norms, and by chance."""
        n = self._count
        squared = torch.as_tensor(self._total).square().sum().item() / n**2
        chance = max(self._squares - n * squared, 0.0) / (n * (n - 1)) if n > 1 else 0.0
        return squared**0.5 - margin * max(self.norms) / n - room * self._rms - _SPREADS * chance**0.5

    def is_weighty(self, among: Iterable[_Comparison]) -> bool:
        """Return whether it holds more than a hundredth of the largest gradient."""
        return max(self.norms) > _ROOM * max(max(other.norms) for other in among)


def _sums(
    space: ParameterSpace,
    uses: Uses,
    layouts: Sequence[Layout],
    loss: Tensor,
    shares: Tensor,  # (N, k)
) -> tuple[dict[int, tuple[Tensor, float]], list[Tensor]]:
    """Return k sums of the samples' gradients by each parameter and their root mean square, and the gradient."""
    num_samples = len(shares)
    found: dict[int, tuple[Tensor, float]] = {}

    def consume(parameter: int, factor: Factor) -> None:
        squares = factor.gram().diagonal().double().sum().item()
        found[parameter] = factor.combined(shares.to(space.device)), math.sqrt(num_samples * squares)

    stream = FactorStream(uses.uses, layouts, num_samples, num_samples, consume)
    handles = watch(uses.uses, stream.see)
    try:
        gradients = dense_gradients(loss, space.tensors)
    finally:
        for handle in handles:
            handle.remove()
    stream.finish()
    return found, gradients


def _refuse_other_than_mean(comparisons: Iterable[_Comparison], num_samples: int, part: int) -> None:
    a, b = (math.hypot(*norms) for norms in zip(*(comparison.norms for comparison in comparisons), strict=True))
    is_sum = abs(a * part - b * num_samples) <= _MEAN * b * num_samples
    what = "it is their sum" if is_sum else "a sum, class weights, masked entries?"
    raise ValueError(
        f"the loss of a batch is not the mean over its samples ({what}): the gradient of {part} of the {num_samples} "
        f"has the norm {a:.4g} by their parts in the whole, and {b:.4g} by themselves, so per-sample quantities have "
        "no meaning; pass loss= that is a mean, or leave this quantity out."
    )

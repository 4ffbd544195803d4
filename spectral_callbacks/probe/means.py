"""Means: whether the loss of a batch is the mean over its samples, without which none has a part of its own in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from spectral_callbacks.operators import Objective, ParameterSpace
from spectral_callbacks.probe.batches import num_samples, selected, shares

_MARGIN = 0.02  # relative; the rounding of bfloat16 stays below 0.002
_NUM_SEEDS = 8
_SPREADS = 16.0  # further from the mean of 8 normal numbers another one is once in 100,000 times


def check_mean(
    space: ParameterSpace,
    batches: Sequence[Any],
    evaluate: Callable[..., Tensor],
    *,
    seed: int,
    gram: Tensor,  # (m, m)
    losses: Tensor | None,  # (m,)
) -> None:
    """Raise unless the first samples, as one batch, have the norm of the mean of their gradients, and their mean loss.

    The margin is 2 % of the number, or of what it would be were the gradients independent, and the losses of one sign.
    Masks that a batch draws are not those of single samples: where the numbers change with the seed, the margin grows
    by 16 times their spread over 8 seeds, and they are compared in eval mode too, if the loss runs there.

    Args:
        space: The parameters.
        batches: All of them.
        evaluate: (batch, *, seed, in_eval_mode) -> loss with its graph.
        seed: Of the random numbers.
        gram: Inner products of the gradients of the first samples over the batches, each alone.
        losses: Of these samples; None leaves it to the gradients.

    Raises:
        ValueError: With what differs.
    """
    m = len(gram)
    places, own = zip(*shares(batches, torch.arange(m)), strict=True)
    parts = [selected(batches[place], chosen) for place, chosen in zip(places, own, strict=True)]
    sizes = list(map(num_samples, parts))

    def whole(number: int, *, in_eval_mode: bool) -> Tensor:  # (2,)
        first = seed + number * len(batches)
        run = [partial(evaluate, part, seed=first + i, in_eval_mode=in_eval_mode) for i, part in enumerate(parts)]
        return _numbers(Objective(space, run, sizes))

    alone, scale = [gram.mean().clamp_min(0.0).sqrt()], [(gram.diagonal().mean() / m).sqrt()]
    if losses is not None:
        alone, scale = [*alone, losses.mean()], [*scale, losses.abs().mean()]
    runs = _runs(partial(whole, in_eval_mode=False))
    _compare(torch.stack(alone), runs, torch.stack(scale))
    if len(runs) == 1:
        return
    ones = [selected(part, torch.tensor([i])) for part in parts for i in range(num_samples(part))]
    try:
        quiet = _numbers(Objective(space, [partial(evaluate, one, seed=seed, in_eval_mode=True) for one in ones]))
        runs = _runs(partial(whole, in_eval_mode=True))
    except Exception:  # noqa: BLE001 - the user's code, in a mode that it may not be made for
        return
    _compare(quiet, runs, torch.stack(scale), " in eval mode")


def refuse_coupling(module: nn.Module) -> None:
    """Raise if a module normalises by the statistics of the batch, so that a sample depends on the others."""
    for name, submodule in module.named_modules():
        if isinstance(submodule, _BatchNorm) and (submodule.training or submodule.running_mean is None):
            raise ValueError(
                f"{type(submodule).__name__} {name!r} normalises by the statistics of the batch, so no sample has a "
                'loss of its own; measure with mode="eval" (running statistics), or leave this per-sample quantity out.'
            )


def _numbers(objective: Objective) -> Tensor:  # (2,)
    norm = torch.linalg.vector_norm(objective.gradient()).item()
    return torch.tensor([norm, objective.loss()], dtype=torch.float64)


def _runs(run: Callable[[int], Tensor]) -> Tensor:  # (1, 2) or (8, 2)
    """Return the numbers of one seed where they do not depend on it, else those of several."""
    first, second = run(0), run(1)
    if torch.equal(first, second):
        return first[None]
    return torch.stack([first, second, *map(run, range(2, _NUM_SEEDS))])


def _compare(
    alone: Tensor,  # (2,)
    runs: Tensor,  # (seeds, 2)
    scale: Tensor,  # (2,) or, to leave the loss out, (1,)
    where: str = "",
) -> None:
    spread = runs.std(0) if len(runs) > 1 else torch.zeros_like(runs[0])
    names = ("the norm of its gradient", "it")
    for name, unit, one, whole, own in zip(names, scale, alone, runs.mean(0), spread, strict=False):
        margin = _MARGIN * torch.stack([unit, one.abs(), whole.abs()]).nan_to_num(0.0).max() + _SPREADS * own
        if whole.isfinite() and not (whole - one).abs() <= margin:
            raise ValueError(
                "the loss of a batch is not the mean over its samples (a sum, class weights, masked entries?): "
                f"{name}{where} is {whole.item():.4g} for a batch and {one.item():.4g} for the mean over its samples, "
                "so per-sample quantities have no meaning; pass loss= that is a mean, or leave this quantity out."
            )

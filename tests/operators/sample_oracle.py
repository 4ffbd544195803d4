"""Gradients of single samples, through the uses of the parameters and by running every sample alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spectral_callbacks.operators.factors import Factor, Sum
from spectral_callbacks.operators.layout import Layout, find_layout, regrouped
from spectral_callbacks.operators.paths import Along
from spectral_callbacks.operators.readers import Contribution
from spectral_callbacks.operators.uses import Use, find_uses

Loss = Callable[..., Tensor]
"""(*tensors, samples first) -> loss (), the mean over the samples."""


def contributions(loss: Tensor, uses: Sequence[Use]) -> list[Contribution]:
    """Return what each use contributes, as prehooks of a full backward pass see it."""
    found: dict[int, Contribution] = {}

    def see(index: int, gradients: tuple[Tensor, ...]) -> None:
        with torch.no_grad():
            found[index] = uses[index].contribution(gradients[0])

    handles = [
        use.node.register_prehook(lambda gradients, index=index: see(index, gradients))
        for index, use in enumerate(uses)
    ]
    loss.backward()
    for handle in handles:
        handle.remove()
    return [found[index] for index in range(len(uses))]


def layouts(loss: Loss, parameters: Sequence[Tensor], batch: Sequence[Tensor]) -> list[Layout | None]:
    """Return the layout of each use, from the items that change when samples are replaced by others."""
    N = len(batch[0])
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    half = N // 2
    indices = torch.arange(N).index_copy_(0, order[:half], order[half : 2 * half])
    replaced = torch.zeros(N, dtype=torch.bool).index_fill_(0, order[:half], True)
    losses = loss(*batch), loss(*(t[indices] for t in batch))
    first, second = (contributions(value, find_uses(value, parameters).uses) for value in losses)
    result: list[Layout | None] = []
    for a, b in zip(first, second, strict=True):
        changed = torch.stack([_changed(t, s) for t, s in zip(a.tensors, b.tensors, strict=True)]).any(0)
        result.append(find_layout(changed, replaced))
    return result


def by_uses(
    loss: Loss, parameters: Sequence[Tensor], batch: Sequence[Tensor]
) -> tuple[dict[int, Factor], dict[int, str]]:
    """Return, for each parameter that is treated, the gradients of all samples, as shares in the mean; and the rest."""
    N = len(batch[0])
    places = layouts(loss, parameters, batch)
    value = loss(*batch)
    found = find_uses(value, parameters)
    parts: dict[int, list[Factor]] = {}
    for use, layout, seen in zip(found.uses, places, contributions(value, found.uses), strict=True):
        if layout is None:
            raise ValueError(f"the samples are coupled in {use.node.name()}")
        factor = seen.build(*(regrouped(t, layout, N) for t in seen.tensors))
        parts.setdefault(use.parameter, []).append(Along(factor, use.path))
    return {index: Sum(factors) for index, factors in parts.items()}, found.untreated


def one_by_one(loss: Loss, parameters: Sequence[Tensor], batch: Sequence[Tensor]) -> list[Tensor]:  # (N, *p.shape) each
    """Return the gradients by running every sample alone."""
    rows: list[list[Tensor]] = []
    for i in range(len(batch[0])):
        value = loss(*(t[i : i + 1] for t in batch))
        gradients = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        rows.append([g.to_dense() for g in gradients])
    return [torch.stack(g) for g in zip(*rows, strict=True)]


def _changed(a: Tensor, b: Tensor) -> Tensor:  # (R,)
    difference = (a.double() - b.double()).abs().reshape(len(a), -1).amax(1)
    return difference > 1e-10 * a.double().abs().max()

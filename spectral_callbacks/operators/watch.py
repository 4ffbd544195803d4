"""Watching a backward pass: what it brings to the operations through which parameters reach the samples."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from spectral_callbacks.operators.factors import Factor, Sum
from spectral_callbacks.operators.layout import Layout, regrouped
from spectral_callbacks.operators.paths import Along
from spectral_callbacks.operators.uses import Use, Uses

See = Callable[[int, Tensor], None]
"""(index of a use, gradient of the output of its operation)."""
Consume = Callable[[int, Factor], None]
"""(index of a parameter, the gradients of all samples by it)."""


class FactorStream:
    """Turns the gradients that a backward pass brings into those of single samples, parameter by parameter.

    A parameter is handed on as soon as the last of its uses was seen, and what its gradients are made of is dropped.

    Args:
        uses: All that are watched.
        layouts: Of each, which item belongs to which sample.
        num_samples: N, in the batch.
        first: How many of them to take, the first ones.
        consume: Is given each parameter with its gradients, of the loss that is differentiated: shares of the samples
            in the loss of the batch.
        num_passes: How many passes are watched. With several, each sample has one gradient a pass, and these count as
            samples, those of one sample side by side.
    """

    def __init__(
        self,
        uses: Sequence[Use],
        layouts: Sequence[Layout],
        num_samples: int,
        first: int,
        consume: Consume,
        *,
        num_passes: int = 1,
    ) -> None:
        self._uses = uses
        self._layouts = layouts
        self._num_samples = num_samples
        self._first = first
        self._consume = consume
        self._num_passes = num_passes
        self._awaited = collections.Counter(use.parameter for use in uses)
        self._arrived: dict[int, list[tuple[Tensor, ...]]] = {index: [] for index in range(len(uses))}
        self._seen: dict[int, list[Factor]] = {parameter: [] for parameter in self._awaited}

    def see(self, index: int, gradient: Tensor) -> None:
        """Take in what arrived at one use."""
        use, layout = self._uses[index], self._layouts[index]
        contribution = use.contribution(gradient)
        arrived = self._arrived[index]
        own = tuple(regrouped(t, layout, self._num_samples) for t in contribution.tensors)
        arrived.append(own if self._first == self._num_samples else tuple(t[: self._first] for t in own))
        if len(arrived) < self._num_passes:
            return
        del self._arrived[index]
        own = arrived[0] if len(arrived) == 1 else [torch.stack(t, 1).flatten(0, 1) for t in zip(*arrived, strict=True)]
        self._seen[use.parameter].append(Along(contribution.build(*own), use.path))
        self._awaited[use.parameter] -= 1
        if not self._awaited[use.parameter]:
            self._hand_on(use.parameter)

    @property
    def num_bytes(self) -> int:
        """Of what waits for more passes, from one of them."""
        return sum(t.nbytes for arrived in self._arrived.values() for tensors in arrived[:1] for t in tensors)

    def finish(self) -> None:
        """Hand on the parameters that have a use which no gradient reached."""
        for parameter in [parameter for parameter, seen in self._seen.items() if seen]:
            self._hand_on(parameter)

    def _hand_on(self, parameter: int) -> None:
        seen = self._seen.pop(parameter)
        self._consume(parameter, seen[0] if len(seen) == 1 else Sum(seen))


def watch(uses: Iterable[tuple[int, Use]], see: See) -> list[RemovableHandle]:
    """Let a function see what the next backward pass brings to these uses; return what takes it away again."""
    return [use.node.register_prehook(functools.partial(_pass_on, see, index)) for index, use in uses]


def visit(loss: Tensor, uses: Uses, see: See, *, retain_graph: bool = False) -> None:
    """Run a backward pass that reaches all uses and computes the gradient of no parameter."""
    if not uses.uses:
        return
    edges = {edge.node: edge for edge in uses.terminals}
    handles = watch([(i, use) for i, use in enumerate(uses.uses) if use.node not in edges], see)
    try:
        gradients = torch.autograd.grad(loss, list(edges.values()), retain_graph=retain_graph, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    arrived = dict(zip(edges, gradients, strict=True))
    with torch.no_grad():
        for index, use in enumerate(uses.uses):
            gradient = arrived.get(use.node)
            if gradient is not None:
                see(index, gradient)


def _pass_on(see: See, index: int, gradients: tuple[Tensor | None, ...]) -> None:
    if gradients[0] is not None:
        with torch.no_grad():
            see(index, gradients[0])

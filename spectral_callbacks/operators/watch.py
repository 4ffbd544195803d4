"""Watching a backward pass: what it brings to the operations through which parameters reach the samples."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from spectral_callbacks.operators.factors import Factor, Sum
from spectral_callbacks.operators.layout import Layout, regrouped
from spectral_callbacks.operators.paths import Along
from spectral_callbacks.operators.uses import Use, Uses

See = Callable[[Sequence[int], Tensor], None]
"""(indices of the uses in one operation, gradient of its output)."""
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

    def see(self, indices: Sequence[int], gradient: Tensor) -> None:
        """Take in what arrived at the uses in one operation."""
        for index in indices:
            self._take(index, gradient)

    def _take(self, index: int, gradient: Tensor) -> None:
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


def watch(uses: Sequence[Use], see: See) -> list[RemovableHandle]:
    """Let a function see what the next backward pass brings to these uses; return what takes it away again."""
    return _hooked(_by_node(uses), see)


def visit(loss: Tensor, uses: Uses, see: See, *, retain_graph: bool = False) -> None:
    """Run a backward pass that reaches all uses and computes the gradient of no parameter."""
    nodes = _by_node(uses.uses)
    if not nodes:
        return
    edges = uses.terminals
    ends = {edge.node: nodes.pop(edge.node) for edge in edges}
    handles = _hooked(nodes, see)
    try:
        gradients = torch.autograd.grad(loss, edges, retain_graph=retain_graph, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    for indices, gradient in zip(ends.values(), gradients, strict=True):
        _pass_on(see, indices, (gradient,))


def _hooked(nodes: Mapping[Node, Sequence[int]], see: See) -> list[RemovableHandle]:
    return [node.register_prehook(functools.partial(_pass_on, see, indices)) for node, indices in nodes.items()]


def _by_node(uses: Sequence[Use]) -> dict[Node, list[int]]:
    found: dict[Node, list[int]] = {}
    for index, use in enumerate(uses):
        found.setdefault(use.node, []).append(index)
    return found


def _pass_on(see: See, indices: Sequence[int], gradients: tuple[Tensor | None, ...]) -> None:
    if gradients[0] is not None:
        with torch.no_grad():
            see(indices, gradients[0])

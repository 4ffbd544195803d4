"""Uses: the operations in which parameters meet the samples of a batch, read off the autograd graph of a loss."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from torch import Size, Tensor, dtype
from torch.autograd.graph import GradientEdge, Node

from spectral_callbacks.operators.choices import choice_of
from spectral_callbacks.operators.nodes import LEAF, NoKernelError, step_of
from spectral_callbacks.operators.paths import Path
from spectral_callbacks.operators.readers import Contribution, Reading, output_shape, reading_of

_HIDES_ITS_GRAPH = "CheckpointFunctionBackward"  # reentrant: what runs inside is no part of the graph


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """One operation that takes a parameter, or what a path makes of it, together with the samples.

    Attributes:
        parameter: Index among those given.
        node: The operation in the graph.
        signature: The same whenever the same code runs, on a batch of any size.
        reading: How the operation is read.
    """

    parameter: int
    node: Node
    signature: Hashable
    reading: Reading

    @property
    def path(self) -> Path:
        """From the parameter to the tensor that the factors are gradients by."""
        return self.reading.path

    @property
    def output_shape(self) -> Size:
        """Of the operation."""
        return output_shape(self.node)

    @property
    def output_dtype(self) -> dtype:
        """Of the operation."""
        node: Any = self.node
        return node._input_metadata[0].dtype

    def contribution(self, gradient: Tensor) -> Contribution:
        """Return what the samples' gradients are made of.

        Args:
            gradient: Of the operation's output, as a prehook of the node is given first. It must not have run backward
                yet, or still hold what it has saved.
        """
        return self.reading.contribution(gradient)


@dataclasses.dataclass(frozen=True)
class Uses:
    """All uses of some parameters in one loss.

    Attributes:
        uses: By parameter, in an order that the graph gives.
        untreated: Index of a parameter that is used in an operation without a kernel -> its name. Such a parameter has
            no uses.
        choices: What the loss has chosen by its data, as `choice_of` tells.
    """

    uses: tuple[Use, ...]
    untreated: dict[int, str]
    choices: tuple[Hashable, ...] = ()

    def only(self, uses: Sequence[Use]) -> Uses:
        """Return some of the uses."""
        return Uses(tuple(uses), self.untreated, self.choices)

    @functools.cached_property
    def terminals(self) -> tuple[GradientEdge, ...]:
        """The operations from which a backward pass reaches no other use.

        With these as its inputs, `torch.autograd.grad` visits all uses and computes the gradient of no parameter. It
        returns the gradients of these operations' outputs, and does not run the operations: what they have saved stays.
        """
        nodes = dict.fromkeys(use.node for use in self.uses)
        leads_on: dict[Node, bool] = {}
        for node in _children_first(nodes):
            leads_on[node] = any(child in nodes or leads_on[child] for child, _ in node.next_functions if child)
        return tuple(GradientEdge(node, 0) for node in nodes if not leads_on[node])


def find_uses(loss: Tensor, parameters: Sequence[Tensor]) -> Uses:
    """Return where the parameters meet the samples: one walk over the graph of the loss, no pass.

    Every consumer of a parameter is followed through the operations on parameters alone (views, parts, casts, numbers
    and masks that it is multiplied with, tables of positions) to the first operation that mixes in something else. No
    saved tensor of that one is looked at, nor any that hooks hold, so a backward pass later finds everything as it was.

    Args:
        loss: With its graph.
        parameters: Tensors that the graph may depend on; one that it does not depend on has no use.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer = nn.Linear(3, 1)
        >>> found = find_uses(layer(torch.ones(5, 3)).mean(), list(layer.parameters()))
        >>> [(use.parameter, use.node.name()) for use in found.uses], found.untreated
        ([(0, 'AddmmBackward0'), (1, 'AddmmBackward0')], {})
    """
    if loss.grad_fn is None:
        return Uses((), {})
    graph = _Graph(loss.grad_fn)
    uses: list[Use] = []
    untreated: dict[int, str] = {}
    for index, p in enumerate(parameters):
        if not p.requires_grad:
            continue
        if graph.hidden:
            untreated[index] = graph.hidden
            continue
        node = graph.leaves.get(id(p))
        if node is None:
            continue
        try:
            found = list(graph.readings(node, 0, Path(Size(p.shape))))
        except NoKernelError as error:
            untreated[index] = str(error)
        else:
            uses += [Use(index, node, (index, *signature), reading) for node, signature, reading in found]
    return Uses(tuple(uses), untreated, tuple(graph.choices))


_Found = tuple[Node, tuple[Hashable, ...], Reading]


class _Graph:
    """The graph of a loss, from the inputs of its operations to the loss."""

    def __init__(self, root: Node) -> None:
        self.hidden: str | None = None
        self.leaves: dict[int, Node] = {}
        self.choices: list[Hashable] = []
        self._root = root
        self._consumers: dict[Node, list[tuple[Node, int, int]]] = {root: []}  # operation, its input, our output
        stack = [root]
        while stack:
            node: Any = stack.pop()
            name = node.name()
            if name == LEAF:
                self.leaves[id(node.variable)] = node
            elif name == _HIDES_ITS_GRAPH:
                self.hidden = f"{name}: pass use_reentrant=False to torch.utils.checkpoint"
            choice = choice_of(node, name)
            if choice is not None:
                self.choices.append(choice)
            for slot, (child, output) in enumerate(node.next_functions):
                if child is None:
                    continue
                if child not in self._consumers:
                    self._consumers[child] = []
                    stack.append(child)
                self._consumers[child].append((node, slot, output))

    def readings(self, node: Node, output: int, path: Path) -> Iterator[_Found]:
        """Yield all uses of the tensor that the path makes.

        Raises:
            NoKernelError: If one of them has no kernel.
        """
        if node is self._root:
            raise NoKernelError(f"{node.name()}, with which it is part of the loss beside the samples")
        for consumer, slot, place in self._consumers.get(node, ()):
            if place == output:
                yield from self._of(consumer, slot, path)

    def _of(self, node: Any, slot: int, path: Path) -> list[_Found]:
        reason: NoKernelError | None = None
        try:
            found = self._beyond(node, slot, path)
        except NoKernelError as error:
            reason, found = error, None
        if found is None:
            reading = reading_of(node, slot, path)
            if reading is None:
                raise reason or NoKernelError(node.name())
            found = [(node, (node.name(), slot, path.key), reading)]
        return found

    def _beyond(self, node: Any, slot: int, path: Path) -> list[_Found] | None:
        """Return the uses on the far side of a step; None where the operation is none.

        Whether words of samples or positions are looked up, the graph does not tell: the latter are repeated for all
        samples afterwards.
        """
        found: list[_Found] = []
        for output in range(len(node._input_metadata)):
            steps = step_of(node, slot, output, path.shape)
            if steps is None:
                return None
            beyond = functools.reduce(Path.then, steps, path)
            found += self.readings(node, output, beyond)
        if node.name() == "EmbeddingBackward0" and not all(reading.repeats for _, _, reading in found):
            return None
        return found


def _children_first(roots: Sequence[Node] | dict[Node, None]) -> Iterator[Node]:
    """Yield all nodes that can be reached, each after those that it leads to."""
    seen: set[Node] = set()
    stack = [(node, False) for node in roots]
    while stack:
        node, is_done = stack.pop()
        if is_done:
            yield node
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(child, False) for child, _ in node.next_functions if child is not None and child not in seen]

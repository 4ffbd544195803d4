"""Outputs: the loss over frozen batches cut in two, parameters → outputs → loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spectral_callbacks.operators.graphs import BatchGraphs, scalar
from spectral_callbacks.operators.parameters import ParameterSpace


@dataclasses.dataclass(frozen=True)
class Cut:
    """One batch, evaluated with its graph cut at the model's outputs.

    Attributes:
        outputs: What the model returned, floating tensors of any shape, with their graph from the parameters.
        leaves: The same values, detached, requiring a gradient.
        loss: One number, with its graph from the leaves and from nothing else.
    """

    outputs: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]
    loss: Tensor


@dataclasses.dataclass(frozen=True)
class OutputGraph:
    """The two halves of one batch, each with the graph that its products differentiate.

    Attributes:
        weight: Share of the batch in the objective.
        parameters: Of the space.
        cut: The batch.
        slopes: Derivative of the loss by each leaf, with its graph; None where it does not depend on it.
        cotangents: One tensor an output, of any value: the pullback is linear in them.
        pullback: Jᵀ times the cotangents, one tensor a parameter, with its graph; None where no output depends on it.
    """

    weight: float
    parameters: tuple[Tensor, ...]
    cut: Cut
    slopes: tuple[Tensor | None, ...]
    cotangents: tuple[Tensor, ...]
    pullback: tuple[Tensor | None, ...]

    def jvp(self, direction: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return J times a direction (one tensor a parameter), one tensor an output: one backward pass."""
        known = [(p, d) for p, d in zip(self.pullback, direction, strict=True) if p is not None and p.requires_grad]
        return _derivative([p for p, _ in known], self.cotangents, [d for _, d in known])

    def curvature(self, w: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return d²loss/d outputs² times w, one tensor an output: no pass of the network."""
        curved = [(s, x) for s, x in zip(self.slopes, w, strict=True) if s is not None and s.requires_grad]
        return _derivative([s for s, _ in curved], self.cut.leaves, [x for _, x in curved])

    def vjp(self, w: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Return Jᵀ w, one tensor a parameter (None for zeros): one backward pass."""
        return _pulled_back(self.cut.outputs, self.parameters, w, create_graph=False)


class OutputObjective(BatchGraphs[OutputGraph]):
    """A weighted mean of losses, one a frozen batch, seen as a function of the model's outputs, and these of θ.

    The graphs of each batch are built once and shared by every product at these weights, under the same rule of memory
    as those of `Objective`.

    Args:
        space: The parameters θ.
        cuts: One closure a batch; each runs the model and must return the same function of the parameters every time.
        weights: Share of each batch, for example its number of samples; normalised to sum to 1. Equal if left out.
        keep_graphs: True or False decides; None asks the free memory.
        source: What the outputs are those of, for messages.

    Raises:
        ValueError: If there is no batch, or the weights do not fit; from the first product on, if the loss is no number
            or the outputs of one call of the model are the inputs of another.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from spectral_callbacks.operators import GaussNewton, ParameterSpace
        >>> module = nn.Linear(2, 1, bias=False)
        >>> def cut():
        ...     outputs = module(torch.tensor([[1.0, 2.0]]))
        ...     leaf = outputs.detach().requires_grad_()
        ...     return Cut((outputs,), (leaf,), leaf.square().sum())
        >>> GaussNewton(OutputObjective(ParameterSpace(module), [cut])).to_dense().tolist()  # 2 Xᵀ X
        [[2.0, 4.0], [4.0, 8.0]]
    """

    def __init__(
        self,
        space: ParameterSpace,
        cuts: Sequence[Callable[[], Cut]],
        weights: Sequence[float] | None = None,
        *,
        keep_graphs: bool | None = None,
        source: str = "the model",
    ) -> None:
        super().__init__(space, len(cuts), weights, keep_graphs)
        self.source = source
        self._cuts = tuple(cuts)

    def _build(self, index: int) -> OutputGraph:
        parameters = self.space.tensors
        with torch.enable_grad():
            cut = self._cuts[index]()
            slopes = slopes_of(cut)
            self._refuse_feedback(cut)
            cotangents = tuple(torch.zeros_like(z).requires_grad_() for z in cut.outputs)
            pullback = _pulled_back(cut.outputs, parameters, cotangents, create_graph=True)
        return OutputGraph(self.weights[index], parameters, cut, slopes, cotangents, pullback)

    def _refuse_feedback(self, cut: Cut) -> None:
        """The cut goes through a leaf that feeds a later call, so the Jacobian would lack what passes there."""
        feed = _pulled_back(cut.outputs, cut.leaves, cut.outputs, create_graph=False)
        if any(f is not None for f in feed):
            raise ValueError(
                f"an output of {self.source} is the input of its next call, so the outputs are no independent function "
                "of the parameters; name a module whose outputs go to the loss alone."
            )


def slopes_of(cut: Cut) -> tuple[Tensor | None, ...]:
    """Return the derivative of the loss by each leaf, with its graph; None where it does not depend on it.

    Raises:
        ValueError: If the loss is no number.
    """
    loss = scalar(cut.loss)
    if not loss.requires_grad:
        return (None,) * len(cut.leaves)
    return torch.autograd.grad(loss, cut.leaves, create_graph=True, allow_unused=True)


def _pulled_back(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], w: Sequence[Tensor], *, create_graph: bool
) -> tuple[Tensor | None, ...]:
    known = [(z, x) for z, x in zip(outputs, w, strict=True) if z.requires_grad]
    if not known:
        return (None,) * len(inputs)
    return torch.autograd.grad(
        [z for z, _ in known], inputs, [x for _, x in known],
        create_graph=create_graph, retain_graph=True, allow_unused=True,
    )  # fmt: skip


def _derivative(values: Sequence[Tensor], inputs: Sequence[Tensor], w: Sequence[Tensor]) -> tuple[Tensor, ...]:
    if not values:
        return tuple(torch.zeros_like(x) for x in inputs)
    return torch.autograd.grad(values, inputs, w, retain_graph=True, allow_unused=True, materialize_grads=True)

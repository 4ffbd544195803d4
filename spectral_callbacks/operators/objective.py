"""Objective: a loss over frozen batches, as a function of the parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spectral_callbacks.operators.graphs import BatchGraphs, scalar
from spectral_callbacks.operators.parameters import ParameterSpace


@dataclasses.dataclass(frozen=True)
class GradientGraph:
    """Loss and gradient of one batch, with the graph that can be differentiated again.

    Attributes:
        weight: Share of the batch in the objective.
        loss: Scalar, detached.
        gradient: One tensor a parameter; None where the loss does not depend on it.
    """

    weight: float
    loss: Tensor
    gradient: tuple[Tensor | None, ...]


class Objective(BatchGraphs[GradientGraph]):
    """A weighted mean of losses, one a frozen batch, seen as a function on parameter space.

    The gradient graph of each batch is built once and shared by every product at these weights. Where memory is short
    (after some batch less is free than the next graph and its products will take) the graphs are built anew for every
    pass instead: 2.9 gradients a product rather than 1.5 to 1.9.

    Each loss counts as a mean over its batch; sums over batches of different sizes want weights of their own.

    Args:
        space: The parameters it is a function of.
        losses: One closure a batch; each returns the batch's loss, a scalar with its graph, and must be the same
            function of the parameters at every call.
        weights: Share of each batch, for example its number of samples; normalised to sum to 1. Equal if left out.
        keep_graphs: True or False decides; None asks the free memory.

    Raises:
        ValueError: If there is no batch, or the weights do not fit.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from spectral_callbacks.operators import ParameterSpace
        >>> module = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(module.weight, 3.0)
        >>> objective = Objective(ParameterSpace(module), [lambda: module.weight.square().sum()])
        >>> objective.loss(), objective.gradient().tolist()
        (9.0, [6.0])
    """

    def __init__(
        self,
        space: ParameterSpace,
        losses: Sequence[Callable[[], Tensor]],
        weights: Sequence[float] | None = None,
        *,
        keep_graphs: bool | None = None,
    ) -> None:
        super().__init__(space, len(losses), weights, keep_graphs)
        self._losses = tuple(losses)
        self._loss: float | None = None
        self._gradient: Tensor | None = None

    def loss(self) -> float:
        """Return the value of the objective."""
        return self._first_order()[0]

    def gradient(self) -> Tensor:  # (n,)
        """Return the gradient of the objective."""
        return self._first_order()[1]

    def _first_order(self) -> tuple[float, Tensor]:
        if self._loss is None or self._gradient is None:
            self._check_weights()
            loss, gradient = 0.0, torch.zeros(self.space.size, dtype=self.space.dtype, device=self.space.device)
            for index in range(len(self._losses)):
                # Without a kept graph none is built: a gradient alone must not need a second derivative.
                graph = self._kept[index] if index < len(self._kept) else self._differentiate(index, create_graph=False)
                loss += graph.weight * graph.loss.item()
                gradient.add_(self.space.flatten(graph.gradient), alpha=graph.weight)
            self._loss, self._gradient = loss, gradient
        else:
            self._check_weights()
        return self._loss, self._gradient

    def _build(self, index: int) -> GradientGraph:
        return self._differentiate(index, create_graph=True)

    def _differentiate(self, index: int, *, create_graph: bool) -> GradientGraph:
        with torch.enable_grad():
            loss = scalar(self._losses[index]())
            if loss.requires_grad:
                gradient = torch.autograd.grad(loss, self.space.tensors, create_graph=create_graph, allow_unused=True)
            else:
                gradient = (None,) * len(self.space.tensors)
        return GradientGraph(self.weights[index], loss.detach(), gradient)

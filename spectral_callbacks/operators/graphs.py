"""Graphs: what is differentiated again at the same weights, one graph a batch, kept as long as memory lasts."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from spectral_callbacks.operators.memory import free_bytes
from spectral_callbacks.operators.parameters import ParameterSpace

GraphT = TypeVar("GraphT")


class BatchGraphs(abc.ABC, Generic[GraphT]):
    """One graph for each frozen batch, built once and shared by every product at these weights.

    Where memory is short (after some batch less is free than the next graph and its products will take) the graphs are
    built anew for every pass instead.

    Args:
        space: The parameters that the batches' losses are functions of.
        num_batches: At least one.
        weights: Share of each batch, for example its number of samples; normalised to sum to 1. Equal if None.
        keep_graphs: True or False decides; None asks the free memory.

    Raises:
        ValueError: If there is no batch, or the weights do not fit.
    """

    def __init__(
        self,
        space: ParameterSpace,
        num_batches: int,
        weights: Sequence[float] | None,
        keep_graphs: bool | None,
    ) -> None:
        weights = [1.0] * num_batches if weights is None else list(weights)
        if not num_batches or len(weights) != num_batches or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(
                f"got {num_batches} losses with weights {weights}; pass at least one loss, and one weight ≥ 0 for each."
            )
        self.space = space
        self.weights: tuple[float, ...] = tuple(w / sum(weights) for w in weights)
        self._keep_graphs = keep_graphs
        self._kept: list[GraphT] = []
        self._born_at: list[tuple[int, int]] | None = None

    @property
    def keeps_graphs(self) -> bool:
        """Whether graphs are kept between passes, as decided so far."""
        return self._keep_graphs is not False

    def graphs(self) -> Iterator[GraphT]:
        """Yield the graph of each batch: kept ones as they are, others built on the way.

        Raises:
            RuntimeError: If the weights changed since the first pass.
        """
        self._check_weights()
        for index in range(len(self.weights)):
            if index < len(self._kept):
                yield self._kept[index]
                continue
            before = free_bytes(self.space.device) if self._keep_graphs is None else None
            graph = self._build(index)
            if before is not None:
                self._weigh(before)
            if self.keeps_graphs:
                self._kept.append(graph)
            yield graph
        if self._keep_graphs is None:
            self._keep_graphs = True

    @abc.abstractmethod
    def _build(self, index: int) -> GraphT:
        """Return the graph of one batch, to be differentiated again."""

    def _weigh(self, free_before: int) -> None:
        free = free_bytes(self.space.device)
        if free is not None and free < free_before - free:
            self._keep_graphs = False
            self._kept.clear()

    def _check_weights(self) -> None:
        now = [(p._version, p.data_ptr()) for p in self.space.tensors]
        if self._born_at is None:
            self._born_at = now
        elif now != self._born_at:
            raise RuntimeError(
                "the parameters changed since this objective was first differentiated, so its graph belongs to old "
                "weights; build a new objective (or probe) after every optimizer step."
            )


def dense_gradients(output: Tensor, parameters: Sequence[Tensor], *, retain_graph: bool = False) -> list[Tensor]:
    """Return the gradient of one number by each parameter, zeros where it does not depend on it."""
    if not output.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    found = torch.autograd.grad(
        output, parameters, retain_graph=retain_graph, allow_unused=True, materialize_grads=True
    )
    return [g.to_dense() if g.layout != torch.strided else g for g in found]


def scalar(loss: Tensor) -> Tensor:  # ()
    """Return a loss as a tensor without dimensions.

    Raises:
        ValueError: If it is not one number.
    """
    if loss.numel() != 1:
        raise ValueError(f"the loss has shape {tuple(loss.shape)}; return a scalar, for example loss.mean().")
    return loss.reshape(())

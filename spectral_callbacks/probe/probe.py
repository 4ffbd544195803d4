"""Probe: one look at a model in training."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from spectral_callbacks.linalg import DiagonalCongruence, LinearOperator
from spectral_callbacks.operators import Objective, ParameterSpace
from spectral_callbacks.probe.batches import copied, num_samples
from spectral_callbacks.probe.isolation import Isolation, Mode, undisturbed
from spectral_callbacks.stability import Edge, edges

_T = TypeVar("_T")


class Probe:
    """What diagnostics measure on: a model, its optimizer and frozen batches at one step, shared by all that look.

    Built for one step and thrown away. Open it as a context: inside, the model is isolated from training
    (`undisturbed`), and whatever is asked for is computed once and shared: the gradient graph above all.

    Args:
        module: The model in training, unwrapped.
        optimizer: Its parameters span the space that is measured, and its rule decides what is stable.
        batches: Frozen batches, on the module's device; the objective weighs them by their number of samples.
        loss: (module, batch) -> scalar Tensor with graph.
        step: Optimizer steps taken so far.
        mode: "train" measures the function that the optimizer sees, with its dropout masks frozen; "eval" the one that
            predicts.
        seed: Of the random numbers that the loss draws.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from spectral_callbacks.linalg import eigsh
        >>> from spectral_callbacks.operators import Hessian
        >>> module = nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        >>> batch = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> with Probe(module, optimizer, [batch], loss=lambda module, x: module(x).square().sum() / 2) as probe:
        ...     pairs = eigsh(probe.operator(Hessian), generator=torch.Generator().manual_seed(0))
        >>> round(pairs.values.item(), 4)  # of XᵀX
        9.0
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Sequence[Any],
        *,
        loss: Callable[[nn.Module, Any], Tensor],
        step: int = 0,
        mode: Mode = "train",
        seed: int = 0,
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.batches = tuple(batches)
        self.step = step
        self.space = ParameterSpace(module, [p for group in optimizer.param_groups for p in group["params"]])
        self.generator = torch.Generator(self.space.device).manual_seed(seed)
        self._loss = loss
        self._mode: Mode = mode
        self._seed = seed
        self._shared: dict[Any, Any] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Isolate the module."""
        self._shared[Isolation] = self._stack.enter_context(undisturbed(self.module, mode=self._mode))
        return self

    def __exit__(self, *error: object) -> None:
        """Drop the graphs and give the module back."""
        self._shared.clear()
        self._stack.close()

    def with_generator(self, generator: torch.Generator) -> Self:
        """Return the same probe, everything shared, with random numbers of its own."""
        other = copy.copy(self)
        other.generator = generator
        return other

    @property
    def objective(self) -> Objective:
        """The loss over the batches as a function of the optimizer's parameters."""
        return self._share(Objective, self._build_objective)

    def learning_rates(self) -> tuple[float, ...]:
        """Return the learning rate of each parameter, in the order of the space."""
        return self._each_parameter([float(group["lr"]) for group in self.optimizer.param_groups])

    def edges(self) -> tuple[Edge, ...]:
        """Return the edge of stability of each parameter, in the order of the space.

        Raises:
            NoThresholdError: If none is known for the optimizer.
        """
        return self._each_parameter(edges(self.optimizer))

    def preconditioned(self, kind: Callable[[Objective], LinearOperator]) -> LinearOperator:  # (n, n)
        """Return the operator in the metric of the optimizer, where its edge of stability lies at eigenvalue 1.

        With D = diag(η / threshold) this is D^½ (A + diag(shift)) D^½, each parameter with the edge of its own group.

        Raises:
            NoThresholdError: If none is known for the optimizer.
        """
        edges = self.edges()
        return DiagonalCongruence(
            self.operator(kind),
            scale=self.space.broadcast([edge.weight**0.5 for edge in edges]),
            shift=self.space.broadcast([edge.weight * edge.shift for edge in edges]),
        )

    def loss(self) -> float:
        """Return the loss over the batches, in the loss's unit."""
        return self.objective.loss()

    def gradient(self) -> Tensor:  # (n,)
        """Return its gradient."""
        return self.objective.gradient()

    def operator(self, kind: Callable[[Objective], LinearOperator]) -> LinearOperator:  # (n, n)
        """Return an operator on parameter space, for example `probe.operator(Hessian)`; the same one at every call."""
        return self._share(kind, lambda: kind(self.objective))

    def evaluate(self, batch: Any, *, seed: int | None) -> Tensor:  # ()
        """Return the loss of one batch with its graph, from the state the model was found in.

        Args:
            batch: What the loss takes.
            seed: Of the random numbers drawn; None draws those that training draws next.
        """
        isolation: Isolation | None = self._shared.get(Isolation)
        if isolation is None:
            raise RuntimeError(
                "the probe is closed; measure inside `with probe:`, which isolates the model from training."
            )
        return isolation.evaluate(lambda: self._loss(self.module, copied(batch)), seed=seed)

    def _build_objective(self) -> Objective:
        losses = [
            functools.partial(self.evaluate, batch, seed=self._seed + index) for index, batch in enumerate(self.batches)
        ]
        return Objective(self.space, losses, [num_samples(batch) for batch in self.batches])

    def _each_parameter(self, of_groups: Sequence[_T]) -> tuple[_T, ...]:
        groups = zip(self.optimizer.param_groups, of_groups, strict=True)
        by_tensor = {id(p): value for group, value in groups for p in group["params"]}
        return tuple(by_tensor[id(p)] for p in self.space.tensors)

    def _share(self, key: Any, build: Callable[[], Any]) -> Any:
        if key not in self._shared:
            self._shared[key] = build()
        return self._shared[key]

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
from spectral_callbacks.operators import (
    Cut,
    GaussNewton,
    Objective,
    OutputObjective,
    ParameterSpace,
    SampleCurvature,
    gram,
    sample_curvature,
)
from spectral_callbacks.probe.batches import copied, num_samples
from spectral_callbacks.probe.isolation import Isolation, Mode, undisturbed
from spectral_callbacks.probe.outputs import NoOutputsError, cut
from spectral_callbacks.probe.samples import SampledLoss, running_on
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
        outputs: Dotted name of the submodule whose outputs are the model's, for what needs more than a loss; "" is the
            module's own forward.

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
        outputs: str | None = None,
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.batches = tuple(batches)
        self.step = step
        self.outputs = outputs
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

    def seen_by(self, generator: torch.Generator, outputs: str | None = None) -> Self:
        """Return the same probe, everything shared, with random numbers of its own and, if named, other outputs."""
        other = copy.copy(self)
        other.generator = generator
        other.outputs = self.outputs if outputs is None else outputs
        return other

    @property
    def num_samples(self) -> int:
        """The number of samples in all batches together."""
        return sum(map(num_samples, self.batches))

    @property
    def objective(self) -> Objective:
        """The loss over the batches as a function of the optimizer's parameters."""
        return self._share(Objective, self._build_objective)

    def learning_rates(self) -> tuple[float, ...]:
        """Return the learning rate of each parameter, in the order of the space."""
        return self._each_parameter(
            [[float(group["lr"])] * len(group["params"]) for group in self.optimizer.param_groups]
        )

    def edges(self) -> tuple[Edge, ...]:
        """Return the edge of stability of each parameter, in the order of the space.

        Raises:
            NoThresholdError: If none is known for the optimizer, or none yet.
        """
        return self._each_parameter(edges(self.optimizer))

    def preconditioned(self, kind: Callable[[Objective], LinearOperator]) -> DiagonalCongruence:  # (n, n)
        """Return the operator in the metric of the optimizer, where its edge of stability lies at eigenvalue 1.

        With the preconditioner P and S = (P η / threshold)^½ this is S (A + weight decay) S + shift η / threshold, each
        parameter with the edge of its own group; of -A under an optimizer that climbs.

        Raises:
            NoThresholdError: If none is known for the optimizer, or none yet.
        """
        edges = self.edges()
        preconditioners = [
            torch.ones_like(p) if edge.preconditioner is None else edge.preconditioner
            for p, edge in zip(self.space.tensors, edges, strict=True)
        ]
        metric = self.space.flatten(preconditioners) * self.space.broadcast([edge.weight for edge in edges])
        decay = self.space.broadcast([edge.weight_decay for edge in edges])
        shift = self.space.broadcast([edge.weight * edge.shift for edge in edges])
        return DiagonalCongruence(
            self.operator(kind), scale=metric.sqrt(), shift=metric * decay + shift, negative=edges[0].ascends
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

    def gauss_newton(self) -> GaussNewton:  # (n, n)
        """Return the Gauss-Newton matrix of the loss over the batches; the same one at every call.

        Raises:
            NoOutputsError: If the probe was given no `outputs`.
        """
        return self._share((GaussNewton, self._named_outputs()), self._build_gauss_newton)

    def subset(
        self,
        indices: Tensor,  # (m,) of dtype int64, counted over the batches in order; repeats count again
    ) -> Objective:
        """Return the same loss on some of the samples: the mean over them, as if they were one batch.

        Each batch is evaluated by itself on its share of them, and the batches are weighed by their shares. So
        `BatchNorm` normalises within each batch.

        Raises:
            ValueError: If there is no such sample, or the tensors of a batch do not share dimension 0; from the first
                evaluation on, if the loss does not run on these samples.
        """
        return self._sampled.subset(indices.cpu())

    def per_sample_gram(self, num_samples: int | None = 64) -> Tensor:  # (N, N)
        """Return the inner products of the gradients of each sample's own loss, float64 on the CPU.

        A sample's loss is that of a batch of this sample alone; dropout masks are drawn for each. The loss of a batch
        must be their mean, which is looked at (`check_mean`). Cost: N forward and backward passes of one sample, run
        together where torch.func.vmap can run the loss, and two of all N as one batch; of a loss with random numbers
        16 such and N of one sample.

        Args:
            num_samples: N, the first ones over the batches in order; all if None. Fewer come back where their
                gradients, which are held at once, would take more than 2 GiB or a quarter of the free memory; not less
                than 2.

        Raises:
            ValueError: If samples have no loss of their own: `BatchNorm` in training mode, tensors of the batch that do
                not share dimension 0, a loss that does not run on one sample or is not the mean over samples.
        """
        return self._share(("gram", num_samples), lambda: self._build_gram(num_samples))

    def sample_curvature(self, num_samples: int | None = 64) -> SampleCurvature:
        """Return the Gauss-Newton matrix of each sample, in its output coordinates.

        Cost: N forward and N C backward passes of one sample, run together where torch.func.vmap can run the loss, and
        what `per_sample_gram` spends on batches.

        Args:
            num_samples: N, the first ones over the batches in order; all if None. Fewer come back, as by
                `per_sample_gram`, where the N C rows of their Jacobians would take too much memory (4 of a network of
                11 million float32 parameters and 10 outputs): `len(result.losses)` tells how many.

        Raises:
            NoOutputsError: If the probe was given no `outputs`.
            ValueError: As `per_sample_gram`; also if the rows of two samples are too many, or the loss goes around the
                outputs.
        """
        key = (SampleCurvature, self._named_outputs(), num_samples)
        return self._share(key, lambda: self._build_sample_curvature(num_samples))

    def evaluate(self, batch: Any, *, seed: int | None) -> Tensor:  # ()
        """Return the loss of one batch with its graph, from the state the model was found in.

        Args:
            batch: What the loss takes.
            seed: Of the random numbers drawn; None draws those that training draws next.
        """
        return self._isolation.evaluate(lambda: self._loss(self.module, copied(batch)), seed=seed)

    @property
    def _isolation(self) -> Isolation:
        isolation: Isolation | None = self._shared.get(Isolation)
        if isolation is None:
            raise RuntimeError(
                "the probe is closed; measure inside `with probe:`, which isolates the model from training."
            )
        return isolation

    def _named_outputs(self) -> str:
        if self.outputs is None:
            raise NoOutputsError(
                "this quantity needs the model's outputs, and outputs= is None; pass the dotted name of the submodule "
                'that returns what the loss scores, or outputs="" for the module\'s own forward.'
            )
        return self.outputs

    def _build_objective(self) -> Objective:
        losses = [
            functools.partial(self.evaluate, batch, seed=self._seed + index) for index, batch in enumerate(self.batches)
        ]
        return Objective(self.space, losses, [num_samples(batch) for batch in self.batches])

    def _build_gauss_newton(self) -> GaussNewton:
        name = self._named_outputs()
        cuts = [functools.partial(self._cut, name, batch, self._seed + i) for i, batch in enumerate(self.batches)]
        sizes = [num_samples(batch) for batch in self.batches]
        return GaussNewton(OutputObjective(self.space, cuts, sizes, source=f"outputs={name!r}"))

    def _cut(self, name: str, batch: Any, seed: int) -> Cut:
        def evaluate() -> Cut:
            return cut(self.module, name, lambda: self._loss(self.module, copied(batch)), self.space.tensors)

        return self._isolation.evaluate(evaluate, seed=seed)

    def _build_gram(self, num_wanted: int | None) -> Tensor:
        sampled = self._sampled
        with running_on(1):
            result = gram(sampled.alone(num_wanted, None))
            sampled.check_mean(result, None)
        return result

    def _build_sample_curvature(self, num_wanted: int | None) -> SampleCurvature:
        sampled, outputs = self._sampled, self._named_outputs()
        with running_on(1):
            result = sample_curvature(sampled.alone(num_wanted, outputs))
            sampled.check_mean(result.gradient_gram(), result.losses)
        return result

    @property
    def _sampled(self) -> SampledLoss:
        return SampledLoss(self._isolation, self.module, self.space, self._loss, self.batches, self._seed)

    def _each_parameter(self, of_groups: Sequence[Sequence[_T]]) -> tuple[_T, ...]:
        """Return what belongs to each parameter of the space, out of one sequence a parameter group."""
        groups = zip(self.optimizer.param_groups, of_groups, strict=True)
        by_tensor = {id(p): value for group, values in groups for p, value in zip(group["params"], values, strict=True)}
        return tuple(by_tensor[id(p)] for p in self.space.tensors)

    def _share(self, key: Any, build: Callable[[], Any]) -> Any:
        if key not in self._shared:
            self._shared[key] = build()
        return self._shared[key]

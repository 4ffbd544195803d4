"""Probe: one look at a model in training."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from spectral_callbacks.linalg import Eigenpairs, LinearOperator
from spectral_callbacks.operators import (
    GaussNewton,
    Objective,
    ParameterSpace,
    SampleCurvature,
    SampleGradients,
    SampleGram,
    SampleStructure,
)
from spectral_callbacks.probe.batches import copied, num_samples
from spectral_callbacks.probe.isolation import Isolation, Mode, undisturbed
from spectral_callbacks.probe.metric import Preconditioned
from spectral_callbacks.probe.outputs import NoOutputsError
from spectral_callbacks.probe.sampled_loss import SampledLoss
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
        structures: What earlier probes of this run found out about the samples of its batches; what this one finds is
            added.

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
        structures: MutableMapping[Any, SampleStructure] | None = None,
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.batches = tuple(batches)
        self.step = step
        self.outputs = outputs
        self.space = ParameterSpace.trained_by(module, optimizer)
        self.generator = torch.Generator(self.space.device).manual_seed(seed)
        self._loss = loss
        self._mode: Mode = mode
        self._seed = seed
        self._structures = {} if structures is None else structures
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

    def preconditioned(self, kind: Callable[[Objective], LinearOperator]) -> Preconditioned:  # (n, n)
        """Return the operator in the metric of the optimizer, where its edge of stability lies at eigenvalue 1.

        See `Preconditioned`.

        Raises:
            NoThresholdError: If none is known for the optimizer, or none yet.
        """
        return Preconditioned(self.operator(kind), self.space, self.edges())

    @property
    def eigenpairs(self) -> Eigenpairs | None:
        """The largest eigenpairs of the Hessian that a diagnostic of this step shared; None if none did."""
        return self._shared.get(Eigenpairs)

    def share_eigenpairs(self, pairs: Eigenpairs) -> None:
        """Let later diagnostics of this step know the largest eigenpairs of the Hessian; the longer list is kept."""
        known = self.eigenpairs
        if known is None or len(pairs.values) > len(known.values):
            self._shared[Eigenpairs] = pairs

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
        name = self._named_outputs()
        return self._share((GaussNewton, name), lambda: GaussNewton(self._sampled.through(name)))

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
        """Return the inner products of the gradients of N samples; see `sample_gram`."""
        return self.sample_gram(num_samples).gram

    def sample_gram(
        self, num_samples: int | None = 64, *, by_parameter: bool = False, directions: Tensor | None = None
    ) -> SampleGram:
        """Return the inner products of the gradients of N samples, exactly, without ever holding them.

        They follow from the inputs of the layers and the gradients of their outputs, in one forward and one backward
        pass that computes no parameter's gradient. Which entry belongs to which sample, and that the loss is a mean
        over samples, is found out once a run, in about five passes. Parameters in other operations (weight norm, fused
        recurrent layers) go through `torch.func.vmap`, or a loop: N passes of one sample. Masks are those of the batch.

        Args:
            num_samples: N, the first ones over the batches, which must fit into one batch; all if None. Fewer come back
                where gradients that are held would take more than 2 GiB or a quarter of the free memory.
            by_parameter: Whether the parts of each parameter are wanted too.
            directions: (n, k), whose inner products with the gradients are wanted too.

        Raises:
            ValueError: If samples have no loss of their own: `BatchNorm` in training mode, tensors of the batch that do
                not share dimension 0, a loss that does not run on some of the samples or is not the mean over them.
        """
        if directions is not None:
            return self._sampled.gram(num_samples, by_parameter=by_parameter, directions=directions)
        key = (SampleGram, num_samples, by_parameter)
        return self._share(key, lambda: self._sampled.gram(num_samples, by_parameter=by_parameter, directions=None))

    def sample_gradients(self, num_samples: int | None = 64) -> SampleGradients:
        """Return the matrix of the gradients of N samples, known by its products; see `sample_gram`.

        For `EmpiricalFisher` and `GradientCovarianceOperator`, which need no N x N matrix: N is not bounded by memory.
        """
        return self._share((SampleGradients, num_samples), lambda: self._sampled.gradients(num_samples))

    def sample_structure(self, num_samples: int | None = 64) -> SampleStructure:
        """Return which entry of the network's tensors belongs to which sample, for a `GramRide`."""
        return self._sampled.structure(num_samples)

    def sample_curvature(self, num_samples: int | None = 64) -> SampleCurvature:
        """Return the Gauss-Newton matrix of each sample, in its output coordinates.

        Cost: N forward and N C backward passes of one sample, run together where torch.func.vmap can run the loss, and
        two of all N as one batch; of a loss with random numbers 16 such and N of one sample.

        Args:
            num_samples: N, the first ones over the batches in order; all if None. Fewer come back, as by
                `sample_gram`, where the N C rows of their Jacobians would take too much memory (4 of a network of
                11 million float32 parameters and 10 outputs): `len(result.losses)` tells how many.

        Raises:
            NoOutputsError: If the probe was given no `outputs`.
            ValueError: As `sample_gram`; also if the rows of two samples are too many, or the loss goes around the
                outputs.
        """
        name = self._named_outputs()
        return self._share((SampleCurvature, name, num_samples), lambda: self._sampled.curvature(num_samples, name))

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

    @property
    def _sampled(self) -> SampledLoss:
        return SampledLoss(
            self._isolation, self.module, self.space, self._loss, self.batches, self._seed, self._structures
        )

    def _each_parameter(self, of_groups: Sequence[Sequence[_T]]) -> tuple[_T, ...]:
        """Return what belongs to each parameter of the space, out of one sequence a parameter group."""
        groups = zip(self.optimizer.param_groups, of_groups, strict=True)
        by_tensor = {id(p): value for group, values in groups for p, value in zip(group["params"], values, strict=True)}
        return tuple(by_tensor[id(p)] for p in self.space.tensors)

    def _share(self, key: Any, build: Callable[[], Any]) -> Any:
        if key not in self._shared:
            self._shared[key] = build()
        return self._shared[key]

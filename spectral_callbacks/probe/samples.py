"""Samples: a frozen batch evaluated sample by sample, each alone."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from spectral_callbacks.operators import Cut, ParameterSpace, SampleBatch, SampleFunction, scalar
from spectral_callbacks.probe.backends import explain
from spectral_callbacks.probe.batches import check_samples, mapped, num_samples, selected, tensors_of
from spectral_callbacks.probe.isolation import Isolation, WrittenParametersError
from spectral_callbacks.probe.outputs import cut, intercepted

_T = TypeVar("_T")


class FrozenSamples(SampleBatch):
    """One frozen batch: its samples are the entries of dimension 0 of its tensors.

    Args:
        isolation: Of the module.
        module: In training.
        space: Its parameters that are measured.
        loss: (module, batch) -> scalar Tensor.
        batch: What the loss takes.
        size: How many of its samples to take, the first ones.
        outputs: Name of the submodule whose outputs are the model's; None takes the loss for the output.
        seeds: Of the random numbers, by the first sample that is run.

    Raises:
        ValueError: If samples of the batch are not defined.
    """

    def __init__(
        self,
        isolation: Isolation,
        module: nn.Module,
        space: ParameterSpace,
        loss: Callable[[nn.Module, Any], Tensor],
        batch: Any,
        size: int,
        outputs: str | None,
        seeds: range,
    ) -> None:
        check_samples(batch)
        self.size = size
        self._isolation = isolation
        self._module = module
        self._space = space
        self._loss = loss
        self._batch = batch
        self._outputs = outputs
        self._seeds = seeds

    def cut(self, index: int) -> Cut:
        """Return one sample alone, evaluated plainly."""
        one = selected(self._batch, torch.tensor([index]))
        return self._isolation.evaluate(lambda: self._cut(one), seed=self._seeds[index])

    def vmap(self, function: Callable[[SampleFunction], _T], samples: range) -> _T:
        """Return what a function makes of each of these samples, stacked; every sample draws its own random numbers."""
        unique = {id(t): t for t in tensors_of(self._batch)}
        keys = [key for key, t in unique.items() if t.ndim > 0]
        stacked = [unique[key].detach()[samples.start : samples.stop].clone() for key in keys]

        def one(*tensors: Tensor) -> _T:
            alone = {key: t.unsqueeze(0) for key, t in zip(keys, tensors, strict=True)}
            batch = mapped(self._batch, lambda t: alone[id(t)] if id(t) in alone else t.detach().clone())
            return function(functools.partial(self._run, batch))

        run = torch.no_grad()(torch.func.vmap(one, randomness="different"))  # torch.func tracks what it differentiates
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")  # of vmap, against what would be best
            return self._isolation.evaluate(lambda: run(*stacked), seed=self._seeds[samples.start])

    def _cut(self, batch: Any) -> Cut:
        if self._outputs is not None:
            run = functools.partial(loss_on_samples, self._loss, self._module, batch)
            return cut(self._module, self._outputs, run, self._space.tensors)
        loss = scalar(loss_on_samples(self._loss, self._module, batch))
        leaf = loss.detach().requires_grad_()
        return Cut((loss,), (leaf,), leaf.clone())

    def _run(self, batch: Any, parameters: Sequence[Tensor], shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """Evaluate one sample as a function of the parameters and of a shift of its outputs."""
        outputs: list[Tensor] = []
        place = 0

        def replace(output: Tensor) -> Tensor:
            nonlocal place
            outputs.append(output)
            if shift is None:
                return output.clone()
            own = shift[place : place + output.numel()].reshape(output.shape)
            place += output.numel()
            return output.detach() + own.to(output.dtype)

        within = contextlib.nullcontext()
        if self._outputs is not None:
            within = intercepted(self._module, self._outputs, replace)
        swapped = dict(zip([f"module.{name}" for name in self._space.names], parameters, strict=True))
        with within:
            loss = torch.func.functional_call(_Evaluated(self._module, self._loss), swapped, (batch,)).reshape(())
        if self._outputs is None:
            return (loss if shift is None else loss.detach() + shift.reshape(())), loss.reshape(1)
        return loss, torch.cat([z.reshape(-1) for z in outputs])


class _Evaluated(nn.Module):
    """A module and its loss, so that `functional_call` can run both."""

    def __init__(self, module: nn.Module, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.module = module
        self._loss = loss

    def forward(self, batch: Any) -> Tensor:
        return self._loss(self.module, batch)


def loss_on_samples(loss: Callable[[nn.Module, Any], Tensor], module: nn.Module, batch: Any) -> Tensor:
    """Return the loss of a batch of some samples only.

    Raises:
        ValueError: If it does not run on them, with its own error as the cause.
    """
    try:
        return loss(module, batch)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise _does_not_run(num_samples(batch), error) from error


@contextlib.contextmanager
def running_on(number: int) -> Iterator[None]:
    """Raise a ValueError for what goes wrong inside because the loss was given so few samples.

    Some losses fail only when they are differentiated. Errors of ours, of memory, and about second derivatives stay.
    """
    try:
        yield
    except (ValueError, torch.OutOfMemoryError, WrittenParametersError):
        raise
    except Exception as error:
        if explain(error) is not None:
            raise
        raise _does_not_run(number, error) from error


def _does_not_run(number: int, error: Exception) -> ValueError:
    return ValueError(
        f"the loss does not run on {number} of its samples: {error}; pass loss= that takes a batch of any size "
        "(squeeze() drops the dimension of a single sample), or leave this quantity out."
    )

"""Other ways to the Gram matrix of per-sample gradients: all hold N x P numbers at once, and take a GEMM each."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from _problems import Problem

Gram = Callable[[], Tensor]
"""() -> (N, N), float64; a pass of its own over the batch, all preparations done."""


def _gram(gradients: Iterable[Tensor]) -> Tensor:
    return sum(torch.mm(rows, rows.mT).double() for rows in (g.flatten(1) for g in gradients))  # pyright: ignore[reportReturnType]


def vmap_grad(problem: Problem, *, chunk_size: int | None = None) -> Gram:
    """`torch.func.vmap` of `torch.func.grad`."""
    parameters = {name: p.detach() for name, p in problem.model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return problem.criterion(torch.func.functional_call(problem.model, parameters, (x[None],)), y[None])

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), chunk_size=chunk_size)
    return lambda: _gram(each(parameters, problem.inputs, problem.targets).values())


def backpack(problem: Problem) -> Gram:
    """BackPACK 1.7.1's `BatchGrad`.

    Raises:
        NotImplementedError: On the pass, if a parameter gets no `grad_batch`.
    """
    library: Any = importlib.import_module("backpack")
    extensions: Any = importlib.import_module("backpack.extensions")
    model = library.extend(copy.deepcopy(problem.model))
    criterion = library.extend(nn.CrossEntropyLoss())
    num_samples = len(problem.inputs)

    def run() -> Tensor:
        model.zero_grad()
        outputs = model(problem.inputs).flatten(0, -2)
        with library.backpack(extensions.BatchGrad()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of modules without an extension: asked below; of hooks on the first layer
            criterion(outputs, problem.targets.flatten()).backward()
        for name, parameter in model.named_parameters():
            if "grad_batch" not in vars(parameter):
                raise NotImplementedError(f"{name} gets no grad_batch")
        result = num_samples**2 * _gram(vars(p)["grad_batch"] for p in model.parameters())
        for parameter in model.parameters():
            del parameter.grad_batch
        return result

    return run


@dataclasses.dataclass
class _Hooks:
    """What hooks know of a leaf module: its input, and its parameters' gradients, (N, ...) each."""

    module: nn.Module
    input: Tensor | None = None
    gradients: tuple[Tensor, ...] = ()

    def forward(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.input = inputs[0].detach()

    def backward(self, module: nn.Module, _: Any, gradients: Any) -> None:
        if self.input is None:
            raise RuntimeError("backward before forward")
        both = _grad_sample(module, self.input, gradients[0].detach())
        self.gradients = tuple(g for g, p in zip(both, module.parameters(recurse=False), strict=False))
        self.input = None


def _grad_sample(module: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """Return per-sample gradients by weight and bias, by the formulas of `opacus.grad_sample`."""
    if isinstance(module, nn.Linear):
        return torch.einsum("n...i,n...j->nij", g, x), torch.einsum("n...k->nk", g)
    if isinstance(module, nn.Conv2d):
        unfolded = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)  # pyright: ignore[reportArgumentType]
        g = g.flatten(2)
        return torch.einsum("noq,npq->nop", g, unfolded), g.sum(2)
    if isinstance(module, nn.LayerNorm):
        normalized = F.layer_norm(x, module.normalized_shape, eps=module.eps)
        return torch.einsum("n...k->nk", normalized * g), torch.einsum("n...k->nk", g)
    if isinstance(module, nn.GroupNorm):
        normalized = F.group_norm(x, module.num_groups, eps=module.eps)
        return torch.einsum("nk...->nk", normalized * g), torch.einsum("nk...->nk", g)
    if isinstance(module, nn.Embedding):
        rows = torch.zeros(len(x), *module.weight.shape, dtype=g.dtype)
        index = x.unsqueeze(-1).expand(*x.shape, module.embedding_dim)
        return (rows.scatter_add_(1, index, g),)
    raise NotImplementedError(f"no grad_sample of {type(module).__name__}")


def hooks(problem: Problem) -> Gram:
    """What Opacus's GradSampleModule does: hooks on every layer, and an einsum that materialises `grad_sample`."""
    model = copy.deepcopy(problem.model)
    layers = [_Hooks(module) for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    for layer in layers:
        layer.module.register_forward_hook(layer.forward)
        layer.module.register_full_backward_hook(layer.backward)
    num_samples = len(problem.inputs)

    def run() -> Tensor:
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")  # of the first layer
            problem.criterion(model(problem.inputs), problem.targets).backward()
        result = num_samples**2 * _gram(g for layer in layers for g in layer.gradients)
        for layer in layers:
            layer.gradients = ()
        return result

    return run

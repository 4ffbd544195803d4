"""Mirror descent: gradient steps taken in other coordinates of each weight, its logarithm or its inverse sinh."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from spectral_callbacks.optim.base import Group, Optimizer, local
from spectral_callbacks.optim.blocks import blocks

Place = tuple[Group, int, int]  # a group, its index, and the index of a parameter in it
Row = tuple[Tensor | None, ...]
Kernel = Callable[..., None]


class MirrorDescent(Optimizer):
    """An optimizer whose steps are exponential in the gradient.

    So a gradient that is infinite or not a number is refused before any weight has moved: one step would destroy what
    no later step could mend. The check reads the gradients once more, and waits for the device once. Of a sharded
    parameter each process checks its own shard, and may be the only one to raise.
    """

    flags: ClassVar[Mapping[str, Any]] = {"maximize": False, "foreach": None, "differentiable": False}

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters, with settings of its own.

        Raises:
            ValueError: If some setting breaks its rule, or some parameter cannot be trained by this optimizer.
        """
        super().add_param_group(param_group)
        last, group = len(self.param_groups) - 1, self.param_groups[-1]
        try:
            self._refuse_group([(group, last, j) for j in range(len(group["params"]))])
        except ValueError:
            self.param_groups.pop()
            raise

    def _refuse_group(self, places: list[Place]) -> None:
        """Raise a ValueError unless the parameters of a group can be trained."""
        for group, i, j in places:
            if group["params"][j].is_complex():
                raise ValueError(
                    f"{type(self).__name__} trains real parameters, and {called(group, i, j)} is complex: hold its "
                    "real and imaginary parts as parameters."
                )

    @torch.no_grad()
    def _refuse(self) -> None:
        """Raise a RuntimeError if a gradient is infinite or not a number."""
        places: list[Place] = []
        gradients: list[Tensor] = []
        for i, group in enumerate(self.param_groups):
            for j, p in enumerate(group["params"]):
                if p.grad is not None and not p.grad.is_sparse and local(p.grad).numel():
                    places.append((group, i, j))
                    gradients.append(local(p.grad))
        if not gradients or torch.nn.utils.get_total_norm(gradients, math.inf).isfinite():
            return
        wrong = [called(*place) for place, g in zip(places, gradients, strict=True) if not g.isfinite().all()]
        raise RuntimeError(
            f"{type(self).__name__} took no step: the gradient of {', '.join(wrong[:3])} holds an infinity or a NaN"
            f"{f', and {len(wrong) - 3} more do' if len(wrong) > 3 else ''}. Lower lr, or clip the gradients."
        )


def gradient(parameter: Tensor) -> Tensor:
    """Return the part of a parameter's gradient that this process holds, laid out as the parameter is."""
    return local(cast(Tensor, parameter.grad), like=parameter)


def called(group: Group, group_index: int, index: int) -> str:
    """Return what to call a parameter in a message: its name if the optimizer knows it, its place and shape if not."""
    names = group.get("param_names")
    if names is not None:
        return repr(names[index])
    return f"parameter {index} of group {group_index} (shape {tuple(group['params'][index].shape)})"


def stream(kernel: Kernel, rows: Iterable[Row], foreach: bool | None) -> None:
    """Run an in-place kernel over tensors that belong together, in lists of all rows or by blocks that fit a cache.

    Args:
        kernel: A function of as many lists as a row has tensors; the tensors of a list share device and dtype.
        rows: For each parameter the tensors of its shape: the weights and what moves them.
        foreach: Lists of all rows, or blocks of one; None for the faster on the rows' device.
    """
    lists: dict[tuple[torch.device, torch.dtype], list[Row]] = defaultdict(list)
    for weights, *others in rows:
        if weights is None or not weights.numel():
            continue
        if foreach or (foreach is None and weights.device.type == "cuda"):
            lists[weights.device, weights.dtype].append((weights, *others))
        else:
            for block in blocks(weights, *others):
                kernel(*([tensor] for tensor in block))
    for members in lists.values():
        kernel(*(list(column) for column in zip(*members, strict=True)))


def widened(weights: list[Tensor]) -> list[Tensor]:
    """Return weights of half precision as float32, so that a step rounds once; others are their own."""
    return [w.float() if w.dtype in (torch.float16, torch.bfloat16) else w for w in weights]


def write_back(weights: list[Tensor], wide: list[Tensor]) -> None:
    """Round what `widened` made into the weights that it was made of."""
    for w, moved in zip(weights, wide, strict=True):
        if moved is not w:
            w.copy_(moved)


def rate(lr: float | Tensor, like: Tensor) -> Any:
    """Return a learning rate as what a tensor can be multiplied by on its device."""
    return lr.reshape(()).to(like.device) if isinstance(lr, Tensor) else lr

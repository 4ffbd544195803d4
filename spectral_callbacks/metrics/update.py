"""What one optimizer step did: its size against the weights and the gradient, and where it points."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

_BLOCK = 1 << 16  # entries that are summed in double precision at a time, in a CPU's cache
_LARGE_BLOCK = 1 << 22  # elsewhere, where each block is some kernels to be launched


@dataclasses.dataclass(frozen=True)
class Update:
    """A step Δw = w' - w of some parameters, by its inner products.

    Attributes:
        step: |Δw|².
        weight: |w|², before the step.
        gradient: |g|².
        descent: -Δw · g; of an optimizer that maximizes, Δw · g.

    Example:
        >>> w, g = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
        >>> update = Update.of(w, w - 0.5 * g, g)
        >>> update.norm, update.to_weight, update.gradient_cosine, update.effective_lr
        (1.0, 0.2, 1.0, 0.5)
    """

    step: float
    weight: float
    gradient: float
    descent: float

    @classmethod
    def of(cls, before: Tensor, after: Tensor, gradient: Tensor, *, maximize: bool = False) -> Update:
        """Return the update of one tensor; all three have its shape."""
        return cls(*update_products(before, after, gradient, maximize=maximize).tolist())

    def __add__(self, other: Update) -> Update:
        """Return the update of both sets of parameters together."""
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Update(*(a + b for a, b in zip(mine, theirs, strict=True)))

    @property
    def is_finite(self) -> bool:
        """Whether all inner products are."""
        return all(math.isfinite(product) for product in dataclasses.astuple(self))

    @property
    def was_skipped(self) -> bool:
        """Whether nothing moved because the gradient overflowed, as under a gradient scaler."""
        return self.step == 0 and not math.isfinite(self.gradient)

    @property
    def norm(self) -> float:
        """|Δw|."""
        return math.sqrt(self.step)

    @property
    def to_weight(self) -> float | None:
        """|Δw| / |w|; None where all weights are 0."""
        return math.sqrt(self.step / self.weight) if self.weight else None

    @property
    def gradient_cosine(self) -> float | None:
        """Cosine of the angle between the step and steepest descent (ascent): 1 for plain gradient descent.

        None where one of them is 0.
        """
        if not self.step or not self.gradient:
            return None
        return self.descent / (math.sqrt(self.step) * math.sqrt(self.gradient))

    @property
    def effective_lr(self) -> float | None:
        """|Δw| / |g|, the learning rate at which plain gradient descent takes a step as long; None without gradient."""
        return math.sqrt(self.step / self.gradient) if self.gradient else None


def update_products(before: Tensor, after: Tensor, gradient: Tensor, *, maximize: bool = False) -> Tensor:  # (4,)
    """Return the inner products that make an `Update`, in float64 on the tensors' device.

    Args:
        before: The parameter before the step, real or complex, in any precision.
        after: Behind it.
        gradient: Of the step; may be sparse.
        maximize: Whether the optimizer climbs.
    """
    gradient = gradient if gradient.layout == torch.strided else gradient.to_dense()
    w, u, g = (_flat(tensor) for tensor in (before, after, gradient))
    total = torch.zeros(4, dtype=torch.float64, device=w.device)
    size = _BLOCK if w.device.type == "cpu" else _LARGE_BLOCK
    for w_, u_, g_ in zip(w.split(size), u.split(size), g.split(size), strict=True):
        w64, g64 = w_.double(), g_.double()
        step = u_.double() - w64
        total += torch.stack([step @ step, w64 @ w64, g64 @ g64, step @ g64 if maximize else -(step @ g64)])
    return total


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all its entries on this process; of a sharded one, on every process that has a part."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return tensor
    from torch.distributed.tensor import DTensor  # costs a second, and some builds of PyTorch lack it

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _flat(tensor: Tensor) -> Tensor:
    """Return all real numbers of a tensor in a row."""
    tensor = whole(tensor.detach())
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).reshape(-1)

"""Parameter space: the named tensors of a model as one flat vector."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


class ParameterSpace:
    """The trainable parameters of a module as a flat vector of n numbers, in the order of `named_parameters`.

    Each tensor counts once, however often the module uses it. Frozen parameters (`requires_grad=False`) are no part of
    the space. Vectors have the parameters' dtype, and float32 where that is shorter: a Krylov basis in half precision
    is not orthogonal.

    Args:
        module: Names the parameters.
        parameters: The parameters that span the space, for example those of one optimizer; all of the module's if left
            out.

    Raises:
        ValueError: If no parameter is left, or one is complex, or not yet initialised, or on another device.

    Example:
        >>> from torch import nn
        >>> space = ParameterSpace(nn.Linear(3, 2))
        >>> space.size, space.slices
        (8, {'weight': slice(0, 6, None), 'bias': slice(6, 8, None)})
    """

    def __init__(self, module: nn.Module, parameters: Iterable[Tensor] | None = None) -> None:
        wanted = None if parameters is None else {id(p) for p in parameters}
        named = {
            name: p for name, p in module.named_parameters() if p.requires_grad and (wanted is None or id(p) in wanted)
        }
        if not named:
            chosen = "" if wanted is None else f" among the {len(wanted)} tensors given"
            raise ValueError(
                f"{type(module).__name__} has no parameter with requires_grad=True{chosen}, so its loss has no "
                "curvature to measure; unfreeze a parameter, or leave this diagnostic out."
            )
        for name, p in named.items():
            if isinstance(p, nn.parameter.UninitializedParameter):
                raise ValueError(f"parameter {name} is not initialised yet; run one batch through the module first.")
            if p.is_complex():
                raise ValueError(
                    f"parameter {name} has dtype {p.dtype}, and curvature is taken over real parameters; "
                    "store it as real and imaginary parts (torch.view_as_real)."
                )
        self.tensors: tuple[Tensor, ...] = tuple(named.values())
        self.names: tuple[str, ...] = tuple(named)
        devices = {p.device for p in self.tensors}
        if len(devices) > 1:
            raise ValueError(
                f"the parameters lie on {sorted(map(str, devices))}; a parameter space lives on one device."
            )
        self.device: torch.device = self.tensors[0].device
        dtype = torch.float32
        for p in self.tensors:
            dtype = torch.promote_types(dtype, p.dtype)
        self.dtype: torch.dtype = dtype
        ends = torch.tensor([p.numel() for p in self.tensors]).cumsum(0).tolist()
        self.size: int = ends[-1]
        self.slices: dict[str, slice] = {
            name: slice(end - p.numel(), end) for (name, p), end in zip(named.items(), ends, strict=True)
        }

    @classmethod
    def trained_by(cls, module: nn.Module, optimizer: torch.optim.Optimizer) -> ParameterSpace:
        """Return the space of a module's parameters that an optimizer trains now."""
        return cls(module, [p for group in optimizer.param_groups for p in group["params"]])

    def flatten(
        self,
        tensors: Sequence[Tensor | None],  # one a parameter, each of its shape; None stands for zeros
    ) -> Tensor:  # (n,)
        """Return the tensors as one vector."""
        vector = torch.empty(self.size, dtype=self.dtype, device=self.device)
        for tensor, place in zip(tensors, self.slices.values(), strict=True):
            if tensor is None:
                vector[place] = 0
            else:
                vector[place] = (tensor.to_dense() if tensor.layout != torch.strided else tensor).detach().reshape(-1)
        return vector

    def unflatten(
        self,
        vector: Tensor,  # (n,)
    ) -> tuple[Tensor, ...]:
        """Return the vector as tensors, one a parameter, each of its shape and dtype."""
        return tuple(
            vector[place].view(p.shape).to(p.dtype) for p, place in zip(self.tensors, self.slices.values(), strict=True)
        )

    def broadcast(
        self,
        numbers: Sequence[float],  # one a parameter
    ) -> Tensor:  # (n,)
        """Return the vector that holds each number at every entry of its parameter."""
        vector = torch.empty(self.size, dtype=self.dtype, device=self.device)
        for number, place in zip(numbers, self.slices.values(), strict=True):
            vector[place] = number
        return vector

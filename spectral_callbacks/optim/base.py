"""What every optimizer of this package does alike: closures, which parameters step, and the checks of its settings."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from spectral_callbacks.stability import ObservableOptimizer

Group = dict[str, Any]
State = dict[str, Any]


class Optimizer(ObservableOptimizer):
    """An optimizer whose subclasses say how a group of parameters moves.

    Attributes:
        own_dtypes: The names in the state whose dtype is not the parameter's. `load_state_dict` leaves it as it was
            saved, where PyTorch would cast it.
        flags: Settings that an older state may lack, with what it then means.
    """

    own_dtypes: ClassVar[frozenset[str]] = frozenset()
    flags: ClassVar[Mapping[str, Any]] = {}

    @abc.abstractmethod
    def _update(self, group: Group, parameters: list[Tensor]) -> None:
        """Move the parameters of a group that have a gradient, which is left as it is."""

    def _check(self, group: Group) -> None:
        """Raise a ValueError unless the settings of a group obey their rules; called before a group is added."""
        check_lr(group["lr"])

    def _refuse(self) -> None:
        """Raise if the step must not be taken; called behind the closure, before any parameter moves."""

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters, with settings of its own.

        Raises:
            ValueError: If some setting breaks its rule.
        """
        self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            What the closure returned; None without one.

        Raises:
            RuntimeError: If a gradient is sparse, or a CUDA graph is being captured without `capturable`.
        """
        if not torch.compiler.is_compiling():
            self._refuse_capture()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in parameters):
                raise RuntimeError(
                    f"{type(self).__name__} does not support sparse gradients, and some parameter has one: use "
                    "sparse=False in its embedding, or torch.optim.SparseAdam for that parameter."
                )
            if parameters:
                with torch.set_grad_enabled(group.get("differentiable", False)):
                    self._update(group, parameters)
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, a pickle or a state dictionary, which may lack flags, or hold steps as plain numbers."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.flags.items():
                group.setdefault(name, value)
            for p in group["params"]:
                held = self.state.get(p, {})
                if "step" in held and not isinstance(held["step"], Tensor):
                    held["step"] = new_step(p, group).fill_(held["step"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; see `torch.optim.Optimizer.load_state_dict`."""
        loaded: dict[str, Any] = {}  # the dictionary as the hooks of the user leave it
        handle = self.register_load_state_dict_pre_hook(lambda _, given: loaded.update(given))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        saved = [i for group in loaded["param_groups"] for i in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, parameters, strict=True):
            for name in self.own_dtypes & loaded["state"].get(i, {}).keys():
                self.state[p][name] = loaded["state"][i][name].detach().to(p.device, copy=True)

    def _refuse_capture(self) -> None:
        capturable = all(group.get("capturable", False) for group in self.param_groups)
        if not capturable and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"a CUDA graph is being captured, and {type(self).__name__} was made without capturable=True: its step "
                "would hold the numbers of this one step for ever."
            )


def local(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Return the part of a tensor that this process holds, which shares its memory; a plain tensor is its own.

    Args:
        tensor: Plain, or a DTensor.
        like: A DTensor that `tensor` is first laid out as, so that their parts hold the same entries.

    Example:
        >>> w = torch.ones(2)
        >>> local(w) is w
        True
    """
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return tensor
    from torch.distributed.tensor import DTensor  # not every build of PyTorch has it

    if not isinstance(tensor, DTensor):
        return tensor
    if isinstance(like, DTensor) and tensor.placements != like.placements:
        tensor = tensor.redistribute(like.device_mesh, like.placements)
    return tensor.to_local()


def new_step(parameter: Tensor, group: Group) -> Tensor:  # scalar
    """Return step 0, as PyTorch's optimizers count: in float32, unless float64 is the default, and on the CPU.

    Where it is captured or a kernel reads it, it lies with the parameter.
    """
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    beside = group.get("capturable") or group.get("fused")
    return torch.zeros((), dtype=dtype, device=parameter.device if beside else "cpu")


def require(holds: bool, name: str, value: object, rule: str) -> None:
    """Raise unless a setting obeys its rule.

    Raises:
        ValueError: That names the setting, its value and the rule.

    Example:
        >>> require(-1.0 >= 0, "eps", -1.0, "0 or more")
        Traceback (most recent call last):
        ...
        ValueError: eps is -1.0, and must be 0 or more.
    """
    if not holds:
        raise ValueError(f"{name} is {value!r}, and must be {rule}.")


def is_count(value: object) -> bool:
    """Return whether a setting is an int of 1 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_not_negative(name: str, value: float) -> None:
    """Raise unless a setting is a finite number of 0 or more."""
    require(0 <= value < math.inf, name, value, "a finite number, 0 or more")


def check_lr(lr: float | Tensor) -> None:
    """Raise unless a learning rate is a finite number of 0 or more; a tensor must hold one element."""
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, and this one has shape {tuple(lr.shape)}.")
    value = float(lr.detach() if isinstance(lr, Tensor) else lr)
    require(math.isfinite(value) and value >= 0, "lr", lr, "a finite number, 0 or more")


def check_betas(betas: tuple[float, float], name: str = "betas") -> None:
    """Raise unless the rates of two moving averages lie in [0, 1)."""
    require(len(betas) == 2, name, betas, "a pair")
    for i, beta in enumerate(betas):
        require(0 <= float(beta) < 1, f"{name}[{i}]", beta, "in [0, 1)")

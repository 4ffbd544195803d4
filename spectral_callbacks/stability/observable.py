"""Observable optimizers: those that tell more of themselves than their state holds."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class ObservableOptimizer(torch.optim.Optimizer, abc.ABC):
    """An optimizer that tells what makes it special.

    What it tells may need more than its state, as the friction of diffGrad's last step does. It keeps that beside the
    state once somebody has asked, by `observe`; no step comes out otherwise for it, and no `state_dict` holds it.

    Example:
        >>> import torch
        >>> class Signed(ObservableOptimizer):
        ...     def step(self, closure=None): ...
        ...     def diagnostics(self, parameter):
        ...         return {"share_positive": (parameter > 0).float().mean()}
        >>> w = torch.tensor([1.0, -1.0])
        >>> Signed([w], {}).diagnostics(w)
        {'share_positive': tensor(0.5000)}
    """

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._observations: dict[Tensor, dict[str, Tensor]] | None = None
        super().__init__(params, defaults)

    @abc.abstractmethod
    def diagnostics(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return what there is to tell of a parameter's last step.

        Args:
            parameter: One of those that this optimizer trains.

        Returns:
            By name: a scalar tensor, one value for the parameter, or a tensor with one value an entry. Empty where
            nothing is known, as before the first step. They are read before the next step, which may overwrite them.
        """

    def observe(self) -> None:
        """Ask that from the next step on the optimizer keeps what `diagnostics` and its stability rule read."""
        if self._observations is None:
            self._observations = {}

    @property
    def is_observed(self) -> bool:
        """Whether somebody has asked."""
        return self._observations is not None

    def observations(self, parameter: Tensor) -> Mapping[str, Tensor]:
        """Return what was kept of the parameter's last step beside its state; empty without `observe`."""
        return (self._observations or {}).get(parameter, {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        vars(self).setdefault("_observations", None)  # a copy or a pickle starts unobserved

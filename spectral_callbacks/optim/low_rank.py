"""What optimizers that work in a few columns of a fixed basis do alike."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from spectral_callbacks.optim.base import Group, Optimizer, check_lr, check_not_negative, is_count, new_step, require
from spectral_callbacks.optim.columns import BASES, Basis
from spectral_callbacks.optim.lines import Lines, lines_of, working_dtype


class LowRankOptimizer(Optimizer):
    """An optimizer that projects matrices on columns of a fixed basis, and moves the other parameters by AdamW.

    A matrix is a real parameter of two or more dimensions, the first against the others as one, whose shorter side is
    at least 2. The others step as in `torch.optim.AdamW`, to the last bit.
    """

    # All that is not of the parameter's dtype for some parameter: half types have moments in float32.
    own_dtypes: ClassVar[frozenset[str]] = frozenset(
        {"columns", "ages", "exp_avg", "exp_avg_sq", "error", "error_scale", "momentum_buffer"}
    )

    flags: ClassVar[Mapping[str, Any]] = {"maximize": False, "foreach": None}

    @abc.abstractmethod
    def _move(self, group: Group, parameter: Tensor, lines: Lines, basis: Basis, gradient: Tensor) -> None:
        """Move a matrix by its gradient (lines of this process, width), which must not be written to."""

    @abc.abstractmethod
    def _adamw(self, group: Group) -> dict[str, Any]:
        """Return lr, beta1, beta2 and eps of the parameters that are no matrices."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, in the precision that each parameter is computed in."""
        super().load_state_dict(state_dict)
        for p, held in self.state.items():
            dtype = working_dtype(p) if is_matrix(p) else p.dtype
            for name, value in held.items():
                if name != "step" and value.is_floating_point():
                    held[name] = value.to(dtype)

    def diagnostics(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return how well the selected columns served a matrix's last step; empty for other parameters.

        Known from the first step after `observe` on.

        Args:
            parameter: One of those that this optimizer trains.

        Returns:
            `captured_energy`, the share of what was projected, by its squares, that lies in the selected columns;
            `column_churn`, the share of the columns that were not selected before the last selection; and
            `error_feedback_norm`, the norm of the error that is kept for the next step, where one is.
        """
        return dict(self.observations(parameter))

    def _basis(self, group: Group, parameter: Tensor, lines: Lines) -> Basis:
        return BASES[group["basis"]](lines.width)

    def _update(self, group: Group, parameters: list[Tensor]) -> None:
        self._update_eagerly(group, parameters)  # pyright: ignore[reportAttributeAccessIssue]

    @torch.compiler.disable  # the selected columns are data, and views of the weights are written to without a graph
    def _update_eagerly(self, group: Group, parameters: list[Tensor]) -> None:
        matrices = [p for p in parameters if is_matrix(p)]
        others = [p for p in parameters if not is_matrix(p)]
        if others:
            self._step_others(group, others)
        for p in matrices:
            lines = lines_of(p)
            gradient = lines.of(cast(Tensor, p.grad))
            if group["maximize"]:
                gradient = -gradient
            with torch.autocast(p.device.type, enabled=False):  # a training_step that steps itself runs under it
                self._move(group, p, lines, self._basis(group, p, lines), gradient)

    def _step_others(self, group: Group, parameters: list[Tensor]) -> None:
        for p in parameters:
            state = self.state[p]
            if not state:
                state["step"] = new_step(p, group)
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [cast(Tensor, p.grad) for p in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=group["foreach"],
            has_complex=any(p.is_complex() for p in parameters),
            amsgrad=False,
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            **self._adamw(group),
        )


def is_matrix(parameter: Tensor) -> bool:
    """Return whether a parameter is projected: its shorter side, dimensions after the first taken as one, is 2 or more.

    Example:
        >>> import torch
        >>> [is_matrix(torch.zeros(shape)) for shape in [(3,), (1, 3), (3, 2), (3, 1, 2, 2)]]
        [False, False, True, True]
    """
    if parameter.ndim < 2 or not parameter.is_floating_point() or not parameter.numel():
        return False
    return min(parameter.shape[0], parameter.numel() // parameter.shape[0]) >= 2


def number_of_columns(rank: int | float, width: int) -> int:
    """Return how many columns a rank is for a width: a float is a share of it, and there is one at least.

    Example:
        >>> number_of_columns(0.125, 768), number_of_columns(0.125, 3), number_of_columns(128, 64)
        (96, 1, 64)
    """
    return min(rank, width) if isinstance(rank, int) else max(1, round(rank * width))


def captured(lines: Lines, part: Tensor, whole: Tensor) -> Tensor:  # scalar
    """Return the share of a matrix's squares that its selected coefficients hold; 0 of a matrix of zeros."""
    some, all_ = lines.total(torch.stack([part.square().sum(), whole.square().sum()]))
    return torch.where(all_ > 0, some / all_, 0)


def check_low_rank(group: dict[str, Any]) -> None:
    """Raise unless the settings that low-rank optimizers share are in their ranges.

    Raises:
        ValueError: That names the setting, its value and the rule.
    """
    check_lr(group["lr"])
    if isinstance(group["lr"], Tensor) and group["foreach"]:
        raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
    decay, rank, basis = group["weight_decay"], group["rank"], group["basis"]
    check_not_negative("weight_decay", decay)
    is_share = isinstance(rank, float) and 0 < rank <= 1
    require(
        is_count(rank) or is_share,
        "rank",
        rank,
        "a number of columns (an int of 1 or more) or a share of the width in (0, 1]",
    )
    require(basis in BASES, "basis", basis, f"one of {', '.join(BASES)}")

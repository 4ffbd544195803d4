"""DCT-AdamW: AdamW whose moments live in a few columns of the DCT-II, selected anew at every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from spectral_callbacks.optim.base import Group, check_betas, check_not_negative, is_count, local, new_step, require
from spectral_callbacks.optim.columns import BASES, Basis, carry_over, energies, strongest
from spectral_callbacks.optim.error_feedback import ERROR_FEEDBACKS
from spectral_callbacks.optim.lines import Lines, lines_of
from spectral_callbacks.optim.low_rank import (
    LowRankOptimizer,
    captured,
    check_low_rank,
    is_matrix,
    number_of_columns,
)
from spectral_callbacks.stability import Edge, Frame, stability_rule
from spectral_callbacks.stability.torch_optim import adamw as adamw_rule
from spectral_callbacks.stability.torch_optim import ema_threshold, steps_taken

_BY_COLUMN = ("columns", "ages", "exp_avg", "exp_avg_sq")


class DCTAdamW(LowRankOptimizer):
    """AdamW with the moments of the r columns of the DCT that the gradient has most of: little state, no SVD.

    A matrix G, laid out as lines of its shorter side (see `Lines`), moves by

        A = G + E                               E: the error of the last step, with error feedback, else 0
        I = the r columns of A Q with the largest norms, every `refresh_every` steps
        a = A Q_I                               E = A - a Q_Iᵀ
        m = β₁ m + (1 - β₁) a                   v = β₂ v + (1 - β₂) a²
        W = (1 - η wd) W - η [m̂ / (√v̂ + ε)] Q_Iᵀ

    with Q the orthonormal DCT-II of the width. Columns that are selected again keep their moments, the others of the
    state start at 0, and so does their age, by which m̂ and v̂ are corrected: m / (1 - β₁^age). All else steps by
    `AdamW`.

    State: 8 bytes a selected coefficient, that is 1 B a parameter at rank 1/8 (AdamW: 8 B), and with error feedback 4 B
    ("full") or 1 B ("8bit") a parameter more. One matrix Q a width is shared. On the CPU a step is slower than
    AdamW's; it saves memory, not time. In trained networks r columns of the DCT hold hardly more of a gradient than r
    random directions do, while those of an SVD hold much more: `captured_energy` tells, and error feedback mends it.

    Deviations from the paper: columns rank by their 2-norm, which is optimal, not by their 1-norm; the moments follow
    the columns always; the bias correction is that of a column's age (by the step, a fresh column's first step would be
    up to (1 - β₁) / √(1 - β₂) = 3.16 times the others'); selections are at the steps 1, 1 + T, 1 + 2T, ...

    Args:
        params: Parameters or groups.
        lr: η.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: wd, decoupled.
        rank: r: an int, at most the width counts, or a float, the share of the width; read at a parameter's first step.
        refresh_every: T, steps of a parameter from one selection of columns to the next.
        basis: "dct", or "identity": the columns of the matrix itself.
        error_feedback: "none", "full", or "8bit": 255 levels and one scale a line.
        maximize: Climb.
        foreach: Of AdamW's part: see `torch.optim.AdamW`.

    Raises:
        ValueError: If a setting is out of its range.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.ones(64, 16))
        >>> optimizer = DCTAdamW([w], lr=0.1)
        >>> w.square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[w]["exp_avg"].shape
        torch.Size([64, 2])

    References:
        Modoranu et al., FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language
        Models, arXiv:2505.17967.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rank: int | float = 0.125,
        refresh_every: int = 1,
        basis: Literal["dct", "identity"] = "dct",
        error_feedback: Literal["none", "full", "8bit"] = "none",
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": rank,
            "refresh_every": refresh_every,
            "basis": basis,
            "error_feedback": error_feedback,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def _check(self, group: Group) -> None:
        check_low_rank(group)
        check_betas(group["betas"])
        eps, every, feedback = group["eps"], group["refresh_every"], group["error_feedback"]
        check_not_negative("eps", eps)
        require(is_count(every), "refresh_every", every, "an int, 1 or more")
        require(feedback in ERROR_FEEDBACKS, "error_feedback", feedback, f"one of {', '.join(ERROR_FEEDBACKS)}")

    def _adamw(self, group: Group) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        return {"lr": group["lr"], "beta1": beta1, "beta2": beta2, "eps": group["eps"]}

    def _move(self, group: Group, parameter: Tensor, lines: Lines, basis: Basis, gradient: Tensor) -> None:
        feedback = ERROR_FEEDBACKS[group["error_feedback"]]
        state = self.state[parameter]
        if not state:
            r = number_of_columns(group["rank"], lines.width)
            state["step"] = new_step(parameter, group)
            state["columns"] = torch.arange(r, dtype=torch.int32, device=gradient.device)
            state["ages"] = torch.zeros_like(state["columns"])
            state["exp_avg"], state["exp_avg_sq"] = (lines.zeros(r, gradient.dtype) for _ in range(2))
        feedback.fit(state, lines, gradient.dtype)  # the setting may have changed between steps
        since_selection = int(state["step"]) % group["refresh_every"]
        state["step"] += 1
        columns, ages, exp_avg, exp_avg_sq = (local(state[name]) for name in _BY_COLUMN)

        error = feedback.recall(state)
        A = gradient if error is None else gradient + error
        if since_selection == 0:
            coefficients = basis.analyze(A)
            selected = strongest(lines.total(energies(coefficients)), len(columns))
            carry_over(selected, {name: local(state[name]) for name in _BY_COLUMN})
            a = coefficients.index_select(1, columns)
        else:
            a = basis.project(A, columns)
        ages += 1

        beta1, beta2 = group["betas"]
        exp_avg.lerp_(a, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(a, a, value=1 - beta2)
        correction1, correction2 = (1 - beta ** ages.double() for beta in (beta1, beta2))
        steps = exp_avg_sq.sqrt().div_(correction2.sqrt().to(a.dtype)).add_(group["eps"])
        steps = torch.div(exp_avg, steps, out=steps).div_(correction1.to(a.dtype))
        lr = float(group["lr"])
        moved = lines.of(parameter)
        basis.add_(moved, steps, columns, factor=-lr, decay=1 - lr * group["weight_decay"])
        lines.write(moved)

        if self._observations is not None:
            churn = (ages == since_selection + 1).double().mean()
            self._observations[parameter] = {"captured_energy": captured(lines, a, A), "column_churn": churn}
        if error is not None:
            basis.add_(A, a, columns, factor=-1.0)
            feedback.keep(state, A)
            if self._observations is not None:
                self._observations[parameter]["error_feedback_norm"] = lines.total(A.square().sum()).sqrt()


class InBasis(Frame):
    """The coefficients of a matrix's lines in an orthonormal basis, as the coordinates of a parameter.

    Args:
        lines: How the parameter is a matrix.
        basis: Of its lines.
    """

    def __init__(self, lines: Lines, basis: Basis) -> None:
        self._lines = lines
        self._basis = basis

    def analyze(self, tensor: Tensor) -> Tensor:
        """See `Frame`."""
        return self._lines.to_tensor(self._basis.analyze(self._lines.of(tensor)))

    def synthesize(self, tensor: Tensor) -> Tensor:
        """See `Frame`."""
        return self._lines.to_tensor(self._basis.synthesize(self._lines.of(tensor)))


@stability_rule(DCTAdamW)
def dct_adamw(parameter: Tensor, group: Group, state: Mapping[str, Any]) -> Edge:
    """AdamW's edge, with D = c / (√(v / (1 - β₂^age)) + ε) on the selected columns of the DCT, and 0 on the others.

    c is the column's bias correction 1 / (1 - β₁^age) against that of the oldest one, which is in the learning rate. It
    is the edge while the columns stay; error feedback, which brings later what they leave out, is not in it.
    """
    if not is_matrix(parameter):
        return adamw_rule(parameter, {**group, "amsgrad": False}, state)
    steps_taken(state)
    beta1, beta2 = map(float, group["betas"])
    columns, ages, _, exp_avg_sq = (local(state[name]) for name in _BY_COLUMN)
    correction1, correction2 = (1 - beta ** ages.double() for beta in (beta1, beta2))
    oldest = float(correction1.max())
    scale = oldest / correction1 / ((exp_avg_sq / correction2).sqrt() + float(group["eps"]))
    lines = lines_of(parameter)
    metric = torch.zeros_like(lines.of(parameter)).index_copy_(1, columns.long(), scale.to(exp_avg_sq.dtype))
    return Edge.from_threshold(
        ema_threshold(beta1),
        learning_rate=float(group["lr"]),
        correction=1 / oldest,
        preconditioner=lines.to_tensor(metric).to(parameter.dtype),
        decoupled=float(group["weight_decay"]),
        ascends=bool(group["maximize"]),
        frame=InBasis(lines, BASES[group["basis"]](lines.width)),
    )

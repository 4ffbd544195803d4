"""Trion: momentum, orthogonalized in a few columns of the DCT-II."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from spectral_callbacks.optim.base import Group, check_betas, check_not_negative, is_count, local, require
from spectral_callbacks.optim.columns import Basis, energies, strongest
from spectral_callbacks.optim.lines import Lines
from spectral_callbacks.optim.low_rank import LowRankOptimizer, captured, check_low_rank, number_of_columns
from spectral_callbacks.optim.newton_schulz import newton_schulz
from spectral_callbacks.stability import no_threshold

_SCALES = {  # of rows and columns
    "kj": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "kimi": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "dion": lambda rows, columns: math.sqrt(rows / columns),
    "none": lambda rows, columns: 1.0,
}


class Trion(LowRankOptimizer):
    """Dion with the columns of the DCT in place of a tracked subspace: steps that are orthogonal, of rank r.

    A matrix G, laid out as lines of its shorter side (see `Lines`), moves by

        B = M + G                               I = the r columns of B Q with the largest norms
        m = B Q_I                               M = B - (1 - μ) m Q_Iᵀ: momentum, that forgets only what was used
        W = (1 - η wd) W - η s NS(m) Q_Iᵀ       NS: `newton_schulz`, all singular values near 1

    with Q the orthonormal DCT-II of the width, and a scale s of the matrix's R rows and C columns. All else steps by
    `torch.optim.AdamW` with the `adamw_` settings, at a rate that a scheduler of PyTorch changes in proportion to `lr`.
    State: 4 bytes a parameter of a matrix, AdamW's 8 of the others. Of a sharded matrix, m is gathered on every
    process.

    Deviations from the paper's code: columns rank by their 2-norm, which is optimal, not by their 1-norm; the iteration
    runs in the precision of the parameters, at least float32, not in bfloat16. That code cannot run as published, its
    two ways of projecting differ in their bases, and it leaves out parameters of more than two dimensions.

    Args:
        params: Parameters or groups.
        lr: η, of matrices.
        momentum: μ.
        weight_decay: wd, decoupled, of matrices and all else.
        rank: r: an int, at most the width counts, or a float, the share of the width.
        scale: s: "kj" √max(1, R/C), "kimi" 0.2 √max(R, C), "dion" √(R/C), "none" 1.
        num_iterations: Of Newton-Schulz.
        basis: "dct", or "identity": the columns of the matrix itself.
        adamw_lr: Learning rate of what is no matrix, while `lr` is what it was at first.
        adamw_betas: Its β₁ and β₂.
        adamw_eps: Its ε.
        maximize: Climb.
        foreach: Of AdamW's part: see `torch.optim.AdamW`.

    Raises:
        ValueError: If a setting is out of its range.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(4, 2))
        >>> optimizer = Trion([w], lr=0.1, rank=1)
        >>> w.sum().backward()  # every row has one direction, the constant one
        >>> optimizer.step()
        >>> w.detach()[0] / 0.1  # s / √8 = 1/2 of what the iteration makes of a singular value of 1
        tensor([-0.3482, -0.3482])

    References:
        Modoranu et al., FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language
        Models, arXiv:2505.17967; Ahn et al., Dion, arXiv:2504.05295.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        rank: int | float = 0.125,
        scale: Literal["kj", "kimi", "dion", "none"] = "kj",
        num_iterations: int = 5,
        basis: Literal["dct", "identity"] = "dct",
        adamw_lr: float = 3e-4,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-10,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "rank": rank,
            "scale": scale,
            "num_iterations": num_iterations,
            "basis": basis,
            "adamw_lr": adamw_lr,
            "adamw_betas": adamw_betas,
            "adamw_eps": adamw_eps,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def _check(self, group: Group) -> None:
        check_low_rank(group)
        check_betas(group["adamw_betas"], "adamw_betas")
        momentum, scale, count = group["momentum"], group["scale"], group["num_iterations"]
        lr, eps = group["adamw_lr"], group["adamw_eps"]
        check_not_negative("adamw_lr", lr)
        require(0 <= momentum < 1, "momentum", momentum, "in [0, 1)")
        require(scale in _SCALES, "scale", scale, f"one of {', '.join(_SCALES)}")
        require(is_count(count), "num_iterations", count, "an int, 1 or more")
        check_not_negative("adamw_eps", eps)

    def _adamw(self, group: Group) -> dict[str, Any]:
        beta1, beta2 = group["adamw_betas"]
        lr = float(group["lr"])
        begun = float(group.get("initial_lr", lr))  # where a scheduler has noted what it began at
        share = lr / begun if begun else float(lr > 0)
        return {"lr": group["adamw_lr"] * share, "beta1": beta1, "beta2": beta2, "eps": group["adamw_eps"]}

    def _move(self, group: Group, parameter: Tensor, lines: Lines, basis: Basis, gradient: Tensor) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = lines.zeros(lines.width, gradient.dtype)
            r = number_of_columns(group["rank"], lines.width)
            state["columns"] = torch.full((r,), -1, dtype=torch.int32, device=gradient.device)
        B = local(state["momentum_buffer"]).add_(gradient)
        coefficients = basis.analyze(B)
        columns = strongest(lines.total(energies(coefficients)), len(state["columns"]))
        m = coefficients.index_select(1, columns)
        if self._observations is not None:
            churn = 1 - torch.isin(columns, state["columns"]).double().mean()
            self._observations[parameter] = {"captured_energy": captured(lines, m, B), "column_churn": churn}
        state["columns"].copy_(columns)
        basis.add_(B, m, columns, factor=group["momentum"] - 1)  # in place: M

        direction = lines.on_all(lambda whole: newton_schulz(whole, group["num_iterations"]), m)
        lr = float(group["lr"])
        moved = lines.of(parameter)
        factor = -lr * _SCALES[group["scale"]](*lines.sides)
        basis.add_(moved, direction, columns, factor=factor, decay=1 - lr * group["weight_decay"])
        lines.write(moved)


no_threshold(Trion, "it orthogonalizes the momentum, so that its steps have one size whatever the gradient's")

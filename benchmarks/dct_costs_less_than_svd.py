"""With its columns selected anew at every step, DCTAdamW costs a tenth of the same optimizer on an SVD, or less.

Rank 1/8 of the width, on one thread, matrices of 512 × 512, 768 × 768 and 768 × 3072: at most 0.1 of a full SVD at
every step, 0.4 of `torch.svd_lowrank(rank + 8, niter=2)`. State without error feedback: at most 1.5 bytes a parameter.
Only the basis differs between contestants: the same moments, the same step. Moments follow the singular vectors as
they turn, m by the rotation R, v by its squares; in the DCT this is a gather.

What it does not claim stands beside it. Against fused AdamW a step is many times slower: it saves memory, not time. And
equal rank is not equal quality: the captured energy is the share of the gradient that the step sees, the largest
possible for an SVD, and hardly above r / width for the DCT. So the last table trains a network on digits to the same
number of steps, three times, each contestant at the best of four learning rates. "GaLore-like" is an SVD every 50
steps, whose vectors are kept, and counted, as state, with moments that stay where they are.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from _measure import Claims, median_seconds, options, table, taking_turns
from _problems import digits, shuffled, tanh_mlp
from spectral_callbacks.optim import DCTAdamW
from spectral_callbacks.optim.columns import Basis
from spectral_callbacks.optim.lines import Lines
from spectral_callbacks.optim.low_rank import number_of_columns

RANK = 0.125
SHAPES = ((512, 512), (768, 768), (768, 3072))
LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
DCT, SVD, LOW_RANK_SVD, ADAMW = "DCT", "full SVD", "svd_lowrank", "AdamW"
WIDTH = 128


class SingularVectors(Basis):
    """The right singular vectors of the gradient that was last selected by, in place of the cosines."""

    vectors: Tensor  # (width, k)
    followers: dict[str, Tensor] | None = None  # a state whose moments turn with the vectors

    def analyze(self, lines: Tensor) -> Tensor:
        coefficients, after = self._decompose(lines)
        if self.followers is not None:
            r = len(self.followers["columns"])
            R = self.vectors[:, :r].mT @ after[:, :r]
            self.followers["exp_avg"].copy_(self.followers["exp_avg"] @ R)
            self.followers["exp_avg_sq"].copy_(self.followers["exp_avg_sq"] @ R.square())
        self.vectors = after
        return coefficients

    def _decompose(self, lines: Tensor) -> tuple[Tensor, Tensor]:
        U, s, Vh = torch.linalg.svd(lines, full_matrices=False)
        return U * s, Vh.mT.contiguous()

    def synthesize(self, coefficients: Tensor) -> Tensor:
        return coefficients @ self.vectors.mT

    def project(self, lines: Tensor, columns: Tensor) -> Tensor:
        return lines @ self.vectors.index_select(1, columns)

    def add_(
        self, lines: Tensor, coefficients: Tensor, columns: Tensor, *, factor: float = 1.0, decay: float = 1.0
    ) -> None:
        lines.addmm_(coefficients, self.vectors.index_select(1, columns).mT, beta=decay, alpha=factor)


class LeadingVectors(SingularVectors):
    """The first of them, by a randomized SVD."""

    def _decompose(self, lines: Tensor) -> tuple[Tensor, Tensor]:
        U, s, V = torch.svd_lowrank(lines, number_of_columns(RANK, self.width) + 8, niter=2)
        return U * s, V


class OtherBasis(DCTAdamW):
    """DCTAdamW in a basis of each parameter's own.

    Args:
        params: Parameters.
        basis_type: Of the basis.
        follow: Whether the moments turn with it.
        **settings: Those of DCTAdamW.
    """

    def __init__(self, params: Any, basis_type: type[SingularVectors], *, follow: bool = True, **settings: Any) -> None:
        super().__init__(params, **settings)
        self._basis_type = basis_type
        self._follow = follow
        self._bases: dict[Tensor, SingularVectors] = {}

    def _basis(self, group: dict[str, Any], parameter: Tensor, lines: Lines) -> Basis:
        if parameter not in self._bases:
            self._bases[parameter] = self._basis_type(lines.width)
            return self._bases[parameter]
        basis = self._bases[parameter]
        basis.followers = self.state[parameter] if self._follow else None
        return basis

    def state_bytes(self) -> int:
        """Return the bytes of the vectors, which have to be kept from one step to the next."""
        columns = {p: number_of_columns(RANK, basis.width) for p, basis in self._bases.items()}
        return sum(basis.vectors[:, : columns[p]].nbytes for p, basis in self._bases.items())


Maker = Callable[[Any, float], torch.optim.Optimizer]

STEPPING: dict[str, Maker] = {
    ADAMW: lambda weights, lr: torch.optim.AdamW(weights, lr=lr, fused=True),
    DCT: lambda weights, lr: DCTAdamW(weights, lr=lr, rank=RANK),
    LOW_RANK_SVD: lambda weights, lr: OtherBasis(weights, LeadingVectors, lr=lr, rank=RANK),
    SVD: lambda weights, lr: OtherBasis(weights, SingularVectors, lr=lr, rank=RANK),
}
TRAINING: dict[str, Maker] = {
    **STEPPING,
    "GaLore-like": lambda w, lr: OtherBasis(w, SingularVectors, follow=False, lr=lr, rank=RANK, refresh_every=50),
    "DCT, every 50 steps": lambda w, lr: DCTAdamW(w, lr=lr, rank=RANK, refresh_every=50),
    "largest columns (identity)": lambda w, lr: DCTAdamW(w, lr=lr, rank=RANK, basis="identity"),
    "DCT, error feedback": lambda w, lr: DCTAdamW(w, lr=lr, rank=RANK, error_feedback="full"),
    "DCT, 8-bit error feedback": lambda w, lr: DCTAdamW(w, lr=lr, rank=RANK, error_feedback="8bit"),
}


def state_bytes(optimizer: torch.optim.Optimizer) -> float:
    """Return the bytes of a state a parameter."""
    held: list[Any] = [value for state in optimizer.state.values() for value in state.values()]
    total = sum(value.nbytes for value in held if isinstance(value, Tensor))
    total += optimizer.state_bytes() if isinstance(optimizer, OtherBasis) else 0
    return total / sum(p.numel() for group in optimizer.param_groups for p in group["params"])


def captured(optimizer: torch.optim.Optimizer) -> float | None:
    """Return the mean captured energy of the last step over the matrices."""
    if not isinstance(optimizer, DCTAdamW):
        return None
    told = [optimizer.diagnostics(p) for group in optimizer.param_groups for p in group["params"]]
    shares = [one["captured_energy"].item() for one in told if "captured_energy" in one]
    return sum(shares) / len(shares)


def compare_steps(shape: tuple[int, int], repetitions: int, claims: Claims) -> None:
    """Let every contestant step on a gradient of rank 32 and as much noise."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = shape
    signal = torch.randn(rows, 32, generator=generator) @ torch.randn(32, columns, generator=generator) / 32**0.5
    gradient = 2 * signal + torch.randn(shape, generator=generator)
    optimizers = {}
    for name, make in STEPPING.items():
        weight = nn.Parameter(torch.randn(shape, generator=generator))
        weight.grad = gradient.clone()
        optimizers[name] = make([weight], 1e-3)
        optimizers[name].step()
    calls: dict[str, Callable[[int], Any]] = {name: lambda _, o=o: o.step() for name, o in optimizers.items()}
    seconds = {name: median_seconds(runs) for name, runs in taking_turns(calls, repetitions, strides={SVD: 3}).items()}
    rows_of_table = []
    for name, optimizer in optimizers.items():
        if isinstance(optimizer, DCTAdamW):
            optimizer.observe()
            optimizer.step()
        share = captured(optimizer)
        rows_of_table.append([
            name, f"{1e3 * seconds[name]:.2f}", f"{seconds[name] / seconds[DCT]:.2f}",
            f"{seconds[name] / seconds[ADAMW]:.1f}", "-" if share is None else f"{share:.3f}",
            f"{state_bytes(optimizer):.2f}",
        ])  # fmt: skip
    title = f"{rows} × {columns}"
    table((title, "ms a step", "x DCT", "x fused AdamW", "captured energy", "state, B a parameter"), rows_of_table)
    print()
    claims.at_most(f"{title}: {DCT} / {SVD}", seconds[DCT] / seconds[SVD], 0.1)
    claims.at_most(f"{title}: {DCT} / {LOW_RANK_SVD}", seconds[DCT] / seconds[LOW_RANK_SVD], 0.4)
    claims.at_most(f"{title}: state, bytes a parameter", state_bytes(optimizers[DCT]), 1.5, cost=False)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run came to: its loss on all it was trained on, mean captured energy, bytes of state a parameter."""

    loss: float
    captured: float | None
    state: float


def train(make: Maker, lr: float, num_steps: int, seed: int) -> Trained:
    """Train 64-128-128-10 tanh on digits with cross-entropy, in batches of 64."""
    x, y = digits()
    model = tanh_mlp(WIDTH, seed)
    optimizer = make(model.parameters(), lr)
    if isinstance(optimizer, DCTAdamW):
        optimizer.observe()
    shares = []
    for indices in itertools.islice(shuffled(len(x), 64, seed), num_steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x[indices]), y[indices]).backward()
        optimizer.step()
        shares.append(captured(optimizer))
    with torch.no_grad():
        loss = F.cross_entropy(model(x), y).item()
    known = [share for share in shares if share is not None]
    return Trained(loss, sum(known) / len(known) if known else None, state_bytes(optimizer))


def compare_training(num_steps: int, num_seeds: int) -> None:
    """Print what each contestant has come to after as many steps, by the mean of its losses and their range."""
    lines = []
    for name, make in TRAINING.items():
        runs = {lr: [train(make, lr, num_steps, seed) for seed in range(num_seeds)] for lr in LEARNING_RATES}
        losses = {lr: [run.loss for run in some] for lr, some in runs.items()}
        best = min(losses, key=lambda lr: sum(losses[lr]))
        run = runs[best][0]
        share = "-" if run.captured is None else f"{run.captured:.3f}"
        loss = f"{sum(losses[best]) / num_seeds:.3f} ({min(losses[best]):.3f} to {max(losses[best]):.3f})"
        lines.append([name, f"{best:g}", loss, share, f"{run.state:.2f}"])
    header = ("digits, 64-128-128-10", "lr", f"loss after {num_steps} steps", "captured energy", "state, B a parameter")
    table(header, lines)


def main() -> None:
    """Compare, and claim."""
    quick = options(__doc__).quick
    claims = Claims(judge_costs=not quick)
    for shape in SHAPES[: 1 if quick else None]:
        compare_steps(shape, 3 if quick else 15, claims)
    compare_training(*(20, 1) if quick else (200, 3))
    claims.settle()


if __name__ == "__main__":
    main()

"""Sharpness every 10 of 1,000 steps costs less than calling PyHessian each time, and is never off by a percent.

Two runs, three seeds each: full-batch gradient descent on a tanh network with squared loss, through the edge of
stability; and mini-batch SGD with momentum and cross-entropy, probed on a fixed batch. Ours opens a probe at every
look and hands its Hessian to the `Tracker` that the Sharpness callback keeps; PyHessian is called with its defaults.
The truth is plain Lanczos from a cold start at every look (k = 3, residual 1e-5). Costs are CPU time.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from _measure import Claims, Timed, options, table, timed
from _peers import Answer, missing, pyhessian, relative_error, truth
from _problems import Problem, digits, shuffled, tanh_mlp
from spectral_callbacks.linalg import Tracker
from spectral_callbacks.operators import Hessian
from spectral_callbacks.probe import Probe

EVERY = 10
TOLERANCE = 0.01  # an error that a curve shows


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run: what is probed, and the batches it sees, one a step."""

    problem: Problem
    optimizer: torch.optim.Optimizer
    batches: Iterator[tuple[Tensor, Tensor]]

    def step(self) -> None:
        """Take one optimizer step."""
        inputs, targets = next(self.batches)
        self.optimizer.zero_grad()
        self.problem.criterion(self.problem.model(inputs), targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def half_squared_distance(outputs: Tensor, one_hot: Tensor) -> Tensor:
    """Return the mean over the samples of half the squared distance."""
    return (outputs - one_hot).square().sum(1).mean() / 2


def full_batch(seed: int) -> Run:
    """64-128-128-10 tanh on all 1,797 digits, squared loss, descent at 0.13: at the edge after 240 to 370 steps."""
    x, y = digits()
    targets = F.one_hot(y, 10).float()
    model = tanh_mlp(128, seed)
    problem = Problem("full-batch GD", model, half_squared_distance, x, targets)
    return Run(problem, torch.optim.SGD(model.parameters(), lr=0.13), itertools.repeat((x, targets)))


def mini_batch(seed: int) -> Run:
    """64-256-256-10 tanh, cross-entropy, SGD at 0.05 with momentum 0.9 on batches of 64, probed on 512 fixed digits."""
    x, y = digits()
    model = tanh_mlp(256, seed)
    fixed = torch.randperm(len(x), generator=torch.Generator().manual_seed(1000 + seed))[:512]
    problem = Problem("mini-batch SGD", model, F.cross_entropy, x[fixed], y[fixed])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return Run(problem, optimizer, ((x[i], y[i]) for i in shuffled(len(x), 64, 2000 + seed)))


def warm(run: Run, tracker: Tracker, step: int) -> Answer:
    """Return what our tracker finds at this step."""
    problem = run.problem

    def loss(module: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return problem.criterion(module(batch[0]), batch[1])

    batch = (problem.inputs, problem.targets)
    with Probe(problem.model, run.optimizer, [batch], loss=loss, step=step) as probe:
        pairs = tracker(probe.operator(Hessian), generator=torch.Generator().manual_seed(step))
    return Answer(pairs.values.numpy(), pairs.num_matvecs)


@dataclasses.dataclass
class Looks:
    """What one contestant saw over a run: each look with its error."""

    runs: list[Timed[Answer]] = dataclasses.field(default_factory=list)
    errors: list[float] = dataclasses.field(default_factory=list)

    @property
    def seconds(self) -> float:
        """CPU time of all looks."""
        return sum(run.seconds for run in self.runs)

    @property
    def share_off(self) -> float:
        """Share of looks off by more than a percent."""
        return sum(error > TOLERANCE for error in self.errors) / len(self.errors)


OURS, PYHESSIAN = "ours", "PyHessian"


def track(run: Run, seed: int, num_steps: int) -> tuple[dict[str, Looks], float]:
    """Look every EVERY steps, turns swapped each time; return the looks of each, and the seconds of a gradient pass."""
    tracker = Tracker()
    looks = {OURS: Looks()} | ({} if missing("pyhessian") else {PYHESSIAN: Looks()})
    gradients = []
    for step in range(num_steps):
        if step % EVERY == 0:
            calls: dict[str, Callable[[], Answer]] = {
                OURS: lambda step=step: warm(run, tracker, step),
                PYHESSIAN: lambda step=step: pyhessian(run.problem, 1, seed * num_steps + step),
            }
            reference = truth(run.problem, 3)
            gradients.append(timed(run.problem.gradient).seconds)
            for name in sorted(looks, reverse=step // EVERY % 2 == 0):
                look = timed(calls[name])
                looks[name].runs.append(look)
                looks[name].errors.append(relative_error(look.result.values, reference))
        run.step()
    return looks, statistics.median(gradients)


def main() -> None:
    """Measure, print, judge."""
    quick = options(__doc__).quick
    seeds, num_steps = ((0,), 60) if quick else ((0, 1, 2), 1000)
    claims = Claims(judge_costs=not quick)
    rows = []
    for build, limit in ((full_batch, 0.35), (mini_batch, 0.65)):
        name = build(0).problem.name
        ratios, worst = [], 0.0
        for seed in seeds:
            looks, unit = track(build(seed), seed, num_steps)
            for contestant, seen in looks.items():
                rows.append([
                    f"{name}, seed {seed}: {contestant}",
                    f"{len(seen.runs)}",
                    f"{statistics.mean(run.result.num_matvecs for run in seen.runs):.1f}",
                    f"{seen.seconds / len(seen.runs) / unit:.1f}",
                    f"{looks[OURS].seconds / seen.seconds:.2f}",
                    f"{statistics.median(seen.errors):.1e}",
                    f"{max(seen.errors):.1e}",
                    f"{100 * seen.share_off:.0f} %",
                ])  # fmt: skip
            worst = max(worst, *looks[OURS].errors)
            if PYHESSIAN in looks:
                ratios.append(looks[OURS].seconds / looks[PYHESSIAN].seconds)
        claims.at_most(f"{name}: largest error of any look", worst, TOLERANCE, cost=False)
        if ratios:
            claims.at_most(f"{name}: CPU time / {PYHESSIAN}, median of the seeds", statistics.median(ratios), limit)
    header = ("run: who", "looks", "products", "gradients", "ours / it", "error, median", "worst", "off by > 1 %")
    table(header, rows)
    if reason := missing("pyhessian"):
        print(f"skipped: {reason}")
    claims.settle()


if __name__ == "__main__":
    main()

"""The inner products of per-sample gradients cost less time and memory than the peers', riding on a training step.

Every cost is CPU time in units of one plain training step (forward, backward, SGD) on the same batch, taken in turns.
What is made of the N x N matrix, its eigenvalues and the callback's other statistics, has rows of its own, for it is
the same for any way to the matrix. "total" is a training step and the matrix together: riding, the matrix comes out of
the step's own backward pass; all others, ours on a probe, too, add a pass of their own. The "first look", which finds
out how samples are laid out in the graph, is taken once a run, and is no part of the other rows. Memory is what a fresh
process holds at most above what it held before, for one call after a small one. Errors are against vmap(grad), relative
to the largest entry.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from _measure import Claims, Peak, in_fresh_process, median_seconds, options, peak_memory, table, taking_turns
from _peers import missing
from _problems import Problem
from _sample_peers import backpack, hooks, vmap_grad
from _sample_problems import LARGE_GPT, MLP, RESNET, SMALL_GPT, build
from spectral_callbacks.callbacks.findings import Findings
from spectral_callbacks.callbacks.gradient_statistics import add_noise, add_spectrum
from spectral_callbacks.callbacks.noise_average import NoiseAverage
from spectral_callbacks.metrics import CovarianceSpectrum
from spectral_callbacks.operators import SampleGram
from spectral_callbacks.operators.gram_ride import GramRide
from spectral_callbacks.operators.structure import SampleStructure
from spectral_callbacks.probe import Probe

Call = Callable[[], Tensor | None]
"""() -> the matrix (N, N), or None; all preparations done."""


def optimizer_of(problem: Problem) -> torch.optim.Optimizer:
    """Return the cheapest there is; it leaves the weights where they are."""
    return torch.optim.SGD(problem.model.parameters(), lr=0.0)


def plain(problem: Problem) -> Call:
    """Return a training step."""
    optimizer = optimizer_of(problem)

    def step() -> None:
        optimizer.zero_grad()
        problem.loss().backward()
        optimizer.step()

    return step


def probe_of(problem: Problem, structures: dict[Any, SampleStructure] | None = None) -> Probe:
    """Return a probe on the batch, which keeps what it finds of the graph in `structures`."""
    return Probe(
        problem.model,
        optimizer_of(problem),
        [(problem.inputs, problem.targets)],
        loss=lambda module, batch: problem.criterion(module(batch[0]), batch[1]),
        structures=structures,
    )


def structure_of(problem: Problem) -> SampleStructure:
    """Return how the batch is laid out in the graph."""
    with probe_of(problem) as probe:
        return probe.sample_structure(len(problem.inputs))


def riding(problem: Problem) -> Call:
    """Return a training step that leaves the matrix behind."""
    optimizer, structure, num_samples = optimizer_of(problem), structure_of(problem), len(problem.inputs)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss()
        ride = GramRide(loss, structure, batch_size=num_samples, num_samples=num_samples)
        loss.backward()
        seen = ride.conclude(1.0)
        optimizer.step()
        if seen is None:
            raise RuntimeError(ride.reason)
        return seen.gram

    return step


def on_probe(problem: Problem) -> Call:
    """Return what a callback does that does not ride, from its second look on."""
    structures: dict[Any, SampleStructure] = {}
    with probe_of(problem, structures) as probe:
        probe.sample_structure(len(problem.inputs))

    def look() -> Tensor:
        with probe_of(problem, structures) as probe:
            return probe.sample_gram(len(problem.inputs)).gram

    return look


def first_look(problem: Problem) -> Call:
    """Return what riding does once a run."""

    def look() -> None:
        structure_of(problem)

    return look


def eigenvalues(problem: Problem) -> Call:
    """Return the least that is made of the matrix."""
    gram = vmap_grad(problem)()

    def decompose() -> None:
        torch.linalg.eigvalsh(gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean())

    return decompose


def statistics(problem: Problem) -> Call:
    """Return what the callback makes of the matrix, standard errors and all, eigenvalues included."""
    gram, average = vmap_grad(problem)(), NoiseAverage(0.9, same_samples=True)

    def read() -> None:
        found = Findings()
        add_spectrum(found, CovarianceSpectrum.from_gram(gram), dataset_size=None, linear_below=1e-3)
        add_noise(found, SampleGram(gram), average, dataset_size=None)

    return read


def by_peer(prepare: Callable[[Problem], Callable[[], Tensor]], problem: Problem) -> Call:
    """Return a pass of a peer."""
    return prepare(problem)


STEP, RIDE, PROBE, FIRST = "a training step", "ours, riding", "ours, on a probe", "ours, first look"
EIGENVALUES, STATISTICS = "eigenvalues alone", "statistics of the callback"
VMAP, CHUNKED, BACKPACK, HOOKS = "vmap(grad)", "vmap(grad), chunks of 16", "BackPACK", "Opacus-style hooks"
CONTESTANTS: dict[str, Callable[[Problem], Call]] = {
    STEP: plain,
    RIDE: riding,
    PROBE: on_probe,
    FIRST: first_look,
    EIGENVALUES: eigenvalues,
    STATISTICS: statistics,
    VMAP: functools.partial(by_peer, vmap_grad),
    CHUNKED: functools.partial(by_peer, functools.partial(vmap_grad, chunk_size=16)),
    BACKPACK: functools.partial(by_peer, backpack),
    HOOKS: functools.partial(by_peer, hooks),
}
PEERS = (VMAP, CHUNKED, BACKPACK, HOOKS)
IN_STEP = (STEP, RIDE)  # what contains the training step
ASIDE = (FIRST, EIGENVALUES, STATISTICS)  # what is no way to the matrix


UNKNOWN = Peak(math.nan, math.nan)


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, a number of samples, and how often it is measured; what is slow runs in every `stride`-th round."""

    network: str
    num_samples: int
    repetitions: int
    stride: int = 1


FULL = (
    *(Case(MLP, n, 60, stride=6) for n in (64, 128, 256)),
    *(Case(RESNET, n, 7) for n in (64, 128, 256)),
    *(Case(SMALL_GPT, n, reps) for n, reps in ((64, 7), (128, 5), (256, 3))),
    Case(LARGE_GPT, 64, 3),
)
QUICK = (Case(MLP, 64, 3), Case(RESNET, 16, 1), Case(SMALL_GPT, 16, 1))


@dataclasses.dataclass(frozen=True)
class Seen:
    """What was measured of one contestant in one case: in training steps, MiB, and a relative error; nan: unknown."""

    cost: float
    total: float
    peak: Peak
    error: float
    note: str = ""


def memory(network: str, num_samples: int, name: str) -> Peak:
    """Return the peak of one call, to be run in a fresh process; a small call first loads what is loaded lazily."""
    CONTESTANTS[name](build(network, 4))()
    return peak_memory(CONTESTANTS[name](build(network, num_samples)))


def failure(call: Call) -> str:
    """Return why a peer does not take a network, or nothing."""
    try:
        call()
    except NotImplementedError as error:
        return f"fails: {error}"
    return ""


def measure(case: Case) -> dict[str, Seen]:
    """Measure all contestants in one case."""
    problem = build(case.network, case.num_samples)
    calls = {name: CONTESTANTS[name](problem) for name in CONTESTANTS if name != BACKPACK or not missing("backpack")}
    failures = {name: reason for name, call in calls.items() if name == BACKPACK and (reason := failure(call))}
    timed = {name: (lambda _, call=call: call()) for name, call in calls.items() if name not in failures}
    runs = taking_turns(timed, case.repetitions, strides=dict.fromkeys((PROBE, FIRST, *PEERS), case.stride))
    unit = median_seconds(runs[STEP])
    truth = runs[VMAP][0].result
    if truth is None:
        raise RuntimeError(f"{VMAP} returns no matrix")
    seen = {name: Seen(math.nan, math.nan, UNKNOWN, math.nan, why) for name, why in failures.items()}
    for name, turns in runs.items():
        cost, gram = median_seconds(turns) / unit, turns[0].result
        error = math.nan if gram is None or name in ASIDE else ((gram - truth).abs().max() / truth.abs().max()).item()
        peak = (
            UNKNOWN
            if name in (EIGENVALUES, STATISTICS)
            else in_fresh_process(memory, case.network, case.num_samples, name)
        )
        total = math.nan if name in ASIDE else cost + (name not in IN_STEP)
        seen[name] = Seen(cost, total, peak, error)
    return seen


def rows(seen: dict[str, Seen]) -> Iterable[list[str]]:
    """Yield a line of the table for each contestant."""

    def shown(value: float, digits: str) -> str:
        return "-" if math.isnan(value) else format(value, digits)

    for name, one in seen.items():
        yield [
            f"{name} {one.note}".strip(),
            shown(one.cost, ".2f"), shown(one.total, ".2f"),
            shown(one.total / seen[RIDE].total if name in PEERS else math.nan, ".2f"),
            shown(one.peak.added, ".0f"), shown(one.peak.added / seen[VMAP].peak.added, ".2f"), shown(one.error, ".0e"),
        ]  # fmt: skip


def claim(case: Case, seen: dict[str, Seen], claims: Claims) -> None:
    """Claim what the file says."""
    where, ride = f"{case.network}, N = {case.num_samples}", seen[RIDE]
    peers = {name: seen[name] for name in PEERS if name in seen and not math.isnan(seen[name].cost)}
    worst = max(one.error for one in (ride, seen[PROBE]))
    claims.at_most(f"{where}: largest error", worst, 1e-5, cost=False)
    best = min(peers, key=lambda name: peers[name].total)
    claims.at_most(f"{where}: total, riding / the best peer ({best})", ride.total / peers[best].total, 1.15)
    if case.network == SMALL_GPT and case.num_samples == 128:
        claims.at_most(f"{where}: total, riding", ride.total, 2.2)
        claims.at_most(f"{where}: peak memory, riding / {VMAP}", ride.peak.added / seen[VMAP].peak.added, 0.5)
    if case.network == MLP and case.num_samples == 128:
        claims.at_most(f"{where}: total, riding", ride.total, 1.5)
        for name, one in peers.items():
            claims.at_most(f"{where}: total, riding / {name}", ride.total / one.cost, 1 / 20)
            added = (ride.total - 1) / one.cost
            claims.at_most(f"{where}: what riding adds / {name}", added, 1 / 20)
    if case.network == LARGE_GPT:
        whole = max(one.peak.whole for one in (ride, seen[PROBE], seen[FIRST]))
        claims.at_most(f"{where}: whole process, MiB", whole, 8192, cost=False)


def main() -> None:
    """Measure, print, judge."""
    quick = options(__doc__).quick
    claims = Claims(judge_costs=not quick)
    for case in QUICK if quick else FULL:
        seen = measure(case)
        claim(case, seen, claims)
        header = (f"{case.network}, N = {case.num_samples}", "cost", "total", "/ ours", "MiB", "/ vmap", "error")
        table(header, list(rows(seen)))
        print()
    if reason := missing("backpack"):
        print(f"skipped: {reason}")
    claims.settle()


if __name__ == "__main__":
    main()

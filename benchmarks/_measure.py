"""CPU time, measured side by side: contestants take turns in one process on one thread, and medians are compared.

Peak memory, in a fresh process each.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import ctypes
import dataclasses
import functools
import gc
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import threadpoolctl
import torch

Result = TypeVar("Result")


def options(description: str | None) -> argparse.Namespace:
    """Read the command line and put torch and BLAS on one thread."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run: fewer repetitions, costs are not judged")
    _one_thread()
    gc.freeze()  # what was imported is no garbage, and looking it through takes as long as a small measurement
    return parser.parse_args()


@dataclasses.dataclass(frozen=True)
class Timed(Generic[Result]):
    """What a call returned and the CPU seconds it took."""

    result: Result
    seconds: float


def timed(call: Callable[[], Result]) -> Timed[Result]:
    """Run a call; garbage of earlier ones is collected before the clock starts."""
    gc.collect()
    start = time.process_time()
    result = call()
    return Timed(result, time.process_time() - start)


def taking_turns(
    calls: Mapping[str, Callable[[int], Result]], repetitions: int, *, strides: Mapping[str, int] | None = None
) -> dict[str, list[Timed[Result]]]:
    """Run every contestant once a round, each round beginning with another one.

    Args:
        calls: Name -> round number -> result.
        repetitions: Number of rounds.
        strides: Name -> run it in every n-th round only; 1 if left out.
    """
    runs: dict[str, list[Timed[Result]]] = {name: [] for name in calls}
    names = list(calls)
    for round_number in range(repetitions):
        first = round_number % len(names)
        for name in names[first:] + names[:first]:
            if round_number % (strides or {}).get(name, 1) == 0:
                runs[name].append(timed(functools.partial(calls[name], round_number)))
    return runs


def median_seconds(runs: Sequence[Timed[Result]]) -> float:
    """Return the median CPU time."""
    return statistics.median(run.seconds for run in runs)


@dataclasses.dataclass(frozen=True)
class Peak:
    """The most memory that a process held while a call ran, in MiB: what the call added, and all of it."""

    added: float
    whole: float


def peak_memory(call: Callable[[], object]) -> Peak:
    """Run a call, best the only one of its process (`in_fresh_process`); Linux only."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _resident("VmRSS")
    call()
    whole = _resident("VmHWM")
    return Peak(whole - before, whole)


def _resident(field: str) -> float:
    found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(found[1]) / 1024


def in_fresh_process(function: Callable[..., Result], *arguments: object) -> Result:
    """Return what a function at the top level of a module returns in a new process, on one thread."""
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context, initializer=_one_thread) as pool:
        return pool.submit(function, *arguments).result()


def _one_thread() -> None:
    torch.set_num_threads(1)
    threadpoolctl.threadpool_limits(1)


class Claims:
    """The sentences a benchmark stands for, each a number and its limit.

    Args:
        judge_costs: Whether a cost above its limit fails the benchmark; False in a smoke run.
    """

    def __init__(self, *, judge_costs: bool = True) -> None:
        self._judge_costs = judge_costs
        self._rows: list[tuple[str, ...]] = []
        self._failed = 0

    def at_most(self, sentence: str, value: float, limit: float, *, cost: bool = True) -> None:
        """Claim that value <= limit.

        Args:
            sentence: What the value is.
            value: Measured.
            limit: Claimed.
            cost: Whether it is a cost, which a smoke run measures too coarsely to judge.
        """
        judged = self._judge_costs or not cost
        holds = value <= limit
        self._failed += judged and not holds
        verdict = ("holds" if holds else "FAILS") if judged else "not judged"
        self._rows.append((sentence, f"{value:.3g}", f"<= {limit:.3g}", verdict))

    def settle(self) -> None:
        """Print the claims and leave with 1 if one failed."""
        print()
        table(("claim", "measured", "limit", "verdict"), self._rows)
        sys.exit(1 if self._failed else 0)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table in Markdown, first column left, the others right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, ["-" * width for width in widths], *rows):
        first, *others = row
        cells = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))]
        print("| " + " | ".join(cells) + " |", flush=True)

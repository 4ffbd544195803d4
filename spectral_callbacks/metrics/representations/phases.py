"""The phases of the geometry of representations in training, found while it runs, at a stated rate of false alarms."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from spectral_callbacks.metrics.representations.change_points import Array, Line, line_fit, slope_change, slope_nonzero


class Phase(enum.IntEnum):
    """A phase of Li et al. 2025 (arXiv:2509.23024), who read them off curves by eye."""

    WARMUP = 0
    """The effective rank falls and α rises from the start; also what holds before anything is known."""
    ENTROPY_SEEKING = 1
    """The effective rank rises, α falls."""
    COMPRESSION_SEEKING = 2
    """The effective rank falls, α rises, after an entropy-seeking phase."""


@dataclasses.dataclass(frozen=True)
class PhaseChange:
    """The begin of a phase.

    Attributes:
        step: Estimated turn: the step of the measurement from which on the effective rank has moved the new way.
        detected_at: Step of the measurement that raised the alarm. Nothing after it was used.
        phase: The phase that begins.
        rank_before: Slope of ln effective rank, per e-fold of the step, and its standard error, in the line before the
            turn; NaN at the start of the run.
        rank_after: In the line that now holds.
        alpha_before: That of α before; NaN without α.
        alpha_after: In the line that now holds.
        log_bayes_factor: ln of the Bayes factor for the new slope against none.
        threshold: What it had to exceed.
        false_alarm_rate: As given to the detector.
    """

    step: int
    detected_at: int
    phase: Phase
    rank_before: Line
    rank_after: Line
    alpha_before: Line
    alpha_after: Line
    log_bayes_factor: float
    threshold: float
    false_alarm_rate: float

    @property
    def evidence(self) -> str:
        """One sentence for people."""
        name = self.phase.name.lower().replace("_", "-")
        return (
            f"{name} since step {self.step}, seen at step {self.detected_at}: per e-fold of the step, ln effective "
            f"rank {_moved(self.rank_before, self.rank_after)}, alpha {_moved(self.alpha_before, self.alpha_after)}; "
            f"ln Bayes factor for the new slope {self.log_bayes_factor:.1f} against a threshold of "
            f"{self.threshold:.1f} (false alarms in at most {self.false_alarm_rate:.3g} of runs without a turn)."
        )


class PhaseDetector:
    """Finds the phases from the effective rank and α together, one measurement after the other.

    The series, ln effective rank and α, are seen as lines over ln(1 + step) plus noise, which may be correlated from
    one measurement to the next (AR(1)) and between the two. Two tests run after each measurement, each with
    half the rate of false alarms, and each valid however often it is looked at (see `change_points`):

    * Has the slope changed since the present line began? Then a new line begins at the turn. This alone is no phase:
      curves that level off do it.
    * Is the slope of the present line different from 0? If the effective rank then moves the other way than the phase
      says, and α does not move with it, and the effective rank has moved by more than `min_change`, a phase begins.

    The first phase is `WARMUP`, whether or not the effective rank falls. From there and from `COMPRESSION_SEEKING`, a
    rising line begins `ENTROPY_SEEKING` (from the first step on, if the run begins rising); from that, a falling line
    begins `COMPRESSION_SEEKING`; and so on, as often as it turns. Where α turns later than the effective rank, as it
    does in small language models, the phase is reported once both have turned, and dated to the turn of the
    effective rank.

    The rate holds for one level or one line with Gaussian noise: P(any alarm, ever) is at most `false_alarm_rate`, on
    the average over autocorrelations of 0 to 0.8; after a true turn, anew for each line. Neither a random walk nor a
    jump can be told from turns: at 0.95, up to 60 % of runs raise an alarm, and one measurement far off may raise two.

    Measure at geometric steps, about ten a decade, or the dip of the warm-up is missed; an even cadence is valid as
    well. An update costs 2 to 3 milliseconds at a few hundred measurements.

    Args:
        false_alarm_rate: Between 0 and 1.
        min_change: Least change of ln effective rank along the new line. Noise-free curves have significant wiggles of
            such a size.

    Attributes:
        phase: The present one.
        changes: All that were found, in order.

    Example:
        >>> detector = PhaseDetector()
        >>> for i in range(60):
        ...     wiggle = 0.05 * math.cos(9.0 * i * i)
        ...     change = detector.update(round(10 * 1.15**i), math.exp(3 + 0.05 * abs(i - 30) + wiggle), 2 - wiggle)
        ...     if change:
        ...         print(change.phase.name, change.step == round(10 * 1.15**30))
        ENTROPY_SEEKING True
    """

    def __init__(self, *, false_alarm_rate: float = 0.05, min_change: float = 0.001) -> None:
        if not 0 < false_alarm_rate < 1:
            raise ValueError(f"false_alarm_rate is {false_alarm_rate}; it must lie between 0 and 1, such as 0.05.")
        if not min_change >= 0:
            raise ValueError(f"min_change is {min_change}; it must be at least 0, such as 0.001.")
        self.false_alarm_rate = float(false_alarm_rate)
        self.min_change = float(min_change)
        self.phase = Phase.WARMUP
        self.changes: list[PhaseChange] = []
        self._steps: list[int] = []
        self._values: list[list[float]] = []  # ln effective rank, α
        self._bends: list[int] = []  # where lines began, but for the first
        self._turned = 0  # how many of them lie before the present phase

    def update(self, step: int, effective_rank: float, alpha: float | None) -> PhaseChange | None:
        """Take a measurement, and return the phase that it shows to have begun, if any.

        Args:
            step: Larger than all before.
            effective_rank: Positive; the measurement is skipped where it is NaN.
            alpha: None or NaN where it is unknown.

        Raises:
            ValueError: If the step does not increase, or the effective rank is not positive.
        """
        if step < 0 or (self._steps and step <= self._steps[-1]):
            raise ValueError(
                f"step is {step} after {self._steps[-1] if self._steps else 'none'}; steps must be at least 0 and "
                "increase from one measurement to the next."
            )
        if math.isnan(effective_rank):
            return None
        if not 0 < effective_rank < math.inf:
            raise ValueError(f"effective_rank is {effective_rank}; it must be positive and finite, or NaN to skip it.")
        known = alpha is not None and math.isfinite(alpha)
        self._steps.append(int(step))
        self._values.append([math.log(effective_rank), float(alpha) if alpha is not None and known else math.nan])
        x, values = np.log1p(np.array(self._steps, dtype=np.float64)), np.array(self._values)
        threshold = math.log(2 / self.false_alarm_rate)
        while (bend := self._new_bend(x, values, threshold)) is not None:
            self._bends.append(bend)
        change = self._new_phase(x, values, threshold)
        if change is not None:
            self.phase = change.phase
            self.changes.append(change)
            self._turned = len(self._bends)
        return change

    def state_dict(self) -> dict[str, Any]:
        """Return everything in plain containers; the settings are not part of it."""
        return {
            "phase": int(self.phase),
            "changes": [_plain(change) for change in self.changes],
            "steps": list(self._steps),
            "values": [list(pair) for pair in self._values],
            "bends": list(self._bends),
            "turned": self._turned,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another detector was."""
        self.phase = Phase(state["phase"])
        self.changes = [
            PhaseChange(*[*c[:2], Phase(c[2]), *(Line(*x) for x in c[3:7]), *c[7:]]) for c in state["changes"]
        ]
        self._steps = list(state["steps"])
        self._values = [list(pair) for pair in state["values"]]
        self._bends = list(state["bends"])
        self._turned = state["turned"]

    def _new_bend(self, x: Array, values: Array, threshold: float) -> int | None:
        if not (samples := self._samples(x, values)):
            return None
        found = [(kept, slope_change(x[kept], values[kept][:, c], bends=bends)) for kept, c, bends in samples]
        total = np.logaddexp.reduce([float(change.log_bayes_factor) for _, change in found]) - math.log(len(found))
        if total < threshold:
            return None
        kept, best = max(found, key=lambda pair: float(pair[1].log_bayes_factor))
        return int(kept[int(best.place)])

    def _new_phase(self, x: Array, values: Array, threshold: float) -> PhaseChange | None:
        if not (samples := self._samples(x, values)):
            return None
        each = [float(slope_nonzero(x[kept], values[kept][:, c], bends=bends)) for kept, c, bends in samples]
        evidence = float(np.logaddexp.reduce(each)) - math.log(len(each))
        if evidence < threshold:
            return None
        up = self.phase is not Phase.ENTROPY_SEEKING
        edges = [0, *self._bends, len(x) - 1]
        rank, alpha = self._lines(x, values, edges[-2], edges[-1])
        sign = 1 if up else -1
        moved = rank.slope * (x[-1] - x[edges[-2]])
        if not sign * moved > self.min_change or sign * alpha.slope >= 0:
            return None
        first = len(edges) - 2  # the effective rank may have turned earlier than this line began, as α had not
        while first > self._turned and sign * self._lines(x, values, edges[first - 1], edges[first])[0].slope > 0:
            first -= 1
        before = self._lines(x, values, edges[first - 1], edges[first]) if first else (Line(math.nan, math.nan),) * 2
        return PhaseChange(
            self._steps[edges[first]],
            self._steps[-1],
            Phase.ENTROPY_SEEKING if up else Phase.COMPRESSION_SEEKING,
            before[0],
            rank,
            before[1],
            alpha,
            evidence,
            threshold,
            self.false_alarm_rate,
        )

    def _samples(self, x: Array, values: Array) -> list[tuple[np.ndarray, list[int], list[int]]]:
        """Return the data to average the evidence over: indices of measurements, channels, bends among those.

        The present line alone, which is right where a curve before was no line, and all data since the start, where the
        noise is known better; of both channels, and if α is missing here and there, also of the effective rank.
        """
        start = self._bends[-1] if self._bends else 0
        found: list[tuple[np.ndarray, list[int], list[int]]] = []
        if len(x) - start < 3:
            return found
        complete = np.isfinite(values[:, 1])
        for begin in sorted({start, 0}):
            kept = np.arange(begin, len(x))
            bends = [bend for bend in self._bends if begin < bend]
            both = kept[complete[begin:]]
            if len(both) < len(kept):
                found.append((kept, [0], bends))
            inner = [int(np.searchsorted(both, bend)) for bend in bends]
            if all(a < b for a, b in itertools.pairwise([0, *inner, len(both) - 1])):
                found.append((both, [0, 1], inner))
        return found

    def _lines(self, x: Array, values: Array, first: int, last: int) -> tuple[Line, Line]:
        """Return the lines through both channels from one measurement to another, each included."""
        x, values = x[first : last + 1], values[first : last + 1]
        known = np.isfinite(values[:, 1])
        return line_fit(x, values[:, 0]), line_fit(x[known], values[known, 1])


def detect_phases(
    steps: Sequence[int],
    effective_ranks: Iterable[float],
    alphas: Iterable[float | None] | None = None,
    *,
    false_alarm_rate: float = 0.05,
) -> list[PhaseChange]:
    """Return the phases in a list of measurements, such as of published checkpoints: what `PhaseDetector` would report.

    Args:
        steps: Increasing.
        effective_ranks: One for each step; NaN is skipped.
        alphas: One for each step, None or NaN where unknown.
        false_alarm_rate: See `PhaseDetector`.

    Raises:
        ValueError: If the lengths differ, or as `PhaseDetector.update`.

    Example:
        >>> steps = [2**i for i in range(16)]
        >>> [change.step for change in detect_phases(steps, [2.0 + abs(i - 6) for i in range(16)])]
        [64]
    """
    ranks = list(effective_ranks)
    exponents = [None] * len(ranks) if alphas is None else list(alphas)
    if not len(steps) == len(ranks) == len(exponents):
        raise ValueError(
            f"there are {len(steps)} steps, {len(ranks)} effective ranks and {len(exponents)} alphas; pass one of each "
            "for every measurement."
        )
    detector = PhaseDetector(false_alarm_rate=false_alarm_rate)
    for step, rank, alpha in zip(steps, ranks, exponents, strict=True):
        detector.update(step, rank, alpha)
    return detector.changes


def _plain(change: PhaseChange) -> list[Any]:
    """Return the fields as numbers and lists of numbers."""
    fields = [getattr(change, field.name) for field in dataclasses.fields(change)]
    return [*fields[:2], int(change.phase), *map(list, fields[3:7]), *fields[7:]]


def _moved(before: Line, after: Line) -> str:
    """Say two slopes with their standard errors."""
    if math.isnan(after.slope):
        return "not known"
    old, now = (f"{x.slope:+.3g}" + ("" if math.isnan(x.error) else f" ± {x.error:.1g}") for x in (before, after))
    return now if math.isnan(before.slope) else f"{old} → {now}"

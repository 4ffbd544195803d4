"""What a run at the edge of stability showed, in a few lines."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Summary:
    """A run's history of `Sharpness` in eight numbers.

    Attributes:
        num_measurements: Measurements that gave a stability ratio.
        first_ratio: Stability ratio of the first of them.
        last_ratio: That of the last.
        late_ratio: Median over the last third of the run's steps.
        edge_step: First step measured at a ratio of 1 or more; None if the run stayed below.
        overhead: Share of the wall time that the spectral callbacks spent.
        num_matvecs: Hessian-vector products, all measurements together.
        last_step: Step of the last measurement.
    """

    num_measurements: int
    first_ratio: float
    last_ratio: float
    late_ratio: float
    edge_step: int | None
    overhead: float
    num_matvecs: int
    last_step: int

    def rows(self) -> list[tuple[str, str]]:
        """Return what to print: pairs of a name and a value."""
        edge = "not reached" if self.edge_step is None else f"step {self.edge_step:,}"
        return [
            ("stability ratio, first", f"{self.first_ratio:.3f}"),
            ("stability ratio, last", f"{self.last_ratio:.3f}"),
            ("  median of the last third", f"{self.late_ratio:.3f}"),
            ("edge of stability (ratio 1) reached", edge),
            ("measurements", f"{self.num_measurements:,}, the last at step {self.last_step:,}"),
            ("Hessian-vector products", f"{self.num_matvecs:,}"),
            ("share of the time spent measuring", f"{100 * self.overhead:.1f} %"),
        ]


def summarize(history: Sequence[Mapping[str, float]], *, name: str = "sharpness") -> Summary:
    """Return the summary of a history of `Sharpness`.

    Args:
        history: `Sharpness.history`: one mapping a measurement, with "step" and the tags.
        name: The callback's name, which begins its tags.

    Raises:
        ValueError: If no measurement holds a finite stability ratio.
    """
    ratio = f"{name}/stability_ratio"
    measured = [row for row in history if math.isfinite(row.get(ratio, math.nan))]
    if not measured:
        raise ValueError(
            f"none of the {len(history)} measurements holds a finite {ratio}; see {name}/status and the warnings."
        )
    ratios = [row[ratio] for row in measured]
    last_step = measured[-1]["step"]
    return Summary(
        num_measurements=len(measured),
        first_ratio=ratios[0],
        last_ratio=ratios[-1],
        late_ratio=statistics.median(row[ratio] for row in measured if row["step"] >= 2 / 3 * last_step),
        edge_step=next((int(row["step"]) for row in measured if row[ratio] >= 1), None),
        overhead=history[-1].get("cost/overhead", math.nan),
        num_matvecs=int(sum(row.get(f"{name}/num_matvecs", 0) for row in history)),
        last_step=int(last_step),
    )


def show(summary: Summary, title: str) -> None:
    """Print a summary, as a table where rich is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        print(title)
        for label, value in summary.rows():
            print(f"  {label:<38}{value}")
        return
    table = Table(title=title, title_justify="left", show_header=False)
    for label, value in summary.rows():
        table.add_row(label, value)
    Console().print(table)

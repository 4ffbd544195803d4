"""The summary of a run."""

from __future__ import annotations

import math
import sys

import pytest

from spectral_callbacks.demo.summary import show, summarize

RATIOS = [0.25, 0.5, 0.75, 1.0, 1.25, 0.875, 1.0, 1.125, 1.0625, 0.9375]
HISTORY = [
    {"step": 10 * i, "sharpness/stability_ratio": ratio, "sharpness/num_matvecs": i + 2, "cost/overhead": 0.5 / (i + 1)}
    for i, ratio in enumerate(RATIOS)
]


def test_summary_of_a_run_that_reaches_the_edge() -> None:
    summary = summarize(HISTORY)
    assert summary.num_measurements == 10
    assert summary.last_step == 90
    assert summary.first_ratio == 0.25
    assert summary.last_ratio == 0.9375
    assert summary.late_ratio == 1.03125  # the median of the measurements from step 60 on
    assert summary.edge_step == 30
    assert summary.num_matvecs == sum(range(2, 12))
    assert summary.overhead == 0.05


def test_summary_says_when_the_edge_was_not_reached() -> None:
    summary = summarize(HISTORY[:3])
    assert summary.edge_step is None
    assert ("edge of stability (ratio 1) reached", "not reached") in summary.rows()


def test_measurements_without_a_ratio_count_their_products_only() -> None:
    failed = {"step": 100, "sharpness/status": 2.0, "sharpness/num_matvecs": 7.0}
    spoiled = {"step": 110, "sharpness/stability_ratio": math.nan, "sharpness/num_matvecs": 1.0}
    summary = summarize([*HISTORY, failed, spoiled])
    assert summary.num_measurements == 10
    assert summary.last_ratio == 0.9375
    assert summary.num_matvecs == sum(range(2, 12)) + 8


def test_summary_follows_the_callbacks_name() -> None:
    renamed = [{tag.replace("sharpness", "other"): value for tag, value in row.items()} for row in HISTORY]
    assert summarize(renamed, name="other") == summarize(HISTORY)


def test_a_history_without_any_ratio_is_refused() -> None:
    with pytest.raises(ValueError, match=r"none of the 1 measurements holds a finite sharpness/stability_ratio"):
        summarize([{"step": 0, "sharpness/status": 3.0}])


@pytest.mark.parametrize("rich", [True, False])
def test_every_row_is_printed_with_and_without_rich(
    rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    summary = summarize(HISTORY)
    show(summary, "The run")
    printed = capsys.readouterr().out
    for label, value in summary.rows():
        assert label.strip() in printed
        assert value in printed

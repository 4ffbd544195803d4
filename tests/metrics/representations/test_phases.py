"""The phases of training: planted turns, false alarms, real shapes, and what an alarm may use."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from spectral_callbacks.metrics.representations.phases import Phase, PhaseChange, PhaseDetector, detect_phases
from tests.metrics.representations.test_change_points import ar1

Array = NDArray[np.float64]
STEPS = [round(10 * 1.1**i) for i in range(90)]
BOTH = [Phase.ENTROPY_SEEKING, Phase.COMPRESSION_SEEKING]


def planted(sd: float, seed: int, slopes: tuple[float, float, float] = (-0.05, 0.034, -0.018)) -> tuple[Array, Array]:
    """ln effective rank that falls, rises from the 31st and falls from the 61st measurement, and α mirrored."""
    line = np.concatenate([[0.0], np.cumsum(np.repeat(slopes, 30))[:89]])
    noise = sd * ar1((90,), 0.5, seed=seed)
    return np.exp(3 + line + noise[:, 0]), 2 - line + noise[:, 1]


def turns(changes: list[PhaseChange]) -> list[tuple[Phase, int]]:
    return [(change.phase, STEPS.index(change.step)) for change in changes]


def assert_both_turns_are_found(sd: float, *, within: int, runs: int) -> None:
    found = 0
    for seed in range(runs):
        changes = turns(detect_phases(STEPS, *planted(sd, seed)))
        found += [phase for phase, _ in changes] == BOTH and all(
            abs(place - true) <= within for (_, place), true in zip(changes, (30, 60), strict=True)
        )
    assert found >= 0.95 * runs


@pytest.mark.parametrize(("sd", "within"), [(0.02, 3), (0.05, 4), (0.10, 8)])
def test_both_planted_turns_are_found_near_their_places(sd: float, within: int):
    assert_both_turns_are_found(sd, within=within, runs=1)


@pytest.mark.slow
@pytest.mark.parametrize(("sd", "within", "runs"), [(0.02, 3, 40), (0.05, 4, 40), (0.10, 10, 100)])
def test_both_planted_turns_are_found_in_nearly_every_run(sd: float, within: int, runs: int):
    assert_both_turns_are_found(sd, within=within, runs=runs)


@pytest.mark.slow
@pytest.mark.parametrize("slope", [0.0, -0.03])
def test_runs_without_a_turn_raise_no_more_alarms_than_stated(slope: float):
    alarmed = 0
    for seed in range(60):
        line, noise = slope * np.arange(60), 0.05 * ar1((60,), 0.5, seed=seed, correlation=0.5)
        alarmed += bool(detect_phases(STEPS[:60], np.exp(2 + line + noise[:, 0]), 2 - line + noise[:, 1]))
    assert alarmed <= 3


def test_no_alarm_depends_on_data_after_it():
    ranks, alphas = planted(0.05, 7)
    changes = detect_phases(STEPS, ranks, alphas)
    assert [change.phase for change in changes] == BOTH
    for k, change in enumerate(changes):
        n = STEPS.index(change.detected_at) + 1
        assert detect_phases(STEPS[:n], ranks[:n], alphas[:n]) == changes[: k + 1]
        assert detect_phases(STEPS[: n - 1], ranks[: n - 1], alphas[: n - 1]) == changes[:k]
        assert change.step < change.detected_at


def test_a_detector_goes_on_exactly_from_its_state():
    ranks, alphas = planted(0.02, 3)
    whole, first = PhaseDetector(), PhaseDetector()
    returned = [whole.update(*m) for m in zip(STEPS, ranks, alphas, strict=True)]
    assert [change for change in returned if change] == whole.changes
    for m in list(zip(STEPS, ranks, alphas, strict=True))[:50]:
        first.update(*m)
    second = PhaseDetector()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for m in list(zip(STEPS, ranks, alphas, strict=True))[50:]:
        second.update(*m)
    assert second.changes == whole.changes
    assert second.phase is whole.phase is Phase.COMPRESSION_SEEKING


def test_the_evidence_is_a_sentence_with_numbers():
    change = detect_phases(STEPS[:50], *(series[:50] for series in planted(0.02, 1)))[0]
    assert change.rank_before.slope < 0 < change.rank_after.slope
    assert change.alpha_after.slope < 0 < change.alpha_before.slope
    assert change.log_bayes_factor > change.threshold == pytest.approx(math.log(40))
    for part in ("entropy-seeking", f"step {change.step}", f"{change.log_bayes_factor:.1f}", "0.05", "±"):
        assert part in change.evidence


def smooth_valley(x: Array, place: float, before: float, after: float) -> Array:
    z = x - place
    return before * (np.hypot(np.minimum(z, 0), 0.6) - 0.6) + after * (np.hypot(np.maximum(z, 0), 0.6) - 0.6)


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_the_shape_of_small_language_models_is_found_though_alpha_turns_later(noise: float):
    steps = sorted({0, *(round(10 ** (i / 10)) for i in range(34))})
    x = np.log1p(np.array(steps, dtype=np.float64))
    rng = np.random.default_rng(0)
    ranks = np.exp(math.log(4) + smooth_valley(x, math.log(40), 0.55, 0.7) + noise * rng.standard_normal(len(x)))
    alphas = 4.4 - smooth_valley(x, math.log(200), 0.45, 0.9) + 3 * noise * rng.standard_normal(len(x))
    (change,) = detect_phases(steps, ranks, alphas)
    assert change.phase is Phase.ENTROPY_SEEKING
    assert 20 <= change.step <= 80  # the effective rank's turn
    assert change.detected_at > 200  # not before α agrees


def test_phases_alternate_as_often_as_they_turn():
    ranks, alphas = planted(0.02, 0, (0.05, -0.04, 0.05))
    changes = detect_phases(STEPS, ranks, alphas)
    assert [change.phase for change in changes] == [*BOTH, Phase.ENTROPY_SEEKING]
    assert changes[0].step == STEPS[0]
    assert math.isnan(changes[0].rank_before.slope)


def test_missing_values_are_skipped():
    ranks, alphas = planted(0.02, 5)
    ranks[[3, 40, 41]] = math.nan
    some = [None if i % 7 == 0 else alpha for i, alpha in enumerate(alphas)]
    for given in (some, None):
        assert [phase for phase, _ in turns(detect_phases(STEPS, ranks, given))] == BOTH


def toy(counts: tuple[int, ...], d: int, steps: list[int], seed: int) -> list[float]:
    """The effective rank of one-hot inputs' features in a linear network, by gradient descent on all samples."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    features = 0.1 * torch.randn(len(label), d, generator=generator, dtype=torch.float64)
    head = 0.1 * torch.randn(d, len(counts), generator=generator, dtype=torch.float64)
    hot, rate, ranks = torch.eye(len(counts), dtype=torch.float64)[label], 0.5 / math.sqrt(len(label)), []
    for step in range(steps[-1] + 1):
        if step in steps:
            p = torch.linalg.svdvals(features - features.mean(0)).square()
            ranks.append(math.exp(torch.special.entr(p / p.sum()).sum().item()))
        gradient = torch.softmax(features @ head, 1) - hot
        features, head = features - rate * gradient @ head.mT, head - rate * features.mT @ gradient
    return ranks


def test_the_toy_has_three_phases_with_skewed_classes_and_two_with_uniform_ones():
    steps = sorted({0, *(round(10 ** (i / 20)) for i in range(66))})
    skewed = detect_phases(steps, toy((40, 20, 13, 10, 8, 7, 6, 5), 3, steps, seed=1))
    assert [change.phase for change in skewed] == BOTH
    uniform = detect_phases(steps, toy((18,) * 4, 2, steps, seed=0))
    assert [change.phase for change in uniform] == [Phase.ENTROPY_SEEKING]


def test_levelling_off_is_no_compression():
    t = np.arange(60)
    curve = 2 - 1.5 * np.exp(-t / 8)
    noise = 0.03 * ar1((60,), 0.5, seed=4)
    changes = detect_phases(STEPS[:60], np.exp(curve + noise[:, 0]), 3 - curve + noise[:, 1])
    assert [change.phase for change in changes] == [Phase.ENTROPY_SEEKING]


def test_an_exact_line_stays_in_the_warm_up_and_an_exact_turn_is_found():
    assert not detect_phases(STEPS, [5.0] * 90, [2.0] * 90)
    assert not detect_phases(STEPS, np.exp(-0.1 * np.log1p(STEPS)), None)
    changes = turns(detect_phases(STEPS, *planted(0.0, 0)))
    assert [phase for phase, _ in changes] == BOTH
    assert [place for _, place in changes] == pytest.approx([30, 60], abs=1)


def test_bad_input_is_refused():
    detector = PhaseDetector()
    assert detector.update(0, 4.0, None) is None
    with pytest.raises(ValueError, match="step is 0 after 0"):
        detector.update(0, 4.0, None)
    with pytest.raises(ValueError, match="effective_rank is -1"):
        detector.update(1, -1.0, None)
    with pytest.raises(ValueError, match="false_alarm_rate is 1"):
        PhaseDetector(false_alarm_rate=1.0)
    with pytest.raises(ValueError, match="min_change is -1"):
        PhaseDetector(min_change=-1.0)
    with pytest.raises(ValueError, match="2 steps, 1 effective ranks"):
        detect_phases([1, 2], [3.0])

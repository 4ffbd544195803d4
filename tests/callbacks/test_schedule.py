from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from spectral_callbacks.callbacks import schedule
from spectral_callbacks.callbacks.schedule import Budget, Schedule


@pytest.mark.parametrize("every", [1, 2, 7])
def test_every_n_steps_is_due_at_step_0_and_at_every_nth(every: int) -> None:
    due = [step for step in range(30) if Schedule(every_n_steps=every).due_at_step(step)]
    assert due == list(range(0, 30, every))


@pytest.mark.parametrize("every", [1, 3])
def test_every_n_epochs_is_due_once_at_step_0_and_at_every_nth_epochs_end(every: int) -> None:
    rhythm = Schedule(every_n_epochs=every)
    assert [step for step in range(30) if rhythm.due_at_step(step)] == [0]
    assert [epochs for epochs in range(1, 10) if rhythm.due_at_epoch_end(epochs)] == list(range(every, 10, every))


def test_steps_are_never_due_at_an_epochs_end() -> None:
    assert not any(Schedule(every_n_steps=1).due_at_epoch_end(epochs) for epochs in range(1, 10))


def test_geometric_is_about_ten_a_decade_evenly_in_the_logarithm() -> None:
    due = [step for step in range(1, 100_001) if Schedule(every_n_steps="geometric").due_at_step(step)]
    for decade in (10, 100, 1000, 10_000):
        assert sum(decade <= step < 10 * decade for step in due) == 10
    gaps = [math.log10(b / a) for a, b in itertools.pairwise(due) if a >= 100]
    assert max(gaps) / min(gaps) < 1.1


def test_geometric_holds_for_epochs_too() -> None:
    due = [epochs for epochs in range(1, 17) if Schedule(every_n_epochs="geometric").due_at_epoch_end(epochs)]
    assert due == [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]


def test_without_a_rhythm_nothing_is_due_by_itself() -> None:
    rhythm = Schedule()
    assert not rhythm.is_fixed
    assert not any(rhythm.due_at_step(step) or rhythm.due_at_epoch_end(step + 1) for step in range(5))


@pytest.mark.parametrize("name", ["every_n_steps", "every_n_epochs"])
@pytest.mark.parametrize("value", [0, -1, 1.0, 2.5, True, "always", float("nan")])
def test_a_rhythm_that_is_no_positive_whole_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}={value!r} must be a positive whole number or 'geometric'"):
        Schedule(**{name: value})


def test_two_rhythms_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="every_n_steps=2 and every_n_epochs=1 exclude each other"):
        Schedule(every_n_steps=2, every_n_epochs=1)


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(schedule.time, "perf_counter", clock.perf_counter)
    return clock


def simulate(clock: Clock, budget: Budget, *, share: float, step: float, cost: float, num_steps: int) -> list[int]:
    """Train for so many steps, and return those that a measurement was afforded before."""
    measured = []
    for index in range(num_steps):
        if budget.affords(share):
            measured.append(index)
            clock.now += cost
            budget.pay_measurement(cost, step=index)
        clock.now += step
    return measured


def test_the_first_measurement_is_free(clock: Clock) -> None:
    budget = Budget()
    budget.start()
    assert budget.affords(1e-9)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5])
@pytest.mark.parametrize("cost", [0.3, 1.0, 20.0])
def test_once_the_first_debt_is_repaid_the_share_is_kept_and_used(clock: Clock, share: float, cost: float) -> None:
    budget = Budget()
    budget.start()
    measured = simulate(clock, budget, share=share, step=1.0, cost=cost, num_steps=10_000)
    assert measured[0] == 0
    assert measured[1] >= 2 * cost / share - 2 * cost - 1
    assert budget.overhead <= share
    assert budget.overhead > 0.75 * min(share, cost / (cost + 1.0))  # at most once a step
    assert budget.spent == pytest.approx(cost * len(measured))


def test_what_comes_once_is_paid_back_but_not_expected_again(clock: Clock) -> None:
    budget = Budget()
    budget.start()
    budget.pay(10.0)
    budget.pay_measurement(0.1, step=0)
    clock.now += 10.1
    assert not budget.affords(0.1)
    clock.now += 92.0
    assert budget.affords(0.1)


def test_the_cold_first_search_is_paid_back_but_not_expected_again(clock: Clock) -> None:
    budget = Budget()
    budget.start()
    budget.pay_measurement(30.0, step=0)
    clock.now += 500.0
    assert not budget.affords(0.1), "the first is expected again until there is a second"
    budget.pay_measurement(1.0, step=1)
    clock.now += 20.0
    assert budget.affords(0.1)


def test_the_dearest_of_the_last_three_is_expected(clock: Clock) -> None:
    budget = Budget()
    budget.start()
    for step, cost in enumerate((1.0, 50.0, 1.0, 1.0)):
        budget.pay_measurement(cost, step=step)
    clock.now += 900.0
    assert not budget.affords(0.1)
    budget.pay_measurement(1.0, step=4)
    clock.now += 10.0
    assert budget.affords(0.1)


def test_a_measurement_that_is_paid_in_two_parts_is_expected_whole(clock: Clock) -> None:
    budget = Budget()
    budget.start()
    for step in range(3):
        budget.pay_measurement(1.0, step=step)
        budget.pay_measurement(4.0, step=step)
    assert budget.spent == 15.0
    clock.now += 1000.0
    budget.pay_measurement(1.0, step=3)
    clock.now += 40.0
    assert not budget.affords(0.1), "5 in 45"
    clock.now += 6.0
    assert budget.affords(0.1), "5 in 51"


def test_what_no_budget_limits_is_shown_but_not_held_against_it(clock: Clock) -> None:
    budget = Budget()
    budget.start()
    budget.pay_measurement(0.1, step=0)
    clock.now += 100.0
    budget.pay(90.0, budgeted=False)
    assert budget.overhead == pytest.approx(0.901)
    assert budget.affords(0.01)


def test_what_a_quiet_time_leaves_over_is_not_spent_in_a_burst(clock: Clock) -> None:
    budget = Budget()
    budget.start()
    budget.pay_measurement(1.0, step=-1)
    clock.now += 1000.0
    measured = simulate(clock, budget, share=0.1, step=1.0, cost=1.0, num_steps=50)
    assert measured[0] == 0
    assert min(b - a for a, b in itertools.pairwise(measured)) >= 9


def test_time_before_the_start_and_after_the_stop_does_not_count(clock: Clock) -> None:
    budget = Budget()
    clock.now += 100.0
    assert budget.elapsed == 0
    assert budget.overhead == 0
    budget.start()
    clock.now += 4.0
    budget.pay(1.0)
    assert budget.elapsed == 4.0
    budget.stop()
    clock.now += 100.0
    assert budget.elapsed == 4.0
    assert budget.overhead == 0.25


def test_a_resumed_run_goes_on_with_time_debt_and_expectation(clock: Clock) -> None:
    first = Budget()
    first.start()
    first.pay_measurement(5.0, step=0)
    clock.now += 10.0
    state = first.state_dict()
    clock.now += 1000.0
    second = Budget()
    second.load_state_dict(state)
    second.start()
    assert second.elapsed == 10.0
    assert second.spent == 5.0
    assert not second.affords(0.5)
    clock.now += 15.0
    assert second.affords(0.5)

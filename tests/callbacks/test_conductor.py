"""Who measures when, in real runs."""

from __future__ import annotations

import dataclasses
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch import Tensor, nn

from spectral_callbacks.callbacks import HessianSpectrum, Sharpness, SpectralCallback, schedule
from tests.callbacks.runs import Regression, Watch, complaints, fit, loader, plain_loss, series, sgd, steps
from tests.faults import NestedBackward, OnceSquare, SkewedSquare


@pytest.mark.parametrize(("every", "expected"), [(1, [0, 1, 2, 3, 4, 5, 6, 7]), (3, [0, 3, 6]), (100, [0])])
def test_every_n_steps_counts_optimizer_steps_from_0_across_epochs(every: int, expected: list[int]) -> None:
    callback = Sharpness(every_n_steps=every)
    fit(Regression(), callback, max_epochs=2)
    assert steps(callback) == expected


def test_geometric_is_dense_early_and_sparse_late() -> None:
    callback = Sharpness(every_n_steps="geometric")
    fit(Regression(), callback, max_epochs=5)
    assert steps(callback) == [0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 16]


def test_every_n_epochs_measures_at_step_0_and_at_the_end_of_epochs() -> None:
    callback = Sharpness(every_n_epochs=2)
    fit(Regression(), callback, max_epochs=5)
    assert steps(callback) == [0, 8, 16]


def test_an_epochs_end_is_the_state_after_its_last_step() -> None:
    by_epoch, by_step = Sharpness(every_n_epochs=1), Sharpness(every_n_steps=4, name="by_step")
    fit(Regression(), by_epoch, by_step, max_epochs=3)
    ends = {entry["step"]: entry["sharpness/lambda_max"] for entry in by_epoch.history}
    starts = {entry["step"]: entry["by_step/lambda_max"] for entry in by_step.history}
    assert set(ends) == {0, 4, 8, 12}
    for step in (0, 4, 8):
        assert ends[step] == pytest.approx(starts[step], rel=1e-3)


def test_every_n_epochs_sees_the_model_in_training_mode_also_after_validation() -> None:
    class Validated(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.modes: list[bool] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert self.training
            return self.loss(batch)

        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

        def val_dataloader(self) -> Any:
            return loader()

    callback = Sharpness(every_n_epochs=1, on_error="raise")
    fit(Validated(), callback, max_epochs=2)
    assert steps(callback) == [0, 4, 8]


def test_the_default_measures_at_step_0_and_then_waits_for_its_debt_to_be_repaid() -> None:
    callback = Sharpness()
    fit(Regression(), callback)
    assert steps(callback) == [0]


class Clock:
    """Time passes by one second a training step and by a second a measurement."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(schedule.time, "perf_counter", clock.perf_counter)
    return clock


class Timed(Sharpness):
    """Costs what it is told to cost."""

    def __init__(self, clock: Clock, cost: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.clock, self.cost = clock, cost

    def measure(self, probe: Any) -> Any:
        self.clock.now += self.cost
        return super().measure(probe)


def tick(clock: Clock) -> Watch:
    def see(*_: Any) -> None:
        clock.now += 1.0

    return Watch(see)


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_the_default_keeps_to_its_share_of_the_time(clock: Clock, share: float) -> None:
    callback = Timed(clock, max_overhead=share)
    fit(Regression(), callback, tick(clock), max_epochs=25)
    assert steps(callback)[0] == 0
    assert len(callback.history) > 0.7 * share * 100 / (1 - share)
    assert callback.history[-1]["cost/overhead"] <= share
    spent = len(callback.history)
    assert callback.history[-1]["cost/overhead"] == pytest.approx(spent / (callback.history[-1]["step"] + spent))


def test_the_smallest_share_rules_all_together(clock: Clock) -> None:
    greedy, modest = Timed(clock, max_overhead=0.9), Timed(clock, max_overhead=0.1, name="modest")
    fit(Regression(), greedy, modest, tick(clock), max_epochs=25)
    assert steps(greedy) == steps(modest)
    assert greedy.history[-1]["cost/overhead"] <= 0.1


def test_a_fixed_rhythm_is_obeyed_whatever_it_costs_and_leaves_the_others_their_budget(clock: Clock) -> None:
    fixed, budgeted = Timed(clock, every_n_steps=2), Timed(clock, max_overhead=0.1, name="budgeted")
    fit(Regression(), fixed, budgeted, tick(clock), max_epochs=25)
    assert steps(fixed) == list(range(0, 100, 2))
    assert 0.07 * 100 < len(steps(budgeted)) < 0.12 * 150, "a tenth of the time, the other's included"
    assert budgeted.history[-1]["cost/overhead"] > 0.3, "what all spent is what is logged"


@dataclasses.dataclass
class UnhashableLoss:
    """Compares by value, so that it has no hash."""

    factor: float = 2.0

    def __call__(self, module: Any, batch: Any) -> torch.Tensor:
        return self.factor * module.training_step(batch, 0)


def test_a_loss_without_a_hash_is_as_good_as_any() -> None:
    callback = Sharpness(every_n_steps=2, loss=UnhashableLoss(), on_error="raise")
    fit(Regression(), callback, max_epochs=1)
    assert len(callback.history) == 2


class SkewedLater(Regression):
    """Has a symmetric Hessian while it is tested, and none from the third step on."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step < 2:
            return self.loss(batch)
        return SkewedSquare.apply(torch.cat([p.flatten() for p in self.parameters()])).sum()


def test_products_that_turn_asymmetric_give_a_status_and_no_number() -> None:
    callback = Sharpness(every_n_steps=1)
    with pytest.warns(UserWarning, match="breakdown: The products are not those of one symmetric matrix"):
        fit(SkewedLater(), callback, max_epochs=1)
    assert [row["sharpness/status"] for row in callback.history] == [0.0, 0.0, 2.0, 2.0]
    assert ["sharpness/lambda_max" in row for row in callback.history] == [True, True, False, False]
    assert ["sharpness/stability_ratio" in row for row in callback.history] == [True, True, False, False]


class WithoutSecondDerivative(Regression):
    """Its loss can be differentiated once only."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return OnceSquare.apply(super().training_step(batch, batch_idx))


class GradientNorm(SpectralCallback):
    diagnostic = "gradient"

    def measure(self, probe: Any) -> dict[str, float]:
        return {"gradient/norm": probe.gradient().norm().item()}


def test_a_wrong_second_derivative_leaves_first_order_diagnostics_alone() -> None:
    sharpness, gradient = Sharpness(every_n_steps=1), GradientNorm(every_n_steps=1)
    with pytest.warns(UserWarning, match="once_differentiable"):
        fit(WithoutSecondDerivative(), sharpness, gradient, max_epochs=1)
    assert len(sharpness.history) == 1, "the status, once"
    assert [row["step"] for row in gradient.history] == [0, 1, 2, 3]
    assert all(row["gradient/norm"] > 0 for row in gradient.history)


class Sized(GradientNorm):
    """Fails while its frame holds a large tensor."""

    seen: weakref.ref[torch.Tensor] | None = None

    def measure(self, probe: Any) -> dict[str, float]:
        large = torch.zeros(1000)
        self.seen = weakref.ref(large)
        raise RuntimeError("planted")


def test_a_failure_lets_go_of_what_its_frames_held() -> None:
    callback = Sized(every_n_steps=1)
    gc.disable()
    try:
        with pytest.warns(UserWarning, match="planted"):
            fit(Regression(), callback, max_epochs=1)
        assert callback.seen is not None
        assert callback.seen() is None
    finally:
        gc.enable()


class Configures(Regression):
    """Keeps its callback as an attribute."""

    def __init__(self, callback: Sharpness) -> None:
        super().__init__()
        self.sharpness = callback

    def configure_callbacks(self) -> list[Sharpness]:
        return [self.sharpness]


def test_a_callback_that_the_module_holds_remembers_from_probe_to_probe() -> None:
    held, given = Sharpness(every_n_steps=1), Sharpness(every_n_steps=1)
    torch.manual_seed(5)
    fit(Configures(held), max_epochs=2)
    torch.manual_seed(5)
    fit(Regression(), given, max_epochs=2)
    products = [[row["sharpness/num_matvecs"] for row in callback.history] for callback in (held, given)]
    assert products[0] == products[1]


class SetsItsRate(Regression):
    """Warms up by hand, in the hook that callbacks measure in."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = 0.01 * (batch_idx + 2)


def test_a_learning_rate_that_changes_after_measuring_is_said_once() -> None:
    with pytest.warns(UserWarning, match="between measuring and the optimizer step") as warned:
        fit(SetsItsRate(), Sharpness(every_n_steps=1), max_epochs=1)
    assert len([w for w in warned if "learning rates" in str(w.message)]) >= 1


def test_two_callbacks_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="give each a name="):
        fit(Regression(), Sharpness(every_n_steps=1), Sharpness(every_n_epochs=1), max_epochs=1)


@pytest.mark.parametrize("name", ["features", "gauss_newton", "hessian"])
def test_a_name_that_begins_the_tags_of_another_callback_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="give each a name="):
        fit(Regression(), Sharpness(every_n_steps=1, name=name), HessianSpectrum(every_n_steps=1), max_epochs=1)


def test_the_overhead_at_the_end_is_logged(clock: Clock) -> None:
    callback = Timed(clock, every_n_steps=4, cost=2.0)
    trainer = fit(Regression(), callback, tick(clock), max_epochs=2)
    assert trainer.callback_metrics["cost/overhead"].item() == pytest.approx(4 / 12)


class Counting(Regression):
    """Counts how often its training step runs, also where that is undone: the count lies outside of it."""

    def __init__(self, runs: list[int], **options: Any) -> None:
        super().__init__(**options)
        self.count = runs.append

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.count(batch_idx)
        return self.loss(batch)


def count_runs(*callbacks: Sharpness) -> int:
    runs: list[int] = []
    fit(Counting(runs), *callbacks)
    return len(runs) - 4


def test_callbacks_with_the_same_settings_share_one_probe() -> None:
    one = count_runs(Sharpness(every_n_steps=1))
    both = [Sharpness(every_n_steps=1), Sharpness(2, every_n_steps=1, name="two")]
    assert count_runs(*both) == one
    assert one == 4 + 1  # a graph each time, and one run for the self-test
    assert all(len(callback.history) == 4 for callback in both)


@pytest.mark.parametrize(
    "other",
    [{"mode": "eval"}, {"num_batches": 2}, {"data": "current"}, {"loss": plain_loss}, {"precision": "training"}],
    ids=lambda options: next(iter(options)),
)
def test_callbacks_with_other_settings_have_probes_of_their_own(other: dict[str, Any]) -> None:
    one, two = Sharpness(every_n_steps=2), Sharpness(every_n_steps=2, name="two", **other)
    seen: dict[str, list[object]] = {"one": [], "two": []}
    for callback, name in ((one, "one"), (two, "two")):
        measure = callback.measure

        def noted(probe: Any, name: str = name, measure: Callable[[Any], Any] = measure) -> Any:
            seen[name].append(probe.objective)
            return measure(probe)

        callback.measure = noted
    fit(Regression(), one, two)
    assert seen["one"]
    assert seen["two"]
    assert not any(a is b for a in seen["one"] for b in seen["two"])


def test_two_callbacks_log_under_their_own_names() -> None:
    train, predict = Sharpness(every_n_steps=2), Sharpness(every_n_steps=2, mode="eval", name="sharpness_eval")
    trainer = fit(Regression(), train, predict)
    assert all(tag.startswith(("sharpness/", "cost/")) or tag == "step" for tag in train.history[0])
    assert all(tag.startswith(("sharpness_eval/", "cost/")) or tag == "step" for tag in predict.history[0])
    assert {"sharpness/lambda_max", "sharpness_eval/lambda_max"} <= set(trainer.callback_metrics)


def test_callbacks_that_share_a_probe_measure_what_they_would_alone() -> None:
    together = Sharpness(every_n_steps=1, name="b")
    torch.manual_seed(0)
    fit(Regression(), Sharpness(every_n_steps=1), together)
    alone = Sharpness(every_n_steps=1, name="b")
    torch.manual_seed(0)
    fit(Regression(), alone)
    assert series(alone, "b/lambda_max") == series(together, "b/lambda_max")


@pytest.mark.parametrize("num_batches", [6, 7])
def test_under_accumulation_only_the_beginning_of_a_window_is_measured(num_batches: int) -> None:
    callback = Sharpness(every_n_steps=1, data="current")
    seen: list[int] = []
    measure = callback.measure

    def noted(probe: Any) -> Any:
        seen.append(probe.batches[0].batch_idx)
        return measure(probe)

    callback.measure = noted
    trainer = fit(Regression(), callback, data=loader(8 * num_batches), accumulate_grad_batches=3, max_epochs=2)
    windows = [0, 3, 6][: -(-num_batches // 3)]
    assert seen == windows * 2
    assert steps(callback) == list(range(2 * len(windows)))
    assert trainer.global_step == 2 * len(windows)


def test_measuring_follows_an_accumulation_that_changes() -> None:
    callback = Sharpness(every_n_steps=1)
    fit(Regression(), GradientAccumulationScheduler({0: 1, 1: 4}), callback, max_epochs=2)
    assert steps(callback) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("options", [{"limit_train_batches": 0}, {"max_steps": 0}, {"max_epochs": 0}], ids=str)
def test_a_run_without_a_step_measures_nothing(options: dict[str, Any]) -> None:
    callback = Sharpness(every_n_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's
        fit(Regression(), callback, **options)
    assert callback.history == []


def test_a_trainer_may_fit_again() -> None:
    callback = Sharpness(every_n_steps=2)
    module = Regression()
    trainer = fit(module, callback)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    assert steps(callback) == [0, 2, 4, 6]


class Manual(Regression):
    """Two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [sgd(0.1)(self.net[0].parameters()), sgd(0.4)(self.net[2].parameters())]


def test_of_two_optimizers_the_one_asked_for_is_judged_on_its_own_parameters() -> None:
    first = Sharpness(every_n_steps=1, loss=plain_loss)
    second = Sharpness(every_n_steps=1, loss=plain_loss, optimizer=1, name="second")
    sizes: list[int] = []
    measure = second.measure

    def noted(probe: Any) -> Any:
        sizes.append(probe.space.size)
        return measure(probe)

    second.measure = noted
    trainer = fit(Manual(), first, second)
    assert trainer.global_step == 8
    assert steps(first) == steps(second) == [0, 1, 2, 3]
    assert sizes == [10] * 4
    assert series(first, "sharpness/two_over_lr") == pytest.approx([20.0] * 4)
    assert series(second, "second/two_over_lr") == pytest.approx([5.0] * 4)


def test_manual_optimization_without_a_loss_is_reported_once_and_the_run_is_unharmed() -> None:
    torch.manual_seed(0)
    plain, module = Manual(), Manual()
    module.load_state_dict(plain.state_dict())
    fit(plain)
    callback = Sharpness(every_n_steps=1)
    with pytest.warns(UserWarning, match=r"Pass loss=\(pl_module, batch\) -> scalar Tensor") as warned:
        fit(module, callback)
    assert len(complaints(warned)) == 1
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))


def test_several_processes_are_refused_once(monkeypatch: pytest.MonkeyPatch) -> None:
    callbacks = [Sharpness(every_n_steps=1), Sharpness(every_n_steps=1, name="b")]
    monkeypatch.setattr(pl.Trainer, "world_size", 2)
    with pytest.warns(UserWarning, match="does not run on several processes yet, and the trainer has 2") as warned:
        trainer = fit(Regression(), *callbacks)
    assert len(complaints(warned)) == len(callbacks)
    assert trainer.global_step == 4
    assert all(callback.history == [] for callback in callbacks)


class Iterating(Regression):
    def training_step(self, dataloader_iter: Iterator[Any]) -> Tensor:  # type: ignore[override]
        batch, _, _ = next(dataloader_iter)
        return self.loss(batch)


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`:UserWarning")
@pytest.mark.parametrize("options", [{}, {"loss": plain_loss}], ids=["training_step", "loss"])
def test_a_training_step_that_fetches_its_own_batches_is_reported_once(options: dict[str, Any]) -> None:
    callback = Sharpness(every_n_steps=1, **options)
    with pytest.warns(UserWarning, match=r"fetches its own batches \(dataloader_iter\)") as warned:
        trainer = fit(Iterating(), callback)
    assert len(complaints(warned)) == 1
    assert trainer.global_step == 4


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`:UserWarning")
def test_it_can_be_measured_with_a_loss_and_a_loader() -> None:
    callback = Sharpness(every_n_steps=1, loss=plain_loss, data=loader())
    fit(Iterating(), callback)
    assert steps(callback) == [0, 1, 2, 3]


class Uncopyable:
    """A batch that only training understands."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.pair, self.stream = (x, y), (i for i in range(3))

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.pair)


def collate(entries: list[Any]) -> Uncopyable:
    x, y = (torch.stack(column) for column in zip(*entries, strict=True))
    return Uncopyable(x, y)


def test_a_batch_that_cannot_be_copied_is_reported_once_and_the_run_is_unharmed() -> None:
    callback = Sharpness(every_n_steps=1)
    with pytest.warns(UserWarning, match="Training goes on without this diagnostic") as warned:
        trainer = fit(Regression(), callback, data=loader(collate_fn=collate))
    assert len(complaints(warned)) == 1
    assert trainer.global_step == 4


class WrongLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return SkewedSquare.apply(self.inner(x))


class WrongSecondDerivative(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), WrongLayer(), nn.Linear(4, 2))


def test_a_wrong_second_derivative_is_reported_with_its_module_and_no_value_is_logged() -> None:
    callback, other = Sharpness(every_n_steps=1), Sharpness(every_n_steps=2, name="b")
    with pytest.warns(UserWarning, match=r"the second derivative is wrong in net\.1\.inner") as warned:
        trainer = fit(WrongSecondDerivative(), callback, other)
    assert len(complaints(warned)) == 2
    assert callback.history == [{"step": 0, "sharpness/status": 2.0}]
    assert other.history == [{"step": 0, "b/status": 2.0}]
    assert "sharpness/lambda_max" not in trainer.callback_metrics
    assert trainer.global_step == 4


class NanAtFirst(WrongSecondDerivative):
    """Hides its wrong derivative behind a loss that is not finite at first."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        scale = float("nan") if self.trainer.global_step == 0 else 1.0
        return self.loss(batch) * torch.tensor(scale).nan_to_num(1.0 if not self.probing else float("nan"))

    @property
    def probing(self) -> bool:
        return self.log.__name__ == "_ignore"


def test_a_self_test_that_told_nothing_is_repeated() -> None:
    callback = Sharpness(every_n_steps=1)
    with pytest.warns(UserWarning, match="not finite"), pytest.warns(UserWarning, match=r"wrong in net\.1\.inner"):
        fit(NanAtFirst(), callback)
    assert [entry["sharpness/status"] for entry in callback.history] == [3.0, 2.0]
    assert all("sharpness/lambda_max" not in entry for entry in callback.history)


class Checkpointed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(width, 4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return NestedBackward.apply(x, self.block)


class HiddenAtFirst(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(Checkpointed(3), nn.Linear(4, 2))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return self.loss((x.requires_grad_(), y))


class HiddenInTheMiddle(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), Checkpointed(4), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("kind", "message", "num_logged"),
    [
        (HiddenAtFirst, r"the curvature of net\.0\.block\.0 would be taken for zero", 1),
        (HiddenInTheMiddle, r"wrong in .* no path to net\.1\.block\.0\.weight, .*\.bias\. A custom autograd", 0),
    ],
)
def test_parameters_that_only_training_reaches_are_reported_with_their_module_and_nothing_is_logged_from_then_on(
    kind: type[Regression], message: str, num_logged: int
) -> None:
    torch.manual_seed(0)
    plain, module = kind(), kind()
    module.load_state_dict(plain.state_dict())
    fit(plain)
    callback, sparse = Sharpness(every_n_steps=1), Sharpness(every_n_steps=2, name="b")
    with pytest.warns(UserWarning, match=message) as warned:
        fit(module, callback, sparse)
    assert len(complaints(warned)) == 2
    for c, tag in ((callback, "sharpness"), (sparse, "b")):
        assert ["lambda_max" in str(entry) for entry in c.history] == [True] * num_logged + [False]
        assert c.history[-1] == {"step": 0, f"{tag}/status": 2.0}
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint:UserWarning")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_a_callback_that_comes_later_is_tested_anew_where_an_earlier_one_failed(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=2)
    fit(HiddenAtFirst(), saver, enable_checkpointing=True, max_steps=2, max_epochs=-1)
    early, late = Sharpness(every_n_steps=1), Sharpness(every_n_steps=4, name="late")
    with pytest.warns(UserWarning, match="would be taken for zero") as warned:
        fit(HiddenAtFirst(), early, late, ckpt_path=saver.best_model_path, max_epochs=4)
    assert len(complaints(warned)) == 2
    assert steps(early) == [2, 2]
    assert steps(late) == [4, 4]


def test_unused_parameters_are_no_reason_to_complain() -> None:
    class Unused(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(2, 2)

    callback = Sharpness(every_n_steps=1)
    fit(Unused(), callback)
    assert series(callback, "sharpness/status") == [0] * 4


def test_a_parameter_that_only_some_batches_reach_is_no_reason_either() -> None:
    class Branching(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(3, 2)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self.loss(batch)
            if batch_idx % 2 or torch.rand(()) < 0.5:
                loss = loss + self.spare(batch[0]).square().mean()
            return loss

    for seed in range(4):
        torch.manual_seed(seed)
        callback = Sharpness(every_n_steps=1)
        fit(Branching(), callback)
        assert series(callback, "sharpness/status") == [0] * 4

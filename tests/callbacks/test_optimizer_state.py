"""What OptimizerState sees of the step that training takes, against weights and gradients that were noted beside it."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import HISTOGRAMS, EventAccumulator
from torch import Tensor, nn

from spectral_callbacks.callbacks import OptimizerState, Sharpness, Spectrum
from spectral_callbacks.callbacks.self_report import SelfReport
from spectral_callbacks.linalg import Status
from spectral_callbacks.optim.diffgrad import DiffGrad
from spectral_callbacks.stability import ObservableOptimizer
from tests.callbacks.runs import MakeOptimizer, Regression, complaints, fit, loader, series, sgd, steps

QUANTITIES = ("update_norm", "update_to_weight", "update_gradient_cosine", "effective_lr")


def watcher(**options: Any) -> OptimizerState:
    return OptimizerState(**{"every_n_steps": 1, "on_error": "raise", **options})


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


class Noted(pl.Callback):
    """Notes weights around each batch, and the gradients behind it, without any hook on an optimizer."""

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.before = flat(pl_module.parameters())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = flat(pl_module.parameters()) - self.before
        if not step.any():
            return
        g = flat(p.grad for p in pl_module.parameters() if p.grad is not None)
        self.found.append(
            {
                "update_norm": step.norm().item(),
                "update_to_weight": (step.norm() / self.before.norm()).item(),
                "update_gradient_cosine": torch.cosine_similarity(step, -g, dim=0).item(),
                "effective_lr": (step.norm() / g.norm()).item(),
            }
        )


OPTIMIZERS: dict[str, MakeOptimizer] = {
    "SGD": sgd(),
    "momentum": sgd(0.1, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    "DiffGrad": lambda p: DiffGrad(p, lr=1e-2),
}
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 3},
    "clipping": {"gradient_clip_val": 0.01},
    "bfloat16": {"precision": "bf16-mixed"},
}


@pytest.mark.filterwarnings("ignore:.*the mean friction is within:UserWarning")
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_numbers_are_those_of_the_step_that_was_taken(optimizer: str, run: str) -> None:
    torch.manual_seed(0)
    callback, noted = watcher(), Noted()
    fit(Regression(OPTIMIZERS[optimizer]), callback, noted, max_epochs=2, **RUNS[run])
    assert steps(callback) == list(range(4 if run == "accumulation" else 8))
    assert len(noted.found) == len(callback.history)
    for seen, expected in zip(callback.history, noted.found, strict=True):
        for name in QUANTITIES:
            assert seen[f"optimizer/{name}"] == pytest.approx(expected[name], rel=1e-5), name
    assert series(callback, "optimizer/status") == [Status.CONVERGED] * len(callback.history)


def test_plain_descent_has_its_learning_rate_and_goes_straight_down() -> None:
    callback = watcher()
    fit(Regression(sgd(0.05)), callback)
    assert series(callback, "optimizer/effective_lr") == pytest.approx([0.05] * 4, rel=1e-4)
    assert series(callback, "optimizer/update_gradient_cosine") == pytest.approx([1] * 4, abs=1e-5)


def test_an_optimizer_that_climbs_goes_straight_up() -> None:
    callback = watcher()
    fit(Regression(sgd(0.05, maximize=True)), callback)
    assert series(callback, "optimizer/update_gradient_cosine") == pytest.approx([1] * 4, abs=1e-5)


def test_clipping_is_seen_in_the_size_of_the_step() -> None:
    callback = watcher()
    fit(Regression(sgd(0.1)), callback, gradient_clip_val=1e-3)
    assert series(callback, "optimizer/update_norm") == pytest.approx([1e-4] * 4, rel=1e-2)


# ---- Which parameters


class PartlyFrozen(Regression):
    def __init__(self) -> None:
        super().__init__(sgd(0.1))
        self.net[0].weight.requires_grad_(False)
        self.unused = nn.Parameter(torch.full((3,), 100.0))


def test_only_parameters_with_a_gradient_count() -> None:
    torch.manual_seed(0)
    callback, net = watcher(every_n_steps=100), PartlyFrozen()
    moved = list(net.net.parameters())[1:]
    weight = flat(moved).norm().item()
    fit(net, callback)
    first = callback.history[0]
    assert first["optimizer/update_norm"] / first["optimizer/update_to_weight"] == pytest.approx(weight, rel=1e-5)


def test_a_parameter_that_thaws_while_the_step_runs_counts_from_the_next_one() -> None:
    class Thawing(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.net[0].requires_grad_(False)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 1:
                self.net[0].requires_grad_(True)
            return super().training_step(batch, batch_idx)

    callback = watcher(per_layer=True)
    fit(Thawing(), callback)
    assert ["optimizer/update_norm/net.0" in entry for entry in callback.history] == [False, False, True, True]


def test_each_layer_is_logged_on_request() -> None:
    torch.manual_seed(0)
    callback = watcher(per_layer=True)
    fit(Regression(lambda p: torch.optim.AdamW(p, lr=1e-2)), callback)
    for entry in callback.history:
        parts = [entry[f"optimizer/update_norm/{layer}"] for layer in ("net.0", "net.2")]
        assert math.hypot(*parts) == pytest.approx(entry["optimizer/update_norm"])
        assert all(f"optimizer/{name}/net.0" in entry for name in QUANTITIES)
    assert not [tag for tag in watcher_tags(per_layer=False) if "/net" in tag]


def watcher_tags(**options: Any) -> set[str]:
    callback = watcher(**options)
    fit(Regression(), callback)
    return set(callback.history[0])


def test_what_is_divided_by_zero_is_left_out() -> None:
    class AtZero(Regression):
        def __init__(self) -> None:
            super().__init__()
            for p in self.parameters():
                nn.init.zeros_(p)

        def loss(self, batch: Any) -> Tensor:
            return 0.0 * super().loss(batch)

    callback = watcher()
    fit(AtZero(), callback)
    assert callback.history[0]["optimizer/update_norm"] == 0
    assert set(callback.history[0]) & {f"optimizer/{name}" for name in QUANTITIES} == {"optimizer/update_norm"}
    assert callback.history[0]["optimizer/status"] == Status.CONVERGED


def test_a_gradient_that_is_not_finite_is_said_and_logged() -> None:
    class Overflowing(Regression):
        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch) * (math.inf if self.global_step == 1 else 1)

    callback = watcher()
    with pytest.warns(UserWarning, match="nonfinite: .*Look for NaN or infinity"):
        fit(Overflowing(), callback)
    assert series(callback, "optimizer/status")[:2] == [Status.CONVERGED, Status.NONFINITE]
    assert all(math.isfinite(value) for entry in callback.history for value in entry.values())


# ---- Which steps


class Scaled(MixedPrecision):
    def __init__(self, factor: float) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=factor))


@pytest.mark.parametrize("optimizer", [sgd(0.1), lambda p: torch.optim.SGD(p, lr=0.1, fused=True)])
def test_a_step_that_a_scaler_skips_leaves_the_look_to_the_next(optimizer: MakeOptimizer) -> None:
    callback = watcher(every_n_steps=20)
    fit(Regression(optimizer), callback, plugins=[Scaled(2.0**24)], max_epochs=6)
    assert len(callback.history) == 2
    assert 0 < steps(callback)[0] < 20
    assert steps(callback)[1] == 20
    assert series(callback, "optimizer/effective_lr") == pytest.approx([0.1] * 2, rel=1e-2), "gradients are unscaled"


@pytest.mark.filterwarnings("ignore:.*returned `None`:UserWarning")  # which Lightning says once a process
def test_a_training_step_without_a_loss_leaves_the_look_to_the_next() -> None:
    class Skipping(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    callback = watcher(every_n_steps=100)
    fit(Skipping(), callback)
    assert steps(callback) == [1]


def test_the_look_of_an_epochs_end_is_taken_at_the_next_step() -> None:
    callback = watcher(every_n_steps=None, every_n_epochs=1)
    fit(Regression(), callback, max_epochs=3)
    assert steps(callback) == [0, 4, 8]


class Adversarial(Regression):
    """Steps the first optimizer twice a batch and the second one at every other batch, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.lr_of_first: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        own: list[Any] = self.optimizers()  # pyright: ignore[reportAssignmentType]
        first, second = own
        for index, optimizer in enumerate([first, first, second] if batch_idx % 2 else [first, first]):
            optimizer.param_groups[0]["lr"] = 0.1 + index
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[0].parameters(), lr=0.1), torch.optim.SGD(self.net[2].parameters(), lr=0.1)]


@pytest.mark.parametrize(("optimizer", "when", "lr"), [(0, [0, 1, 2, 3], 0.1), (1, [1, 3], 2.1)])
def test_of_several_optimizers_the_first_step_of_the_chosen_one_is_seen(
    optimizer: int, when: list[int], lr: float
) -> None:
    callback = watcher(optimizer=optimizer)
    fit(Adversarial(), callback)
    assert steps(callback) == when
    assert series(callback, "optimizer/effective_lr") == pytest.approx([lr] * len(when), rel=1e-4)


def test_the_copy_is_dropped_behind_the_step_and_not_only_at_the_batchs_end() -> None:
    class Counting(Adversarial):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            copies.append(len(callback._steps._before))

    copies: list[int] = []
    callback = watcher()
    fit(Counting(), callback)
    assert copies == [0, 0, 0, 0]


def test_several_of_them_look_at_the_same_step() -> None:
    callbacks = [watcher(), watcher(name="second"), watcher(name="third", every_n_steps=2)]
    fit(Regression(), *callbacks, Sharpness(every_n_steps=2))
    assert [steps(callback) for callback in callbacks] == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 2]]
    assert series(callbacks[0], "optimizer/update_norm") == series(callbacks[1], "second/update_norm")


class Unhooked(torch.optim.SGD):
    """Takes its steps where PyTorch does not see them."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.step = self.unseen

    def unseen(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.sub_(0.1 * p.grad)
        return loss


def test_an_optimizer_that_runs_no_hooks_is_told_of_once() -> None:
    callback = watcher()
    message = "Unhooked took no step in 10 batches, or takes it without the hooks of torch.optim.Optimizer"
    with pytest.warns(UserWarning, match=message) as warned:
        fit(Regression(Unhooked), callback, max_epochs=5)
    assert len(complaints(warned)) == 1
    assert callback.history == []


# ---- Nothing stays


def hooks_of(optimizer: torch.optim.Optimizer) -> int:
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


class Peeking(pl.Callback):
    """Counts hooks and copies where a measurement is due and where it is not."""

    def __init__(self, callback: OptimizerState) -> None:
        self.callback = callback
        self.hooks: list[int] = []
        self.copies: list[int] = []

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self.copies.append(len(self.callback._steps._before))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.hooks.append(hooks_of(trainer.optimizers[0]))
        self.copies.append(len(self.callback._steps._before))


def test_copies_and_hooks_are_there_only_while_a_step_is_looked_at() -> None:
    callback = watcher(every_n_steps=3)
    peeking = Peeking(callback)
    fit(Regression(), callback, peeking)
    assert peeking.hooks == [0, 0, 0, 0]
    assert peeking.copies == [4, 0, 0, 0, 0, 0, 4, 0]


@pytest.mark.parametrize("where", ["training_step", "on_before_optimizer_step", "on_train_batch_end"])
def test_an_exception_of_training_leaves_no_hook_and_no_copy(where: str) -> None:
    class PlantedError(Exception):
        pass

    def fail(self: Any, *_: Any) -> None:
        raise PlantedError

    made: list[torch.optim.Optimizer] = []

    def make(parameters: Any) -> torch.optim.Optimizer:
        made.append(torch.optim.SGD(parameters, lr=0.1))
        return made[0]

    kind = type("Failing", (Regression,), {where: fail})
    callback = watcher()
    with pytest.raises(PlantedError):
        fit(kind(make), callback)
    assert hooks_of(made[0]) == 0
    assert callback._steps._before == {}


def test_no_copy_outlives_the_fit() -> None:
    copies: list[weakref.ref[Tensor]] = []

    class Noting(OptimizerState):
        def _read(self, before: Any) -> Any:
            copies.extend(weakref.ref(copy) for copy in before.values())
            return super()._read(before)

    callback = Noting(every_n_steps=1, on_error="raise")
    fit(Regression(), callback)
    gc.collect()
    assert len(copies) == 16
    assert not [copy for copy in copies if copy() is not None]


def test_a_failure_in_a_hook_ends_the_diagnostic_and_not_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("planted.")

    torch.manual_seed(0)
    plain = Regression()
    fit(plain)
    monkeypatch.setattr("spectral_callbacks.callbacks.optimizer_state.update_products", fail)
    torch.manual_seed(0)
    measured, callback = Regression(), watcher(on_error="warn")
    with pytest.warns(UserWarning, match="planted. Training goes on without this diagnostic"):
        fit(measured, callback)
    assert torch.equal(flat(plain.parameters()), flat(measured.parameters()))
    assert series(callback, "optimizer/status") == [Status.BREAKDOWN]
    assert hooks_of(measured.trainer.optimizers[0]) == 0


def test_the_time_in_the_hooks_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def clock(trainer: pl.Trainer) -> float:
        now[0] += 1000.0
        return now[0]

    monkeypatch.setattr("spectral_callbacks.callbacks.optimizer_state.clock", clock)
    callback = watcher(every_n_steps=None)
    fit(Regression(), callback)
    assert steps(callback) == [0], "the budget is spent at once"
    assert callback._conductor is not None
    assert 2000 <= callback._conductor._budget.spent < 2060, "the copy, and the comparison"


# ---- What an optimizer tells


class Telling(ObservableOptimizer):
    """Plain descent, which tells the entries it has just subtracted and how many they are."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(group["lr"] * p.grad)
                    if self._observations is not None:
                        self._observations[p] = {"moved": p.grad.clone(), "size": torch.tensor(float(p.numel()))}
        return loss

    def diagnostics(self, parameter: Tensor) -> dict[str, Tensor]:
        return dict(self.observations(parameter))


def test_what_it_tells_is_logged_by_name() -> None:
    torch.manual_seed(0)
    callback = watcher(per_layer=True)
    net = Regression(Telling)
    fit(net, callback)
    last, entries = callback.history[-1], flat(p.grad for p in net.parameters() if p.grad is not None)
    assert last["optimizer/size"] == (12 + 4 + 8 + 2) / 4, "one value a parameter: the mean over parameters"
    assert last["optimizer/moved"] == pytest.approx(entries.mean().item(), rel=1e-5)
    for percent in (5, 50, 95):
        expected = torch.quantile(entries, percent / 100).item()
        assert last[f"optimizer/moved_q{percent:02d}"] == pytest.approx(expected, rel=1e-5)
    assert last["optimizer/size/net.2"] == 5
    own = flat(p.grad for p in net.net[2].parameters() if p.grad is not None)
    assert last["optimizer/moved/net.2"] == pytest.approx(own.mean().item(), rel=1e-5)
    spectrum = last["optimizer/moved_entries"]
    assert isinstance(spectrum, Spectrum)
    assert spectrum.num_eigenvalues == 26
    assert spectrum.values.min() >= entries.min()
    assert spectrum.values.max() <= entries.max()


def test_what_is_told_is_known_at_the_very_first_look() -> None:
    callback = watcher(every_n_steps=100)
    net = Regression(Telling)
    fit(net, callback)
    assert "optimizer/moved" in callback.history[0]


def test_a_probe_alone_hears_what_the_last_step_left() -> None:
    heard: list[dict[str, Any]] = []

    class Probing(Sharpness):
        def measure(self, probe: Any) -> Any:
            heard.append(dict(watcher().measure(probe)))
            return {}

    fit(Regression(Telling), watcher(), Probing(every_n_steps=2))
    assert "optimizer/moved" not in heard[0]
    assert "optimizer/moved_q50" in heard[1]
    assert "optimizer/update_norm" not in heard[1]


def test_the_histogram_reaches_tensorboard(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    fit(Regression(Telling), watcher(), logger=logger)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir, size_guidance={HISTOGRAMS: 0}).Reload()
    assert [event.step for event in events.Histograms("optimizer/moved_entries")] == [0, 1, 2, 3]
    assert len(events.Scalars("optimizer/moved_q95")) == 4


def test_quantiles_of_many_entries_are_those_of_a_million_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [torch.linspace(0, 1, 30_000), torch.linspace(1, 2, 10_000)]
    told = SelfReport("x", values, ["a", "b"])
    exact = {tag: value for tag, value in told.readings("x", seed=0, linear_below=1e-3).items() if "_q" in tag}
    monkeypatch.setattr("spectral_callbacks.callbacks.self_report._MOST_ENTRIES", 4000)
    drawn = told.readings("x", seed=0, linear_below=1e-3)
    assert len(told.entries(0)) == 4000
    assert drawn["x"] == pytest.approx((0.5 * 3 + 1.5) / 4), "the mean is over all"
    for tag, value in exact.items():
        assert value != drawn[tag]
        assert isinstance(value, float)
        assert value == pytest.approx(drawn[tag], abs=4 * math.sqrt(0.25 / 4000) * 4 / 3)
    assert drawn["x_q50"] == told.readings("x", seed=0, linear_below=1e-3)["x_q50"]


# ---- diffGrad's friction


def test_a_friction_of_one_half_is_told_of_once() -> None:
    callback = watcher()
    with pytest.warns(UserWarning, match="so this is Adam at half the learning rate") as warned:
        fit(Regression(lambda p: DiffGrad(p, lr=1e-4)), callback, max_epochs=3, data=loader(32, 32))
    assert len(complaints(warned)) == 1
    assert 0.5 <= callback.history[-1]["optimizer/friction"] <= 0.505
    assert callback.history[-1]["optimizer/friction_q05"] >= 0.5


def test_a_friction_that_acts_is_not_told_of() -> None:
    class Steep(Regression):
        def loss(self, batch: Any) -> Tensor:
            return 1000 * super().loss(batch)

    callback = watcher()
    fit(Steep(lambda p: DiffGrad(p, lr=1e-2)), callback)
    assert callback.history[0]["optimizer/friction"] > 0.6


# ---- Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"linear_below": 0.0}, "linear_below=0.0 must be a positive"),
        ({"every_n_steps": 0}, "every_n_steps=0 must be a positive whole number"),
        ({"optimizer": -1}, "optimizer=-1 must be the index"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerState(**options)


def test_an_optimizer_that_is_not_there_is_refused_with_the_number_there_are() -> None:
    callback = watcher(optimizer=3, on_error="warn")
    with pytest.warns(UserWarning, match="optimizer=3, but the module configures 1"):
        fit(Regression(), callback)


def test_a_step_below_the_precision_of_the_weights_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """Weights near 1 in bfloat16, where a step of 1e-5 is rounded off."""

    class Tiny(Regression):
        def __init__(self) -> None:
            super().__init__(sgd(1e-5))
            with torch.no_grad():
                for p in self.parameters():
                    p.fill_(1.0)
            self.bfloat16()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return (self.net(x.bfloat16()) - y.bfloat16()).square().mean() * 1e-3

    callback = watcher()
    with pytest.warns(UserWarning, match="a step moved no weight"):
        fit(Tiny(), callback)
    assert series(callback, "optimizer/update_norm") == [0.0] * len(callback.history)

"""Looks at training's own backward pass: the numbers of a probe, and a training that has noticed nothing."""

from __future__ import annotations

import copy
import gc
import itertools
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from spectral_callbacks.callbacks import GradientCovariance, HessianSpectrum, Sharpness, SpectralCallback, schedule
from spectral_callbacks.callbacks.gram_rider import GramRider
from spectral_callbacks.callbacks.passengers import Passengers
from spectral_callbacks.callbacks.probing import Probes
from spectral_callbacks.callbacks.reading import Spectrum
from spectral_callbacks.linalg import Eigenpairs, Status
from spectral_callbacks.operators import GramRide, SampleGram
from spectral_callbacks.probe import Probe
from tests.callbacks.runs import (
    Regression,
    complaints,
    fit,
    loader,
    plain_loss,
    samples,
    series,
    steps,
)
from tests.callbacks.separate import Rideable, RideableDense
from tests.contracts.networks import images
from tests.contracts.training import record


def rider(**options: Any) -> GradientCovariance:
    return GradientCovariance(**{"ride": True, "every_n_steps": 1, "on_error": "raise", **options})


def signs(batch: Any) -> Tensor:
    return (batch[1][:, 0] > 0).long()


class Offering(SpectralCallback):
    """Hands on eigenvectors of its own."""

    diagnostic = "offering"
    shares_eigenpairs = True

    def __init__(self, vectors: Tensor) -> None:
        super().__init__(every_n_steps=1, on_error="raise")
        k = vectors.shape[1]
        self.pairs = Eigenpairs(torch.ones(k), vectors, torch.zeros(k), Status.CONVERGED, 1)

    def measure(self, probe: Probe) -> dict[str, float]:
        probe.share_eigenpairs(self.pairs)
        return {}


def numbers(entry: dict[str, Any]) -> dict[str, Any]:
    """What was found, comparable, without what it cost."""
    return {
        tag: reading.values.tolist() if isinstance(reading, Spectrum) else reading
        for tag, reading in entry.items()
        if not tag.startswith("cost/")
    }


@pytest.fixture
def rides(monkeypatch: pytest.MonkeyPatch) -> list[GramRide]:
    """All rides that are begun."""
    begun: list[GramRide] = []

    class Noted(GramRide):
        has_brought = False

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            assert self._handles, "a ride without hooks sees nothing"
            begun.append(self)

        def conclude(self, scale: float) -> SampleGram | None:
            found = super().conclude(scale)
            self.has_brought = found is not None
            return found

    monkeypatch.setattr("spectral_callbacks.callbacks.gram_rider.GramRide", Noted)
    return begun


@pytest.fixture
def by_rides(rides: list[GramRide]) -> Iterator[None]:
    """Whatever is found is found by rides: some took place, and none was in vain."""
    yield
    assert rides
    assert all(vars(ride).get("has_brought") for ride in rides)


def has_hooks(ride: GramRide) -> bool:
    return bool(ride._handles)


def in_training(module: pl.LightningModule) -> bool:
    """Whether the module is not run by a probe, which mutes it."""
    return "log" not in module.__dict__


# ---- Training is bit-identical


class Scaled(MixedPrecision):
    """Autocast to float16 on the CPU, with a scaler of gradients: made anew for every run."""

    def __init__(self, factor: float = 2.0**16) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=factor))


def assert_undisturbed(
    tmp_path: Path, make_module: Callable[[], pl.LightningModule] = Rideable, **options: Any
) -> GradientCovariance:
    callback = rider(per_layer=True, labels=1)
    more: dict[str, Any] = {"plugins": [Scaled()]} if options.pop("scaled", False) else {}
    plain = record(tmp_path, make_module, lambda: images(shuffle=True), **copy.deepcopy(more), **options)
    measured = record(
        tmp_path, make_module, lambda: images(shuffle=True), [callback],
        own_tags=lambda tag: "/" in tag, **copy.deepcopy(more), **options,
    )  # fmt: skip
    assert plain.differences(measured) == set()
    assert callback.history
    assert all("gradient/covariance_trace" in entry for entry in callback.history)
    assert all("gradient/within_class_trace" in entry for entry in callback.history)
    assert not callback.silenced
    return callback


RUNS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"precision": "bf16-mixed"},
    "accumulation": {"accumulate_grad_batches": 3},
    "clipping": {"gradient_clip_val": 0.1},
    "anomaly detection": {"detect_anomaly": True},
    "deterministic algorithms": {"deterministic": True},
}


@pytest.mark.usefixtures("by_rides")
@pytest.mark.parametrize("run", RUNS)
def test_training_is_bit_identical_with_a_ride(tmp_path: Path, run: str, rides: list[GramRide]) -> None:
    callback = assert_undisturbed(tmp_path, **RUNS[run])
    assert len(rides) == len(callback.history) == (4 if run == "accumulation" else 8)


@pytest.mark.usefixtures("by_rides")
def test_training_is_bit_identical_with_a_ride_and_an_adaptive_optimizer(tmp_path: Path) -> None:
    assert_undisturbed(tmp_path, lambda: Rideable("AdamW"))


@pytest.mark.usefixtures("by_rides")
def test_training_is_bit_identical_with_a_ride_under_a_gradient_scaler(tmp_path: Path) -> None:
    assert_undisturbed(tmp_path, RideableDense, scaled=True)


# ---- The numbers are those of a probe


def both(module: Regression | None = None, **options: Any) -> tuple[GradientCovariance, GradientCovariance]:
    torch.manual_seed(0)
    probed = GradientCovariance(
        data="current", every_n_steps=1, name="probed", per_layer=True, on_error="raise",
        precision=options.pop("measured_in", "full"),
    )  # fmt: skip
    ridden = rider(per_layer=True)
    fit(Regression() if module is None else module, probed, ridden, **options)
    return ridden, probed


def assert_equal(ridden: GradientCovariance, probed: GradientCovariance, rel: float) -> None:
    assert steps(ridden) == steps(probed)
    for ours, theirs in zip(map(numbers, ridden.history), map(numbers, probed.history), strict=True):
        assert {tag.partition("/")[2] for tag in ours} == {tag.partition("/")[2] for tag in theirs}
        for tag, value in ours.items():
            expected = theirs[tag.replace("gradient/", "probed/")]
            assert value == pytest.approx(expected, rel=rel, abs=1e-6), tag


@pytest.mark.usefixtures("by_rides")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"data": loader(30, 8)},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 1e-3},
        {"callbacks_scheduling": {0: 1, 1: 2}, "max_epochs": 2},
    ],
    ids=["plain", "a short last batch", "accumulation", "clipping", "accumulation by a schedule"],
)
def test_a_ride_and_a_probe_of_the_same_batch_find_the_same(options: dict[str, Any]) -> None:
    options = dict(options)
    scheduling = options.pop("callbacks_scheduling", None)
    if scheduling is None:
        ridden, probed = both(**options)
    else:
        torch.manual_seed(0)
        probed = GradientCovariance(data="current", every_n_steps=1, name="probed", per_layer=True, on_error="raise")
        ridden = rider(per_layer=True)
        fit(Regression(), probed, ridden, GradientAccumulationScheduler(scheduling), **options)
    assert_equal(ridden, probed, rel=1e-4)
    assert "gradient/noise_scale_low" in ridden.history[0]


@pytest.mark.usefixtures("by_rides")
def test_a_ride_under_a_gradient_scaler_finds_what_a_probe_does() -> None:
    ridden, probed = both(plugins=[Scaled()], measured_in="training", accumulate_grad_batches=2)
    for tag in ("covariance_trace", "covariance_lambda_max", "norm"):
        assert series(ridden, f"gradient/{tag}") == pytest.approx(series(probed, f"probed/{tag}"), rel=2e-2)


@pytest.mark.usefixtures("by_rides")
def test_a_ride_under_bfloat16_finds_what_a_probe_does() -> None:
    ridden, probed = both(precision="bf16-mixed", measured_in="training")
    for tag in ("covariance_trace", "covariance_lambda_max", "norm"):
        assert series(ridden, f"gradient/{tag}") == pytest.approx(series(probed, f"probed/{tag}"), rel=5e-2)


@pytest.mark.usefixtures("by_rides")
def test_the_same_seeds_give_the_same_numbers() -> None:
    histories = []
    for _ in range(2):
        torch.manual_seed(0)
        callback = rider(per_layer=True)
        fit(Regression(), callback, max_epochs=2)
        histories.append(list(map(numbers, callback.history)))
    assert histories[0] == histories[1]


@pytest.mark.usefixtures("by_rides")
def test_a_ride_looks_at_the_first_samples_alone() -> None:
    torch.manual_seed(0)
    probed = GradientCovariance(5, data="current", every_n_steps=1, name="probed", on_error="raise")
    ridden = rider(num_samples=5)
    fit(Regression(), probed, ridden)
    assert series(ridden, "gradient/num_samples") == [5] * 4
    assert_equal(ridden, probed, rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*left out:UserWarning")
@pytest.mark.parametrize("other", [lambda: Sharpness(3, every_n_steps=2), lambda: HessianSpectrum(3, every_n_steps=2)])
@pytest.mark.parametrize("comes_first", [True, False])
@pytest.mark.usefixtures("by_rides")
def test_a_ride_takes_the_eigenvectors_that_a_probe_found_at_its_step(other: Any, comes_first: bool) -> None:
    torch.manual_seed(0)
    ridden, shares = rider(), other()
    fit(Regression(), *((shares, ridden) if comes_first else (ridden, shares)))
    assert [entry["step"] for entry in ridden.history if "gradient/hessian_overlap" in entry] == [0, 2]
    assert ridden.history[0]["gradient/top_subspace_share_null"] == pytest.approx(3 / 26)
    assert 0 < ridden.history[0]["gradient/hessian_overlap"] <= 1


# ---- Hooks alone


@pytest.mark.usefixtures("by_rides")
def test_the_training_step_runs_again_only_before_the_first_ride() -> None:
    class Counting(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            calls.append("log" in self.__dict__)
            return super().training_step(batch, batch_idx)

    calls: list[bool] = []
    callback = rider()
    fit(Counting(), callback, max_epochs=3)
    assert len(callback.history) == 12
    first = calls.index(False)
    assert first > 0, "the samples are told apart by an experiment"
    assert calls[first:] == [False] * 12


@pytest.mark.usefixtures("by_rides")
def test_a_ride_sees_no_product_and_no_second_pass() -> None:
    calls = []
    original = torch.autograd.grad

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(callback.history))
        return original(*args, **kwargs)

    callback = rider()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", counted)
        fit(Regression(), callback)
    assert len(callback.history) == 4
    assert set(calls) == {0}, "the experiment alone"


def test_each_backward_pass_is_ridden_on_only_where_it_is_due(rides: list[GramRide]) -> None:
    callback = rider(every_n_steps=3)
    fit(Regression(), callback, max_epochs=2)
    assert steps(callback) == [0, 3, 6]
    assert len(rides) == 3


@pytest.mark.usefixtures("by_rides")
def test_the_readings_are_logged_at_the_step_of_the_others() -> None:
    ridden, sharpness = rider(every_n_steps=2), Sharpness(every_n_steps=2)
    trainer = fit(Regression(), ridden, sharpness, accumulate_grad_batches=2)
    assert steps(ridden) == steps(sharpness)
    assert trainer.callback_metrics["gradient/norm"] == pytest.approx(ridden.history[-1]["gradient/norm"])


# ---- Hooks are gone


def test_hooks_that_stay_are_found(monkeypatch: pytest.MonkeyPatch, rides: list[GramRide]) -> None:
    """The check of the tests below can fail."""
    monkeypatch.setattr(GramRide, "remove", lambda self: None)
    fit(Regression(), rider())
    assert len(rides) == 4
    assert all(map(has_hooks, rides))


def test_hooks_are_gone_when_the_run_ends(rides: list[GramRide]) -> None:
    callback = rider()
    fit(Regression(), callback)
    assert len(rides) == 4
    assert not any(map(has_hooks, rides))


class PlantedError(RuntimeError): ...


class Crash(Regression):
    """Fails at step 2, at a place that it is told."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place

    def crash(self, place: str) -> None:
        if self.place == place and self.global_step == 2 and in_training(self):
            raise PlantedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.crash("training_step")
        loss = self.loss(batch)
        if self.place == "backward" and self.global_step == 2 and in_training(self):
            loss.register_hook(lambda gradient: self.crash("backward"))
        return loss

    def on_before_backward(self, loss: Tensor) -> None:
        self.crash("before backward")

    def on_after_backward(self) -> None:
        self.crash("after backward")

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.crash("optimizer_step")
        super().optimizer_step(*args, **kwargs)
        self.crash("behind the optimizer")


PLACES = [
    "training_step", "before backward", "backward", "after backward", "optimizer_step", "behind the optimizer",
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_hooks_are_gone_after_an_exception(place: str, rides: list[GramRide]) -> None:
    callback = rider()
    with pytest.raises(PlantedError):
        fit(Crash(place), callback)
    assert len(rides) == (2 if place in ("training_step", "optimizer_step") else 3)
    assert not any(map(has_hooks, rides))
    assert isinstance(callback.rider, GramRider)
    assert callback.rider._ride is None
    assert callback.rider._seeded is None


def test_a_run_leaves_no_graph_behind(rides: list[GramRide]) -> None:
    graphs: list[weakref.ref[Any]] = []

    class Noting(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self.loss(batch)
            graphs.append(weakref.ref(loss))
            return loss

    callback = rider()
    fit(Noting(), callback)
    rides.clear()
    gc.collect()
    assert [graph for graph in graphs if graph() is not None] == []


# ---- What cannot be ridden on


class Recurrent(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(3, 4, batch_first=True)
        self.last = nn.Linear(4, 2)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (self.last(self.cell(x[:, None])[0][:, 0]) - y).square().mean()


def test_a_network_that_cannot_be_ridden_on_is_probed_instead_and_that_is_said_once(rides: list[GramRide]) -> None:
    torch.manual_seed(0)
    probed = GradientCovariance(data="current", every_n_steps=1, name="probed", on_error="raise")
    callback = rider()
    with pytest.warns(UserWarning, match=r"cannot be read off training's own backward pass: cell\.weight") as warned:
        fit(Recurrent(), probed, callback)
    assert len(complaints(warned)) == 1
    assert rides == []
    assert_equal(callback, probed, rel=1e-5)


class Alternating(Regression):
    """Takes another way through the network at every other step."""

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        z = self.net(x)
        if self.global_step % 2:
            z = z + torch.nn.functional.linear(x, next(self.net.parameters())[:2])
        return (z - y).square().mean()


@pytest.mark.parametrize("every", [1, 3])
def test_a_batch_that_goes_another_way_leaves_the_look_to_the_next(every: int) -> None:
    callback = rider(every_n_steps=every)
    with pytest.warns(UserWarning, match="other operations than those before it; the look is taken on the") as warned:
        fit(Alternating(), callback, max_epochs=2)
    assert len(complaints(warned)) == 1
    assert steps(callback) == ([0, 2, 4, 6] if every == 1 else [0, 4, 6])
    assert not callback.silenced


class Checkpointed(Regression):
    """Runs its network again in the backward pass."""

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (checkpoint(self.net, x, use_reentrant=False) - y).square().mean()


class Compiled(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.compiled = torch.compile(self.net, backend="aot_eager")

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (self.compiled(x) - y).square().mean()


@pytest.mark.parametrize("kind", [Checkpointed, pytest.param(Compiled, marks=pytest.mark.slow)])
def test_where_training_goes_another_way_than_a_probe_it_is_probed_from_the_next_step_on(
    kind: type[Regression], rides: list[GramRide]
) -> None:
    torch.compiler.reset()
    callback = rider(every_n_steps=3)
    with pytest.warns(UserWarning, match="as it does with a compiled network or checkpointed activations") as warned:
        fit(kind(), callback, max_epochs=2)
    assert len(complaints(warned)) == 1
    assert steps(callback) == [1, 3, 6]
    assert all("gradient/covariance_trace" in entry for entry in callback.history)
    assert rides == []


class Doubling(Regression):
    """Differentiates twice its loss, which no hook of Lightning's is told."""

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        (2 * loss).backward()


@pytest.mark.usefixtures("by_rides")
def test_a_factor_of_the_modules_own_is_not_one_of_the_samples_gradients() -> None:
    ridden, probed = both(Doubling())
    assert_equal(ridden, probed, rel=1e-5)


@pytest.mark.usefixtures("by_rides")
def test_a_batch_of_one_sample_is_none_to_ride_on() -> None:
    callback = rider()
    with pytest.warns(UserWarning, match="a batch of a single sample has no covariance"):
        fit(Regression(), callback, data=loader(17, 8))
    assert series(callback, "gradient/num_samples") == [8, 8, 1]


def test_a_loss_that_sums_is_refused_before_the_first_ride(rides: list[GramRide]) -> None:
    class Summed(Regression):
        def loss(self, batch: Any) -> Tensor:
            x, y = batch
            return (self.net(x) - y).square().sum()

    callback = rider(on_error="warn")
    with pytest.warns(UserWarning, match="the loss of a batch is not the mean over its samples") as warned:
        fit(Summed(), callback)
    assert len(complaints(warned)) == 1
    assert rides == []
    assert series(callback, "gradient/status") == [Status.BREAKDOWN]


def test_a_failure_in_a_hook_is_said_once_and_training_is_unharmed(
    monkeypatch: pytest.MonkeyPatch, rides: list[GramRide]
) -> None:
    def train(*callbacks: pl.Callback) -> Regression:
        torch.manual_seed(0)
        module = Regression()
        fit(module, *callbacks)
        return module

    plain = train()
    original, count = GramRide._see, itertools.count()

    def failing(self: GramRide, index: Any, gradient: Tensor) -> None:
        if next(count) == 5:
            self._guarded(fail)
        original(self, index, gradient)

    def fail() -> None:
        raise PlantedError("planted")

    monkeypatch.setattr(GramRide, "_see", failing)
    callback = rider(on_error="warn")
    with pytest.warns(
        UserWarning, match="the ride on training's backward pass ended early: PlantedError: planted"
    ) as warned:
        module = train(callback)
    assert len(complaints(warned)) == 1
    assert callback.silenced
    assert not any(map(has_hooks, rides))
    assert callback.history[-1]["gradient/status"] == Status.BREAKDOWN
    for p, q in zip(plain.parameters(), module.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_loss_that_cannot_be_hooked_on_to_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(GramRide):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise PlantedError("planted")

    monkeypatch.setattr("spectral_callbacks.callbacks.gram_rider.GramRide", Failing)
    callback = rider(on_error="warn")
    with pytest.warns(UserWarning, match="planted Training goes on without this diagnostic") as warned:
        fit(Regression(), callback)
    assert len(complaints(warned)) == 1
    assert callback.silenced


class Silent(Regression):
    """Has no loss for its first batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        return None if batch_idx == 0 and in_training(self) else loss


@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`:UserWarning")
def test_a_step_without_a_backward_pass_leaves_the_look_to_the_next(rides: list[GramRide]) -> None:
    callback = rider(every_n_steps=100)
    fit(Silent(), callback)
    assert steps(callback) == [1]
    assert "gradient/covariance_trace" in callback.history[0]
    assert len(rides) == 1


# ---- Other parameters than before


class Unfreezing(pl.Callback):
    """Trains the first layer too, or no more, from some step on."""

    def __init__(self, at: int, *, is_frozen: bool = False) -> None:
        self.at = at
        self.is_frozen = is_frozen

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.at:
            first = pl_module.get_submodule("net.0").requires_grad_(not self.is_frozen)
            if not self.is_frozen:
                trainer.optimizers[0].add_param_group({"params": list(first.parameters())})


class Frozen(Regression):
    """Trains its last layer alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net[2].parameters(), lr=0.1)


def columns(callback: GradientCovariance) -> list[float]:
    """How many parameters each look was over."""
    return [round(1 / entry["gradient/top_subspace_share_null"]) for entry in callback.history]


@pytest.mark.usefixtures("by_rides")
@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_ride_is_over_the_parameters_that_are_trained_now(is_frozen: bool, rides: list[GramRide]) -> None:
    torch.manual_seed(0)
    ridden = rider(per_layer=True)
    probed = GradientCovariance(every_n_steps=1, data="current", name="probed", per_layer=True, on_error="raise")
    shares = Sharpness(1, every_n_steps=1, data="current", rtol=1e-4)
    module = Regression() if is_frozen else Frozen()
    fit(module, Unfreezing(2, is_frozen=is_frozen), probed, ridden, shares)
    assert columns(ridden) == ([26, 26, 10, 10] if is_frozen else [10, 10, 26, 26])
    assert_equal(ridden, probed, rel=1e-4)
    assert len(rides) == 4, "no look is lost"


@pytest.mark.filterwarnings("ignore:.*the learning rates:UserWarning")
def test_parameters_that_change_behind_the_start_of_a_batch_leave_the_look_to_the_next(rides: list[GramRide]) -> None:
    torch.manual_seed(0)
    ridden = rider(ema=0.0, per_layer=True)
    probed = GradientCovariance(
        every_n_steps=1, data="current", name="probed", ema=0.0, per_layer=True, on_error="raise"
    )
    with pytest.warns(UserWarning, match="the parameters that are trained changed while a batch ran"):
        fit(Frozen(), probed, ridden, Unfreezing(1))
    assert steps(ridden) == [0, 2, 3]
    assert len(rides) == 3
    del probed.history[1]
    assert_equal(ridden, probed, rel=1e-4)


def test_eigenvectors_of_other_parameters_are_not_taken(rides: list[GramRide]) -> None:
    others, own = rider(), rider()
    fit(Regression(), others, Offering(torch.eye(25)[:, :2]))
    fit(Regression(), own, Offering(torch.eye(26)[:, :2]))
    assert len(rides) == len(others.history) + len(own.history) == 8
    assert columns(own) == [13] * 4
    assert not [tag for entry in others.history for tag in entry if "subspace" in tag or "hessian" in tag]


# ---- Batches that change


class Emptying(pl.LightningModule):
    """Does with its batch, a dict, what it likes."""

    def __init__(self, change: Callable[[Any], Any]) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.change = change

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, classes = self.change(batch)
        return (self.net(x) - y).square().mean() + 0 * classes.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def kept(batch: Any) -> Any:
    return batch["x"], batch["y"], batch["class"]


def popped(batch: Any) -> Any:
    return [batch.pop(key) for key in ("x", "y", "class")]


def cleared(batch: Any) -> Any:
    found = kept(batch)
    batch.clear()
    return found


def mixed(batch: Any) -> Any:
    """Writes over the classes, as mixup does."""
    found = batch["x"], batch["y"], batch["class"].clone()
    batch["class"].fill_(0)
    return found


def classes_in_dicts() -> DataLoader[Any]:
    batches = [{"x": x, "y": y, "class": (y[:, 0] > 0).long()} for x, y in loader()]
    return DataLoader(batches, batch_size=None)  # pyright: ignore[reportArgumentType]


@pytest.mark.usefixtures("by_rides")
@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`:UserWarning")
@pytest.mark.parametrize("change", [popped, cleared, mixed])
def test_a_batch_that_the_training_step_changes_is_seen_as_it_came(change: Callable[[Any], Any]) -> None:
    histories = []
    for how in (kept, change):
        torch.manual_seed(0)
        callback = rider(labels="class")
        fit(Emptying(how), callback, data=classes_in_dicts())
        assert len(callback.history) == 4
        histories.append(list(map(numbers, callback.history)))
    assert "gradient/within_class_trace" in histories[0][0]
    assert histories[0] == histories[1]


class Sequences(Regression):
    def loss(self, batch: Any) -> Tensor:
        x, y = batch  # (N, T, 3), (N, 2)
        return (self.net(x).mean(1) - y).square().mean()


def sequences(*lengths: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    batches: Any = [
        (torch.randn(8, T, 3, generator=generator), torch.randn(8, 2, generator=generator)) for T in lengths
    ]
    return DataLoader(batches, batch_size=None)


@pytest.mark.usefixtures("by_rides")
def test_batches_of_known_lengths_are_not_learned_again(monkeypatch: pytest.MonkeyPatch, rides: list[GramRide]) -> None:
    learned: list[int] = []
    original = Probe.sample_structure

    def noting(self: Probe, num_samples: int | None = 64) -> Any:
        learned.append(self.batches[0].batch[0].shape[1])
        return original(self, num_samples)

    monkeypatch.setattr(Probe, "sample_structure", noting)
    torch.manual_seed(0)
    probed = GradientCovariance(data="current", every_n_steps=1, name="probed", on_error="raise")
    ridden = rider()
    fit(Sequences(), probed, ridden, data=sequences(4, 6, 4, 4, 6, 5, 6, 4))
    assert learned == [4, 6, 5]
    assert len(rides) == 8
    assert_equal(ridden, probed, rel=1e-4)


class Zero(Sequences):
    """Its last layer starts at zero, as those of residual branches and adapters do."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.get_parameter("net.2.weight"))


@pytest.mark.parametrize("every", [1, 2])
def test_what_is_known_of_the_first_weights_alone_is_learned_again(every: int, rides: list[GramRide]) -> None:
    torch.manual_seed(0)
    ridden = rider(every_n_steps=every, per_layer=True)
    probed = GradientCovariance(every_n_steps=every, data="current", name="probed", per_layer=True, on_error="raise")
    fit(Zero(), probed, ridden, data=sequences(4, 4, 4, 4))
    assert_equal(ridden, probed, rel=1e-4)
    assert len(rides) == len(ridden.history) - 1, "the first look is taken on a probe, and no other"


def test_a_look_that_a_budget_has_paid_for_is_not_lost(monkeypatch: pytest.MonkeyPatch, rides: list[GramRide]) -> None:
    answers = itertools.chain([True, True], itertools.repeat(False))
    monkeypatch.setattr(schedule.Budget, "affords", lambda *_: next(answers))
    callback = rider(every_n_steps=None)
    with pytest.warns(UserWarning, match="the look is taken on the next"):
        fit(Alternating(), callback)
    assert steps(callback) == [0, 2]
    assert len(rides) == 2


@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`:UserWarning")
def test_a_batch_without_a_loss_among_those_accumulated_is_not_taken_for_the_next(rides: list[GramRide]) -> None:
    torch.manual_seed(0)
    probed = GradientCovariance(data="current", every_n_steps=1, name="probed", labels=signs, ema=0.0, on_error="raise")
    ridden = rider(labels=signs, ema=0.0)
    data = DataLoader(samples(), batch_sampler=[list(range(8)), list(range(8, 12)), *[list(range(12, 20))] * 2])
    fit(Silent(), probed, ridden, data=data, accumulate_grad_batches=2)
    assert steps(probed) == [0, 1]
    assert steps(ridden) == [1], "the second of those that are accumulated is none that a look is taken at"
    assert len(rides) == 1
    del probed.history[0]
    assert_equal(ridden, probed, rel=1e-4)


# ---- A gradient scaler


def test_an_overflow_under_a_scaler_is_no_fault_of_the_network(rides: list[GramRide]) -> None:
    callback = rider()
    with pytest.warns(UserWarning, match=r"overflowed under the factor of GradScaler, .* taken on the next") as warned:
        fit(Regression(), callback, plugins=[Scaled(2.0**24)], max_epochs=5)
    assert len(complaints(warned)) == 1
    lost = 20 - len(callback.history)
    assert lost > 0
    assert steps(callback) == list(range(lost, 20)), "each look is owed until the factor is low enough"
    assert series(callback, "gradient/status") == [Status.CONVERGED] * (20 - lost)
    assert len(rides) == 20


def test_a_loss_that_is_not_finite_shows_under_a_scaler_too() -> None:
    class Broken(Regression):
        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch) * (torch.nan if in_training(self) else 1.0)

    callback = rider()
    with pytest.warns(UserWarning, match="not finite"):
        fit(Broken(), callback, plugins=[Scaled()])
    assert series(callback, "gradient/status") == [Status.NONFINITE] * 4


def test_gradients_that_are_not_finite_without_a_factor_show_under_a_scaler_too() -> None:
    class Broken(Regression):
        def loss(self, batch: Any) -> Tensor:
            x, y = batch
            z = self.net(x)
            if in_training(self):
                z.register_hook(lambda gradient: gradient * torch.inf)
            return (z - y).square().mean()

    callback = rider()
    with pytest.warns(UserWarning, match=r"not finite|overflowed under the factor") as warned:
        fit(Broken(), callback, plugins=[Scaled(4.0)])
    assert len(complaints(warned)) == 2
    assert steps(callback) == [2, 3], "from a factor of 1 on it is not the scaler"
    assert series(callback, "gradient/status") == [Status.NONFINITE] * 2


# ---- Several riders


@pytest.mark.parametrize("fails", ["_look_at", "_classes"])
def test_where_the_first_of_two_fails_the_other_gets_off_too(
    monkeypatch: pytest.MonkeyPatch, rides: list[GramRide], fails: str
) -> None:
    first, second = rider(name="first"), rider(name="second")

    def fail(*_: Any) -> None:
        raise PlantedError

    monkeypatch.setattr(first, fails, fail)
    with pytest.raises(PlantedError):
        fit(Regression(), *((first, second) if fails == "_look_at" else (second, first)))
    assert len(rides) == (2 if fails == "_look_at" else 0)
    assert not any(map(has_hooks, rides))
    for callback in (first, second):
        assert isinstance(callback.rider, GramRider)
        assert callback.rider._ride is None
        assert callback.rider._seeded is None


def test_a_failing_rider_takes_nothing_from_another(monkeypatch: pytest.MonkeyPatch, rides: list[GramRide]) -> None:
    first, second = rider(name="first", on_error="warn"), rider(name="second")

    def fail(*_: Any) -> None:
        raise PlantedError("planted")

    monkeypatch.setattr(first, "_look_at", fail)
    with pytest.warns(UserWarning, match="planted Training goes on without this diagnostic"):
        fit(Regression(), first, second)
    assert len(second.history) == 4
    assert len(rides) == 5


def test_forgetting_takes_the_hooks_away(rides: list[GramRide]) -> None:
    class Forgetting(pl.Callback):
        def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
            callback.forget()
            seen.append(has_hooks(rides[-1]))

    seen: list[bool] = []
    callback = rider(on_error="warn", every_n_steps=100)
    with pytest.warns(UserWarning, match="concluded without a ride on it"):
        fit(Regression(), callback, Forgetting())
    assert len(rides) == 1
    assert seen[0] is False


def test_a_batch_that_cannot_be_counted_ends_the_diagnostic_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(batch: Any) -> int:
        raise PlantedError("planted")

    monkeypatch.setattr("spectral_callbacks.callbacks.gram_rider.num_samples", fail)
    callback = rider(on_error="warn")
    with pytest.warns(UserWarning, match="planted Training goes on without this diagnostic"):
        trainer = fit(Regression(), callback)
    assert trainer.global_step == 4
    assert callback.silenced


# ---- Resuming


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_a_resumed_run_rides_on_as_if_it_had_not_been_cut(tmp_path: Path, rides: list[GramRide]) -> None:
    runs = []
    for epochs, path in ((2, None), (1, None), (2, tmp_path / "cut.ckpt")):
        torch.manual_seed(0)
        callback = rider(ema=0.0, per_layer=True)
        trainer = fit(Regression(), callback, max_epochs=epochs, ckpt_path=None if path is None else str(path))
        if epochs == 1:
            trainer.save_checkpoint(tmp_path / "cut.ckpt")
        runs.append(callback)
    whole, first, second = runs
    assert steps(second) == [4, 5, 6, 7]
    assert len(rides) == 16
    joined = [*first.history, *second.history]
    for ours, theirs in zip(map(numbers, joined), map(numbers, whole.history), strict=True):
        assert ours.keys() == theirs.keys()
        for tag, value in ours.items():
            assert value == pytest.approx(theirs[tag], rel=1e-5), tag


# ---- Cost


@pytest.mark.parametrize("every", [1, None])
def test_what_a_ride_spends_in_hooks_and_behind_them_is_counted(
    monkeypatch: pytest.MonkeyPatch, every: int | None
) -> None:
    original = GramRide.conclude

    def dear(self: GramRide, scale: float) -> SampleGram | None:
        self.seconds += 1000.0
        time.sleep(0.05)
        return original(self, scale)

    monkeypatch.setattr(GramRide, "conclude", dear)
    callback = rider(every_n_steps=every)
    fit(Regression(), callback)
    assert steps(callback) == ([0, 1, 2, 3] if every else [0]), "a budget is spent at once"
    assert callback._conductor is not None
    spent = callback._conductor._budget.spent - 1000.0 * len(callback.history)
    assert 0.05 * len(callback.history) < spent < 60


def test_the_overhead_is_logged_once_a_step(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    ridden, sharpness = rider(every_n_steps=1), Sharpness(every_n_steps=2)
    epochs = Sharpness(every_n_epochs=1, name="epochs")
    fit(Regression(), sharpness, ridden, epochs, logger=logger, max_epochs=2)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir).Reload()
    assert [event.step for event in events.Scalars("cost/overhead")] == list(range(9))
    assert len(events.Scalars("gradient/norm")) == 8


def test_a_ride_beside_a_probe_is_part_of_one_measurement() -> None:
    callback = rider(every_n_steps=None)
    fit(Regression(), Sharpness(), callback, max_steps=1)
    assert callback._conductor is not None
    budget = callback._conductor._budget
    assert len(budget._costs) == 1
    assert budget._is_cold, "no second measurement was taken"


def test_eigenvectors_of_a_search_that_broke_down_are_not_taken() -> None:
    def fail(*_: Any) -> None:
        raise AssertionError

    def pairs(k: int, status: Status) -> Eigenpairs:
        return Eigenpairs(torch.ones(k), torch.eye(4)[:, :k], torch.zeros(k), status, 1)

    held = Passengers(Probes(), schedule.Budget(), fail, set())
    held.offer(pairs(3, Status.CONVERGED))
    assert held._pairs is None, "nobody is aboard that could use them"
    waiting = rider()
    assert waiting.rider is not None
    held._aboard[waiting] = waiting.rider
    for offered in (None, pairs(3, Status.BREAKDOWN), few := pairs(1, Status.BUDGET)):
        held.offer(offered)
    assert held._pairs is few
    held.offer(more := pairs(2, Status.CONVERGED))
    held.offer(few)
    assert held._pairs is more


# ---- Bad input

BAD: list[tuple[dict[str, Any], str]] = [
    ({"loss": plain_loss}, "loss=.* does not go with ride=True, .*: the loss that it differentiates is training's"),
    ({"data": "train"}, "data='train' does not go with ride=True"),
    ({"data": loader()}, "data=<.*> does not go with ride=True"),
    ({"num_batches": 2}, "num_batches=2 does not go with ride=True.*: a backward pass has one batch"),
    ({"mode": "eval"}, "mode='eval' does not go with ride=True"),
    ({"every_n_epochs": 1}, "every_n_epochs=1 does not go with ride=True"),
    ({"hessian": True}, "hessian=True spends products of its own, and ride=True no pass at all"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_what_does_not_go_with_a_ride_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientCovariance(ride=True, **options)


def test_the_defaults_may_be_written_out() -> None:
    callback = GradientCovariance(ride=True, data="fixed", num_batches=1, mode="train", loss=None, every_n_epochs=None)
    assert callback.data == "current"


def test_manual_optimization_is_refused_with_a_way_out() -> None:
    class Manual(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = self.loss(batch)
            self.manual_backward(loss)

    callback = rider(on_error="warn")
    with pytest.warns(UserWarning, match=r"ride=True cannot tell.*Pass ride=False and loss=") as warned:
        fit(Manual(), callback)
    assert len(complaints(warned)) == 1
    assert callback.history == []

"""Callbacks keep to their 5 % of the time, from inside and from outside; isolating costs under a step.

Two real Lightning trainings, `configs/digits_sgd.yaml` and a wide MLP whose step takes 10 ms or more, each run twice
from the same weights: with the default Sharpness() and without. The first runs once more with all callbacks on, where
only what they say themselves is judged: one look of theirs is thousands of these small steps. The two runs live in
one process and take turns of a fixed number of steps, so that both meet the same weather; the clock that the
callback's budget reads stands still while its run waits. From outside, the overhead is the CPU time that turns with
the callback take beyond those without: all of it in turns with a look, the median of it in the others. A run has a
bias of a percent or two, where its memory happens to lie, so three pairs are run and the medians taken. The guard is
`undisturbed` around a loss that does nothing, against a plain training step of the same ResNet-50, a narrow one,
where Python is what costs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import logging
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from _measure import Claims, Timed, median_seconds, options, table, taking_turns
from _problems import digits, images, resnet50, tanh_mlp
from spectral_callbacks import HessianSpectrum, Sharpness, SpectralCallback, TraceStability
from spectral_callbacks.probe import undisturbed

CONFIG = Path(__file__).parents[1] / "configs" / "digits_sgd.yaml"
WITH, WITHOUT = "with", "without"


class Relay:
    """Lets threads run one at a time; `now` is a clock that stands still for whoever waits."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = list(names)
        self._current = names[0]
        self._condition = threading.Condition()
        self._wall = time.perf_counter
        self._waited: dict[int, float] = {}

    def now(self) -> float:
        """Return the seconds on this thread's clock."""
        return self._wall() - self._waited.get(threading.get_ident(), 0.0)

    def wait(self, name: str) -> None:
        """Return when it is this runner's turn."""
        began = self._wall()
        with self._condition:
            self._condition.wait_for(lambda: self._current == name)
        thread = threading.get_ident()
        self._waited[thread] = self._waited.get(thread, 0.0) + self._wall() - began

    def hand_over(self, name: str, *, leave: bool = False) -> None:
        """Give the turn to the next runner, for good with `leave`."""
        with self._condition:
            self._current = self._names[(self._names.index(name) + 1) % len(self._names)]
            if leave:
                self._names.remove(name)
            self._condition.notify_all()

    @contextlib.contextmanager
    def keeps_time(self) -> Iterator[None]:
        """Make this clock everybody's inside."""
        time.perf_counter = self.now
        try:
            yield
        finally:
            time.perf_counter = self._wall


class Turns(pl.Callback):
    """Hands over every so many steps, and notes the CPU time of every turn and the looks so far."""

    def __init__(self, relay: Relay, name: str, num_steps: int, measuring: SpectralCallback) -> None:
        self.seconds: list[float] = []
        self.looks: list[int] = []
        self._measuring = measuring
        self._relay = relay
        self._name = name
        self._num_steps = num_steps
        self._began = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._began = time.process_time()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the turn if its steps are done."""
        if trainer.global_step % self._num_steps == 0:
            self.seconds.append(time.process_time() - self._began)
            self.looks.append(len(self._measuring.history))
            self._relay.hand_over(self._name)
            self._relay.wait(self._name)
            self._began = time.process_time()


@dataclasses.dataclass(frozen=True)
class Training:
    """What is trained: built anew for every run, always the same."""

    name: str
    build: Callable[[], tuple[pl.LightningModule, Any, dict[str, Any]]]  # module, data, options of the trainer
    num_steps: int
    turn: int
    callbacks: Callable[[], Sequence[SpectralCallback]]


@dataclasses.dataclass(frozen=True)
class Overhead:
    """What a pair of runs showed."""

    step: float  # CPU seconds of a step without
    inside: float  # cost/overhead at the end
    looking: float  # share of the time without, spent in turns with a look
    idling: float  # the same in the other turns
    looks: int

    @property
    def outside(self) -> float:
        """Overhead that a stopwatch sees."""
        return self.looking + self.idling


def measure(training: Training, directory: str) -> Overhead:
    """Train with and without the callback in turns."""
    relay = Relay((WITHOUT, WITH))
    measuring = training.callbacks()
    turns = {name: Turns(relay, name, training.turn, measuring[0]) for name in (WITHOUT, WITH)}
    trainers: dict[str, tuple[pl.Trainer, pl.LightningModule, Any]] = {}
    for name in turns:
        module, data, trainer_options = training.build()
        callbacks = [*(measuring if name == WITH else []), turns[name]]
        trainer = pl.Trainer(
            max_epochs=-1, max_steps=training.num_steps, accelerator="cpu", enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, callbacks=callbacks,
            logger=TensorBoardLogger(directory, name, default_hp_metric=False), **trainer_options,
        )  # fmt: skip
        trainers[name] = trainer, module, data

    errors: list[BaseException] = []

    def run(name: str) -> None:
        torch.set_num_threads(1)  # a thread has a setting of its own
        relay.wait(name)
        try:
            trainer, module, data = trainers[name]
            trainer.fit(module, data)
        except BaseException as error:  # noqa: BLE001 - raised again below, once the other run has ended
            errors.append(error)
        finally:
            relay.hand_over(name, leave=True)

    threads = [threading.Thread(target=run, args=(name,)) for name in turns]
    with relay.keeps_time():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    beyond = [having - without for having, without in zip(turns[WITH].seconds, turns[WITHOUT].seconds, strict=True)]
    looked = [now > before for before, now in itertools.pairwise([0, *turns[WITH].looks])]
    turn = statistics.median(turns[WITHOUT].seconds)
    idle = statistics.median(extra for extra, look in zip(beyond, looked, strict=True) if not look)
    return Overhead(
        step=turn / training.turn,
        inside=trainers[WITH][0].callback_metrics["cost/overhead"].item(),
        looking=sum(extra for extra, look in zip(beyond, looked, strict=True) if look) / (turn * len(beyond)),
        idling=idle * looked.count(False) / (turn * len(beyond)),
        looks=len(measuring[0].history),
    )


def sharpness() -> Sequence[SpectralCallback]:
    """Make the one callback that most runs have."""
    return [Sharpness(on_error="raise")]


def everything() -> Sequence[SpectralCallback]:
    """Make all callbacks, none with a rhythm of its own."""
    kinds = (Sharpness, TraceStability, HessianSpectrum)
    return [kind(outputs="net", on_error="raise") for kind in kinds]


def from_config() -> tuple[pl.LightningModule, Any, dict[str, Any]]:
    """Build what digits_sgd.yaml describes."""
    config = yaml.safe_load(CONFIG.read_text())
    pl.seed_everything(config["seed_everything"], verbose=False)
    module = instance(config["model"])
    optimizer = instance(config["optimizer"], module.parameters())
    module.configure_optimizers = lambda: optimizer
    kept = ("log_every_n_steps", "check_val_every_n_epoch")
    return module, instance(config["data"]), {key: config["trainer"][key] for key in kept if key in config["trainer"]}


def instance(node: dict[str, Any], *arguments: Any) -> Any:
    """Build the object that a class_path with its init_args describes."""
    module, _, name = node["class_path"].rpartition(".")
    return getattr(importlib.import_module(module), name)(*arguments, **node.get("init_args", {}))


class Supervised(pl.LightningModule):
    """A network under cross-entropy and SGD with momentum."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def slow_step() -> tuple[pl.LightningModule, Any, dict[str, Any]]:
    """Build a 64-512-512-10 network on batches of 512 digits."""
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(TensorDataset(*digits()), batch_size=512, shuffle=True, drop_last=True, generator=generator)
    return Supervised(tanh_mlp(512, 0)), loader, {}


def guard(repetitions: int) -> dict[str, list[Timed[None]]]:
    """Time the guard and a plain step on a ResNet-50 of width 8, batches of 16 images."""
    model = resnet50(0, width=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    x, y = (t[:16] for t in images())
    nothing = torch.zeros(())

    def step(_: int) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    def isolate(_: int) -> None:
        with undisturbed(model) as isolation:
            isolation.evaluate(lambda: nothing, seed=0)

    step(0)
    return taking_turns({"step": step, "guard": isolate}, repetitions)


def main() -> None:
    """Measure, print, judge."""
    quick = options(__doc__).quick
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    claims, rows = Claims(judge_costs=not quick), []
    trainings = {
        Training("digits_sgd.yaml", from_config, 500 if quick else 4000, turn=20, callbacks=sharpness): 0.10,
        Training("wide MLP", slow_step, 50 if quick else 2000, turn=5, callbacks=sharpness): 0.06,
        Training("digits_sgd.yaml, all on", from_config, 500 if quick else 16000, turn=20, callbacks=everything): None,
    }
    for training, limit in trainings.items():
        pairs = []
        for _ in range(1 if quick or limit is None else 3):
            with tempfile.TemporaryDirectory() as directory:
                pairs.append(measure(training, directory))
        outside = [pair.outside for pair in pairs]
        inside = max(pair.inside for pair in pairs)
        rows.append([
            training.name,
            f"{training.num_steps}",
            f"{1e3 * statistics.median(pair.step for pair in pairs):.1f} ms",
            f"{statistics.median(pair.looks for pair in pairs):g}",
            f"{100 * inside:.1f} %",
            f"{100 * statistics.median(pair.looking for pair in pairs):.1f} %",
            f"{100 * statistics.median(pair.idling for pair in pairs):.1f} %",
            " ".join(f"{100 * share:.1f}" for share in sorted(outside)) + " %",
        ])  # fmt: skip
        claims.at_most(f"{training.name}: cost/overhead at the end, worst", inside, 0.05)
        if limit is not None:
            claims.at_most(f"{training.name}: overhead from outside, median", statistics.median(outside), limit)
    header = ("training", "steps", "CPU / step", "looks", "cost/overhead", "looking", "other turns", "from outside")
    table(header, rows)
    runs = guard(3 if quick else 31)
    print()
    table(
        ("on a ResNet-50 of width 8 (151 modules)", "CPU"),
        [[name, f"{1e3 * median_seconds(timed):.1f} ms"] for name, timed in runs.items()],
    )
    claims.at_most("guard / plain step", median_seconds(runs["guard"]) / median_seconds(runs["step"]), 1.0)
    claims.settle()


if __name__ == "__main__":
    main()

"""What every callback of the package promises."""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.demos import boring_classes
from lightning.pytorch.demos.lstm import LightningLSTM
from lightning.pytorch.demos.transformer import LightningTransformer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import spectral_callbacks.callbacks
from spectral_callbacks.callbacks import SpectralCallback
from spectral_callbacks.callbacks.reading import Spectrum
from spectral_callbacks.linalg import Status
from spectral_callbacks.tags import check_tag
from tests.callbacks.runs import Regression, fit, loader
from tests.callbacks.separate import Rideable
from tests.contracts.networks import Everything, cross_entropy, images
from tests.contracts.training import Record, record

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*The budget of products was spent:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*left out:UserWarning"),  # what takes outputs=, or a bulk to be seen
    pytest.mark.filterwarnings("ignore:.*is biased by more than 5 %:UserWarning"),  # batches of six
]

Make = Callable[..., SpectralCallback]

# What a callback is made with here, beside its schedule: as little work as shows all of its paths.
SETTINGS: dict[str, dict[str, Any]] = {
    "Sharpness": {"rtol": 0.1, "lambda_min": True, "max_matvecs": 6},
    "TraceStability": {"num_matvecs": 4, "num_draws": 2},
    "HessianSpectrum": {"num_eigenvalues": 2, "num_steps": 2, "num_probes": 1, "rtol": 0.1, "max_matvecs": 6},
    "OptimizerState": {"per_layer": True},
    "FactorImbalance": {"pairs": ["*:*"]},
    # Some layers of every net here; ten samples are a batch and a part of the next.
    "RepresentationGeometry": {"layers": ["*[1r]"], "num_samples": 10, "metrics": ["effective_rank", "cka_next"]},
    "DiffusionEntropy": {"layers": ["*[1r]"], "num_samples": 10, "num_classes": 2, "num_repetitions": 2},
    "GradientCovariance": {"num_eigenvalues": 2, "hessian": True, "per_layer": True, "rtol": 0.1, "max_matvecs": 6},
}
# What has no default.
REQUIRED: dict[str, dict[str, Any]] = {
    "FactorImbalance": {"pairs": [("net.0", "net.2")]},
    "RepresentationGeometry": {"layers": ["net.0"]},
    "DiffusionEntropy": {"layers": ["net.0"]},
}
# Batch norm in training mode leaves no sample a gradient of its own.
NETWORKS: dict[str, type[Everything]] = {"GradientCovariance": Rideable}


def network_for(callback: SpectralCallback) -> type[Everything]:
    return NETWORKS.get(type(callback).__name__, Everything)


def concrete(kind: type[SpectralCallback] = SpectralCallback) -> Iterator[type[SpectralCallback]]:
    for child in kind.__subclasses__():
        if child.__module__.startswith("spectral_callbacks.") and not inspect.isabstract(child):
            yield child
        yield from concrete(child)


CALLBACKS = {kind.__name__: kind for kind in concrete()}


@pytest.fixture(params=CALLBACKS)
def make(request: pytest.FixtureRequest) -> Make:
    kind: type[SpectralCallback] = CALLBACKS[request.param]
    return lambda **options: kind(**{**SETTINGS.get(request.param, {}), **options})


def test_every_callback_that_is_public_is_here() -> None:
    public = {
        name
        for name, value in vars(spectral_callbacks.callbacks).items()
        if inspect.isclass(value) and issubclass(value, SpectralCallback) and not inspect.isabstract(value)
    }
    assert public == set(CALLBACKS)
    assert public


# ---- Training is bit-identical


def ours(tag: str) -> bool:
    return "/" in tag


def shuffled_images() -> DataLoader[Any]:
    return images(shuffle=True)


PLAIN: dict[Any, Record] = {}


def plainly(
    tmp_path: Path, make_module: Callable[[], pl.LightningModule], make_data: Callable[[], Any], **options: Any
) -> Record:
    """Return the record of a run without any callback, made once for all that compare with it."""
    key = make_module, make_data, tuple(sorted(options.items()))
    if key not in PLAIN:
        PLAIN[key] = record(tmp_path, make_module, make_data, **options)
    return PLAIN[key]


def assert_undisturbed(
    tmp_path: Path,
    callback: SpectralCallback,
    make_module: Callable[[], pl.LightningModule] | None = None,
    make_data: Callable[[], Any] = shuffled_images,
    **options: Any,
) -> None:
    make_module = make_module or network_for(callback)
    plain = plainly(tmp_path, make_module, make_data, **options)
    measured = record(tmp_path, make_module, make_data, [callback], own_tags=ours, **options)
    assert plain.differences(measured) == set()
    assert [entry for entry in callback.history if len(entry) > 2], "nothing was measured"
    assert not callback.silenced


RUNS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"precision": "bf16-mixed"},
    "accumulation": {"accumulate_grad_batches": 3},
    "clipping": {"gradient_clip_val": 0.1},
    "anomaly detection": {"detect_anomaly": True},
}


@pytest.mark.parametrize(
    "run", [pytest.param(name, marks=pytest.mark.slow if name == "anomaly detection" else ()) for name in RUNS]
)
def test_training_is_bit_identical_with_it(tmp_path: Path, make: Make, run: str) -> None:
    assert_undisturbed(tmp_path, make(every_n_steps=1, on_error="raise"), **RUNS[run])


class Dense(Rideable):
    """Only what runs in float16 on a CPU, and what torch.compile takes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Dropout(0.2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Scaled(MixedPrecision):
    """Autocast to float16 on the CPU, with a scaler of gradients: made anew for every run."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize("precision", ["full", "training"])
def test_training_is_bit_identical_under_a_gradient_scaler(tmp_path: Path, make: Make, precision: str) -> None:
    callback = make(every_n_steps=1, precision=precision, on_error="raise")
    plain = record(tmp_path, Dense, images, plugins=[Scaled()])
    measured = record(tmp_path, Dense, images, [callback], own_tags=ours, plugins=[Scaled()])
    assert plain.differences(measured) == set()
    assert len(callback.history) == 8


class Compiled(Dense):
    def __init__(self) -> None:
        super().__init__()
        self.compiled = torch.compile(self.body, backend="aot_eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.compiled(x)


@pytest.mark.slow
def test_training_is_bit_identical_with_a_compiled_network(tmp_path: Path, make: Make) -> None:
    torch.compiler.reset()
    assert_undisturbed(tmp_path, make(every_n_steps=1, on_error="raise"), Compiled)


WAYS: dict[str, Callable[[], dict[str, Any]]] = {
    "current batch": lambda: {"data": "current"},
    "training set": lambda: {"data": "train", "num_batches": 2},
    "loader of one's own": lambda: {"data": images(seed=2, shuffle=True), "num_batches": 2},
    "several batches": lambda: {"num_batches": 3},
    "eval mode": lambda: {"mode": "eval"},
    "precision of training": lambda: {"precision": "training"},
    "loss of one's own": lambda: {"loss": cross_entropy},
    "outputs": lambda: {"outputs": "head"},
    "outputs, and a loss convex in them": lambda: {"outputs": "head", "loss": cross_entropy},
    "epochs": lambda: {"every_n_steps": None, "every_n_epochs": 1},
    "time budget": lambda: {"every_n_steps": None, "max_overhead": 0.9},
}


@pytest.mark.parametrize("way", WAYS)
def test_training_is_bit_identical_whatever_is_measured_on(tmp_path: Path, make: Make, way: str) -> None:
    callback = make(**{"every_n_steps": 2, "on_error": "raise", **WAYS[way]()})
    assert_undisturbed(tmp_path, callback, precision="bf16-mixed" if way == "precision of training" else "32-true")


def test_training_is_bit_identical_with_an_adaptive_optimizer(tmp_path: Path, make: Make) -> None:
    callback = make(every_n_steps=2, on_error="raise")
    assert_undisturbed(tmp_path, callback, lambda: network_for(callback)("AdamW"))


def test_training_is_bit_identical_with_two_of_them(tmp_path: Path, make: Make) -> None:
    callbacks = [make(every_n_steps=2), make(every_n_steps=3, mode="eval", name="second")]
    plain = plainly(tmp_path, network_for(callbacks[0]), images)
    measured = record(tmp_path, network_for(callbacks[0]), images, callbacks, own_tags=ours)
    assert plain.differences(measured) == set()
    assert all(callback.history for callback in callbacks)


class Text(Dataset[Any]):
    """Random words, in place of a download."""

    def __init__(self, vocab_size: int, length: int) -> None:
        words = torch.randint(vocab_size, (12, length + 1), generator=torch.Generator().manual_seed(0))
        self.pairs = [(row[:-1], row[1:]) for row in words]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        return self.pairs[index]


class SmallTransformer(LightningTransformer):
    def __init__(self) -> None:
        super().__init__(vocab_size=8)

    def prepare_data(self) -> None: ...


class SmallLSTM(LightningLSTM):
    def __init__(self) -> None:
        super().__init__(vocab_size=8)

    def prepare_data(self) -> None: ...


def boring_loss(module: Any, batch: Any) -> Tensor:
    return F.mse_loss(module(batch), torch.ones(batch.shape[0], 2))


def vectors() -> DataLoader[Any]:
    return DataLoader(boring_classes.RandomDataset(32, 12), batch_size=4)


DEMOS: dict[str, tuple[Callable[[], pl.LightningModule], Callable[[], Any], dict[str, Any]]] = {
    "BoringModel": (boring_classes.BoringModel, vectors, {}),
    "ManualOptimBoringModel": (boring_classes.ManualOptimBoringModel, vectors, {"loss": boring_loss}),
    "DemoModel": (boring_classes.DemoModel, vectors, {}),
    "LightningTransformer": (SmallTransformer, lambda: DataLoader(Text(8, 6), batch_size=4), {}),
    "LightningLSTM": (SmallLSTM, lambda: DataLoader(Text(8, 3), batch_size=2), {}),
}


# Whose loss is no mean over samples, and who carries the state of one batch over to the next.
REFUSED = {
    ("GradientCovariance", "DemoModel"): "the loss of a batch is not the mean over its samples",
    ("GradientCovariance", "LightningLSTM"): "the loss does not run on 1 of its samples",
}


@pytest.mark.parametrize(
    "demo", [pytest.param(name, marks=pytest.mark.slow if name == "LightningLSTM" else ()) for name in DEMOS]
)
def test_training_is_bit_identical_on_the_models_of_lightnings_demos(tmp_path: Path, make: Make, demo: str) -> None:
    make_module, make_data, options = DEMOS[demo]
    limits: dict[str, Any] = {"limit_train_batches": 2, "limit_val_batches": 1, "max_epochs": 1}
    callback = make(every_n_steps=1, on_error="raise", **options)
    reason = REFUSED.get((type(callback).__name__, demo))
    if reason is None:
        assert_undisturbed(tmp_path, callback, make_module, make_data, **limits)
        return
    callback = make(every_n_steps=1, **options)
    plain = plainly(tmp_path, make_module, make_data, **limits)
    with pytest.warns(UserWarning, match=reason):
        measured = record(tmp_path, make_module, make_data, [callback], own_tags=ours, **limits)
    assert plain.differences(measured) == set()
    assert callback.silenced


# ---- The comparison itself


class Meddling(pl.Callback):
    """Does one thing that a callback must not do, once, in the middle of a run."""

    def __init__(self, meddle: Callable[[pl.Trainer, Any, Any], object]) -> None:
        self.meddle = meddle

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 2:
            self.meddle(trainer, pl_module, batch)


def take_a_forward_pass_in_eval_mode(trainer: pl.Trainer, module: Any, batch: Any) -> None:
    module.eval()
    module(batch[0])


def leave_a_forward_pass_of_the_batch_norm(trainer: pl.Trainer, module: Any, batch: Any) -> None:
    module.conv[1](torch.ones(2, 4, 2, 2))


def step_the_teacher(trainer: pl.Trainer, module: Any, batch: Any) -> None:
    module.teacher.weight.data.mul_(0.5)


def log_something(trainer: pl.Trainer, module: Any, batch: Any) -> None:
    module.log("loss", torch.zeros(()), on_step=True, on_epoch=True, prog_bar=True)


MEDDLING: dict[str, tuple[Callable[[pl.Trainer, Any, Any], object], set[str]]] = {
    "draws from torch": (lambda *_: torch.rand(1), {"random numbers", "steps"}),
    "draws from numpy": (lambda *_: np.random.rand(), {"random numbers", "steps"}),
    "draws from Python": (lambda *_: random.random(), {"random numbers", "steps"}),
    "draws from the module's generator": (lambda t, m, b: torch.rand(1, generator=m.generator), {"attributes"}),
    "runs the training step": (lambda t, m, b: type(m).training_step(m, b, 0), {"attributes", "buffers", "steps"}),
    "leaves eval mode": (take_a_forward_pass_in_eval_mode, {"steps"}),
    "moves batch statistics": (leave_a_forward_pass_of_the_batch_norm, {"buffers"}),
    "moves the teacher": (step_the_teacher, {"parameters"}),
    "changes the learning rate": (lambda t, m, b: t.optimizers[0].param_groups[0].update(lr=0.01), {"optimizers"}),
    "counts": (lambda t, m, b: setattr(m, "num_calls", m.num_calls + 1), {"attributes", "log"}),
    "appends to a list": (lambda t, m, b: m.losses.append(0.0), {"attributes"}),
    "fills a queue": (lambda t, m, b: m.recent.append(0.0), {"attributes"}),
    "updates a plain object": (lambda t, m, b: m.meter.update(0.0), {"attributes"}),
    "updates a metric": (
        lambda t, m, b: m.accuracy.update(torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.long)),
        {"log"},
    ),
    "logs": (log_something, {"log"}),
    "writes to the batch": (lambda t, m, b: b[0].mul_(2), {"steps"}),
    "zeroes a weight": (lambda t, m, b: m.head[0].bias.data.fill_(1.0), {"parameters"}),
    "adds an attribute": (lambda t, m, b: setattr(m, "fresh", 1), {"attributes"}),
}


@pytest.fixture(scope="module")
def undisturbed_run(tmp_path_factory: pytest.TempPathFactory) -> Record:
    return record(tmp_path_factory.mktemp("plain"), Everything, images)


def test_two_runs_from_the_same_seeds_do_not_differ(tmp_path: Path, undisturbed_run: Record) -> None:
    assert undisturbed_run.differences(record(tmp_path, Everything, images)) == set()


@pytest.mark.parametrize("kind", MEDDLING)
def test_the_comparison_sees_a_callback_that(tmp_path: Path, undisturbed_run: Record, kind: str) -> None:
    meddle, expected = MEDDLING[kind]
    assert undisturbed_run.differences(record(tmp_path, Everything, images, [Meddling(meddle)])) >= expected


# ---- Readings


def numbers(entry: dict[str, Any]) -> dict[str, Any]:
    """Return what a measurement found, comparable, without what it cost."""
    return {
        tag: reading.points().tolist() if isinstance(reading, Spectrum) else reading
        for tag, reading in entry.items()
        if not tag.startswith("cost/")
    }


def test_readings_are_the_same_for_the_same_seeds(make: Make) -> None:
    histories = []
    for _ in range(2):
        torch.manual_seed(0)
        callback = make(every_n_steps=1)
        fit(Regression(), callback, max_epochs=2)
        histories.append([numbers(entry) for entry in callback.history])
    assert histories[0] == histories[1]


def test_readings_do_not_depend_on_the_global_random_numbers(make: Make) -> None:
    histories = []
    for seed in (0, 1):
        torch.manual_seed(0)
        module = Regression()
        torch.manual_seed(seed)
        callback = make(every_n_steps=1)
        fit(module, callback)
        histories.append([numbers(entry) for entry in callback.history])
    assert histories[0] == histories[1]


def test_tags_are_of_the_grammar_and_begin_with_the_name(make: Make) -> None:
    callback = make(every_n_steps=2, name="some.name")
    fit(Regression(), callback)
    for entry in callback.history:
        assert type(entry["step"]) is int
        tags = set(entry) - {"step"}
        assert tags
        assert all(check_tag(tag).startswith(("some.name/", "cost/")) for tag in tags)


def test_the_tags_that_its_charts_draw_are_tags_that_it_logs(make: Make) -> None:
    callback = make(every_n_steps=2)
    fit(Regression(), callback, data=loader(32, 32))  # the whole dataset, so that no interval is unbounded
    drawn = {tag for chart in callback.charts for tag in chart.tags}
    assert drawn <= set(callback.history[0])


def test_the_docstring_names_every_tag_that_it_logs_by_default(make: Make) -> None:
    kind = type(make())
    callback = kind(every_n_steps=2, **REQUIRED.get(kind.__name__, {}))
    fit(Regression(), callback)
    text = inspect.getdoc(type(callback)) or ""
    tags = [re.sub(r"/lambda_\d+", "/lambda_2", tag) for tag in callback.history[0] if "/" in tag]  # one of many
    tags = [re.sub(r"/net\.0$", "/<layer>", re.sub(r"/net\.0-2$", "/<pair>", tag)) for tag in tags]
    assert [tag for tag in tags if not tag.startswith("cost/") and tag not in text] == []


@pytest.mark.parametrize("budget", [1, 3])
@pytest.mark.parametrize("outputs", [None, "net"])
def test_a_tiny_budget_gives_an_honest_status(make: Make, budget: int, outputs: str | None) -> None:
    callback = make()
    if "max_matvecs" not in inspect.signature(type(callback)).parameters:
        pytest.skip("spends no products")
    callback = make(every_n_steps=1, rtol=1e-6, max_matvecs=budget, outputs=outputs, on_error="raise")
    fit(Regression(), callback, data=loader())
    assert [entry[f"{callback.name}/status"] for entry in callback.history] == [Status.BUDGET] * 4


def test_callbacks_are_told_apart_by_their_state_keys() -> None:
    keys = [kind(**{**SETTINGS.get(name, {})}).state_key for name, kind in CALLBACKS.items()]
    assert len(set(keys)) == len(keys)

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from spectral_callbacks.callbacks import Sharpness, SpectralCallback
from spectral_callbacks.probe import Probe
from tests.callbacks.runs import Regression, complaints, fit, loader, make_trainer, plain_loss, sgd, steps

BAD: list[tuple[dict[str, Any], str]] = [
    ({"every_n_steps": 0}, "every_n_steps=0 must be a positive whole number or 'geometric'"),
    ({"every_n_epochs": -1}, "every_n_epochs=-1 must be a positive whole number"),
    ({"every_n_steps": 1, "every_n_epochs": 1}, "every_n_steps=1 and every_n_epochs=1 exclude each other"),
    ({"max_overhead": 0.0}, "max_overhead=0.0 must lie between 0 and 1"),
    ({"max_overhead": 5}, "max_overhead=5 must lie between 0 and 1"),
    ({"max_overhead": float("nan")}, "max_overhead=nan must lie between 0 and 1"),
    ({"data": "validation"}, "data='validation' must be one of 'fixed', 'current', 'train', 'val', or a DataLoader"),
    ({"data": "a DataLoader"}, "data='a DataLoader' must be one of"),
    ({"data": [1]}, r"data=\[1\] must be one of"),
    ({"num_batches": 0}, "num_batches=0 must be at least 1"),
    ({"data": "current", "num_batches": 2}, "data='current' is one batch, and num_batches=2"),
    ({"mode": "test"}, "mode='test' must be one of 'train', 'eval'"),
    ({"loss": "no.such.module.loss"}, "loss='no.such.module.loss' must be the dotted path of a function"),
    ({"loss": "math.no_such_function"}, "loss='math.no_such_function' must be the dotted path"),
    ({"loss": "loss"}, "loss='loss' must be the dotted path"),
    ({"loss": 3}, "loss=3 must be a function"),
    ({"precision": "half"}, "precision='half' must be one of 'full', 'training'"),
    ({"optimizer": -1}, "optimizer=-1 must be the index of an optimizer"),
    ({"name": "my sharpness"}, "tag 'my sharpness/x' must read"),
    ({"on_error": "ignore"}, "on_error='ignore' must be one of 'warn', 'raise'"),
    ({"num_eigenvalues": 0}, "k=0 eigenpairs"),
    ({"rtol": 0.0}, "rtol=0.0 must lie between 0 and 1"),
    ({"num_eigenvalues": 5, "max_matvecs": 4}, "max_matvecs=4 must be at least k=5"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_a_bad_argument_is_refused_at_once_with_its_value_and_its_rule(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sharpness(**options)


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="every_n_stpes"):
        Sharpness(every_n_stpes=1)


class Constant(SpectralCallback):
    """The smallest diagnostic there can be."""

    diagnostic: ClassVar[str] = "constant"

    def measure(self, probe: Probe) -> Mapping[str, float]:
        return {"constant/loss": probe.loss(), "other/one": 1.0}


def test_a_diagnostic_is_one_method() -> None:
    callback = Constant(every_n_steps=2)
    trainer = fit(Regression(), callback)
    assert [set(entry) for entry in callback.history] == [{"step", "constant/loss", "other/one", "cost/overhead"}] * 2
    assert {"constant/loss", "other/one"} <= set(trainer.callback_metrics)


def test_the_base_alone_cannot_be_used() -> None:
    with pytest.raises(TypeError, match="abstract"):
        SpectralCallback()  # type: ignore[abstract]


def test_a_name_replaces_the_first_segment_of_its_own_tags_and_comes_before_that_of_others() -> None:
    callback = Constant(every_n_steps=4, name="mine")
    fit(Regression(), callback)
    assert set(callback.history[0]) == {"step", "mine/loss", "mine/other/one", "cost/overhead"}


def test_a_tag_outside_the_grammar_is_an_error_of_the_diagnostic_and_not_of_training() -> None:
    class Odd(Constant):
        def measure(self, probe: Probe) -> Mapping[str, float]:
            return {"constant/lambda[1]": 1.0}

    with pytest.warns(UserWarning, match="must read <diagnostic>/<quantity>"):
        trainer = fit(Regression(), Odd(every_n_steps=1))
    assert trainer.global_step == 4


def test_instances_are_told_apart_in_checkpoints_by_name_and_rhythm() -> None:
    keys = [
        callback.state_key
        for callback in (
            Sharpness(), Sharpness(name="b"), Sharpness(every_n_steps=1), Sharpness(every_n_steps=2),
            Sharpness(every_n_epochs=1), Sharpness(every_n_steps="geometric"), Constant(),
        )
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert Sharpness(every_n_steps=1).state_key == Sharpness(every_n_steps=1).state_key


def test_two_that_cannot_be_told_apart_are_refused_by_lightning() -> None:
    with pytest.raises(RuntimeError, match="Found more than one stateful callback of type `Sharpness`"):
        make_trainer(Sharpness(every_n_steps=1), Sharpness(every_n_steps=1, mode="eval"))


def test_a_loss_is_given_as_a_function_or_by_its_dotted_path() -> None:
    by_path = Sharpness(loss="tests.callbacks.runs.plain_loss", every_n_steps=2, name="path")
    by_function = Sharpness(loss=plain_loss, every_n_steps=2, name="function")
    by_training_step = Sharpness(every_n_steps=2)
    fit(Regression(), by_path, by_function, by_training_step)
    values = [
        [entry[f"{callback.name}/lambda_max"] for entry in callback.history]
        for callback in (by_path, by_function, by_training_step)
    ]
    assert values[0] == pytest.approx(values[2], rel=1e-3)
    assert values[1] == pytest.approx(values[2], rel=1e-3)


class Returns(Regression):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.wrap = wrap

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.wrap(self.loss(batch))


@pytest.mark.parametrize(
    "wrap", [lambda loss: loss, lambda loss: {"loss": loss, "extra": 1}], ids=["a scalar", "a dict"]
)
def test_training_step_may_return_its_loss_either_way(wrap: Any) -> None:
    callback = Sharpness(every_n_steps=2, on_error="raise")
    fit(Returns(wrap), callback)
    assert steps(callback) == [0, 2]


class WithoutIndex(Regression):
    def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
        return self.loss(batch)


class ByIndex(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert batch_idx in range(4)
        return self.loss(batch) * (1 + batch_idx)


@pytest.mark.parametrize("kind", [WithoutIndex, ByIndex])
def test_training_step_gets_the_arguments_that_training_gives_it(kind: type[Regression]) -> None:
    callback = Sharpness(every_n_steps=2, on_error="raise")
    fit(kind(), callback)
    assert steps(callback) == [0, 2]


def test_a_failure_is_said_once_logged_once_and_ends_the_diagnostic() -> None:
    class Broken(Constant):
        calls = 0

        def measure(self, probe: Probe) -> Mapping[str, float]:
            Broken.calls += 1
            raise KeyError("planted")

        def failure(self) -> Mapping[str, float]:
            return {"constant/status": 2.0}

    broken, sound = Broken(every_n_steps=1), Constant(every_n_steps=1, name="sound")
    with pytest.warns(UserWarning, match="Training goes on without this diagnostic") as warned:
        trainer = fit(Regression(), broken, sound)
    assert complaints(warned) == ["Broken('constant'): 'planted' Training goes on without this diagnostic."]
    assert Broken.calls == 1
    assert broken.history == [{"step": 0, "constant/status": 2.0}]
    assert trainer.callback_metrics["constant/status"] == 2
    assert steps(sound) == [0, 1, 2, 3]


def test_a_failure_in_one_run_does_not_silence_the_next() -> None:
    class FailsOnce(Constant):
        fails = True

        def measure(self, probe: Probe) -> Mapping[str, float]:
            if self.fails:
                raise KeyError("planted")
            return {"constant/one": 1.0}

    callback = FailsOnce(every_n_steps=1)
    with pytest.warns(UserWarning, match="planted"):
        fit(Regression(), callback)
    callback.fails = False
    fit(Regression(), callback)
    assert steps(callback) == [0, 0, 1, 2, 3]


def test_on_error_raise_raises_and_leaves_the_module_as_it_was() -> None:
    class Broken(Constant):
        def measure(self, probe: Probe) -> Mapping[str, float]:
            raise KeyError("planted")

    module = Regression()
    weights = [p.clone() for p in module.parameters()]
    with pytest.raises(KeyError, match="planted"):
        fit(module, Broken(every_n_steps=1, on_error="raise"))
    assert "log" not in module.__dict__
    assert all(torch.equal(p, w) for p, w in zip(module.parameters(), weights, strict=True))


class Refusing(Regression):
    """A module whose optimizers differ."""

    def __init__(self, num_optimizers: int) -> None:
        super().__init__()
        self.num_optimizers = num_optimizers

    def configure_optimizers(self) -> Any:
        return [sgd()(self.parameters())][: self.num_optimizers] or None


def test_an_optimizer_index_out_of_range_is_reported_once() -> None:
    with pytest.warns(UserWarning, match="optimizer=2, but the module configures 1") as warned:
        trainer = fit(Refusing(1), Sharpness(every_n_steps=1, optimizer=2))
    assert len(complaints(warned)) == 1
    assert trainer.global_step == 4


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`:UserWarning")
def test_a_module_without_an_optimizer_is_reported_once() -> None:
    with pytest.warns(UserWarning, match="optimizer 0 holds no parameter of the module|configures 0") as warned:
        fit(Refusing(0), Sharpness(every_n_steps=1), data=loader(8))
    assert len(complaints(warned)) == 1

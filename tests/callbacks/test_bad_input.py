"""Models that cannot be measured: one clear message, and a run that ends as it would have without us."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from spectral_callbacks.callbacks import Sharpness
from tests.callbacks.runs import Regression, complaints, fit, loader, plain_loss, sgd
from tests.faults import OnceSquare


class Frozen(Regression):
    """Everything is frozen, and the training step has nothing to return."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> None: ...


class ConnectionistTemporal(Regression):
    """ctc_loss has no second derivative in torch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        scores = self.net(x).log_softmax(-1)[:, None, :].expand(-1, 2, -1)
        lengths = torch.tensor([8, 8]), torch.tensor([2, 2])
        return F.ctc_loss(scores, torch.ones(2, 2, dtype=torch.long), *lengths)


class OnceDifferentiable(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return OnceSquare.apply(self.net(x) - y).mean()


class WithoutLoss(Regression):
    """Returns None now and then, which Lightning takes for a batch to be skipped."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 0 else self.loss(batch)


class Clipping(Regression):
    """Clips its weights in the training step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        for p in self.parameters():
            p.data.clamp_(-0.3, 0.3)
        return self.loss(batch)


class Vector(Regression):
    """Its loss is no scalar; a callable of Lightning's reduces it before training sees it."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        errors = (self.net(x) - y).square().mean(1)
        return errors if "log" in self.__dict__ else errors.mean()


class Crashing(Regression):
    """A training step that fails when it is run again."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if "log" in self.__dict__:
            raise ZeroDivisionError("planted")
        return self.loss(batch)


class Complex(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.ones(1, dtype=torch.complex64))


class Lazy(Regression):
    """Leaves a parameter without a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.LazyLinear(2)


CASES: dict[str, tuple[Callable[[], Regression], str]] = {
    "no trainable parameter": (Frozen, "no parameter with requires_grad=True"),
    "ctc_loss": (ConnectionistTemporal, "torch has no second derivative for ctc_loss"),
    "once differentiable": (OnceDifferentiable, "@once_differentiable, and curvature needs a second derivative"),
    "training_step returns None": (WithoutLoss, "training_step returned NoneType without a loss"),
    "weights written by the loss": (Clipping, r"the loss writes to the trainable parameters net\.0\.weight"),
    "loss of several numbers": (Vector, r"the loss has shape \(8,\); return a scalar"),
    "training_step crashes when run again": (Crashing, "planted"),
    "complex parameter": (Complex, "parameter phase has dtype torch.complex64"),
    "uninitialised parameter": (Lazy, r"parameter spare\.weight is not initialised yet"),
}


@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`:UserWarning")
@pytest.mark.filterwarnings("ignore:Lazy modules are:UserWarning")
@pytest.mark.filterwarnings("ignore:The total number of parameters detected may be inaccurate:UserWarning")
@pytest.mark.parametrize("kind", CASES)
def test_one_message_and_an_unharmed_run(kind: str) -> None:
    make, message = CASES[kind]
    finals = []
    for callbacks in ([], [Sharpness(every_n_steps=1)]):
        torch.manual_seed(0)
        module = make()
        if callbacks:
            with pytest.warns(UserWarning, match=message) as warned:
                fit(module, *callbacks)
            assert len(complaints(warned)) == 1
            assert callbacks[0].history == [{"step": 0, "sharpness/status": 2.0}]
        else:
            fit(module)
        initialised = [p.detach() for p in module.parameters() if not isinstance(p, nn.UninitializedParameter)]
        finals.append([*initialised, torch.get_rng_state()])
    for plain, measured in zip(*finals, strict=True):
        assert torch.equal(plain, measured)


@pytest.mark.parametrize("kind", ["ctc_loss", "training_step crashes when run again"])
def test_on_error_raise_shows_the_error_itself(kind: str) -> None:
    make, message = CASES[kind]
    with pytest.raises((RuntimeError, ZeroDivisionError), match=message):
        fit(make(), Sharpness(every_n_steps=1, on_error="raise"))


def test_a_loss_of_ones_own_is_the_way_out() -> None:
    callback = Sharpness(every_n_steps=1, loss=plain_loss, on_error="raise")
    fit(OnceDifferentiable(), callback)
    assert len(callback.history) == 4


def broken_loss(module: Any, batch: Any) -> Any:
    return 1.0


def test_a_loss_of_ones_own_that_is_no_tensor_is_reported_once() -> None:
    with pytest.warns(UserWarning, match="loss= returned float; return a scalar Tensor") as warned:
        trainer = fit(Regression(), Sharpness(every_n_steps=1, loss=broken_loss))
    assert len(complaints(warned)) == 1
    assert trainer.global_step == 4


def test_a_loss_that_does_not_depend_on_the_parameters_has_no_curvature() -> None:
    callback = Sharpness(every_n_steps=1, loss=lambda module, batch: torch.ones(()))
    fit(Regression(), callback)
    assert [entry["sharpness/lambda_max"] for entry in callback.history] == [0.0] * 4


@pytest.mark.parametrize("batch_size", [1, 32])
def test_the_smallest_and_the_full_batch_are_measured(batch_size: int) -> None:
    callback = Sharpness(every_n_steps=1, on_error="raise")
    fit(Regression(sgd(0.01)), callback, data=loader(batch_size=batch_size), max_epochs=2)
    assert all(entry["sharpness/status"] == 0 for entry in callback.history)


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None:UserWarning")
def test_a_loader_that_yields_none_is_waited_out() -> None:
    x, y = next(iter(loader()))
    batches = [None, (x, y), (x, y)]
    callback = Sharpness(every_n_steps=1)
    fit(Regression(), callback, data=DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    assert callback.history[0]["sharpness/lambda_max"] > 0


def test_an_unknown_output_is_named_with_what_comes_close_and_training_goes_on() -> None:
    callback = Sharpness(every_n_steps=1, outputs="nett")
    with pytest.warns(UserWarning, match="outputs='nett' names no submodule of Regression; did you mean 'net'"):
        trainer = fit(Regression(), callback)
    assert trainer.global_step == 4
    assert not callback.history


@pytest.mark.parametrize("name", ["net.2", "net"])
def test_outputs_of_a_compiled_module_go_by_their_plain_name(name: str) -> None:
    class Compiled(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.compile(self.net, backend="eager")  # pyright: ignore[reportAttributeAccessIssue]

    callback = Sharpness(every_n_steps=1, outputs=name, on_error="raise")
    fit(Compiled(), callback)
    assert len(callback.history) == 4

"""A run that is resumed goes on as if it had not been cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from spectral_callbacks.callbacks import Sharpness
from spectral_callbacks.probe import tensors_of
from tests.callbacks.runs import Regression, complaints, fit, loader, series, steps

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory .* exists and is not empty:UserWarning",
    "ignore:You're resuming from a checkpoint that ended before the epoch ended:UserWarning",
    "ignore:Be aware that when using `ckpt_path`:UserWarning",
)


class Noting(Sharpness):
    """Notes the batches of each probe."""

    def __init__(self, **options: Any) -> None:
        super().__init__(rtol=1e-3, **options)
        self.seen: list[list[torch.Tensor]] = []

    def measure(self, probe: Any) -> Any:
        self.seen.append([frozen.batch[0].clone() for frozen in probe.batches])
        return super().measure(probe)


class Resumable:
    """A loader that goes on within an epoch, as Lightning asks of one for exact resuming."""

    def __init__(self) -> None:
        self.batches = list(loader())
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def shuffled() -> Any:
    return loader(shuffle=True, generator=torch.Generator().manual_seed(3))


def interrupted_and_whole(tmp_path: Path, every: int, cut: int, **options: Any) -> tuple[Noting, Noting, Noting]:
    """Return the callbacks of a run of four epochs, of its first part, and of its second, resumed after `cut` steps."""
    runs = []
    for max_steps, ckpt_path in ((16, None), (cut, None), (16, tmp_path / f"step={cut}.ckpt")):
        torch.manual_seed(0)
        callback = Noting(every_n_steps=every, **options)
        checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=cut, save_top_k=-1)
        if ckpt_path is not None:
            torch.manual_seed(99)
        fit(
            Regression(), callback, checkpoint, data=Resumable(), max_steps=max_steps, max_epochs=-1,
            enable_checkpointing=True, ckpt_path=None if ckpt_path is None else str(ckpt_path),
        )  # fmt: skip
        runs.append(callback)
    whole, first, second = runs
    return whole, first, second


@pytest.mark.parametrize(("every", "cut"), [(1, 8), (2, 8), (3, 8), (1, 6), (4, 6)])
def test_the_two_parts_make_the_series_of_the_whole(tmp_path: Path, every: int, cut: int) -> None:
    whole, first, second = interrupted_and_whole(tmp_path, every, cut)
    assert steps(first) + steps(second) == steps(whole)
    joined = series(first, "sharpness/lambda_max") + series(second, "sharpness/lambda_max")
    for value, entry in zip(joined, whole.history, strict=True):
        assert abs(value - entry["sharpness/lambda_max"]) <= entry["sharpness/residual"]


@pytest.mark.parametrize("num_batches", [1, 3])
def test_the_fixed_batches_are_those_of_the_first_part(tmp_path: Path, num_batches: int) -> None:
    _, first, second = interrupted_and_whole(tmp_path, 1, 6, num_batches=num_batches)
    for a, b in zip(first.seen[-1], second.seen[0], strict=True):
        assert torch.equal(a, b)
    assert len(second.seen[0]) == num_batches


def checkpoint_of(tmp_path: Path, *callbacks: Sharpness, data: Any = None) -> str:
    saver = ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=True)
    fit(Regression(), *callbacks, saver, data=data, enable_checkpointing=True)
    return saver.best_model_path


def test_the_clock_goes_on(tmp_path: Path) -> None:
    first = Sharpness(every_n_steps=1)
    path = checkpoint_of(tmp_path, first)
    second = Sharpness(every_n_steps=1)
    fit(Regression(), second, ckpt_path=path, max_epochs=2)
    state = torch.load(path, weights_only=True)["callbacks"][first.state_key]
    spent, elapsed = state["budget"]["spent"], state["budget"]["elapsed"]
    assert 0 < spent <= elapsed
    assert second.state_dict()["budget"]["spent"] > spent
    assert second.state_dict()["budget"]["elapsed"] > elapsed


def test_a_default_callback_does_not_start_with_a_new_free_measurement(tmp_path: Path) -> None:
    path = checkpoint_of(tmp_path, Sharpness(max_overhead=1e-6))
    resumed = Sharpness(max_overhead=1e-6)
    fit(Regression(), resumed, ckpt_path=path, max_epochs=2)
    assert resumed.history == []


def test_the_checkpoint_is_plain_data(tmp_path: Path) -> None:
    path = checkpoint_of(tmp_path, Sharpness(every_n_steps=1), Sharpness(every_n_steps=1, name="b"))
    callbacks = torch.load(path, weights_only=True)["callbacks"]
    states = [state for key, state in callbacks.items() if "Sharpness" in key]
    assert len(states) == 2
    batches = [batch for state in states for batch in tensors_of(state["fixed"])]
    assert len({batch.untyped_storage().data_ptr() for batch in batches}) == len(batches) / 2, "stored once"


def test_the_order_of_callbacks_may_change_on_resuming(tmp_path: Path) -> None:
    first, second = Noting(every_n_steps=1), Noting(every_n_steps=1, name="b")
    path = checkpoint_of(tmp_path, first, second, data=shuffled())
    resumed = Noting(every_n_steps=1, name="b")
    fit(Regression(), resumed, data=shuffled(), ckpt_path=path, max_epochs=2)
    for a, b in zip(second.seen[-1], resumed.seen[0], strict=True):
        assert torch.equal(a, b)


def test_callbacks_that_share_a_trainer_share_its_fixed_batches(tmp_path: Path) -> None:
    callbacks = [Noting(every_n_steps=1), Noting(every_n_steps=1, name="b", num_batches=2)]
    path = checkpoint_of(tmp_path, *callbacks, data=shuffled())
    again = [Noting(every_n_steps=1), Noting(every_n_steps=1, name="b", num_batches=2)]
    fit(Regression(), *again, data=shuffled(), ckpt_path=path, max_epochs=2)
    for before, after in zip(callbacks, again, strict=True):
        for a, b in zip(before.seen[-1], after.seen[0], strict=True):
            assert torch.equal(a, b)


class Wide(Regression):
    """Reads the first numbers of very long rows."""

    def loss(self, batch: Any) -> torch.Tensor:
        return super().loss((batch[0][:, :3], batch[1]))


class WideBatches(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return torch.full((2**22 + 1,), float(index)), torch.zeros(2)


@pytest.mark.parametrize(("data", "says"), [("fixed", True), ("current", False), ("train", False)])
def test_batches_over_16_mib_stay_out_and_the_resumed_run_says_so(tmp_path: Path, data: Any, says: bool) -> None:
    torch.manual_seed(0)
    batches = torch.utils.data.DataLoader(WideBatches(), batch_size=1)
    saver = ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=True)
    fit(Wide(), Sharpness(every_n_steps=1, data=data), saver, data=batches, enable_checkpointing=True)
    assert Path(saver.best_model_path).stat().st_size < 2**20
    resumed = Sharpness(every_n_steps=1, data=data)
    if says:
        with pytest.warns(UserWarning, match="the probe set changed on resuming") as warned:
            fit(Wide(), resumed, data=batches, ckpt_path=saver.best_model_path, max_epochs=2)
        assert len(complaints(warned)) == 1
    else:
        fit(Wide(), resumed, data=batches, ckpt_path=saver.best_model_path, max_epochs=2)
    assert steps(resumed) == [2, 3]


def test_a_checkpoint_of_a_run_without_us_can_be_resumed_with_us(tmp_path: Path) -> None:
    path = checkpoint_of(tmp_path)
    callback = Sharpness(every_n_steps=2)
    fit(Regression(), callback, ckpt_path=path, max_epochs=2)
    assert steps(callback) == [4, 6]


def test_a_checkpoint_of_a_run_with_us_can_be_resumed_without_us(tmp_path: Path) -> None:
    path = checkpoint_of(tmp_path, Sharpness(every_n_steps=2))
    assert fit(Regression(), ckpt_path=path, max_epochs=2).global_step == 8


def test_epochs_are_counted_across_the_cut(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=True)
    first, second = Sharpness(every_n_epochs=2), Sharpness(every_n_epochs=2)
    fit(Regression(), first, saver, enable_checkpointing=True, max_epochs=3)
    fit(Regression(), second, ckpt_path=saver.best_model_path, max_epochs=6)
    assert steps(first) == [0, 8]
    assert steps(second) == [16, 24]

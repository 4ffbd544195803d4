"""Where the batches come from, and what of training that leaves alone."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, SubsetRandomSampler, TensorDataset

from spectral_callbacks.callbacks import Sharpness
from spectral_callbacks.callbacks.batches import FixedBatches, second_loader
from tests.callbacks.runs import Regression, Watch, complaints, fit, loader, plain_loss, samples, series, steps


class Noting(Sharpness):
    """Notes the batches that each probe was given."""

    def __init__(self, **options: Any) -> None:
        super().__init__(max_matvecs=1, rtol=0.5, **options)
        self.seen: list[list[tuple[Tensor, int]]] = []

    def measure(self, probe: Any) -> Any:
        self.seen.append([(frozen.batch[0].clone(), frozen.batch_idx) for frozen in probe.batches])
        return {"sharpness/lambda_max": probe.loss()}


def indices(seen: list[tuple[Tensor, int]], data: DataLoader[Any]) -> list[int]:
    """Return which batches of an unshuffled loader these are."""
    known = [x for x, _ in data]
    return [next(i for i, x in enumerate(known) if torch.equal(x, batch)) for batch, _ in seen]


def test_fixed_batches_are_the_first_and_stay() -> None:
    callback, data = Noting(every_n_steps=1), loader()
    fit(Regression(), callback, data=data, max_epochs=2)
    assert [indices(seen, data) for seen in callback.seen] == [[0]] * 8


def test_measuring_waits_until_all_fixed_batches_have_passed() -> None:
    callback, data = Noting(every_n_steps=4, num_batches=3), loader(64)
    fit(Regression(), callback, data=data)
    assert steps(callback) == [2, 4]
    assert [indices(seen, data) for seen in callback.seen] == [[0, 1, 2]] * 2


def test_the_default_budget_waits_for_them_too() -> None:
    callback = Noting(num_batches=3, max_overhead=0.999)
    fit(Regression(), callback)
    assert steps(callback)[0] == 2


def test_fewer_batches_than_asked_for_are_never_measured() -> None:
    callback = Noting(every_n_steps=1, num_batches=5)
    fit(Regression(), callback)
    assert not callback.history


def test_callbacks_that_want_different_numbers_share_the_first_ones() -> None:
    few, many = Noting(every_n_steps=1), Noting(every_n_steps=1, num_batches=2, name="two")
    data = loader()
    fit(Regression(), few, many, data=data)
    assert steps(few) == [0, 1, 2, 3]
    assert steps(many) == [1, 2, 3]
    assert indices(many.seen[0], data) == [0, 1]


def test_the_current_batch_is_the_one_about_to_be_used() -> None:
    callback, data = Noting(every_n_steps=1, data="current"), loader()
    fit(Regression(), callback, data=data)
    assert [indices(seen, data) for seen in callback.seen] == [[0], [1], [2], [3]]


def test_at_an_epochs_end_the_current_batch_is_the_last_one() -> None:
    callback, data = Noting(every_n_epochs=1, data="current"), loader()
    fit(Regression(), callback, data=data)
    assert [indices(seen, data) for seen in callback.seen] == [[0], [3]]


def test_a_loader_of_ones_own_is_read_once_for_as_many_batches_as_asked_for() -> None:
    reads: list[int] = []

    class Counted(Dataset[Any]):
        def __len__(self) -> int:
            return 100

        def __getitem__(self, index: int) -> Any:
            reads.append(index)
            return torch.full((3,), float(index)), torch.zeros(2)

    callback = Noting(every_n_steps=1, data=DataLoader(Counted(), batch_size=4), num_batches=2)
    fit(Regression(), callback)
    assert len(callback.seen) == 4
    assert [x[:, 0].tolist() for x, _ in callback.seen[-1]] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(reads) <= 12


def test_a_loader_shorter_than_asked_for_gives_what_it_has() -> None:
    callback = Noting(every_n_steps=1, data=loader(8), num_batches=3)
    fit(Regression(), callback)
    assert [len(seen) for seen in callback.seen] == [1] * 4


def test_an_empty_loader_is_reported_once_and_training_goes_on() -> None:
    callback = Noting(every_n_steps=1, data=DataLoader(TensorDataset(torch.zeros(0, 3), torch.zeros(0, 2))))
    with pytest.warns(UserWarning, match="the loader that data= names has no batch") as warned:
        trainer = fit(Regression(), callback)
    assert len(complaints(warned)) == 1
    assert trainer.global_step == 4


def test_train_batches_come_from_the_training_set_in_an_order_of_their_own() -> None:
    callbacks = [
        Noting(every_n_steps=2, data="train", num_batches=2, seed=s, name=f"s{i}") for i, s in enumerate((0, 0, 1))
    ]
    fit(Regression(), *callbacks)
    known = samples().tensors[0]
    for callback in callbacks:
        assert len(callback.seen) == 2
        for x, _ in callback.seen[0]:
            assert all((known == row).all(1).any() for row in x)
        for first, second in zip(*callback.seen, strict=True):
            assert torch.equal(first[0], second[0])
    same, again, other = (callback.seen[0][0][0] for callback in callbacks)
    assert torch.equal(same, again)
    assert not torch.equal(same, other)


def test_train_batches_come_from_the_part_of_a_data_set_that_the_sampler_draws() -> None:
    """The rest may be held out."""
    data = samples(32)
    training = DataLoader(data, batch_size=4, sampler=SubsetRandomSampler(range(0, 32, 4)))
    callback = Noting(every_n_steps=2, data="train", num_batches=8)
    fit(Regression(), callback, data=training)
    drawn = torch.cat([x for x, _ in callback.seen[0]])
    assert sorted(drawn[:, 0].tolist()) == sorted(data.tensors[0][::4, 0].tolist())


class Augmented(Dataset[Any]):
    """A training set that draws random numbers, from the global generators and from its own."""

    def __init__(self) -> None:
        self.own = np.random.default_rng(0)
        self.x, self.y = samples().tensors

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.x[index] + 0.1 * torch.randn(3) + 0.1 * self.own.random() + 0.1 * np.random.rand(), self.y[index]


class Batches(Dataset[Any]):
    """Ready batches."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = list(batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        return self.batches[index]


@pytest.mark.parametrize("data", ["train", "own"])
def test_what_is_drawn_on_loading_depends_on_the_callbacks_seed_and_not_on_the_runs(data: Any) -> None:
    seen = []
    for run_seed, seed in ((0, 0), (1, 0), (0, 1)):
        torch.manual_seed(run_seed)
        np.random.seed(run_seed)
        own = DataLoader(Augmented(), batch_size=8, shuffle=True)
        callback = Noting(every_n_steps=4, data=own if data == "own" else data, seed=seed)
        fit(Regression(), callback, data=DataLoader(Augmented(), batch_size=8, shuffle=True))
        seen.append(callback.seen[0][0][0])
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([(torch.ones(3), torch.ones(2))] * 8)


@pytest.mark.parametrize(
    "data",
    [DataLoader(Stream(), batch_size=4), Batches(loader()), DataLoader(Batches(loader()), batch_size=None)],
    ids=["stream", "no loader", "no batch size"],
)
def test_a_training_set_that_cannot_be_read_twice_is_reported_once(data: Any) -> None:
    callback = Noting(every_n_steps=1, data="train")
    with pytest.warns(UserWarning, match=r"data='train' needs a .*pass a DataLoader of your own as data=") as warned:
        fit(Regression(), callback, data=data)
    assert len(complaints(warned)) == 1
    assert [entry["sharpness/status"] for entry in callback.history] == [2]


class Deck(Sampler[int]):
    """A sampler that shuffles by a generator of its own."""

    def __init__(self) -> None:
        self.own = random.Random(0)

    def __len__(self) -> int:
        return 32

    def __iter__(self) -> Iterator[int]:
        return iter(self.own.sample(range(32), 32))


MODES: list[Any] = ["fixed", "current", "train", "own", "same"]


def trained(data: DataLoader[Any], *callbacks: pl.Callback) -> list[Any]:
    """Return the batches of three epochs, and the final weights."""
    torch.manual_seed(0)
    np.random.seed(0)
    module = Regression()
    seen: list[Any] = []
    watch = Watch(lambda trainer, module, batch: seen.append(batch[0].clone()))
    fit(module, *callbacks, watch, data=data, max_epochs=3)
    generator = data.generator
    return [*seen, *module.parameters(), torch.get_rng_state(), *([generator.get_state()] if generator else [])]


def make_loader(kind: str) -> DataLoader[Any]:
    if kind == "augmented":
        return DataLoader(Augmented(), batch_size=8, shuffle=True)
    if kind == "generator":
        return loader(shuffle=True, generator=torch.Generator().manual_seed(7))
    if kind == "sampler":
        return loader(sampler=Deck())
    if kind == "persistent workers":
        return loader(shuffle=True, num_workers=1, persistent_workers=True)
    return loader(shuffle=True)


@pytest.mark.parametrize("data", MODES)
@pytest.mark.parametrize("kind", ["plain", "generator", "augmented", "sampler", "persistent workers"])
def test_training_sees_the_batches_it_would_have_seen(kind: str, data: Any) -> None:
    if (kind, data) == ("persistent workers", "same"):
        pytest.skip("refused")
    training = make_loader(kind)
    callback = Sharpness(every_n_steps=1, data={"own": loader(shuffle=True), "same": training}.get(data, data))
    plain, measured = trained(make_loader(kind)), trained(training, callback)
    assert len(callback.history) == 12
    for a, b in zip(plain, measured, strict=True):
        assert torch.equal(a, b)


def test_the_training_loader_itself_is_refused_where_reading_it_would_start_the_epoch_over() -> None:
    data = loader(shuffle=True, num_workers=1, persistent_workers=True)
    callback = Sharpness(every_n_steps=1, data=data)
    with pytest.warns(
        UserWarning, match="data= is the one that training reads, and its persistent_workers would start"
    ):
        measured = trained(data, callback)
    plain = trained(make_loader("persistent workers"))
    for a, b in zip(plain, measured, strict=True):
        assert torch.equal(a, b)


class CopyingRegression(Regression):
    """Trains on inference tensors as one has to: on a copy."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return super().training_step((x.clone(), y), batch_idx)


@pytest.mark.parametrize("data", ["fixed", "current"])
@pytest.mark.parametrize("loss", [None, plain_loss])
def test_batches_made_in_inference_mode_are_measured(data: Any, loss: Any) -> None:
    callback = Sharpness(every_n_steps=1, data=data, loss=loss, on_error="raise")
    with torch.inference_mode():
        batches = Batches((x * 2, y) for x, y in loader())
    assert batches[0][0].is_inference()
    fit(CopyingRegression(), callback, data=DataLoader(batches, batch_size=None))
    assert series(callback, "sharpness/status") == [0] * 4


def test_ragged_batches_weigh_as_many_as_they_hold() -> None:
    data = loader(13, batch_size=8)
    callback = Noting(every_n_steps=1, num_batches=2, loss=plain_loss)
    module = Regression()
    expected: list[float] = []

    def see(trainer: pl.Trainer, module: Any, batch: Any) -> None:
        x, y = samples(13).tensors
        expected.append(module.loss((x, y)).item())

    fit(module, callback, Watch(see), data=data)
    assert steps(callback) == [1]
    assert series(callback, "sharpness/lambda_max")[0] == pytest.approx(expected[1], rel=1e-6)


class Spoiling(Regression):
    """Writes to its batch, and takes it apart."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch.pop("x"), batch.pop("y")
        return super().training_step((x.sub_(1.0).div_(2.0), y.mul_(0.5)), batch_idx)


class Dicts(Dataset[Any]):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Any:
        x, y = samples()[index]
        return {"x": x, "y": y}


@pytest.mark.parametrize("data", ["fixed", "current"])
def test_a_training_step_may_spoil_its_batch(data: Any) -> None:
    finals = []
    for callbacks in ([], [Sharpness(every_n_steps=1, data=data)]):
        torch.manual_seed(0)
        module = Spoiling()
        fit(module, *callbacks, data=DataLoader(Dicts(), batch_size=8))
        finals.append(torch.cat([p.flatten() for p in module.parameters()]))
        for callback in callbacks:
            assert series(callback, "sharpness/status") == [0] * 4
    assert torch.equal(*finals)


def test_transfer_hooks_are_applied_to_a_loader_of_ones_own() -> None:
    class Hooked(Regression):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            x, y = batch
            return x * 10, y

    callback = Noting(every_n_steps=1, data=loader())
    fit(Hooked(), callback)
    assert torch.equal(callback.seen[0][0][0], samples().tensors[0][:8] * 10)


def test_the_batch_index_is_the_one_that_training_had() -> None:
    callback = Noting(every_n_steps=4, num_batches=3)
    fit(Regression(), callback)
    assert [index for _, index in callback.seen[0]] == [0, 1, 2]


class TestFixedBatchesInACheckpoint:
    def kept(self, *batches: Any) -> FixedBatches:
        fixed = FixedBatches(len(batches))
        for index, batch in enumerate(batches):
            assert not fixed.is_complete
            fixed.see(batch, index)
        assert fixed.is_complete
        return fixed

    def test_they_come_back_as_they_were(self) -> None:
        batch = {"x": torch.ones(3), "n": [1, "a", (2.0, None, True)]}
        resumed = FixedBatches(1)
        resumed.load_state_dict(self.kept(batch).state_dict())
        frozen = resumed.take(1)
        assert frozen is not None
        assert repr(frozen[0].batch) == repr(batch)
        assert not resumed.lost_on_resume

    @pytest.mark.parametrize("num_bytes", [2**24, 2**24 + 4])
    def test_up_to_16_mib(self, num_bytes: int) -> None:
        fixed = self.kept(torch.zeros(num_bytes // 8), torch.zeros(num_bytes // 4 - num_bytes // 8))
        state = fixed.state_dict()
        assert (state["batches"] is not None) == (num_bytes == 2**24)
        resumed = FixedBatches(2)
        resumed.load_state_dict(state)
        assert resumed.lost_on_resume == (num_bytes > 2**24)
        assert resumed.is_complete == (num_bytes == 2**24)

    def test_only_in_plain_containers(self) -> None:
        class Own(dict[str, Tensor]):
            pass

        assert self.kept(Own(x=torch.ones(1))).state_dict() == {"batches": None}

    def test_later_writes_to_the_batch_do_not_reach_the_copy(self) -> None:
        batch = [torch.ones(2)]
        fixed = self.kept(batch)
        batch[0].zero_()
        frozen = fixed.take(1)
        assert frozen is not None
        assert torch.equal(frozen[0].batch[0], torch.ones(2))


class Validated(Regression):
    """Validates on other samples than it trains on."""

    def __init__(self, *loaders: DataLoader[Any]) -> None:
        super().__init__()
        self.loaders = list(loaders)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(batch))

    def val_dataloader(self) -> Any:
        return self.loaders


@pytest.mark.parametrize("sanity", [0, 1])
def test_val_batches_come_from_the_validation_set_in_an_order_of_their_own(sanity: int) -> None:
    data = samples(12, seed=5)
    callback = Noting(every_n_steps=2, data="val", num_batches=3)
    fit(Validated(DataLoader(data, batch_size=4)), callback, num_sanity_val_steps=sanity)
    first, second = (torch.cat([x for x, _ in seen]) for seen in callback.seen)
    assert torch.equal(first, second)
    assert not torch.equal(first, data.tensors[0])
    assert torch.equal(first[:, 0].sort().values, data.tensors[0][:, 0].sort().values)


def test_drawing_from_the_validation_set_leaves_the_run_as_it_is() -> None:
    ends = []
    for callbacks in ([], [Noting(every_n_steps=2, data="val")]):
        torch.manual_seed(0)
        np.random.seed(0)
        module = Validated(DataLoader(Augmented(), batch_size=8))
        trainer = fit(module, *callbacks, data=DataLoader(Augmented(), batch_size=8, shuffle=True), max_epochs=2)
        ends.append([*module.parameters(), trainer.callback_metrics["val_loss"]])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader` across ranks is zero")
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Regression(), "data='val', and nothing validates in this run; use data='train'"),
        (Validated(loader(0)), "data='val', and the data set that is read there is empty"),
        (Validated(loader(), loader()), "data='val' needs a torch DataLoader over a map-style dataset.*reads a list"),
    ],
    ids=["none", "empty", "two"],
)
def test_a_run_without_one_validation_loader_is_reported_once(module: Regression, message: str) -> None:
    callback = Noting(every_n_steps=1, data="val")
    with pytest.warns(UserWarning, match=message) as warned:
        fit(module, callback)
    assert len(complaints(warned)) == 1


@pytest.mark.parametrize(("wanted", "loaded"), [(9, 12), (12, 12), (100, 32)])
def test_as_many_batches_are_loaded_as_hold_the_samples_that_are_wanted(wanted: int, loaded: int) -> None:
    callback, other = Noting(every_n_steps=4, data="train"), Noting(every_n_steps=4, data="train", name="other")
    callback.loads_samples = wanted
    fit(Regression(), callback, other, data=loader(batch_size=4))
    assert sum(len(x) for x, _ in callback.seen[0]) == loaded
    assert sum(len(x) for x, _ in other.seen[0]) == 4


def test_the_second_loader_keeps_collation_and_size_and_takes_no_workers() -> None:
    data = loader(batch_size=4, num_workers=2, drop_last=True)
    trainer = fit(Regression(), data=loader(batch_size=4), max_epochs=0)
    trainer.fit_loop._data_source.instance = data
    trainer.fit_loop._combined_loader = None
    trainer.fit_loop.setup_data()
    second = second_loader(trainer, "train", seed=0)
    assert second.batch_size == 4
    assert second.num_workers == 0
    assert second.collate_fn is data.collate_fn

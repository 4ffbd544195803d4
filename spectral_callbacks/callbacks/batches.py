"""Where the batches that are measured on come from."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SubsetRandomSampler

from spectral_callbacks.probe import copied, num_samples, seed_generators, tensors_of, undisturbed

Data = Literal["fixed", "current", "train", "val"] | DataLoader[Any]
_CHECKPOINT_LIMIT = 2**24  # bytes of fixed batches that a checkpoint carries


@dataclasses.dataclass(frozen=True)
class FrozenBatch:
    """A batch copied from training, and the index that its training step was given."""

    batch: Any
    batch_idx: int


class FixedBatches:
    """The first batches of training, copied to the CPU as they pass.

    Args:
        num_batches: How many to keep.
    """

    def __init__(self, num_batches: int) -> None:
        self._num_batches = num_batches
        self._kept: list[FrozenBatch] = []
        self.lost_on_resume = False

    @property
    def is_complete(self) -> bool:
        """Whether all have passed."""
        return len(self._kept) >= self._num_batches

    def see(self, batch: Any, batch_idx: int) -> None:
        """Keep a copy, unless there are enough."""
        if not self.is_complete:
            self._kept.append(FrozenBatch(move_data_to_device(copied(batch), "cpu"), batch_idx))

    def take(self, num_batches: int) -> list[FrozenBatch] | None:
        """Return the first so many, or None while they have not all passed."""
        return self._kept[:num_batches] if len(self._kept) >= num_batches else None

    def state_dict(self) -> dict[str, Any]:
        """Return the batches, if a checkpoint can carry them: up to 16 MiB of tensors in plain containers."""
        size = sum(t.numel() * t.element_size() for kept in self._kept for t in tensors_of(kept.batch))
        portable = size <= _CHECKPOINT_LIMIT and all(_is_plain(kept.batch) for kept in self._kept)
        return {"batches": [(kept.batch, kept.batch_idx) for kept in self._kept] if portable else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the batches of the run that is resumed, or note that it could not pass them on."""
        if state["batches"] is None:
            self.lost_on_resume = True
        else:
            self._kept = [FrozenBatch(batch, batch_idx) for batch, batch_idx in state["batches"]]


def batches_of_loader(
    trainer: pl.Trainer, loader: Iterable[Any], num_batches: int, at_least: int | None = None
) -> list[FrozenBatch]:
    """Return the first batches of a loader, with the module's transfer hooks applied, on the CPU.

    Args:
        trainer: Whose hooks they are.
        loader: Where they come from.
        num_batches: How many.
        at_least: Instead of `num_batches`: as many as hold so many samples, or all there are.

    Raises:
        ValueError: If the loader has none.
    """
    batches: list[FrozenBatch] = []
    seen = 0
    for batch_idx, batch in enumerate(itertools.islice(loader, None if at_least else num_batches)):
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        batches.append(FrozenBatch(move_data_to_device(copied(batch), "cpu"), batch_idx))
        seen += num_samples(batch)
        if at_least and seen >= at_least:
            break
    if not batches:
        raise ValueError("the loader that data= names has no batch; pass one that yields at least one.")
    return batches


def second_loader(trainer: pl.Trainer, data: str, seed: int) -> DataLoader[Any]:
    """Return a loader over the set that "train" or "val" reads, or what its SubsetRandomSampler draws, shuffled anew.

    Iterating the trainer's loader again would move its generator, and with persistent workers restart the epoch.

    Raises:
        ValueError: If the trainer does not read one map-style DataLoader there.
    """
    loader = _own_loader(trainer, data)
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        source = loader.dataset if isinstance(loader, DataLoader) else loader
        raise ValueError(
            f"data={data!r} needs a torch DataLoader over a map-style dataset, and the trainer reads a "
            f"{type(source).__name__}; pass a DataLoader of your own as data=, or use data='fixed'."
        )
    if not len(loader.dataset):  # pyright: ignore[reportArgumentType]
        raise ValueError(f"data={data!r}, and the data set that is read there is empty; pass a DataLoader of your own.")
    if loader.batch_size is None:
        raise ValueError(f"data={data!r} needs a loader with a batch_size; pass a DataLoader of your own as data=.")
    generator = torch.Generator().manual_seed(seed)
    if isinstance(loader.sampler, SubsetRandomSampler):
        sampler = SubsetRandomSampler(loader.sampler.indices, generator)
    else:
        sampler = RandomSampler(loader.dataset, generator=generator)  # pyright: ignore[reportArgumentType]
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=sampler,
        collate_fn=loader.collate_fn,
        generator=generator,
    )


def _own_loader(trainer: pl.Trainer, data: str) -> Any:
    """Return what the trainer reads to train or validate; of a single validation loader in a list that loader."""
    if data == "train":
        return trainer.train_dataloader
    loaders: Any = trainer.val_dataloaders
    if loaders is None:
        raise ValueError("data='val', and nothing validates in this run; use data='train', or pass a DataLoader.")
    return loaders[0] if isinstance(loaders, (list, tuple)) and len(loaders) == 1 else loaders


def load_batches(
    trainer: pl.Trainer, data: Data, num_batches: int, seed: int, *, at_least: int | None = None
) -> list[FrozenBatch]:
    """Return batches of a second loader, and leave training's own as it is, random numbers of its data set included.

    Args:
        trainer: That trains.
        data: Where they come from.
        num_batches: How many.
        seed: Of their order.
        at_least: Instead of `num_batches`: as many as hold so many samples, or all there are.

    Raises:
        ValueError: If the data cannot be read without disturbing training.
    """
    training = trainer.train_dataloader
    if isinstance(data, DataLoader) and data is training and data.persistent_workers:
        raise ValueError(
            "the loader given as data= is the one that training reads, and its persistent_workers would start the "
            "epoch over; pass a second DataLoader, or data='train'."
        )
    source = data if isinstance(data, DataLoader) else _own_loader(trainer, data)
    loaders = [loader for loader in (training, source) if isinstance(loader, DataLoader)]
    datamodule: object = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
    with undisturbed(trainer.lightning_module, also=[*loaders, datamodule]):
        seed_generators(seed)
        loader = data if isinstance(data, DataLoader) else second_loader(trainer, data, seed)
        return batches_of_loader(trainer, loader, num_batches, at_least)


def _is_plain(value: Any) -> bool:
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, value.values()))
    return type(value) in (Tensor, int, float, bool, str, type(None))

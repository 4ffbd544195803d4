"""How training draws its batches, as far as its DataLoader tells."""

from __future__ import annotations

import dataclasses

import lightning.pytorch as pl
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, SubsetRandomSampler

from spectral_callbacks.callbacks.batches import Data, second_loader


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How many samples an optimizer step sees, out of how many, and whether one can come twice; None where not known.

    Attributes:
        batch_size: B, with the batches that are accumulated.
        dataset_size: n.
        replacement: Whether the samples of a batch are drawn with replacement.
    """

    batch_size: int | None
    dataset_size: int | None
    replacement: bool | None

    def or_else(self, other: Sampling) -> Sampling:
        """Return this one, with what is not known taken from another.

        Example:
            >>> Sampling(1, None, None).or_else(Sampling(8, 100, False))
            Sampling(batch_size=1, dataset_size=100, replacement=False)
        """
        mine, others = dataclasses.asdict(self), dataclasses.asdict(other)
        return Sampling(**{name: others[name] if value is None else value for name, value in mine.items()})

    @property
    def unknown(self) -> list[str]:
        """The names of what is not known."""
        return [name for name, value in dataclasses.asdict(self).items() if value is None]


def sampling_of(trainer: pl.Trainer) -> Sampling:
    """Return how the trainer's DataLoader draws.

    A plain loader and a shuffled one tell everything. One with a sampler of the user's or an iterable dataset tells its
    batch size alone, several loaders side by side and what is no DataLoader nothing.
    """
    batches = _batches(trainer.train_dataloader)
    if batches is None:
        return Sampling(None, None, None)
    batch_size = batches.batch_size * trainer.accumulate_grad_batches
    size, replacement = _drawn_from(batches.sampler)
    if size is None:
        return Sampling(batch_size, None, None)
    if isinstance(batches.sampler, SequentialSampler):  # limit_train_batches leaves out the same samples every epoch
        size = int(min(size, batches.batch_size * trainer.num_training_batches))
    return Sampling(batch_size if replacement else min(batch_size, size), size, replacement)


def population(trainer: pl.Trainer, data: Data) -> int | None:
    """Return the number of samples that those of a diagnostic are drawn from without replacement; None if endless.

    Args:
        trainer: In a fit.
        data: The diagnostic's; the seed of a second loader makes no difference here.
    """
    if data in ("fixed", "current"):
        drawn = sampling_of(trainer)
        return drawn.dataset_size if drawn.replacement is False else None
    try:
        loader = data if isinstance(data, DataLoader) else second_loader(trainer, data, seed=0)
    except ValueError:  # loading will say why
        return None
    batches = _batches(loader)
    size, replacement = (None, None) if batches is None else _drawn_from(batches.sampler)
    return size if replacement is False else None


def _batches(loader: object) -> BatchSampler | None:
    batches = loader.batch_sampler if isinstance(loader, DataLoader) else None
    return batches if isinstance(batches, BatchSampler) else None


def _drawn_from(sampler: object) -> tuple[int, bool] | tuple[None, None]:
    """Return how many samples a sampler draws from, and whether with replacement; None where that is not known."""
    if isinstance(sampler, RandomSampler):
        return len(sampler.data_source), sampler.replacement
    if isinstance(sampler, (SequentialSampler, SubsetRandomSampler)):
        return len(sampler), False
    return None, None

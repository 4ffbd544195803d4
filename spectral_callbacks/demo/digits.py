"""Scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels that come with the package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from spectral_callbacks.demo.synthetic import data_generator

_NUM_IMAGES = 1797
_NUM_CLASSES = 10
_WHITEST = 16  # of the data set's pixels
_DARKEST = 0.1  # what a blank pixel is, for models of positive data

Pixels = Literal["standardized", "positive"]


class Samples(Dataset[tuple[Tensor, ...]]):
    """Inputs, targets and whatever else belongs to them, in memory; a batch is one indexing operation.

    Args:
        inputs: (n, ...).
        targets: (n,).
        more: (n, ...) each.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, *more: Tensor) -> None:
        self.tensors = (inputs, targets, *more)

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int | Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor[index] for tensor in self.tensors)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        """Return a whole batch; PyTorch's loader asks for it instead of collating single samples."""
        return self[torch.as_tensor(indices)]


def collated(batch: Any) -> Any:
    """Return a batch that its data set has put together already."""
    return batch


class DigitsDataModule(pl.LightningDataModule):
    """Handwritten digits, split at random, each pixel standardised by the training images or positive.

    Batches are `(images (n, 64) float32, classes (n,) int64)`. Nothing is downloaded.

    Args:
        batch_size: Images in a training batch; None or 0 for all of them in one, which is full-batch training.
        num_train: Training images; the rest of the 1,797 validates and tests.
        seed: Fixes the split, the order of the batches and the wrong labels.
        label_noise: Share of the training images whose class is replaced by one drawn at random, which is the true one
            in a tenth of them; drawn once, so that every epoch sees the same. Validation keeps the true classes.
        pixels: "standardized" by the training images, or "positive": from 0.1 for a blank pixel to 1.1.

    Raises:
        ValueError: If the sizes or the share are out of range, or the pixels are of neither kind.
        ModuleNotFoundError: On `setup`, if scikit-learn is missing.
    """

    def __init__(
        self,
        batch_size: int | None = 64,
        num_train: int = 1000,
        seed: int = 0,
        label_noise: float = 0.0,
        pixels: Pixels = "standardized",
    ) -> None:
        super().__init__()
        if not 0 < num_train < _NUM_IMAGES:
            raise ValueError(f"num_train={num_train!r} must lie between 1 and {_NUM_IMAGES - 1}: the rest validates.")
        if batch_size is not None and batch_size < 0:
            raise ValueError(f"batch_size={batch_size!r} must be positive, or 0 for all images in one batch.")
        if not 0 <= label_noise <= 1:
            raise ValueError(f"label_noise={label_noise!r} is a share of the training images: it must lie in [0, 1].")
        if pixels not in get_args(Pixels):
            raise ValueError(f"pixels={pixels!r} must be one of {', '.join(map(repr, get_args(Pixels)))}.")
        self.batch_size = batch_size or num_train
        self.num_train = num_train
        self.seed = seed
        self.label_noise = label_noise
        self.pixels = pixels

    def setup(self, stage: str) -> None:
        """Load, split and scale."""
        images, classes = _load()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))
        train, val = order[: self.num_train], order[self.num_train :]
        if self.pixels == "positive":
            images = images / _WHITEST + _DARKEST
        else:
            deviation, mean = torch.std_mean(images[train], dim=0, correction=0)
            images = (images - mean) / torch.where(deviation > 0, deviation, 1)  # some pixels of the rim are blank
        self._train = Samples(images[train], self._noisy(classes[train]))
        self._val = Samples(images[val], classes[val])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the training batches, shuffled by a generator of their own unless there is only one."""
        return DataLoader(
            self._train,
            batch_size=self.batch_size,
            shuffle=self.batch_size < self.num_train,
            generator=torch.Generator().manual_seed(self.seed),
            collate_fn=collated,
        )

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the images that were not trained on, in one batch."""
        return DataLoader(self._val, batch_size=len(self._val), collate_fn=collated)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the validation images."""
        return self.val_dataloader()

    def _noisy(self, classes: Tensor) -> Tensor:
        """Return the classes with a share of them drawn anew; more noise is the same noise and more of it."""
        generator = data_generator(self.seed)
        chosen = torch.randperm(len(classes), generator=generator)[: round(self.label_noise * len(classes))]
        drawn = torch.randint(_NUM_CLASSES, (len(classes),), generator=generator)
        return classes.index_copy(0, chosen, drawn[chosen])


def _load() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "DigitsDataModule reads scikit-learn's digits, and scikit-learn is not installed: "
            "pip install 'spectral-callbacks[demo]'"
        ) from error
    images, classes = load_digits(return_X_y=True)
    return torch.as_tensor(images, dtype=torch.float32), torch.as_tensor(classes, dtype=torch.int64)

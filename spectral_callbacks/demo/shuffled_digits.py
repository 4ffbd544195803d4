"""Digits whose labels say nothing of the images: a network can memorise them and cannot learn."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_callbacks.demo.digits import DigitsDataModule, Pixels, Samples
from spectral_callbacks.demo.synthetic import data_generator


class ShuffledDigitsDataModule(DigitsDataModule):
    """Handwritten digits with their labels shuffled, in training and in validation, each among themselves.

    Batches are `(images (n, 64) float32, labels (n,) int64, true labels (n,) int64)`. Every label is as frequent as
    before. Training sees the first two; the third is there for a diagnostic that asks what the network knows of what it
    was not told. Nothing is downloaded.

    Args:
        batch_size: Images in a training batch; None or 0 for all of them in one.
        num_train: Training images; the rest of the 1,797 validates and tests.
        seed: Fixes the split, the order of the batches and the shuffled labels.
        shuffle_labels: Whether the labels are shuffled; otherwise they are the true ones, for comparison.
        pixels: As for `DigitsDataModule`.

    Raises:
        ValueError: If the sizes are out of range, or the pixels are of neither kind.
        ModuleNotFoundError: On `setup`, if scikit-learn is missing.

    Example:
        >>> data = ShuffledDigitsDataModule(batch_size=0)
        >>> data.setup("fit")
        >>> images, labels, true_labels = next(iter(data.train_dataloader()))
        >>> bool((labels.bincount() == true_labels.bincount()).all()), bool((labels == true_labels).all())
        (True, False)
    """

    def __init__(
        self,
        batch_size: int | None = 64,
        num_train: int = 1000,
        seed: int = 0,
        shuffle_labels: bool = True,
        pixels: Pixels = "standardized",
    ) -> None:
        super().__init__(batch_size, num_train, seed, pixels=pixels)
        self.shuffle_labels = shuffle_labels

    def setup(self, stage: str) -> None:
        """Load, split, scale and shuffle."""
        super().setup(stage)
        generator = data_generator(self.seed)
        self._train = self._shuffled(self._train, generator)
        self._val = self._shuffled(self._val, generator)

    def _shuffled(self, samples: Samples, generator: torch.Generator) -> Samples:
        images, true_labels = samples.tensors
        order = torch.randperm(len(true_labels), generator=generator)
        labels: Tensor = true_labels[order] if self.shuffle_labels else true_labels
        return Samples(images, labels, true_labels)

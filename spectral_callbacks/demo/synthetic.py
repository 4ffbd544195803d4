"""Synthetic data: drawn from a stream of their own, and small enough to be one batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

_STREAM = 1 << 31  # CPU generators read the lower 32 bits of a seed


def data_generator(seed: int) -> torch.Generator:
    """Return a generator whose numbers are not those of the global one, or of a model's, under the same seed.

    The weights of a model drawn after `seed_everything(seed)` would otherwise depend on the inputs.

    Example:
        >>> torch.rand(2, generator=data_generator(0)), torch.rand(2, generator=torch.Generator().manual_seed(0))
        (tensor([0.9127, 0.8284]), tensor([0.4963, 0.7682]))
    """
    return torch.Generator().manual_seed(_STREAM + seed)


class WholeBatch(Dataset[tuple[Tensor, Tensor]]):
    """All samples as one batch, so many times an epoch.

    Lightning spends more time on an epoch than a small model on a step, and validates at the end of epochs only.

    Args:
        inputs: (n, ...).
        targets: (n, ...).
        steps_per_epoch: How often an epoch repeats the batch.

    Raises:
        ValueError: If an epoch has no step.

    Example:
        >>> len(list(WholeBatch(torch.zeros(5, 2), torch.zeros(5), steps_per_epoch=3).loader()))
        3
    """

    def __init__(self, inputs: Tensor, targets: Tensor, steps_per_epoch: int = 1) -> None:
        if steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch={steps_per_epoch!r} must be at least 1.")
        self._batch = inputs, targets
        self._steps_per_epoch = steps_per_epoch

    def __len__(self) -> int:
        return self._steps_per_epoch

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._batch

    def loader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return a loader of these batches; its generator is never drawn from, but the global one would be."""
        return DataLoader(self, batch_size=None, generator=torch.Generator())

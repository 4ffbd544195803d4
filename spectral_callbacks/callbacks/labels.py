"""Labels: which class each sample of a batch belongs to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from spectral_callbacks.callbacks.batch_entries import BatchEntry
from spectral_callbacks.probe import num_samples

LabelSource = int | str | Callable[[Any], Tensor]


class Labels:
    """Finds the labels of batches.

    Args:
        source: Key or index of the labels in the batch; a function batch -> (N,) integers; or the dotted path of such
            a function, which is a string with a dot in it.

    Raises:
        ValueError: If it is none of these.

    Example:
        >>> batch = [torch.zeros(3, 2), torch.tensor([1, 0, 1])]
        >>> Labels(1)([batch])
        tensor([1, 0, 1])
        >>> Labels(lambda batch: batch[1] % 2)([batch, batch])
        tensor([1, 0, 1, 1, 0, 1])
    """

    def __init__(self, source: LabelSource) -> None:
        self._entry = BatchEntry(source, "labels", "(N,) integers")

    def __call__(self, batches: Sequence[Any]) -> Tensor:  # (N,), int64, on the CPU
        """Return the labels of all samples of the batches, in order.

        Raises:
            ValueError: If a batch has none, or not an integer for each of its samples, or a function fails.
        """
        return torch.cat([self._checked(self._entry(batch), num_samples(batch)) for batch in batches])

    def _checked(self, labels: Any, size: int) -> Tensor:
        is_list = isinstance(labels, (list, tuple)) and all(isinstance(label, int) for label in labels)
        if is_list and any(abs(label) >= 2**63 for label in labels):
            raise ValueError(
                f"{self._entry} gives numbers for a batch of {size} samples that no int64 can hold; number "
                "the classes from 0."
            )
        found = torch.tensor(labels) if is_list else labels if isinstance(labels, Tensor) else None
        if found is None or found.shape != (size,) or found.is_floating_point() or found.is_complex():
            what = type(labels).__name__ if found is None else f"shape {tuple(found.shape)} and type {found.dtype}"
            raise ValueError(
                f"{self._entry} gives {what} for a batch of {size} samples; it must give an integer for each."
            )
        return found.detach().to("cpu", torch.int64)

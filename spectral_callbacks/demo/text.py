"""The text that comes with Python: the topics of its interactive help, byte by byte."""

from __future__ import annotations

from collections.abc import Sequence
from pydoc_data.topics import topics

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from spectral_callbacks.demo.digits import collated
from spectral_callbacks.demo.synthetic import data_generator

NUM_TOKENS = 256  # the values of a byte
_BETWEEN = "\n\n"  # paragraphs
_HELD_OUT = slice(2, None, 5)  # of the topics, from the longest down


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of a text and, as targets, the same windows one token later; a batch is one indexing operation.

    Args:
        tokens: The text, (N,) uint8.
        starts: Where windows begin, (n,) int64.
        context: Tokens of a window, T.

    Example:
        >>> windows = Windows(torch.arange(5, dtype=torch.uint8), torch.arange(3), context=2)
        >>> windows[1]
        (tensor([1, 2]), tensor([2, 3]))
    """

    def __init__(self, tokens: Tensor, starts: Tensor, context: int) -> None:
        self.tokens = tokens
        self.starts = starts
        self.offsets = torch.arange(context + 1)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int | Tensor) -> tuple[Tensor, Tensor]:
        chosen = self.tokens[self.starts[index, None] + self.offsets].long()
        return chosen[..., :-1], chosen[..., 1:]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return a whole batch, (n, T) and (n, T)."""
        return self[torch.as_tensor(indices)]


class TopicsDataModule(pl.LightningDataModule):
    """The texts of `pydoc_data.topics`, some 370 kB on Python that come with it, for a model of bytes.

    Batches are `(inputs (n, context) int64, targets (n, context) int64)`, tokens from 0 to 255, the targets one byte
    behind. Training windows are drawn at random, with repetition, from four fifths of the topics; validation windows
    lie evenly spread over the others. A paragraph that several topics have in common is kept in the longest one only.
    Nothing is downloaded. The text differs a little between versions of Python.

    Args:
        batch_size: Windows in a training batch.
        context: Bytes of a window.
        num_val: Validation windows; 1,024 windows of 64 bytes hardly overlap.
        steps_per_epoch: Batches that make an epoch; validation follows an epoch.
        seed: Fixes which windows are drawn.

    Raises:
        ValueError: If a size is not positive, or the context longer than the text.

    Example:
        >>> data = TopicsDataModule(batch_size=4, context=16)
        >>> data.setup("fit")
        >>> inputs, targets = next(iter(data.train_dataloader()))
        >>> inputs.shape, bool((inputs[:, 1:] == targets[:, :-1]).all())
        (torch.Size([4, 16]), True)
    """

    def __init__(
        self,
        batch_size: int = 32,
        context: int = 64,
        num_val: int = 1024,
        steps_per_epoch: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = (("batch_size", batch_size), ("context", context), ("num_val", num_val))
        for name, size in (*sizes, ("steps_per_epoch", steps_per_epoch)):
            if size < 1:
                raise ValueError(f"{name}={size!r} must be at least 1.")
        self.batch_size = batch_size
        self.context = context
        self.num_val = num_val
        self.steps_per_epoch = steps_per_epoch
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Read the topics and divide them."""
        texts = _texts()
        val = _tokens(texts[_HELD_OUT])
        del texts[_HELD_OUT]
        train = _tokens(texts)
        shortest = min(len(train), len(val)) - 1  # a window needs the byte behind it
        if self.context > shortest:
            raise ValueError(f"context={self.context!r} is longer than the text: at most {shortest:,} bytes.")
        self._train = Windows(train, torch.arange(len(train) - self.context), self.context)
        spread = torch.linspace(0, len(val) - self.context - 1, self.num_val, dtype=torch.float64).long()
        self._val = Windows(val, spread, self.context)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return `steps_per_epoch` batches, drawn by a generator of their own."""
        generator = data_generator(self.seed)
        num_windows = self.batch_size * self.steps_per_epoch
        sampler = RandomSampler(self._train, replacement=True, num_samples=num_windows, generator=generator)
        return DataLoader(
            self._train, batch_size=self.batch_size, sampler=sampler, generator=generator, collate_fn=collated
        )

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the validation windows, 256 a batch."""
        return DataLoader(self._val, batch_size=256, collate_fn=collated, generator=torch.Generator())


def _texts() -> list[str]:
    """Return what each topic says that no longer one does, from the longest down."""
    seen: set[str] = set()
    texts = []
    for text in sorted(topics.values(), key=len, reverse=True):
        new = [paragraph for paragraph in text.strip().split(_BETWEEN) if paragraph not in seen]
        seen.update(new)
        texts.append(_BETWEEN.join(new))
    return texts


def _tokens(texts: Sequence[str]) -> Tensor:
    return torch.frombuffer(bytearray(_BETWEEN.join(texts).encode()), dtype=torch.uint8)

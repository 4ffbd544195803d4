"""The smallest model whose representation has phases: a table of representations, a linear head, and skewed classes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from spectral_callbacks.demo.synthetic import WholeBatch

_INIT_STD = 0.1
_LR = 0.5  # over √N, for the sum of the samples' losses


class PhaseToy(pl.LightningModule):
    """Free representations f_1 ... f_N of N samples in d dimensions and a linear head, trained by gradient descent.

    The inputs are one-hot, one for each sample, so that the weight of `encoder` holds the representations; `encoder`'s
    output on the one training batch is F, (N, d). What is minimised is the cross-entropy summed over all samples, with
    full-batch steps of 0.5 / √N, in float64, from entries of standard deviation 0.1. With fewer dimensions than classes
    the effective rank of F falls at first, while all samples follow the direction that learns fastest, and rises as the
    others come in (Li et al. 2025, arXiv:2509.23024). With skewed classes it then falls slowly again in some draws, by
    more than 0.01 in 3 % of 240. The module brings its data with it.

    Args:
        counts: Samples of each class.
        width: Length d of a representation.
        steps_per_epoch: Steps that make an epoch; `train/loss`, the mean over the samples, is logged after each.

    Raises:
        ValueError: If there are fewer than two classes, or a number is not positive.

    Example:
        >>> toy = PhaseToy(counts=[3, 2], width=2)
        >>> inputs, classes = next(iter(toy.train_dataloader()))
        >>> toy.encoder(inputs).shape, classes.tolist()
        (torch.Size([5, 2]), [0, 0, 0, 1, 1])
    """

    def __init__(
        self,
        counts: Sequence[int] = (40, 20, 13, 10, 8, 7, 6, 5),
        width: int = 3,
        steps_per_epoch: int = 100,
    ) -> None:
        super().__init__()
        if len(counts) < 2 or min(counts) < 1:
            raise ValueError(f"counts={list(counts)!r} must name two classes or more, each with a sample at least.")
        if width < 1:
            raise ValueError(f"width={width!r} must be at least 1.")
        self.save_hyperparameters()
        self.counts = torch.tensor(counts)
        self.steps_per_epoch = steps_per_epoch
        self.num_samples = int(self.counts.sum())
        self.encoder = nn.Linear(self.num_samples, width, bias=False, dtype=torch.float64)
        self.head = nn.Linear(width, len(counts), bias=False, dtype=torch.float64)
        for layer in (self.encoder, self.head):
            nn.init.normal_(layer.weight, std=_INIT_STD)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the scores, (n, N) -> (n, classes)."""
        return self.head(self.encoder(inputs))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the summed loss; log its mean at the end of an epoch."""
        inputs, classes = batch
        loss = F.cross_entropy(self(inputs), classes, reduction="sum")
        if self.trainer.is_last_batch:
            self.log("train/loss", loss / self.num_samples, batch_size=1)
        return loss

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return all samples as one batch, `steps_per_epoch` times."""
        classes = torch.repeat_interleave(torch.arange(len(self.counts)), self.counts)
        return WholeBatch(torch.eye(self.num_samples, dtype=torch.float64), classes, self.steps_per_epoch).loader()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=_LR / math.sqrt(self.num_samples))

"""Gaussian clusters, whose number shows in the spectrum of the Hessian."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from spectral_callbacks.demo.synthetic import WholeBatch, data_generator


class ClustersDataModule(pl.LightningDataModule):
    """Gaussian clusters of unit variance around orthogonal means, to be told apart.

    A network that has begun to separate k clusters has k (k - 1) / 2 eigenvalues of the Hessian above the rest, one for
    every pair, the first k - 1 of them larger than the others. They follow the number of clusters and how well these
    are separated, while the rest follows the number of parameters (Sagun et al. 2017, arXiv:1706.04454). Batches are
    `(inputs (n, num_features) float32, clusters (n,) int64)`, the clusters equally large to within one sample, and
    training is full-batch.

    Args:
        num_clusters: Number k of clusters, and of classes.
        separation: Norm of each mean; two means lie √2 times this apart.
        num_features: Length of an input, at least k.
        num_train: Training samples.
        num_val: Validation samples.
        steps_per_epoch: Steps on the whole training set that make an epoch; validation follows an epoch.
        seed: Fixes the means and the samples.

    Raises:
        ValueError: If the sizes do not fit.

    Example:
        >>> data = ClustersDataModule(num_clusters=4)
        >>> data.setup("fit")
        >>> inputs, clusters = next(iter(data.train_dataloader()))
        >>> inputs.shape, clusters.bincount().tolist()
        (torch.Size([1000, 20]), [250, 250, 250, 250])
    """

    def __init__(
        self,
        num_clusters: int = 3,
        separation: float = 2.0,
        num_features: int = 20,
        num_train: int = 1000,
        num_val: int = 1000,
        steps_per_epoch: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 2 <= num_clusters <= num_features:
            raise ValueError(
                f"num_clusters={num_clusters!r} must lie between 2 and num_features={num_features!r}: the means are "
                "orthogonal."
            )
        if separation < 0:
            raise ValueError(f"separation={separation!r} is a length: it must not be negative. 0 is one cluster.")
        for name, size in (("num_train", num_train), ("num_val", num_val)):
            if size < num_clusters:
                raise ValueError(f"{name}={size!r} must be at least num_clusters={num_clusters!r}.")
        if steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch={steps_per_epoch!r} must be at least 1.")
        self.num_clusters = num_clusters
        self.separation = separation
        self.num_features = num_features
        self.num_train = num_train
        self.num_val = num_val
        self.steps_per_epoch = steps_per_epoch
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Draw the means and the samples."""
        generator = data_generator(self.seed)
        square = torch.randn(self.num_features, self.num_features, generator=generator)
        means = self.separation * torch.linalg.qr(square).Q[: self.num_clusters]
        self._train = self._draw(self.num_train, means, generator)
        self._val = self._draw(self.num_val, means, generator)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the whole training set, `steps_per_epoch` times."""
        return WholeBatch(*self._train, self.steps_per_epoch).loader()

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the validation samples in one batch."""
        return WholeBatch(*self._val).loader()

    def _draw(self, num_samples: int, means: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        clusters = torch.arange(num_samples) % self.num_clusters
        return means[clusters] + torch.randn(num_samples, self.num_features, generator=generator), clusters

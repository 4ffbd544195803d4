"""A regression problem small enough to be fitted exactly, and a network that does."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

_FALLBACK_LR = 0.1


class Regressor(pl.LightningModule):
    """A tanh network of one hidden layer with one output, in float64; logs half its mean squared error as `train/loss`.

    The loss 1/(2n) Σ (f_i - y_i)² has the Gauss-Newton matrix 1/n Σ ∇f_i ∇f_iᵀ, the setting of the theory of SGD's
    stability.

    Args:
        width: Number of hidden units.
        num_inputs: Length of an input vector.

    Example:
        >>> Regressor()(torch.zeros(4, 5, dtype=torch.float64)).shape
        torch.Size([4])
    """

    def __init__(self, width: int = 30, num_inputs: int = 5) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(num_inputs, width), nn.Tanh(), nn.Linear(width, 1)).double()

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of a batch, (n, inputs) -> (n,)."""
        return self.net(x).squeeze(1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return self._evaluate(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss of a batch."""
        self._evaluate(batch, "val")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD with learning rate 0.1; the `optimizer` section of a config takes its place."""
        return torch.optim.SGD(self.parameters(), lr=_FALLBACK_LR)

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        x, y = batch
        loss = (self(x) - y).square().mean() / 2
        self.log(f"{stage}/loss", loss, batch_size=len(y))
        return loss


class RegressionDataModule(pl.LightningDataModule):
    """Gaussian inputs x with the targets sin(x_1) + x_2 / 2, without noise, in float64.

    Args:
        batch_size: Samples in a training batch; 0 for all of them in one, which is full-batch training.
        num_samples: Training samples; the network of `Regressor` fits twenty exactly.
        num_inputs: Length of an input vector, at least 2.
        seed: Fixes the samples and the order of the batches.

    Raises:
        ValueError: If the sizes are out of range.
    """

    def __init__(self, batch_size: int = 1, num_samples: int = 20, num_inputs: int = 5, seed: int = 0) -> None:
        super().__init__()
        if num_samples < 1 or num_inputs < 2:
            raise ValueError(
                f"num_samples={num_samples!r} must be at least 1, and num_inputs={num_inputs!r} at least 2, on which "
                "the target depends."
            )
        if not 0 <= batch_size <= num_samples:
            raise ValueError(
                f"batch_size={batch_size!r} must lie between 1 and num_samples={num_samples}, or be 0 for all samples."
            )
        self.batch_size = batch_size or num_samples
        self.num_samples = num_samples
        self.num_inputs = num_inputs
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Draw the samples, training samples first."""
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(2 * self.num_samples, self.num_inputs, dtype=torch.float64, generator=generator)
        y = x[:, 0].sin() + x[:, 1] / 2
        self._train = TensorDataset(x[: self.num_samples], y[: self.num_samples])
        self._val = TensorDataset(x[self.num_samples :], y[self.num_samples :])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the training batches, shuffled by a generator of their own unless there is only one."""
        return DataLoader(
            self._train,
            batch_size=self.batch_size,
            shuffle=self.batch_size < self.num_samples,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return as many samples again that are not trained on, in one batch."""
        return DataLoader(self._val, batch_size=self.num_samples)

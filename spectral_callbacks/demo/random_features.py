"""Random ReLU features with a trained linear readout: double descent in the number of features."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from spectral_callbacks.demo.synthetic import WholeBatch, data_generator


class NoisyLinearDataModule(pl.LightningDataModule):
    """A linear function of Gaussian inputs, to be learned from noisy values.

    Inputs are x ~ N(0, I), targets wᵀx with a random w of norm 1. The training targets carry Gaussian noise; the
    validation targets do not, so that the validation loss is the excess risk. Training is full-batch.

    Args:
        num_train: Training samples.
        num_val: Validation samples.
        num_features: Length of an input.
        noise: Standard deviation of the noise on the training targets.
        steps_per_epoch: Steps on the whole training set that make an epoch; validation follows an epoch.
        seed: Fixes w, the inputs and the noise.

    Raises:
        ValueError: If a size is not positive, or the noise is negative.

    Example:
        >>> data = NoisyLinearDataModule(num_train=50)
        >>> data.setup("fit")
        >>> [tuple(tensor.shape) for tensor in next(iter(data.train_dataloader()))]
        [(50, 20), (50,)]
    """

    def __init__(
        self,
        num_train: int = 100,
        num_val: int = 1000,
        num_features: int = 20,
        noise: float = 0.3,
        steps_per_epoch: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, size in (
            ("num_train", num_train),
            ("num_val", num_val),
            ("num_features", num_features),
            ("steps_per_epoch", steps_per_epoch),
        ):
            if size < 1:
                raise ValueError(f"{name}={size!r} must be at least 1.")
        if noise < 0:
            raise ValueError(f"noise={noise!r} is a standard deviation: it must not be negative. 0 is none.")
        self.num_train = num_train
        self.num_val = num_val
        self.num_features = num_features
        self.noise = noise
        self.steps_per_epoch = steps_per_epoch
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Draw the samples."""
        generator = data_generator(self.seed)
        w = torch.randn(self.num_features, generator=generator)
        inputs = torch.randn(self.num_train + self.num_val, self.num_features, generator=generator)
        targets = inputs @ (w / w.norm())
        noise = self.noise * torch.randn(self.num_train, generator=generator)
        self._train = inputs[: self.num_train], targets[: self.num_train] + noise
        self._val = inputs[self.num_train :], targets[self.num_train :]

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the whole training set, `steps_per_epoch` times."""
        return WholeBatch(*self._train, self.steps_per_epoch).loader()

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the validation samples, with targets free of noise, in one batch."""
        return WholeBatch(*self._val).loader()


class RandomReLU(nn.Module):
    """φ(x) = max(0, W x) / √width with fixed Gaussian W, whose rows have an expected square norm of 1.

    Args:
        width: Number p of features.
        num_features: Length d of an input.
    """

    weight: Tensor

    def __init__(self, width: int, num_features: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(width, num_features) / math.sqrt(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of a batch, (n, d) -> (n, p)."""
        return F.linear(x, self.weight).relu() / math.sqrt(len(self.weight))


class RandomFeatures(pl.LightningModule):
    """Least squares on fixed random ReLU features, by gradient descent from zero.

    The loss is mean square error, its Hessian 2/n ZᵀZ for the n × p matrix Z of the training features. With singular
    values s of Z, T steps at `relative_lr=1` leave (1 - s²/s₁²)ᵀ of each mode unfitted, so that a mode is fitted once T
    exceeds the square of its condition number s₁/s. The smallest s, and with it the noise that is fitted, decides about
    the test error: its peak at p = n appears only where gradient descent ran long enough to reach that mode
    (Liu and Flanigan 2023, arXiv:2312.03951).

    Logs `val/loss`, and `train/loss` at an epoch's last step. Train in double precision (`precision: 64-true`): at
    p = n the condition number of the Hessian is the square of a few thousand.

    Args:
        width: Number p of features.
        num_features: Length d of an input.
        relative_lr: Learning rate times the largest eigenvalue of the Hessian; 2 is the edge of stability.

    Raises:
        ValueError: If an argument is not positive.

    Example:
        >>> RandomFeatures(width=50)(torch.zeros(5, 20)).shape
        torch.Size([5])
    """

    def __init__(self, width: int = 100, num_features: int = 20, relative_lr: float = 1.0) -> None:
        super().__init__()
        for name, value in (("width", width), ("num_features", num_features), ("relative_lr", relative_lr)):
            if value <= 0:
                raise ValueError(f"{name}={value!r} must be positive.")
        self.save_hyperparameters()
        self.relative_lr = relative_lr
        self.features = RandomReLU(width, num_features)
        self.readout = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.readout.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the predictions of a batch, (n, d) -> (n,)."""
        return self.readout(self.features(x)).squeeze(1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch; log that of an epoch's last, for logging takes longer than a step."""
        loss = self._loss(batch)
        if self.trainer.is_last_batch:
            self.log("train/loss", loss, batch_size=len(batch[1]))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss of a batch."""
        self.log("val/loss", self._loss(batch), batch_size=len(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD at `relative_lr` over the largest eigenvalue of the Hessian on the first training batch."""
        data: pl.LightningDataModule | None = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if data is None:
            raise ValueError(
                "RandomFeatures sets its learning rate by its training data and finds none: trainer.datamodule is "
                "None. Train it with a LightningDataModule."
            )
        x, _ = next(iter(data.train_dataloader()))
        Z = self.features(x.to(self.features.weight))
        largest = 2 * torch.linalg.matrix_norm(Z, 2).item() ** 2 / len(Z)
        return torch.optim.SGD(self.parameters(), lr=self.relative_lr / largest)

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.mse_loss(self(x), y)

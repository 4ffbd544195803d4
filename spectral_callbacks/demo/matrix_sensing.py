"""Matrix sensing: a low-rank matrix learned through two factors that are wider than they need be."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from spectral_callbacks.demo.synthetic import WholeBatch, data_generator
from spectral_callbacks.init import rebalance_layers_

_SECOND_SCALE = 1 / 3  # of the other factor at initialisation, in the experiments of arXiv:2310.01769


class LowRankDataModule(pl.LightningDataModule):
    """A random matrix M of some rank with singular values 1, seen whole or through Gaussian measurements.

    M = U Vᵀ with orthonormal columns, symmetric with V = U. Measurement i is y_i = ⟨A_i, M⟩ with independent standard
    normal entries in A_i, divided by the square root of their number, so that Σ y_i² is ‖M‖² on average.

    Args:
        size: Rows and columns of M.
        rank: Of M.
        symmetric: Whether M is symmetric and positive semi-definite.
        num_measurements: How many; 0 to see M itself.
        steps_per_epoch: Steps on all measurements that make an epoch.
        seed: Fixes M and the measurements.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> data = LowRankDataModule(size=6, rank=2)
        >>> data.setup("fit")
        >>> torch.linalg.matrix_rank(next(iter(data.train_dataloader()))[1]).item()
        2
    """

    def __init__(
        self,
        size: int = 50,
        rank: int = 3,
        symmetric: bool = False,
        num_measurements: int = 0,
        steps_per_epoch: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 1 <= rank <= size:
            raise ValueError(f"rank={rank!r} must lie between 1 and size={size!r}.")
        if num_measurements < 0:
            raise ValueError(f"num_measurements={num_measurements!r} must not be negative; 0 is the matrix itself.")
        self.size = size
        self.rank = rank
        self.symmetric = symmetric
        self.num_measurements = num_measurements
        self.steps_per_epoch = steps_per_epoch
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Draw the matrix, and the measurements."""
        generator = data_generator(self.seed)
        U, V = (
            torch.linalg.qr(torch.randn(self.size, self.rank, dtype=torch.float64, generator=generator)).Q
            for _ in range(2)
        )
        self.target = U @ (U if self.symmetric else V).T
        if self.num_measurements:
            shape = self.num_measurements, self.size, self.size
            sensors = torch.randn(shape, dtype=torch.float64, generator=generator) / math.sqrt(self.num_measurements)
        else:
            sensors = torch.ones(self.size, self.size, dtype=torch.float64)
        self.sensors = sensors

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return sensors and what they see, `steps_per_epoch` times."""
        seen = sensed(self.sensors, self.target)
        return WholeBatch(self.sensors, seen, self.steps_per_epoch).loader()


def sensed(
    sensors: Tensor,  # (N, m, n) or (m, n)
    W: Tensor,  # (m, n)
) -> Tensor:  # (N,) or (m, n)
    """Return ⟨A_i, W⟩ for each of several sensors; of a single one, the entries of A ⊙ W apart.

    Example:
        >>> sensed(torch.ones(1, 2, 2), torch.eye(2))
        tensor([2.])
    """
    return sensors * W if sensors.ndim == 2 else torch.tensordot(sensors, W, dims=2)


class MatrixSensing(pl.LightningModule):
    """W = F Gᵀ, or the symmetric X Xᵀ, fitted to a low-rank matrix by gradient descent, in float64.

    With more columns than the rank of the target the excess converges slowly: late in training, symmetric factors leave
    a loss of (k - r) / (4 η² t²) after t steps (within 1 % from t = 3,000 on at alpha 1, within 5 % at t = 10,000 at
    0.1); those of different scales alpha and alpha / 3 converge exponentially, at a rate of η alpha² (Xiong et al.
    2024, arXiv:2310.01769). One rebalancing step near the solution makes that rate η beta².

    F is the weight of the layer `second`, Gᵀ that of `first`, as in LoRA; X is the one of both. Logs `train/loss` =
    ‖A(W) - y‖², the square error of the measurements. What is minimised is half of it, or a quarter for symmetric
    factors, so that their gradients are E G, Eᵀ F and E X with E the residual sent back through the measurements.

    Args:
        size: Rows and columns of W.
        width: Columns k of the factors.
        symmetric: Whether W = X Xᵀ.
        alpha: Scale of F, or X, at initialisation; its entries are N(0, alpha² / size), those of G a third of that.
        lr: Learning rate η; it is stable below 1 for singular values of 1.
        rebalance_at: Step before which F is made orthogonal, once; never if left out.
        beta: Singular values of F behind that.

    Raises:
        ValueError: If a number is out of its range, or symmetric factors are to be rebalanced.

    Example:
        >>> MatrixSensing(size=6, width=4)().shape
        torch.Size([6, 6])
    """

    def __init__(
        self,
        size: int = 50,
        width: int = 5,
        symmetric: bool = False,
        alpha: float = 0.1,
        lr: float = 0.2,
        rebalance_at: int | None = None,
        beta: float = 1.0,
    ) -> None:
        super().__init__()
        for name, value in (("size", size), ("width", width), ("alpha", alpha), ("lr", lr), ("beta", beta)):
            if value <= 0:
                raise ValueError(f"{name}={value!r} must be positive.")
        if symmetric and rebalance_at is not None:
            raise ValueError("rebalance_at goes with two factors: X Xᵀ is balanced by its form. Leave out symmetric.")
        self.save_hyperparameters()
        self.symmetric = symmetric
        self.lr = lr
        self.rebalance_at = rebalance_at
        self.beta = beta
        scale = alpha / math.sqrt(size)
        self.second = nn.Linear(width, size, bias=False, dtype=torch.float64)
        nn.init.normal_(self.second.weight, std=scale)
        self.first = self.second
        if not symmetric:
            self.first = nn.Linear(size, width, bias=False, dtype=torch.float64)
            nn.init.normal_(self.first.weight, std=scale * _SECOND_SCALE)

    def forward(self) -> Tensor:  # (m, n)
        """Return W."""
        F, G = self.second.weight, self.first.weight if self.symmetric else self.first.weight.T
        return F @ G.T

    def error(self, batch: tuple[Tensor, Tensor]) -> Tensor:  # ()
        """Return ‖A(W) - y‖² for sensors A and what they see of the target, y."""
        sensors, seen = batch
        return (sensed(sensors, self()) - seen).square().sum()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss that is minimised; log the square error at the end of an epoch."""
        error = self.error(batch)
        if self.trainer.is_last_batch:
            self.log("train/loss", error, batch_size=1)
        return error / (4 if self.symmetric else 2)

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Rebalance the factors when it is time."""
        if self.global_step == self.rebalance_at:
            rebalance_layers_(self.first, self.second, self.beta)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=self.lr)

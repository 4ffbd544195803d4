"""A generative model of positive data, whose samples are drawn by steps that multiply."""

from __future__ import annotations

import math
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor

from spectral_callbacks.demo.score_network import ScoreNetwork
from spectral_callbacks.optim.multiplicative_langevin import reverse_diffusion
from spectral_callbacks.optim.score_matching import multiplicative_score_matching_loss

_MEAN_LOG_SCALE = -1.2 + math.log(2)  # of the s that training draws, in deviations of the data: theirs was 1/2
_STD_LOG_SCALE = 1.2
_RHO = 7.0  # curvature of the sampler's schedule; all three: Karras et al. 2022, arXiv:2206.00364, table 1


class MultiplicativeDiffusion(pl.LightningModule):
    """Learns the score of positive data under multiplicative noise, x₀ exp(s z); logs its loss as `train/loss`.

    Trains a `ScoreNetwork` by multiplicative denoising score matching with s log-normal, under AdamW with a cosine
    schedule, and samples by the reverse diffusion from an average of its weights over the last steps. Loss and sampler:
    Dale meets Langevin, arXiv:2510.02730.

    Args:
        num_features: Length of a sample.
        width: Units of a hidden layer.
        num_blocks: Residual blocks.
        lr: Learning rate of AdamW at the start; it falls to 0 along a cosine.
        ema: Decay of the averaged weights, one step.
        noise_scales: Smallest and largest s, in deviations of ln x₀.
        num_steps: Steps of the sampler.

    Example:
        >>> model = MultiplicativeDiffusion(num_features=4, width=8)
        >>> samples = model.sample(3, generator=torch.Generator().manual_seed(0))
        >>> samples.shape, bool((samples > 0).all())
        (torch.Size([3, 4]), True)
    """

    def __init__(
        self,
        num_features: int = 64,
        width: int = 256,
        num_blocks: int = 4,
        lr: float = 1e-3,
        ema: float = 0.999,
        noise_scales: tuple[float, float] = (0.05, 8.0),
        num_steps: int = 200,
    ) -> None:
        super().__init__()
        if not 0 < noise_scales[0] < noise_scales[1]:
            raise ValueError(f"noise_scales={noise_scales!r} must be positive, the smallest before the largest.")
        if not 0 <= ema < 1:
            raise ValueError(f"ema={ema!r} is the decay of an average: it must lie in [0, 1).")
        self.save_hyperparameters()
        self.num_features = num_features
        self.lr = lr
        self.noise_scales = noise_scales
        self.num_steps = num_steps
        self.score = ScoreNetwork(num_features, width, num_blocks)
        averaging = torch.optim.swa_utils.get_ema_multi_avg_fn(ema)
        self.averaged = torch.optim.swa_utils.AveragedModel(self.score, multi_avg_fn=averaging, use_buffers=False)
        self.averaged.requires_grad_(False)

    def on_fit_start(self) -> None:
        """Take the centre and the spread of the training data, in logarithms."""
        loader: Any = self.trainer.datamodule.train_dataloader()  # pyright: ignore[reportAttributeAccessIssue]
        self.score.measure(torch.cat([x for x, _ in loader]))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch of positive vectors; their classes are not used."""
        x, _ = batch
        loss = self._loss(x)
        self.log("train/loss", loss, batch_size=len(x))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss of a batch; its noise is drawn anew each time."""
        x, _ = batch
        self.log("val/loss", self._loss(x), batch_size=len(x))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Average the weights."""
        self.averaged.update_parameters(self.score)

    def configure_optimizers(self) -> Any:
        """Return AdamW, with a learning rate that falls along a cosine over the whole run."""
        optimizer = torch.optim.AdamW(self.score.parameters(), lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()
    def sample(self, num_samples: int, *, generator: torch.Generator) -> Tensor:
        """Return samples of the model, (num_samples, features); costs as many evaluations a sample as it has steps."""
        network = cast(ScoreNetwork, self.averaged.module)
        smallest, largest = (scale * network.std.item() for scale in self.noise_scales)
        ends = largest ** (1 / _RHO), smallest ** (1 / _RHO)
        path = torch.linspace(0, 1, self.num_steps, dtype=torch.float64)
        scales = (ends[0] + path * (ends[1] - ends[0])).pow(_RHO).tolist()
        noise = torch.randn(num_samples, self.num_features, generator=generator, device=network.std.device)
        start = (network.mean + math.hypot(largest, network.std.item()) * noise).exp()
        return reverse_diffusion(network, start, scales, generator=generator)

    def _loss(self, x: Tensor) -> Tensor:
        std = self.score.std
        draws = (_MEAN_LOG_SCALE + _STD_LOG_SCALE * torch.randn(len(x), device=x.device)).exp()
        scales = std * draws.clamp(*self.noise_scales)
        return multiplicative_score_matching_loss(self.score, x, scales, data_std=std.item())

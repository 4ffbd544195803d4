"""Images that a generative model draws, in TensorBoard."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from spectral_callbacks.demo.langevin import MultiplicativeDiffusion


class SampleImages(pl.Callback):
    """Logs a grid of samples of a `MultiplicativeDiffusion` to TensorBoard, as the image `samples`.

    The noise is the same every time, so that the digits are seen to take shape. Training is not disturbed.

    Args:
        every_n_steps: Optimizer steps between two grids; there is one more at the end.
        rows: Rows of the grid.
        columns: Columns of the grid.
        shape: Height and width of an image, whose product is the length of a sample.
        zoom: Pixels of the picture to a pixel of an image.
        darkest: The value drawn as black.
        brightest: The value drawn as white.
        seed: Of the noise.

    Raises:
        ValueError: If a count is not positive.
    """

    def __init__(
        self,
        every_n_steps: int = 1000,
        rows: int = 6,
        columns: int = 12,
        shape: tuple[int, int] = (8, 8),
        zoom: int = 4,
        darkest: float = 0.1,
        brightest: float = 1.1,
        seed: int = 0,
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("rows", rows), ("columns", columns), ("zoom", zoom)):
            if value < 1:
                raise ValueError(f"{name}={value!r} must be at least 1.")
        self.every_n_steps = every_n_steps
        self.rows = rows
        self.columns = columns
        self.shape = shape
        self.zoom = zoom
        self.darkest = darkest
        self.brightest = brightest
        self.seed = seed
        self._last = -1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Log a grid if one is due."""
        if trainer.global_step % self.every_n_steps == 0:
            self._log(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the last grid."""
        self._log(trainer, pl_module)

    def grid(self, samples: Tensor) -> Tensor:
        """Return samples as one picture, (rows * columns, features) -> (height, width), from 0 black to 1 white."""
        height, width = self.shape
        images = ((samples - self.darkest) / (self.brightest - self.darkest)).clamp(0, 1)
        framed = torch.nn.functional.pad(images.view(self.rows, self.columns, height, width), (1, 1, 1, 1), value=0.25)
        picture = framed.transpose(1, 2).reshape(self.rows * (height + 2), self.columns * (width + 2))
        return picture.repeat_interleave(self.zoom, 0).repeat_interleave(self.zoom, 1)

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not isinstance(pl_module, MultiplicativeDiffusion):
            raise ValueError(
                f"SampleImages draws from a MultiplicativeDiffusion, and the model is a {type(pl_module).__name__}: "
                "train that model, or leave SampleImages out of the callbacks."
            )
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if not boards or self._last == trainer.global_step or not trainer.is_global_zero:
            return
        self._last = trainer.global_step
        generator = torch.Generator(pl_module.device).manual_seed(self.seed)
        picture = self.grid(pl_module.sample(self.rows * self.columns, generator=generator)).cpu()
        for board in boards:
            board.experiment.add_image("samples", picture, trainer.global_step, dataformats="HW")

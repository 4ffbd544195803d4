"""The generative demo."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from spectral_callbacks.demo import Classifier, DigitsDataModule, MultiplicativeDiffusion, SampleImages


def fit(folder: Path | None, max_steps: int = 4, callbacks: list[pl.Callback] | None = None) -> MultiplicativeDiffusion:
    torch.manual_seed(0)
    model = MultiplicativeDiffusion(width=16, num_blocks=1, num_steps=5, ema=0.5)
    logger: Any = TensorBoardLogger(folder, name="") if folder else False
    trainer = pl.Trainer(
        max_steps=max_steps, max_epochs=-1, accelerator="cpu", logger=logger, callbacks=callbacks,
        num_sanity_val_steps=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(model, DigitsDataModule(batch_size=128, num_train=256, pixels="positive"))
    return model


def test_positive_pixels_are_the_images_shifted_away_from_zero() -> None:
    data = DigitsDataModule(batch_size=0, num_train=100, pixels="positive")
    data.setup("fit")
    ((x, _),) = list(data.train_dataloader())
    assert (x.min().item(), x.max().item()) == (pytest.approx(0.1), pytest.approx(1.1))
    sixteenths = (x - 0.1) * 16
    torch.testing.assert_close(sixteenths, sixteenths.round(), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="pixels='negative' must be one of 'standardized', 'positive'"):
        DigitsDataModule(pixels="negative")  # pyright: ignore[reportArgumentType]


def test_network_is_preconditioned_to_the_best_linear_denoiser_where_it_is_ignorant() -> None:
    network = MultiplicativeDiffusion(num_features=3, width=8).score.double()
    for p in network.exit.parameters():
        nn.init.zeros_(p)  # F = 0
    x = torch.tensor([[0.2, 1.0, 3.0]], dtype=torch.float64)
    network.measure(torch.tensor([[0.5, 1.0, 4.0]], dtype=torch.float64))
    y = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64).log()
    s = 0.7
    expected = -1 - (x.log() - y.mean()) / (y.var() + s**2)
    torch.testing.assert_close(network(x, torch.tensor([s], dtype=torch.float64)), expected)


def test_score_is_that_of_noisy_training_data_after_training_on_one_image() -> None:
    """All data are one image: h = -1 - ln(x / x₀) / s², and samples are that image."""
    torch.manual_seed(0)
    x0 = torch.tensor([[0.5, 2.0]])
    model = MultiplicativeDiffusion(num_features=2, width=32, num_blocks=1, num_steps=30)
    model.score.measure(x0)
    optimizer = torch.optim.Adam(model.score.parameters(), lr=3e-3)
    for _ in range(400):
        optimizer.zero_grad()
        model._loss(x0.expand(64, 2)).backward()
        optimizer.step()
    model.averaged.update_parameters(model.score)
    samples = model.sample(50, generator=torch.Generator().manual_seed(0))
    assert (samples.log() - x0.log()).abs().max() < 0.25


def test_fitting_logs_the_loss_and_averages_the_weights(tmp_path: Path) -> None:
    model = fit(tmp_path)
    events = EventAccumulator(str(next(tmp_path.glob("version_0"))))
    events.Reload()
    assert 0.2 < events.Scalars("train/loss")[0].value < 3
    assert model.averaged.n_averaged == 4
    pairs = list(zip(model.score.parameters(), model.averaged.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in pairs)
    assert all(not b.requires_grad for _, b in pairs)
    assert model.score.std.item() == pytest.approx(1.0, abs=0.3)
    torch.testing.assert_close(model.averaged.module.std, model.score.std, rtol=0, atol=0)


def test_images_are_logged_when_due_and_at_the_end_without_disturbing(tmp_path: Path) -> None:
    images = SampleImages(every_n_steps=3, rows=2, columns=3)
    watched = fit(tmp_path, 4, [images])
    alone = fit(None, 4)
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), alone.parameters(), strict=True))
    events = EventAccumulator(str(next(tmp_path.glob("version_0"))))
    events.Reload()
    logged = events.Images("samples")
    assert [image.step for image in logged] == [3, 4]
    assert (logged[0].height, logged[0].width) == (2 * 40, 3 * 40)
    assert logged[0].encoded_image_string != logged[1].encoded_image_string


def test_a_grid_shows_each_sample_in_its_cell() -> None:
    images = SampleImages(rows=2, columns=3, shape=(2, 2), zoom=1)
    samples = 0.1 + torch.arange(6.0)[:, None].expand(6, 4) / 5
    picture = images.grid(samples)
    assert picture.shape == (8, 12)
    cells = [picture[4 * r + 1 : 4 * r + 3, 4 * c + 1 : 4 * c + 3] for r in range(2) for c in range(3)]
    torch.testing.assert_close(torch.stack(cells).flatten(1), samples - 0.1)
    twice = SampleImages(rows=2, columns=3, shape=(2, 2), zoom=2).grid(samples)
    assert torch.equal(twice[::2, 1::2], picture)


def test_samples_are_fixed_by_the_generator() -> None:
    model = MultiplicativeDiffusion(width=8, num_blocks=1, num_steps=3)
    draws = [model.sample(2, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert math.isfinite(draws[0].sum().item())


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="noise_scales="):
        MultiplicativeDiffusion(noise_scales=(1.0, 0.5))
    with pytest.raises(ValueError, match="ema=1"):
        MultiplicativeDiffusion(ema=1.0)
    with pytest.raises(ValueError, match="rows=0 must be at least 1"):
        SampleImages(rows=0)
    with pytest.raises(ValueError, match="the model is a Classifier"):
        SampleImages().on_train_end(pl.Trainer(accelerator="cpu", logger=False), Classifier())

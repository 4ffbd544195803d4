"""A look at the representations costs less than an epoch of a second; left to themselves, the callbacks keep to 5 %.

RepresentationGeometry and DiffusionEntropy on a multilayer perceptron and a small residual network on digits, and on a
small transformer on text, each on 1,024 samples of the training data. A training is run twice from the same weights,
with the callback and without, in one process and in turns of half an epoch, as in overhead_stays_under_budget.py: what
the turns after an epoch's end take in addition is what a look costs. That depends on samples and layers, not on the
epoch, so that the share is largest where an epoch is short: the perceptron's takes some milliseconds, and a look is
many of them. There the budget is the answer, which the last rows are about: no rhythm is given, and the first look,
whose cost has to be earned back, is at step 0.
"""

from __future__ import annotations

import functools
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from _measure import Claims, options, table
from _problems import Block, CharTransformer, digits, images, seeded, tanh_mlp, text
from overhead_stays_under_budget import Overhead, Training, measure
from spectral_callbacks import SpectralCallback
from spectral_callbacks.callbacks import DiffusionEntropy, RepresentationGeometry

NUM_SAMPLES = 1024
BATCH = 64
LENGTH, NUM_SEQUENCES, BATCH_OF_TEXT = 64, 2048, 16
Build = Callable[[], tuple[pl.LightningModule, Any, dict[str, Any]]]


class Trained(pl.LightningModule):
    """A network under cross-entropy and SGD with momentum."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss; targets of a sequence are flat, as the outputs are."""
        return F.cross_entropy(self.net(batch[0]), batch[1].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def loader(data: tuple[Tensor, Tensor], batch_size: int) -> DataLoader[tuple[Tensor, ...]]:
    """Return full batches in an order that is the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(*data), batch_size, shuffle=True, drop_last=True, generator=generator)


def perceptron() -> tuple[pl.LightningModule, Any, dict[str, Any]]:
    """Build a 64-100-100-10 network on batches of 64 digits."""
    return Trained(tanh_mlp(100, 0)), loader(digits(), BATCH), {}


def convolutional() -> tuple[pl.LightningModule, Any, dict[str, Any]]:
    """Build four residual blocks of 16 and 32 channels on batches of 64 images of 16 x 16."""
    with seeded(0):
        net = nn.Sequential(
            nn.Conv2d(1, 16, 3, 1, 1), Block(16, 16), Block(16, 32), Block(32, 32), Block(32, 32),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
        )  # fmt: skip
    return Trained(net), loader(images(), BATCH), {}


def transformer() -> tuple[pl.LightningModule, Any, dict[str, Any]]:
    """Build 2 blocks of width 64 on 2,048 sequences of 64 characters, batches of 16."""
    symbols, num_symbols = text()
    sequences = symbols[: NUM_SEQUENCES * (LENGTH + 1)].view(NUM_SEQUENCES, LENGTH + 1)
    with seeded(0):
        net = CharTransformer(num_symbols, length=LENGTH, width=64, num_layers=2)
    return Trained(net), loader((sequences[:, :-1], sequences[:, 1:]), BATCH_OF_TEXT), {}


PERCEPTRON, CONVOLUTIONAL, TRANSFORMER = "MLP", "residual network", "transformer"
TRAININGS: dict[str, tuple[Build, int, Sequence[str]]] = {  # -> what builds it, steps an epoch, layers
    PERCEPTRON: (perceptron, len(digits()[0]) // BATCH, ["net.1", "net.3"]),
    CONVOLUTIONAL: (convolutional, len(digits()[0]) // BATCH, ["net.1", "net.2", "net.3", "net.4"]),
    TRANSFORMER: (transformer, NUM_SEQUENCES // BATCH_OF_TEXT, ["net.blocks.0", "net.blocks.1", "net.norm"]),
}


def geometry(layers: Sequence[str], **options: Any) -> Sequence[SpectralCallback]:
    """Make RepresentationGeometry."""
    return [RepresentationGeometry(layers, num_samples=NUM_SAMPLES, on_error="raise", **options)]


def entropy(layers: Sequence[str], **options: Any) -> Sequence[SpectralCallback]:
    """Make DiffusionEntropy without its information on labels."""
    return [DiffusionEntropy(layers, targets=(), num_samples=NUM_SAMPLES, on_error="raise", **options)]


def information(layers: Sequence[str], **options: Any) -> Sequence[SpectralCallback]:
    """Make DiffusionEntropy with its information on labels."""
    return [DiffusionEntropy(layers, targets=("label",), num_samples=NUM_SAMPLES, on_error="raise", **options)]


def measured(training: Training) -> Overhead:
    """Train with and without the callback in turns."""
    with tempfile.TemporaryDirectory() as directory:
        return measure(training, directory)


def main() -> None:
    """Measure, print, judge."""
    quick = options(__doc__).quick
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", ".*(is biased by more than|left out)")  # costs are measured here, not ranks
    claims, rows = Claims(judge_costs=not quick), []
    limits: dict[str, dict[str, float | None]] = {
        "RepresentationGeometry": {PERCEPTRON: None, CONVOLUTIONAL: 0.6, TRANSFORMER: 0.6},
        "DiffusionEntropy": {PERCEPTRON: None, CONVOLUTIONAL: 1.0, TRANSFORMER: 0.6},
        "DiffusionEntropy, labels": {PERCEPTRON: None, CONVOLUTIONAL: None},
    }
    makers = dict(zip(limits, (geometry, entropy, information), strict=True))
    for name, of_training in limits.items():
        for kind, limit in of_training.items():
            build, epoch, layers = TRAININGS[kind]
            make = functools.partial(makers[name], layers, every_n_epochs=1)
            num_epochs = 1 if quick else {PERCEPTRON: 40, CONVOLUTIONAL: 10, TRANSFORMER: 4}[kind]
            seen = measured(Training(kind, build, (num_epochs + 1) * epoch, epoch // 2, make))
            rows.append([
                f"{name}, {kind}",
                f"{1e3 * seen.step * epoch:.0f} ms",
                f"{1e3 * seen.looking * seen.step * epoch:.0f} ms",
                f"{seen.looks}",
                f"{seen.looking:.2f}",
            ])  # fmt: skip
            if limit is not None:
                claims.at_most(f"{name}, {kind}: a look / an epoch", seen.looking, limit)
    table(("once an epoch, 1,024 samples", "epoch", "look", "looks", "look / epoch"), rows)

    budgets = {
        "RepresentationGeometry": (PERCEPTRON, 8000, geometry),
        "both": (CONVOLUTIONAL, 2000, lambda layers: [*geometry(layers), *information(layers)]),
    }
    rows = []
    for name, (kind, num_steps, make) in budgets.items():
        build, _, layers = TRAININGS[kind]
        training = Training(kind, build, 50 if quick else num_steps, 10, functools.partial(make, layers))
        pairs = [measured(training) for _ in range(1 if quick or kind == CONVOLUTIONAL else 3)]
        inside, outside = max(pair.inside for pair in pairs), statistics.median(pair.outside for pair in pairs)
        rows.append([
            f"{name}, {kind}",
            f"{1e3 * statistics.median(pair.step for pair in pairs):.1f} ms",
            f"{statistics.median(pair.looks for pair in pairs):g}",
            f"{100 * inside:.1f} %",
            f"{100 * outside:.1f} %",
        ])  # fmt: skip
        claims.at_most(f"{name}, {kind}: cost/overhead at the end, worst", inside, 0.05)
        claims.at_most(f"{name}, {kind}: overhead from outside, median", outside, 0.10)
    print()
    table(("no rhythm given", "CPU / step", "looks", "cost/overhead", "from outside"), rows)
    claims.settle()


if __name__ == "__main__":
    main()

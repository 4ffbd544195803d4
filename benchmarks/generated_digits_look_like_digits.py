"""What configs/dale_langevin_digits.yaml generates looks like digits, all ten of them, and copies none.

The config is trained as it is. Three convolutional classifiers, trained on the same 1,500 images, judge 1,000 samples
and the 297 images that none has seen: how often are they more than 0.9 sure on average? The last rows are controls:
pixels drawn on their own from log-normal laws fitted to the training images, and the training images themselves, whose
distance to the training set is 0. Distances are Euclidean, to the nearest training image, with pixels from 0.1 to 1.1.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from _measure import Claims, options, table, timed
from spectral_callbacks.cli import config_folder, run

NUM_SAMPLES = 1000
SURE = 0.9


def classifiers(x: Tensor, y: Tensor, num_epochs: int) -> list[nn.Module]:
    """Train small convolutional networks on images (n, 64), each batch moved by up to a pixel, and their classes."""
    torch.manual_seed(0)
    return [_classifier(x, y, num_epochs) for _ in range(3)]


def _classifier(x: Tensor, y: Tensor, num_epochs: int) -> nn.Module:
    net = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Dropout(0.3), nn.Flatten(), nn.Linear(1024, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(net.parameters())
    batches = len(x) // 64 + 1
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=num_epochs * batches)
    for _ in range(num_epochs):
        for indices in torch.randperm(len(x)).tensor_split(batches):
            down, right = torch.randint(3, (2,)).tolist()
            padded = F.pad(x[indices].view(-1, 8, 8), (1, 1, 1, 1), value=0.1)
            moved = padded[:, down : down + 8, right : right + 8].flatten(1)
            optimizer.zero_grad()
            F.cross_entropy(net(moved), y[indices]).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@torch.no_grad()
def probabilities(nets: list[nn.Module], images: Tensor) -> Tensor:  # (n, 64) -> (n, 10)
    return torch.stack([net(images.clamp(0.1, 1.1)).softmax(1) for net in nets]).mean(0)


def train(quick: bool) -> Any:
    """Return the CLI after the config's own run, which logs to a folder that is then removed."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            shorter = ["--trainer.max_steps=200"] if quick else []
            config = str(config_folder() / "dale_langevin_digits.yaml")
            return run(["fit", "--config", config, *shorter])
        finally:
            os.chdir(here)


@torch.no_grad()
def judged(nets: list[nn.Module], images: Tensor, train_images: Tensor) -> tuple[float, int, float]:
    """Return how often the classifier is sure, how many classes it is then sure of, and the mean nearest distance."""
    surest, classes = probabilities(nets, images).max(1)
    sure = surest > SURE
    nearest = torch.cdist(images.clamp(0.1, 1.1), train_images).min(1).values.mean().item()
    return sure.float().mean().item(), len(classes[sure].unique()), nearest


def main() -> None:
    quick = options(__doc__).quick
    trained = timed(lambda: train(quick))
    cli = trained.result
    (x, y), (test_x, test_y) = ((b.inputs, b.targets) for b in (cli.datamodule._train, cli.datamodule._val))
    nets = classifiers(x, y, num_epochs=3 if quick else 25)
    generator = torch.Generator().manual_seed(1)
    drawn = timed(lambda: cli.model.sample(NUM_SAMPLES, generator=generator))
    std, mean = torch.std_mean(x.log(), dim=0)
    noise = (mean + std * torch.randn(NUM_SAMPLES, 64, generator=generator)).exp()
    rows = {"samples": drawn.result, "test images": test_x, "pixels on their own": noise, "training images": x}
    results = {name: judged(nets, images, x) for name, images in rows.items()}
    print(f"training took {trained.seconds:.0f} s of CPU time, {NUM_SAMPLES} samples {drawn.seconds:.1f} s\n")
    table(
        ("images", f"share surer than {SURE}", "classes", "nearest distance"),
        [(name, f"{s:.3f}", str(c), f"{d:.3f}") for name, (s, c, d) in results.items()],
    )
    claims = Claims(judge_costs=not quick)
    wrong = (probabilities(nets, test_x).argmax(1) != test_y).float().mean().item()
    sure, classes, distance = results["samples"]
    claims.at_most("errors of the classifiers on test images", wrong, 0.01)
    claims.at_most("samples that the classifiers are not sure of", 1 - sure, 0.3)
    claims.at_most("classes that no sample belongs to", 10 - classes, 0)
    claims.at_most("nearest distance of test images / of samples", results["test images"][2] / distance, 1.0)
    claims.at_most("samples with a pixel that is not positive", (drawn.result <= 0).any(1).float().mean().item(), 0)
    claims.settle()


if __name__ == "__main__":
    main()

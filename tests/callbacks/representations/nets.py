"""A convolutional, a recurrent and a transformer net that classify small images or sequences."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

NUM_CLASSES = 3


class Convolutional(pl.LightningModule):
    layers = ("body.0", "body.*", "head")

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.3))
        self.head = nn.Linear(4, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Recurrent(Convolutional):
    layers = ("body:0", "head")

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LSTM(6, 4, batch_first=True, dropout=0.3, num_layers=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x[:, 0])[0][:, -1])


class Transformer(Convolutional):
    layers = ("body", "body.layers.0*", "head")

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, dim_feedforward=8, dropout=0.3, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(6, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x[:, 0]).mean(1))


class Wide(Convolutional):
    """A linear layer of 64 features."""

    layers = ("features",)

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Linear(36, 64)
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x.flatten(1)).tanh())


NETS: dict[str, type[Convolutional]] = {
    "convolutional": Convolutional,
    "recurrent": Recurrent,
    "transformer": Transformer,
}


def labelled(num_samples: int = 48, seed: int = 0, **options: Any) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(NUM_CLASSES, (num_samples,), generator=generator)
    x = torch.randn(num_samples, 1, 6, 6, generator=generator) + y[:, None, None, None]
    return DataLoader(TensorDataset(x, y), **{"batch_size": 12, **options})

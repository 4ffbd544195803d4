"""The net that does in its training step all that users do, with nothing in it that mixes the samples of a batch."""

from __future__ import annotations

from torch import Tensor, nn

from tests.contracts.networks import NUM_CLASSES, Everything


class Separate(Everything):
    """Group norm in place of batch norm."""

    def __init__(self, optimizer: str = "SGD") -> None:
        super().__init__(optimizer)
        self.conv[1] = nn.GroupNorm(2, 4)


class Rideable(Separate):
    """And no operation whose samples cannot be told apart: a linear layer in place of the LSTM and of spectral norm."""

    def __init__(self, optimizer: str = "SGD") -> None:
        super().__init__(optimizer)
        self.lstm = nn.Linear(16, 8)
        self.last = nn.Linear(8, NUM_CLASSES)
        self.head[2] = self.last

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(self.lstm(self.conv(x).flatten(2))).mean(1)


class RideableDense(Rideable):
    """Only what runs in float16 on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Dropout(0.2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

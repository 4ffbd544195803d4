"""Random number generators of the process: keep them, restore them, seed them."""

from __future__ import annotations

import dataclasses
import random
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class RandomState:
    """States of the global generators of torch (CPU, and CUDA once it is in use), numpy and `random`."""

    cpu: Tensor
    cuda: tuple[Tensor, ...]
    numpy: dict[str, Any]
    python: tuple[Any, ...]

    @classmethod
    def capture(cls) -> Self:
        """Return the states as they are now; no generator is touched, and CUDA is not initialised by asking."""
        cuda = tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else ()
        return cls(torch.get_rng_state(), cuda, np.random.get_state(legacy=False), random.getstate())

    def restore(self) -> None:
        """Put the generators back into these states."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(list(self.cuda))
        np.random.set_state(self.numpy)
        random.setstate(self.python)


def seed_generators(seed: int) -> None:
    """Seed every global generator.

    `torch.manual_seed` is avoided: before CUDA is in use it queues the seed for later, when training would receive it.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)

"""Noise that is a function of a seed, a step and a parameter: no generator has a state to save."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import Tensor

from spectral_callbacks.optim.base import local


def seeded_noise(parameter: Tensor, seed: int, step: int, index: int) -> Tensor:
    """Return standard normal noise for the part of a parameter that this process holds.

    The global generators are left alone. Processes draw the noise of the whole parameter, so that copies of it receive
    the same and shards their own part.

    Args:
        parameter: What has the shape, the device and the dtype; float32 in place of a half type.
        seed: Of the run.
        step: Of the optimizer.
        index: Of the parameter in the optimizer.

    Example:
        >>> w = torch.zeros(3)
        >>> noise = seeded_noise(w, 0, 1, 2)
        >>> torch.equal(noise, seeded_noise(w, 0, 1, 2)), torch.equal(noise, seeded_noise(w, 0, 2, 2))
        (True, False)
    """
    mixed = int(np.random.SeedSequence((seed, step, index)).generate_state(1, np.uint64)[0] >> 1)
    generator = torch.Generator(parameter.device).manual_seed(mixed)
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    noise = torch.randn(parameter.shape, generator=generator, device=parameter.device, dtype=dtype)
    if local(parameter) is parameter:
        return noise
    from torch.distributed.tensor import DTensor, distribute_tensor  # costs a second, and some builds lack it

    whole = cast(DTensor, parameter)
    return distribute_tensor(noise, whole.device_mesh, whole.placements).to_local()

from __future__ import annotations

import pathlib

import pytest
import torch

from spectral_callbacks.operators.memory import free_bytes


@pytest.mark.skipif(not pathlib.Path("/proc/meminfo").exists(), reason="the system does not tell its free memory")
def test_free_memory_of_the_cpu_is_a_number_of_bytes() -> None:
    free = free_bytes(torch.device("cpu"))
    assert free is not None
    assert 2**20 < free < 2**46


def test_free_memory_of_a_device_that_does_not_tell_is_unknown() -> None:
    assert free_bytes(torch.device("meta")) is None

"""How much memory is free for one more graph."""

from __future__ import annotations

import pathlib

import torch

_MEMINFO = pathlib.Path("/proc/meminfo")


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated on a device, or None where the system does not tell."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "cpu" and _MEMINFO.exists():
        fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return None

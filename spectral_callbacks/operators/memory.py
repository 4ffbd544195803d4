"""How much memory is free for one more graph."""

from __future__ import annotations

import pathlib

import torch

_MEMINFO = pathlib.Path("/proc/meminfo")
_CGROUP = pathlib.Path("/sys/fs/cgroup")  # of a container, where it shows its own


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated on a device, or None where the system does not tell."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "cpu" and _MEMINFO.exists():
        fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
        in_container = _free_in_container()
        return available if in_container is None else min(available, in_container)
    return None


def _free_in_container() -> int | None:
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        return int(limit) - int((_CGROUP / "memory.current").read_text()) if limit != "max" else None
    except (OSError, ValueError):
        return None

"""Several processes, for real."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import warnings
import lightning.pytorch as pl
import torch
from spectral_callbacks import Sharpness
from tests.callbacks.runs import Regression, complaints, fit, loader

def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    callbacks = [Sharpness(every_n_steps=1), Sharpness(name="b")]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        trainer = fit(Regression(), *callbacks, strategy="ddp", devices=2, use_distributed_sampler=False)
    assert trainer.world_size == 2
    assert trainer.global_step == 4
    assert all(callback.history == [] for callback in callbacks)
    said = complaints(warned)
    assert len(said) == (2 if trainer.global_rank == 0 else 0), said
    assert all("does not run on several processes yet" in message for message in said)
    torch.distributed.barrier()  # a process that leaves first tears the connection from under the other
    torch.distributed.destroy_process_group()
    print(f"rank {trainer.global_rank} done", flush=True)

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_two_processes_refuse_once_and_neither_hangs(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(RUN)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(script)],
        check=False, capture_output=True, text=True, timeout=300, cwd=root,
        env={
            "PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "rank 0 done" in done.stdout

"""Parameters cut over two processes move as they do in one, entry by entry, bit by bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed

from tests.contracts.optimizers import OPTIMIZERS, YARDSTICK

ROOT = Path(__file__).parents[2]
NUM_RANKS = 2

pytestmark = [
    pytest.mark.slow,  # two processes that import all of PyTorch
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of PyTorch has no processes"),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each case ended with on the two processes: nothing, or an error."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {
        "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.optim.ranks"]
    options: dict[str, Any] = {"cwd": ROOT, "env": environment, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen([*command, str(rank), str(folder)], **options) for rank in range(NUM_RANKS)]
    try:
        said = [rank.communicate(timeout=300)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(said)
    one, other = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(NUM_RANKS))
    assert one.keys() == other.keys()
    return {name: one[name] or other[name] for name in one}


@pytest.mark.parametrize("name", [s.name for s in (YARDSTICK, *OPTIMIZERS)])
def test_two_processes_step_and_resume_as_one(outcomes: dict[str, str], name: str) -> None:
    of_this = {case: error for case, error in outcomes.items() if case.partition("-")[0] == name}
    assert len(of_this) >= 4
    failed = {case: error for case, error in of_this.items() if error}
    assert not failed, f"{len(failed)} of {len(of_this)}: {', '.join(failed)}\n" + "\n".join(failed.values())


def test_an_optimizer_that_looks_at_its_own_part_only_is_noticed(outcomes: dict[str, str]) -> None:
    assert "is off by" in outcomes["planted-error"]

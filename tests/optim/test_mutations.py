"""An error that is planted in the source of an optimizer turns the tests against its transcription red."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPTIM = "spectral_callbacks/optim"
LAWS = "golden or recursion or paper or mirror_step"  # the tests against transcriptions, which are enough to notice

MUTATIONS = {  # name -> (source, what stands there, what stands there instead, the tests that must notice)
    "nothing": ("diffgrad.py", "import dataclasses\n", "import dataclasses\n", "test_diffgrad.py"),
    "diffgrad, no friction in blocks": (
        "friction.py", "slowing.abs_().neg_().exp_().add_(one)", "slowing.zero_().add_(one)", "test_diffgrad.py"
    ),
    "diffgrad, no friction alone": (
        "friction.py", "slowing = slowing.neg_().exp_() + 1", "slowing = slowing.zero_() + 1", "test_diffgrad.py"
    ),
    "diffgrad, no friction in lists": (
        "friction.py", "torch._foreach_exp_(slowing)", "torch._foreach_zero_(slowing)", "test_diffgrad.py"
    ),
    "diffgrad, friction of the other sign": (
        "friction.py", "slowing = slowing.neg_().exp_() + 1", "slowing = slowing.exp_() + 1", "test_diffgrad.py"
    ),
    "diffgrad, no coupled decay": (
        "friction.py", "gradient.add(parameter, alpha=self.coupled) if self.coupled else gradient", "gradient",
        "test_diffgrad.py",
    ),
    "diffgrad, no decoupled decay": ("friction.py", "if self.decoupled:", "if False:", "test_diffgrad.py"),
    "diffgrad, maximize minimizes": ("friction.py", "gradient = -gradient", "pass", "test_diffgrad.py"),
    "dct, no decay": (
        "dct_adamw.py", "decay=1 - lr * group[\"weight_decay\"]", "decay=1.0", "test_dct_adamw.py"
    ),
    "dct, the step of the other sign": ("dct_adamw.py", "factor=-lr", "factor=lr", "test_dct_adamw.py"),
    "dct, the error of the other sign": ("dct_adamw.py", "factor=-1.0", "factor=1.0", "test_dct_adamw.py"),
    "dct, fresh columns as old as the others": (
        "columns.py", 'for name in ("ages", "exp_avg", "exp_avg_sq")', 'for name in ("exp_avg", "exp_avg_sq")',
        "test_dct_adamw.py",
    ),
    "trion, no decay": ("trion.py", "decay=1 - lr * group[\"weight_decay\"]", "decay=1.0", "test_trion.py"),
    "trion, momentum that forgets nothing": (
        "trion.py", "factor=group[\"momentum\"] - 1", "factor=0.0", "test_trion.py"
    ),
    "exponentiated, no sign": (
        "exponentiated_gradient.py", "factors = torch._foreach_mul(signs, d)", "factors = torch._foreach_mul(d, 1)",
        "test_exponentiated_gradient.py",
    ),
    "exponentiated, the step of the other sign": (
        "exponentiated_gradient.py", "torch._foreach_neg_(factors)", "pass", "test_exponentiated_gradient.py"
    ),
    "exponentiated, no decay": (
        "exponentiated_gradient.py", 'd = torch._foreach_add(d, signs, alpha=group["weight_decay"])', "pass",
        "test_exponentiated_gradient.py",
    ),
    "hypentropy, no decay": (
        "hypentropy.py", 'd = torch._foreach_add(d, wide, alpha=group["weight_decay"])', "pass", "test_hypentropy.py"
    ),
    "hypentropy, the step of the other sign": ("hypentropy.py", "value=-2", "value=2", "test_hypentropy.py"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_noticed_and_nothing_else_is(name: str, tmp_path: Path) -> None:
    source, before, after, tests = MUTATIONS[name]
    for folder in ("spectral_callbacks", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / OPTIM / source
    text = path.read_text()
    assert text.count(before) == 1, f"{before!r} stands {text.count(before)} times in {source}"
    path.write_text(text.replace(before, after))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", LAWS, f"tests/optim/{tests}"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == (0 if before == after else 1), run.stdout + run.stderr

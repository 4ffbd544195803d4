from __future__ import annotations

import inspect
import pathlib
import re
from typing import Any

import pytest

from spectral_callbacks import SpectralCallback

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def readme_names() -> dict[str, Any]:
    names: dict[str, Any] = {}
    for block in _blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    return names


def test_every_python_block_runs_as_it_stands(readme_names: dict[str, Any]) -> None:
    assert len(_blocks("python")) == 3
    assert readme_names["pairs"].status.name == "CONVERGED"
    assert [row["step"] for row in readme_names["sharpness"].history] == [0, 10]
    assert issubclass(readme_names["GradientNorm"], readme_names["SpectralCallback"])


def test_the_table_of_tags_names_what_a_run_logs(readme_names: dict[str, Any]) -> None:
    logged = set(readme_names["sharpness"].history[-1]) - {"step"}
    assert logged == set(re.findall(r"^\| `([a-z]+/[a-z_0-9]+)` \|", README, flags=re.MULTILINE))


def test_the_table_of_options_names_those_of_the_base_class() -> None:
    table = README.partition("## Options of every callback")[2].partition("##")[0]
    named = {
        name for row in re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    assert named == set(inspect.signature(SpectralCallback.__init__).parameters) - {"self"}


def test_the_make_targets_and_configs_it_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+) ", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for config in re.findall(r"configs/\w+\.yaml", README):
        assert (ROOT / config).exists(), config

from __future__ import annotations

import ast
import importlib
import pathlib
import re
import subprocess
import sys

import pytest

import spectral_callbacks

ROOT = pathlib.Path(__file__).parents[1]
HEAVY = {"torch", "lightning", "pytorch_lightning", "numpy", "scipy", "tensorboard", "jsonargparse", "sklearn"}


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )


def _loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter loads for a statement."""
    lines = _run("-X", "importtime", "-c", statement).stderr.splitlines()
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines if line.startswith("import time:")}


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = _loaded_by("import spectral_callbacks")
    assert "spectral_callbacks" in loaded
    assert not loaded & HEAVY


def test_the_list_of_what_is_loaded_sees_a_planted_import() -> None:
    assert "numpy" in _loaded_by("import spectral_callbacks, numpy")


def test_everything_but_the_callbacks_does_without_lightning() -> None:
    statement = (
        "from spectral_callbacks import eigsh, Eigenpairs, LinearOperator, Status, Tracker, Hessian, Objective, "
        "ParameterSpace, Probe, undisturbed, Edge, stability_rule, tags"
    )
    loaded = _loaded_by(statement)
    assert "torch" in loaded
    assert not loaded & {"lightning", "pytorch_lightning", "tensorboard", "sklearn", "jsonargparse"}


@pytest.mark.parametrize("name", spectral_callbacks.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(spectral_callbacks, name) is not None
    assert name in dir(spectral_callbacks)


def test_public_names_are_listed_once() -> None:
    assert len(set(spectral_callbacks.__all__)) == len(spectral_callbacks.__all__)
    assert {"Sharpness", "SpectralCallback", "Probe", "Hessian", "eigsh"} <= set(spectral_callbacks.__all__)


def test_type_checkers_see_the_names_that_are_loaded_lazily() -> None:
    [block] = [
        node
        for node in ast.parse((ROOT / "spectral_callbacks/__init__.py").read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    declared: dict[str, str] = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name, "`import x as x` marks a re-export"
            declared[alias.name] = node.module or ""
    assert set(declared) == set(spectral_callbacks.__all__) - {"__version__"}
    for name, home in declared.items():
        assert getattr(importlib.import_module(home), name) is getattr(spectral_callbacks, name)


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'spectral_callbacks' has no attribute 'sharpnes'"):
        _ = spectral_callbacks.sharpnes


def test_a_star_import_brings_the_public_names() -> None:
    namespace: dict[str, object] = {}
    exec("from spectral_callbacks import *", namespace)
    assert set(namespace) - {"__builtins__"} == set(spectral_callbacks.__all__)


def test_the_version_is_that_of_the_distribution() -> None:
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert spectral_callbacks.__version__ == declared[1]


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "spectral_callbacks/py.typed").exists()

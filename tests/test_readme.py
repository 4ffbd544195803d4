from __future__ import annotations

import functools
import inspect
import pathlib
import re
from typing import Any

import pytest

from spectral_callbacks import (
    DCTAdamW,
    DiffGrad,
    DiffusionEntropy,
    ExponentiatedGradient,
    FactorImbalance,
    GradientCovariance,
    HessianSpectrum,
    HypentropyGD,
    OptimizerState,
    RepresentationGeometry,
    Sharpness,
    SpectralCallback,
    TraceStability,
)
from tests.callbacks.representations.nets import Wide, labelled
from tests.callbacks.runs import Regression, fit, loader, sgd

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
    assert len(_blocks("python")) == 5
    assert readme_names["pairs"].status.name == "CONVERGED"
    assert [row["step"] for row in readme_names["sharpness"].history] == [0, 10]
    assert 1 < readme_names["geometry"].history[-1]["representation/effective_rank/net.1"] < 32
    assert issubclass(readme_names["GradientNorm"], readme_names["SpectralCallback"])


def _named(kind: type[SpectralCallback]) -> set[str]:
    """The tags in the table of a callback."""
    section = README.partition(f"### `{kind.__name__}`")[2].partition("\n##")[0]
    rows = re.findall(r"^\| (`.*?`) \|", section, flags=re.MULTILINE)
    return {tag for row in rows for tag in re.findall(r"`(\w+/\w+(?:/<(?:pair|layer)>)?)`", row)}


class Plain(Regression):
    """Plain SGD, for which all of it is logged."""

    def __init__(self) -> None:
        super().__init__(sgd(0.05))


@pytest.mark.filterwarnings("ignore:.*left out:UserWarning")
@pytest.mark.parametrize("kind", [Sharpness, TraceStability, HessianSpectrum, GradientCovariance])
def test_its_tables_of_tags_name_what_a_run_logs(kind: type[SpectralCallback]) -> None:
    own: dict[str, Any] = {"hessian": True} if kind is GradientCovariance else {}
    callback = kind(every_n_steps=2, outputs="net", num_batches=2, **own)
    fit(Plain(), callback, data=loader(128, 32), max_epochs=2)
    logged = {re.sub(r"lambda_\d+", "lambda_2", tag) for tag in callback.history[-1]} - {"step", "cost/overhead"}
    logged = {tag for tag in logged if not tag.endswith(("_residual", "_error"))}
    named = _named(kind)
    on_request = {"sharpness/preconditioned_lambda_max", "sharpness/preconditioned_threshold"}
    on_request |= {"sharpness/lambda_2", "sharpness/lambda_min"} if kind is Sharpness else set()
    on_request |= (
        {"gradient/within_class_trace", "gradient/between_class_trace"} if kind is GradientCovariance else set()
    )
    logged |= {"gradient/noise_scale_high"} if kind is GradientCovariance else set()  # left out where it has no end
    named = {tag for tag in named if not tag.endswith("_error")} - {"cost/overhead"}
    assert logged == named - on_request


@pytest.mark.filterwarnings("ignore:.*friction is within:UserWarning")
def test_the_table_of_what_optimizers_tell_names_all_of_it() -> None:
    logged: set[str] = set()
    for make in (DiffGrad, ExponentiatedGradient, HypentropyGD, functools.partial(DCTAdamW, error_feedback="full")):
        callback = OptimizerState(every_n_steps=1)
        fit(Regression(make), callback, data=loader(), max_epochs=1)
        logged |= set(callback.history[-1])
    assert logged - {"step", "cost/overhead"} == _named(OptimizerState)


def test_the_table_of_factors_names_what_a_run_logs() -> None:
    callback = FactorImbalance([("net.0", "net.2")], every_n_steps=1)
    fit(Plain(), callback, data=loader(), max_epochs=5)
    pair = re.compile(r"(imbalance/\w+)/.*")
    logged = {pair.sub(r"\1/<pair>", tag) for tag in callback.history[-1]} - {"step", "cost/overhead"}
    errors = {"imbalance/rate_exponent_error", "imbalance/rate_exponent_error/<pair>"}
    assert errors <= logged
    assert logged - errors == _named(FactorImbalance)


@pytest.mark.parametrize("kind", [RepresentationGeometry, DiffusionEntropy])
def test_the_tables_of_features_name_what_a_run_logs(kind: type[RepresentationGeometry | DiffusionEntropy]) -> None:
    callback = kind(["features"], every_n_steps=4)
    fit(Wide(), callback, data=labelled(1024, batch_size=128))
    logged = {tag.replace("/features", "/<layer>") for tag in callback.history[-1]} - {"step", "cost/overhead"}
    on_request = {"representation/phase_change"}  # where there is one
    assert {tag for tag in logged if "_error/" not in tag} == _named(kind) - on_request


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

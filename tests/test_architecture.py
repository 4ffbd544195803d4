"""The shape of the package, read from its source."""

from __future__ import annotations

import ast
import dataclasses
import functools
import pathlib
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sized

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "spectral_callbacks"

# Layer -> the layers right below it. A layer may import these, itself, and whatever these may import.
BELOW: dict[str, set[str]] = {
    "tags": set(),
    "linalg": {"tags"},
    "operators": {"linalg"},
    "metrics": {"linalg"},
    "stability": {"linalg"},
    "probe": {"operators", "stability"},
    "callbacks": {"probe", "metrics"},
    "optim": {"stability", "linalg"},
    "init": {"metrics", "linalg"},
    "dashboard": {"tags"},
    "demo": {"callbacks", "optim", "init"},
    "cli": {"callbacks", "demo"},
}
RUN_TIME = {"torch", "lightning", "numpy", "scipy", "tensorboard"}
USES_LIGHTNING = {"callbacks", "demo", "cli"}
MAY_USE: dict[str, set[str]] = {
    "tags": set(),
    "linalg": {"torch"},
    "dashboard": {"numpy", "tensorboard"},
    "demo": {*RUN_TIME, "sklearn", "rich", "tqdm"},  # the last comes with Lightning
    "cli": {*RUN_TIME, "jsonargparse", "yaml", "rich"},
}
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "misc", "common", "tools", "shared", "stuff", "core"}
MAX_LINES = 300
KNOBS_OF_OTHERS = (
    f"{PACKAGE}.demo",  # models have hyper-parameters of their own
    f"{PACKAGE}.optim",  # each optimizer has the defaults of its paper
    f"{PACKAGE}.probe.compositions",  # stand in for torch's functions, and take their arguments
)
COUNTS_OF_THEIR_OWN = {
    "num_eigenvalues",  # one to follow, ten to see a spectrum
    "num_samples",  # gradients cost a backward pass each, features hardly anything
}


@dataclasses.dataclass(frozen=True)
class Source:
    """One file of the package: its dotted name, and what it says."""

    name: str
    text: str
    is_package: bool = False

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def layer(self) -> str:
        """The first name below the package; empty for the package's own file."""
        return self.name.partition(".")[2].partition(".")[0]

    @property
    def imports(self) -> Iterator[str]:
        """Every module or name that the file imports, wherever in it, in full."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = self._absolute(node)
                yield from (f"{base}.{alias.name}" for alias in node.names)

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parents = self.name.split(".")
        parents = parents[: len(parents) - node.level + self.is_package]
        return ".".join([*parents, *([node.module] if node.module else [])])


def _package() -> list[Source]:
    sources = []
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        sources.append(Source(".".join(parts[: len(parts) - is_package]), path.read_text(), is_package))
    return sources


def _reachable(layer: str) -> set[str]:
    return {layer}.union(*(_reachable(below) for below in BELOW[layer]))


def _arrows_up(sources: Iterable[Source]) -> list[str]:
    wrong = []
    for source in sources:
        if not source.layer:
            continue
        allowed = _reachable(source.layer) if source.layer in BELOW else set()
        for imported in source.imports:
            package, _, rest = imported.partition(".")
            if package == PACKAGE and rest.partition(".")[0] not in allowed:
                wrong.append(f"{source.name} imports {imported}")
    return wrong


def _foreign(sources: Iterable[Source]) -> list[str]:
    wrong = []
    for source in sources:
        allowed = MAY_USE.get(source.layer, RUN_TIME if source.layer in USES_LIGHTNING else RUN_TIME - {"lightning"})
        if not source.layer:
            allowed = set()
        for imported in source.imports:
            top = imported.partition(".")[0]
            if top != PACKAGE and top not in sys.stdlib_module_names and top not in allowed:
                wrong.append(f"{source.name} imports {imported}")
    return wrong


def _too_long(sources: Iterable[Source]) -> list[str]:
    return [s.name for s in sources if len(s.text.splitlines()) > MAX_LINES]


def _empty_names(sources: Iterable[Source]) -> list[str]:
    return [s.name for s in sources if EMPTY_NAMES & {part.strip("_") for part in s.name.split(".")[1:]}]


def _asserts(sources: Iterable[Source]) -> list[str]:
    return [s.name for s in sources if any(isinstance(node, ast.Assert) for node in ast.walk(s.tree))]


def _probing(sources: Iterable[Source]) -> list[str]:
    return [
        s.name for s in sources if any(isinstance(node, ast.Name) and node.id == "hasattr" for node in ast.walk(s.tree))
    ]


def _public_functions(body: Iterable[ast.stmt], owner: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Functions and methods whose name, and whose class's name, is public; `__init__` counts as its class."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from _public_functions(node.body, f"{owner}.{node.name}")
        elif isinstance(node, ast.FunctionDef) and (node.name == "__init__" or not node.name.startswith("_")):
            yield f"{owner}.{node.name}", node


def _defaults(function: ast.FunctionDef) -> Iterator[tuple[str, str]]:
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    with_default = positional[len(positional) - len(arguments.defaults) :]
    for argument, default in [
        *zip(with_default, arguments.defaults, strict=True),
        *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
    ]:
        if default is not None:
            yield argument.arg, ast.unparse(default)


def _knobs_of_two_defaults(sources: Iterable[Source]) -> dict[str, dict[str, list[str]]]:
    seen: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for source in sources:
        if source.name.startswith(KNOBS_OF_OTHERS):
            continue
        for name, function in _public_functions(source.tree.body, source.name):
            for knob, default in _defaults(function):
                if knob not in COUNTS_OF_THEIR_OWN:
                    seen[knob][default].append(name)
    return {knob: dict(defaults) for knob, defaults in seen.items() if len(defaults) > 1}


def test_no_arrow_points_up() -> None:
    assert not _arrows_up(_package())


def test_every_file_belongs_to_a_layer() -> None:
    assert {source.layer for source in _package()} - {""} <= set(BELOW)


def test_lightning_and_other_packages_are_imported_only_where_they_belong() -> None:
    assert not _foreign(_package())


def test_no_file_is_longer_than_300_lines() -> None:
    assert not _too_long(_package())


def test_no_file_or_folder_has_an_empty_name() -> None:
    assert not _empty_names(_package())


def test_nothing_in_the_package_asserts() -> None:
    assert not _asserts(_package())


def test_nothing_is_probed_by_hasattr() -> None:
    assert not _probing(_package())


def test_one_knob_has_one_default_across_the_package() -> None:
    assert not _knobs_of_two_defaults(_package())


def test_tests_mirror_the_package() -> None:
    """A folder of tests is a folder of the package, the contracts aside."""
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders - {"contracts"} <= {source.layer for source in _package()}


@pytest.mark.parametrize(
    ("name", "text", "check"),
    [
        ("linalg.eigsh", "from spectral_callbacks.operators import Hessian", _arrows_up),
        ("linalg.eigsh", "def f():\n    import spectral_callbacks.probe.probe", _arrows_up),
        ("linalg.eigsh", "from ..operators.hessian import Hessian", _arrows_up),
        ("linalg.eigsh", "from .. import operators", _arrows_up),
        ("linalg.eigsh", "from spectral_callbacks import Hessian", _arrows_up),
        ("dashboard.plugin", "from spectral_callbacks.linalg import Status", _arrows_up),
        ("metrics.rank", "from spectral_callbacks.stability import edges", _arrows_up),
        ("somewhere.else", "from spectral_callbacks import tags", _arrows_up),
        ("probe.probe", "import lightning.pytorch as pl", _foreign),
        ("probe.probe", "from lightning import Trainer", _foreign),
        ("linalg.eigsh", "import scipy.sparse.linalg", _foreign),
        ("dashboard.plugin", "import torch", _foreign),
        ("callbacks.base", "import pandas", _foreign),
        ("", "import torch", _foreign),
        ("linalg.eigsh", "x = 1\n" * 301, _too_long),
        ("linalg.utils", "", _empty_names),
        ("linalg._helpers", "", _empty_names),
        ("common.eigsh", "", _empty_names),
        ("linalg.eigsh", "def f(x):\n    assert x", _asserts),
        ("linalg.eigsh", "if hasattr(x, 'y'): pass", _probing),
        (
            "linalg.eigsh",
            "def f(*, rtol=1e-3): ...\nclass A:\n    def __init__(self, rtol=1e-2): ...",
            _knobs_of_two_defaults,
        ),
    ],
)
def test_each_check_sees_a_planted_error(name: str, text: str, check: Callable[[list[Source]], Sized]) -> None:
    planted = Source(f"{PACKAGE}.{name}" if name else PACKAGE, text)
    assert len(check([planted])) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("callbacks.sharpness", "from lightning import Trainer\nfrom spectral_callbacks.linalg import eigsh"),
        ("linalg.eigsh", "from .operator import LinearOperator\nfrom .. import tags\nimport torch, math"),
        ("linalg.eigsh", "x = 1\n" * 300),
        ("linalg.eigsh", "def f(rtol=1e-3): ...\ndef g(*, rtol=1e-3, k): ...\ndef _h(rtol=1): ..."),
        ("linalg.commonality", ""),
    ],
)
def test_no_check_sees_an_error_where_there_is_none(name: str, text: str) -> None:
    sources = [Source(f"{PACKAGE}.{name}", text)]
    checks = (_arrows_up, _foreign, _too_long, _empty_names, _asserts, _probing, _knobs_of_two_defaults)
    assert not any(check(sources) for check in checks)

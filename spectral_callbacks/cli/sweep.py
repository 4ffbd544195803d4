"""A sweep: one config, trained once for every entry of its `sweep` list."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spectral_callbacks.cli.installation import require, tensorboard_command

_KEY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_SEVERAL = ("sweep", "report", "config", "name")  # what no override may set
_EXPLANATION = """\
A sweep is a config for fit with two more keys at its top level:

  sweep:                                          # one run an entry
    - {model.init_args.width: 50}
    - {model.init_args.width: 100, trainer.max_steps: 5000}
    - {name: Adam, optimizer.class_path: torch.optim.Adam, optimizer.init_args.lr: 0.001}
  report: [val/loss@1000, val/loss]               # rows of the table: a metric after 1000 steps, and at the end

Every run is fit with the overrides of its entry, and logs to a folder of its own, called by its name or its overrides.
A key reaches into mappings, not into lists: trainer.callbacks is overridden as a whole. Without report the table has
every metric that a run logged. fit itself passes both keys over.
"""


@dataclasses.dataclass(frozen=True)
class Run:
    """One entry of a sweep.

    Attributes:
        name: For people, and part of a path.
        overrides: Dotted key -> value.
    """

    name: str
    overrides: Mapping[str, Any]

    def arguments(self) -> list[str]:
        """Return the overrides as options of fit."""
        return [f"--{key}={_text(value)}" for key, value in self.overrides.items()]


def sweep(arguments: Sequence[str]) -> dict[str, dict[str, float]]:
    """Train once for every entry of a config's sweep list, and print what the runs logged side by side.

    Args:
        arguments: The config, and options of fit that change every run.

    Returns:
        Name of a run -> entry of the report -> value.

    Raises:
        ModuleNotFoundError: If the extra `cli` is not installed.
    """
    parser = argparse.ArgumentParser(
        prog="spectral-callbacks sweep",
        usage="%(prog)s CONFIG [options of fit]",
        description="Train once for every entry of a config's sweep list, and compare.",
        epilog=_EXPLANATION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML, as for fit, with a sweep list")
    chosen, options = parser.parse_known_args(arguments)
    require("jsonargparse", "docstring_parser")
    from lightning.pytorch.loggers import TensorBoardLogger

    from spectral_callbacks.cli.lightning_cli import quiet, run
    from spectral_callbacks.cli.report import Report, show

    try:
        config = read_config(chosen.config)
        runs = read_runs(config)
        entries = read_report(config)
        Report(entries)
    except ValueError as error:
        parser.error(f"{chosen.config}: {error}")
    commands = {
        run.name: ["fit", "--config", str(chosen.config), *_logger(config, chosen.config.stem, run), *run.arguments()]
        for run in runs
    }
    quiet()
    for name, command in commands.items():  # a slip in the last entry should show before the first has trained
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                run([*command, *options, "--print_config"])
        except SystemExit as stopped:
            if stopped.code:
                parser.exit(2, f"{parser.prog}: {chosen.config}: fit refuses the options of run {name!r}, see above.\n")
    results: dict[str, dict[str, float]] = {}
    folders: set[Path] = set()
    try:
        for number, (name, command) in enumerate(commands.items(), 1):
            print(f"[{number}/{len(runs)}] {name}", flush=True)
            report = Report(entries)
            trainer = run([*command, *options], callbacks=[report]).trainer
            results[name] = report.values(trainer)
            folders |= {Path(x.root_dir).parent for x in trainer.loggers if isinstance(x, TensorBoardLogger)}
    finally:  # what an interrupted sweep has seen is seen
        if results:
            show(results, chosen.config.stem)
    for folder in sorted(folders):
        print(f"See it:  {tensorboard_command(str(folder))}")
    return results


def read_config(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        ValueError: If there is none.
    """
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"no config can be read: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"it holds {type(config).__name__}, and a config is a mapping: model, data, trainer, ...")
    return config


def read_runs(config: Mapping[str, Any]) -> list[Run]:
    """Return the runs of a config.

    Raises:
        ValueError: If there is no list of them, or one is malformed.

    Example:
        >>> [run.name for run in read_runs({"sweep": [{"optimizer.init_args.lr": 0.1}, {"name": "as it is"}]})]
        ['lr=0.1', 'as-it-is']
    """
    entries = config.get("sweep")
    if not isinstance(entries, list) or not entries:
        raise ValueError(
            "there is no list of runs at the top-level key sweep. Add one, for example "
            "sweep: [{optimizer.init_args.lr: 0.1}, {optimizer.init_args.lr: 0.2}]."
        )
    runs: list[Run] = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not entry:
            raise ValueError(f"entry {number} of sweep is {entry!r}; it must map dotted keys to values.")
        overrides = {key: value for key, value in entry.items() if key != "name"}
        for key in overrides:
            if not isinstance(key, str) or not _KEY.fullmatch(key) or key.partition(".")[0] in _SEVERAL:
                raise ValueError(
                    f"entry {number} of sweep has the key {key!r}; it must be the dotted name of an option of fit, "
                    "such as model.init_args.width. Lists have no dotted names: override trainer.callbacks as a whole."
                )
        name = _path_part(str(entry["name"]) if "name" in entry else _named_by(overrides))
        if not name or name in {run.name for run in runs}:
            raise ValueError(f"entry {number} of sweep is called {name!r}, as no other run may be; give it a name.")
        runs.append(Run(name, overrides))
    return runs


def read_report(config: Mapping[str, Any]) -> list[str] | None:
    """Return the rows of the table; None if the config names none.

    Raises:
        ValueError: If they are no list of names.
    """
    entries = config.get("report")
    if entries is not None and not (isinstance(entries, list) and all(isinstance(entry, str) for entry in entries)):
        raise ValueError(f"report is {entries!r}; it must be a list of metrics, such as [val/loss@1000, val/loss].")
    return entries


def _logger(config: Mapping[str, Any], name: str, run: Run) -> list[str]:
    """Return the option that gives a run a folder of its own under each logger of the config."""
    loggers: Any = (config.get("trainer") or {}).get("logger")
    if loggers is False:
        return []
    if loggers is None or loggers is True:
        loggers = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "runs"}}
    alone = not isinstance(loggers, list)
    own = []
    for logger in [loggers] if alone else loggers:
        whole: dict[str, Any] = {"class_path": logger} if isinstance(logger, str) else logger
        settings = whole.get("init_args") or {}
        own.append({**whole, "init_args": {**settings, "name": f"{settings.get('name', name)}/{run.name}"}})
    return [f"--trainer.logger={json.dumps(own[0] if alone else own)}"]


def _named_by(overrides: Mapping[str, Any]) -> str:
    last = [key.rpartition(".")[2] for key in overrides]
    short = {key: end if last.count(end) == 1 else key for key, end in zip(overrides, last, strict=True)}
    return ",".join(f"{short[key]}={_path_part(_text(value))}" for key, value in overrides.items())


def _path_part(text: str) -> str:
    return re.sub(r"[^\w.,=+-]+", "-", text).strip("-")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)

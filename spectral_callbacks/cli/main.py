"""The program: one command after another."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from spectral_callbacks.cli.installation import EXTRA_OF

_COMMANDS = {
    "fit": "train: fit --config configs/digits_sgd.yaml",
    "validate": "evaluate on the validation data",
    "test": "evaluate on the test data",
    "predict": "run the model on data",
    "sweep": "train once for every entry of a config's sweep list, and compare: sweep configs/hessian_spectrum.yaml",
    "init-entropy": "scale initial weights to the entropy of a layer: init-entropy --layer net.3 --target 5",
    "demo": "watch a small network reach the edge of stability, in a minute on one core",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command.

    Lightning is imported once it is known what for, so that `--help` is immediate.

    Args:
        arguments: What follows the program's name; None for the process's own.
    """
    parser = argparse.ArgumentParser(
        prog="spectral-callbacks",
        description="Optimizer and stability diagnostics for PyTorch Lightning.",
        epilog=(
            "spectral-callbacks COMMAND --help lists the options of a command; demo, sweep and init-entropy take those "
            "of fit."
        ),
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in _COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    chosen, rest = parser.parse_known_args(arguments)
    try:
        if chosen.command == "demo":
            from spectral_callbacks.cli.demo import demo

            demo(rest)
        elif chosen.command == "sweep":
            from spectral_callbacks.cli.sweep import sweep

            sweep(rest)
        elif chosen.command == "init-entropy":
            from spectral_callbacks.cli.init_entropy import init_entropy

            init_entropy(rest)
        else:
            from spectral_callbacks.cli.lightning_cli import run

            run([chosen.command, *rest])
    except ModuleNotFoundError as error:
        if error.name not in EXTRA_OF:
            raise
        parser.exit(1, f"{parser.prog}: {error}\n")

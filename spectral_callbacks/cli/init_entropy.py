"""A checkpoint of a run that has not begun, whose weights give a layer the entropy that was asked for."""

from __future__ import annotations

import argparse
import math
import shlex
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectral_callbacks.cli.installation import require

if TYPE_CHECKING:
    from torch import Tensor

_EXPLANATION = """\
All weight matrices of the config's model are multiplied by one factor, so that the diffusion spectral entropy of a
layer, on samples of the training data, is the target: 0 bits where the layer confuses all samples, log2 n where it
tells every one of n from the others at the width sigma. The output is a checkpoint of step 0. Train from it:

  spectral-callbacks fit --config CONFIG --ckpt_path OUTPUT

The optimizer starts afresh, with the settings that this command was given. Model.load_from_checkpoint(OUTPUT) reads
the model alone.
"""
# What makes fit set everything up and stop before the first step, without a trace but the checkpoint.
_NO_STEP = (
    "--trainer.max_steps=0",
    "--trainer.fast_dev_run=false",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.strategy=auto",
    "--trainer.precision=null",
    "--trainer.callbacks=null",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
)


def init_entropy(arguments: Sequence[str]) -> None:
    """Scale the weights of a config's model until a layer has an entropy, and save them for fit.

    Args:
        arguments: --layer, --target, options of the search, and options of fit.

    Raises:
        ModuleNotFoundError: If the extra `cli` is not installed.
    """
    parser = argparse.ArgumentParser(
        prog="spectral-callbacks init-entropy",
        usage="%(prog)s --config CONFIG --layer LAYER --target BITS [options] [options of fit]",
        description="Scale the initial weights of a model until a layer has the diffusion spectral entropy asked for.",
        epilog=_EXPLANATION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--layer", required=True, help="submodule of the model, such as net.3")
    parser.add_argument("--target", required=True, type=float, metavar="BITS", help="between 0 and log2 num_samples")
    parser.add_argument(
        "--sigma", default="official", type=_width, help="width of the kernel: a number, official (10) or sqrt_dim"
    )
    parser.add_argument("--t", default=1.0, type=float, help="steps of the diffusion (1)")
    parser.add_argument("--alpha", default=0.0, type=float, help="anisotropy of the kernel, 0 to 1 (0)")
    parser.add_argument("--low", default=1e-3, type=float, help="smallest scale (0.001)")
    parser.add_argument("--high", default=1e3, type=float, help="largest scale (1000)")
    parser.add_argument("--atol", default=0.01, type=float, help="accepted distance from the target, in bits (0.01)")
    parser.add_argument("--num_samples", default=500, type=int, help="of the training data (500)")
    parser.add_argument("--output", default="init.ckpt", type=Path, help="checkpoint, overwritten (init.ckpt)")
    chosen, options = parser.parse_known_args(arguments)
    if chosen.num_samples < 2:
        parser.error(f"num_samples is {chosen.num_samples}, and an entropy needs at least two samples.")
    require("jsonargparse", "docstring_parser")
    import torch

    from spectral_callbacks.cli.lightning_cli import quiet, run
    from spectral_callbacks.cli.report import show
    from spectral_callbacks.init import scale_to_entropy_

    quiet()
    warnings.filterwarnings("ignore", "GPU available but not used")  # a search needs no gradient, and no GPU
    cli = run(["fit", *options, *_NO_STEP], save_config=False)
    try:
        inputs = first_inputs(cli.trainer.train_dataloader, chosen.num_samples)
        found = scale_to_entropy_(
            cli.model,
            inputs,
            layer=chosen.layer,
            target=chosen.target,
            sigma=chosen.sigma,
            t=chosen.t,
            alpha=chosen.alpha,
            low=chosen.low,
            high=chosen.high,
            atol=chosen.atol,
            generator=torch.Generator().manual_seed(0),
        )
        cli.trainer.save_checkpoint(chosen.output)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except NotImplementedError as error:  # what torch raises for a model without a forward
        parser.exit(2, f"{parser.prog}: {error}. Define one that takes the inputs of a batch.\n")
    looks = {f"scale {scale:.4g}": entropy for scale, entropy in sorted(found.tried)}
    show({"bits": looks}, f"Entropy of {chosen.layer or 'the model'}")
    most = f"{len(inputs)} samples have at most {math.log2(len(inputs)):.4g}"
    print(f"Found:  scale {found.scale:.6g} with {found.entropy:.4g} bits; {most}")
    print(f"Train from it:  {shlex.join(['spectral-callbacks', 'fit', *options, '--ckpt_path', str(chosen.output)])}")


def first_inputs(loader: Iterable[Any] | None, num_samples: int) -> Tensor:  # (n, ...)
    """Return the first floating tensor, or without one the first tensor, of as many batches as it takes.

    Raises:
        ValueError: If there is none, or samples of two batches have different shapes.
    """
    import torch

    from spectral_callbacks.probe.batches import tensors_of

    inputs: list[Tensor] = []
    for batch in loader or ():
        tensors = [tensor for tensor in tensors_of(batch) if tensor.ndim]
        floating = [tensor for tensor in tensors if tensor.is_floating_point()]
        if not tensors:
            raise ValueError(f"a training batch is {type(batch).__name__} without any tensor of samples.")
        inputs.append((floating or tensors)[0])
        if inputs[0].shape[1:] != inputs[-1].shape[1:]:
            raise ValueError(
                f"training batches hold samples of the shapes {tuple(inputs[0].shape[1:])} and "
                f"{tuple(inputs[-1].shape[1:])}: pass a num_samples that the first batch of {len(inputs[0])} has."
            )
        if sum(map(len, inputs)) >= num_samples:
            break
    if not inputs:
        raise ValueError("the config has no training data to take inputs from.")
    return torch.cat(inputs)[:num_samples]


def _width(sigma: str) -> float | str:
    try:
        return float(sigma)
    except ValueError:
        return sigma  # a name, which the search knows or refuses

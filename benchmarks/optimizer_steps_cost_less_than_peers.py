"""A step of DiffGrad costs less than the peers' on the CPU, and a compiled one at most twice fused AdamW.

On the parameters of ResNet-50 (161 tensors, 25.6 million) and GPT-2 small (148 tensors, 124 million), on one thread: as
it is at most 0.75 of pytorch_optimizer's and half of torch-optimizer's, with `fused=True` at most 2.0 of
`torch.optim.AdamW(fused=True)`. DCTAdamW at rank 1/8 keeps at most 1.5 bytes a parameter. The other rows are
information. Weights, gradients and hyper-parameters are the same for all; the gradients are those of one step, so that
diffGrad's friction is 1/2.

The floor is the time in which the memory could be passed over: weights, gradients and state read once, weights and
state written once, at the bandwidth of an in-place multiplication, the best seen.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from _measure import Claims, median_seconds, options, table, taking_turns, timed
from _parameter_lists import Shape, gpt_2_small, parameters, resnet_50
from _peers import missing
from spectral_callbacks.optim import DCTAdamW, DiffGrad, ExponentiatedGradient, HypentropyGD, Trion

Parameters = list[nn.Parameter]
LR = 1e-5  # nothing is to be trained
FLOAT = 4  # bytes
STREAMED = 1 << 26  # entries whose multiplication measures the bandwidth

ADAMW = "AdamW, fused"
DIFFGRAD = "DiffGrad"
COMPILED = "DiffGrad, fused=True"
DCT_ADAMW = "DCTAdamW, rank 1/8"
PYTORCH_OPTIMIZER = "DiffGrad of pytorch_optimizer"
TORCH_OPTIMIZER = "DiffGrad of torch-optimizer"
STREAM = "in-place multiplication"
STREAM_TAKES = 5  # a round: the best is wanted


def peer(package: str) -> Callable[[Parameters], torch.optim.Optimizer]:
    """Return what makes a peer's DiffGrad."""
    return lambda weights: importlib.import_module(package).DiffGrad(weights, lr=LR)


CONTESTANTS: dict[str, Callable[[Parameters], torch.optim.Optimizer]] = {
    ADAMW: lambda weights: torch.optim.AdamW(weights, lr=LR, weight_decay=0.0, fused=True),
    "AdamW, foreach": lambda weights: torch.optim.AdamW(weights, lr=LR, weight_decay=0.0, foreach=True),
    DIFFGRAD: lambda weights: DiffGrad(weights, lr=LR),
    COMPILED: lambda weights: DiffGrad(weights, lr=LR, fused=True),
    PYTORCH_OPTIMIZER: peer("pytorch_optimizer"),
    TORCH_OPTIMIZER: peer("torch_optimizer"),
    "ExponentiatedGradient": lambda weights: ExponentiatedGradient(weights, lr=LR),
    "ExponentiatedGradient, momentum": lambda weights: ExponentiatedGradient(weights, lr=LR, momentum=0.9),
    "HypentropyGD": lambda weights: HypentropyGD(weights, lr=LR),
    DCT_ADAMW: lambda weights: DCTAdamW(weights, lr=LR, weight_decay=0.0),
    "Trion, rank 1/8": lambda weights: Trion(weights, lr=LR),
}
PACKAGES = {PYTORCH_OPTIMIZER: "pytorch_optimizer", TORCH_OPTIMIZER: "torch_optimizer"}
RARELY = {"Trion, rank 1/8": 3}  # far from any limit, and slow


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a step takes.

    Attributes:
        seconds: Of CPU time, the median.
        state: Bytes a parameter.
        floor: Seconds that passing over the memory takes.
    """

    seconds: float
    state: float
    floor: float


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of all tensors in a state."""
    held: list[Any] = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in held if isinstance(value, torch.Tensor))


def measure(shapes: Sequence[Shape], repetitions: int) -> dict[str, Cost]:
    """Let every contestant step in turn, on the same weights."""
    weights = parameters(list(shapes))
    size = sum(p.numel() for p in weights)
    rivals = {name: make(weights) for name, make in CONTESTANTS.items() if not missing(PACKAGES.get(name, "torch"))}
    for optimizer in rivals.values():
        optimizer.step()  # makes the state, compiles
    stream = torch.ones(STREAMED)
    calls: dict[str, Callable[[int], Any]] = {name: lambda _, o=o: o.step() for name, o in rivals.items()}
    calls[STREAM] = lambda _: min(timed(lambda: stream.mul_(1.0)).seconds for _ in range(STREAM_TAKES))
    runs = taking_turns(calls, repetitions, strides=RARELY)
    bandwidth = 2 * stream.nbytes / min(run.result for run in runs.pop(STREAM))
    costs = {}
    for name, steps in runs.items():
        state = state_bytes(rivals[name]) / size
        costs[name] = Cost(median_seconds(steps), state, (3 * FLOAT + 2 * state) * size / bandwidth)
    report(f"{len(weights)} tensors, {size / 1e6:.1f} million; {bandwidth / 1e9:.0f} GB/s", costs)
    return costs


def report(title: str, costs: dict[str, Cost]) -> None:
    """Print one row a contestant."""
    rows = [
        [
            name, f"{1e3 * cost.seconds:.1f}", f"{cost.seconds / costs[ADAMW].seconds:.2f}",
            f"{cost.seconds / cost.floor:.2f}", f"{cost.state:.2f}",
        ]
        for name, cost in costs.items()
    ]  # fmt: skip
    table((title, "ms", "x fused AdamW", "x floor", "state, B a parameter"), rows)
    print()


def main() -> None:
    """Compare, and claim."""
    quick = options(__doc__).quick
    claims = Claims(judge_costs=not quick)
    lists = {"ResNet-50": resnet_50()} if quick else {"ResNet-50": resnet_50(), "GPT-2 small": gpt_2_small()}
    for package in PACKAGES.values():
        if reason := missing(package):
            print(f"left out: {reason}")
    for name, shapes in lists.items():
        costs = measure(shapes, 2 if quick else 9)
        for rival, limit in ((PYTORCH_OPTIMIZER, 0.75), (TORCH_OPTIMIZER, 0.5)):
            if rival in costs:
                ratio = costs[DIFFGRAD].seconds / costs[rival].seconds
                claims.at_most(f"{name}: DiffGrad / {rival}", ratio, limit)
        claims.at_most(f"{name}: {COMPILED} / {ADAMW}", costs[COMPILED].seconds / costs[ADAMW].seconds, 2.0)
        claims.at_most(f"{name}: state of {DCT_ADAMW}, bytes a parameter", costs[DCT_ADAMW].state, 1.5, cost=False)
    claims.settle()


if __name__ == "__main__":
    main()

"""Three functions of one number with several minima, and which one each optimizer ends in.

`python -m spectral_callbacks.demo.valleys` prints the table. The functions, the start and the settings are those of the
diffGrad paper's notebooks, with true derivatives. Adam at half the learning rate finds what diffGrad finds: here, too,
the friction stays near one half.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from spectral_callbacks.optim import DiffGrad, ExponentiatedGradient, HypentropyGD

LR = 0.1
BETA = 0.95  # where the authors compare; at 0.9 Adam finds the same minima of the first two as diffGrad
START = -1.0
NUM_STEPS = 300
_NEAR = 0.05  # a run that ends as near to the lowest point has found it
_GRID = torch.linspace(-1.5, 1.5, 30001, dtype=torch.float64)


def f1(x: Tensor) -> Tensor:
    """Return two parabolas that meet at 0: minima at -0.3, the lower one, and 0.2."""
    return torch.where(x <= 0, (x + 0.3) ** 2, (x - 0.2) ** 2 + 0.05)


def f2(x: Tensor) -> Tensor:
    """Return a line and, right of -0.9, x³ + x sin 8x + 0.85, whose minima lie at -0.64, the lowest one, 0 and more.

    The derivative on the right is 8 x cos 8x + sin 8x + 3 x². The authors' notebook has x cos 8x there, without the 8.
    """
    return torch.where(x <= -0.9, -40 * x - 35.15, x**3 + x * torch.sin(8 * x) + 0.85)


def f3(x: Tensor) -> Tensor:
    """Return a parabola with a notch: minima at -0.5, 0, the lowest one, and 0.5."""
    size = x.abs()
    return torch.where(size > 0.5, x**2, torch.where(size > 0.4, 0.75 - size, 7 / 8 * size))


FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"F1": f1, "F2": f2, "F3": f3}
OPTIMIZERS: Mapping[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "Adam": lambda w: torch.optim.Adam(w, lr=LR, betas=(BETA, 0.999)),
    "DiffGrad": lambda w: DiffGrad(w, lr=LR, betas=(BETA, 0.999)),
    "DiffGrad, relative friction": lambda w: DiffGrad(w, lr=LR, betas=(BETA, 0.999), friction="relative"),
    "Adam, half the learning rate": lambda w: torch.optim.Adam(w, lr=LR / 2, betas=(BETA, 0.999)),
    "Adam, β₁ = 0.9": lambda w: torch.optim.Adam(w, lr=LR, betas=(0.9, 0.999)),
    "SGD": lambda w: torch.optim.SGD(w, lr=LR),
    "HypentropyGD": lambda w: HypentropyGD(w, lr=LR),
    "ExponentiatedGradient": lambda w: ExponentiatedGradient(w, lr=LR),
}


@dataclasses.dataclass(frozen=True)
class End:
    """Where a run has ended.

    Attributes:
        x: The last point.
        value: Of the function, there.
        is_lowest: Whether it is near the function's lowest point.
    """

    x: float
    value: float
    is_lowest: bool


def lowest(function: Callable[[Tensor], Tensor]) -> float:
    """Return the lowest point of a function of one number between -1.5 and 1.5.

    Example:
        >>> round(lowest(f1), 3)
        -0.3
    """
    return _GRID[function(_GRID).argmin()].item()


def descend(
    function: Callable[[Tensor], Tensor],
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    *,
    num_steps: int = NUM_STEPS,
) -> End:
    """Return where an optimizer ends that starts at -1 and is given the true gradients.

    Args:
        function: Of one number, elementwise.
        make: Makes the optimizer of a list of parameters.
        num_steps: How many steps it takes.

    Example:
        >>> end = descend(f1, lambda w: torch.optim.SGD(w, lr=0.1))
        >>> round(end.x, 4), end.is_lowest
        (-0.3, True)
    """
    x = nn.Parameter(torch.tensor(START, dtype=torch.float64))
    optimizer = make([x])
    for _ in range(num_steps):
        optimizer.zero_grad()
        function(x).backward()
        optimizer.step()
    with torch.no_grad():
        return End(x.item(), function(x).item(), abs(x.item() - lowest(function)) < _NEAR)


def main() -> None:
    """Print where each optimizer ends."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Where {NUM_STEPS} steps from {START:g} end; ✓ near the lowest point", title_justify="left")
    table.add_column("", no_wrap=True)
    for name in FUNCTIONS:
        table.add_column(name, justify="right", no_wrap=True)
    points = [lowest(function) for function in FUNCTIONS.values()]
    table.add_row("lowest point", *(f"{round(x, 3) + 0:.3f}  " for x in points), end_section=True)
    for name, make in OPTIMIZERS.items():
        ends = [descend(function, make) for function in FUNCTIONS.values()]
        table.add_row(name, *(f"{end.x:.3f} {'✓' if end.is_lowest else ' '}" for end in ends))
    Console().print(table)


if __name__ == "__main__":
    main()

"""Structure: which entry of a network's tensors belongs to which sample of a batch, found by experiment."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from spectral_callbacks.operators.agreement import Run, disagreeing
from spectral_callbacks.operators.graphs import scalar
from spectral_callbacks.operators.layout import Layout, find_layout
from spectral_callbacks.operators.parameters import ParameterSpace
from spectral_callbacks.operators.paths import Path
from spectral_callbacks.operators.uses import Uses, find_uses
from spectral_callbacks.operators.watch import visit

_ROUNDING = 1e3  # in units of ε: by so little an entry may differ between two passes over the same sample
_NUM_SEEDS = 8


class StructureChangedError(ValueError):
    """A batch runs through other operations than the one that the structure was found on."""


@dataclasses.dataclass(frozen=True)
class SampleStructure:
    """How the parameters of a network reach the samples of a batch.

    Attributes:
        space: The parameters.
        signature: Of all uses, in order.
        sizes: Of each, how many numbers a sample has in the output of the operation.
        choices: What the loss chose by the data, as `choice_of` tells.
        layouts: Of each, which item belongs to which sample; None where the parameter is untreated.
        untreated: Index of a parameter whose samples cannot be told apart in one pass -> why.
        is_random: Whether the loss depends on random numbers.
        is_final: False where it is known for the present weights only: behind a layer that starts at zero all is zero,
            and whose zero it is makes no difference yet.
    """

    space: ParameterSpace
    signature: tuple[Hashable, ...]
    sizes: tuple[float, ...]
    choices: tuple[Hashable, ...]
    layouts: tuple[Layout | None, ...]
    untreated: dict[int, str]
    is_random: bool
    is_final: bool

    def treated(self, uses: Uses, num_samples: int, *, same_loss: bool = True) -> tuple[Uses, list[Layout]]:
        """Return the uses whose samples can be told apart, with their layouts.

        Args:
            uses: Of a batch.
            num_samples: In this batch.
            same_loss: Whether it is the loss that the structure was found on, and chooses by the same random numbers.

        Raises:
            StructureChangedError: If these are not the uses that the structure was found on, or other rows are moved.
        """
        is_known = self.signature == _signature(uses) and all(
            layout is None or size == now
            for layout, size, now in zip(self.layouts, self.sizes, _sizes(uses, num_samples), strict=True)
        )
        if not is_known or (same_loss and self.choices != uses.choices):
            raise StructureChangedError(
                "this batch runs through other operations than the one that the samples were told apart on, or moves "
                "or weighs rows otherwise, so nothing is known of it; measure on data='fixed', or leave this "
                "per-sample quantity out."
            )
        kept = [(use, layout) for use, layout in zip(uses.uses, self.layouts, strict=True) if layout is not None]
        return uses.only([use for use, _ in kept]), [layout for _, layout in kept]

    def is_of(self, space: ParameterSpace) -> bool:
        """Return whether it is of these parameters."""
        return list(map(id, self.space.tensors)) == list(map(id, space.tensors))

    def explain(self) -> str:
        """Return why parameters are untreated, for people."""
        reasons = [f"{self.space.names[index]} ({reason})" for index, reason in self.untreated.items()]
        more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        return ", ".join(reasons[:3]) + more


def find_structure(space: ParameterSpace, run: Run, num_samples: int) -> SampleStructure:
    """Find the structure of a batch by running it a few times.

    A random half of the samples is replaced by copies of others, and what changes tells whose it is: where entries of
    the others change too, samples are coupled there. Then single samples and half of the batch are run alone, and must
    have the gradients that they have in the whole, up to the factor of a mean. Cost: about five passes over the batch,
    and 30 where the loss is random in eval mode too.

    Args:
        space: The parameters.
        run: Evaluates the loss on some of the samples.
        num_samples: N, in the batch.

    Raises:
        ValueError: If the loss is not the mean over its samples.
    """
    loss = scalar(run(None))
    uses, seen = _prints(space, loss)
    untreated = dict(uses.untreated)
    layouts: list[Layout | None] = [None] * len(uses.uses)
    is_final = num_samples > 1  # one sample alone tells nothing of the order of several
    if num_samples == 1:
        layouts = [Layout(1, len(seen[index][0])) if index in seen else None for index in range(len(uses.uses))]
    elif seen:
        replaced = torch.zeros(num_samples, dtype=torch.bool)
        order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(0))
        half = num_samples // 2
        replaced[order[:half]] = True
        indices = torch.arange(num_samples)
        indices[order[:half]] = order[half : 2 * half]
        others, seen_then = _prints(space, run(indices))
        same = _signature(uses) == _signature(others)
        for index, use in enumerate(uses.uses):
            same_path = same and _same_content(use.path, others.uses[index].path)
            changed = _changed(seen.get(index), seen_then.get(index)) if same_path else None
            layouts[index] = None if changed is None else find_layout(changed, replaced)
            if changed is not None and layouts[index] is None and not seen[index][1].any():
                is_final, layouts[index] = False, Layout(1, len(changed) // num_samples)
    for use, layout in zip(uses.uses, layouts, strict=True):
        if layout is None:
            untreated.setdefault(use.parameter, f"in {use.node.name()} it depends on several samples at once")
    is_random = not torch.equal(loss.detach(), scalar(run(None, seed=1)).detach())
    sizes = _sizes(uses, num_samples)
    structure = SampleStructure(space, _signature(uses), sizes, uses.choices, tuple(layouts), {}, is_random, is_final)
    structure = _without(structure, uses, untreated)
    if len(structure.untreated) == len(space.tensors):
        return structure
    treated = functools.partial(structure.treated, num_samples=num_samples, same_loss=False)
    seeds, in_eval_mode = _comparable(structure, treated, run)
    wrong = disagreeing(space, treated, run, num_samples, seeds, in_eval_mode=in_eval_mode)
    return _without(structure, uses, structure.untreated | wrong) if wrong else structure


def _without(structure: SampleStructure, uses: Uses, untreated: dict[int, str]) -> SampleStructure:
    if structure.is_random and untreated:  # masks of single samples are not those of the batch
        untreated = {
            i: untreated.get(i, f"with random numbers, as {structure.space.names[next(iter(untreated))]}")
            for i in range(len(structure.space.tensors))
        }
    layouts = [
        None if use.parameter in untreated else layout for use, layout in zip(uses.uses, structure.layouts, strict=True)
    ]
    return dataclasses.replace(structure, layouts=tuple(layouts), untreated=untreated)


def _signature(uses: Uses) -> tuple[Hashable, ...]:
    return tuple(use.signature for use in uses.uses)


def _sizes(uses: Uses, num_samples: int) -> tuple[float, ...]:
    return tuple(use.output_shape.numel() / num_samples for use in uses.uses)


def _prints(space: ParameterSpace, loss: Tensor) -> tuple[Uses, dict[int, tuple[Tensor, Tensor]]]:
    """Return, for each use, a number for each of its items that changes when the item does, and its scale."""
    uses = find_uses(loss, space.tensors)
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def see(indices: Sequence[int], gradient: Tensor) -> None:
        for index in indices:
            prints, scales = zip(*map(_print, uses.uses[index].contribution(gradient).tensors), strict=True)
            found[index] = torch.stack(prints, 1), torch.stack(scales, 1)

    try:
        visit(loss, uses, see)
    except Exception:  # noqa: BLE001 - an operation that does not show what it saved; its parameters stay untreated
        found.clear()
    return uses, found


def _print(tensor: Tensor) -> tuple[Tensor, Tensor]:  # (R,), (R,)
    items = tensor.detach().flatten(1) if tensor.ndim > 1 else tensor.detach()[:, None]
    if not items.is_floating_point():
        items = items.to(torch.float64)
    items = items.to(torch.promote_types(items.dtype, torch.float32))
    weight = torch.rand(items.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    weight = weight.to(items.device, items.dtype)
    return items @ weight, torch.linalg.vector_norm(items, dim=1) * torch.finfo(items.dtype).eps * _ROUNDING


def _changed(before: tuple[Tensor, Tensor] | None, after: tuple[Tensor, Tensor] | None) -> Tensor | None:  # (R,)
    if before is None or after is None or before[0].shape != after[0].shape:
        return None
    return ((before[0] - after[0]).abs() > torch.maximum(before[1], after[1])).any(1).cpu()


def _same_content(path: Path, other: Path) -> bool:
    """Whether a parameter meets all samples as the same tensor, whoever they are."""
    pairs = [(step.content, then.content) for step, then in zip(path.steps, other.steps, strict=True)]
    return all(
        a is None or b is None or (a.shape == b.shape and torch.allclose(a, b, rtol=_tolerance(a), atol=0.0))
        for a, b in pairs
    )


def _tolerance(t: Tensor) -> float:
    return _ROUNDING * torch.finfo(t.dtype).eps if t.is_floating_point() else 0.0


def _comparable(structure: SampleStructure, treated: Callable[[Uses], object], run: Run) -> tuple[range, bool]:
    """Return seeds, and whether eval mode: one evaluation where nothing is random, else several."""
    if not structure.is_random:
        return range(1), False
    try:
        first, second = (run(None, seed=seed, in_eval_mode=True) for seed in (0, 1))
        treated(find_uses(first, structure.space.tensors))
        is_quiet = torch.equal(first.detach(), second.detach())
    except Exception:  # noqa: BLE001 - the user's code, in a mode that it may not be made for
        is_quiet = False
    return (range(1), True) if is_quiet else (range(_NUM_SEEDS), False)

"""Pairs of factors: two parameters of a network whose product is what the network sees, found by name."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from spectral_callbacks.callbacks.layers import layer_tags
from spectral_callbacks.probe import plain_name

_WEIGHT = ".weight"


@dataclasses.dataclass(frozen=True)
class FactorPair:
    """Two parameters that are factors of one matrix.

    Attributes:
        first: Name of the parameter that is applied first.
        second: Name of the one behind it.
    """

    first: str
    second: str

    @property
    def label(self) -> str:
        """What people call it: the two names, without what they have in common in front or `.weight` at the end."""
        first, second = (name.removesuffix(_WEIGHT) for name in (self.first, self.second))
        if first == second:
            return first
        owner = ""
        for ours, theirs in zip(first.split(".")[:-1], second.split(".")[:-1], strict=False):
            if ours != theirs:
                break
            owner += f"{ours}."
        return f"{first}-{second[len(owner) :]}"

    def factors(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:  # (m, k), (n, k)
        """Return F and G of the product F Gᵀ.

        Weights of layers, (k, n) and then (m, k), have the product second @ first. Two parameters of as many columns
        that do not fit so are F and G themselves. Kernels of convolutions are matrices with a row for each output.

        Raises:
            ValueError: If they fit in neither way.
        """
        first, second = (_matrix(name, parameters[name]) for name in (self.first, self.second))
        if second.shape[1] == first.shape[0]:
            return second, first.T
        if second.shape[1] == first.shape[1]:
            return second, first
        raise ValueError(
            f"{self.first} {tuple(first.shape)} and {self.second} {tuple(second.shape)} are no factors of one matrix: "
            "the second needs as many columns as the first has rows, in the order in which they are applied."
        )


def find_pairs(module: nn.Module, wanted: Sequence[str | Sequence[str]]) -> dict[str, FactorPair]:
    """Return the pairs that are asked for, by the names that tags call them.

    Args:
        module: Has the parameters.
        wanted: Each two names, or "first:second", of parameters or of modules with a weight. `*` stands for anything,
            and for the same in both names of a pair; such names are those of matrices alone.

    Raises:
        ValueError: If a name is none of the module's, with those that come close; or if two are no factors.
    """
    parameters = named_parameters(module)
    found: dict[FactorPair, None] = {}
    for entry in wanted:
        first, second = _names(entry)
        if "*" in first or "*" in second:
            found |= dict.fromkeys(_matching(first, second, parameters))
        else:
            found[FactorPair(_resolved(first, parameters), _resolved(second, parameters))] = None
    for pair in found:
        pair.factors(parameters)
    by_name = {f"{pair.first}:{pair.second}": pair for pair in found}
    labels = [pair.label for pair in found]
    by_label = by_name if len(set(labels)) < len(labels) else dict(zip(labels, found, strict=True))
    return {tag: by_label[label] for label, tag in layer_tags(by_label).items()}


def named_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's parameters under all of their names, without what torch.compile puts into them."""
    return {plain_name(name): p for name, p in module.named_parameters(remove_duplicate=False)}


def _names(entry: str | Sequence[str]) -> tuple[str, str]:
    names = entry.split(":") if isinstance(entry, str) else list(entry)
    if len(names) != 2 or not all(names):
        raise ValueError(
            f"pairs holds {entry!r}, and must hold pairs of names, such as ('encoder.0', 'encoder.1') or "
            "'*.lora_A.*:*.lora_B.*'."
        )
    return names[0], names[1]


def _resolved(name: str, parameters: Mapping[str, Tensor]) -> str:
    for candidate in (name, f"{name}{_WEIGHT}"):
        if candidate in parameters:
            return candidate
    close = difflib.get_close_matches(name, [*parameters, *(n.removesuffix(_WEIGHT) for n in parameters)], n=3)
    hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else f"It has {', '.join(list(parameters)[:5])}."
    raise ValueError(f"pairs names {name!r}, which is no parameter, and no module with a weight. {hint}")


def _matching(first: str, second: str, parameters: Mapping[str, Tensor]) -> list[FactorPair]:
    matrices = [name for name, p in parameters.items() if p.ndim >= 2]
    befores, behinds = (_matches(pattern, matrices) for pattern in (first, second))
    pairs = [FactorPair(befores[stars], behinds[stars]) for stars in befores if stars in behinds]
    if not pairs:
        closest = difflib.get_close_matches(first.replace("*", ""), matrices, n=3, cutoff=0.3) or matrices[:3]
        raise ValueError(
            f"pairs: {first!r} matches {len(befores)} matrices and {second!r} {len(behinds)}, and none of them have "
            f"the same in place of *. The module has {', '.join(closest)}."
        )
    return pairs


def _matches(pattern: str, names: Sequence[str]) -> dict[tuple[str, ...], str]:
    """Return the names that a pattern fits, by what stands in place of its stars."""
    found: dict[tuple[str, ...], str] = {}
    for form in (pattern, f"{pattern}{_WEIGHT}"):
        expression = re.compile("(.*)".join(map(re.escape, form.split("*"))))
        for name in names:
            if match := expression.fullmatch(name):
                found.setdefault(match.groups(), name)
    return found


def _matrix(name: str, parameter: Tensor) -> Tensor:
    if parameter.ndim < 2:
        raise ValueError(f"{name} {tuple(parameter.shape)} is no matrix, and so no factor of one.")
    return parameter.detach().flatten(1)

"""Tags: their grammar, what they mean, and the lines they are drawn with."""

from __future__ import annotations

import dataclasses
import re

_GRAMMAR = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)+")


@dataclasses.dataclass(frozen=True)
class Tag:
    """One logged number.

    Attributes:
        name: `<diagnostic>/<quantity>`.
        meaning: One line for people.
        unit: "loss" is the unit of the loss, "parameter" that of a parameter, "1" a pure number.
    """

    name: str
    meaning: str
    unit: str = "1"


@dataclasses.dataclass(frozen=True)
class Chart:
    """Several tags in one picture: a quantity and its reference lines.

    Attributes:
        title: Heading of the picture.
        tags: What it draws, the quantity first.
    """

    title: str
    tags: tuple[str, ...]


COST_OVERHEAD = Tag("cost/overhead", "share of the wall time of the fit so far that the spectral callbacks spent")


def check_tag(tag: str) -> str:
    """Return a tag that every logger can take, or raise.

    Raises:
        ValueError: If the tag has other characters than letters, digits, `_`, `-`, `.`, or no `/`.

    Example:
        >>> check_tag("sharpness/lambda_max")
        'sharpness/lambda_max'
    """
    if not _GRAMMAR.fullmatch(tag):
        raise ValueError(
            f"tag {tag!r} must read <diagnostic>/<quantity>[/<layer>] in letters, digits, '_', '-' and '.'; other "
            "characters break some logger. Rename it."
        )
    return tag


def rename(tag: str, name: str) -> str:
    """Return the tag with its first segment replaced.

    Example:
        >>> rename("sharpness/lambda_max", "sharpness_eval")
        'sharpness_eval/lambda_max'
    """
    return f"{name}/{tag.partition('/')[2]}"


def layout(charts: dict[str, tuple[Chart, ...]]) -> dict[str, dict[str, list[object]]]:
    """Return TensorBoard's custom-scalars layout for the charts of each section.

    Example:
        >>> layout({"sharpness": (Chart("edge", ("sharpness/lambda_max",)),)})
        {'sharpness': {'edge': ['Multiline', ['^sharpness/lambda_max$']]}}
    """
    return {
        section: {chart.title: ["Multiline", [f"^{re.escape(tag)}$" for tag in chart.tags]] for chart in drawn}
        for section, drawn in charts.items()
    }

"""The scale nearest to 1 at which a number takes a value: steps outwards until it is passed, then bisection."""

from __future__ import annotations

import math
from collections.abc import Callable

_STEP = 2.0  # from one scale to the next, until two lie on both sides of the target
_NARROWEST = 1e-6  # relative width of a bracket that bisection gives up at: single precision hardly knows a finer one

Look = tuple[float, float]
"""A scale and the number there; NaN where the number is not finite."""


class UnreachedError(ValueError):
    """No scale gave the target; `looks` are those that were tried."""

    def __init__(self, message: str, looks: list[Look]) -> None:
        super().__init__(message)
        self.looks = looks


def search_scale(
    number_at: Callable[[float], float],
    target: float,
    *,
    low: float,
    high: float,
    atol: float,
) -> list[Look]:
    """Look at scale after scale until the number is within `atol` of the target.

    Steps of 2 leave scale 1 in both directions by turns, first in the one that a number which rises would take; a
    direction ends where the number is not finite. Once the target lies between two neighbouring scales, their geometric
    mean is looked at, and of the two halves the one that has the target in it is kept. So the scale that is found lies
    in the crossing nearest to 1, up to a factor of 2, where the number crosses the target more than once.

    Args:
        number_at: Number at a scale, or NaN.
        target: What it should be.
        low: Smallest scale.
        high: Largest scale; 1 lies between the two.
        atol: Accepted distance.

    Returns:
        Every look, in order; the last is the one that is found.

    Raises:
        UnreachedError: If the target is not passed between `low` and `high`, or only by a jump.

    Example:
        >>> looks = search_scale(lambda scale: scale**2, 10.0, low=0.1, high=10.0, atol=0.1)
        >>> [scale for scale, _ in looks[:4]], round(looks[-1][0], 1)
        ([1.0, 2.0, 0.5, 4.0], 3.2)
    """
    looks: list[Look] = []

    def excess_at(scale: float) -> float:
        looks.append((scale, number_at(scale)))
        return looks[-1][1] - target

    excess = excess_at(1.0)
    if abs(excess) <= atol:
        return looks
    near = far = 1.0
    fronts = {} if math.isnan(excess) else {_STEP: 1.0, 1 / _STEP: 1.0}
    if excess > 0:
        fronts = dict(reversed(fronts.items()))
    while fronts and near == far:
        for factor, reached in list(fronts.items()):
            further = min(max(reached * factor, low), high)
            beyond = excess_at(further) if further != reached else math.nan
            if abs(beyond) <= atol:
                return looks
            if math.isnan(beyond):
                del fronts[factor]
            elif (beyond > 0) != (excess > 0):
                near, far = reached, further
                break
            else:
                fronts[factor] = further
    if near == far:
        raise UnreachedError(f"target={target!r} is reached at no scale between {low:g} and {high:g}", looks)
    while abs(math.log(far / near)) > _NARROWEST:
        middle = math.sqrt(near * far)
        beyond = excess_at(middle)
        if abs(beyond) <= atol:
            return looks
        if (beyond > 0) == (excess > 0):
            near = middle
        else:
            far = middle
    raise UnreachedError(f"target={target!r} is passed by a jump at scale {near:.6g}", looks)

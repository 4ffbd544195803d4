"""Functions of the user's, given as they are or by their dotted paths, as a YAML file must."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def resolved(function: Callable[..., Any] | str, knob: str, signature: str) -> Callable[..., Any]:
    """Return a function, imported if it is given by its dotted path.

    Args:
        function: Or its path.
        knob: What the user called it by, for the error.
        signature: What it must take and return, for the error.

    Raises:
        ValueError: If it is neither, or cannot be imported.

    Example:
        >>> resolved("math.sqrt", "root", "(x) -> float")(9.0)
        3.0
    """
    if not isinstance(function, str):
        if not callable(function):
            raise ValueError(f"{knob}={function!r} must be a function {signature}, or its dotted path.")
        return function
    module, _, attribute = function.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{knob}={function!r} must be the dotted path of a function {signature}: {error}.") from error

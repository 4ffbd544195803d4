"""Attempts: what a model or its batches may not have is tried, and left out where it fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


class Attempts:
    """Looks for quantities that not every model has; that one is missing is said once.

    Args:
        say: Is told what is left out, and why.
        retries: Whether what failed is looked for again, because it may come; it is said once all the same.

    Example:
        >>> attempt = Attempts(print)
        >>> attempt("the square root", lambda: 2.0)
        2.0
        >>> for _ in range(2):
        ...     attempt("the number", lambda: int("two"))
        the number left out: invalid literal for int() with base 10: 'two'
    """

    def __init__(self, say: Callable[[str], None], *, retries: bool = False) -> None:
        self._say = say
        self._retries = retries
        self._failed: set[str] = set()

    def __call__(self, what: str, find: Callable[[], _T]) -> _T | None:
        """Return what is found, or None where a `ValueError` says that there is none."""
        if what in self._failed and not self._retries:
            return None
        try:
            return find()
        except ValueError as reason:
            if what not in self._failed:
                self._failed.add(what)
                self._say(f"{what} left out: {reason}")
            return None

    def forget(self) -> None:
        """Try again what failed."""
        self._failed.clear()

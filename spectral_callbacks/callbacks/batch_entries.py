"""Entries of batches: where in a batch something lies, said by key, index or function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from spectral_callbacks.callbacks.dotted import resolved

EntrySource = int | str | Callable[[Any], Any]


class BatchEntry:
    """Finds one thing in batches.

    Args:
        source: Its key or index in the batch; a function batch -> thing; or the dotted path of such a function, which
            is a string with a dot in it.
        knob: What the user called it by, for errors.
        form: What a function is to return, for errors, for example "(N,) integers".

    Raises:
        ValueError: If the source is none of these.

    Example:
        >>> BatchEntry("y", "labels", "(N,) integers")({"x": 1.0, "y": 2})
        2
    """

    def __init__(self, source: EntrySource, knob: str, form: str) -> None:
        self._source, self._knob, self._form = source, knob, form
        self._find: Callable[[Any], Any] = self._entry
        if not isinstance(source, int) and not (isinstance(source, str) and "." not in source):
            self._find = resolved(source, knob, f"(batch) -> {form}")

    def __call__(self, batch: Any) -> Any:
        """Return the thing.

        Raises:
            ValueError: If the batch has no such entry, or the function fails.
        """
        try:
            return self._find(batch)
        except Exception as error:
            what = "is no key of the batch" if self._find == self._entry else "fails on the batch"
            raise ValueError(
                f"{self} {what}, a {type(batch).__name__} ({error!r}); pass the key or index of what "
                f"is meant, or a function (batch) -> {self._form}."
            ) from error

    def __str__(self) -> str:
        return f"{self._knob}={self._source!r}"

    def _entry(self, batch: Any) -> Any:
        if isinstance(batch, Tensor):  # whose index would be a sample
            raise TypeError("it is one tensor, and has no entries")
        return batch[self._source]

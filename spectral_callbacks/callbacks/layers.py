"""Layers: which module's own a parameter is, and what a tag calls it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

from spectral_callbacks.probe import plain_name

_BESIDE_THE_GRAMMAR = re.compile(r"[^A-Za-z0-9_.-]")  # characters that a tag cannot have


def layer_of(parameter: str) -> str:
    """Return the name of the module that has a parameter; the parameter's own where that is the root.

    Example:
        >>> layer_of("encoder.0.weight"), layer_of("scale")
        ('encoder.0', 'scale')
    """
    plain = plain_name(parameter)
    return plain.rpartition(".")[0] or plain


def layer_tags(layers: Iterable[str]) -> dict[str, str]:
    """Return each layer's name as a tag can have it; of several that would be called the same, later ones by number.

    Example:
        >>> layer_tags(["first part", "first_part", "first/part"])
        {'first_part': 'first_part', 'first part': 'first_part_2', 'first/part': 'first_part_3'}
    """
    tags: dict[str, str] = {}
    for layer in sorted(layers, key=lambda name: _BESIDE_THE_GRAMMAR.search(name) is not None):
        tag = plain = _BESIDE_THE_GRAMMAR.sub("_", layer)
        counted = itertools.count(2)
        while tag in tags.values():
            tag = f"{plain}_{next(counted)}"
        tags[layer] = tag
    return tags

"""Elementwise kernels that are compiled once for tensors of every length."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class FlatKernel:
    """An elementwise in-place function of flat tensors, compiled when first run.

    One compilation, of some seconds, serves all lengths of 2 and more and all values in the tensors: hand over numbers
    that change in a tensor too. Other dtypes, devices and flags, and None in place of a tensor, take one each.

    Args:
        function: It writes into its tensors, and returns nothing.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function
        self._variants: dict[tuple[Any, ...], Callable[..., None]] = {}
        self._failed = False

    def run(self, *arguments: Tensor | bool | None) -> bool:
        """Run the compiled function and return True; where it can't be compiled, warn the first time, return False.

        The tensors are then as they were: it is compiled before it runs.
        """
        if self._failed:
            return False
        variant = tuple((a.dtype, a.device) if isinstance(a, Tensor) else a for a in arguments)
        kernel = self._variants.get(variant)
        if kernel is not None:
            kernel(*arguments)
            return True
        kernel = torch.compile(self._copy(), dynamic=True, fullgraph=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of PyTorch, for what its compiler imports
                kernel(*arguments)
        except Exception as error:  # noqa: BLE001 - compilers raise what they like
            self._failed = True
            reason = " ".join(str(error).split("\n")[:2])
            warnings.warn(
                f"{self._function.__name__} could not be compiled ({type(error).__name__}: {reason}); fused=True has "
                "no effect, and steps are taken as without it. It needs a C++ compiler on the CPU, Triton on a GPU.",
                stacklevel=2,
            )
            return False
        self._variants[variant] = kernel
        return True

    def _copy(self) -> Callable[..., None]:
        """Return the function with code of its own, since PyTorch counts by code, and stops at eight compilations."""
        return types.FunctionType(
            self._function.__code__.replace(), self._function.__globals__, self._function.__name__
        )

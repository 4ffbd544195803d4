from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from spectral_callbacks.optim.compiled import FlatKernel


def axpy(y: Tensor, x: Tensor, scale: Tensor, other: Tensor | None, flag: bool) -> None:
    total = y + scale * x if other is None else y + scale * x + other
    y.copy_(-total if flag else total)


def refusing(calls: list[int]) -> Callable[..., Any]:
    def compile_nothing(function: Callable[..., None], **settings: Any) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            calls.append(1)
            raise RuntimeError("no C++ compiler found\nand many lines more")

        return run

    return compile_nothing


def test_without_a_compiler_it_says_so_once_and_leaves_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(torch, "compile", refusing(calls))
    kernel, y, x = FlatKernel(axpy), torch.ones(3), torch.ones(3)
    with pytest.warns(UserWarning, match=r"axpy could not be compiled \(RuntimeError: no C\+\+ compiler found and"):
        assert not kernel.run(y, x, torch.tensor(2.0), None, False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernel.run(y, x, torch.tensor(2.0), None, False)
    assert torch.equal(y, torch.ones(3))
    assert len(calls) == 1


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Compilations are counted, and need no compiler."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **settings: compiler(f, backend="eager", **settings))
    torch._dynamo.reset()
    counters.clear()
    yield counters["stats"]
    torch._dynamo.reset()
    counters.clear()


def test_one_compilation_serves_all_lengths_and_numbers(counted: Any) -> None:
    kernel = FlatKernel(axpy)
    for n in (2, 5, 64, 1001):
        y = torch.ones(n)
        assert kernel.run(y, torch.ones(n), torch.tensor(float(n)), None, False)
        assert torch.equal(y, torch.full((n,), 1.0 + n))
    assert counted["unique_graphs"] == 1


def test_flags_and_dtypes_may_be_more_than_pytorch_compiles_of_one_function(counted: Any) -> None:
    kernel = FlatKernel(axpy)
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for dtype in dtypes:
        for other in (None, torch.ones(4, dtype=dtype)):
            for flag in (False, True):
                y = torch.ones(4, dtype=dtype)
                assert kernel.run(y, torch.ones(4, dtype=dtype), torch.tensor(2.0), other, flag)
                assert torch.equal(
                    y, torch.full((4,), (-1 if flag else 1) * (3.0 if other is None else 4.0), dtype=dtype)
                )
    assert counted["unique_graphs"] == 16

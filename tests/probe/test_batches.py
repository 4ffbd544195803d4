from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, MutableMapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from spectral_callbacks.probe.batches import copied, mapped, num_samples, selected, shares, tensors_of

A, B, C = torch.zeros(4, 2), torch.ones(4), torch.tensor(3.0)


class Pair(NamedTuple):
    x: Tensor
    labels: list[Any]


@dataclasses.dataclass
class Sample:
    x: Tensor
    rest: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Tensor
    rest: list[Any]


class Encoding(collections.UserDict):  # type: ignore[type-arg]
    """A mapping that is no dict, as tokenizers return it."""


class Tensors(list):  # type: ignore[type-arg]
    """A list with an attribute."""

    kind = "own"


class Graph:
    """A batch of a library's own kind."""

    def __init__(self) -> None:
        self.nodes = {"x": torch.zeros(2)}

    def __repr__(self) -> str:
        return f"Graph({self.nodes})"


BATCHES: dict[str, Any] = {
    "tensor": A,
    "list": [A, B, C],
    "tuple": (A, B, "name"),
    "dict": {"x": A, "labels": [B], "meta": {"c": C, "id": 7}},
    "named tuple": Pair(A, [B, C]),
    "dataclass": Sample(A, {"b": B}),
    "frozen dataclass": Frozen(A, [B, C]),
    "mapping": Encoding(x=A, labels=[B]),
    "subclass of list": Tensors([A, [B]]),
    "object": Graph(),
    "arrays and words": {"a": [1.5, "word"], "ids": range(3)},
    "nothing": None,
}


def spoil(batch: Any) -> None:
    """Write to every tensor and empty every container, as a training step does that pops the labels."""
    if isinstance(batch, Tensor):
        batch.fill_(9)
    elif isinstance(batch, MutableMapping):
        for value in list(batch.values()):
            spoil(value)
        batch.clear()
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            spoil(value)
        if isinstance(batch, list):
            batch.clear()
    elif dataclasses.is_dataclass(batch):
        for field in dataclasses.fields(batch):
            spoil(getattr(batch, field.name))
            object.__setattr__(batch, field.name, None)
    elif isinstance(batch, Graph):
        spoil(batch.nodes)
        del batch.nodes


@pytest.mark.parametrize("kind", BATCHES)
def test_a_copy_reads_the_same(kind: str) -> None:
    batch = BATCHES[kind]
    assert type(copied(batch)) is type(batch)
    assert repr(copied(batch)) == repr(batch)


@pytest.mark.parametrize("kind", BATCHES)
def test_what_is_done_to_a_copy_leaves_the_batch_as_it_is(kind: str) -> None:
    batch = BATCHES[kind]
    before = repr(batch)
    spoil(copied(batch))
    assert repr(batch) == before


def test_a_tensor_that_occurs_twice_does_so_in_the_copy() -> None:
    first, second = copied([A, {"again": A}])
    assert second["again"] is first


def test_of_a_view_only_what_is_in_view_is_copied() -> None:
    assert copied(torch.zeros(1000)[:10]).untyped_storage().nbytes() == 40


def test_a_copy_is_detached_and_requires_a_gradient_as_the_batch_does() -> None:
    leaf = torch.ones(2, requires_grad=True)
    first, second, third = copied((leaf, leaf * 2, A))
    assert first.is_leaf
    assert second.is_leaf
    assert [t.requires_grad for t in (first, second, third)] == [True, True, False]


def test_a_copy_of_an_inference_tensor_is_an_ordinary_one() -> None:
    with torch.inference_mode():
        batch = {"x": torch.ones(2)}
    assert not copied(batch)["x"].is_inference()


def test_tensors_come_in_order_from_any_nesting() -> None:
    batch = {"a": [A, (B,)], "s": Sample(C, {"b": B}), "n": Pair(A, [C]), "text": "x"}
    assert [id(t) for t in tensors_of(batch)] == [id(t) for t in (A, B, C, B, A, C)]


@pytest.mark.parametrize(
    ("batch", "size"),
    [(A, 4), ((C, B), 4), ({"id": "a", "x": torch.zeros(6, 1)}, 6), (C, 1), ("text", 1), (Frozen(B, []), 4), ([], 1)],
)
def test_the_number_of_samples_is_the_first_length(batch: Any, size: int) -> None:
    assert num_samples(batch) == size


def test_a_batch_is_mapped_tensor_by_tensor_and_each_of_them_once() -> None:
    seen: list[Tensor] = []

    def doubled(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return 2 * tensor

    batch = {"a": [A, B], "again": A, "n": Pair(C, ["word"]), "s": Frozen(B, [7])}
    found = mapped(batch, doubled)
    assert [id(t) for t in seen] == [id(t) for t in (A, B, C)]
    assert found["again"] is found["a"][0]
    assert type(found["n"]) is Pair
    assert torch.equal(found["n"].x, 2 * C)
    assert torch.equal(found["s"].x, 2 * B)
    assert found["n"].labels == ["word"]


CHOSEN = torch.tensor([3, 0, 3])


def tokens() -> dict[str, Any]:
    return {"x": torch.arange(8).view(4, 2), "labels": [torch.arange(4)], "scale": torch.tensor(2.0), "name": "a"}


NESTED: dict[str, Callable[[], Any]] = {
    "dict": tokens,
    "list": lambda: [torch.arange(4), torch.arange(4.0)],
    "tuple": lambda: (torch.arange(4), (torch.arange(4.0), 3)),
    "named tuple": lambda: Pair(torch.arange(4), [torch.arange(4.0)]),
    "dataclass": lambda: Sample(torch.arange(4), tokens()),
    "frozen dataclass": lambda: Frozen(torch.arange(4), [tokens()]),
    "mapping": lambda: Encoding(x=torch.arange(4)),
}


@pytest.mark.parametrize("kind", NESTED)
def test_samples_are_selected_from_every_tensor(kind: str) -> None:
    batch = NESTED[kind]()
    found = selected(batch, CHOSEN)
    assert type(found) is type(batch)
    for before, after in zip(tensors_of(batch), tensors_of(found), strict=True):
        assert torch.equal(after, before[CHOSEN] if before.ndim else before)
    spoil(found)
    assert repr(batch) == repr(NESTED[kind]())


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.zeros(4, 2), torch.zeros(3)), "tensors of lengths 4, 3, and a sample is one entry of dimension 0"),
        ({"scale": C, "name": "x"}, "no tensor with a dimension"),
        ([], "no tensor with a dimension"),
    ],
)
def test_a_batch_without_samples_says_so(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"the batch holds {message}"):
        selected(batch, torch.tensor([0]))


def test_indices_over_several_batches_fall_into_them_in_order() -> None:
    batches = [torch.zeros(3), torch.zeros(2), torch.zeros(4)]
    found = {place: own.tolist() for place, own in shares(batches, torch.tensor([8, 0, 5, 2, 0]))}
    assert found == {0: [0, 2, 0], 2: [3, 0]}


@pytest.mark.parametrize("wrong", [[], [[0]], [-1], [9], [0.5], [True]])
def test_an_index_that_is_no_sample_is_refused(wrong: list[Any]) -> None:
    with pytest.raises(ValueError, match="must be a vector of at least one int from 0 to 8, each a sample"):
        list(shares([torch.zeros(3), torch.zeros(6)], torch.tensor(wrong)))

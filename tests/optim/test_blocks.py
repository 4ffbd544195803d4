from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectral_callbacks.optim import blocks as module
from spectral_callbacks.optim.blocks import block_size, blocks, flat, lie_alike

LAYOUTS = {
    "contiguous": torch.zeros(2, 3, 4, 5),
    "channels last": torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "transposed": torch.zeros(6, 20).t(),
    "permuted, with a side of 1": torch.zeros(4, 1, 5, 6).permute(3, 1, 0, 2),
    "a scalar": torch.zeros(()),
    "empty": torch.zeros(0, 3),
    "every second entry": torch.zeros(20, 12)[:, ::2],
    "a column": torch.zeros(30, 4)[:, 1],
}
DENSE = {"contiguous", "channels last", "transposed", "permuted, with a side of 1", "a scalar", "empty"}


def same_layout(tensor: Tensor, values: Tensor) -> Tensor:
    """The values, in new memory, with the tensor's strides."""
    return torch.zeros(tensor.untyped_storage().nbytes() // 4).as_strided(tensor.shape, tensor.stride()).copy_(values)


@pytest.mark.parametrize("size", [1, 7, 40, 1000])
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_done_to_the_blocks_is_done_to_the_tensors(name: str, size: int) -> None:
    values = torch.arange(LAYOUTS[name].numel(), dtype=torch.float32).view(LAYOUTS[name].shape)
    target, source = same_layout(LAYOUTS[name], torch.zeros(())), same_layout(LAYOUTS[name], values)
    for a, b, nothing in blocks(target, source, None, size=size):
        assert nothing is None
        a += b
    assert torch.equal(target, values)


def test_blocks_have_at_most_their_size_and_are_flat_where_there_are_several() -> None:
    found = [a.shape for (a,) in blocks(LAYOUTS["channels last"], size=50)]
    assert found == [(50,), (50,), (20,)]


def test_tensors_that_lie_differently_come_whole() -> None:
    a, b = LAYOUTS["contiguous"], LAYOUTS["channels last"]
    [(whole, other)] = blocks(a, b, size=7)
    assert whole is a
    assert other is b


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_dense_is_known(name: str) -> None:
    assert lie_alike(LAYOUTS[name], LAYOUTS[name]) == (name in DENSE)


def test_overlapping_entries_are_not_dense() -> None:
    assert not lie_alike(torch.zeros(3).expand(4, 3))


@pytest.mark.parametrize("name", sorted(DENSE))
def test_flat_is_a_view_in_the_order_of_memory(name: str) -> None:
    tensor = LAYOUTS[name]
    view = flat(tensor)
    assert view.shape == (tensor.numel(),)
    assert view.is_contiguous()
    assert view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


def test_each_thread_has_a_block_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert block_size() == 3 * module.BLOCK
    monkeypatch.setattr(module, "BLOCK", 4)
    assert [len(a) for (a,) in blocks(torch.zeros(30))] == [12, 12, 6]

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from spectral_callbacks.probe.writes import CopyOnWrite


@torch.no_grad()
def in_place(p: Tensor) -> None:
    p.mul_(2).add_(1)


def through_data(p: Tensor) -> None:
    p.data.mul_(2)


def through_detached(p: Tensor) -> None:
    p.detach().fill_(3)


@torch.no_grad()
def through_a_view(p: Tensor) -> None:
    p.view(-1)[1:3].zero_()


@torch.no_grad()
def through_an_index(p: Tensor) -> None:
    p[0, 1] = 5.0
    p[torch.tensor([0])] = 6.0


@torch.no_grad()
def as_output(p: Tensor) -> None:
    torch.add(torch.ones_like(p), 1, out=p)


@torch.no_grad()
def in_a_list(p: Tensor) -> None:
    torch._foreach_mul_([torch.ones(1), p], 2.0)


@torch.no_grad()
def by_linear_interpolation(p: Tensor) -> None:
    torch._foreach_lerp_([p], [torch.zeros_like(p)], 0.5)


def by_new_memory(p: Tensor) -> None:
    p.data = p.data * 0.9 + 0.1


def by_new_memory_of_another_shape(p: Tensor) -> None:
    p.data = torch.zeros(7)


def by_new_memory_and_then_in_place(p: Tensor) -> None:
    p.data = p.data.clone()
    p.data.mul_(3)


def in_place_and_then_by_new_memory(p: Tensor) -> None:
    p.data.mul_(3)
    p.data = p.data.clone()


@torch.no_grad()
def transposed(p: Tensor) -> None:
    p.t().copy_(torch.ones_like(p.t()))


def by_initialisation(p: Tensor) -> None:
    nn.init.normal_(p)


def by_an_optimizer(p: Tensor) -> None:
    p.square().sum().backward()
    torch.optim.SGD([p], lr=0.1).step()


WRITES = [
    in_place, through_data, through_detached, through_a_view, through_an_index, as_output, in_a_list,
    by_linear_interpolation, by_new_memory, by_new_memory_of_another_shape, by_new_memory_and_then_in_place,
    in_place_and_then_by_new_memory, transposed, by_initialisation, by_an_optimizer,
]  # fmt: skip


def values() -> Tensor:
    return torch.arange(6.0).reshape(2, 3) + 1


@pytest.mark.parametrize("write", WRITES)
def test_every_write_is_noticed_and_undone(write: Callable[[Tensor], None]) -> None:
    p = nn.Parameter(values())
    address = p.data_ptr()
    guard = CopyOnWrite([p])
    with guard:
        write(p)
    assert not torch.equal(p, values()) or p.data_ptr() != address
    assert guard.written == {address}
    guard.restore()
    assert p.data_ptr() == address
    assert torch.equal(p, values())
    assert guard.written == set()


@pytest.mark.parametrize("write", WRITES)
def test_other_tensors_keep_what_is_written(write: Callable[[Tensor], None]) -> None:
    p, expected = nn.Parameter(values()), nn.Parameter(values())
    guard = CopyOnWrite([nn.Parameter(torch.ones(3))])
    torch.manual_seed(0)
    with guard:
        write(p)
    guard.restore()
    torch.manual_seed(0)
    write(expected)
    assert torch.equal(p, expected)


def test_overlapping_writes_are_undone_to_the_first_value() -> None:
    p = torch.zeros(4)
    guard = CopyOnWrite([p])
    with guard:
        p[1:3].fill_(1)
        p.fill_(2)
        p[2:].fill_(3)
        p[1:3].fill_(4)
    guard.restore()
    assert torch.equal(p, torch.zeros(4))


def test_a_view_of_the_batch_is_protected_with_its_whole_storage() -> None:
    base = torch.zeros(4)
    guard = CopyOnWrite([base[:2]])
    with guard:
        base.fill_(1)
    guard.restore()
    assert torch.equal(base, torch.zeros(4))


def test_reading_is_no_write() -> None:
    p = nn.Parameter(values())
    guard = CopyOnWrite([p])
    with guard:
        torch.autograd.grad(nn.functional.linear(torch.ones(1, 3), p).square().sum(), p, create_graph=True)
    assert guard.written == set()


@pytest.mark.parametrize("write", [in_place, by_new_memory])
def test_a_graph_that_needs_the_written_values_fails_instead_of_lying(write: Callable[[Tensor], None]) -> None:
    frozen, x = values().requires_grad_(False), torch.ones(2, 3, requires_grad=True)
    guard = CopyOnWrite([frozen])
    with guard:
        write(frozen)
        loss = (x * frozen).sum()
    guard.restore()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, x)


def test_empty_and_sparse_tensors_are_passed_over() -> None:
    sparse = torch.eye(2).to_sparse()
    guard = CopyOnWrite([torch.empty(0), sparse])
    with guard:
        sparse.mul_(2)
    guard.restore()
    assert guard.written == set()

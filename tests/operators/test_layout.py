from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectral_callbacks.operators.layout import Layout, find_layout, regrouped


def _owners(layout: Layout, num_samples: int) -> Tensor:  # (R,)
    """The definition, item by item."""
    size = layout.before * num_samples * layout.after
    return torch.tensor([(r // layout.after) % num_samples for r in range(size)])


def _replaced(num_samples: int, seed: int = 0) -> Tensor:
    chosen = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed))[: num_samples // 2]
    return torch.zeros(num_samples, dtype=torch.bool).index_fill_(0, chosen, True)


@pytest.mark.parametrize("layout", [Layout(1, 1), Layout(1, 6), Layout(6, 1), Layout(2, 3), Layout(3, 2), Layout(4, 4)])
def test_the_items_of_a_sample_are_those_that_the_definition_gives_it(layout: Layout) -> None:
    owners = _owners(layout, 8)
    t = torch.randn(len(owners), 2, 3, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([t[owners == i] for i in range(8)])
    assert torch.equal(regrouped(t, layout, 8), expected)


def test_where_samples_come_first_nothing_is_copied() -> None:
    t = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).T  # not contiguous
    assert regrouped(t, Layout(1, 4), 6).data_ptr() == t.data_ptr()
    assert regrouped(t, Layout(2, 2), 6).data_ptr() != t.data_ptr()


@pytest.mark.parametrize("num_samples", [7, 8, 12])
@pytest.mark.parametrize("layout", [Layout(1, 1), Layout(1, 6), Layout(6, 1), Layout(2, 3), Layout(3, 2), Layout(4, 4)])
def test_the_layout_is_found_from_which_items_changed(layout: Layout, num_samples: int) -> None:
    replaced = _replaced(num_samples)
    changed = replaced[_owners(layout, num_samples)]
    assert find_layout(changed, replaced) == layout


@pytest.mark.parametrize("layout", [Layout(1, 6), Layout(6, 1), Layout(2, 3)])
def test_the_layout_is_found_where_some_items_never_change(layout: Layout) -> None:
    replaced = _replaced(8)
    owners = _owners(layout, 8)
    kept = torch.rand(len(owners), generator=torch.Generator().manual_seed(1)) < 0.5
    assert find_layout(replaced[owners] & ~kept, replaced) == layout


def test_coupled_samples_have_no_layout() -> None:
    replaced = _replaced(8)
    assert find_layout(torch.ones(16, dtype=torch.bool), replaced) is None
    mixed = replaced[_owners(Layout(1, 2), 8)]
    mixed[_owners(Layout(1, 2), 8) == int((~replaced).nonzero()[0])] = True
    assert find_layout(mixed, replaced) is None


def test_items_that_are_no_multiple_of_the_samples_have_no_layout() -> None:
    assert find_layout(torch.zeros(9, dtype=torch.bool), _replaced(8)) is None
    assert find_layout(torch.zeros(4, dtype=torch.bool), _replaced(8)) is None


def test_where_nothing_changed_only_samples_of_one_item_have_a_layout() -> None:
    assert find_layout(torch.zeros(16, dtype=torch.bool), _replaced(8)) is None
    assert find_layout(torch.zeros(8, dtype=torch.bool), _replaced(8)) == Layout(1, 1)

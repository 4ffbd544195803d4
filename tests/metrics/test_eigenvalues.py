"""Ranks of bare eigenvalues in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spectral_callbacks.metrics.eigenvalues import (
    effective_rank_of_eigenvalues,
    entropy_of_eigenvalues,
    participation_ratio_of_eigenvalues,
    stable_rank_of_eigenvalues,
)

Rank = Callable[[Tensor], Tensor]

RANKS: dict[str, Rank] = {
    "effective_rank": effective_rank_of_eigenvalues,
    "participation_ratio": participation_ratio_of_eigenvalues,
    "stable_rank": stable_rank_of_eigenvalues,
}

# α -> effective rank of 1, 2^-α, ..., 512^-α, that of their roots, participation ratio
POWER_LAWS = {
    0.5: (409.5545, 491.7295, 281.653),
    1.0: (117.2312, 409.5545, 28.2808),
    1.5: (16.9481, 260.5851, 5.2999),
    2.0: (5.0561, 117.2312, 2.4941),
}


@pytest.mark.parametrize("name", RANKS)
@pytest.mark.parametrize("count", [1, 4, 9])
def test_equal_eigenvalues_count_one_each(name: str, count: int) -> None:
    values = torch.cat([torch.full((count,), 0.3), torch.tensor([0.0, 0.0, -1e-9])])
    assert RANKS[name](values).item() == pytest.approx(count)
    assert RANKS[name](1e6 * values).item() == pytest.approx(count)


@pytest.mark.parametrize("name", RANKS)
def test_without_variance_there_is_no_rank(name: str) -> None:
    assert math.isnan(RANKS[name](torch.zeros(5)).item())


@pytest.mark.parametrize("alpha", POWER_LAWS)
def test_power_laws_have_the_ranks_of_the_closed_form(alpha: float) -> None:
    values = torch.arange(1, 513).double() ** -alpha
    effective, of_roots, participation = POWER_LAWS[alpha]
    assert effective_rank_of_eigenvalues(values).item() == pytest.approx(effective, abs=1e-4)
    assert effective_rank_of_eigenvalues(values.sqrt()).item() == pytest.approx(of_roots, abs=1e-4)
    assert participation_ratio_of_eigenvalues(values).item() == pytest.approx(participation, abs=1e-3)
    assert stable_rank_of_eigenvalues(values).item() == pytest.approx(values.sum().item())
    assert entropy_of_eigenvalues(values).exp().item() == pytest.approx(effective, abs=1e-4)


def test_ranks_of_ten_directions_in_noise() -> None:
    values = torch.cat([torch.full((10,), 1.0 + 1e-4), torch.full((118,), 1e-4)]).double()
    assert participation_ratio_of_eigenvalues(values).item() == pytest.approx(10.024, abs=1e-3)
    assert effective_rank_of_eigenvalues(values).item() == pytest.approx(10.121, abs=1e-3)
    assert effective_rank_of_eigenvalues(values.sqrt()).item() == pytest.approx(18.177, abs=1e-3)


@pytest.mark.parametrize("function", [*RANKS.values(), entropy_of_eigenvalues])
def test_gradients_are_right(function: Rank) -> None:
    values = torch.tensor([3.0, 2.0, 0.5, 0.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, values)

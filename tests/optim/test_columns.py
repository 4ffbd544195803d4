from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from spectral_callbacks.linalg import dct_basis
from spectral_callbacks.optim.columns import BASES, carry_over, energies, strongest
from spectral_callbacks.optim.lines import Lines, lines_of

SHAPES = [(7, 4), (4, 7), (5, 5), (6, 2, 3, 3), (40, 2, 3), (2, 2)]


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", SHAPES)
def test_lines_have_the_shorter_side_for_their_width_and_come_back(shape: tuple[int, ...]) -> None:
    W = _normal(*shape)
    lines = Lines(W)
    matrix = W.reshape(shape[0], -1)
    assert (lines.width, lines.num_lines) == (min(matrix.shape), max(matrix.shape))
    assert torch.equal(lines.of(W), matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T)
    assert torch.equal(lines.to_tensor(lines.of(W)), W)


@pytest.mark.parametrize("shape", [(6, 2, 3, 3), (3, 8, 2, 2)])
def test_a_filter_stored_channels_last_is_written_like_any_other(shape: tuple[int, ...]) -> None:
    W = _normal(*shape)
    moved = W.contiguous(memory_format=torch.channels_last)
    lines = lines_of(moved)
    changed = lines.of(moved) * 2
    lines.write(changed)
    assert torch.equal(moved, 2 * W)


def test_a_view_is_written_in_place_without_a_copy() -> None:
    W = _normal(6, 3)
    lines = Lines(W)
    view = lines.of(W)
    view.add_(1)
    lines.write(view)
    assert torch.equal(W, _normal(6, 3) + 1)


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
def test_no_other_columns_leave_less_out(rank: int) -> None:
    G = _normal(5, 6)
    S = G @ dct_basis(6, torch.float64)
    chosen = strongest(energies(S), rank)
    left_out = G.square().sum() - S[:, chosen].square().sum()
    of_all = [G.square().sum() - S[:, list(c)].square().sum() for c in itertools.combinations(range(6), rank)]
    assert float(left_out) == pytest.approx(float(min(of_all)), abs=1e-12)
    assert float(left_out) <= (1 - rank / 6) * float(G.square().sum()) + 1e-12


def test_what_is_left_out_is_what_parseval_says() -> None:
    G = _normal(20, 12)
    basis = BASES["dct"](12)
    S = basis.analyze(G)
    chosen = strongest(energies(S), 5)
    rest = G.clone()
    basis.add_(rest, S[:, chosen], chosen, factor=-1.0)
    torch.testing.assert_close(rest.square().sum(), S.square().sum() - S[:, chosen].square().sum(), rtol=1e-12, atol=0)


def test_columns_are_ascending_and_the_first_of_equal_ones_are_taken() -> None:
    assert strongest(torch.ones(9), 4).tolist() == [0, 1, 2, 3]
    assert strongest(torch.tensor([1.0, 5.0, 3.0, 6.0, 4.0]), 3).tolist() == [1, 3, 4]


@pytest.mark.parametrize("rows", [0, 1, 127, 128, 129, 300])
def test_energies_are_the_sums_of_squares_over_all_blocks(rows: int) -> None:
    S = _normal(rows, 5)
    torch.testing.assert_close(energies(S), S.square().sum(dim=0), rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", BASES)
def test_a_basis_does_what_its_dense_matrix_does(name: str) -> None:
    n, columns = 7, torch.tensor([0, 2, 5], dtype=torch.int32)
    basis = BASES[name](n)
    Q = basis.analyze(torch.eye(n, dtype=torch.float64))
    lines, a = _normal(4, n), _normal(4, 3)
    torch.testing.assert_close(Q.T @ Q, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(basis.synthesize(lines), lines @ Q.T, rtol=0, atol=1e-14)
    torch.testing.assert_close(basis.project(lines, columns), lines @ Q[:, columns], rtol=0, atol=1e-14)
    expected = 0.5 * lines - 3 * a @ Q[:, columns].T
    basis.add_(lines, a, columns, factor=-3.0, decay=0.5)
    torch.testing.assert_close(lines, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("before", "after"), [([0, 2, 5], [1, 2, 6]), ([0, 1], [2, 3]), ([1, 4], [1, 4]), ([6], [0])])
def test_carrying_over_is_the_rotation_between_the_two_selections(before: list[int], after: list[int]) -> None:
    Q = dct_basis(7, torch.float64)
    R = Q[:, before].T @ Q[:, after]
    m, v, ages = _normal(4, len(before)), _normal(4, len(before)).square(), torch.arange(3, 3 + len(before))
    state = {"columns": torch.tensor(before), "ages": ages.clone(), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    carry_over(torch.tensor(after), state)
    torch.testing.assert_close(state["exp_avg"], m @ R, rtol=0, atol=1e-13)
    torch.testing.assert_close(state["exp_avg_sq"], (v @ R).abs(), rtol=0, atol=1e-13)
    torch.testing.assert_close(state["ages"].double(), ages.double() @ R, rtol=0, atol=1e-13)
    assert state["columns"].tolist() == after


def test_a_column_that_left_takes_its_infinities_with_it() -> None:
    bad = torch.tensor([[float("nan"), 1.0]])
    state = {"columns": torch.tensor([0, 1]), "ages": torch.tensor([1, 1]), "exp_avg": bad, "exp_avg_sq": bad.clone()}
    carry_over(torch.tensor([1, 2]), state)
    assert state["exp_avg"].tolist() == [[1.0, 0.0]]

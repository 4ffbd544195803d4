from __future__ import annotations

import pytest
import torch
from torch import Size, Tensor

from spectral_callbacks.operators import tiles
from spectral_callbacks.operators.factors import Factor, Rows, Sum
from spectral_callbacks.operators.paths import Along, Path
from spectral_callbacks.operators.steps import Part, Permute, Reshape, Scale, Step, Take

_IN = Size((6, 4, 2))
_STEPS: dict[str, tuple[Step, ...]] = {
    "nothing": (),
    "reshape": (Reshape(_IN, Size((3, 16))),),
    "permute": (Permute(_IN, (2, 0, 1)),),
    "rows": (Part(_IN, 0, range(1, 6, 2)),),
    "columns": (Part(_IN, 1, range(1, 3)),),
    "one": (Part(_IN, 2, 1),),
    "one entry": (Part(_IN, 0, 5), Part(Size((4, 2)), 0, 2), Part(Size((2,)), 0, 0)),
    "table": (Take(_IN, torch.tensor([[2, 3], [4, 1]])),),
    "table, rows twice": (Take(_IN, torch.tensor([2, 2, 0])),),
    "number": (Scale(_IN, torch.tensor(-3.0, dtype=torch.float64)),),
    "mask": (Scale(_IN, torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2)),),
    "zeros in a mask": (Scale(_IN, (torch.arange(6) % 2).double()[:, None, None]),),
    "all of it": (
        Permute(_IN, (1, 2, 0)),
        Part(Size((4, 2, 6)), 0, range(0, 4, 3)),
        Scale(Size((2, 2, 6)), torch.linspace(1, 2, 6, dtype=torch.float64)),
        Reshape(Size((2, 2, 6)), Size((4, 6))),
        Permute(Size((4, 6)), (1, 0)),
        Take(Size((6, 4)), torch.tensor([5, 0, 5])),
    ),
}
_ISOMETRIES = {"nothing", "reshape", "permute", "rows", "columns", "one", "one entry", "table"}


def _dense(path: Path) -> Tensor:  # (w, p)
    unit = torch.eye(path.in_shape.numel(), dtype=torch.float64)
    return path.push(unit.reshape(-1, *path.in_shape)).reshape(len(unit), -1).T


def _factor(path: Path, num_samples: int = 3) -> tuple[Factor, Tensor]:  # (N, w)
    generator = torch.Generator().manual_seed(0)
    J = torch.randn(num_samples, *path.shape, generator=generator, dtype=torch.float64)
    return Along(Rows(J), path), J.reshape(num_samples, -1) @ _dense(path)


@pytest.mark.parametrize("name", _STEPS)
def test_pull_is_the_adjoint_of_push(name: str) -> None:
    path = Path(_IN, _STEPS[name])
    unit = torch.eye(path.shape.numel(), dtype=torch.float64).reshape(-1, *path.shape)
    assert path.pull(unit).shape == (path.shape.numel(), *_IN)
    torch.testing.assert_close(path.pull(unit).flatten(1), _dense(path), rtol=1e-14, atol=1e-14)


def test_steps_do_what_torch_does() -> None:
    p = torch.arange(48.0).reshape(_IN)
    expected = {
        "reshape": p.reshape(3, 16),
        "permute": p.permute(2, 0, 1),
        "rows": p[1:6:2],
        "columns": p[:, 1:3],
        "one": p[..., 1],
        "one entry": p[5, 2, 0],
        "table": p[torch.tensor([[2, 3], [4, 1]])],
        "number": p * -3,
    }
    for name, w in expected.items():
        assert torch.equal(Path(_IN, _STEPS[name]).push(p[None])[0], w), name
        assert Path(_IN, _STEPS[name]).shape == w.shape, name


@pytest.mark.parametrize("name", _STEPS)
def test_an_isometry_keeps_inner_products_and_nothing_else_claims_to(name: str) -> None:
    path = Path(_IN, _STEPS[name])
    dense = _dense(path)
    products = dense @ dense.T
    keeps = torch.equal(products, torch.eye(len(dense), dtype=torch.float64))
    assert path.is_isometry == keeps == (name in _ISOMETRIES)
    if path.gain is not None:
        torch.testing.assert_close(products, path.gain * torch.eye(len(dense), dtype=torch.float64))


@pytest.mark.parametrize("tile_bytes", [1, 2**22])
@pytest.mark.parametrize("name", _STEPS)
def test_gradients_along_a_path_are_those_of_the_dense_map(
    name: str, tile_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "TILE_BYTES", tile_bytes)
    factor, J = _factor(Path(_IN, _STEPS[name]))
    generator = torch.Generator().manual_seed(1)
    V = torch.randn(2, *_IN, generator=generator, dtype=torch.float64)
    C = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    assert factor.shape == _IN
    torch.testing.assert_close(factor.gram(), J @ J.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(factor.products(V), J @ V.flatten(1).T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(factor.combined(C).flatten(1), C.T @ J, rtol=1e-12, atol=1e-12)
    for part in (slice(0, 6), slice(2, 3), slice(1, 5)):
        expected = J.reshape(3, 6, -1)[:, part].flatten(1)
        torch.testing.assert_close(factor.block(part), expected, rtol=1e-12, atol=1e-12)


def test_a_path_to_a_number_and_from_a_number() -> None:
    number = Path(Size([])).then(Reshape(Size([]), Size([1])))
    factor, J = _factor(number)
    assert factor.block(slice(0, 1)).shape == (3, 1)
    torch.testing.assert_close(factor.gram(), J @ J.T)
    torch.testing.assert_close(factor.combined(torch.eye(3, dtype=torch.float64)).reshape(3, 1), J)


@pytest.mark.parametrize("names", [("permute", "permute"), ("rows", "columns"), ("mask", "mask"), ("table", "number")])
def test_gradients_along_several_paths_add_up(names: tuple[str, str]) -> None:
    factors, dense = zip(*(_factor(Path(_IN, _STEPS[name])) for name in names), strict=True)
    J = torch.stack(dense).sum(0)
    torch.testing.assert_close(Sum(factors).gram(), J @ J.T, rtol=1e-12, atol=1e-12)


def test_factors_join_along_the_same_path_only() -> None:
    def kind(*steps: Step) -> object:
        return Along(Rows(torch.zeros(3, *Path(_IN, steps).shape)), Path(_IN, steps)).kind

    assert kind(Permute(_IN, (0, 2, 1))) == kind(Permute(_IN, (0, 2, 1)))
    assert kind(Part(_IN, 0, range(0, 3))) == kind(Part(_IN, 0, range(0, 3)))
    assert kind(Part(_IN, 0, range(0, 3))) != kind(Part(_IN, 0, range(3, 6)))
    scale = Scale(_IN, torch.tensor(2.0))
    assert kind(scale) == kind(scale)
    assert kind(scale) != kind(Scale(_IN, torch.tensor(3.0)))
    assert kind() == Rows(torch.zeros(3, *_IN)).kind


def test_the_path_before_a_transposition_is_found_where_there_is_one() -> None:
    before = Path(Size((3, 4, 2))).then(Part(Size((3, 4, 2)), 0, 1))
    assert before.then(Permute(Size((4, 2)), (1, 0))).before_transposition() == before
    assert before.before_transposition() is None
    assert Path(Size((4, 2))).before_transposition() is None
    assert Path(_IN, _STEPS["permute"]).before_transposition() is None

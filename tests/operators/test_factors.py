from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spectral_callbacks.operators import convolutions, outer_products, tiles
from spectral_callbacks.operators.convolutions import Convolution
from spectral_callbacks.operators.factors import Factor, LatestRows, Rows, Sum
from spectral_callbacks.operators.lookups import Lookup
from spectral_callbacks.operators.outer_products import Outer
from spectral_callbacks.operators.tiles import GramSum, blocks, group_pieces, pieces

_LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5}


class _Case:
    """A factor, and the gradients that it stands for, (N, *shape), in float64."""

    def __init__(self, build: Callable[[torch.dtype], Factor], gradients: Tensor) -> None:
        self.build = build
        self.gradients = gradients


def _draws(*shapes: Sequence[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes]


def _by_autograd(
    operation: Callable[..., Tensor], inputs: Tensor, gradients: Tensor, shape: Sequence[int], **options: Any
) -> Tensor:
    """Differentiate the real operation by its weight, sample by sample."""
    found: list[Tensor] = []
    for x, g in zip(inputs, gradients, strict=True):
        w = torch.zeros(*shape, dtype=torch.float64, requires_grad=True)
        y = operation(x, w, **options)
        found.append(torch.autograd.grad(y, w, g)[0])
    return torch.stack(found)


def _linear(num_samples: int, positions: int, r: int, c: int) -> _Case:
    left, right = _draws((num_samples, positions, r), (num_samples, positions, c))
    return _Case(
        lambda dtype: Outer(left.to(dtype)[:, None], right.to(dtype)[:, None], (r, c)),
        _by_autograd(F.linear, right, left, (r, c)),
    )


def _grouped_linear(num_samples: int, groups: int, positions: int, r: int, c: int, shape: Sequence[int]) -> _Case:
    left, right = _draws((num_samples, groups, positions, r), (num_samples, groups, positions, c))
    J = torch.zeros(num_samples, groups, r, c, dtype=torch.float64)
    for i, g, t in itertools.product(range(num_samples), range(groups), range(positions)):
        J[i, g] += torch.outer(left[i, g, t], right[i, g, t])
    return _Case(lambda dtype: Outer(left.to(dtype), right.to(dtype), shape), J.view(num_samples, *shape))


def _transposed_linear() -> _Case:
    left, right = _draws((5, 3, 4), (5, 6, 4))
    return _Case(
        lambda dtype: Outer(left.to(dtype)[:, None].mT, right.to(dtype)[:, None].mT, (3, 6)),
        _by_autograd(F.linear, right.mT, left.mT, (3, 6)),
    )


def _convolution(
    space: Sequence[int],
    kernel: Sequence[int],
    *,
    channels: tuple[int, int] = (4, 6),
    samples: int = 5,
    images: int = 1,
    groups: int = 1,
    **options: Any,
) -> _Case:
    operation = (F.conv1d, F.conv2d, F.conv3d)[len(space) - 1]
    shape = (channels[1], channels[0] // groups, *kernel)
    (x,) = _draws((samples, images, channels[0], *space))
    out = operation(x[0], torch.zeros(*shape, dtype=torch.float64), groups=groups, **options)
    (g,) = _draws((samples, *out.shape), seed=1)
    return _Case(
        lambda dtype: Convolution(x.to(dtype), g.to(dtype), shape, **options, groups=groups),
        _by_autograd(operation, x, g, shape, groups=groups, **options),
    )


def _lookup(
    num_samples: int, positions: int, rows: int, width: int, padding_idx: int | None = None, *, skewed: bool = False
) -> _Case:
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(rows, (num_samples, positions), generator=generator)
    if skewed:  # some rows in every sample, some in none
        indices = (indices * torch.rand(indices.shape, generator=generator) ** 3).long()
    (g,) = _draws((num_samples, positions, width))
    return _Case(
        lambda dtype: Lookup(indices, g.to(dtype), (rows, width), padding_idx),
        _by_autograd(F.embedding, indices, g, (rows, width), padding_idx=padding_idx),
    )


def _rows(*shape: int) -> _Case:
    (rows,) = _draws(shape)
    return _Case(lambda dtype: Rows(rows.to(dtype)), rows)


def _sum(*cases: _Case) -> _Case:
    J = torch.stack([case.gradients for case in cases]).sum(0)
    return _Case(lambda dtype: Sum([case.build(dtype) for case in cases]), J)


def _case(name: str) -> _Case:
    return _CASES[name]()


_CASES: dict[str, Callable[[], _Case]] = {
    "linear, one position": lambda: _linear(5, 1, 3, 4),
    "linear, one position, many samples": lambda: _linear(300, 1, 3, 4),
    "linear, one output": lambda: _linear(5, 1, 1, 4),
    "linear, one input": lambda: _linear(5, 4, 3, 1),
    "linear, few positions": lambda: _linear(5, 2, 40, 30),
    "linear, many positions": lambda: _linear(5, 50, 7, 6),
    "linear, many positions and samples": lambda: _linear(70, 9, 5, 4),
    "linear, few positions, many samples": lambda: _linear(100, 16, 60, 50),
    "linear, transposed memory": _transposed_linear,
    "groups, one position": lambda: _grouped_linear(5, 3, 1, 2, 4, (6, 4)),
    "groups, few positions": lambda: _grouped_linear(5, 3, 2, 30, 40, (3, 30, 40)),
    "groups, many positions": lambda: _grouped_linear(5, 3, 20, 2, 4, (3, 2, 4)),
    "groups, rows of another shape": lambda: _grouped_linear(5, 2, 20, 3, 4, (8, 3)),
    "conv1d": lambda: _convolution((9,), (3,)),
    "conv1d, stride, padding, dilation": lambda: _convolution((11,), (3,), stride=2, padding=3, dilation=2),
    "conv1d, causal width": lambda: _convolution((7,), (7,), padding=6),
    "conv2d": lambda: _convolution((6, 5), (3, 2)),
    "conv2d, pointwise": lambda: _convolution((4, 3), (1, 1)),
    "conv2d, pointwise, groups": lambda: _convolution((4, 3), (1, 1), groups=2),
    "conv2d, pointwise, stride": lambda: _convolution((5, 4), (1, 1), stride=2),
    "conv2d, pointwise, padding": lambda: _convolution((3, 4), (1, 1), padding=1),
    "conv2d, pointwise, several images": lambda: _convolution((3, 4), (1, 1), images=3),
    "conv2d, unlike sides": lambda: _convolution(
        (7, 6), (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 3), groups=2
    ),
    "conv2d, rest of a stride": lambda: _convolution((8, 8), (3, 3), stride=3, padding=1),
    "conv2d, padding beyond the kernel": lambda: _convolution((2, 2), (2, 2), padding=3, stride=2),
    "conv2d, depthwise": lambda: _convolution((5, 5), (3, 3), channels=(4, 8), padding=1, groups=4),
    "conv2d, several images": lambda: _convolution((5, 4), (3, 3), images=3, padding=1, groups=2),
    "conv2d, one position": lambda: _convolution((3, 3), (3, 3), channels=(8, 10)),
    "conv2d, few positions": lambda: _convolution((3, 3), (3, 3), channels=(30, 40), padding=(1, 0), images=1),
    "conv2d, few positions, groups, images": lambda: _convolution(
        (2, 3), (2, 2), channels=(40, 60), images=2, groups=2, samples=4
    ),
    "conv3d": lambda: _convolution((4, 3, 5), (2, 3, 2), padding=(1, 0, 1)),
    "conv3d, everything": lambda: _convolution(
        (5, 4, 6), (2, 2, 3), stride=(2, 1, 2), padding=(1, 1, 2), dilation=(2, 1, 1), groups=2, images=2
    ),
    "lookup": lambda: _lookup(5, 7, 9, 3),
    "lookup, padding": lambda: _lookup(5, 7, 4, 3, padding_idx=2),
    "lookup, first row pads": lambda: _lookup(5, 7, 4, 3, padding_idx=0),
    "lookup, rare": lambda: _lookup(40, 3, 50, 4),
    "lookup, skewed": lambda: _lookup(40, 30, 60, 4, padding_idx=1, skewed=True),
    "lookup, only padding": lambda: _lookup(3, 2, 1, 4, padding_idx=0),
    "rows": lambda: _rows(5, 4, 3),
    "rows, vector": lambda: _rows(5, 4),
    "rows, scalar": lambda: _rows(5),
    "sum of linear": lambda: _sum(_linear(5, 1, 3, 4), _linear(5, 6, 3, 4)),
    "sum of convolutions": lambda: _sum(_convolution((5, 4), (3, 3)), _convolution((5, 4), (3, 3), images=2)),
    "sum of unlike convolutions": lambda: _sum(_convolution((5, 4), (3, 3)), _convolution((7, 7), (3, 3), stride=2)),
    "sum of lookups": lambda: _sum(_lookup(5, 7, 9, 3), _lookup(5, 4, 9, 3)),
    "sum of lookups, one pads": lambda: _sum(_lookup(5, 7, 9, 3), _lookup(5, 4, 9, 3, padding_idx=1)),
    "sum of rows": lambda: _sum(_rows(5, 4, 3), _rows(5, 4, 3), _rows(5, 4, 3)),
    "sum of scalars": lambda: _sum(_rows(5), _rows(5)),
    "sum of one": lambda: _sum(_linear(5, 6, 3, 4)),
    "sum, tied": lambda: _sum(_lookup(5, 7, 9, 3), _linear(5, 7, 9, 3)),
    "sum of all": lambda: _sum(_lookup(5, 7, 9, 3), _linear(5, 7, 9, 3), _rows(5, 9, 3), _linear(5, 2, 9, 3)),
    "sum of sums": lambda: _sum(_sum(_lookup(5, 7, 9, 3), _linear(5, 7, 9, 3)), _rows(5, 9, 3)),
}


def _distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return ((a - b).norm() / b.norm().clamp_min(1e-300)).item()


def _check(case: _Case, dtype: torch.dtype) -> None:
    """Compare every method with the gradients themselves."""
    factor, J = case.build(dtype), case.gradients
    N, shape, limit = len(J), J.shape[1:], _LIMITS[dtype]
    assert (factor.num_samples, factor.shape) == (N, shape)
    flat = J.reshape(N, -1)
    V, C = _draws((3, *shape), (N, 2), seed=2)
    assert _distance(factor.gram(), flat @ flat.T) <= limit
    assert _distance(factor.products(V), flat @ V.reshape(3, -1).T) <= limit
    assert _distance(factor.combined(C), (C.T @ flat).view(2, *shape)) <= limit
    assert factor.gram().dtype == factor.products(V).dtype == factor.combined(C).dtype == dtype
    rows = flat.view(N, shape[0] if shape else 1, -1)
    for part in pieces(rows.shape[1], 2):
        assert _distance(factor.block(part), rows[:, part].flatten(1)) <= limit


@pytest.mark.parametrize("name", _CASES)
def test_every_method_agrees_with_the_gradients_of_the_real_operation(name: str) -> None:
    _check(_case(name), torch.float64)


@pytest.mark.parametrize("name", _CASES)
def test_single_precision_agrees_to_its_own_accuracy(name: str) -> None:
    _check(_case(name), torch.float32)


@pytest.mark.parametrize("name", _CASES)
@pytest.mark.parametrize("tile", [1, 200, 3000])
def test_the_smallest_tiles_change_nothing(name: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE_BYTES", tile)
    monkeypatch.setattr(tiles, "MAX_BYTES", 8 * tile)
    monkeypatch.setattr(tiles, "_PANEL", 2)
    _check(_case(name), torch.float64)


@pytest.mark.parametrize("name", _CASES)
@pytest.mark.parametrize("pairwise", [True, False])
def test_either_side_gives_the_same_inner_products(name: str, pairwise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (outer_products, convolutions):
        monkeypatch.setattr(module, "is_pairwise", lambda *_: pairwise)
    _check(_case(name), torch.float64)


def test_the_side_is_chosen_by_its_operations() -> None:
    assert outer_products.is_pairwise(128, 1, 256, 256)
    assert not outer_products.is_pairwise(128, 64, 128, 512)
    assert outer_products.is_pairwise(128, 16, 512, 4608)
    assert not outer_products.is_pairwise(128, 256, 32, 288)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_promoted_before_anything_is_multiplied(half: torch.dtype) -> None:
    left, right, rows = (x.to(half) for x in _draws((5, 1, 3, 4), (5, 1, 3, 6), (5, 4)))
    J = torch.einsum("igtr,igtc->irc", left.double(), right.double()).flatten(1)
    for factor in (Outer(left, right, (4, 6)), Outer(left, right.float(), (4, 6)), Outer(left.float(), right, (4, 6))):
        assert factor.gram().dtype == torch.float32
        assert _distance(factor.gram(), J @ J.T) <= 1e-6
    assert _distance(Rows(rows).gram(), rows.double() @ rows.double().T) <= 1e-6
    (images,) = _draws((5, 1, 2, 6))
    signal, gradient = images.to(half), images[..., :4].to(half)
    exact = Convolution(signal.double(), gradient.double(), (2, 2, 3)).gram()
    assert _distance(Convolution(signal, gradient, (2, 2, 3)).gram(), exact) <= 1e-6
    indices = torch.tensor([[0, 1], [1, 2]])
    exact = Lookup(indices, left[:2, 0, :2].double(), (3, 4)).gram()
    assert _distance(Lookup(indices, left[:2, 0, :2], (3, 4)).gram(), exact) <= 1e-6


def test_a_negative_padding_index_means_none() -> None:
    indices, (gradient,) = torch.tensor([[0, 1], [1, 1]]), _draws((2, 2, 3))
    expected = Lookup(indices, gradient, (2, 3)).gram()
    assert torch.equal(Lookup(indices, gradient, (2, 3), -1).gram(), expected)


def test_a_tensor_of_a_graph_is_taken_without_it() -> None:
    left, right = (x.requires_grad_() for x in _draws((3, 1, 4, 2), (3, 1, 4, 5)))
    factor = Outer(left, right, (2, 5))
    assert not factor.gram().requires_grad
    assert not factor.combined(torch.ones(3, 1)).requires_grad


def test_uses_of_a_tied_weight_add_up_before_the_product() -> None:
    embedding, head = _lookup(5, 7, 9, 3), _linear(5, 7, 9, 3)
    a, b = embedding.build(torch.float64), head.build(torch.float64)
    tied, apart = Sum([a, b]).gram(), a.gram() + b.gram()
    J = (embedding.gradients + head.gradients).flatten(1)
    assert _distance(tied, J @ J.T) <= 1e-12
    assert _distance(tied, apart) > 0.1


@pytest.mark.parametrize("name", ["sum of linear", "sum of convolutions", "sum of lookups", "sum of rows"])
def test_uses_of_one_kind_keep_the_product_form(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = _case(name)
    expected = case.gradients.flatten(1) @ case.gradients.flatten(1).T
    monkeypatch.setattr(Sum, "block", lambda *_: pytest.fail("the gradients were laid out"))
    assert _distance(case.build(torch.float64).gram(), expected) <= 1e-12


def test_gradients_of_other_sizes_do_not_add_up() -> None:
    with pytest.raises(ValueError, match=r"\[\(5, 4\), \(6, 4\)\].*same samples"):
        Sum([Rows(torch.ones(5, 4)), Rows(torch.ones(6, 4))])
    with pytest.raises(ValueError, match="at least one"):
        Sum([])


def test_the_convolution_of_the_gradient_is_the_transposed_convolution() -> None:
    x, g = _draws((4, 1, 3, 5), (4, 1, 2, 12))
    shape = (3, 2, 4)
    J = _by_autograd(F.conv_transpose1d, x, g, shape, stride=2).flatten(1)
    assert _distance(Convolution(g, x, shape, stride=2).gram(), J @ J.T) <= 1e-12


class _Largest(TorchDispatchMode):
    """The memory of the largest tensor that any operation makes, views of what there was not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given:
            self.num_bytes = max(self.num_bytes, result.untyped_storage().nbytes())
        return result


_LARGE: dict[str, Callable[[], Factor]] = {
    "linear": lambda: _outer(20, 1, 40, 60, 70),
    "linear, pairwise": lambda: _outer(20, 1, 10, 800, 70),
    "groups": lambda: _outer(20, 6, 30, 20, 50),
    "convolution": lambda: _convolved((20, 1, 12, 16, 16), (20, 1, 20, 16, 16), (20, 12, 3, 3), padding=1),
    "convolution, few samples": lambda: _convolved((3, 1, 4, 48, 48), (3, 1, 3, 48, 48), (3, 4, 3, 3), padding=1),
    "convolution, depthwise": lambda: _convolved(
        (4, 2, 24, 16, 16), (4, 2, 24, 16, 16), (24, 1, 3, 3), padding=1, groups=24
    ),
    "lookup": lambda: Lookup(*_looked_up(20, 40, 600, 90), (600, 90), 3),
    "tied": lambda: Sum([Lookup(*_looked_up(20, 40, 600, 90), (600, 90)), _outer(20, 1, 40, 600, 90)]),
}


def _outer(N: int, G: int, T: int, r: int, c: int) -> Outer:
    left, right = _draws((N, G, T, r), (N, G, T, c))
    return Outer(left, right, (G * r, c))


def _convolved(x: Sequence[int], g: Sequence[int], shape: Sequence[int], **options: Any) -> Convolution:
    images, gradient = _draws(x, g)
    return Convolution(images, gradient, shape, **options)


def _looked_up(N: int, T: int, rows: int, width: int) -> tuple[Tensor, Tensor]:
    indices = torch.randint(rows, (N, T), generator=torch.Generator().manual_seed(0))
    return indices, _draws((N, T, width))[0]


@pytest.mark.parametrize("name", _LARGE)
def test_no_temporary_is_larger_than_the_bound(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    factor = _LARGE[name]()
    entries = factor.num_samples * factor.shape.numel()
    V, C = _draws((2, *factor.shape), (factor.num_samples, 2))
    bound = 2**18
    assert 8 * entries > bound or sum(t.nbytes for t in factor.tensors) > bound
    monkeypatch.setattr(tiles, "MAX_BYTES", bound)
    monkeypatch.setattr(tiles, "TILE_BYTES", bound // 8)
    for method, argument in ((factor.products, V), (factor.combined, C)):
        with _Largest() as largest:
            method(argument)
        assert largest.num_bytes <= max(bound, V.nbytes)  # V is as large as what `combined` returns
    with _Largest() as largest:
        factor.gram()
    assert largest.num_bytes <= bound


def test_pieces_are_even_and_cover_the_range() -> None:
    assert [list(range(10))[part] for part in pieces(10, 4)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]
    assert list(pieces(3, 0)) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert list(pieces(0, 5)) == []


@pytest.mark.parametrize(("rows", "columns", "most"), [(7, 5, 6), (1, 100, 9), (100, 1, 9), (3, 4, 1000), (8, 8, 0)])
def test_blocks_cover_a_matrix_once(rows: int, columns: int, most: int) -> None:
    count = torch.zeros(rows, columns)
    for row, column in blocks(rows, columns, most):
        count[row, column] += 1
        assert count[row, column].numel() <= max(1, most)
    assert (count == 1).all()


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_group_pieces_are_three_at_most_and_cover_the_part_in_order(rows: int) -> None:
    for start, stop in itertools.combinations(range(4 * rows + 1), 2):
        found = list(group_pieces(slice(start, stop), rows))
        assert len(found) <= 3
        covered = [g * rows + r for groups, some in found for g in range(20)[groups] for r in range(rows)[some]]
        assert covered == list(range(start, stop))


@pytest.mark.parametrize("num_samples", [1, 31, 32, 70, 600])
def test_a_gram_matrix_is_summed_whole(num_samples: int) -> None:
    (J,) = _draws((num_samples, 9))
    total = GramSum(J, num_samples)
    total.add(J)
    total.add(2 * J)
    assert _distance(total.value(), 5 * J @ J.T) <= 1e-14
    assert _distance(total.value(), total.value().T) <= 1e-15


@pytest.mark.parametrize("samples", [5, 300])
@pytest.mark.parametrize("positions", [1, 3])
def test_a_bias_may_share_the_product_of_its_weight(samples: int, positions: int) -> None:
    left, right = _draws((samples, 1, positions, 3), (samples, 1, positions, 4))
    latest, factor = LatestRows(), Outer(left, right, (3, 4))
    assert _distance(factor.gram_after(latest), factor.gram()) <= 1e-12
    own = left[:, 0, 0] if positions == 1 else left[:, 0].sum(1)
    bias = Rows(own)
    assert (latest.gram(own) is not None) == (positions == 1)
    assert latest.gram(own.clone()) is None
    assert latest.gram(own[:, :2]) is None
    assert _distance(bias.gram_after(latest), own @ own.T) <= 1e-12
    assert _distance(Rows(own[:, :2]).gram_after(latest), own[:, :2] @ own[:, :2].T) <= 1e-12

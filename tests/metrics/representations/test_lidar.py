"""LiDAR, against the generalised eigenvalue problem of dense matrices, on objects with prescribed eigenvalues."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import pytest
import scipy.linalg
import torch
from torch import Tensor

from spectral_callbacks.linalg import Estimate
from spectral_callbacks.metrics.representations.lidar import lidar, lidar_bias_warning, lidar_eigenvalues

HALVING = (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def draw(eigenvalues: Sequence[float], sizes: Sequence[int], d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Objects with the given variances along the first axes, augmentations with variance 1, both then mixed."""
    spread = torch.zeros(d, dtype=torch.float64)
    spread[: len(eigenvalues)] = torch.tensor(eigenvalues, dtype=torch.float64).sqrt()
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    rows = (spread * randn(len(sizes), d, seed=2 * seed))[groups] + randn(len(groups), d, seed=2 * seed + 1)
    return rows @ (torch.eye(d, dtype=torch.float64) + 0.3 * randn(d, d, seed=99) / math.sqrt(d)), groups


def exact(eigenvalues: Sequence[float], d: int, num_objects: int = 512, q: int = 8) -> tuple[Tensor, Tensor]:
    """Objects and augmentations whose sample covariances are the prescribed ones exactly, Σ_w the identity."""
    corners = torch.from_numpy(scipy.linalg.hadamard(num_objects)).double()
    means = corners[:, 1 : len(eigenvalues) + 1] * torch.tensor(eigenvalues, dtype=torch.float64).sqrt()
    means = torch.cat([means, torch.zeros(num_objects, d - len(eigenvalues), dtype=torch.float64)], dim=1)
    means *= math.sqrt((num_objects - 1) / num_objects)
    axes = torch.arange(num_objects * q // 2) % d  # pairs along one axis
    steps = torch.eye(d, dtype=torch.float64)[axes]
    scale = (num_objects * (q - 1) / 2 / torch.bincount(axes, minlength=d).double()).sqrt()
    pairs = torch.stack([steps, -steps], dim=1).reshape(-1, d) * scale
    groups = torch.arange(num_objects).repeat_interleave(q)
    return means[groups] + pairs, groups


def dense_eigenvalues(features: Tensor, groups: Tensor, delta: float = 1e-4) -> Tensor:
    """Object by object, and one d×d problem."""
    objects = groups.unique().tolist()
    means = torch.stack([features[groups == g].mean(0) for g in objects])
    within = torch.cat([features[groups == g] - features[groups == g].mean(0) for g in objects])
    off = means - means.mean(0)
    inside = within.mT @ within / (len(features) - len(objects))
    inside += delta * torch.eye(features.shape[1], dtype=torch.float64)
    between = off.mT @ off / (len(objects) - 1)
    return torch.from_numpy(scipy.linalg.eigh(between.numpy(), inside.numpy(), eigvals_only=True)).flip(0).clamp(min=0)


def exp_entropy(eigenvalues: Tensor | Sequence[float]) -> float:
    shares = torch.as_tensor(eigenvalues, dtype=torch.float64)
    shares = shares[shares > 0] / shares.sum()
    return math.exp(-(shares * shares.log()).sum().item())


def quietly(features: Tensor, groups: Tensor, delta: float = 1e-4) -> Estimate:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lidar(features, groups, delta=delta)


def stacked(found: list[Estimate]) -> tuple[Tensor, Tensor]:
    return torch.tensor([(f.value, f.error) for f in found], dtype=torch.float64).unbind(1)  # type: ignore[return-value]


CASES = pytest.mark.parametrize(
    ("sizes", "d"),
    [([6] * 30, 5), ([4] * 10, 25), ([3] * 8, 60), ([1, 2, 3, 9, 5, 1, 4], 4), ([2, 1], 3)],
    ids=["many objects", "few objects", "fewer rows than features", "unequal sizes", "three rows"],
)


@CASES
@pytest.mark.parametrize("delta", [1e-4, 1.0], ids=["small delta", "large delta"])
def test_it_is_the_definition(sizes: list[int], d: int, delta: float) -> None:
    features, groups = draw((3, 2), sizes, d)
    expected = dense_eigenvalues(features, groups, delta)
    found = lidar_eigenvalues(features + 100, groups, delta=delta)
    tolerance = 1e-8 * expected[0].item()
    torch.testing.assert_close(found, expected[: len(found)], rtol=0, atol=tolerance)
    assert len(found) == min(d, len(sizes), len(features))
    assert expected[len(found) :].sum() < tolerance
    assert quietly(features + 100, groups, delta).value == pytest.approx(exp_entropy(expected), rel=1e-7)
    assert quietly(features, groups).num_samples == len(sizes)


def test_the_names_and_the_order_of_the_objects_are_no_matter() -> None:
    features, groups = draw((3, 2), [4] * 10, 6)
    expected = quietly(features, groups)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    found = quietly(features[order], (7 * groups - 30)[order])
    assert found.value == pytest.approx(expected.value, rel=1e-10)
    assert found.error == pytest.approx(expected.error, rel=1e-8)


def test_the_entropy_is_of_the_eigenvalues_not_of_their_squares() -> None:
    """A library decomposes the LiDAR matrix as if it were data, and finds 2.13 here."""
    assert exp_entropy(HALVING) == pytest.approx(3.465, abs=5e-4)
    found = quietly(*exact(HALVING, d=8), delta=1e-12)
    assert found.value == pytest.approx(3.4651216, abs=1e-6)


@pytest.mark.parametrize("r", [1, 3, 16], ids=str)
def test_equal_eigenvalues_count_their_directions(r: int) -> None:
    assert quietly(*exact([0.5] * r, d=16)).value == pytest.approx(r, rel=1e-9)


def test_a_rotation_is_no_matter_and_any_map_is_none_without_delta() -> None:
    features, groups = draw((3, 2, 1), [5] * 40, 6)
    expected = quietly(features, groups, 1e-12).value
    mix = randn(6, 6, seed=5)
    assert quietly(features @ mix, groups, 1e-12).value == pytest.approx(expected, rel=1e-8)
    Q = torch.linalg.qr(mix).Q
    assert quietly(features @ Q, groups, 1.0).value == pytest.approx(quietly(features, groups, 1.0).value, rel=1e-10)


@pytest.mark.parametrize(
    ("sizes", "delta"), [([8] * 80, 1e-4), ([3, 12] * 40, 1e-4), ([3, 12] * 40, 2.0)], ids=["equal", "unequal", "delta"]
)
def test_the_error_is_the_jackknife_for_many_objects(sizes: list[int], delta: float) -> None:
    features, groups = draw(HALVING, sizes, 5)
    features *= torch.logspace(-1, 1, 5)  # so that δ counts for more in some directions
    kept = [groups != g for g in range(len(sizes))]
    left = torch.tensor(
        [exp_entropy(dense_eigenvalues(features[k], groups[k], delta)) for k in kept], dtype=torch.float64
    )
    expected = math.sqrt((len(sizes) - 1) * left.var(correction=0).item())
    assert quietly(features, groups, delta).error == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    ("eigenvalues", "sizes", "d", "low", "high"),
    [
        pytest.param(HALVING, [8] * 60, 5, 0.87, 1.13, id="halving"),
        pytest.param(HALVING, [3, 13] * 30, 5, 0.87, 1.13, id="unequal sizes"),
        pytest.param((1, 1, 1, 1, 1, 1), [6] * 80, 6, 1.1, 1.8, id="flat"),  # at the maximum: of second order
        pytest.param((4, 2, 1), [4] * 15, 30, 1.0, 2.6, id="few objects"),
    ],
)
def test_the_error_is_the_spread(
    eigenvalues: tuple[float, ...], sizes: list[int], d: int, low: float, high: float
) -> None:
    values, errors = stacked([quietly(*draw(eigenvalues, sizes, d, seed)) for seed in range(250)])
    assert low < (errors.square().mean().sqrt() / values.std()).item() < high


@pytest.mark.parametrize(
    ("eigenvalues", "num_objects", "q", "d", "word"),
    [
        pytest.param(HALVING, 500, 100, 5, None, id="enough of all"),
        pytest.param(HALVING, 500, 10, 5, "too high", id="few augmentations"),
        pytest.param(HALVING, 100, 10, 64, "too high", id="many features"),
        pytest.param(HALVING, 40, 10, 128, "too high", id="more features than objects"),
        pytest.param([100.0] * 8, 200, 8, 8, None, id="flat, enough objects"),
        pytest.param([100.0] * 8, 40, 8, 8, "too low", id="flat, few objects"),
        pytest.param([1000.0] * 40, 30, 10, 40, "too low", id="fewer objects than directions"),
    ],
)
def test_a_bias_above_five_percent_warns(
    eigenvalues: Sequence[float], num_objects: int, q: int, d: int, word: str | None
) -> None:
    truth = exp_entropy(eigenvalues)
    looks = [draw(eigenvalues, [q] * num_objects, d, seed) for seed in range(3)]
    bias = sum(quietly(*look).value for look in looks) / 3 / truth - 1
    assert {None: abs(bias) < 0.06, "too high": bias > 0.05, "too low": bias < -0.05}[word]
    for features, groups in looks:
        message = lidar_bias_warning(lidar_eigenvalues(features, groups), torch.bincount(groups), num_features=d)
        assert message is None if word is None else word in str(message)


def test_it_warns_where_delta_decides() -> None:
    features, groups = draw(HALVING, [3] * 10, 20)
    with pytest.warns(UserWarning, match="hangs on delta"):
        lidar(features, groups)
    features, groups = draw(HALVING, [3] * 100, 6)
    dead = torch.cat([features, torch.zeros(300, 500, dtype=torch.float64)], dim=1)
    with pytest.warns(UserWarning, match="too high"):  # dead features are not in the way
        found = lidar(dead, groups)
    assert found.value == pytest.approx(quietly(features, groups).value, rel=1e-6)


def test_augmentations_that_change_nothing_leave_delta() -> None:
    means = torch.diag(torch.tensor([2.0, 1.0, 1.0]))
    groups = torch.arange(3).repeat_interleave(2)
    off = means.double() - means.double().mean(0)
    expected = exp_entropy(torch.linalg.eigvalsh(off.mT @ off).clamp(min=0)[1:])
    assert quietly(means[groups], groups).value == pytest.approx(expected, rel=1e-9)


def test_bad_input_is_refused() -> None:
    features, groups = draw((3, 2), [3] * 4, 5)
    broken = features.clone()
    broken[0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        lidar(broken, groups)
    with pytest.raises(ValueError, match="constant"):
        lidar(torch.full((12, 5), 0.1), groups)
    with pytest.raises(ValueError, match="names 1 objects for 12 rows"):
        lidar(features, torch.zeros(12, dtype=torch.int64))
    with pytest.raises(ValueError, match="names 12 objects for 12 rows"):
        lidar(features, torch.arange(12))
    with pytest.raises(ValueError, match=r"groups has shape \(4,\)"):
        lidar(features, groups[:4])
    with pytest.raises(ValueError, match=r"type torch\.float32"):
        lidar(features, groups.float())
    with pytest.raises(ValueError, match=r"delta=0\.0 must be positive"):
        lidar(features, groups, delta=0.0)
    with pytest.raises(ValueError, match="shape"):
        lidar(features[0], groups)
    mirrored = torch.cat([features[:4], -features[:4]])
    with pytest.raises(ValueError, match="the same mean for each of the 4 objects"):
        lidar(mirrored, torch.arange(4).repeat(2))

"""The two-NN dimension, against all distances at once, on manifolds of known dimension."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spectral_callbacks.linalg import Estimate
from spectral_callbacks.metrics.representations import intrinsic_dimension as module
from spectral_callbacks.metrics.representations.intrinsic_dimension import two_nn_bias_warning, two_nn_dimension


def gauss(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cube(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.rand(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def swiss_roll(n: int, seed: int = 0) -> Tensor:
    along, across = cube(n, 2, seed).unbind(1)
    angle = 1.5 * math.pi * (1 + 2 * along)
    return torch.stack([angle * angle.cos(), 21 * across, angle * angle.sin()], dim=1)


def dense_dimension(features: Tensor) -> float:
    """By every difference of two rows, a loop, and the definition."""
    logs = []
    for i in range(len(features)):
        near = sorted((features - features[i]).square().sum(1).sqrt().tolist())[1:3]
        logs.append(math.log(near[1] / near[0]))
    return (len(features) - 1) / sum(logs)


def quietly(features: Tensor) -> Estimate:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return two_nn_dimension(features)


def stacked(found: list[Estimate]) -> tuple[Tensor, Tensor]:
    values, errors = torch.tensor([(f.value, f.error) for f in found], dtype=torch.float64).unbind(1)
    return values, errors


@pytest.mark.parametrize(("n", "d"), [(3, 2), (4, 1), (50, 3), (120, 40)], ids=str)
def test_it_is_the_definition(n: int, d: int) -> None:
    features = gauss(n, d) + 100
    assert quietly(features).value == pytest.approx(dense_dimension(features), rel=1e-9)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features = gauss(100, 5)
    expected = two_nn_dimension(features)
    monkeypatch.setattr(module, "_BLOCK", 700)  # seven rows at a time
    assert two_nn_dimension(features) == expected


def test_distances_are_exact_where_inner_products_have_lost_theirs() -> None:
    """Two clusters 1e6 apart and 1e-4 wide: |x|² + |y|² - 2xy has an error of 1e-4, and d² is 1e-8."""
    features = 1e-4 * gauss(200, 2)
    features[::2] += 1e6
    features[5] += 1e3  # far from both: the fast distances do for it
    assert two_nn_dimension(features).value == pytest.approx(dense_dimension(features), rel=1e-5)


def test_a_mean_of_100_in_float32_is_no_matter() -> None:
    features = gauss(300, 4).float() + 100
    assert two_nn_dimension(features).value == pytest.approx(dense_dimension(features.double()), rel=1e-9)


def test_the_scale_is_no_matter() -> None:
    features = gauss(200, 3)
    expected = two_nn_dimension(features)
    for scale in (1e-200, 1e200):
        assert two_nn_dimension(scale * features).value == pytest.approx(expected.value, rel=1e-9)


@pytest.mark.parametrize(
    ("draw", "low", "high"),
    [
        pytest.param(lambda: swiss_roll(2000), 1.82, 2.1, id="swiss roll"),
        pytest.param(lambda: cube(2000, 5), 4.73 - 0.35, 4.73 + 0.35, id="cube 5"),
        pytest.param(lambda: gauss(2000, 10), 9.68 - 0.6, 9.68 + 0.6, id="gauss 10"),
        pytest.param(lambda: gauss(2000, 30), 22.8 - 1.2, 22.8 + 1.2, id="gauss 30"),
    ],
)
def test_known_values(draw: Callable[[], Tensor], low: float, high: float) -> None:
    assert low < quietly(draw()).value < high


@pytest.mark.parametrize("d", [1, 3, 10], ids=str)
def test_the_error_is_the_spread_and_theory_is_too_small(d: int) -> None:
    n = 100
    values, errors = stacked([quietly(features) for features in gauss(300 * n, d).split(n)])
    spread = values.std().item()
    assert errors.square().mean().sqrt().item() == pytest.approx(spread, rel=0.13)
    assert values.mean().item() / math.sqrt(n) < 0.95 * spread


def test_the_error_is_that_of_theory_at_least() -> None:
    found = stacked([quietly(gauss(20, 4, seed)) for seed in range(50)])
    assert (found[1] >= (1 - 1e-9) * found[0] / math.sqrt(20)).all()


def test_copies_count_once() -> None:
    features = gauss(300, 3)
    expected = two_nn_dimension(features)
    found = two_nn_dimension(torch.cat([features, features[:100], features[:50]]))
    assert found.num_samples == 300
    assert found.value == pytest.approx(expected.value, rel=1e-12)


def test_rows_closer_than_squares_can_tell_count_once() -> None:
    rows = [[0, 0], [0, 1e-200], [1, 0], [-1, 0], [0, 2], [0, -2], [4, 3], [-4, -3]]  # of mean 0
    features = torch.tensor(rows, dtype=torch.float64)
    found = quietly(features)
    assert found.num_samples == 7
    assert found.value == pytest.approx(dense_dimension(features[1:]), rel=1e-12)


@pytest.mark.parametrize("n", [100, 2000], ids=str)
def test_the_rule_passes_where_gaussians_lose_five_percent(n: int) -> None:
    """Well below the rule the bias is under 5 %, well above it is over."""
    limit = 1.4 * math.log(n)
    repetitions = 60 if n == 100 else 3
    for d, lost in ((round(0.75 * limit), False), (round(1.4 * limit), True)):
        mean = stacked([quietly(gauss(n, d, seed)) for seed in range(repetitions)])[0].mean().item()
        assert (mean < 0.95 * d) == lost
        assert (two_nn_bias_warning(n, mean) is not None) == lost


def test_a_biased_value_warns() -> None:
    with pytest.warns(UserWarning, match=r"two-NN dimension of \d+(\.\d)? from n=300 samples"):
        two_nn_dimension(gauss(300, 30))


def test_bad_input_is_refused() -> None:
    features = gauss(10, 3)
    broken = features.clone()
    broken[2, 0] = math.inf
    with pytest.raises(ValueError, match="not finite"):
        two_nn_dimension(broken)
    with pytest.raises(ValueError, match="constant"):
        two_nn_dimension(torch.full((10, 3), 0.1))
    with pytest.raises(ValueError, match="n=2 samples; at least 3"):
        two_nn_dimension(features[:2])
    with pytest.raises(ValueError, match="2 samples that differ; at least 3"):
        two_nn_dimension(features[[0, 1, 1, 0, 1]])
    with pytest.raises(ValueError, match="equally far"):
        two_nn_dimension(torch.eye(6))
    with pytest.raises(ValueError, match="shape"):
        two_nn_dimension(features[0])

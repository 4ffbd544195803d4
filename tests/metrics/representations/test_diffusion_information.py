"""Diffusion spectral mutual information: tight clusters, where every entropy is a logarithm, and its error."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from spectral_callbacks.linalg import Estimate
from spectral_callbacks.metrics.representations.diffusion_entropy import diffusion_entropy
from spectral_callbacks.metrics.representations.diffusion_information import diffusion_mutual_information
from spectral_callbacks.metrics.representations.diffusion_kernel import kernel_width


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(N: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(N, dim, dtype=torch.float64, generator=generator(seed))


def information(features: Tensor, groups: Tensor, seed: int = 0, **settings: Any) -> Estimate:
    return diffusion_mutual_information(features, groups, generator=generator(seed), **settings)


def heaps(groups: Tensor) -> Tensor:
    return 1e4 * torch.eye(int(groups.max()) + 1, dtype=torch.float64)[groups]


def mean_log_of_heaps_hit(k: int, size: int) -> float:
    """Mean of log2 of how many of k heaps a subset of `size` out of all k · size hits, exactly."""
    counts = {0: 1.0}  # ways to take so many samples -> from the heaps so far, by heaps hit and samples
    table = {(0, 0): 1}
    for _ in range(k):
        after: dict[tuple[int, int], int] = {}
        for (hit, taken), ways in table.items():
            for more in range(size - taken + 1):
                key = (hit + (more > 0), taken + more)
                after[key] = after.get(key, 0) + ways * math.comb(size, more)
        table = after
    whole = math.comb(k * size, size)
    counts = {hit: ways / whole for (hit, taken), ways in table.items() if taken == size}
    return sum(share * math.log2(hit) for hit, share in counts.items())


@pytest.mark.parametrize("k", [2, 4, 8])
def test_far_heaps_have_the_logarithm_of_their_number(k: int) -> None:
    groups = torch.arange(k).repeat_interleave(60)
    assert information(heaps(groups), groups, sigma="official").value == pytest.approx(math.log2(k), abs=0.01)


@pytest.mark.parametrize("size", [8, 16, 20])
def test_small_heaps_have_less_as_subsets_miss_some(size: int) -> None:
    """The official package has 2.9229 for 8 heaps of 20, 2.7124 for 16: within the error of five subsets."""
    groups = torch.arange(8).repeat(size)
    found = information(heaps(groups), groups, sigma="official", num_repetitions=30)
    assert abs(found.value - mean_log_of_heaps_hit(8, size)) < 3 * found.error < 0.1


def test_official_value_is_within_its_own_sampling() -> None:
    for size, official in ((16, 2.712448484844144), (20, 2.9229419688229594)):
        groups = torch.arange(8).repeat(size)
        found = information(heaps(groups), groups, sigma="official", num_repetitions=40)
        # The official one has the same five subsets for each of the 8 groups: √8 of the error of five.
        assert abs(found.value - official) < 3 * found.error * math.sqrt(8 * 8)


def test_shuffled_groups_have_none() -> None:
    groups = torch.arange(4).repeat(50)
    x = heaps(groups)
    shuffled = groups[torch.randperm(200, generator=generator(1))]
    assert abs(information(x, shuffled, sigma="official").value) < 1e-9
    x = gaussian(400, 5)
    found = information(x, torch.arange(400) % 10, num_repetitions=20)
    assert abs(found.value) < 0.05


def test_is_its_definition() -> None:
    """Entropies of the groups and of the subsets that the generator draws, each by the other function."""
    x, groups = gaussian(40, 3), torch.tensor([7] * 25 + [-1] * 15)
    rng, sigma = generator(), kernel_width(x)

    def entropy(samples: Tensor) -> float:
        return diffusion_entropy(x[samples], sigma=sigma, t=2, alpha=0.5, generator=generator()).value

    expected = 0.0
    for group in (-1, 7):
        own = (groups == group).nonzero()[:, 0]
        random = [entropy(torch.randperm(40, generator=rng)[: len(own)]) for _ in range(3)]
        expected += len(own) / 40 * (sum(random) / 3 - entropy(own))
    found = information(x, groups, t=2, alpha=0.5, num_repetitions=3)
    assert found.value == pytest.approx(expected, abs=1e-12)
    assert found.num_samples == 3


def test_error_is_that_over_draws() -> None:
    groups = torch.tensor([0] * 30 + [1] * 50)
    x = gaussian(80, 2) + 2 * groups[:, None]
    found = [information(x, groups, seed) for seed in range(40)]
    spread = torch.tensor([one.value for one in found]).std().item()
    told = torch.tensor([one.error for one in found]).square().mean().sqrt().item()
    assert 0.7 < told / spread < 1.4


def test_groups_of_one_sample_add_nothing() -> None:
    x = gaussian(30, 3)
    alone = information(x, torch.arange(30))
    assert (alone.value, alone.error) == (0.0, 0.0)
    groups = torch.tensor([0] * 14 + [1] * 15 + [2])
    assert math.isfinite(information(x, groups).value)


def test_one_repetition_cannot_tell_its_error() -> None:
    groups = torch.arange(2).repeat(10)
    assert information(gaussian(20, 2), groups, num_repetitions=1).error == math.inf


def test_single_precision_is_near() -> None:
    x, groups = gaussian(200, 20), torch.arange(4).repeat(50)
    double, single = (information(x, groups, eigenvalue_dtype=dtype).value for dtype in (torch.float64, torch.float32))
    assert 0 < abs(double - single) < 1e-6


def test_scale_does_not_matter_to_the_median() -> None:
    x, groups = gaussian(60, 4), torch.arange(3).repeat(20)
    assert information(1e3 * x, groups).value == pytest.approx(information(x, groups).value, abs=1e-10)


def test_samples_are_drawn_with_their_groups() -> None:
    groups = torch.arange(4).repeat_interleave(100)
    found = information(heaps(groups), groups, sigma="official", max_samples=160)
    assert found.value == pytest.approx(2, abs=0.05)
    assert found == information(heaps(groups), groups, sigma="official", max_samples=160)


BAD: dict[str, tuple[Tensor, Tensor, dict[str, Any], str]] = {
    "one group": (torch.eye(4), torch.zeros(4, dtype=torch.long), {}, "1 group"),
    "numbers": (torch.eye(4), torch.rand(4, generator=generator()), {}, "label_groups"),
    "other length": (torch.eye(4), torch.arange(3), {}, r"shape \(3,\)"),
    "vectors": (torch.eye(4), torch.eye(4).long(), {}, r"shape \(4, 4\)"),
    "one sample": (torch.ones(1, 3), torch.zeros(1).long(), {}, "n=1 samples; at least 2"),
    "NaN": (torch.full((4, 2), math.nan), torch.arange(4), {}, "not finite"),
    "constant": (torch.ones(4, 2), torch.arange(4) % 2, {}, "coincide"),
    "no repetition": (torch.eye(4), torch.arange(4), {"num_repetitions": 0}, "num_repetitions=0"),
    "no time": (torch.eye(4), torch.arange(4), {"t": -1}, "t=-1"),
}


@pytest.mark.parametrize(("features", "groups", "settings", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(features: Tensor, groups: Tensor, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        information(features, groups, **settings)

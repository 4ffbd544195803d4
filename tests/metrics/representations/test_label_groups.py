"""Groups of labels: classes, intervals, and spectral clusters against scikit-learn's."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from sklearn.cluster import SpectralClustering
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from spectral_callbacks.metrics.representations.label_groups import label_groups


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def groups_of(labels: Tensor, num_classes: int = 10, seed: int = 0) -> Tensor:
    return label_groups(labels, num_classes=num_classes, generator=generator(seed))


def blobs(k: int, size: int, distance: float) -> tuple[Tensor, Tensor]:
    own = torch.arange(k).repeat(size)
    centers = distance * torch.eye(k, dtype=torch.float64)
    return own, centers[own] + torch.randn(k * size, k, dtype=torch.float64, generator=generator())


def same_partition(a: Tensor, b: Tensor) -> bool:
    return adjusted_rand_score(a.numpy(), b.numpy()) == 1.0


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_classes_are_groups(dtype: torch.dtype) -> None:
    labels = torch.tensor([3, 0, 0, 1]).to(dtype)
    assert groups_of(labels).tolist() == labels.long().tolist()
    assert groups_of(labels[:, None]).tolist() == labels.long().tolist()


def test_numbers_fall_into_intervals_with_the_largest_in_the_last() -> None:
    """numpy's digitize by the ten lower edges, as the official package does."""
    x = torch.rand(500, dtype=torch.float64, generator=generator()) * 7 - 2
    scaled = (x - x.min()) / (x.max() - x.min())
    expected = numpy.digitize(scaled.numpy(), numpy.arange(0, 1, 0.1)) - 1
    found = groups_of(x)
    assert found.tolist() == expected.tolist()
    assert found[x.argmax()] == 9
    assert groups_of(x[:, None]).tolist() == found.tolist()


def test_far_blobs_are_clusters() -> None:
    """The graph falls apart, so that one eigenvalue has them all: an iteration from one vector misses some."""
    for k, size in ((10, 30), (4, 300)):
        own, x = blobs(k, size, 100.0)
        assert same_partition(groups_of(x, k), own)


def test_fewer_blobs_than_groups_are_divided_and_never_joined() -> None:
    own, x = blobs(4, 40, 100.0)
    found = groups_of(x, 6)
    assert len(found.unique()) == 6
    assert all(len(own[found == group].unique()) == 1 for group in range(6))


def test_more_blobs_than_groups_join_the_smallest() -> None:
    sizes = torch.tensor([40, 15, 60, 20, 30])
    own = torch.arange(5).repeat_interleave(sizes)
    x = 100 * torch.eye(5)[own] + torch.randn(165, 5, generator=generator())
    expected = torch.tensor([1, 2, 0, 2, 2])[own]
    assert groups_of(x, 3).tolist() == expected.tolist()


@pytest.mark.parametrize("num_samples", [30, 400])
def test_digits_are_clustered_as_by_scikit_learn(num_samples: int) -> None:
    x = load_digits(return_X_y=True)[0][:num_samples]
    peer = SpectralClustering(10, affinity="nearest_neighbors", assign_labels="cluster_qr", random_state=0)
    expected = torch.from_numpy(peer.fit_predict(x))
    images = torch.from_numpy(x).reshape(-1, 8, 8)
    assert adjusted_rand_score(groups_of(images).numpy(), expected.numpy()) > 0.98


def test_integer_images_are_vectors() -> None:
    x = torch.from_numpy(load_digits(return_X_y=True)[0][:200])
    assert torch.equal(groups_of(x.to(torch.uint8).reshape(-1, 8, 8)), groups_of(x))


def test_start_of_the_eigensolver_does_not_matter() -> None:
    x = torch.from_numpy(load_digits(return_X_y=True)[0][:300])
    assert torch.equal(groups_of(x), groups_of(x, seed=1))


def test_as_many_groups_as_samples() -> None:
    x = torch.arange(12.0)[:, None] * torch.ones(2)
    assert len(groups_of(x, 12)) == 12
    assert len(groups_of(x[:3], 2)) == 3


BAD: dict[str, tuple[Tensor, int, str]] = {
    "no dimension": (torch.tensor(1), 10, "shape"),
    "complex": (torch.ones(20, dtype=torch.complex64), 10, "complex64"),
    "NaN": (torch.full((20,), math.nan), 10, "not finite"),
    "all equal": (torch.full((20,), 0.1), 10, "all equal"),
    "equal vectors": (torch.full((20, 3), 0.1), 10, "all equal"),
    "one group": (torch.rand(20, generator=generator()), 1, "num_classes=1"),
    "too few samples": (torch.rand(5, 3, generator=generator()), 10, "num_classes=10"),
}


@pytest.mark.parametrize(("labels", "num_classes", "message"), BAD.values(), ids=BAD)
def test_bad_labels_are_refused(labels: Tensor, num_classes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        groups_of(labels, num_classes)

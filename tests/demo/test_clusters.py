"""The demo's clusters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectral_callbacks.demo import Classifier, ClustersDataModule
from tests.oracles import dense_hessian


def drawn(data: ClustersDataModule) -> tuple[Tensor, Tensor]:
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert len(batches) == data.steps_per_epoch
    return batches[0]


def test_clusters_have_orthogonal_means_of_the_separation_and_unit_variance() -> None:
    n = 40_000
    x, y = drawn(ClustersDataModule(num_clusters=4, separation=3.0, num_features=6, num_train=n))
    x = x.double()
    means = torch.stack([x[y == k].mean(0) for k in range(4)])
    five_errors = 5 * (4 / n) ** 0.5  # of an entry of a mean; an entry of the Gram matrix errs by about 3 such
    torch.testing.assert_close(means @ means.T, 9 * torch.eye(4).double(), rtol=0, atol=2 * 3 * five_errors)
    within = (x - means[y]).T @ (x - means[y]) / n
    torch.testing.assert_close(within, torch.eye(6).double(), rtol=0, atol=5 * (2 / n) ** 0.5)


def test_clusters_are_equally_large_to_within_one() -> None:
    _, y = drawn(ClustersDataModule(num_clusters=3, num_train=100))
    assert sorted(y.bincount().tolist()) == [33, 33, 34]


def test_samples_are_fixed_by_the_seed_whatever_the_global_state() -> None:
    x, y = drawn(ClustersDataModule(seed=1))
    state = torch.get_rng_state()
    torch.randn(3)
    again = drawn(ClustersDataModule(seed=1))
    torch.testing.assert_close((x, y), again, rtol=0, atol=0)
    assert not torch.equal(x, drawn(ClustersDataModule(seed=2))[0])
    torch.set_rng_state(state)
    drawn(ClustersDataModule())
    torch.testing.assert_close(torch.get_rng_state(), state, rtol=0, atol=0)


def test_validation_shares_means_but_no_sample_with_training() -> None:
    data = ClustersDataModule(num_clusters=2, separation=8.0)
    x, y = drawn(data)
    ((other, labels),) = list(data.val_dataloader())
    assert not set(map(tuple, x.tolist())) & set(map(tuple, other.tolist()))
    means = torch.stack([x[y == k].mean(0) for k in range(2)])
    assert torch.cdist(other, means).argmin(1).eq(labels).all()


@pytest.mark.slow
@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("num_clusters", [3, 4])
def test_as_many_eigenvalues_stand_out_as_there_are_pairs_of_clusters(num_clusters: int, width: int) -> None:
    torch.manual_seed(0)
    model = Classifier([width], num_features=20, num_classes=num_clusters)
    x, y = drawn(ClustersDataModule(num_clusters=num_clusters, num_train=2000))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(100):
        optimizer.zero_grad()
        model.loss(model(x), y).backward()
        optimizer.step()
    model.double()
    hessian = dense_hessian(lambda: model.loss(model(x.double()), y), list(model.parameters()))
    values = torch.linalg.eigvalsh(hessian).flip(0)
    num_pairs = num_clusters * (num_clusters - 1) // 2
    gaps = values[:-1] / values[1:]
    assert gaps[num_pairs - 1] > 1.4
    assert gaps[num_pairs : num_pairs + 8].max() < 1.1  # the bulk


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_clusters": 1}, r"num_clusters=1 must lie between 2 and num_features=20"),
        ({"num_clusters": 5, "num_features": 4}, r"num_clusters=5 must lie between 2 and num_features=4"),
        ({"separation": -1.0}, r"separation=-1\.0 is a length"),
        ({"num_val": 2}, r"num_val=2 must be at least num_clusters=3"),
        ({"steps_per_epoch": 0}, r"steps_per_epoch=0 must be at least 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClustersDataModule(**arguments)

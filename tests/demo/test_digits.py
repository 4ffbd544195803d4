"""The demo's data."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from spectral_callbacks.demo import DigitsDataModule


def batches(data: DigitsDataModule) -> list[list[Tensor]]:
    data.setup("fit")
    return [list(batch) for batch in data.train_dataloader()]


@pytest.mark.parametrize("batch_size", [None, 0])
def test_full_batch_is_one_batch_of_the_whole_training_set(batch_size: int | None) -> None:
    ((images, classes),) = batches(DigitsDataModule(batch_size=batch_size, num_train=300))
    assert images.shape == (300, 64)
    assert images.dtype == torch.float32
    assert classes.shape == (300,)
    assert classes.dtype == torch.int64


def test_batches_are_a_permutation_of_the_full_batch_with_a_ragged_end() -> None:
    ((images, classes),) = batches(DigitsDataModule(batch_size=0, num_train=300))
    pieces = batches(DigitsDataModule(batch_size=64, num_train=300))
    assert [len(x) for x, _ in pieces] == [64, 64, 64, 64, 44]
    full = torch.cat([images, classes[:, None]], 1)
    shuffled = torch.cat([torch.cat([x, y[:, None]], 1) for x, y in pieces])
    assert not torch.equal(shuffled, full)
    assert sorted(map(tuple, shuffled.tolist())) == sorted(map(tuple, full.tolist()))


def test_batches_are_fixed_by_the_seed_whatever_the_global_state() -> None:
    first = batches(DigitsDataModule(seed=1))
    torch.randn(3)
    second = batches(DigitsDataModule(seed=1))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not torch.equal(first[0][0], batches(DigitsDataModule(seed=2))[0][0])


def test_loading_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    batches(DigitsDataModule())
    torch.testing.assert_close(torch.get_rng_state(), state, rtol=0, atol=0)


def test_pixels_of_the_training_set_have_mean_zero_and_deviation_one_or_are_blank() -> None:
    ((images, _),) = batches(DigitsDataModule(batch_size=0))
    deviation, mean = torch.std_mean(images.double(), dim=0, correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-5)
    torch.testing.assert_close(deviation, (images != 0).any(0).double(), rtol=0, atol=1e-5)


def test_training_and_validation_share_no_image_and_leave_none_out() -> None:
    data = DigitsDataModule(batch_size=0, num_train=1000)
    ((images, _),) = batches(data)
    ((others, _),) = list(data.val_dataloader())
    assert len(images) + len(others) == 1797
    assert not set(map(tuple, images.tolist())) & set(map(tuple, others.tolist()))


@pytest.mark.parametrize(("label_noise", "num_drawn"), [(0.2, 200), (1.0, 1000), (0.0004, 0)])
def test_label_noise_draws_its_share_of_the_training_classes_anew(label_noise: float, num_drawn: int) -> None:
    ((images, true),) = batches(DigitsDataModule(batch_size=0))
    ((same, noisy),) = batches(DigitsDataModule(batch_size=0, label_noise=label_noise))
    torch.testing.assert_close(same, images, rtol=0, atol=0)
    num_wrong = int((noisy != true).sum())
    deviation = (num_drawn * 0.9 * 0.1) ** 0.5  # a drawn class is the true one in a tenth of the cases
    assert abs(num_wrong - 0.9 * num_drawn) <= 3 * deviation
    assert 0 <= noisy.min() <= noisy.max() <= 9
    assert (num_wrong == 0) == (num_drawn == 0)


def test_wrong_classes_are_the_same_in_every_epoch_and_run_whatever_the_global_state() -> None:
    data = DigitsDataModule(batch_size=0, label_noise=0.3)
    ((_, first),) = batches(data)
    ((_, in_second_epoch),) = list(data.train_dataloader())
    torch.randn(3)
    ((_, in_second_run),) = batches(DigitsDataModule(batch_size=0, label_noise=0.3))
    ((_, with_other_seed),) = batches(DigitsDataModule(batch_size=0, label_noise=0.3, seed=1))
    assert torch.equal(first, in_second_epoch)
    assert torch.equal(first, in_second_run)
    assert not torch.equal(first, with_other_seed)


def test_more_label_noise_leaves_the_wrong_classes_wrong_and_adds_others() -> None:
    ((_, true),), ((_, some),), ((_, more),) = (
        batches(DigitsDataModule(batch_size=0, label_noise=noise)) for noise in (0.0, 0.1, 0.4)
    )
    wrong = some != true
    assert wrong.any()
    assert torch.equal(more[wrong], some[wrong])
    assert (more != true).sum() > wrong.sum()


def test_label_noise_spares_the_validation_classes() -> None:
    truthful, noisy = DigitsDataModule(batch_size=0), DigitsDataModule(batch_size=0, label_noise=0.5)
    for data in (truthful, noisy):
        data.setup("fit")
    for clean, spared in zip(truthful.val_dataloader(), noisy.val_dataloader(), strict=True):
        torch.testing.assert_close(spared, clean, rtol=0, atol=0)


@pytest.mark.parametrize("label_noise", [-0.1, 1.1, float("nan")])
def test_label_noise_that_is_no_share_is_refused(label_noise: float) -> None:
    with pytest.raises(ValueError, match=rf"label_noise={label_noise} is a share .* must lie in \[0, 1\]"):
        DigitsDataModule(label_noise=label_noise)


@pytest.mark.parametrize("num_train", [0, 1797])
def test_a_split_without_training_or_validation_images_is_refused(num_train: int) -> None:
    with pytest.raises(ValueError, match=rf"num_train={num_train} must lie between 1 and 1796"):
        DigitsDataModule(num_train=num_train)


def test_a_negative_batch_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size=-1 must be positive, or 0 for all images in one batch"):
        DigitsDataModule(batch_size=-1)


def test_missing_scikit_learn_is_reported_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'spectral-callbacks\[demo\]'"):
        DigitsDataModule().setup("fit")

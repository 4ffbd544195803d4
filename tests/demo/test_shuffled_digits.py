"""Digits with shuffled labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spectral_callbacks.demo import Classifier, DigitsDataModule, ShuffledDigitsDataModule


def both(data: DigitsDataModule) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The whole of training and of validation."""
    data.setup("fit")
    (train,), (val,) = list(data.train_dataloader()), list(data.val_dataloader())
    return train, val


def test_images_and_true_labels_are_those_of_the_digits() -> None:
    plain, shuffled = both(DigitsDataModule(batch_size=0)), both(ShuffledDigitsDataModule(batch_size=0))
    for (images, labels), batch in zip(plain, shuffled, strict=True):
        assert len(batch) == 3
        torch.testing.assert_close((batch[0], batch[2]), (images, labels), rtol=0, atol=0)


def test_the_labels_are_the_true_ones_in_another_order_in_training_and_validation() -> None:
    for _, labels, true_labels in both(ShuffledDigitsDataModule(batch_size=0)):
        assert torch.equal(labels.bincount(), true_labels.bincount())
        num_equal, n = int((labels == true_labels).sum()), len(labels)
        assert abs(num_equal - 0.1 * n) < 4 * (0.09 * n) ** 0.5, "as many as chance leaves equal"


def test_without_shuffling_they_are_the_true_ones() -> None:
    for _, labels, true_labels in both(ShuffledDigitsDataModule(batch_size=0, shuffle_labels=False)):
        assert torch.equal(labels, true_labels)


def test_an_image_keeps_its_label_in_every_batch_epoch_and_run_whatever_the_global_state() -> None:
    ((images, labels, _), _) = both(ShuffledDigitsDataModule(batch_size=0))
    of_image = dict(zip(map(tuple, images.tolist()), labels.tolist(), strict=True))
    torch.randn(3)
    data = ShuffledDigitsDataModule(batch_size=64)
    data.setup("fit")
    loader = data.train_dataloader()
    for _ in range(2):
        for some, theirs, _ in loader:
            assert [of_image[tuple(image)] for image in some.tolist()] == theirs.tolist()


def test_the_seed_fixes_the_order() -> None:
    (first, again, other) = (both(ShuffledDigitsDataModule(batch_size=0, seed=seed))[0][1] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_loading_leaves_the_global_generator_alone() -> None:
    state, data = torch.get_rng_state(), ShuffledDigitsDataModule()
    data.setup("fit")
    list(data.train_dataloader())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shuffle_labels", [False, True], ids=["true", "shuffled"])
def test_a_classifier_is_trained_on_the_labels_and_not_on_the_true_ones(shuffle_labels: bool) -> None:
    (images, labels, true_labels), _ = both(ShuffledDigitsDataModule(batch_size=0, shuffle_labels=shuffle_labels))
    torch.manual_seed(0)
    model: Any = Classifier(widths=[8])
    model.log_dict = lambda *args, **options: None
    loss = model.training_step((images, labels, true_labels), 0)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(model(images), labels), rtol=0, atol=0)
    torch.testing.assert_close(loss, model.training_step((images, labels), 0), rtol=0, atol=0)

"""The text of Python's own topics."""

from __future__ import annotations

from pydoc_data.topics import topics

import pytest
import torch
from torch import Tensor

from spectral_callbacks.demo import TopicsDataModule
from spectral_callbacks.demo.text import NUM_TOKENS, Windows


def ready(**options: int) -> TopicsDataModule:
    data = TopicsDataModule(**options)
    data.setup("fit")
    return data


def drawn(data: TopicsDataModule) -> list[tuple[Tensor, Tensor]]:
    return [(inputs, targets) for inputs, targets in data.train_dataloader()]


def text_of(tokens: Tensor) -> str:
    return bytes(tokens.tolist()).decode()


def test_targets_are_the_inputs_one_token_later_and_both_are_windows_of_the_text() -> None:
    data = ready(batch_size=8, context=20, steps_per_epoch=3)
    batches = drawn(data)
    assert len(batches) == 3
    text = bytes(data._train.tokens.tolist())
    for inputs, targets in batches:
        assert inputs.shape == targets.shape == (8, 20)
        assert inputs.dtype == targets.dtype == torch.int64
        assert int(inputs.max()) < NUM_TOKENS
        for window, later in zip(inputs.tolist(), targets.tolist(), strict=True):
            assert window[1:] == later[:-1]
            assert bytes([*window, later[-1]]) in text


def test_a_single_window_is_the_one_of_the_batch() -> None:
    windows = Windows(torch.arange(50, dtype=torch.uint8), torch.tensor([7, 30]), context=4)
    batch = windows.__getitems__([1, 0])
    assert batch[0].tolist() == [[30, 31, 32, 33], [7, 8, 9, 10]]
    assert batch[1].tolist() == [[31, 32, 33, 34], [8, 9, 10, 11]]
    torch.testing.assert_close(windows[1], (batch[0][0], batch[1][0]), rtol=0, atol=0)


def test_every_paragraph_is_trained_on_or_validated_on_and_none_both() -> None:
    data = ready()
    train, val = (text_of(windows.tokens).split("\n\n") for windows in (data._train, data._val))
    every = {paragraph for text in topics.values() for paragraph in text.strip().split("\n\n")}
    assert set(train) | set(val) == every | {""}
    assert set(train) & set(val) <= {""}
    assert 0.1 < sum(map(len, val)) / sum(map(len, train + val)) < 0.3


def test_what_topics_have_in_common_is_read_once() -> None:
    data = ready()
    text = text_of(data._train.tokens) + text_of(data._val.tokens)
    common = max(topics["if"].strip().split("\n\n"), key=len)
    assert common in topics["compound"]
    assert text.count(common) == 1


def test_the_last_window_ends_with_the_text() -> None:
    data = ready(context=30, num_val=11)
    train, val = data._train, data._val
    assert len(val) == 11
    for windows in (train, val):
        assert windows[len(windows) - 1][1].tolist() == windows.tokens[-30:].tolist()
        assert windows[0][0].tolist() == windows.tokens[:30].tolist()
    assert (val.starts.diff().double() - (len(val.tokens) - 31) / 10).abs().max() <= 1


def test_validation_is_always_the_same_windows_in_the_same_order() -> None:
    data = ready(num_val=300, context=8)
    first, second = ([inputs for inputs, _ in data.val_dataloader()] for _ in range(2))
    assert [len(inputs) for inputs in first] == [256, 44]
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_windows_are_fixed_by_the_seed_whatever_the_global_state_and_leave_it_alone() -> None:
    first = drawn(ready(steps_per_epoch=2))
    state = torch.get_rng_state()
    second, other = drawn(ready(steps_per_epoch=2)), drawn(ready(steps_per_epoch=2, seed=1))
    list(ready().val_dataloader())
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(3)
    torch.testing.assert_close(drawn(ready(steps_per_epoch=2)), first, rtol=0, atol=0)
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    assert not torch.equal(first[0][0], other[0][0])


def test_every_epoch_draws_anew() -> None:
    loader = ready(steps_per_epoch=1).train_dataloader()
    (first,), (second,) = list(loader), list(loader)
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("name", ["batch_size", "context", "num_val", "steps_per_epoch"])
def test_sizes_that_are_not_positive_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}=0 must be at least 1"):
        TopicsDataModule(**{name: 0})


def test_a_context_longer_than_the_text_is_refused() -> None:
    with pytest.raises(ValueError, match=r"context=10000000 is longer than the text: at most [\d,]+ bytes"):
        ready(context=10_000_000)

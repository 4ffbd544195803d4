"""Pooling: one vector a sample, whichever side was padded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectral_callbacks.callbacks.representations.pooling import Pooling
from spectral_callbacks.probe import Layer

GENERATOR = torch.Generator().manual_seed(0)
SEQUENCES = torch.randn(4, 5, 3, generator=GENERATOR)
LENGTHS = [5, 3, 1, 2]
RIGHT = torch.tensor([[float(t < n) for t in range(5)] for n in LENGTHS])
LEFT = RIGHT.flip(1)
IMAGES = torch.randn(4, 3, 2, 5, generator=GENERATOR)


def layer(module: nn.Module | None = None) -> Layer:
    return Layer("net", module or nn.Identity(), (), True)


def padded(side: str) -> tuple[Tensor, Tensor]:
    """The same sequences, padded on one side with what must not count."""
    mask = RIGHT if side == "right" else LEFT
    x = torch.full((4, 5, 3), torch.nan)
    for i, n in enumerate(LENGTHS):
        x[i, mask[i] == 1] = SEQUENCES[i, :n]
    return x, mask


TRUTH: dict[str, Tensor] = {
    "last_token": torch.stack([SEQUENCES[i, n - 1] for i, n in enumerate(LENGTHS)]),
    "cls": SEQUENCES[:, 0],
    "mean": torch.stack([SEQUENCES[i, :n].mean(0) for i, n in enumerate(LENGTHS)]),
    "none": torch.cat([SEQUENCES[i, :n] for i, n in enumerate(LENGTHS)]),
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", TRUTH)
def test_padding_on_either_side_does_not_count(kind: Any, side: str) -> None:
    x, mask = padded(side)
    batches = [{"x": x, "attention_mask": mask.long()}, [x, mask.bool()], [x, mask]]
    sources = [None, 1, lambda batch: batch[1]]
    for batch, source in zip(batches, sources, strict=True):
        torch.testing.assert_close(Pooling(kind, mask=source)(layer(), x, batch), TRUTH[kind])


def test_flat_sequences_are_zero_where_they_are_padded() -> None:
    x, mask = padded("right")
    found = Pooling("flatten")(layer(), x, {"attention_mask": mask})
    assert torch.equal(found, x.nan_to_num(0).reshape(4, 15))


@pytest.mark.parametrize(
    ("kind", "truth"),
    [
        ("last_token", SEQUENCES[:, -1]),
        ("cls", SEQUENCES[:, 0]),
        ("mean", SEQUENCES.mean(1)),
        ("flatten", SEQUENCES.reshape(4, 15)),
        ("none", SEQUENCES.reshape(20, 3)),
    ],
)
def test_without_a_mask_all_positions_are_real(kind: Any, truth: Tensor) -> None:
    torch.testing.assert_close(Pooling(kind)(layer(), SEQUENCES, [SEQUENCES]), truth)
    other = Pooling(kind, batch_dim=1)(layer(), SEQUENCES.transpose(0, 1), [SEQUENCES.transpose(0, 1)])
    torch.testing.assert_close(other, truth)


@pytest.mark.parametrize("kind", ["mean", "flatten", "last_token", "cls", "none"])
def test_vectors_are_taken_as_they_are(kind: Any) -> None:
    assert torch.equal(Pooling(kind)(layer(), SEQUENCES[:, 0], [SEQUENCES]), SEQUENCES[:, 0])


@pytest.mark.parametrize(
    ("kind", "truth"),
    [
        ("mean", IMAGES.mean((2, 3))),
        ("none", IMAGES.permute(0, 2, 3, 1).reshape(40, 3)),
        ("flatten", IMAGES.permute(0, 2, 3, 1).reshape(4, 30)),
    ],
)
def test_images_have_their_channels_first(kind: Any, truth: Tensor) -> None:
    torch.testing.assert_close(Pooling(kind)(layer(), IMAGES, [IMAGES]), truth)


def test_signals_behind_a_convolution_have_their_channels_first() -> None:
    x = torch.randn(4, 3, 7, generator=GENERATOR)
    for module in (nn.Conv1d(1, 3, 1), nn.BatchNorm1d(3), nn.MaxPool1d(2)):
        torch.testing.assert_close(Pooling("mean")(layer(module), x, [x]), x.mean(2))
    torch.testing.assert_close(Pooling("mean", feature_dim=1)(layer(), x, [x]), x.mean(2))
    torch.testing.assert_close(Pooling("mean", feature_dim=-1)(layer(nn.Conv1d(1, 3, 1)), x, [x]), x.mean(1))


@pytest.mark.parametrize("kind", TRUTH)
def test_padding_does_not_count_behind_a_convolution_either(kind: Any) -> None:
    x, mask = padded("left")
    found = Pooling(kind)(layer(nn.Conv1d(1, 3, 1)), x.mT, {"x": x, "attention_mask": mask})
    torch.testing.assert_close(found, TRUTH[kind])


def test_a_head_behind_time_first_sequences_has_its_samples_first() -> None:
    x, vectors = SEQUENCES.transpose(0, 1), SEQUENCES[:, 0]
    for batch in ([x], [SEQUENCES]):
        pooling = Pooling("mean", batch_dim=1)
        torch.testing.assert_close(pooling(layer(), vectors, batch), vectors)
        assert pooling.num_samples(batch, [vectors, x]) == 4
    assert Pooling("mean").num_samples([SEQUENCES], [x]) == 4


@pytest.mark.parametrize("kind", ["mean", "last_token", "none"])
def test_only_the_first_samples_are_taken(kind: Any) -> None:
    x, mask = padded("right")
    found = Pooling(kind)(layer(), x, {"attention_mask": mask}, at_most=2)
    torch.testing.assert_close(found, TRUTH[kind][: 8 if kind == "none" else 2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_is_widened(dtype: torch.dtype) -> None:
    x = SEQUENCES.to(dtype)
    found = Pooling("mean")(layer(), x, [x])
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found, x.to(found.dtype).mean(1))


@pytest.mark.parametrize(
    ("output", "batch", "options", "message"),
    [
        (torch.ones(4), [SEQUENCES], {}, r"returned the shape \(4,\), and features are \(N, d\) or more"),
        (torch.ones(4, 3).long(), [SEQUENCES], {}, r"returned torch.int64"),
        (torch.ones(8, 3), [SEQUENCES], {}, r"returned 8 entries along dimension batch_dim=0 for a batch of 4"),
        (IMAGES, [IMAGES], {"kind": "last_token"}, r"no sequence \(N, T, d\), and pooling='last_token'"),
        (IMAGES, [IMAGES], {"feature_dim": 4}, r"feature_dim=4 is no dimension of features"),
        (IMAGES, [IMAGES], {"feature_dim": -4}, r"feature_dim=-4 is no dimension of features"),
        (SEQUENCES, [SEQUENCES], {"mask": 3}, r"mask=3 is no key of the batch"),
        (SEQUENCES, [SEQUENCES, torch.ones(4, 4)], {"mask": 1}, r"mask=1 gives shape \(4, 4\), and layer 'net'"),
        (SEQUENCES, [SEQUENCES, "xxxx"], {"mask": 1}, r"mask=1 gives str"),
        (SEQUENCES, {"attention_mask": RIGHT * 0}, {}, r"attention_mask leaves 4 of 4 samples without a position"),
    ],
)
def test_what_cannot_be_pooled_is_refused(output: Tensor, batch: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pooling(**{"kind": "mean", **options})(layer(), output, batch)


def test_a_pooling_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pooling='max' must be one of 'mean', 'last_token'"):
        Pooling("max")  # pyright: ignore[reportArgumentType]

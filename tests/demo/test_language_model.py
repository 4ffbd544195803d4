"""The demo's GPT."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from spectral_callbacks.demo import LanguageModel, TopicsDataModule
from spectral_callbacks.demo.language_model import Attention

TINY: dict[str, Any] = {"width": 16, "num_layers": 2, "num_heads": 2, "context": 12, "num_tokens": 30}


def tiny(**options: Any) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(**{**TINY, **options})


def tokens(n: int = 3, length: int = 12) -> Tensor:
    return torch.randint(30, (n, length), generator=torch.Generator().manual_seed(0))


def test_no_score_depends_on_a_later_token() -> None:
    model, batch = tiny(), tokens()
    for position in range(12):
        changed = batch.clone()
        changed[:, position] = (changed[:, position] + 1) % 30
        moved = (model(changed) - model(batch)).abs().amax((0, 2))
        assert not moved[:position].any()
        assert moved[position:].all()


def test_attention_is_a_softmax_over_the_past_head_by_head() -> None:
    torch.manual_seed(0)
    layer = Attention(6, 2).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    query, key, value = layer.entrance(x).chunk(3, dim=-1)
    expected = torch.zeros(5, 6, dtype=torch.float64)
    for head in (slice(0, 3), slice(3, 6)):
        for t in range(5):
            weights = torch.softmax(key[: t + 1, head] @ query[t, head] / math.sqrt(3), 0)
            expected[t, head] = weights @ value[: t + 1, head]
    torch.testing.assert_close(layer(x[None])[0], layer.exit(expected), rtol=1e-12, atol=1e-14)


def test_the_order_of_the_past_matters() -> None:
    """Without positions a single layer would see a set of tokens."""
    model, batch = tiny(num_layers=1).double(), tokens()
    swapped = batch[:, [1, 0, *range(2, 12)]]
    assert (model(batch) - model(swapped))[:, -1].abs().max() > 1e-9


def test_shorter_sequences_are_the_beginnings_of_longer_ones() -> None:
    model, batch = tiny(), tokens()
    torch.testing.assert_close(model(batch[:, :5]), model(batch)[:, :5])


def test_the_scores_are_a_linear_map_of_the_output_of_final_norm() -> None:
    model, seen = tiny(), list[Any]()
    model.get_submodule("final_norm").register_forward_hook(lambda module, inputs, output: seen.append(output))
    scores = model(tokens())
    assert [output.shape for output in seen] == [(3, 12, 16)]
    torch.testing.assert_close(scores, model.head(seen[0]))


def test_an_untrained_model_knows_nothing() -> None:
    batch = (tokens(), tokens())
    loss = nn.functional.cross_entropy(tiny()(batch[0]).flatten(0, 1), batch[1].flatten())
    assert loss.item() == pytest.approx(math.log(30), abs=0.1)


def test_matrices_begin_as_in_gpt2() -> None:
    model = LanguageModel()
    assert model.tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)
    exits = [p.std().item() for name, p in model.named_parameters() if name.endswith("exit.weight")]
    assert exits == pytest.approx([0.02 / 2] * 4, rel=0.05), "over the square root of the number of branches"
    assert 0.25e6 < sum(p.numel() for p in model.parameters()) < 0.8e6


class Rates(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        self.seen.append(rate)


@pytest.mark.parametrize(
    ("warmup_steps", "expected"), [(3, [0.25, 0.5, 0.75, 1, 1]), (0, [1, 1, 1, 1, 1])], ids=["warm-up", "none"]
)
def test_the_learning_rate_grows_linearly_and_stays(warmup_steps: int, expected: list[float]) -> None:
    rates, model = Rates(), tiny(lr=0.1, warmup_steps=warmup_steps, num_tokens=256)
    trainer = pl.Trainer(
        max_steps=5, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[rates],
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, TopicsDataModule(batch_size=2, context=12, num_val=4, steps_per_epoch=2))
    assert rates.seen == pytest.approx([0.1 * share for share in expected])
    assert {"train/loss", "val/loss"} <= set(trainer.callback_metrics)


def test_only_matrices_decay_and_the_second_moment_forgets_soon() -> None:
    model = tiny()
    optimizer: Any = model.configure_optimizers()
    assert {group["betas"] for group in optimizer["optimizer"].param_groups} == {(0.9, 0.95)}
    decay = {id(p): group["weight_decay"] for group in optimizer["optimizer"].param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        name: 0.1 if p.ndim == 2 else 0.0 for name, p in model.named_parameters()
    }


def effective_rank(features: Tensor) -> float:
    """The exponential of the entropy of the eigenvalues of the centred covariance."""
    eigenvalues = torch.linalg.eigvalsh(torch.cov(features.double().T)).clamp(min=1e-300)
    shares = eigenvalues / eigenvalues.sum()
    return math.exp(-(shares * shares.log()).sum().item())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_representation_collapses_inside_the_warm_up_and_expands_after_it(seed: int) -> None:
    torch.manual_seed(seed)
    model, data = LanguageModel(), TopicsDataModule(steps_per_epoch=400, seed=seed)
    data.setup("fit")
    held_out = torch.cat([inputs for inputs, _ in data.val_dataloader()])
    last: list[Any] = []
    model.final_norm.register_forward_hook(lambda module, inputs, output: last.append(output[:, -1].detach()))
    parts: Any = model.configure_optimizers()
    ranks = {}
    for step, (inputs, targets) in enumerate(data.train_dataloader()):
        if step in (0, 32, 40, 50, 63, 79, 399):
            with torch.no_grad():
                model(held_out)
            ranks[step] = effective_rank(last[-1])
        parts["optimizer"].zero_grad()
        nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        parts["optimizer"].step()
        parts["lr_scheduler"]["scheduler"].step()
    assert ranks[0] > 15
    assert min(ranks.values()) < 0.5 * ranks[0]
    assert ranks[399] > 2 * min(ranks.values())


BAD: list[tuple[dict[str, Any], str]] = [
    ({"width": 0}, r"width=0 must be positive"),
    ({"lr": -1.0}, r"lr=-1.0 must be positive"),
    ({"width": 10, "num_heads": 4}, r"width=10 must be a multiple of num_heads=4"),
    ({"warmup_steps": -1}, r"warmup_steps=-1 must not be negative"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[next(iter(options)) for options, _ in BAD])
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageModel(**options)


def test_a_sequence_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sequences of 13, and context=12 is the longest"):
        tiny()(tokens(length=13))

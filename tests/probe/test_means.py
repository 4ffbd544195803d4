"""Per-sample quantities have a meaning only where the loss of a batch is the mean over its samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_callbacks.probe import Probe
from spectral_callbacks.probe.means import check_mean
from tests.probe.test_samples import Batch, batch_of, mlp, open_probe

Loss = Callable[[nn.Module, Any], Tensor]
QUANTITIES = (Probe.per_sample_gram, Probe.sample_curvature)


def cross_entropy(**options: Any) -> Loss:
    return lambda module, batch: F.cross_entropy(module(batch[0]), batch[1], **options)


def weighted(*weights: float) -> Loss:
    return cross_entropy(weight=torch.tensor(weights, dtype=torch.float64))


def by_number_of_first_class(module: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], reduction="sum") / (1 + (batch[1] == 0).sum())


def coupled(module: nn.Module, batch: Batch) -> Tensor:
    z = module(batch[0])
    return F.cross_entropy(z - z.mean(0), batch[1])


NO_MEANS: dict[str, Loss] = {
    "sum": cross_entropy(reduction="sum"),
    "class weights": weighted(1, 5, 1),
    "class weights, nearly equal": weighted(1, 1.3, 1),
    "ignored class": cross_entropy(ignore_index=0),
    "number of a class": by_number_of_first_class,
    "coupled samples": coupled,
}


def dropout_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Dropout(0.3), nn.Linear(30, 3)).double()


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("make", [mlp, dropout_net])
@pytest.mark.parametrize("name", NO_MEANS)
def test_a_loss_that_is_no_mean_over_samples_is_refused(
    name: str, make: Callable[[], nn.Module], quantity: Callable[[Probe], Any]
) -> None:
    with (
        open_probe(make(), [batch_of(24), batch_of(9)], NO_MEANS[name]) as probe,
        pytest.raises(
            ValueError,
            match=r"not the mean over its samples \((it is their sum|a sum, class).*; pass loss= that is a mean",
        ),
    ):
        quantity(probe)


def test_a_sample_of_which_all_is_masked_is_no_part_of_a_mean() -> None:
    x, y = torch.randn(6, 5, 4, dtype=torch.float64), torch.randint(3, (6, 5))
    y[2] = -100
    with (
        open_probe(mlp(), [(x, y)], lambda m, b: F.cross_entropy(m(b[0]).mT, b[1])) as probe,
        pytest.raises(ValueError, match="not the mean over its samples"),
    ):
        probe.sample_curvature()


# ---- Means


def tokens(lengths: list[int]) -> Batch:
    x, y = torch.randn(len(lengths), 6, 4, dtype=torch.float64), torch.randint(3, (len(lengths), 6))
    return x, y.masked_fill(torch.arange(6) >= torch.tensor(lengths)[:, None], -100)


def token_mean(module: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(module(batch[0]).mT, batch[1])


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_a_mean_over_tokens_is_one_over_sequences_of_equal_length(quantity: Callable[[Probe], Any]) -> None:
    module = mlp()
    with open_probe(module, [tokens([4] * 8)], token_mean) as probe:
        quantity(probe)
    with (
        open_probe(module, [tokens([1, 6] * 4)], token_mean) as probe,
        pytest.raises(ValueError, match="not the mean over its samples"),
    ):
        quantity(probe)


def autocast(module: nn.Module, batch: Batch) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.cross_entropy(module(batch[0]), batch[1])


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("steps", [0, 200])
@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
def test_rounding_is_no_difference(precision: str, steps: int, quantity: Callable[[Probe], Any]) -> None:
    """At random weights and near a minimum, where the gradients of samples cancel."""
    module, (x, y) = mlp().float(), batch_of(40)
    x = x.float()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy()(module, (x, y)).backward()
        optimizer.step()
    if precision == "bfloat16":
        module, x = module.bfloat16(), x.bfloat16()
    loss = autocast if precision == "autocast" else cross_entropy()
    with open_probe(module, [(x, y)], loss) as probe:
        quantity(probe)


class Noisy(nn.Module):
    """Draws masks and noise in either mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(F.dropout(x, 0.3, training=True) + 0.2 * torch.randn_like(x))


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("make", [dropout_net, Noisy])
@pytest.mark.parametrize("seed", range(10))
def test_random_masks_are_no_difference(
    seed: int, make: Callable[[], nn.Module], quantity: Callable[[Probe], Any]
) -> None:
    with open_probe(make(), [batch_of(12), batch_of(5)], cross_entropy(), seed=seed) as probe:
        quantity(probe)


def test_a_sum_is_refused_by_its_loss_also_where_no_mode_is_without_noise() -> None:
    with (
        open_probe(Noisy(), [batch_of(64)], cross_entropy(reduction="sum")) as probe,
        pytest.raises(ValueError, match="not the mean over its samples"),
    ):
        probe.sample_curvature()


class TrainsOnly(nn.Module):
    """Does not return what the loss takes in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net = dropout_net()

    def forward(self, x: Tensor) -> Any:
        return self.net(x) if self.training else {"scores": self.net(x)}


def test_a_model_that_does_not_run_in_eval_mode_is_compared_as_it_trains() -> None:
    module = TrainsOnly()
    with open_probe(module, [batch_of(12)], cross_entropy()) as probe:
        probe.per_sample_gram()
    assert all(submodule.training for submodule in module.modules())


def test_single_samples_are_their_own_mean_and_losses_of_zero_are_equal() -> None:
    with open_probe(mlp(), [batch_of(1), batch_of(1)], cross_entropy(reduction="sum")) as probe:
        assert len(probe.sample_curvature().losses) == 2
    with open_probe(mlp(), [batch_of(4)], lambda m, b: 0 * m(b[0]).square().sum()) as probe:
        assert not probe.per_sample_gram().any()


def test_losses_that_are_not_finite_are_left_to_whoever_looks() -> None:
    with open_probe(mlp(), [batch_of(4)], lambda m, b: cross_entropy()(m, b) * torch.inf) as probe:
        assert not probe.sample_curvature().losses.isfinite().any()


def test_later_looks_evaluate_three_batches_where_nothing_is_random() -> None:
    module, batch = mlp(), batch_of(6)
    sizes: list[int] = []

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        sizes.append(len(batch[1]))
        return cross_entropy()(module, batch)

    known: dict[Any, Any] = {}
    for _ in range(2):
        sizes.clear()
        with open_probe(module, [batch], loss, structures=known) as probe:
            probe.sample_curvature(4)
    assert [n for n in sizes if n > 1] == [4, 4, 4]


def test_a_gradient_that_is_off_by_more_than_the_margin_is_seen() -> None:
    module, batch = mlp(), batch_of(8)
    with open_probe(module, [batch], cross_entropy()) as probe:
        gram, losses = probe.per_sample_gram(), probe.sample_curvature().losses

        def evaluate(batch: Any, *, seed: int, in_eval_mode: bool) -> Tensor:
            return probe.evaluate(batch, seed=seed)

        for by, of_losses, off in ((1.0, 1.0, False), (1.1, 1.0, True), (1.0, 1.03, True), (1.0, torch.nan, True)):
            arguments: dict[str, Any] = {"seed": 0, "gram": by * gram, "losses": of_losses * losses}
            if off:
                with pytest.raises(ValueError, match="not the mean"):
                    check_mean(probe.space, [batch], evaluate, **arguments)
            else:
                check_mean(probe.space, [batch], evaluate, **arguments)

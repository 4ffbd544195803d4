"""The numbers of `Sharpness` in the metric of the optimizer, against dense float64 algebra at every step."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from spectral_callbacks.callbacks import Sharpness
from tests.callbacks.runs import MakeOptimizer, Regression, complaints, fit, series, sgd, steps
from tests.callbacks.test_record import charts_of, events_of
from tests.callbacks.test_sharpness import double_hessian
from tests.oracles import dense_gradient

B1, B2, EPS, LR = 0.8, 0.95, 1e-4, 0.01


def adam(**options: Any) -> MakeOptimizer:
    return lambda p: torch.optim.Adam(p, **{"lr": LR, "betas": (B1, B2), "eps": EPS, **options})


def double_gradient(module: Any, batch: Any) -> Tensor:
    twin = type(module)()
    twin.load_state_dict(module.state_dict())
    twin.double()
    x, y = (t.double() for t in batch)
    return dense_gradient(lambda: twin.loss((x, y)), list(twin.parameters()))


class Oracle(pl.Callback):
    """What an adaptive step does to the Hessian, from the optimizer's state and the definition of Adam."""

    def __init__(self) -> None:
        self.hessians: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self.metrics: list[Tensor | None] = []
        self.counts: list[int] = []
        self.batch: Any = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batch = self.batch or [t.clone() for t in batch]
        self.hessians.append(double_hessian(pl_module, self.batch))
        self.gradients.append(double_gradient(pl_module, self.batch))
        state = trainer.optimizers[0].state
        entries = [state[p] for p in pl_module.parameters() if "exp_avg_sq" in state.get(p, {})]
        self.counts.append(int(entries[0]["step"]) if entries else 0)
        if entries:
            t = self.counts[-1]
            v = torch.cat([entry["exp_avg_sq"].double().flatten() for entry in entries])
            self.metrics.append(1 / ((v / (1 - B2**t)).sqrt() + EPS))
        else:
            self.metrics.append(None)

    def __iter__(self) -> Any:
        return zip(self.hessians, self.gradients, self.metrics, self.counts, strict=True)


def congruent(H: Tensor, D: Tensor) -> Tensor:
    return D.sqrt()[:, None] * H * D.sqrt()


def top(A: Tensor) -> float:
    return torch.linalg.eigvalsh(A)[-1].item()


def run(module: Regression, *callbacks: Sharpness, **options: Any) -> Oracle:
    torch.manual_seed(0)
    oracle = Oracle()
    fit(module, *callbacks, oracle, **{"max_epochs": 3, **options})
    return oracle


def test_adam_is_judged_in_its_own_metric_at_every_step_after_the_first() -> None:
    callback = Sharpness(every_n_steps=1, rtol=1e-4, on_error="raise")
    oracle = run(Regression(adam()), callback)
    assert steps(callback) == list(range(12))
    for entry, (H, _, D, t) in zip(callback.history, oracle, strict=True):
        assert entry["sharpness/lambda_max"] == pytest.approx(top(H), rel=1e-4)
        if D is None:
            assert t == 0
            assert not {tag for tag in entry if "ratio" in tag or "preconditioned" in tag}
            continue
        preconditioned = top(congruent(H, D))
        edge = (2 + 2 * B1) / (1 - B1) * (1 - B1**t) / LR
        assert entry["sharpness/preconditioned_lambda_max"] == pytest.approx(preconditioned, rel=1e-4)
        assert entry["sharpness/preconditioned_threshold"] == pytest.approx(edge, rel=1e-5)
        assert entry["sharpness/stability_ratio"] == pytest.approx(preconditioned / edge, rel=1e-4)
        assert "sharpness/threshold" not in entry


def test_before_the_first_step_of_an_adaptive_optimizer_nothing_is_said() -> None:
    callback = Sharpness(every_n_steps=1)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        run(Regression(adam()), callback)
    assert not complaints(warned)


class DecayOfMatrices(Regression):
    """The usual two groups: weight decay for matrices, none for biases."""

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": 5.0}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=LR, betas=(B1, B2), eps=EPS)


def test_decoupled_decay_of_one_group_is_in_the_ratio_and_not_in_the_eigenvalue() -> None:
    callback = Sharpness(every_n_steps=1, rtol=1e-5, max_matvecs=200, on_error="raise")
    oracle = run(DecayOfMatrices(), callback)
    decay = torch.cat([torch.full((p.numel(),), 5.0 * (p.ndim > 1)) for p in Regression().parameters()]).double()
    for entry, (H, _, D, t) in zip(callback.history, oracle, strict=True):
        if D is None:
            continue
        A, gain = congruent(H, D), (1 - B1) / (1 + B1) / (1 - B1**t)
        values, vectors = torch.linalg.eigh(LR / 2 * (gain * A + torch.diag(decay)))
        assert entry["sharpness/stability_ratio"] == pytest.approx(values[-1].item(), rel=1e-4)
        along = (vectors[:, -1] @ A @ vectors[:, -1]).item()
        assert entry["sharpness/preconditioned_lambda_max"] == pytest.approx(along, rel=2e-3)
        at_edge = entry["sharpness/preconditioned_lambda_max"] / entry["sharpness/preconditioned_threshold"]
        assert (at_edge > 1) == (entry["sharpness/stability_ratio"] > 1)


def test_the_directional_ratio_is_the_curvature_along_the_gradient_in_the_optimizers_metric() -> None:
    callback = Sharpness(every_n_steps=1, rtol=1e-4)
    oracle = run(Regression(adam()), callback)
    for entry, (H, g, D, t) in zip(callback.history, oracle, strict=True):
        if D is None:
            continue
        edge = (2 + 2 * B1) / (1 - B1) * (1 - B1**t) / LR
        expected = ((D * g) @ H @ (D * g) / (g @ (D * g))).item() / edge
        assert entry["sharpness/directional_ratio"] == pytest.approx(expected, rel=1e-3, abs=1e-7)
        assert entry["sharpness/directional_ratio"] <= entry["sharpness/stability_ratio"] * (1 + 1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_directional_ratio_of_sgd_is_that_of_the_plain_curvature(decay: float) -> None:
    callback = Sharpness(every_n_steps=1, rtol=1e-4)
    oracle = run(Regression(sgd(0.2, momentum=0.5, weight_decay=decay)), callback)
    for entry, (H, g, _, _) in zip(callback.history, oracle, strict=True):
        expected = 0.2 * ((g @ H @ g / (g @ g)).item() + decay) / 3.0
        assert entry["sharpness/directional_ratio"] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_one_learning_rate_each_is_judged_against_one() -> None:
    class TwoRates(Regression):
        def configure_optimizers(self) -> Any:
            groups = [{"params": self.net[0].parameters()}, {"params": self.net[2].parameters(), "lr": 5 * LR}]
            return torch.optim.Adam(groups, lr=LR, betas=(B1, B2), eps=EPS)

    callback = Sharpness(every_n_steps=1, rtol=1e-4)
    oracle = run(TwoRates(), callback)
    rates = torch.tensor([LR] * 16 + [5 * LR] * 10, dtype=torch.float64)
    for entry, (H, _, D, t) in zip(callback.history, oracle, strict=True):
        if D is None:
            continue
        edge = (2 + 2 * B1) / (1 - B1) * (1 - B1**t)
        assert entry["sharpness/stability_ratio"] == pytest.approx(top(congruent(H, D * rates / edge)), rel=1e-4)
        assert "sharpness/preconditioned_lambda_max" not in entry


class Climbing(Regression):
    """Maximises minus its loss, which is to minimise it."""

    def __init__(self) -> None:
        super().__init__(sgd(0.2, momentum=0.5, weight_decay=0.1, maximize=True))

    def loss(self, batch: Any) -> Tensor:
        return -super().loss(batch)


def test_climbing_is_judged_by_the_curvature_it_climbs() -> None:
    callback = Sharpness(every_n_steps=1, rtol=1e-4, on_error="raise")
    oracle = run(Climbing(), callback)
    for entry, (H, *_) in zip(callback.history, oracle, strict=True):
        assert entry["sharpness/stability_ratio"] == pytest.approx(0.2 * (top(-H) + 0.1) / 3.0, rel=1e-4)


def test_an_adaptive_optimizer_at_learning_rate_zero_is_at_ratio_zero() -> None:
    callback = Sharpness(every_n_steps=1)
    with pytest.warns(UserWarning, match="learning rate is 0") as warned:
        run(Regression(adam(lr=0.0)), callback)
    assert len(complaints(warned)) == 1
    assert series(callback, "sharpness/status") == [0.0] * 12
    assert [entry["sharpness/stability_ratio"] for entry in callback.history[1:]] == [0.0] * 11


def test_a_parameter_that_training_never_reaches_is_left_out_of_the_metric() -> None:
    class Idle(Regression):
        def __init__(self) -> None:
            super().__init__(adam())
            self.idle = nn.Linear(2, 2)

    plain, idle = Sharpness(every_n_steps=1, rtol=1e-4), Sharpness(every_n_steps=1, rtol=1e-4)
    for module, callback in ((Regression(adam()), plain), (Idle(), idle)):
        with torch.no_grad():
            for p in module.net.parameters():
                p.copy_(torch.linspace(-0.7, 0.6, p.numel()).view_as(p))
        fit(module, callback)
    ratios = [[e["sharpness/stability_ratio"] for e in c.history[1:]] for c in (plain, idle)]
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-4)


@pytest.mark.parametrize(("make", "adapts"), [(adam(), True), (sgd(), False)], ids=["Adam", "SGD"])
def test_the_chart_of_the_preconditioned_edge_is_drawn_where_there_is_one(
    tmp_path: Path, make: MakeOptimizer, adapts: bool
) -> None:
    logger = TensorBoardLogger(tmp_path)
    fit(Regression(make), Sharpness(every_n_steps=2), logger=logger)
    charts = charts_of(events_of(logger))["sharpness"]
    assert ("preconditioned lambda_max and the edge of stability" in charts) == adapts

"""The numbers of `Sharpness`, against a dense Hessian in float64 at every step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from spectral_callbacks.callbacks import Sharpness
from spectral_callbacks.linalg import Status, Tracker
from spectral_callbacks.operators import Hessian
from tests.callbacks.runs import MakeOptimizer, Regression, Watch, complaints, fit, loader, samples, series, sgd, steps
from tests.oracles import dense_hessian


def double_hessian(module: Any, batch: Any, names: list[str] | None = None) -> Tensor:
    """Return the Hessian of the loss at the module's weights, evaluated in float64 on a copy that never trained."""
    twin = type(module)()
    twin.load_state_dict(copy.deepcopy(module.state_dict()))
    twin.double()
    x, y = (t.double() for t in batch)
    parameters = dict(twin.named_parameters())
    return dense_hessian(lambda: twin.loss((x, y)), [parameters[name] for name in names or parameters])


class Dense(pl.Callback):
    """Eigenvalues of the dense Hessian before every step, on the first batch; and the optimizer's settings then."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.hessians: list[Tensor] = []
        self.groups: list[list[dict[str, Any]]] = []
        self.batch: Any = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.batch is None:
            self.batch = [t.clone() for t in batch]
        self.hessians.append(double_hessian(pl_module, self.batch))
        self.values.append(torch.linalg.eigvalsh(self.hessians[-1]).flip(0))
        groups = trainer.optimizers[0].param_groups
        self.groups.append([{k: v for k, v in group.items() if k != "params"} for group in groups])


def run(*callbacks: Sharpness, module: Regression | None = None, **options: Any) -> Dense:
    torch.manual_seed(0)
    dense = Dense()
    fit(Regression() if module is None else module, *callbacks, dense, **options)
    return dense


def test_each_value_is_that_of_the_dense_hessian_at_its_step() -> None:
    callback = Sharpness(3, lambda_min=True, every_n_steps=1, rtol=1e-3)
    dense = run(callback, max_epochs=8)
    assert steps(callback) == list(range(32))
    for entry, values in zip(callback.history, dense.values, strict=True):
        assert entry["sharpness/status"] == Status.CONVERGED
        assert entry["sharpness/lambda_max"] == pytest.approx(values[0].item(), rel=1e-4)
        assert entry["sharpness/lambda_2"] == pytest.approx(values[1].item(), rel=1e-4)
        assert entry["sharpness/lambda_3"] == pytest.approx(values[2].item(), rel=1e-4)
        assert entry["sharpness/lambda_min"] == pytest.approx(values[-1].item(), rel=1e-4, abs=1e-5)


def test_an_eigenvalue_lies_within_the_residual() -> None:
    callback = Sharpness(2, lambda_min=True, every_n_steps=1, rtol=0.05)
    dense = run(callback, max_epochs=4)
    for entry, values in zip(callback.history, dense.values, strict=True):
        for tag, bound in (
            ("lambda_max", "residual"),
            ("lambda_2", "lambda_2_residual"),
            ("lambda_min", "lambda_min_residual"),
        ):
            distance = (values - entry[f"sharpness/{tag}"]).abs().min().item()
            assert distance <= entry[f"sharpness/{bound}"] + 1e-5 * values[0].item()


def test_the_largest_is_the_largest_algebraic_one() -> None:
    class Saddle(Regression):
        """λ = 1 and λ = -5."""

        def __init__(self) -> None:
            super().__init__(sgd(1e-3))
            self.net = nn.Sequential(nn.Linear(2, 1, bias=False))

        def loss(self, batch: Any) -> Tensor:
            a, b = torch.cat(list(self.parameters()))[0]
            return (a**2 - 5 * b**2) / 2

    callback = Sharpness(lambda_min=True, every_n_steps=1)
    fit(Saddle(), callback)
    assert series(callback, "sharpness/lambda_max") == pytest.approx([1.0] * 4, rel=1e-5)
    assert series(callback, "sharpness/lambda_min") == pytest.approx([-5.0] * 4, rel=1e-5)


def test_a_loss_linear_in_the_parameters_has_sharpness_zero() -> None:
    class Linear(Regression):
        def loss(self, batch: Any) -> Tensor:
            return torch.cat([p.flatten() for p in self.parameters()]).sum()

    callback = Sharpness(every_n_steps=1)
    fit(Linear(), callback)
    assert series(callback, "sharpness/lambda_max") == [0.0] * 4
    assert series(callback, "sharpness/stability_ratio") == [0.0] * 4
    assert series(callback, "sharpness/status") == [0.0] * 4


# settings of SGD -> η (λ + wd) at the edge
VARIANTS: list[tuple[dict[str, Any], float]] = [
    ({}, 2.0),
    ({"weight_decay": 0.3}, 2.0),
    ({"momentum": 0.9}, 3.8),
    ({"momentum": 0.9, "dampening": 0.5}, 7.6),
    ({"momentum": 0.9, "weight_decay": 0.1}, 3.8),
    ({"momentum": 0.9, "nesterov": True}, 3.8 / 2.8),
    ({"momentum": 0.5, "nesterov": True, "weight_decay": 0.2}, 1.5),
]


@pytest.mark.parametrize(("options", "edge"), VARIANTS, ids=str)
def test_the_ratio_is_left_side_over_right_side_of_the_rule_in_use(options: dict[str, Any], edge: float) -> None:
    callback = Sharpness(every_n_steps=1, rtol=1e-3)
    dense = run(callback, module=Regression(sgd(0.2, **options)))
    decay = options.get("weight_decay", 0.0)
    for entry, values in zip(callback.history, dense.values, strict=True):
        assert entry["sharpness/two_over_lr"] == pytest.approx(10.0)
        assert entry["sharpness/threshold"] == pytest.approx(edge / 0.2 - decay)
        assert entry["sharpness/stability_ratio"] == pytest.approx(0.2 * (values[0].item() + decay) / edge, rel=1e-4)
        at_edge = entry["sharpness/lambda_max"] == entry["sharpness/threshold"]
        assert (entry["sharpness/stability_ratio"] == 1) == at_edge


def test_at_the_edge_the_rule_neither_shrinks_nor_grows() -> None:
    class Quadratic(Regression):
        def __init__(self) -> None:
            super().__init__(sgd(0.2, momentum=0.9, weight_decay=0.1))
            self.net = nn.Sequential(nn.Linear(1, 1, bias=False))
            nn.init.ones_(next(self.parameters()))

        def loss(self, batch: Any) -> Tensor:
            return 18.9 * next(self.parameters()).square().sum() / 2  # (2 + 2 · 0.9) / 0.2 - 0.1

    callback, sizes = Sharpness(every_n_steps=50), []
    watch = Watch(lambda trainer, module, batch: sizes.append(next(module.parameters()).abs().item()))
    fit(Quadratic(), callback, watch, max_epochs=100)
    assert series(callback, "sharpness/stability_ratio") == pytest.approx([1.0] * 8, rel=1e-6)
    assert sizes[-1] == pytest.approx(sizes[200], rel=1e-2)


class TwoGroups(Regression):
    def configure_optimizers(self) -> Any:
        groups = [
            {"params": self.net[0].parameters(), "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
            {"params": self.net[2].parameters(), "lr": 0.4},
        ]
        return torch.optim.SGD(groups, lr=1.0)


def test_several_groups_are_judged_in_the_metric_of_each_ones_edge() -> None:
    callback = Sharpness(every_n_steps=1, rtol=1e-3)
    dense = run(callback, module=TwoGroups())
    D = torch.tensor([0.1 / 3.8] * 16 + [0.4 / 2.0] * 10, dtype=torch.float64)
    decay = torch.tensor([0.1] * 16 + [0.0] * 10, dtype=torch.float64)
    for entry, hessian in zip(callback.history, dense.hessians, strict=True):
        metric = D.sqrt()[:, None] * (hessian + torch.diag(decay)) * D.sqrt()
        assert entry["sharpness/stability_ratio"] == pytest.approx(torch.linalg.eigvalsh(metric)[-1].item(), rel=1e-4)
        assert entry["sharpness/stability_ratio_residual"] <= 1e-3 * entry["sharpness/stability_ratio"]
        assert entry["sharpness/two_over_lr"] == pytest.approx(2 / 0.4)
        assert entry["sharpness/lambda_max"] == pytest.approx(torch.linalg.eigvalsh(hessian)[-1].item(), rel=1e-4)
        assert "sharpness/threshold" not in entry


def test_groups_that_agree_have_a_threshold() -> None:
    class Agreeing(Regression):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([{"params": layer.parameters()} for layer in (self.net[0], self.net[2])], lr=0.1)

    callback = Sharpness(every_n_steps=4)
    fit(Agreeing(), callback)
    assert series(callback, "sharpness/threshold") == pytest.approx([20.0])


def test_the_learning_rate_is_that_of_the_step_about_to_be_taken() -> None:
    class Scheduled(Regression):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.8)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    callback = Sharpness(every_n_steps=1)
    dense = run(callback, module=Scheduled(), max_epochs=2)
    rates = [groups[0]["lr"] for groups in dense.groups]
    assert rates[::2] == [0.8, 0.4, 0.2, 0.1]
    assert series(callback, "sharpness/two_over_lr") == pytest.approx([2 / lr for lr in rates])
    for entry, lr in zip(callback.history, rates, strict=True):
        assert entry["sharpness/stability_ratio"] == pytest.approx(lr * entry["sharpness/lambda_max"] / 2)


def test_at_learning_rate_zero_the_ratio_is_zero_and_no_line_is_drawn() -> None:
    callback = Sharpness(every_n_steps=1)
    with pytest.warns(UserWarning, match="the learning rate is 0, so nothing moves") as warned:
        fit(Regression(sgd(0.0)), callback)
    assert len(complaints(warned)) == 1
    for entry in callback.history:
        assert entry["sharpness/stability_ratio"] == 0.0
        assert "sharpness/two_over_lr" not in entry
        assert "sharpness/threshold" not in entry
        assert all(math.isfinite(value) for value in entry.values())


class OddSGD(torch.optim.SGD):
    """Steps in a way of its own."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


UNKNOWN: dict[str, tuple[MakeOptimizer, str]] = {
    "Rprop": (lambda p: torch.optim.Rprop(p, lr=0.01), "Rprop .*no finite threshold|no finite threshold .*Rprop"),
    "a subclass with a step of its own": (lambda p: OddSGD(p, lr=0.01), "no stability rule is known for OddSGD"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_without_a_rule_there_is_no_ratio_and_the_reason_is_said_once(kind: str) -> None:
    make, reason = UNKNOWN[kind]
    callback = Sharpness(every_n_steps=1)
    with pytest.warns(UserWarning, match=reason) as warned:
        fit(Regression(make), callback)
    assert len(complaints(warned)) == 1
    assert steps(callback) == [0, 1, 2, 3]
    for entry in callback.history:
        assert entry["sharpness/lambda_max"] > 0
        assert entry["sharpness/two_over_lr"] == pytest.approx(200.0)
        assert "sharpness/stability_ratio" not in entry
        assert "sharpness/threshold" not in entry


def test_a_spent_budget_is_said_once_and_logged_each_time() -> None:
    callback = Sharpness(every_n_steps=1, max_matvecs=1)
    with pytest.warns(UserWarning, match="budget: The budget of products was spent") as warned:
        fit(Regression(), callback)
    assert len(complaints(warned)) == 1
    assert series(callback, "sharpness/status") == [Status.BUDGET] * 4
    assert series(callback, "sharpness/num_matvecs") == [2] * 4  # one of the search, one along the gradient


def test_the_status_is_that_of_the_worst_search() -> None:
    callback = Sharpness(lambda_min=True, every_n_steps=1)
    callback._bottom = Tracker(which="SA", rtol=1e-6, max_matvecs=1)
    with pytest.warns(UserWarning, match="The budget of products was spent"):
        fit(Regression(), callback)
    assert series(callback, "sharpness/status") == [Status.BUDGET] * 4
    assert all(entry["sharpness/residual"] <= 0.01 * entry["sharpness/lambda_max"] for entry in callback.history)


def test_num_matvecs_counts_every_product_but_the_self_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = [0]
    matmat = Hessian.matmat

    def counting(self: Hessian, X: Tensor) -> Tensor:
        counted[0] += X.shape[1]
        return matmat(self, X)

    monkeypatch.setattr(Hessian, "matmat", counting)
    callback = Sharpness(2, lambda_min=True, every_n_steps=1)
    fit(TwoGroups(), callback)
    assert sum(series(callback, "sharpness/num_matvecs")) == counted[0] - 2


def test_a_warm_search_is_cheaper_than_the_first_and_a_new_fit_starts_cold() -> None:
    callback = Sharpness(every_n_steps=1)
    torch.manual_seed(0)
    start = Regression()
    for _ in range(2):
        fit(copy.deepcopy(start), callback)
    first, second = callback.history[:4], callback.history[4:]
    assert first[1]["sharpness/num_matvecs"] < first[0]["sharpness/num_matvecs"]
    for a, b in zip(first, second, strict=True):
        assert a["sharpness/lambda_max"] == b["sharpness/lambda_max"]
        assert a["sharpness/num_matvecs"] == b["sharpness/num_matvecs"]


def test_more_eigenvalues_than_parameters_are_as_many_as_there_are() -> None:
    class Tiny(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 1, bias=False))

        def loss(self, batch: Any) -> Tensor:
            a, b = torch.cat(list(self.parameters()))[0]
            return (2 * a**2 + b**2) / 2

    callback = Sharpness(5, every_n_steps=4)
    fit(Tiny(), callback)
    assert [tag for tag in callback.history[0] if tag.endswith(("_max", "_2", "_3"))] == [
        "sharpness/lambda_max", "sharpness/lambda_2",
    ]  # fmt: skip


class Dropping(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 2))


def test_eval_mode_measures_the_function_that_predicts_and_train_mode_the_one_that_trains() -> None:
    predict = Sharpness(every_n_steps=1, mode="eval", name="eval", rtol=1e-3)
    train = Sharpness(every_n_steps=1, on_error="raise")
    expected: list[float] = []
    first: list[Any] = []

    def see(trainer: pl.Trainer, module: Any, batch: Any) -> None:
        first.append([t.clone() for t in batch])
        twin = Dropping()
        twin.load_state_dict(module.state_dict())
        twin.double().eval()
        x, y = (t.double() for t in first[0])
        hessian = dense_hessian(lambda: twin.loss((x, y)), list(twin.parameters()))
        expected.append(torch.linalg.eigvalsh(hessian)[-1].item())

    torch.manual_seed(0)
    fit(Dropping(), predict, train, Watch(see))
    assert series(predict, "eval/lambda_max") == pytest.approx(expected, rel=1e-4)
    assert series(train, "sharpness/lambda_max") != pytest.approx(expected, rel=1e-2)


def test_the_mean_over_several_batches_weighs_them_by_their_size() -> None:
    callback = Sharpness(every_n_steps=1, num_batches=2, rtol=1e-3)
    expected: list[float] = []

    def see(trainer: pl.Trainer, module: Any, batch: Any) -> None:
        hessian = double_hessian(module, samples(13).tensors)
        expected.append(torch.linalg.eigvalsh(hessian)[-1].item())

    torch.manual_seed(0)
    fit(Regression(), callback, Watch(see), data=loader(13), max_epochs=3)
    assert series(callback, "sharpness/lambda_max") == pytest.approx(expected[1:], rel=1e-4)


PRECISIONS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "bf16-mixed, measured in full": ({"precision": "bf16-mixed"}, {}, 1e-4),
    "bf16-mixed, measured as trained": ({"precision": "bf16-mixed"}, {"precision": "training"}, 3e-2),
    "64-true": ({"precision": "64-true"}, {}, 1e-5),
}


@pytest.mark.parametrize("kind", PRECISIONS)
def test_mixed_precision_measures_what_it_says(kind: str) -> None:
    trained, measured, tolerance = PRECISIONS[kind]
    callback = Sharpness(every_n_steps=1, rtol=1e-3, on_error="raise", **measured)
    dense = run(callback, **trained)
    expected = [values[0].item() for values in dense.values]
    assert series(callback, "sharpness/lambda_max") == pytest.approx(expected, rel=tolerance)


def test_half_precision_weights_are_measured_without_a_false_alarm() -> None:
    callback = Sharpness(every_n_steps=1, rtol=0.05, on_error="raise")
    dense = run(callback, precision="bf16-true")
    expected = [values[0].item() for values in dense.values]
    assert series(callback, "sharpness/lambda_max") == pytest.approx(expected, rel=0.1)


NANS: dict[str, Callable[[int], float]] = {
    "at first": lambda step: float("nan") if step == 0 else 1.0,
    "in between": lambda step: float("inf") if step in (1, 2) else 1.0,
}


class Exploding(Regression):
    """Its loss is not finite at some steps, for the probe only: the weights stay sound."""

    def __init__(self, scale: Callable[[int], float] = NANS["at first"]) -> None:
        super().__init__()
        self.scale = scale

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        probing = "log" in self.__dict__
        return self.loss(batch) * (self.scale(self.trainer.global_step) if probing else 1.0)


@pytest.mark.parametrize("kind", NANS)
def test_a_loss_that_is_not_finite_has_status_3_and_no_values_and_recovers(kind: str) -> None:
    callback = Sharpness(2, lambda_min=True, every_n_steps=1, rtol=1e-3)
    torch.manual_seed(0)
    dense = Dense()
    with pytest.warns(UserWarning, match="nonfinite: A product is not finite") as warned:
        trainer = fit(Exploding(NANS[kind]), callback, dense)
    assert len(complaints(warned)) == 1
    assert trainer.global_step == 4
    for entry, values in zip(callback.history, dense.values, strict=True):
        sound = NANS[kind](int(entry["step"])) == 1.0
        assert entry["sharpness/status"] == (Status.CONVERGED if sound else Status.NONFINITE)
        assert all(math.isfinite(value) for value in entry.values())
        assert ("sharpness/lambda_max" in entry) == sound
        if sound:
            assert entry["sharpness/lambda_max"] == pytest.approx(values[0].item(), rel=1e-4)


def test_weights_that_are_not_finite_leave_the_run_as_it_is() -> None:
    callback = Sharpness(every_n_steps=1)
    with pytest.warns(UserWarning, match="not finite"):
        trainer = fit(Regression(sgd(1e30)), callback, max_epochs=2)
    assert trainer.global_step == 8
    assert callback.history[-1]["sharpness/status"] == Status.NONFINITE

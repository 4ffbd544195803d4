"""The numbers of `TraceStability`, against dense matrices in float64; and what it leaves out."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from spectral_callbacks.callbacks.sampling import Sampling, sampling_of
from spectral_callbacks.callbacks.trace_stability import TraceStability
from spectral_callbacks.demo.regression import RegressionDataModule, Regressor
from spectral_callbacks.linalg import Matrix, Status
from spectral_callbacks.linalg.watched import Watched
from tests.callbacks import runs
from tests.callbacks.runs import Regression, complaints, fit, make_trainer, sgd
from tests.contracts.networks import Everything, images
from tests.contracts.training import record
from tests.faults import SkewedSquare
from tests.oracles import dense_gradient, dense_hessian

pytestmark = pytest.mark.filterwarnings("ignore:.*left out:UserWarning")

NUM_SAMPLES = 12
LR = 0.1
WHOLE: dict[str, Any] = {"every_n_steps": 1, "on_error": "raise", "rtol": 1e-8}


class Pairs(torch.utils.data.Dataset[Any]):
    def __init__(self, n: int = NUM_SAMPLES) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(n, 3, dtype=torch.float64, generator=generator)
        self.y = torch.stack([self.x.prod(1).tanh(), self.x.sum(1).sin()], dim=1)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class Net(Regression):
    """Two outputs, half their squared error: 26 parameters, so that 30 products give the trace exactly."""

    def __init__(self, optimizer: Any = sgd(LR)) -> None:  # noqa: B008
        super().__init__(optimizer)
        self.double()

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (self.net(x) - y).square().sum(1).mean() / 2


def loader(batch_size: int = 4, n: int = NUM_SAMPLES, **options: Any) -> DataLoader[Any]:
    return DataLoader(Pairs(n), batch_size=batch_size, **options)


class Dense(pl.Callback):
    """Jacobians, Hessian and gradients of single samples before every step, one backward pass for every entry."""

    def __init__(self, chosen: slice = slice(None), n: int = NUM_SAMPLES) -> None:
        self.x, self.y = Pairs(n).x[chosen], Pairs(n).y[chosen]
        self.blocks: list[Tensor] = []  # G_i
        self.hessians: list[Tensor] = []  # of the mean loss
        self.gradients: list[Tensor] = []
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        twin = Net()
        twin.load_state_dict(pl_module.state_dict())
        parameters = list(twin.parameters())
        blocks, gradients = [], []
        for x, y in zip(self.x, self.y, strict=True):
            J = torch.stack([dense_gradient(lambda c=c, x=x: twin.net(x)[c], parameters) for c in range(2)])
            blocks.append(J.mT @ J)
            gradients.append(dense_gradient(lambda x=x, y=y: twin.loss((x[None], y[None])), parameters))
        self.blocks.append(torch.stack(blocks))
        self.gradients.append(torch.stack(gradients))
        self.hessians.append(dense_hessian(lambda: twin.loss((self.x, self.y)), parameters))
        self.losses.append(twin.loss((self.x, self.y)).item())


def measure(callback: TraceStability, dense: pl.Callback | None = None, **options: Any) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    callbacks = [callback] if dense is None else [callback, dense]
    fit(Net(), *callbacks, **{"data": loader(), "max_epochs": 2, **options})
    return callback.history


def noise(n: int, batch_size: int) -> float:
    return (n - batch_size) / (batch_size * (n - 1))


def by_hand(blocks: Tensor, p: float) -> dict[str, float]:
    """Conditions (16) and (15) as they are written, from all the matrices of a dataset."""
    G = blocks.mean(0)
    values, vectors = torch.linalg.eigh(G)
    v, top = vectors[:, -1], values[-1]
    spread = torch.stack([(v @ block @ v - top) ** 2 for block in blocks]).mean()
    own = torch.stack([block.square().sum() for block in blocks]).mean()
    return {
        "batch": (((1 - p) * G.square().sum() + p * own) / G.trace()).item(),
        "directional": (top + p / top * spread).item(),
        "norm": G.square().sum().sqrt().item(),
        "trace": G.trace().item(),
    }


# ---- Values


@pytest.mark.parametrize("batch_size", [1, 4, 12])
def test_each_value_is_that_of_the_dense_matrices_at_its_step(batch_size: int) -> None:
    callback = TraceStability(outputs="net", batch_size=batch_size, num_batches=3, data="train", **WHOLE)
    dense = Dense()
    history = measure(callback, dense)
    assert [entry["step"] for entry in history] == list(range(6))
    for entry, blocks, H, g, loss in zip(
        history, dense.blocks, dense.hessians, dense.gradients, dense.losses, strict=True
    ):
        expected = by_hand(blocks, noise(NUM_SAMPLES, batch_size))
        assert entry["trace/hessian"] == pytest.approx(H.trace().item(), rel=1e-9)
        assert entry["trace/hessian_error"] < 1e-5 * entry["trace/hessian"]  # 26 products give it all but rounding
        assert entry["trace/ratio"] == pytest.approx(LR / 2 * H.trace().item(), rel=1e-9)
        assert entry["trace/two_over_lr"] == pytest.approx(2 / LR)
        assert entry["trace/gauss_newton"] == pytest.approx(expected["trace"], rel=1e-9)
        assert entry["trace/batch_ratio"] == pytest.approx(LR / 2 * expected["batch"], rel=1e-9)
        assert entry["trace/directional_ratio"] == pytest.approx(LR / 2 * expected["directional"], rel=1e-6)
        assert entry["trace/frobenius_ratio"] == pytest.approx(LR * expected["norm"] / batch_size**0.5, rel=1e-9)
        covariance = torch.cov(g.mT, correction=0)
        mu = (covariance * blocks.mean(0)).sum().item() / (2 * loss * expected["norm"] ** 2)
        assert entry["trace/alignment"] == pytest.approx(mu, rel=1e-9)
        assert entry["trace/status"] == Status.CONVERGED
        assert not [tag for tag in entry if tag.endswith("_error") and not re.search("sharpness|hessian", tag)]


def test_at_the_same_weights_smaller_batches_are_judged_less_stable() -> None:
    callbacks = [
        TraceStability(outputs="net", batch_size=b, num_batches=3, name=f"b{b}", **WHOLE) for b in (1, 2, 4, 12)
    ]
    torch.manual_seed(0)
    fit(Net(), *callbacks, data=loader())
    for ratio in ("batch_ratio", "directional_ratio", "frobenius_ratio"):
        found = [callback.history[-1][f"{callback.name}/{ratio}"] for callback in callbacks]
        assert found == sorted(found, reverse=True)
        assert found[0] > 1.02 * found[-1]


def test_from_a_part_of_the_dataset_norms_are_unbiased_estimates_and_have_errors() -> None:
    callback = TraceStability(outputs="net", num_batches=2, **WHOLE)  # 8 of 12 samples
    dense = Dense(slice(0, 8))
    history = measure(callback, dense)
    p, n, m = noise(NUM_SAMPLES, 4), NUM_SAMPLES, 8
    for entry, blocks in zip(history, dense.blocks[1:], strict=True):  # from the second batch on
        own = sum((a * a).sum().item() for a in blocks) / m
        pairs = sum((a * b).sum().item() for a, b in itertools.permutations(blocks, 2)) / (m * (m - 1))
        square = own / n + (1 - 1 / n) * pairs
        condition = ((1 - p) * square + p * own) / blocks.mean(0).trace().item()
        assert entry["trace/batch_ratio"] == pytest.approx(LR / 2 * condition, rel=1e-9)
        assert entry["trace/frobenius_ratio"] == pytest.approx(LR * square**0.5 / 2, rel=1e-9)
        for quantity in ("batch_ratio", "directional_ratio", "frobenius_ratio", "alignment"):
            assert 0 < entry[f"trace/{quantity}_error"] < entry[f"trace/{quantity}"]
        assert "trace/gauss_newton_error" not in entry  # it is exact for the probe, which is all it speaks of


def test_with_fewer_samples_than_the_probe_has_the_trace_of_gauss_newton_is_estimated() -> None:
    callback = TraceStability(outputs="net", num_samples=4, num_matvecs=10, num_batches=3, data="train", **WHOLE)
    dense = Dense()
    history = measure(callback, dense)
    for entry, blocks, H in zip(history, dense.blocks, dense.hessians, strict=True):
        truth = {"gauss_newton": blocks.mean(0).trace().item(), "hessian": H.trace().item()}
        for tag, value in truth.items():
            error = entry[f"trace/{tag}_error"]
            assert 0 < error < value
            assert abs(entry[f"trace/{tag}"] - value) < 5 * error
        assert entry["trace/ratio_error"] == pytest.approx(LR / 2 * entry["trace/hessian_error"])


def test_without_outputs_the_norm_is_that_of_the_hessian() -> None:
    callback = TraceStability(num_batches=3, data="train", **WHOLE)
    dense = Dense()
    history = measure(callback, dense)
    for entry, H in zip(history, dense.hessians, strict=True):
        norm = H.square().sum().sqrt().item()
        assert entry["trace/frobenius_ratio"] == pytest.approx(LR * norm / 4**0.5, rel=1e-9)
        assert entry["trace/hessian"] == pytest.approx(H.trace().item(), rel=1e-9)


def test_several_outputs_of_one_sample_count_as_one_sample_in_the_loss_of_cross_entropy() -> None:
    class Classes(Net):
        def loss(self, batch: Any) -> Tensor:
            x, y = batch
            return nn.functional.cross_entropy(self.net(x), (y[:, 0] > 0).long())

    callback = TraceStability(outputs="net", num_batches=3, data="train", **WHOLE)
    seen: list[float] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            twin = Classes()
            twin.load_state_dict(pl_module.state_dict())
            total = 0.0
            for x in Pairs().x:
                J = torch.stack(
                    [dense_gradient(lambda c=c, x=x: twin.net(x)[c], list(twin.parameters())) for c in (0, 1)]
                )
                s = twin.net(x).softmax(0)
                total += (J.mT @ (torch.diag(s) - torch.outer(s, s)) @ J).trace().item()
            seen.append(total / NUM_SAMPLES)

    torch.manual_seed(0)
    fit(Classes(), callback, Watch(), data=loader())
    assert [entry["trace/gauss_newton"] for entry in callback.history] == pytest.approx(seen, rel=1e-9)


# ---- Batch sharpness


def sharpness_of(twin: Net, chosen: list[int]) -> float:
    batch, parameters = (Pairs().x[chosen], Pairs().y[chosen]), list(twin.parameters())
    g = dense_gradient(lambda: twin.loss(batch), parameters)
    H = dense_hessian(lambda: twin.loss(batch), parameters)
    return (g @ H @ g / (g @ g)).item()


def first_net() -> Net:
    torch.manual_seed(0)
    return Net()


def test_batch_sharpness_of_the_full_batch_is_the_curvature_along_its_gradient_and_exact() -> None:
    callback = TraceStability(batch_size=12, num_batches=3, data="train", **WHOLE)
    entry = measure(callback)[0]
    assert entry["trace/batch_sharpness"] == pytest.approx(sharpness_of(first_net(), list(range(12))), rel=1e-9)
    assert "trace/batch_sharpness_error" not in entry


@pytest.mark.parametrize("replacement", [False, True])
def test_batch_sharpness_is_the_mean_over_the_batches_that_training_draws(replacement: bool) -> None:
    callback = TraceStability(
        batch_size=2, replacement=replacement, num_draws=200, num_batches=3, data="train", **WHOLE
    )
    entry = measure(callback, max_epochs=1)[0]
    twin = first_net()
    draws = itertools.product(range(12), repeat=2) if replacement else itertools.combinations(range(12), 2)
    truth = torch.tensor([sharpness_of(twin, list(chosen)) for chosen in draws], dtype=torch.float64)
    error = entry["trace/batch_sharpness_error"]
    assert error == pytest.approx(truth.std().item() / 200**0.5, rel=0.3)
    assert abs(entry["trace/batch_sharpness"] - truth.mean().item()) < 4 * error


def test_of_a_single_batch_batch_sharpness_has_no_error() -> None:
    entry = measure(TraceStability(**WHOLE))[0]
    assert entry["trace/batch_sharpness"] == pytest.approx(sharpness_of(first_net(), [0, 1, 2, 3]), rel=1e-9)
    assert "trace/batch_sharpness_error" not in entry


def test_a_probe_smaller_than_a_batch_has_no_batch_sharpness_and_says_what_it_takes() -> None:
    with pytest.warns(UserWarning, match=r"a batch of training has 8 samples, and the probe only 4.*num_batches=2"):
        history = measure(TraceStability(**WHOLE), accumulate_grad_batches=2)
    assert all("trace/batch_sharpness" not in entry and "trace/frobenius_ratio" in entry for entry in history)


# ---- How training draws


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(Pairs())


class Batches:
    def __iter__(self) -> Any:
        return iter([(Pairs().x[:2], Pairs().y[:2])])


class First(Net):
    """Trains on the first of two loaders."""

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch[0])


SAMPLINGS: dict[str, tuple[Callable[[], Any], dict[str, Any], Sampling]] = {
    "in order": (loader, {}, Sampling(4, 12, False)),
    "shuffled": (lambda: loader(shuffle=True), {}, Sampling(4, 12, False)),
    "accumulated": (loader, {"accumulate_grad_batches": 2}, Sampling(8, 12, False)),
    "a batch larger than the dataset": (lambda: loader(batch_size=20), {}, Sampling(12, 12, False)),
    "the first batches of every epoch": (loader, {"limit_train_batches": 2}, Sampling(4, 8, False)),
    "some batches of a shuffled set": (
        lambda: loader(shuffle=True),
        {"limit_train_batches": 2},
        Sampling(4, 12, False),
    ),
    "with replacement": (
        lambda: loader(sampler=RandomSampler(Pairs(), replacement=True, num_samples=40)),
        {},
        Sampling(4, 12, True),
    ),
    "a subset": (lambda: loader(sampler=SubsetRandomSampler(range(7))), {}, Sampling(4, 7, False)),
    "weighted": (lambda: loader(sampler=WeightedRandomSampler([1.0] * 12, 12)), {}, Sampling(4, None, None)),
    "iterable": (lambda: DataLoader(Endless(), batch_size=4), {}, Sampling(4, None, None)),
    "two loaders": (lambda: [loader(), loader()], {}, Sampling(None, None, None)),
    "no loader": (Batches, {}, Sampling(None, None, None)),
}


@pytest.mark.parametrize("kind", SAMPLINGS)
def test_the_loader_tells_how_batches_are_drawn(kind: str) -> None:
    make, options, expected = SAMPLINGS[kind]
    trainer = make_trainer(max_steps=1, **options)
    trainer.fit(First() if kind == "two loaders" else Net(), make())
    assert sampling_of(trainer) == expected


def test_what_is_given_takes_the_place_of_what_the_loader_tells() -> None:
    callback = TraceStability(outputs="net", batch_size=3, dataset_size=100, replacement=True, num_batches=3, **WHOLE)
    dense = Dense()
    history = measure(callback, dense)
    blocks = dense.blocks[2]  # from the third batch on all samples are known
    own = blocks.square().sum((1, 2)).mean().item()
    pairs = (blocks.sum(0).square().sum().item() - 12 * own) / (12 * 11)
    square = own / 100 + 99 / 100 * pairs
    condition = (2 / 3 * square + own / 3) / blocks.mean(0).trace().item()
    assert history[0]["trace/batch_ratio"] == pytest.approx(LR / 2 * condition, rel=1e-9)


def test_what_the_loader_does_not_tell_is_asked_for_once_and_what_needs_it_left_out() -> None:
    callback = TraceStability(outputs="net", **WHOLE)
    with pytest.warns(UserWarning, match="DataLoader does not tell dataset_size, replacement") as warned:
        history = measure(callback, data=DataLoader(Endless(), batch_size=4))
    assert len(complaints(warned)) == 1
    kept = {"hessian", "hessian_error", "ratio", "gauss_newton", "alignment", "frobenius_ratio", "two_over_lr"}
    assert tags(history[0]) == kept | {"num_matvecs", "status"}


# ---- What is left out


def tags(entry: dict[str, Any]) -> set[str]:
    return {tag.removeprefix("trace/") for tag in entry if tag.startswith("trace/")}


ALWAYS = {"hessian", "hessian_error", "batch_sharpness", "num_matvecs", "status"}
JUDGED = {"two_over_lr", "ratio", "frobenius_ratio"}
OF_SAMPLES = {"gauss_newton", "alignment", "batch_ratio", "directional_ratio"}


def test_without_outputs_what_needs_them_is_left_out_with_one_message() -> None:
    with pytest.warns(UserWarning, match="without outputs= gauss_newton, batch_ratio") as warned:
        history = measure(TraceStability(**WHOLE))
    assert len(complaints(warned)) == 1
    assert [tags(entry) for entry in history] == [ALWAYS | JUDGED] * 6


def two_rates(parameters: Any) -> torch.optim.Optimizer:
    first, *others = parameters
    return torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": others, "lr": 0.2}])


OTHERS: dict[str, Any] = {
    "momentum": sgd(LR, momentum=0.9),
    "Nesterov": sgd(LR, momentum=0.9, nesterov=True),
    "weight decay": sgd(LR, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=LR),
    "two learning rates": two_rates,
    "an optimizer without a threshold": lambda p: torch.optim.Rprop(p, lr=1e-3),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_for_another_rule_than_plain_sgd_only_raw_values_are_logged_with_one_message(kind: str) -> None:
    callback = TraceStability(outputs="net", **WHOLE)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="2 / lr and the ratios left out: their theory") as warned:
        fit(Net(OTHERS[kind]), callback, data=loader())
    assert len(complaints(warned)) == 1
    raw = ALWAYS | {"gauss_newton", "alignment", "alignment_error"}
    assert [tags(entry) for entry in callback.history] == [raw] * 3
    assert not any("two_over_lr" in tag or "ratio" in tag for chart in callback.charts for tag in chart.tags)


def test_groups_that_agree_are_one_learning_rate() -> None:
    def groups(parameters: Any) -> torch.optim.Optimizer:
        first, *others = parameters
        return torch.optim.SGD([{"params": [first]}, {"params": others}], lr=LR)

    callback = TraceStability(**WHOLE)
    fit(Net(groups), callback, data=loader())
    assert tags(callback.history[0]) == ALWAYS | JUDGED


def test_at_learning_rate_0_ratios_are_left_out_until_it_rises() -> None:
    class WarmUp(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=LR)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step > 1))
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    callback = TraceStability(**WHOLE)
    with pytest.warns(UserWarning, match="the learning rate is 0, so nothing moves") as warned:
        fit(WarmUp(), callback, data=loader())
    assert len(complaints(warned)) == 2  # the other is about outputs
    assert [tags(entry) for entry in callback.history] == [ALWAYS, ALWAYS, ALWAYS | JUDGED]


class Normalised(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
        self.double()


def test_samples_that_batch_norm_couples_have_no_matrices_of_their_own() -> None:
    callback = TraceStability(outputs="net", **WHOLE)
    with pytest.warns(UserWarning, match="alignment left out: BatchNorm1d 'net.1' normalises") as warned:
        fit(Normalised(), callback, data=loader(), max_epochs=2)
    assert len(complaints(warned)) == 1
    errors = {"ratio_error", "frobenius_ratio_error"}  # 34 parameters are more than the products
    assert [tags(entry) for entry in callback.history] == [ALWAYS | JUDGED | errors] * 6
    evaluated = TraceStability(outputs="net", mode="eval", **WHOLE)
    fit(Normalised(), evaluated, data=loader())
    assert tags(evaluated.history[0]) >= ALWAYS | JUDGED | OF_SAMPLES


def test_a_loss_that_is_not_convex_in_the_outputs_has_no_gauss_newton_matrix() -> None:
    class Wavy(Net):
        def loss(self, batch: Any) -> Tensor:
            x, y = batch
            return (3 * (self.net(x) - y)).cos().mean()

    callback = TraceStability(outputs="net", **WHOLE)
    with pytest.warns(UserWarning, match="alignment left out: the loss is not convex in the outputs") as warned:
        fit(Wavy(), callback, data=loader(), max_epochs=2)
    assert len(complaints(warned)) == 1
    assert [tags(entry) for entry in callback.history] == [ALWAYS | JUDGED] * 6


def test_outputs_that_do_not_lie_along_the_samples_are_refused_for_the_quantities_that_need_it() -> None:
    class Folded(Net):
        def __init__(self) -> None:
            super().__init__()
            self.flat = nn.Flatten(0)

        def loss(self, batch: Any) -> Tensor:
            x, y = batch
            return (self.flat(self.net(x)).view_as(y) - y).square().sum(1).mean() / 2

    callback = TraceStability(outputs="flat", **WHOLE)
    with pytest.warns(UserWarning, match=r"returned shapes \(8,\) for 4 samples; name a submodule"):
        fit(Folded(), callback, data=loader())
    assert tags(callback.history[0]) == ALWAYS | JUDGED


@pytest.mark.parametrize(
    ("options", "samples"),
    [({"num_batches": 4}, "16 samples, the dataset 12"), ({"dataset_size": 3}, "4 samples, the dataset 3")],
)
def test_a_probe_larger_than_the_dataset_has_no_quantities_of_single_samples(
    options: dict[str, Any], samples: str
) -> None:
    callback = TraceStability(outputs="net", **{**WHOLE, "batch_size": 2, **options})
    with pytest.warns(UserWarning, match=f"alignment left out: the probe has {samples}.*lower num_batches") as warned:
        history = measure(callback, max_epochs=3)
    assert len(complaints(warned)) == 1
    assert len(history) >= 6
    assert all(tags(entry) >= ALWAYS | JUDGED for entry in history)
    assert not [tag for entry in history for tag in tags(entry) & OF_SAMPLES]


def test_a_probe_that_is_the_dataset_is_not_larger() -> None:
    callback = TraceStability(outputs="net", num_batches=3, **WHOLE)
    assert all(tags(entry) >= {"batch_ratio", "directional_ratio"} for entry in measure(callback))


# ---- Budget, failures, and what stays as it was


@pytest.mark.filterwarnings("ignore:.*The budget of products was spent:UserWarning")
def test_a_tiny_budget_gives_an_honest_status_and_error() -> None:
    three = TraceStability(outputs="net", num_matvecs=3, max_matvecs=3, every_n_steps=1, rtol=1e-8)
    dense = Dense(slice(0, 4))
    for entry, H in zip(measure(three, dense), dense.hessians, strict=True):
        assert entry["trace/status"] == Status.BUDGET
        assert abs(entry["trace/hessian"] - H.trace().item()) < 6 * entry["trace/hessian_error"]
    capped = TraceStability(max_matvecs=1, every_n_steps=1)
    for entry in measure(capped):
        assert entry["trace/status"] == Status.BUDGET
        assert "trace/hessian_error" not in entry  # one product tells no error
        assert entry["trace/num_matvecs"] == 3  # trace, norm and one batch


def test_a_direction_that_has_not_converged_still_gives_a_necessary_condition() -> None:
    dense = Dense()
    rough = TraceStability(outputs="net", max_matvecs=2, num_batches=3, data="train", every_n_steps=1)
    with pytest.warns(UserWarning, match="budget"):
        history = measure(rough, dense)
    for entry, blocks in zip(history, dense.blocks, strict=True):
        assert entry["trace/status"] == Status.BUDGET
        assert entry["trace/directional_ratio"] <= LR / 2 * largest_of_the_pencil(blocks, noise(12, 4)) * (1 + 1e-9)


def largest_of_the_pencil(blocks: Tensor, p: float) -> float:
    """λ_max(C⁺ D) by dense Kronecker products: 2/η at the exact threshold."""
    H, eye = blocks.mean(0), torch.eye(blocks.shape[1], dtype=torch.float64)
    C = (torch.kron(H, eye) + torch.kron(eye, H)) / 2
    D = (1 - p) * torch.kron(H, H) + p * torch.stack([torch.kron(G, G) for G in blocks]).mean(0)
    values, vectors = torch.linalg.eigh(C)
    kept = values > 1e-9 * values[-1]
    root = vectors[:, kept] * values[kept].rsqrt()
    return torch.linalg.eigvalsh(root.mT @ D @ root)[-1].item()


def test_every_condition_is_at_most_the_exact_threshold() -> None:
    dense = Dense()
    history = measure(TraceStability(outputs="net", num_batches=3, data="train", **WHOLE), dense, max_epochs=1)
    for entry, blocks in zip(history, dense.blocks, strict=True):
        exact = LR / 2 * largest_of_the_pencil(blocks, noise(12, 4))
        for ratio in ("batch_ratio", "directional_ratio"):
            assert 0.3 * exact < entry[f"trace/{ratio}"] <= exact * (1 + 1e-9)


def test_weights_that_are_not_finite_have_status_3_and_no_values() -> None:
    class Broken(Net):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            for p in self.parameters():
                p.data.fill_(math.nan)

    callback = TraceStability(every_n_steps=1)
    with pytest.warns(UserWarning, match="nonfinite: A product is not finite"):
        trainer = fit(Broken(), callback, data=loader())
    assert trainer.global_step == 3
    assert [entry["trace/status"] for entry in callback.history] == [0, 3, 3]
    assert tags(callback.history[-1]) == {"status", "num_matvecs", "two_over_lr"}


class SkewedLater(Net):
    """Right while it is tested, and from the third step on with a second derivative that is not symmetric."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
        self.where = where
        self.double()

    def loss(self, batch: Any) -> Tensor:
        error = self.net(batch[0]) - batch[1].sum()
        if self.global_step < 2:
            return error.square().mean() / 2
        if self.where == "loss":
            return (error.square() + SkewedSquare.apply(error)).mean() / 2
        return SkewedSquare.apply(torch.cat([p.flatten() for p in self.parameters()])).sum() + 0 * error.sum()


@pytest.mark.parametrize("options", [{"num_matvecs": 10}, {"num_matvecs": 40}], ids=str)
@pytest.mark.parametrize(("where", "outputs"), [("parameters", None), ("loss", None), ("loss", "net")])
def test_products_that_turn_asymmetric_give_a_status_and_no_number(
    where: str, outputs: str | None, options: dict[str, Any]
) -> None:
    callback = TraceStability(outputs=outputs, every_n_steps=1, on_error="raise", **options)
    with pytest.warns(UserWarning, match="breakdown: The products are not those of one symmetric matrix"):
        fit(SkewedLater(where), callback, data=loader(n=16))
    assert [entry["trace/status"] for entry in callback.history] == [0, 0, Status.BREAKDOWN, Status.BREAKDOWN]
    assert tags(callback.history[1]) >= ALWAYS
    assert [tags(entry) for entry in callback.history[2:]] == [{"status", "num_matvecs"}] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_columns", [1, 2, 15])
def test_rounding_does_not_pass_for_asymmetry_nor_asymmetry_for_rounding(num_columns: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(200, 200, dtype=torch.float64, generator=generator)
    symmetric, skewed = (A + A.mT) / 2, (A + A.mT) / 2 + (A - A.mT) / 10
    X = torch.randn(200, num_columns, dtype=torch.float64, generator=generator).to(dtype)
    for matrix, status in ((symmetric, Status.CONVERGED), (skewed, Status.BREAKDOWN)):
        watched = Watched(Matrix(matrix.to(dtype)))
        torch.testing.assert_close(watched.matmat(X), matrix.to(dtype) @ X)
        assert watched.status is (status if num_columns > 1 else Status.CONVERGED)  # one column tells nothing


def test_a_product_that_is_not_finite_has_a_status_of_its_own() -> None:
    watched = Watched(Matrix(torch.diag(torch.tensor([1.0, math.inf]))))
    watched.matmat(torch.ones(2, 2))
    assert watched.status is Status.NONFINITE


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_training_is_bit_identical_with_it(tmp_path: Path, mode: str) -> None:
    callback = TraceStability(
        every_n_steps=1, outputs="head", mode=mode, num_batches=2, num_samples=4, num_matvecs=6, num_draws=2,
        on_error="raise",
    )  # fmt: skip
    plain = record(tmp_path, Everything, lambda: images(shuffle=True))
    measured = record(tmp_path, Everything, lambda: images(shuffle=True), [callback], own_tags=lambda tag: "/" in tag)
    assert plain.differences(measured) == set()
    assert tags(callback.history[-1]) >= ({"alignment", "gauss_newton"} if mode == "eval" else {"hessian"})
    assert not callback.silenced


def test_two_instances_stand_side_by_side_under_their_names() -> None:
    first, second = TraceStability(**WHOLE), TraceStability(batch_size=1, name="trace_b1", **WHOLE)
    fit(Net(), first, second, data=loader())
    assert all(tag.startswith(("trace_b1/", "cost/", "step")) for tag in second.history[0])
    expected = 2 * first.history[0]["trace/frobenius_ratio"]  # √B
    assert second.history[0]["trace_b1/frobenius_ratio"] == pytest.approx(expected, rel=1e-9)


def test_what_its_charts_draw_is_logged() -> None:
    for outputs in (None, "net"):
        callback = TraceStability(outputs=outputs, **WHOLE)
        fit(Net(), callback, data=loader())
        assert {tag for chart in callback.charts for tag in chart.tags} <= set(callback.history[0])


@pytest.mark.parametrize("knob", ["num_matvecs", "num_samples", "num_draws", "batch_size", "dataset_size"])
def test_a_count_below_1_is_refused(knob: str) -> None:
    with pytest.raises(ValueError, match=rf"{knob}=0 must be at least 1"):
        TraceStability(**{knob: 0})  # pyright: ignore[reportArgumentType]


def test_a_batch_size_that_the_dataset_does_not_have_is_refused_when_the_fit_begins() -> None:
    callback = TraceStability(batch_size=13, every_n_steps=1)
    with pytest.warns(UserWarning, match=r"batch_size=13 is more than the 12 samples there are.*goes on without"):
        trainer = fit(Net(), callback, data=loader())
    assert trainer.global_step == 3
    assert not callback.history


@pytest.mark.slow
def test_sgd_ends_where_the_batch_ratio_allows_it_and_gradient_descent_where_sgd_could_not_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    last: dict[int, dict[str, Any]] = {}
    for batch_size in (0, 1):
        pl.seed_everything(1, verbose=False)
        callback = TraceStability(
            batch_size=1, every_n_steps=2400, outputs="net", data="train", num_batches=20, on_error="raise"
        )
        model, data = Regressor(), RegressionDataModule(batch_size)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.15)
        monkeypatch.setattr(model, "configure_optimizers", lambda optimizer=optimizer: optimizer)
        trainer = make_trainer(callback, max_epochs=-1, max_steps=12_000, log_every_n_steps=1000)
        trainer.fit(model, datamodule=data)
        x, y = data._train.tensors
        last[batch_size] = {**callback.history[-1], "loss": (model(x) - y).square().mean().item() / 2}
    assert last[0]["loss"] < 1e-6
    assert last[1]["loss"] < 1e-6
    assert last[0]["trace/batch_ratio"] > 1.05
    assert last[1]["trace/batch_ratio"] < 0.95


def test_the_batch_size_is_that_of_the_step_where_batches_are_accumulated_by_a_schedule() -> None:
    """The scheduler sets it when an epoch begins, after the fit has."""
    read = TraceStability(outputs="net", every_n_steps=1)
    given = TraceStability(outputs="net", every_n_steps=1, batch_size=8, name="given")
    schedule = GradientAccumulationScheduler({0: 2})
    fit(Regression(sgd(0.05)), read, given, schedule, data=runs.loader(16, batch_size=4), max_epochs=2)
    assert len(read.history) == 4
    for tag in ("batch_ratio", "directional_ratio"):
        found = [entry[f"trace/{tag}"] for entry in read.history]
        assert found == pytest.approx([entry[f"given/{tag}"] for entry in given.history], rel=1e-3)

"""A probe in a plain loop, without Lightning."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectral_callbacks.linalg import eigsh
from spectral_callbacks.operators import Hessian, Objective
from spectral_callbacks.probe import Probe
from spectral_callbacks.stability import Edge, NoThresholdError
from tests.oracles import dense_gradient, dense_hessian, relative_error

Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """Small, smooth, with a parameter that no loss reaches and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)
        self.unused = nn.Linear(1, 1)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.dropout(self.body(x))) * self.frozen


def loss_of(module: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    return (module(x) - y).square().mean()


def batches(*sizes: int, dtype: torch.dtype = torch.float64) -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(n, 3, generator=generator, dtype=dtype), torch.randn(n, 2, generator=generator, dtype=dtype))
        for n in sizes
    ]


@pytest.fixture
def net() -> Net:
    return Net().double()


def sgd(module: nn.Module, lr: float = 0.1, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(module.parameters(), lr=lr, **options)


def without_dropout(net: Net) -> Net:
    net.dropout.p = 0.0
    return net


def oracle(net: Net, data: Sequence[Batch], parameters: Sequence[Tensor]) -> tuple[float, Tensor, Tensor]:
    """Return loss, gradient and Hessian of the mean over all samples of the batches, each with its own statistics."""
    total = sum(len(x) for x, _ in data)

    def loss() -> Tensor:
        return torch.stack([loss_of(net, (x, y)) * len(x) / total for x, y in data]).sum()

    return loss().item(), dense_gradient(loss, parameters), dense_hessian(loss, parameters)


@pytest.mark.parametrize("sizes", [(8,), (8, 8), (8, 5, 2)])
def test_loss_gradient_and_hessian_are_those_of_the_mean_over_all_samples(net: Net, sizes: tuple[int, ...]) -> None:
    without_dropout(net)
    data = batches(*sizes)
    with Probe(net, sgd(net), data, loss=loss_of) as probe:
        loss, gradient, hessian = probe.loss(), probe.gradient(), probe.operator(Hessian).to_dense()
        parameters = list(probe.space.tensors)
    expected = oracle(net, data, parameters)
    assert loss == pytest.approx(expected[0], rel=1e-12)
    assert relative_error(gradient, expected[1]) < 1e-12
    assert relative_error(hessian, expected[2]) < 1e-11


def test_eval_mode_measures_the_function_that_predicts(net: Net) -> None:
    data = batches(8)
    net(data[0][0])
    with Probe(net, sgd(net), data, loss=loss_of, mode="eval") as probe:
        hessian = probe.operator(Hessian).to_dense()
        parameters = list(probe.space.tensors)
    assert net.training
    _, _, expected = oracle(net.eval(), data, parameters)
    assert relative_error(hessian, expected) < 1e-11


def test_train_mode_measures_one_dropout_mask(net: Net) -> None:
    data = batches(8)
    products = []
    for seed in (0, 0, 1):
        with Probe(net, sgd(net), data, loss=loss_of, seed=seed) as probe:
            hessian = probe.operator(Hessian).to_dense()
            assert relative_error(hessian, hessian.T) < 1e-12
            assert torch.equal(hessian, probe.operator(Hessian).to_dense())
        products.append(hessian)
    assert torch.equal(products[0], products[1])
    assert not torch.equal(products[0], products[2])


def test_training_in_a_plain_loop_is_bit_identical_with_probes(net: Net) -> None:
    finals = []
    for measured in (False, True):
        torch.manual_seed(0)
        module = Net()
        optimizer = sgd(module, momentum=0.9)
        for step, batch in enumerate(batches(8, 8, 8, dtype=torch.float32)):
            if measured:
                with Probe(module, optimizer, [batch], loss=loss_of, step=step, outputs="") as probe:
                    eigsh(probe.operator(Hessian), generator=probe.generator)
                    eigsh(probe.gauss_newton(), generator=probe.generator)
                    probe.subset(torch.tensor([5, 1])).gradient()
                with Probe(module, optimizer, [batch], loss=loss_of, mode="eval", outputs="") as probe:
                    probe.per_sample_gram()
                    probe.sample_curvature()
            loss = loss_of(module, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        finals.append([*module.state_dict().values(), torch.get_rng_state(), torch.tensor(module.calls)])
    for plain, probed in zip(*finals, strict=True):
        assert torch.equal(plain, probed)


def test_the_graph_is_built_once_for_all_that_look(net: Net) -> None:
    runs: list[int] = []

    def counted(module: nn.Module, batch: Batch) -> Tensor:
        runs.append(1)
        return loss_of(module, batch)

    with Probe(net, sgd(net), batches(4, 4), loss=counted) as probe:
        other = probe.seen_by(torch.Generator().manual_seed(1))
        assert other.operator(Hessian) is probe.operator(Hessian)
        assert other.objective is probe.objective
        other.operator(Hessian).to_dense()
        probe.loss()
        probe.gradient()
        other.preconditioned(Hessian).to_dense()
    assert len(runs) == 2


def test_a_probe_does_not_touch_cuda_while_training_does_not(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_initialized():
        pytest.skip("CUDA is in use already")
    monkeypatch.setattr(torch.cuda, "_lazy_seed_tracker", torch.cuda._LazySeedTracker())
    queued = list(torch.cuda._queued_calls)
    with Probe(net, sgd(net), batches(4), loss=loss_of) as probe:
        eigsh(probe.operator(Hessian), generator=probe.generator)
    assert not torch.cuda.is_initialized()
    assert torch.cuda._queued_calls == queued
    assert not any(torch.cuda._lazy_seed_tracker.get_calls())


def test_generators_differ_while_all_else_is_shared(net: Net) -> None:
    mine = torch.Generator().manual_seed(3)
    with Probe(net, sgd(net), batches(4), loss=loss_of, seed=2) as probe:
        assert probe.seen_by(mine).generator is mine
        assert probe.generator.initial_seed() == 2


CALLS: dict[str, Callable[[Probe], object]] = {
    "loss": lambda probe: probe.loss(),
    "gradient": lambda probe: probe.gradient(),
    "hessian": lambda probe: probe.operator(Hessian).to_dense(),
    "preconditioned": lambda probe: probe.preconditioned(Hessian).to_dense(),
    "evaluate": lambda probe: probe.evaluate(probe.batches[0], seed=0),
    "gauss_newton": lambda probe: probe.seen_by(probe.generator, "").gauss_newton().to_dense(),
    "subset": lambda probe: probe.subset(torch.tensor([2, 0])).gradient(),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_closed_probe_says_so(net: Net, call: str) -> None:
    probe = Probe(net, sgd(net), batches(4), loss=loss_of)
    with pytest.raises(RuntimeError, match="the probe is closed; measure inside `with probe:`"):
        CALLS[call](probe)
    with probe:
        CALLS[call](probe)
        shared = probe.seen_by(torch.Generator())
    for closed in (probe, shared):
        with pytest.raises(RuntimeError, match="the probe is closed"):
            CALLS[call](closed)


def test_a_probe_can_be_opened_again_at_new_weights(net: Net) -> None:
    probe = Probe(net, sgd(net), batches(4), loss=loss_of)
    with probe:
        first = probe.loss()
    with torch.no_grad():
        net.head.bias.add_(1)
    with probe:
        assert probe.loss() != first


def test_weights_that_move_under_an_open_probe_are_an_error(net: Net) -> None:
    with Probe(net, sgd(net), batches(4), loss=loss_of) as probe:
        probe.gradient()
        with torch.no_grad():
            net.head.bias.add_(1)
        with pytest.raises(RuntimeError, match="the parameters changed"):
            probe.operator(Hessian).to_dense()


def test_the_space_is_what_the_optimizer_owns_and_trains(net: Net) -> None:
    everything = Probe(net, sgd(net), batches(4), loss=loss_of)
    assert "frozen" not in everything.space.names
    assert "unused.weight" in everything.space.names
    net.head.bias.requires_grad_(False)
    head = Probe(net, torch.optim.SGD(net.head.parameters(), lr=0.1), batches(4), loss=loss_of)
    assert head.space.names == ("head.weight",)


def test_the_hessian_of_a_subset_is_a_block_of_the_whole(net: Net) -> None:
    data = batches(8)
    with Probe(net, sgd(net), data, loss=loss_of) as probe:
        whole, places = probe.operator(Hessian).to_dense(), probe.space.slices
    with Probe(net, torch.optim.SGD(net.head.parameters(), lr=0.1), data, loss=loss_of) as probe:
        block = probe.operator(Hessian).to_dense()
    rows = torch.cat([torch.arange(places[name].start, places[name].stop) for name in ("head.weight", "head.bias")])
    assert relative_error(block, whole[rows][:, rows]) < 1e-12


def test_no_trainable_parameter_is_a_clear_error(net: Net) -> None:
    optimizer = sgd(net)
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter with requires_grad=True"):
        Probe(net, optimizer, batches(4), loss=loss_of)


def test_no_batch_is_a_clear_error(net: Net) -> None:
    with pytest.raises(ValueError, match="at least one loss"), Probe(net, sgd(net), [], loss=loss_of) as probe:
        probe.loss()


def groups_of(net: Net) -> torch.optim.SGD:
    """Three groups with rules of their own: plain, heavy ball with decay, Nesterov; and one that stands still."""
    return torch.optim.SGD(
        [
            {"params": [net.body[0].weight], "lr": 0.3},
            {"params": [net.head.bias, net.body[0].bias], "lr": 0.1, "momentum": 0.9, "weight_decay": 0.2},
            {"params": [net.head.weight], "lr": 0.2, "momentum": 0.5, "nesterov": True},
            {"params": [net.body[2].weight], "lr": 0.0, "weight_decay": 0.5},
        ],
        lr=1.0,
    )


def test_the_metric_of_several_groups_is_that_of_each_parameters_own_edge(net: Net) -> None:
    data = batches(8)
    with Probe(net, groups_of(net), data, loss=loss_of) as probe:
        metric = probe.preconditioned(Hessian).to_dense()
        hessian = probe.operator(Hessian).to_dense()
        names, sizes = probe.space.names, [p.numel() for p in probe.space.tensors]
    rules = {  # name -> (learning rate, decay, η (λ + decay) at the edge)
        "body.0.weight": (0.3, 0.0, 2.0),
        "body.0.bias": (0.1, 0.2, 3.8),
        "head.bias": (0.1, 0.2, 3.8),
        "head.weight": (0.2, 0.0, 1.5),
        "body.2.weight": (0.0, 0.5, 2.0),
    }
    assert set(names) == set(rules)
    D = torch.cat([torch.full((n,), rules[name][0] / rules[name][2]) for name, n in zip(names, sizes, strict=True)])
    decay = torch.cat([torch.full((n,), rules[name][1]) for name, n in zip(names, sizes, strict=True)])
    D, decay = D.double(), decay.double()
    expected = D.sqrt()[:, None] * (hessian + torch.diag(decay)) * D.sqrt()
    assert relative_error(metric, expected) < 1e-6  # the test's own learning rates pass through float32


def test_edges_follow_the_order_of_the_space_and_see_the_present_learning_rate(net: Net) -> None:
    optimizer = groups_of(net)
    probe = Probe(net, optimizer, batches(4), loss=loss_of)
    optimizer.param_groups[0]["lr"] = 0.6
    edges = dict(zip(probe.space.names, probe.edges(), strict=True))
    assert edges["body.0.weight"] == Edge(0.6, 2.0)
    assert edges["head.bias"] == edges["body.0.bias"] == Edge(0.1, 3.8, 0.2)


def test_an_optimizer_without_a_rule_has_no_edges(net: Net) -> None:
    probe = Probe(net, torch.optim.LBFGS(net.parameters()), batches(4), loss=loss_of)
    with pytest.raises(NoThresholdError, match="LBFGS has no finite threshold"):
        probe.edges()


def test_a_loss_may_take_the_batch_apart_and_write_to_it(net: Net) -> None:
    x, y = batches(4)[0]
    batch = {"x": x.clone(), "labels": y}

    def greedy(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        labels, inputs = batch.pop("labels"), batch.pop("x")
        return (module(inputs.mul_(2)) - labels).square().mean()

    with Probe(net, sgd(net), [batch], loss=greedy) as probe:
        assert probe.loss() == probe.evaluate(batch, seed=0).item()
    assert sorted(batch) == ["labels", "x"]
    assert torch.equal(batch["x"], x)


def test_objectives_are_shared_and_made_anew_when_the_probe_opens(net: Net) -> None:
    probe = Probe(net, sgd(net), batches(4), loss=loss_of)
    with probe:
        first = probe.objective
        assert isinstance(first, Objective)
    with probe:
        assert probe.objective is not first


def test_the_probe_knows_no_lightning() -> None:
    code = "import sys, spectral_callbacks.probe; sys.exit(any('lightning' in name for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)

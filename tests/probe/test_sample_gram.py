"""Gram matrices of per-sample gradients from one backward pass: exact, whatever the network is made of."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.demos.transformer import LightningTransformer
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from spectral_callbacks.linalg import eigsh, trace
from spectral_callbacks.operators import (
    EmpiricalFisher,
    GradientCovarianceOperator,
    GramRide,
    StructureChangedError,
)
from spectral_callbacks.operators import graphs as engine
from spectral_callbacks.operators.factors import Rows
from spectral_callbacks.operators.layout import Layout
from spectral_callbacks.probe import Probe, twice_differentiable
from spectral_callbacks.probe.batches import signature
from tests.operators.sample_models import MODELS, VOCABULARY, PositionalModel, T, TiedLanguageModel
from tests.oracles import relative_error

N = 6
Batch = tuple[Tensor, Tensor]
Case = tuple[nn.Module, Batch, Callable[[nn.Module, Batch], Tensor]]


def loss_of(module: nn.Module, batch: Batch) -> Tensor:
    """A smooth function of all outputs of a sample and its label, averaged over samples."""
    z = module(batch[0]).flatten(1)
    return (z.square().sum(1) + z @ torch.arange(z.shape[1], dtype=z.dtype) * batch[1]).mean()


def next_words(module: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(module(batch[0]).mT, batch[1])


def of_lightning(module: nn.Module, batch: Batch) -> Tensor:
    return F.nll_loss(module(*batch).view(-1, VOCABULARY), batch[1].view(-1))


def lightning_transformer() -> nn.Module:
    module = LightningTransformer(vocab_size=VOCABULARY)
    for submodule in module.modules():
        if isinstance(submodule, nn.Dropout):
            submodule.p = 0.0
        if isinstance(submodule, nn.MultiheadAttention):
            submodule.dropout = 0.0
    return module


WORDS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Batch], Tensor]]] = {
    "words tied to the head": (TiedLanguageModel, next_words),
    "words tied to the head, padded": (lambda: TiedLanguageModel(padding_idx=2), next_words),
    "positions looked up": (lambda: PositionalModel("embedding"), next_words),
    "positions of a parameter": (lambda: PositionalModel("parameter"), next_words),
    "LightningTransformer": (lightning_transformer, of_lightning),
}
NAMES = [*MODELS, *WORDS]


def case(name: str, dtype: torch.dtype = torch.float64) -> Case:
    torch.manual_seed(0)
    if name in WORDS:
        make, loss = WORDS[name]
        words = torch.randint(VOCABULARY, (N, T))
        return make().to(dtype), (words, words.roll(-1, 1)), loss
    model, shape = MODELS[name]
    return model().to(dtype), (torch.randn(N, *shape, dtype=torch.float64).to(dtype), torch.arange(N) % 3), loss_of


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch_of(n: int) -> Batch:
    return torch.randn(n, 4, dtype=torch.float64), torch.arange(n) % 3


def gradients_of(module: nn.Module, batches: list[Batch], loss: Any) -> Tensor:  # (N, n)
    parameters = [p for p in module.parameters() if p.requires_grad]
    rows = []
    for x, y in batches:
        for one in zip(x.split(1), y.split(1), strict=True):
            gradient = torch.autograd.grad(loss(module, one), parameters, allow_unused=True, materialize_grads=True)
            rows.append(torch.cat([g.reshape(-1) for g in gradient]))
    return torch.stack(rows)


def open_probe(module: nn.Module, batches: list[Any], loss: Any = loss_of, **options: Any) -> Probe:
    parameters = [p for p in module.parameters() if p.requires_grad]
    return Probe(module, torch.optim.SGD(parameters, lr=0.1), batches, loss=loss, **options)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_that_of_a_loop_over_the_samples(name: str) -> None:
    module, batch, loss = case(name)
    with open_probe(module, [batch], loss) as probe:
        assert probe.sample_structure().untreated == {}
        found = probe.per_sample_gram()
    G = gradients_of(module, [batch], loss)
    assert relative_error(found, G @ G.mT) < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_in_float32_it_is_that_of_a_loop_to_rounding(name: str) -> None:
    module, batch, loss = case(name, torch.float32)
    with open_probe(module, [batch], loss) as probe:
        found = probe.per_sample_gram()
    G = gradients_of(*case(name)[:1], [case(name)[1]], loss)
    assert relative_error(found, G @ G.mT) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_products_with_the_gradients_are_those_with_their_rows(name: str) -> None:
    module, batch, loss = case(name)
    G = gradients_of(module, [batch], loss)
    W, C = torch.randn(G.shape[1], 3, dtype=torch.float64), torch.randn(N, 2, dtype=torch.float64)
    with open_probe(module, [batch], loss) as probe:
        gradients = probe.sample_gradients()
        assert relative_error(gradients.products(W), G @ W) < 1e-12
        assert relative_error(gradients.combined(C), G.mT @ C) < 1e-12
        found = probe.sample_gram(by_parameter=True, directions=W)
        slices = probe.space.slices
    assert found.along is not None
    assert relative_error(found.along, G @ W) < 1e-12
    assert found.by_parameter is not None
    for parameter, part in found.by_parameter.items():
        own = G[:, slices[parameter]]
        assert (part - own @ own.mT).abs().max() <= 1e-12 * (G @ G.mT).abs().max()


def test_checkpointed_layers_are_measured_and_training_could_go_on() -> None:
    module, batch = mlp(), batch_of(N)

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        z = checkpoint(module, batch[0], use_reentrant=False)
        return F.cross_entropy(z, batch[1])

    with open_probe(module, [batch], loss) as probe:
        found = probe.per_sample_gram()
    G = gradients_of(module, [batch], loss)
    assert relative_error(found, G @ G.mT) < 1e-12


# ---- What has no kernel


def half_normed() -> nn.Module:
    """A layer that is read off the graph, and one whose weight is made of others."""
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), weight_norm(nn.Linear(5, 3))).double()


@pytest.mark.parametrize("frozen", [False, True])
def test_what_has_no_kernel_goes_sample_by_sample_and_adds_up(frozen: bool) -> None:
    torch.manual_seed(0)
    module: Any = half_normed()
    if frozen:  # then nothing is read off the graph
        module[0].requires_grad_(False)
        module[2].bias.requires_grad_(False)
    batches = [batch_of(4), batch_of(3)]
    G = gradients_of(module, batches, loss_of)
    W = torch.randn(G.shape[1], 2, dtype=torch.float64)
    with open_probe(module, batches) as probe:
        structure = probe.sample_structure()
        assert {probe.space.names[i].rsplit(".")[-1] for i in structure.untreated} == {"original0", "original1"}
        assert "original0" in structure.explain()
        found = probe.sample_gram(by_parameter=True, directions=W)
        fisher = EmpiricalFisher(probe.sample_gradients()).to_dense()
        assert found.by_parameter is not None
        assert set(found.by_parameter) == set(probe.space.names)
    assert relative_error(found.gram, G @ G.mT) < 1e-12
    assert found.along is not None
    assert relative_error(found.along, G @ W) < 1e-12
    assert relative_error(fisher, G.mT @ G / 7) < 1e-12


# ---- What is found out by experiment


def test_sequences_first_or_samples_first_are_told_apart() -> None:
    """As many positions as samples: no shape tells."""
    torch.manual_seed(0)
    x = torch.randn(5, 5, 4, dtype=torch.float64)
    for first in (False, True):

        def loss(module: nn.Module, batch: Batch, first: bool = first) -> Tensor:
            z = module(batch[0].transpose(0, 1)).transpose(0, 1) if first else module(batch[0])
            return F.cross_entropy(z.mean(1), batch[1])

        module, batch = mlp(), (x, torch.arange(5) % 3)
        with open_probe(module, [batch], loss) as probe:
            found = probe.per_sample_gram()
            layouts = {tuple(layout) for layout in probe.sample_structure().layouts if layout is not None}
        assert layouts == {(5, 1) if first else (1, 5)}
        G = gradients_of(module, [batch], loss)
        assert relative_error(found, G @ G.mT) < 1e-12


def test_a_kernel_that_is_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that finds the right sum, and gives it to the wrong samples, too."""
    torch.manual_seed(0)
    module, batch = mlp(), batch_of(N)
    G = gradients_of(module, [batch], loss_of)
    right = Rows.__init__

    def doubled(self: Rows, rows: Tensor) -> None:
        right(self, 2 * rows if rows.shape[1:] == (5,) else rows)

    def exchanged(self: Rows, rows: Tensor) -> None:
        right(self, rows.roll(1, 0) if rows.shape[1:] == (5,) else rows)

    for wrong, reason in ((doubled, "do not add up to the gradient"), (exchanged, "cannot be told apart")):
        monkeypatch.setattr(Rows, "__init__", wrong)
        with open_probe(module, [batch]) as probe:
            structure = probe.sample_structure()
        assert {probe.space.names[index] for index in structure.untreated} == {"0.bias"}
        assert reason in structure.explain()
        monkeypatch.setattr(Rows, "__init__", right)
        with open_probe(module, [batch], structures={signature(batch): structure}) as probe:
            assert relative_error(probe.per_sample_gram(), G @ G.mT) < 1e-12


def test_a_layout_that_is_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module, batch = mlp(), (torch.randn(5, 3, 4, dtype=torch.float64), torch.arange(5) % 3)

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(module(batch[0]).mean(1), batch[1])

    monkeypatch.setattr("spectral_callbacks.operators.structure.find_layout", lambda *_: Layout(3, 1))
    with open_probe(module, [batch], loss) as probe, pytest.raises(ValueError, match="not the mean over its samples"):
        probe.sample_structure()


def contrastive(module: nn.Module, batch: Batch) -> Tensor:
    z = F.normalize(module(batch[0]), dim=1)
    return F.cross_entropy(z @ z.mT / 0.5, torch.arange(len(z)).roll(1))


def centered(module: nn.Module, batch: Batch) -> Tensor:
    z = module(batch[0])
    return F.cross_entropy(z - z.mean(0), batch[1])


@pytest.mark.parametrize("loss", [contrastive, centered])
def test_samples_that_a_loss_couples_have_no_gram_matrix(loss: Any) -> None:
    with open_probe(mlp(), [batch_of(12)], loss) as probe:
        assert set(probe.sample_structure().untreated) == {0, 1, 2, 3}
        assert "depends on several samples at once" in probe.sample_structure().explain()
        with pytest.raises(ValueError, match="not the mean over its samples"):
            probe.per_sample_gram()


def test_a_weight_that_is_scaled_by_the_batch_couples_the_samples() -> None:
    """By so little that parts of the batch agree with it to 2 %, and behind it nothing shows that all change."""
    torch.manual_seed(0)
    x = torch.randn(64, 4, dtype=torch.float64)
    x *= (1 + 0.01 * torch.randn(64, 1)) / x.abs().mean(1, keepdim=True)
    module: Any = nn.Linear(4, 1, bias=False).double()

    def loss(module: Any, batch: Batch) -> Tensor:
        return (batch[0] @ (module.weight * batch[0].abs().mean()).mT).mean()

    with open_probe(module, [(x, torch.arange(64))], loss) as probe:
        found = probe.per_sample_gram()
        assert "depends on several samples at once" in probe.sample_structure().explain()
    G = gradients_of(module, [(x, torch.arange(64))], loss)
    assert relative_error(found, G @ G.mT) < 1e-12


def test_a_sum_is_called_one() -> None:
    def loss(module: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1], reduction="sum")

    with (
        open_probe(mlp(), [batch_of(12)], loss) as probe,
        pytest.raises(
            ValueError, match=r"not the mean over its samples \(it is their sum\): .*; pass loss= that is a mean"
        ),
    ):
        probe.per_sample_gram()


def test_dropout_masks_are_those_of_the_gradient() -> None:
    torch.manual_seed(0)
    module, batch = nn.Sequential(nn.Linear(4, 9), nn.Dropout(0.5), nn.Linear(9, 3)).double(), batch_of(8)
    with open_probe(module, [batch]) as probe:
        gram, gradient = probe.per_sample_gram(), probe.gradient()
        sums = probe.sample_gradients().combined(torch.ones(8, 1)) / 8
    assert gram.mean().item() == pytest.approx(gradient.square().sum().item(), rel=1e-12)
    assert relative_error(sums[:, 0], gradient) < 1e-12


def test_what_was_found_out_is_known_to_later_probes_of_other_weights_and_sizes() -> None:
    module, known = mlp(), {}
    evaluations: list[int] = []

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        evaluations.append(len(batch[1]))
        return loss_of(module, batch)

    counts = []
    for n in (8, 8, 5):
        batch = batch_of(n)
        with open_probe(module, [batch], loss, structures=known) as probe:
            found = probe.per_sample_gram()
        counts.append(len(evaluations))
        evaluations.clear()
        G = gradients_of(module, [batch], loss_of)
        assert relative_error(found, G @ G.mT) < 1e-12
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(1.1)
    assert counts[0] > 1
    assert counts[1:] == [1, 1]


def test_a_network_that_takes_another_way_is_looked_at_again() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.mixed = nn.Linear(4, 3), nn.Linear(4, 3), False

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) * self.second(x) if self.mixed else self.first(x)

    module, batch, known = Branching().double(), batch_of(6), {}
    for mixed in (False, True):
        module.mixed = mixed
        with open_probe(module, [batch], structures=known) as probe:
            found = probe.per_sample_gram()
        G = gradients_of(module, [batch], loss_of)
        assert relative_error(found, G @ G.mT) < 1e-12


def test_layers_that_start_at_zero_are_looked_at_until_they_do_not() -> None:
    """Behind them all gradients are zero, and nothing tells whose."""
    torch.manual_seed(0)
    last, known = nn.Linear(5, 3), {}
    nn.init.zeros_(last.weight)
    module = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), last).double()
    x, y = torch.randn(6, 7, 4, dtype=torch.float64), torch.arange(6) % 3

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(module(batch[0]).mean(1), batch[1])

    for _ in range(2):
        with open_probe(module, [(x, y)], loss, structures=known) as probe:
            found, structure = probe.per_sample_gram(), probe.sample_structure()
        assert structure.untreated == {}
        assert structure.is_final == bool(known) == bool(last.weight.any())
        G = gradients_of(module, [(x, y)], loss)
        assert relative_error(found, G @ G.mT) < 1e-12
        with torch.no_grad():
            last.weight.normal_()


def test_batches_that_do_not_fit_into_one_say_so() -> None:
    module = mlp()
    batches = [(torch.randn(3, n, 4, dtype=torch.float64), torch.arange(3)) for n in (2, 5)]

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(module(batch[0]).mean(1), batch[1])

    G = gradients_of(module, batches, loss)
    with open_probe(module, batches, loss) as probe:
        with pytest.raises(ValueError, match="tensors of different shapes, and samples are compared in one batch"):
            probe.per_sample_gram()
        assert relative_error(EmpiricalFisher(probe.sample_gradients()).to_dense(), G.mT @ G / 6) < 1e-12


# ---- What another batch does otherwise


def later(first: Any, second: Any, module: nn.Module, loss: Any) -> Tensor:
    """Return the Gram matrix of a batch behind a look at another one, against that of a loop: the relative error."""
    known: dict[Any, Any] = {}
    for batch in (first, second):
        with open_probe(module, [batch], loss, structures=known) as probe:
            found = probe.per_sample_gram()
        G = gradients_of(module, [batch], loss)
        assert relative_error(found, G @ G.mT) < 1e-12
    return found


def classes(module: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def test_one_sample_alone_tells_nothing_of_the_order_of_several() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, T, 4, dtype=torch.float64)

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(module(batch[0].transpose(0, 1)).mean(0), batch[1])

    later((x[:1], torch.arange(1)), (x, torch.arange(6) % 3), mlp(), loss)


class Sorted(nn.Module):
    """Takes its samples in an order that they give, and puts them back."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        order = x[:, 0].sign().argsort(stable=True)
        return self.last(h[order])[order.argsort()]


class Routed(nn.Module):
    """Every sample goes to one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.experts = nn.Linear(4, 4), nn.ModuleList(nn.Linear(4, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h, out = self.embed(x), x.new_zeros(len(x), 3)
        for number, expert in enumerate(self.experts):
            places = ((x[:, 0] < 0) == number).nonzero()[:, 0]
            if len(places):
                out = out.index_add(0, places, expert(h[places]))
        return out


class Trimmed(nn.Module):
    """Sequences end with the longest of the batch; zeros are no part of them."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Embedding(VOCABULARY, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        is_there = x != 0
        x = x[:, : int(is_there.sum(1).max())]
        is_there = is_there[:, : x.shape[1], None]
        return (torch.tanh(self.head(self.token(x))) * is_there).sum(1) / is_there.sum(1)


@pytest.mark.parametrize("make", [Sorted, Routed, Trimmed])
def test_rows_that_another_batch_moves_otherwise_are_found_anew(make: Callable[[], nn.Module]) -> None:
    """All samples alike at first: nothing is moved, one layer takes all, no sequence is short."""
    torch.manual_seed(0)
    y = torch.arange(8) % 3
    x = torch.randn(8, 4, dtype=torch.float64)
    alike = torch.cat([x[:, :1].abs(), x[:, 1:]], 1)
    if make is Trimmed:
        alike = torch.randint(1, VOCABULARY, (8, T))
        x = alike.clone()
        x[:, 3:] = 0
        x[::2, 2:] = 0
    module = make().double()
    later((alike, y), (x, y), module, classes)
    with open_probe(module, [(alike, y)], classes) as probe:
        structure = probe.sample_structure()
    with pytest.raises(StructureChangedError, match="other operations"):
        GramRide(classes(module, (x, y)), structure, batch_size=8)


WEIGHTS = torch.linspace(0.2, 3.0, VOCABULARY, dtype=torch.float64)


def ignoring(module: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(module(batch[0]).mT, batch[1], ignore_index=0)


def weighing(module: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(module(batch[0]).mT, batch[1], weight=WEIGHTS)


def masking(module: nn.Module, batch: Batch) -> Tensor:
    counts = batch[1] != 0
    return (F.cross_entropy(module(batch[0]).mT, batch[1], reduction="none") * counts).sum() / counts.sum()


def choosing(module: nn.Module, batch: Batch) -> Tensor:
    counts = batch[1] != 0
    return F.cross_entropy(module(batch[0])[counts], batch[1][counts])


def smoothing(module: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(module(batch[0]).mT, batch[1], ignore_index=0, label_smoothing=0.1)


@pytest.mark.parametrize("loss", [ignoring, weighing, masking, choosing, smoothing])
def test_a_mean_over_the_samples_that_later_is_none_is_refused(loss: Any) -> None:
    """Full sequences, or one class alone, at first: nothing shows that entries are weighed by the batch."""
    torch.manual_seed(0)
    module, known = TiedLanguageModel().double(), {}
    words = torch.randint(1, VOCABULARY, (8, T))
    full = words if loss is not weighing else torch.full_like(words, 3)
    short = words.clone() if loss is not weighing else torch.arange(1, 9)[:, None].expand(8, T).clone()
    for i in range(8):
        short[i, T - i % 4 :] = 0
    with open_probe(module, [(words, full)], loss, structures=known) as probe:
        structure = probe.sample_structure()
        assert structure.untreated == {}
        found = probe.per_sample_gram()
    G = gradients_of(module, [(words, full)], loss)
    assert relative_error(found, G @ G.mT) < 1e-12
    with (
        open_probe(module, [(words, short)], loss, structures=known) as probe,
        pytest.raises(ValueError, match="not the mean over its samples"),
    ):
        probe.per_sample_gram()
    with pytest.raises(StructureChangedError, match="weighs rows otherwise"):
        GramRide(loss(module, (words, short)), structure, batch_size=8)


@pytest.mark.parametrize("loss", [ignoring, masking, choosing, smoothing])
def test_a_batch_of_another_size_or_with_the_last_token_of_each_sample_is_looked_at_once(loss: Any) -> None:
    torch.manual_seed(0)
    module, known = TiedLanguageModel().double(), {}
    evaluations: list[int] = []

    def counted(module: nn.Module, batch: Batch) -> Tensor:
        evaluations.append(1)
        return loss(module, batch) + module(batch[0])[torch.arange(len(batch[0])), batch[1][:, 0] % T].square().mean()

    for n in (8, 5):
        words = torch.randint(1, VOCABULARY, (n, T))
        evaluations.clear()
        with open_probe(module, [(words, words)], counted, structures=known) as probe:
            found = probe.per_sample_gram()
        count = len(evaluations)
        G = gradients_of(module, [(words, words)], counted)
        assert relative_error(found, G @ G.mT) < 1e-12
    assert count == 1


# ---- Operators


def test_the_operators_are_second_moment_and_covariance_over_all_batches() -> None:
    torch.manual_seed(0)
    module, batches = mlp(), [batch_of(n) for n in (4, 7, 1)]
    G = gradients_of(module, batches, loss_of)
    with open_probe(module, batches) as probe:
        gradients = probe.sample_gradients(None)
        fisher, covariance = EmpiricalFisher(gradients), GradientCovarianceOperator(gradients)
        assert relative_error(fisher.to_dense(), G.mT @ G / 12) < 1e-12
        assert relative_error(covariance.to_dense(), torch.cov(G.mT, correction=0)) < 1e-12
        few = GradientCovarianceOperator(probe.sample_gradients(6))
        assert relative_error(few.to_dense(), torch.cov(G[:6].mT, correction=0)) < 1e-12
        pairs = eigsh(covariance, 3, rtol=1e-8, generator=torch.Generator().manual_seed(0))
        total = trace(covariance, num_matvecs=covariance.shape[0], generator=torch.Generator().manual_seed(0))
        K = probe.per_sample_gram(None)
    centered_gram = K - K.mean(0) - K.mean(1, keepdim=True) + K.mean()
    of_gram = torch.linalg.eigvalsh(centered_gram / 12).flip(0)
    assert relative_error(pairs.values, of_gram[:3]) < 1e-10
    assert total.value == pytest.approx(of_gram.sum().item(), rel=1e-10)


def test_products_do_not_depend_on_whether_factors_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module, batches = mlp(), [batch_of(4) for _ in range(3)]
    evaluations: list[int] = []

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        evaluations.append(len(batch[1]))
        return loss_of(module, batch)

    products, passes = [], []
    W = torch.randn(sum(p.numel() for p in module.parameters()), 2, dtype=torch.float64)
    for free in (lambda left: 2**40, lambda left: left.pop()):
        left = [4**k for k in range(20)]  # less and less, by more than is left
        monkeypatch.setattr(engine, "free_bytes", lambda _, free=free, left=left: free(left))
        with open_probe(module, batches, loss) as probe:
            gradients = probe.sample_gradients()
            gradients.second_moment(W)
            before = len(evaluations)
            products.append(gradients.second_moment(W))
            passes.append(len(evaluations) - before)
    assert passes == [0, 3]
    torch.testing.assert_close(*products, rtol=0.0, atol=0.0)


# ---- Riding on a backward pass


@pytest.mark.parametrize("name", NAMES)
def test_a_ride_sees_what_the_probe_sees_and_leaves_the_gradient_alone(name: str) -> None:
    module, batch, loss = case(name)
    W = torch.randn(sum(p.numel() for p in module.parameters()), 2, dtype=torch.float64)
    with open_probe(module, [batch], loss) as probe:
        structure = probe.sample_structure()
        there = probe.sample_gram(4, by_parameter=True, directions=W)
    with twice_differentiable():
        plain = torch.autograd.grad(loss(module, batch), list(module.parameters()), allow_unused=True)
        value = loss(module, batch) * 8
        ride = GramRide(value, structure, batch_size=N, num_samples=4, by_parameter=True, directions=W)
        value.backward()
    found = ride.conclude(8.0)
    assert found is not None
    assert ride.reason is None
    assert ride.seconds > 0
    assert relative_error(found.gram, there.gram) < 1e-12
    assert found.along is not None
    assert there.along is not None
    assert relative_error(found.along, there.along) < 1e-12
    assert found.by_parameter is not None
    assert there.by_parameter is not None
    assert found.by_parameter.keys() == there.by_parameter.keys()
    for p, gradient in zip(module.parameters(), plain, strict=True):
        assert (p.grad is None) == (gradient is None)
        if p.grad is not None and gradient is not None:
            assert torch.equal(p.grad, 8 * gradient)


def test_a_ride_on_another_network_is_refused() -> None:
    batch = batch_of(6)
    with open_probe(mlp(), [batch]) as probe:
        structure = probe.sample_structure()
    other = nn.Linear(4, 3).double()
    with pytest.raises(StructureChangedError, match="other operations"):
        GramRide(loss_of(other, batch), structure, batch_size=6)


def test_what_goes_wrong_in_a_ride_ends_it_and_not_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    module, batch = mlp(), batch_of(6)
    with open_probe(module, [batch]) as probe:
        structure = probe.sample_structure()
    value = loss_of(module, batch)
    ride = GramRide(value, structure, batch_size=6)
    monkeypatch.setattr("spectral_callbacks.operators.watch.regrouped", lambda *_: 1 / 0)
    value.backward()
    assert all(p.grad is not None for p in module.parameters())
    assert ride.conclude(1.0) is None
    assert ride.reason == "ZeroDivisionError: division by zero"


def test_a_ride_that_is_called_off_sees_nothing_more() -> None:
    module, batch = mlp(), batch_of(6)
    with open_probe(module, [batch]) as probe:
        structure = probe.sample_structure()
    value = loss_of(module, batch)
    ride = GramRide(value, structure, batch_size=6)
    before = ride.seconds
    ride.remove()
    ride.remove()
    value.backward()
    assert ride.seconds == before


def ride_on(module: nn.Module, batch: Batch) -> tuple[Tensor, GramRide]:
    with open_probe(module, [batch]) as probe:
        structure = probe.sample_structure()
    value = loss_of(module, batch)
    return value, GramRide(value, structure, batch_size=len(batch[1]))


def test_a_pass_that_does_not_reach_all_parameters_has_no_gram_matrix() -> None:
    """Or none at all."""
    module: Any = mlp()
    for inputs in ([], [module[2].weight]):
        value, ride = ride_on(module, batch_of(6))
        if inputs:
            value.backward(inputs=inputs)
        assert ride.conclude(1.0) is None
        assert ride.reason == "no backward pass reached all operations that parameters are used in"


def test_what_a_ride_saw_may_be_asked_for_twice() -> None:
    value, ride = ride_on(mlp(), batch_of(6))
    value.backward()
    first, second = ride.conclude(2.0), ride.conclude(2.0)
    assert first is not None
    assert second is not None
    assert torch.equal(first.gram, second.gram)


def test_a_second_pass_through_the_graph_ends_a_ride() -> None:
    value, ride = ride_on(mlp(), batch_of(6))
    value.backward(retain_graph=True)
    value.backward()
    assert ride.conclude(1.0) is None
    assert ride.reason == "more than one backward pass ran through the graph of the loss"


def test_a_ride_that_is_forgotten_keeps_no_graph() -> None:
    """Hooks that held it would close a circle through the graph, which the garbage collector does not see."""
    value, ride = ride_on(mlp(), batch_of(6))
    gone = weakref.ref(ride)
    del ride
    assert gone() is None
    value.backward()


def test_layers_that_are_thawed_for_others_are_looked_at_anew() -> None:
    """The same operations in number and kind, on other parameters."""
    module: Any = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))).double()
    batch, known = batch_of(6), {}
    for frozen in (0, 1):
        for number, layer in enumerate(module):
            layer.requires_grad_(number != frozen)
        with open_probe(module, [batch], structures=known) as probe:
            structure = probe.sample_structure()
            assert structure.space.names == probe.space.names
        value = loss_of(module, batch)
        ride = GramRide(value, structure, batch_size=6)
        value.backward()
        found = ride.conclude(1.0)
        assert found is not None
        G = gradients_of(module, [batch], loss_of)
        assert relative_error(found.gram, G @ G.mT) < 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_the_rounding_of_autocast_is_no_disagreement(seed: int) -> None:
    """Of gradients that nearly cancel in the sum: an output layer's bias with as many samples of each class."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.LayerNorm(64), nn.Linear(64, 3))
    batch = torch.randn(16, 64), torch.arange(16) % 3

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = module(batch[0])
        return F.cross_entropy(z.float() / 100, batch[1])

    with open_probe(module, [batch], loss) as probe:
        assert probe.sample_structure().untreated == {}
        found = probe.per_sample_gram()
    G = gradients_of(module, [batch], loss)
    assert relative_error(found, G @ G.mT) < 0.01

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.demos.transformer import LightningTransformer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from spectral_callbacks.operators.layout import Layout
from spectral_callbacks.operators.paths import Path
from spectral_callbacks.operators.readers import reading_of
from spectral_callbacks.operators.uses import Uses, find_uses
from tests.operators import sample_oracle
from tests.operators.sample_models import (
    MODELS,
    VOCABULARY,
    E,
    Function,
    PositionalModel,
    T,
    TiedLanguageModel,
    attention,
)
from tests.operators.sample_oracle import Loss, by_uses, contributions, layouts, one_by_one

N = 6


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _square(module: nn.Module) -> Loss:
    """Compare each entry of the output with a target of its own, so that no gradient vanishes by symmetry."""

    def loss(*inputs: Tensor) -> Tensor:
        out = module(*inputs)
        return (out - torch.linspace(-1, 1, out[0].numel(), dtype=out.dtype).view(out[0].shape)).square().mean()

    return loss


def _words(module: nn.Module) -> Loss:
    return lambda x: F.cross_entropy(module(x).flatten(0, 1), x.roll(1, 1).flatten())


def _some_words() -> Tensor:
    return torch.randint(0, VOCABULARY, (N, T))


def _errors(
    loss: Loss, parameters: Sequence[Tensor], batch: Sequence[Tensor]
) -> tuple[dict[int, float], dict[int, str]]:
    """Return the largest error of a sample's gradient, for each parameter, relative to the largest entry of all."""
    factors, untreated = by_uses(loss, parameters, batch)
    expected = one_by_one(loss, parameters, batch)
    errors: dict[int, float] = {}
    for index, reference in enumerate(expected):
        if index in untreated:
            continue
        found = torch.zeros_like(reference)
        if index in factors:
            found = factors[index].combined(torch.eye(N, dtype=factors[index].gram().dtype)) * N
            flat = found.reshape(N, -1)
            torch.testing.assert_close(factors[index].gram() * N**2, flat @ flat.T, rtol=1e-11, atol=1e-13)
        assert found.shape == reference.shape
        errors[index] = float((found - reference).abs().max() / max(reference.abs().max(), 1e-300))
    return errors, untreated


def _assert_exact(loss: Loss, module: nn.Module, batch: Sequence[Tensor], tolerance: float = 1e-12) -> None:
    errors, untreated = _errors(loss, list(module.parameters()), batch)
    assert not untreated
    assert len(errors) == len(list(module.parameters()))
    assert max(errors.values()) <= tolerance, dict(zip(dict(module.named_parameters()), errors.values(), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_every_samples_gradient_is_that_of_the_sample_alone(name: str) -> None:
    build, shape = MODELS[name]
    module = build().double()
    _assert_exact(_square(module), module, [torch.randn(N, *shape, dtype=torch.float64)])


@pytest.mark.parametrize(
    "kind",
    ["embedding", "embedding, (1, T)", "embedding, (N, T)", "embedding, (T, N, E)", "embedding, scaled",
     "parameter", "parameter, a part of (T, E)"],
)  # fmt: skip
def test_positions_are_learned_by_all_samples(kind: str) -> None:
    module = PositionalModel(kind).double()
    _assert_exact(_words(module), module, [_some_words()])


@pytest.mark.parametrize("padding_idx", [None, 0, -1])
def test_a_weight_that_is_embedding_and_head_has_the_sum_of_both(padding_idx: int | None) -> None:
    module = TiedLanguageModel(padding_idx).double()
    _assert_exact(_words(module), module, [_some_words()])


def test_a_sparse_embedding_has_the_gradient_of_a_dense_one() -> None:
    module = nn.Sequential(nn.Embedding(VOCABULARY, E, sparse=True), nn.Linear(E, VOCABULARY)).double()
    _assert_exact(_words(module), module, [_some_words()])


def test_classes_that_are_added_to_sequences_are_no_positions() -> None:
    module = Function(
        lambda m, x, label: m.head(x + m.table(label)[:, None]), table=nn.Embedding(3, E), head=nn.Linear(E, 2)
    )
    module.double()
    _assert_exact(_square(module), module, [torch.randn(N, T, E).double(), torch.randint(0, 3, (N,))])


def test_the_transformer_of_lightning_is_treated() -> None:
    module = LightningTransformer(vocab_size=VOCABULARY).model.double().eval()

    def loss(x: Tensor) -> Tensor:
        return F.nll_loss(module(x, x), x.roll(1, 1).flatten())

    _assert_exact(loss, module, [_some_words()])


def test_under_autocast_the_parameters_own_precision_is_kept() -> None:
    module = nn.Sequential(nn.Linear(E, E), nn.LayerNorm(E), nn.Tanh(), attention(need_weights=False, batch_first=True))

    def loss(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = module(x)
        return (out.float() - 1).square().mean()

    errors, untreated = {}, {}
    parameters = list(module.parameters())
    batch = [torch.randn(N, T, E)]
    factors, untreated = by_uses(loss, parameters, batch)
    assert not untreated
    for index, reference in enumerate(one_by_one(loss, parameters, batch)):
        found = factors[index].combined(torch.eye(N)) * N
        assert found.dtype == torch.float32
        errors[index] = float((found - reference).norm() / reference.norm())
    assert max(errors.values()) < 0.03


@pytest.mark.parametrize(
    ("build", "shape", "names"),
    [
        (lambda: _First(nn.LSTM(E, 3, batch_first=True)), (T, E), {"MkldnnRnnLayerBackward0"}),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(E, 3)), (E,), {"WeightNormInterfaceBackward0"}),
        (lambda: nn.Bilinear(E, E, 2), (E,), {"TrilinearBackward0"}),
        (
            lambda: nn.BatchNorm1d(E),
            (E,),
            {"NativeBatchNormBackward0 in train mode, which couples the samples of a batch"},
        ),
        (
            lambda: Function(lambda m, x: x + F.layer_norm(m.p, (E,)), p=torch.randn(E)),
            (E,),
            {"NativeLayerNormBackward0"},
        ),
        (lambda: Function(lambda m, x: x @ m.w.exp(), w=torch.randn(E, 2)), (E,), {"ExpBackward0"}),
    ],
)  # fmt: skip
def test_an_operation_without_a_kernel_is_named(
    build: Callable[[], nn.Module], shape: tuple[int, ...], names: set[str]
) -> None:
    module = build()
    x = torch.randn(N, *shape)
    loss = _square(module)(*([x, x] if isinstance(module, nn.Bilinear) else [x]))
    found = find_uses(loss, list(module.parameters()))
    assert set(found.untreated.values()) == names
    assert not {use.parameter for use in found.uses} & set(found.untreated)


class _Saved:
    unpack_hook = None


class _Output:
    shape = (N, T, E)


class _Node:
    """What operations that other devices have show of themselves."""

    def __init__(self, name: str, **saved: object) -> None:
        self.name = lambda: name
        self._input_metadata = [_Output]
        vars(self).update({f"_saved_{key}": value for key, value in saved.items()})
        vars(self).update({f"_raw_saved_{key}": _Saved for key in saved})


@pytest.mark.parametrize("device", ["fused RMS norm of CUDA", "linear of MPS", "batch norm of cuDNN"])
def test_operations_of_other_devices_are_read_by_what_they_save(device: str) -> None:
    x, g = torch.randn(2, N, T, E).double()
    weight = torch.randn(E, E).double() if "linear" in device else torch.randn(T if "cuDNN" in device else E).double()
    weight.requires_grad_()
    mean, variance = torch.randn(T).double(), torch.rand(T).double()
    match device:
        case "fused RMS norm of CUDA":
            inverse = (x.square().mean(-1, keepdim=True) + 0.1).rsqrt()
            node, out = _Node("FusedRmsNormBackward0", input=x, result1=inverse), F.rms_norm(x, (E,), weight, 0.1)
        case "linear of MPS":
            node, out = _Node("LinearBackward0", input=x), F.linear(x, weight)
        case _:
            saved = {"input": x, "running_mean": mean, "running_var": variance, "epsilon": 0.1, "training": False}
            node, out = _Node("CudnnBatchNormBackward0", **saved), F.batch_norm(x, mean, variance, weight, eps=0.1)
    reading = reading_of(node, 1, Path(weight.shape))
    assert reading is not None
    seen = reading.contribution(g)
    factor = seen.build(*(t.unflatten(0, (N, -1)) for t in seen.tensors))
    for i, row in enumerate(factor.combined(torch.eye(N).double())):
        expected = torch.autograd.grad((out[i] * g[i]).sum(), weight, retain_graph=True)[0]
        torch.testing.assert_close(row, expected, rtol=1e-12, atol=1e-12)


def test_the_oracle_notices_a_wrong_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    build, shape = MODELS["linear, (T, N, E)"]
    module, batch = build().double(), [torch.randn(N, *shape).double()]
    _assert_exact(_square(module), module, batch)
    monkeypatch.setattr(sample_oracle, "layouts", lambda *_: [Layout(1, T)] * 4)
    with pytest.raises(AssertionError):
        _assert_exact(_square(module), module, batch)


def test_a_parameter_with_one_use_that_has_no_kernel_has_no_use_at_all() -> None:
    module = nn.Linear(E, 3)
    loss = _square(module)(torch.randn(N, E)) + 1e-2 * module.weight.square().sum()
    found = find_uses(loss, list(module.parameters()))
    assert found.untreated == {0: "PowBackward0"}
    assert [use.parameter for use in found.uses] == [1]


def test_a_parameter_that_is_added_to_the_loss_is_untreated() -> None:
    scale = nn.Parameter(torch.tensor(0.5))
    found = find_uses(torch.randn(N, E).square().mean() * 2 + 0.1 * scale, [scale])
    assert not found.uses
    assert "AddBackward0" in found.untreated[0]


def test_what_the_loss_does_not_depend_on_has_no_use_and_is_not_untreated() -> None:
    used, unused, frozen = nn.Linear(E, 1), nn.Linear(E, 1), nn.Linear(E, 1).requires_grad_(False)
    parameters = [p for module in (unused, frozen, used) for p in module.parameters()]
    found = find_uses(frozen(torch.randn(N, E)).mean() + used(torch.randn(N, E)).mean(), parameters)
    assert [use.parameter for use in found.uses] == [4, 5]
    assert found.untreated == {}
    assert find_uses(torch.tensor(1.0), parameters) == Uses((), {})


def test_scale_grad_by_freq_is_no_gradient_and_is_untreated() -> None:
    module = nn.Embedding(VOCABULARY, E, scale_grad_by_freq=True)
    found = find_uses(module(_some_words()).square().mean(), list(module.parameters()))
    assert found.untreated == {0: "EmbeddingBackward0 with scale_grad_by_freq=True"}


def test_coupled_samples_have_no_layout() -> None:
    layer, contrast = nn.Linear(E, 3).double(), nn.Linear(3, 3).double()

    def loss(x: Tensor) -> Tensor:
        z = torch.tanh(layer(x))
        return F.cross_entropy(contrast(z @ z.T @ z), torch.zeros(len(x), dtype=torch.long))

    assert set(layouts(loss, list(layer.parameters()), [torch.randn(N, E).double()])) == {None}


def test_the_signature_is_the_same_for_batches_of_every_size() -> None:
    module = PositionalModel("parameter")
    signatures = []
    for words in (_some_words(), _some_words(), _some_words()[:2, :3], _some_words()[:1]):
        uses = find_uses(_words(module)(words), list(module.parameters())).uses
        signatures.append(tuple(use.signature for use in uses))
        hash(signatures[-1])
    assert len(signatures[0]) == 4
    assert len(set(signatures)) == 1


def test_a_batch_of_one_sample_has_the_uses_of_a_larger_one() -> None:
    for name in ("class token", "layer scale", "conv2d", "instance norm 1d", "matrices by head, expanded"):
        build, shape = MODELS[name]
        module = build()
        one, many = (find_uses(_square(module)(torch.randn(n, *shape)), list(module.parameters())) for n in (1, N))
        assert [use.signature for use in one.uses] == [use.signature for use in many.uses], name


class _CountCalls(TorchDispatchMode):
    """Count the operations that run, and remember what is asked of the backward pass of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.masks: list[list[bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(func.overloadpacket.__name__)
        if func.overloadpacket.__name__ == "convolution_backward":
            self.masks.append(args[-1])
        return func(*args, **(kwargs or {}))


def _visited(loss: Tensor, uses: Uses, *, by_terminals: bool) -> list[Tensor]:
    """Return the gradient at each use: of a backward pass to the terminals, or to all parameters."""
    terminals = {edge.node: edge for edge in uses.terminals} if by_terminals else {}
    found: dict[int, Tensor] = {}
    handles = [
        use.node.register_prehook(lambda gradients, index=index: found.update({index: gradients[0]}))
        for index, use in enumerate(uses.uses)
        if use.node not in terminals
    ]
    if by_terminals:
        gradients = torch.autograd.grad(loss, list(terminals.values()), retain_graph=True)
        arrived = dict(zip(terminals, gradients, strict=True))
        found |= {index: arrived[use.node] for index, use in enumerate(uses.uses) if use.node in arrived}
    else:
        loss.backward(retain_graph=True)
    for handle in handles:
        handle.remove()
    return [found[index] for index in range(len(uses.uses))]


@pytest.mark.parametrize("name", MODELS)
def test_a_pass_to_the_terminals_brings_every_use_the_gradient_of_a_full_one(name: str) -> None:
    build, shape = MODELS[name]
    module = build().double()
    loss = _square(module)(torch.randn(N, *shape).double())
    uses = find_uses(loss, list(module.parameters()))
    part = _visited(loss, uses, by_terminals=True)
    assert all(p.grad is None for p in module.parameters())
    for index, (a, b) in enumerate(zip(part, _visited(loss, uses, by_terminals=False), strict=True)):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=str(index))
    for edge in uses.terminals:  # still holds what it saved
        for use in uses.uses:
            if use.node is edge.node:
                use.contribution(part[uses.uses.index(use)])


def test_a_pass_to_the_terminals_computes_no_gradient_of_a_weight() -> None:
    module = nn.Sequential(
        nn.Conv1d(4, 4, 3, padding=1), nn.Tanh(), nn.Conv1d(4, 4, 3, padding=1), nn.Flatten(),
        nn.Linear(4 * E, E), nn.Tanh(), nn.Linear(E, E), nn.Tanh(), nn.Linear(E, 1),
    )  # fmt: skip
    loss = _square(module)(torch.randn(N, 4, E))
    uses = find_uses(loss, list(module.parameters()))
    with _CountCalls() as part:
        _visited(loss, uses, by_terminals=True)
    with _CountCalls() as full:
        _visited(loss, uses, by_terminals=False)
    assert part.calls.count("mm") == 3
    assert full.calls.count("mm") == 6
    assert part.masks == [[True, False, False]]
    assert full.masks == [[True, True, True], [False, True, True]]


def test_a_part_of_the_uses_has_its_own_terminals() -> None:
    module = nn.Sequential(nn.Linear(E, E), nn.Tanh(), nn.Linear(E, E), nn.Tanh(), nn.Linear(E, 1))
    uses = find_uses(_square(module)(torch.randn(N, E)), list(module.parameters()))
    for parameter in range(0, 6, 2):
        part = uses.only([use for use in uses.uses if use.parameter >= parameter])
        assert [edge.node for edge in part.terminals] == [part.uses[0].node]


@pytest.mark.parametrize("early_stop", [True, False])
def test_recomputed_activations_are_left_alone(early_stop: bool) -> None:
    module = nn.Sequential(nn.Linear(E, E), nn.Tanh(), nn.Linear(E, E), nn.Tanh(), nn.Linear(E, 3))
    x = torch.randn(N, E)
    parameters = list(module.parameters())

    def inner(h: Tensor) -> Tensor:
        return module[3](module[2](module[1](h)))

    def loss() -> Tensor:
        with set_checkpoint_early_stop(early_stop):
            return module[4](checkpoint(inner, module[0](x), use_reentrant=False)).square().mean()

    expected = torch.autograd.grad(loss(), parameters)
    value = loss()
    uses = find_uses(value, parameters)
    assert set(uses.untreated) == {2}
    assert "AddmmBackward0 within activation checkpointing" in uses.untreated[2]
    seen = contributions(value, uses.uses)
    assert len(seen) == 5
    for p, g in zip(parameters, expected, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, g)


def test_a_graph_that_reentrant_checkpointing_hides_is_untreated() -> None:
    module = nn.Sequential(nn.Linear(E, E), nn.Tanh(), nn.Linear(E, 3))
    out = checkpoint(module[2], torch.tanh(module[0](torch.randn(N, E))), use_reentrant=True)
    found = find_uses(out.square().mean(), list(module.parameters()))
    assert not found.uses
    assert len(found.untreated) == 4
    assert "use_reentrant=False" in found.untreated[0]


def test_compiled_code_is_untreated_with_its_name() -> None:
    module = nn.Linear(E, 3)
    compiled = torch.compile(module, backend="aot_eager")
    found = find_uses(compiled(torch.randn(N, E)).square().mean(), list(module.parameters()))
    assert set(found.untreated.values()) == {"CompiledFunctionBackward"}


def test_no_saved_tensor_is_looked_at_before_its_time() -> None:
    module = nn.Sequential(nn.Embedding(VOCABULARY, E), nn.Linear(E, E), nn.LayerNorm(E), nn.Linear(E, VOCABULARY))
    looks: list[Tensor] = []

    def unpack(t: Tensor) -> Tensor:
        looks.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        loss = _words(module)(_some_words())
    found = find_uses(loss, list(module.parameters()))
    assert looks == []
    assert all("hooks on saved tensors" in reason for reason in found.untreated.values())
    assert {use.parameter for use in found.uses} == {2, 4, 6}  # what needs the gradient alone


def test_which_rows_were_taken_is_no_reason_to_look_at_what_hooks_hold() -> None:
    h = nn.Linear(E, 3)(torch.randn(N, E))
    order, is_there = torch.arange(N).roll(1), torch.arange(N) > 0
    seen: list[tuple[Hashable, ...]] = []

    def unpack(t: Tensor) -> Tensor:
        raise AssertionError

    for hooks in (contextlib.nullcontext(), saved_tensors_hooks(lambda t: t, unpack)):
        with hooks:
            picked = h[order].sum() + h[is_there].sum() + h.index_select(0, order).sum() + h.masked_select(h > 0).sum()
            loss = picked + F.cross_entropy(h, torch.zeros(N, dtype=torch.long).index_fill(0, order[:1], -100))
        seen.append(find_uses(loss, []).choices)
    assert len(seen[0]) == 5
    assert seen[1] == ()


class _First(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]

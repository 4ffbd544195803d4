"""The operation matrix: inside `twice_differentiable`, double backward differentiates the gradient of training."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from spectral_callbacks.probe.backends import explain, twice_differentiable

Loss = Callable[[], Tensor]
Model = tuple[Loss, list[Tensor]]
Context = Callable[[], contextlib.AbstractContextManager[None]]

STEP = 1e-4
FD_TOLERANCE = 1e-6
ROUNDING = 1e-10


@pytest.fixture(autouse=True)
def _float64_from_a_fixed_seed() -> Iterator[None]:
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


# ---- The checker


@dataclass(frozen=True)
class Defects:
    """Relative errors of double backward inside a context, against plain torch outside."""

    value: float
    gradient: float
    product: float
    asymmetry: float

    @property
    def exact(self) -> bool:
        return max(self.value, self.gradient, self.asymmetry) <= ROUNDING and self.product <= FD_TOLERANCE


def measure(model: Model, context: Context = twice_differentiable) -> Defects:
    """Compare with five-point differences of the gradients that `backward` leaves in `.grad`, as in training."""
    loss, parameters = model
    u, v = ([torch.randn_like(p) for p in parameters] for _ in range(2))
    with context():
        torch.manual_seed(0)
        value = loss()
        gradient = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)
        Hu, Hv = (_product(gradient, parameters, w) for w in (u, v))
    at = {k: _gradient_at(loss, parameters, v, k * STEP) for k in (-2, -1, 0, 1, 2)}
    truth = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * STEP)
    assert truth.norm() > 1e-2  # a vanishing Hessian would prove nothing
    torch.manual_seed(0)
    return Defects(
        value=_relative(value.detach(), loss().detach()),
        gradient=_relative(_flat(gradient, parameters), at[0]),
        product=_relative(Hv, truth),
        asymmetry=((_flat(u) @ Hv - _flat(v) @ Hu).abs() / (Hv.norm() * _flat(u).norm())).item(),
    )


def _product(gradient: Sequence[Tensor | None], parameters: Sequence[Tensor], v: Sequence[Tensor]) -> Tensor:
    pairs = [(g, w) for g, w in zip(gradient, v, strict=True) if g is not None and g.requires_grad]
    outputs, weights = zip(*pairs, strict=True)
    return _flat(torch.autograd.grad(outputs, parameters, weights, retain_graph=True, allow_unused=True), parameters)


def _gradient_at(loss: Loss, parameters: Sequence[Tensor], v: Sequence[Tensor], step: float) -> Tensor:
    origin = [p.detach().clone() for p in parameters]
    for p, w in zip(parameters, v, strict=True):
        p.data.add_(w, alpha=step)
    torch.manual_seed(0)
    loss().backward()
    gradient = _flat([p.grad for p in parameters], parameters)
    for p, x in zip(parameters, origin, strict=True):
        p.data.copy_(x)
        p.grad = None
    return gradient


def _flat(tensors: Sequence[Tensor | None], like: Sequence[Tensor] = ()) -> Tensor:
    dense = [torch.zeros_like(like[i]) if t is None else t.detach() for i, t in enumerate(tensors)]
    return torch.cat([(t.to_dense() if t.is_sparse else t).reshape(-1) for t in dense])


def _relative(x: Tensor, truth: Tensor) -> float:
    return ((x - truth).norm() / truth.norm()).item()


# ---- The models


def smooth(y: Tensor) -> Tensor:
    """A scalar with a Hessian of full rank in y."""
    return (y.sin() * torch.linspace(0.5, 1.5, y.numel()).reshape(y.shape)).sum()


def of_module(module: nn.Module, *inputs: Tensor, **options: Any) -> Model:
    def loss() -> Tensor:
        output = module(*inputs, **options)
        return smooth(output if isinstance(output, Tensor) else output[0])

    return loss, list(module.parameters())


def of_function(function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Model:
    parameters: list[Tensor] = [torch.randn(shape, requires_grad=True) for shape in shapes]
    return lambda: smooth(function(*parameters)), parameters


def of_criterion(function: Callable[[Tensor], Tensor]) -> Model:
    return of_module(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), Apply(function)), torch.randn(5, 3))


class Apply(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def attention(**options: Any) -> Model:
    return of_function(lambda *qkv: F.scaled_dot_product_attention(*qkv, **options), *[(1, 2, 3, 4)] * 3)


def inner_kernel(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*inputs: Tensor) -> Tensor:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            return function(*inputs)

    return call


def multihead(need_weights: bool) -> Model:
    x = torch.randn(2, 3, 4)
    return of_module(nn.MultiheadAttention(4, 2, batch_first=True), x, x, x, need_weights=need_weights)


def multihead_inner_kernel() -> Model:
    module = nn.MultiheadAttention(4, 2, batch_first=True)
    run = inner_kernel(lambda x: module(x, x, x, need_weights=False)[0])
    x = torch.randn(2, 3, 4)
    return lambda: smooth(run(x)), list(module.parameters())


def encoder(training: bool, **options: Any) -> Model:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.2, activation="gelu", batch_first=True, **options)
    module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options).train(training)
    padding = torch.tensor([[False, False, False], [False, False, True]])
    return of_module(module, torch.randn(2, 3, 4), src_key_padding_mask=padding)


def decoder() -> Model:
    layer = nn.TransformerDecoderLayer(4, 2, 6, dropout=0.0, activation="gelu", batch_first=True)
    return of_module(layer, torch.randn(2, 3, 4), torch.randn(2, 5, 4))


def recurrent(kind: Callable[..., nn.Module], **options: Any) -> Model:
    return of_module(kind(3, 4, **options), torch.randn(5, 2, 3))


def packed_lstm() -> Model:
    module = nn.LSTM(3, 4)
    x = nn.utils.rnn.pack_padded_sequence(torch.randn(5, 2, 3), torch.tensor([5, 3]))
    return lambda: smooth(module(x)[0].data), list(module.parameters())


def between(norm: nn.Module, *, conv: bool = False) -> Model:
    first = nn.Conv1d(2, 4, 3, padding=1) if conv else nn.Linear(3, 4)
    last = nn.Conv1d(4, 1, 3) if conv else nn.Linear(4, 2)
    for p in norm.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    return of_module(nn.Sequential(first, norm, nn.Tanh(), last), torch.randn(*((3, 2, 6) if conv else (5, 3))))


def batchnorm_eval() -> Model:
    norm = nn.BatchNorm1d(4)
    norm(torch.randn(8, 4) + 0.5)
    return between(norm.eval())


def bias_only(norm: Callable[..., Tensor]) -> Model:
    return of_function(norm, (3, 4, 5), (5,))


def weight_normed(parametrize: Callable[..., nn.Module], dim: int | None) -> Model:
    first, last = (parametrize(layer, dim=dim) for layer in (nn.Linear(3, 4), nn.Linear(4, 2)))
    return of_module(nn.Sequential(first, nn.Tanh(), last), torch.randn(5, 3))


def spectral_normed() -> Model:
    layer = parametrizations.spectral_norm(nn.Linear(3, 4))
    return of_module(nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 2)).eval(), torch.randn(5, 3))


def embedding(**options: Any) -> Model:
    module = nn.Sequential(nn.Embedding(5, 4, **options), nn.Tanh(), nn.Linear(4, 2))
    return of_module(module, torch.tensor([[1, 2, 2], [4, 0, 3]]))


BAGS = (torch.tensor([1, 2, 2, 4, 0, 3, 3]), torch.tensor([0, 2, 2, 5]))  # the second bag is empty
CSR_BAGS = (BAGS[0], torch.tensor([0, 2, 2, 5, 7]))


def bag(*inputs: Tensor, **options: Any) -> Model:
    module = nn.EmbeddingBag(5, 3, **options)
    head = nn.Linear(3, 2)
    return lambda: smooth(head(module(*inputs).tanh())), [*module.parameters(), *head.parameters()]


def weighted_bag(*inputs: Tensor, **options: Any) -> Model:
    tokens, *offsets = inputs
    run: Callable[..., Tensor] = functools.partial(F.embedding_bag, tokens, mode="sum", **options)
    return of_function(lambda w, s: run(w, *offsets, per_sample_weights=s), (5, 3), tuple(tokens.shape))


def distance(p: float, rows: int = 4, **options: Any) -> Model:
    return of_function(lambda a, b: torch.cdist(a, b, p, **options), (2, rows, 3), (3, 3))


def self_distance(p: float) -> Model:
    return of_function(lambda a: torch.cdist(a, a, p), (4, 3))


def checkpointed(use_reentrant: bool) -> Model:
    """A block with everything at once: attention, dropout, weight norm."""
    first = nn.Linear(4, 8)
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.2, activation="gelu", batch_first=True)
    block = nn.Sequential(layer, parametrizations.weight_norm(nn.Linear(8, 2)))
    x = torch.randn(2, 3, 4)

    def loss() -> Tensor:
        output = checkpoint(block, first(x), use_reentrant=use_reentrant)
        assert isinstance(output, Tensor)
        return smooth(output)

    return loss, [*first.parameters(), *block.parameters()]


def plain_net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def compiled(inplace: bool) -> Model:
    class Net(nn.Sequential):  # a subclass, because Sequential itself is never compiled by .compile()
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)

    module: nn.Module = Net(*plain_net().children())
    if inplace:
        module.compile(backend="aot_eager")
        return of_module(module, torch.randn(5, 3))
    run, x = torch.compile(module, backend="aot_eager"), torch.randn(5, 3)
    return lambda: smooth(run(x)), list(module.parameters())


def tied() -> Model:
    table = nn.Embedding(5, 4)
    tokens = torch.tensor([0, 1, 4, 3])
    return lambda: F.cross_entropy(table(tokens).tanh() @ table.weight.T, tokens.roll(-1)), [table.weight]


CLASSES = torch.tensor([0, 3, 1, 1, 2])
PROBABILITIES = torch.linspace(-1, 2, 20, dtype=torch.float64).reshape(5, 4).softmax(-1)
SIGNS = (PROBABILITIES > 0.25) * 2.0 - 1
MASK = torch.tensor([[True, False, False], [True, True, False], [True, True, True]])

MODELS: dict[str, Callable[[], Model]] = {
    "sdpa": attention,
    "sdpa-causal": lambda: attention(is_causal=True),
    "sdpa-bool-mask": lambda: attention(attn_mask=MASK),
    "sdpa-float-mask": lambda: attention(attn_mask=torch.linspace(-1, 1, 9).reshape(3, 3), scale=0.3),
    "sdpa-dropout": lambda: attention(dropout_p=0.3),
    "sdpa-gqa": lambda: of_function(
        lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True), (1, 4, 3, 4), (1, 2, 3, 4)
    ),
    "sdpa-inner-kernel": lambda: of_function(
        inner_kernel(lambda q: F.scaled_dot_product_attention(q, q, q)), (1, 2, 3, 4)
    ),
    "sdpa-aten": lambda: of_function(
        lambda q: torch.ops.aten.scaled_dot_product_attention(q, q, q), (1, 2, 3, 4)
    ),  # hidden from modes, as in TorchScript
    "multihead-weights": lambda: multihead(need_weights=True),
    "multihead": lambda: multihead(need_weights=False),
    "multihead-inner-kernel": multihead_inner_kernel,
    "encoder-train": lambda: encoder(True),
    "encoder-eval": lambda: encoder(False),
    "encoder-norm-first": lambda: encoder(True, norm_first=True),
    "decoder": decoder,
    "lstm": lambda: recurrent(nn.LSTM),
    "lstm-bidirectional-projected": lambda: recurrent(nn.LSTM, bidirectional=True, proj_size=2),
    "lstm-dropout": lambda: recurrent(nn.LSTM, num_layers=2, dropout=0.3),
    "lstm-packed": packed_lstm,
    "gru": lambda: recurrent(nn.GRU),
    "rnn-tanh": lambda: recurrent(nn.RNN),
    "rnn-relu": lambda: recurrent(nn.RNN, nonlinearity="relu"),
    "conv2d": lambda: of_module(
        nn.Sequential(nn.Conv2d(1, 2, 2), nn.GELU(), nn.Conv2d(2, 1, 2)), torch.randn(2, 1, 4, 4)
    ),
    "batchnorm-train": lambda: between(nn.BatchNorm1d(4)),
    "batchnorm-eval": batchnorm_eval,
    "layernorm": lambda: between(nn.LayerNorm(4)),
    "layernorm-no-bias": lambda: between(nn.LayerNorm(4, bias=False)),
    "layernorm-plain": lambda: between(nn.LayerNorm(4, elementwise_affine=False)),
    "layernorm-bias-only": lambda: bias_only(lambda x, b: F.layer_norm(x, (5,), None, b)),
    "batchnorm-bias-only": lambda: bias_only(lambda x, b: F.batch_norm(x.mT, None, None, None, b, True)),
    "instancenorm-bias-only": lambda: bias_only(lambda x, b: F.instance_norm(x.mT, bias=b)),
    "groupnorm": lambda: between(nn.GroupNorm(2, 4), conv=True),
    "rmsnorm": lambda: between(nn.RMSNorm(4)),
    "instancenorm": lambda: between(nn.InstanceNorm1d(4, affine=True), conv=True),
    "localresponsenorm": lambda: between(nn.LocalResponseNorm(2), conv=True),
    "weightnorm-0": lambda: weight_normed(parametrizations.weight_norm, 0),
    "weightnorm-1": lambda: weight_normed(parametrizations.weight_norm, 1),
    "weightnorm-all": lambda: weight_normed(parametrizations.weight_norm, None),
    "weightnorm-hook-0": lambda: weight_normed(nn.utils.weight_norm, 0),
    "weightnorm-hook-1": lambda: weight_normed(nn.utils.weight_norm, 1),
    "spectralnorm-eval": spectral_normed,
    "embedding": embedding,
    "embedding-sparse": lambda: embedding(sparse=True),
    **{
        f"bag-{mode}-{name}": functools.partial(bag, *inputs, mode=mode, **options)
        for mode in ("sum", "mean", "max")
        for name, (inputs, options) in {
            "matrix": ((BAGS[0][:6].reshape(2, 3),), {}),
            "offsets": (BAGS, {}),
            "csr": (CSR_BAGS, {"include_last_offset": True}),
            "padding": (BAGS, {"padding_idx": 2}),
            "csr-padding": (CSR_BAGS, {"include_last_offset": True, "padding_idx": -2}),
        }.items()
    },
    "bag-sparse": lambda: bag(*BAGS, mode="mean", sparse=True),
    "bag-int32": lambda: bag(*(x.int() for x in BAGS), mode="mean"),
    "bag-weighted": lambda: weighted_bag(*BAGS, padding_idx=2),
    "bag-weighted-matrix": lambda: weighted_bag(BAGS[0][:6].reshape(2, 3)),
    "cdist": lambda: distance(2.0),
    "cdist-large": lambda: distance(2.0, rows=30),
    "cdist-mm": lambda: distance(2.0, compute_mode="use_mm_for_euclid_dist"),
    **{f"cdist-{p}": functools.partial(distance, p) for p in (1.0, 1.5, 3.0, math.inf)},
    **{f"cdist-self-{p}": functools.partial(self_distance, p) for p in (1.0, 1.5, 2.0, 3.0, math.inf)},
    "pdist": lambda: of_function(F.pdist, (4, 3)),
    "pdist-3": lambda: of_function(lambda x: F.pdist(x, 3.0), (4, 3)),
    "checkpoint": lambda: checkpointed(use_reentrant=False),
    "checkpoint-reentrant": lambda: checkpointed(use_reentrant=True),
    "compile": lambda: compiled(inplace=False),
    "compile-in-place": lambda: compiled(inplace=True),
    "weight-tying": tied,
    "dropout": lambda: of_module(nn.Sequential(plain_net(), nn.Dropout(0.3)), torch.randn(5, 3)),
    "max-pool": lambda: of_function(lambda x: F.max_pool2d(x, 2), (1, 2, 4, 4)),
    "interpolate": lambda: of_function(lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), (1, 1, 3, 3)),
    "grid-sample": lambda: of_function(
        lambda x, g: F.grid_sample(x, 0.8 * g.tanh(), align_corners=False), (1, 1, 4, 4), (1, 2, 2, 2)
    ),
    "cross-entropy-smoothed": lambda: of_criterion(
        lambda y: F.cross_entropy(y, CLASSES, label_smoothing=0.1, weight=torch.tensor([1.0, 2.0, 0.5, 1.5]))
    ),
    "cross-entropy-probabilities": lambda: of_criterion(lambda y: F.cross_entropy(y, PROBABILITIES)),
    "bce": lambda: of_criterion(lambda y: F.binary_cross_entropy(y.sigmoid(), PROBABILITIES)),
    "bce-logits": lambda: of_criterion(lambda y: F.binary_cross_entropy_with_logits(y, PROBABILITIES)),
    "huber": lambda: of_criterion(lambda y: F.huber_loss(y, PROBABILITIES, delta=0.5)),
    "smooth-l1": lambda: of_criterion(lambda y: F.smooth_l1_loss(y, PROBABILITIES, beta=0.5)),
    "kl": lambda: of_criterion(lambda y: F.kl_div(y.log_softmax(-1), PROBABILITIES, reduction="batchmean")),
    "gaussian-nll": lambda: of_criterion(lambda y: F.gaussian_nll_loss(y, PROBABILITIES, y.exp())),
    "poisson-nll": lambda: of_criterion(lambda y: F.poisson_nll_loss(y, PROBABILITIES)),
    "soft-margin": lambda: of_criterion(lambda y: F.soft_margin_loss(y, SIGNS)),
}

WRONG_OUTSIDE = ("weightnorm-0", "weightnorm-1", "weightnorm-hook-0", "weightnorm-hook-1")
RAISES_OUTSIDE = (
    "sdpa",
    "sdpa-causal",
    "sdpa-bool-mask",
    "sdpa-inner-kernel",
    "sdpa-aten",
    "multihead",
    "multihead-inner-kernel",
    "encoder-eval",
    "decoder",
    "layernorm-bias-only",
    "batchnorm-bias-only",
    "instancenorm-bias-only",
    "bag-sum-matrix",
    "bag-mean-offsets",
    "bag-max-offsets",
    "bag-weighted",
    "cdist",
    "cdist-1.0",
    "cdist-inf",
    "pdist",
    "checkpoint-reentrant",
    "compile",
    "compile-in-place",
)


# ---- Laws


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_double_backward_differentiates_the_gradient_of_training(name: str) -> None:
    defects = measure(MODELS[name]())
    assert defects.exact, defects


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("name", WRONG_OUTSIDE)
def test_outside_the_same_product_is_silently_wrong(name: str) -> None:
    assert measure(MODELS[name](), contextlib.nullcontext).product > 0.01


@pytest.mark.parametrize("name", RAISES_OUTSIDE)
def test_outside_the_same_product_raises(name: str) -> None:
    with pytest.raises(RuntimeError):
        measure(MODELS[name](), contextlib.nullcontext)


class _Cube(torch.autograd.Function):
    """x³ whose second derivative is lost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] * 3 * x.detach() ** 2


class _Product(torch.autograd.Function):
    """x y with only one of the two mixed derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return gradients[0] * y.detach(), gradients[0] * x


def test_the_checker_sees_a_lost_second_derivative() -> None:
    defects = measure(of_function(_Cube.apply, (5,)))
    assert defects.gradient <= ROUNDING
    assert defects.product > 0.01
    assert not defects.exact


def test_the_checker_sees_an_asymmetric_second_derivative() -> None:
    defects = measure(of_function(_Product.apply, (5,), (5,)))
    assert defects.asymmetry > 0.01
    assert not defects.exact


def test_the_checker_sees_another_function() -> None:
    @contextlib.contextmanager
    def doubled() -> Iterator[None]:
        with torch.no_grad():
            scale.mul_(2)
        yield
        with torch.no_grad():
            scale.div_(2)

    scale = torch.ones(())
    defects = measure(of_function(lambda x: scale * x, (5,)), doubled)
    assert min(defects.value, defects.gradient) > 0.1


# ---- Single operations


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, math.inf])
def test_a_zero_distance_contributes_nothing(p: float) -> None:
    a, b = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
    b[1] = a[2].detach()
    b[3, 0] = a[0, 0].detach()  # a zero component of a distance that is not zero
    apart = torch.ones(4, 5).index_put((torch.tensor(2), torch.tensor(1)), torch.zeros(()))
    v = torch.randn_like(a)
    if p == 1.5:
        v[0, 0] = 0  # along it the curvature is infinite
    products = []
    for weights in (torch.ones(4, 5), apart):
        with twice_differentiable():
            loss = (weights * torch.cdist(a, b, p).expm1()).sum()
            (gradient,) = torch.autograd.grad(loss, a, create_graph=True)
            products.append(torch.autograd.grad(gradient, a, v)[0])
    (plain,) = torch.autograd.grad(torch.cdist(a, b, p).expm1().sum(), a)
    torch.testing.assert_close(gradient, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(products[0], products[1], rtol=0, atol=0)
    assert products[0].isfinite().all()


def test_distances_of_a_set_to_itself_are_exact_in_float32() -> None:
    x = torch.randn(40, 8)  # from 26 points on, torch takes matrix products: d(x, x) is then 1e-3
    v = torch.randn_like(x)
    products = []
    for dtype in (torch.float32, torch.float64):
        y = x.to(dtype).requires_grad_()
        with twice_differentiable():
            (gradient,) = torch.autograd.grad(torch.cdist(y, y).mean(), y, create_graph=True)
            products.append(torch.autograd.grad(gradient, y, v.to(dtype))[0].double())
    assert _relative(products[0], products[1]) < 1e-5


def test_counting_distances_have_no_derivative() -> None:
    a = torch.randn(3, 2, requires_grad=True)
    with twice_differentiable():
        counts = torch.cdist(a, a, 0.0)
    assert counts.tolist() == torch.cdist(a, a, 0.0).tolist()
    assert not counts.requires_grad


def test_batched_products_equal_single_ones() -> None:
    a, b = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    V = torch.randn(3, 4, 3)
    with twice_differentiable():
        (gradient,) = torch.autograd.grad(smooth(torch.cdist(a, b)), a, create_graph=True)
        (block,) = torch.autograd.grad(gradient, a, V, retain_graph=True, is_grads_batched=True)
        single = torch.stack([torch.autograd.grad(gradient, a, v, retain_graph=True)[0] for v in V])
    torch.testing.assert_close(block, single, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bag_renormalizes_as_torch_does(mode: str) -> None:
    weights, outputs = [], []
    for context in (twice_differentiable, contextlib.nullcontext):
        torch.manual_seed(1)
        module = nn.EmbeddingBag(5, 3, max_norm=1.0, mode=mode)
        with context():
            outputs.append(module(*BAGS))
        weights.append(module.weight.detach())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)
    assert torch.equal(*weights)


def test_embedding_bag_refuses_gradients_scaled_by_frequency() -> None:
    weight = torch.randn(5, 3, requires_grad=True)
    plain = F.embedding_bag(BAGS[0], weight, BAGS[1], scale_grad_by_freq=True)
    with twice_differentiable():
        inside = F.embedding_bag(BAGS[0], weight, BAGS[1], scale_grad_by_freq=True)
        assert torch.equal(inside, plain)
        (gradient,) = torch.autograd.grad(smooth(inside), weight, create_graph=True)
        assert torch.equal(gradient, torch.autograd.grad(smooth(plain), weight)[0])
        with pytest.raises(RuntimeError) as raised:
            torch.autograd.grad(gradient.sum(), weight)
    assert "scale_grad_by_freq" in str(explain(raised.value))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_float32_recurrent_kernels_agree_with_float64(kind: Callable[..., nn.Module]) -> None:
    module = kind(3, 4)
    x = torch.randn(5, 2, 3)
    v = [torch.randn_like(p) for p in module.parameters()]
    products = []
    for dtype in (torch.float64, torch.float32):
        parameters = list(module.to(dtype).parameters())
        with twice_differentiable():
            loss = module(x.to(dtype))[0].sin().sum()
            gradient = torch.autograd.grad(loss, parameters, create_graph=True)
            product = torch.autograd.grad(gradient, parameters, [w.to(dtype) for w in v])
        products.append(_flat([h.double() for h in product]))
    assert _relative(products[1], products[0]) < 1e-5


class Recorder(TorchFunctionMode):
    """Sees what is called after substitution, and whether cuDNN may be used there."""

    def __init__(self) -> None:
        super().__init__()
        self.cudnn: dict[str, bool] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.cudnn[getattr(func, "__name__", "")] = torch.backends.cudnn.enabled
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("operation", "module"),
    [
        ("lstm", nn.LSTM(3, 4)),
        ("gru", nn.GRU(3, 4)),
        ("rnn_tanh", nn.RNN(3, 4)),
        ("rnn_relu", nn.RNN(3, 4, nonlinearity="relu")),
    ],
)
def test_cudnn_is_off_for_recurrent_nets_only(operation: str, module: nn.Module) -> None:
    enabled = torch.backends.cudnn.enabled
    with Recorder() as recorder, twice_differentiable():
        x = torch.randn(5, 2, 3)
        module.double()(x)
        x.exp()
    assert enabled
    assert recorder.cudnn[operation] is False
    assert recorder.cudnn["exp"] is True


def test_frozen_encoders_stay_off_the_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 6, activation="gelu", batch_first=True)
    module = nn.TransformerEncoder(layer, 1).eval().requires_grad_(False)
    attend = nn.MultiheadAttention(4, 2, batch_first=True).eval().requires_grad_(False)
    x = torch.randn(2, 3, 4)
    with Recorder() as recorder, twice_differentiable():
        module(x)
        attend(x, x, x)
    assert {"multi_head_attention_forward"} <= recorder.cudnn.keys()
    assert not {"_transformer_encoder_layer_fwd", "_native_multi_head_attention"} & recorder.cudnn.keys()


# ---- Checkpoints


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_run_their_function_once(use_reentrant: bool) -> None:
    calls = 0

    def function(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return F.dropout(x.sin(), 0.5)

    x = torch.randn(20, requires_grad=True)
    torch.manual_seed(2)
    with twice_differentiable():
        y = checkpoint(function, x, use_reentrant=use_reentrant)
        assert isinstance(y, Tensor)
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        torch.autograd.grad(gradient.sum(), x)
        after = torch.rand(())
    assert calls == 1
    torch.manual_seed(2)
    assert torch.equal(y, F.dropout(x.sin(), 0.5))
    assert torch.equal(after, torch.rand(()))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_a_reentrant_checkpoint_that_training_cannot_enter_has_no_curvature() -> None:
    layer, head = nn.Linear(3, 4), nn.Linear(4, 2)
    x = torch.randn(5, 3)

    def loss() -> Tensor:
        hidden = checkpoint(layer, x, use_reentrant=True)
        assert isinstance(hidden, Tensor)
        return smooth(head(hidden.tanh()))

    loss().backward()
    assert layer.weight.grad is None
    with twice_differentiable():
        gradients = torch.autograd.grad(loss(), [layer.weight, head.weight], allow_unused=True)
    assert gradients[0] is None
    assert gradients[1] is not None


def test_the_forward_context_of_a_checkpoint_is_entered() -> None:
    entered: list[str] = []

    @contextlib.contextmanager
    def noting(name: str) -> Iterator[None]:
        entered.append(name)
        yield

    x = torch.randn(3, requires_grad=True)
    with twice_differentiable():
        y = checkpoint(
            torch.sin, x, use_reentrant=False, context_fn=lambda: (noting("forward"), noting("recomputation"))
        )
        assert isinstance(y, Tensor)
        torch.autograd.grad(y.sum(), x)
    assert entered == ["forward"]


# ---- Settings


def settings() -> dict[str, Any]:
    cuda = torch.backends.cuda
    return {
        "attention": (
            cuda.flash_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(),
            cuda.math_sdp_enabled(),
            cuda.cudnn_sdp_enabled(),
            torch._C._get_overrideable_sdp_enabled(),
        ),
        "priority": torch._C._get_sdp_priority_order(),
        "stance": torch._dynamo.eval_frame._stance,
        "reentrant checkpoint": vars(CheckpointFunction).get("apply"),
        "checkpoint": sys.modules[checkpoint.__module__].__dict__["_checkpoint_without_reentrant_generator"],
        "once differentiable": torch.autograd.function.BackwardCFunction.apply,
        "modes": torch.overrides._get_current_function_mode_stack(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "cudnn": (
            torch.backends.cudnn.enabled,
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.allow_tf32,
        ),
    }


def test_settings_differ_inside() -> None:
    before = settings()
    with twice_differentiable():
        inside = settings()
    unchanged = {key for key in before if before[key] == inside[key]}
    assert unchanged == {"priority", "fast path", "cudnn"}


@pytest.mark.parametrize("stance", ["default", "eager_on_recompile"])
@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_settings_are_restored_on_exit_and_on_exceptions(stance: str, backend: SDPBackend) -> None:
    untouched = settings()
    with sdpa_kernel([backend, SDPBackend.EFFICIENT_ATTENTION], set_priority=True), torch.compiler.set_stance(stance):
        before = settings()
        with twice_differentiable():
            pass
        assert settings() == before
        for _ in range(2):
            with pytest.raises(ZeroDivisionError), twice_differentiable():
                raise ZeroDivisionError
            assert settings() == before
    assert {**settings(), "priority": None} == {**untouched, "priority": None}  # sdpa_kernel itself leaves its priority


def test_the_context_nests() -> None:
    before = settings()
    with twice_differentiable():
        outer = settings()
        with pytest.raises(ZeroDivisionError), twice_differentiable():
            raise ZeroDivisionError
        assert settings() == outer
    assert settings() == before

    @contextlib.contextmanager
    def twice() -> Iterator[None]:
        with twice_differentiable(), twice_differentiable():
            yield

    for name in ("sdpa", "weightnorm-1", "cdist", "bag-mean-offsets", "checkpoint-reentrant", "layernorm-bias-only"):
        assert measure(MODELS[name](), twice).exact


@pytest.mark.parametrize(
    "call",
    [
        lambda: nn.LSTM(3, 4)(torch.randn(5, 2, 7)),
        lambda: F.scaled_dot_product_attention(torch.randn(2, 3), torch.randn(2, 4), torch.randn(3)),
        lambda: checkpoint(torch.linalg.cholesky, -torch.eye(2).requires_grad_(), use_reentrant=True),
        lambda: checkpoint(torch.linalg.cholesky, -torch.eye(2).requires_grad_(), use_reentrant=False),
    ],
    ids=["recurrent", "attention", "checkpoint-reentrant", "checkpoint"],
)
def test_settings_survive_an_operation_that_fails(call: Callable[[], Any]) -> None:
    before = settings()
    with twice_differentiable():
        inside = settings()
        with pytest.raises((RuntimeError, ValueError)):
            call()
        assert settings() == inside
    assert settings() == before


def test_compiled_code_is_neither_run_nor_compiled_again() -> None:
    events: list[str] = []

    def backend(graph: Callable[..., Any], inputs: Any) -> Callable[..., Any]:
        events.append("compile")

        def run(*args: Any) -> Any:
            events.append("run")
            return graph(*args)

        return run

    function = torch.compile(lambda x: x.sin(), backend=backend)
    x = torch.randn(3)
    function(x)
    with twice_differentiable():
        function(x)
        function(torch.randn(3, 2))
    function(x)
    assert events == ["compile", "run", "run"]


# ---- Explanations


def _error(model: Model) -> Exception:
    with pytest.raises(RuntimeError) as raised:
        measure(model, contextlib.nullcontext)
    return raised.value


def _ctc() -> Model:
    lengths = torch.tensor([5]), torch.tensor([2])
    return of_function(lambda x: F.ctc_loss(x.log_softmax(-1), torch.tensor([[1, 2]]), *lengths), (5, 1, 4))


@pytest.mark.parametrize(
    ("model", "name", "remedy"),
    [
        (_ctc, "ctc_loss", "loss="),
        (lambda: of_criterion(lambda y: F.multi_margin_loss(y, CLASSES)), "multi_margin_loss", "loss="),
        (MODELS["sdpa"], "scaled_dot_product_flash_attention_for_cpu", "twice_differentiable()"),
        (MODELS["bag-sum-matrix"], "embedding_bag", "twice_differentiable()"),
        (MODELS["bag-weighted"], "embedding_bag_per_sample_weights", "twice_differentiable()"),
        (MODELS["cdist"], "cdist", "twice_differentiable()"),
        (MODELS["pdist"], "pdist", "twice_differentiable()"),
        (MODELS["compile"], "torch.compile", "twice_differentiable()"),
    ],
)
def test_a_missing_derivative_is_explained(model: Callable[[], Model], name: str, remedy: str) -> None:
    sentence = explain(_error(model()))
    assert sentence is not None
    assert f" {name}" in f" {sentence}".replace(",", " ")
    assert remedy in sentence


def test_the_error_of_cudnn_is_explained() -> None:
    error = NotImplementedError(
        "the derivative for '_cudnn_rnn_backward' is not implemented. Double backwards is not supported for CuDNN RNNs"
    )
    assert "no second derivative for cudnn_rnn, " in str(explain(error))


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.exp()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradients[0]


def test_once_differentiable_functions_raise_and_are_explained() -> None:
    with pytest.raises(RuntimeError) as raised:
        measure(of_function(_Once.apply, (3,)))
    assert "@once_differentiable" in str(explain(raised.value))


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError(), KeyError(0)]
)
def test_other_errors_are_left_alone(error: Exception) -> None:
    assert explain(error) is None


# ---- CUDA


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "name", ["sdpa", "multihead", "encoder-eval", "lstm", "gru", "rnn-tanh", "cdist", "weightnorm-1"]
)
def test_products_on_cuda_equal_those_on_the_cpu(name: str) -> None:
    products = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        with torch.device(device), twice_differentiable():
            loss, parameters = MODELS[name]()
            for p in parameters:
                p.data = torch.linspace(-1, 1, p.numel()).reshape(p.shape)
            gradient = torch.autograd.grad(loss(), parameters, create_graph=True)
            products.append(_product(gradient, parameters, [p.detach().cos() for p in parameters]).cpu())
    assert _relative(products[1], products[0]) < 1e-8

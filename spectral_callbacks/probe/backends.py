"""Backends: run a model so that its loss can be differentiated twice, exactly.

Fused kernels are written for training, which differentiates once. Differentiated again they raise, or (weight norm,
reentrant checkpoints) are silently wrong. Each has a slower form that is the same function.
"""

from __future__ import annotations

import contextlib
import functools
import re
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils.checkpoint import CheckpointFunction

from spectral_callbacks.probe import compositions

_Operation = Callable[..., Any]
_apply = BackwardCFunction.apply
_ONCE = once_differentiable(lambda ctx: None).__code__  # of the wrapper, which all decorated functions share
_math_attention = functools.partial(sdpa_kernel, SDPBackend.MATH)


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Run torch so that double backward (`torch.autograd.grad` of a gradient) is exact.

    Values and first derivatives stay what they are outside, up to rounding; only dropout inside a fused CUDA kernel
    (attention, RNN) draws its mask from another stream. Inside the context

    - `torch.compile`d code runs eagerly, and nothing is compiled;
    - attention uses torch's `MATH` backend, also where the model asks for another one;
    - `weight_norm`, `cdist`, `pdist`, `embedding_bag`, and normalizations with a bias but no weight are replaced by
      compositions of operations that torch differentiates twice;
    - LSTM, GRU and RNN do not use cuDNN;
    - activation checkpoints store their activations instead of recomputing them;
    - a `torch.autograd.Function` marked `once_differentiable` raises where torch would take its curvature for zero.

    Evaluate the loss and take its gradients inside. The context nests, and on exit, also by an exception, every setting
    is what it was. Settings are global to the process: let no other thread train meanwhile.

    Out of reach: operations without a second derivative in torch (`ctc_loss`, `multi_margin_loss`,
    `multilabel_margin_loss`, `embedding_bag` with `scale_grad_by_freq`), which raise as they do outside (see
    `explain`); the kernels of other packages; and weight norm, `cdist` or `embedding_bag` within TorchScript.

    Cost: about 25 µs to enter and leave, and 1-4 µs for each call of a torch function while the loss is evaluated.
    Memory: checkpoints save none, attention takes the square of the sequence's length, and `cdist` with p other than 2
    holds all differences.

    Example:
        >>> import torch
        >>> w = torch.tensor([0.0, 1.0, 3.0], requires_grad=True)
        >>> with twice_differentiable():
        ...     loss = torch.cdist(w[:, None], w[:, None]).square().sum() / 2
        ...     (gradient,) = torch.autograd.grad(loss, w, create_graph=True)
        ...     (product,) = torch.autograd.grad(gradient @ torch.tensor([1.0, 0.0, 0.0]), w)
        >>> product
        tensor([ 4., -2., -2.])
    """
    with exact_backends(), SubstitutedOperations():
        yield


@contextlib.contextmanager
def exact_backends() -> Iterator[None]:
    """The settings of `twice_differentiable`, which cost nothing while they hold."""
    with (
        _math_attention(),
        torch.compiler.set_stance("force_eager"),
        _replaced(CheckpointFunction, "apply", staticmethod(_reentrant_checkpoint)),
        _replaced(checkpoint, "_checkpoint_without_reentrant_generator", _checkpoint),
        _replaced(BackwardCFunction, "apply", _backward),
    ):
        yield


def explain(error: Exception) -> str | None:
    """Say in one sentence what has no second derivative, and what to do about it.

    Args:
        error: What a double backward raised.

    Returns:
        The sentence; None if the error is about something else.
    """
    message = str(error)
    if match := _NOT_IMPLEMENTED.search(message):
        name = match["name"]
        remedy = _REACHED_ONLY_INSIDE if any(word in name for word in _SUBSTITUTED) else _REWRITE
        return f"torch has no second derivative for {name}, and curvature needs one: {remedy}."
    if "once_differentiable" in message:
        return (
            "a torch.autograd.Function of the model is marked @once_differentiable, and curvature needs a second "
            "derivative: write its backward with differentiable operations, or pass a loss= without it."
        )
    if "donated buffers" in message or "does not currently support double backward" in message:
        return (
            "code compiled by torch.compile has no second derivative, and curvature needs one: evaluate the loss "
            "inside twice_differentiable(), which runs compiled code eagerly."
        )
    return None


_NOT_IMPLEMENTED = re.compile(r"derivative for '?(?:aten::)?_*(?P<name>\w+?)(?:_backward\w*)?'? is not implemented")
_SUBSTITUTED = ("attention", "embedding_bag", "cdist", "pdist", "cudnn_rnn", "miopen_rnn")
_REACHED_ONLY_INSIDE = (
    "evaluate the loss inside twice_differentiable(), and call the operation from Python, through torch.nn or "
    "torch.nn.functional (embedding_bag: without scale_grad_by_freq)"
)
_REWRITE = "write it with elementary torch operations, or pass a loss= without it"


class SubstitutedOperations(TorchFunctionMode):
    """Replaces operations of the table below by twice differentiable forms, wherever Python code calls them.

    Each call of a torch function pays 1-4 µs for it, so it is active only while a model runs.
    """

    def __torch_function__(
        self, func: _Operation, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the substitute of an operation, or the operation itself."""
        return _SUBSTITUTES.get(func, func)(*args, **(kwargs or {}))


@contextlib.contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
    own = vars(owner).get(name)  # None: inherited
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def _reentrant_checkpoint(function: _Operation, preserve_rng_state: bool, *args: Any) -> Any:
    """Show the parameters inside to `torch.autograd.grad`, drawing the random numbers of the forward pass."""
    if any(isinstance(x, Tensor) and x.requires_grad for x in args):
        return function(*args)
    # Without such an input training gives no gradient to the parameters inside, and they are measured as they train.
    return super(CheckpointFunction, CheckpointFunction).apply(function, preserve_rng_state, *args)


def _checkpoint(
    fn: _Operation, preserve_rng_state: bool, context_fn: _Operation, *args: Any, **kwargs: Any
) -> Iterator[None]:
    """Do not run the model again in every backward pass.

    No mode sees what runs there, and it would save no memory: the graph of the gradient holds the activations too.
    """
    forward, _ = context_fn()
    with forward:
        yield


def _backward(node: Any, *gradients: Any) -> Any:
    """Raise at once: torch's own error hangs on a branch that leads to no parameter, or there is none."""
    function = node._forward_cls
    if torch.is_grad_enabled() and any(_is_once_differentiable(f) for f in (function.backward, function.vjp)):
        raise RuntimeError(f"trying to differentiate {function.__name__} twice, which was marked @once_differentiable")
    return _apply(node, *gradients)


def _is_once_differentiable(function: Any) -> bool:
    return isinstance(function, types.FunctionType) and function.__code__ is _ONCE


@contextlib.contextmanager
def _without_cudnn() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    enabled = cudnn.enabled
    cudnn.enabled = False  # cudnn.flags() would touch TF32 and benchmarking as well
    try:
        yield
    finally:
        cudnn.enabled = enabled


def _inside(context: Callable[[], contextlib.AbstractContextManager[Any]], operation: _Operation) -> _Operation:
    def call(*args: Any, **kwargs: Any) -> Any:
        with context():
            return operation(*args, **kwargs)

    return call


def _weighted(norm: _Operation) -> _Operation:
    """A normalization whose bias never comes without a weight: then torch's second derivative fails (pytorch#79705)."""

    def call(*args: Any, weight: Tensor | None = None, bias: Tensor | None = None, **kwargs: Any) -> Tensor:
        if weight is None and bias is not None:
            weight = torch.ones_like(bias)
        return norm(*args, weight=weight, bias=bias, **kwargs)  # torch.nn.functional passes both by name

    return call


_SUBSTITUTES: dict[_Operation, _Operation] = {
    # Inside multi_head_attention_forward no mode is active, so an inner sdpa_kernel is overruled around it.
    F.scaled_dot_product_attention: _inside(_math_attention, F.scaled_dot_product_attention),
    F.multi_head_attention_forward: _inside(_math_attention, F.multi_head_attention_forward),
    torch._weight_norm: compositions.weight_norm,
    torch.cdist: compositions.cdist,
    torch.pdist: compositions.pdist,
    F.embedding_bag: compositions.embedding_bag,
    **{norm: _weighted(norm) for norm in (F.batch_norm, F.instance_norm, F.layer_norm)},
    **{rnn: _inside(_without_cudnn, rnn) for rnn in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)},
}

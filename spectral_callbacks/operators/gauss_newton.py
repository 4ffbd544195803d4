"""Gauss-Newton matrix of an objective, by reverse mode alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spectral_callbacks.linalg import LinearOperator, eigsh
from spectral_callbacks.operators.outputs import OutputGraph, OutputObjective

_MAX_LOOK = 20  # products per batch that convexity is judged from
_LOOK_BYTES = 2**28  # that their vectors may take, where outputs are large
_MARGIN = 3.0  # in units of √ε of the outputs; rounding alone stays far below


class GaussNewton(LinearOperator):
    """The generalised Gauss-Newton matrix Σ_b w_b J_bᵀ A_b J_b, (n, n), symmetric positive semi-definite.

    J_b is the Jacobian of a batch's outputs by the parameters, A_b the second derivative of its loss by the outputs.
    What the Hessian has beyond it, the residual term Σ (d loss/d outputs) d²outputs/dθ², vanishes for models linear in
    θ and where the loss is flat in its outputs; all negative curvature comes from there. The rank is at most N k for
    squared loss and N (k - 1) for softmax cross-entropy (N samples of k outputs each), where the matrix is also the
    Fisher information.

    A product is one derivative of the kept pullback Jᵀu by u, which gives J v; one of the loss by its outputs; and one
    backward pass: 1.3 to 2 gradient passes as long as graphs are kept. Reverse mode only, as in `Hessian`.

    The matrix means what it says only if the loss is convex in the outputs. The first product looks for negative
    curvature there, by up to 20 products with each A_b, which cost no pass of the network: what it refuses is certainly
    not convex, what it lets pass may be so slightly or rarely. Where it sees no curvature at all (the outputs hold the
    loss itself, or the loss is linear in them, as L1 is piece by piece) the matrix would be zero, and is refused too.

    Args:
        output_objective: What is differentiated.

    Raises:
        ValueError: At the first product, if the loss is not convex in the outputs, or has no curvature there.

    References:
        Schraudolph 2002, Fast curvature matrix-vector products for second-order gradient descent; Sagun et al. 2017,
        arXiv:1706.04454.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from spectral_callbacks.probe import Probe
        >>> module = nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        >>> batch = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> loss = lambda module, x: module(x).square().sum() / 2
        >>> with Probe(module, optimizer, [batch], loss=loss, outputs="") as probe:
        ...     probe.gauss_newton().to_dense().tolist()
        [[9.0, 0.0], [0.0, 1.0]]
    """

    def __init__(self, output_objective: OutputObjective) -> None:
        self._objective = output_objective
        self._is_checked = False
        space = output_objective.space
        self.shape = (space.size, space.size)
        self.dtype = space.dtype
        self.device = space.device

    @property
    def weights(self) -> tuple[float, ...]:
        """The share of each batch."""
        return self._objective.weights

    @functools.cached_property
    def output_shapes(self) -> tuple[tuple[torch.Size, ...], ...]:
        """The shapes of the outputs: for each batch one for each of its outputs, as `jvp` returns them."""
        return tuple(tuple(z.shape for z in graph.cut.leaves) for graph in self._objective.graphs())

    def matmat(self, X: Tensor) -> Tensor:
        """Return the products with the k columns of X."""
        space = self._objective.space
        directions = [space.unflatten(x) for x in X.unbind(dim=1)]
        products = torch.zeros_like(X)
        curvatures: list[float] = []
        for graph in self._objective.graphs():
            if not self._is_checked:
                curvatures.append(self._check_convexity(graph))
            for column, direction in zip(products.unbind(dim=1), directions, strict=True):
                product = graph.vjp(graph.curvature(graph.jvp(direction)))
                column.add_(space.flatten(product), alpha=graph.weight)
        if curvatures and not any(curvatures):
            raise ValueError(
                f"the loss has no curvature in the outputs of {self._objective.source}, so its Gauss-Newton matrix is "
                "zero: they hold the loss itself, or it is linear in them (L1 and hinge losses are, piece by piece); "
                "name as outputs= the submodule before the loss, which returns the logits, or leave Gauss-Newton out."
            )
        self._is_checked = True
        return products

    def jvp(
        self,
        v: Tensor,  # (n,)
    ) -> tuple[tuple[Tensor, ...], ...]:
        """Return J v: for each batch one tensor for each of its outputs, of the output's shape.

        With `output_curvature` this gives the curvature of every sample along v at once: for a loss that is the mean
        over N samples, vᵀ G_i v = N Σ (J v)_i (A J v)_i, the sum running over the entries that belong to sample i.
        """
        direction = self._objective.space.unflatten(v)
        return tuple(graph.jvp(direction) for graph in self._objective.graphs())

    def output_curvature(self, w: Sequence[Sequence[Tensor]]) -> tuple[tuple[Tensor, ...], ...]:
        """Return A_b w_b for each batch, without its weight: shapes as `jvp` returns them."""
        return tuple(graph.curvature(x) for graph, x in zip(self._objective.graphs(), w, strict=True))

    def output_curvatures(self) -> Iterator[OutputCurvature]:
        """Yield A_b of each batch as an operator, without its weight: products with it take no pass of the network."""
        return map(OutputCurvature, self._objective.graphs())

    def _check_convexity(self, graph: OutputGraph) -> float:
        """Return the largest magnitude of a curvature that was seen."""
        A = OutputCurvature(graph)
        if not A.shape[0]:
            return 0.0
        look = max(2, min(_MAX_LOOK, _LOOK_BYTES // (A.shape[0] * A.dtype.itemsize)))
        generator = torch.Generator(A.device).manual_seed(0)
        pairs = eigsh(A, min(2, A.shape[0]), which="BE", max_matvecs=look, generator=generator)
        lowest, scale = pairs.values.min().item(), pairs.values.abs().max().item()
        if lowest < -_MARGIN * math.sqrt(A.eps) * scale:
            source = self._objective.source
            raise ValueError(
                f"the loss is not convex in the outputs of {source}: its second derivative there has the eigenvalue "
                f"{lowest:.3g} (the largest magnitude is {scale:.3g}), and its Gauss-Newton matrix would have negative "
                "ones that are not the network's; name a later output as outputs=, in which the loss is convex, or "
                "leave Gauss-Newton out."
            )
        return scale


class OutputCurvature(LinearOperator):
    """d²loss/d outputs² of one batch, (m, m), symmetric; its m outputs flattened one after the other.

    Args:
        graph: Of the batch.
    """

    def __init__(self, graph: OutputGraph) -> None:
        self._graph = graph
        leaves = graph.cut.leaves
        self._sizes = [leaf.numel() for leaf in leaves]
        self.shape = (sum(self._sizes), sum(self._sizes))
        self.dtype = torch.float32
        self.eps = 0.0
        for leaf in leaves:
            self.dtype = torch.promote_types(self.dtype, leaf.dtype)
            self.eps = max(self.eps, torch.finfo(leaf.dtype).eps)
        self.device = leaves[0].device if leaves else torch.device("cpu")

    def matmat(self, X: Tensor) -> Tensor:
        """Return the products with the columns of X: no pass of the network."""
        return torch.stack([self._product(x) for x in X.unbind(dim=1)], dim=1) if X.shape[1] else X.clone()

    def _product(self, x: Tensor) -> Tensor:
        leaves = self._graph.cut.leaves
        w = [part.view(z.shape).to(z.dtype) for part, z in zip(x.split(self._sizes), leaves, strict=True)]
        return torch.cat([y.reshape(-1).to(self.dtype) for y in self._graph.curvature(w)])

"""Hessian of an objective, by double backward."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_callbacks.linalg import LinearOperator
from spectral_callbacks.operators.objective import Objective


class Hessian(LinearOperator):
    """The matrix of second derivatives of an objective, (n, n), symmetric.

    A product is the derivative of ⟨gradient, v⟩ by a second backward pass: exact, and 1.5 to 1.9 gradient passes as
    long as the objective keeps its graphs. Reverse mode only: torch's forward-mode rules of LayerNorm and BatchNorm,
    differentiated once more, are wrong without an error (pytorch#196700, #196699).

    Args:
        objective: What is differentiated.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from spectral_callbacks.operators import Objective, ParameterSpace
        >>> module = nn.Linear(2, 1, bias=False)
        >>> X = torch.tensor([[1.0, 2.0]])
        >>> objective = Objective(ParameterSpace(module), [lambda: module(X).square().sum()])
        >>> Hessian(objective).to_dense().tolist()  # 2 Xᵀ X
        [[2.0, 4.0], [4.0, 8.0]]
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        space = objective.space
        self.shape = (space.size, space.size)
        self.dtype = space.dtype
        self.device = space.device

    def matmat(self, X: Tensor) -> Tensor:
        """Return the products with the k columns of X: k second backward passes for each batch.

        Columns go one by one: batching them costs more than a loop over a kept graph on a CPU.
        """
        space = self._objective.space
        directions = [space.unflatten(x) for x in X.unbind(dim=1)]
        products = torch.zeros_like(X)
        for graph in self._objective.graphs():
            curved = [(i, g) for i, g in enumerate(graph.gradient) if g is not None and g.requires_grad]
            if not curved:  # the loss is linear in the parameters
                continue
            gradient = [g for _, g in curved]
            for column, direction in zip(products.unbind(dim=1), directions, strict=True):
                product = torch.autograd.grad(
                    gradient, space.tensors, [direction[i] for i, _ in curved], retain_graph=True, allow_unused=True
                )
                column.add_(space.flatten(product), alpha=graph.weight)
        return products

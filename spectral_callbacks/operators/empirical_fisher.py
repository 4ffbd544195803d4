"""The empirical Fisher matrix and the covariance of the gradients, as operators."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_callbacks.linalg import LinearOperator
from spectral_callbacks.operators.sample_gradients import SampleGradients


class EmpiricalFisher(LinearOperator):
    """The second moment of the gradients of N samples, GᵀG / N, (n, n), symmetric positive semi-definite of rank ≤ N.

    G has the gradient of each sample's own loss as a row. It is not the Fisher information, which averages over labels
    that the model would draw; that is the Gauss-Newton matrix of softmax cross-entropy.

    A product costs two GEMMs a layer where the factors of the batches are kept, and a forward and a backward pass more
    where they are not. No N x n numbers are held.

    Args:
        gradients: Of the samples.

    References:
        Kunstner, Balles and Hennig 2019, Limitations of the empirical Fisher approximation, arXiv:1905.12558.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from spectral_callbacks.probe import Probe
        >>> module = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.zeros_(module.weight)
        >>> optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        >>> batch = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> with Probe(module, optimizer, [batch], loss=lambda module, x: (module(x) + x.sum(1)).mean()) as probe:
        ...     EmpiricalFisher(probe.sample_gradients()).to_dense().tolist()
        [[2.0, 0.0], [0.0, 0.5]]
    """

    def __init__(self, gradients: SampleGradients) -> None:
        self._gradients = gradients
        space = gradients.space
        self.shape = (space.size, space.size)
        self.dtype = space.dtype
        self.device = space.device

    def matmat(self, X: Tensor) -> Tensor:
        """Return the products with the k columns of X."""
        return self._gradients.second_moment(X) / self._gradients.num_samples


class GradientCovarianceOperator(LinearOperator):
    """The covariance of the gradients of N samples, GᵀG / N - ḡ ḡᵀ, (n, n), of rank ≤ N - 1.

    Its eigenvalues are those of the centered Gram matrix divided by N; its trace falls short of that of the population
    by (N - 1) / N. A product costs one of `EmpiricalFisher`.

    Args:
        gradients: Of the samples.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from spectral_callbacks.probe import Probe
        >>> module = nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        >>> batch = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> with Probe(module, optimizer, [batch], loss=lambda module, x: module(x).mean()) as probe:
        ...     GradientCovarianceOperator(probe.sample_gradients()).to_dense().tolist()
        [[1.0, -0.5], [-0.5, 0.25]]
    """

    def __init__(self, gradients: SampleGradients) -> None:
        self._fisher = EmpiricalFisher(gradients)
        N = gradients.num_samples
        self._mean = gradients.combined(torch.full((N, 1), 1 / N, dtype=torch.float64))
        self.shape = self._fisher.shape
        self.dtype = self._fisher.dtype
        self.device = self._fisher.device

    def matmat(self, X: Tensor) -> Tensor:
        """Return the products with the k columns of X."""
        return self._fisher.matmat(X) - self._mean @ (self._mean.mT @ X)

"""The covariance of the gradients within the classes, and that of the classes' means."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from spectral_callbacks.linalg import Estimate
from spectral_callbacks.metrics.covariance_spectrum import checked_gram, finite_size
from spectral_callbacks.metrics.jackknife import jackknife

_GROUPS = 32  # decomposition-free, N² operations each


@dataclasses.dataclass(frozen=True)
class ClassCovariance:
    """Σ = W + B of N gradients: W their covariance about the mean of their class, B that of the classes' means.

    B has a rank of at most the number of classes less 1: if the outliers of the spectrum are the classes', their number
    is that, their place is `between`, and `within` has none.

    Attributes:
        within: Eigenvalues of W = 1/N Σ_i (g_i - ḡ_c)(g_i - ḡ_c)ᵀ, c the class of i; (N,), float64, descending.
        between: Eigenvalues of B = Σ_c N_c/N (ḡ_c - ḡ)(ḡ_c - ḡ)ᵀ; (C,), float64, descending. Both lists add up to
            the trace of the N gradients' covariance, m - |ḡ|², exactly.
        within_trace: tr W of distribution or dataset, estimated without bias: Σ |g_i - ḡ_c|²/(N_c - 1) of each class,
            weighted with N_c. A class with a single sample tells nothing, and is left out; NaN if all are such.
        between_trace: tr B of the same, the unbiased tr Σ less `within_trace`; it can come out negative.
        counts: Samples of each class, (C,), in the order of the labels.
    """

    within: Tensor
    between: Tensor
    within_trace: Estimate
    between_trace: Estimate
    counts: Tensor

    @property
    def num_classes(self) -> int:
        """Classes that occur among the N samples."""
        return len(self.counts)


def class_covariance(
    gram: Tensor,  # (N, N)
    labels: Tensor,  # (N,)
    *,
    dataset_size: int | None = None,
) -> ClassCovariance:
    """Return the covariance of N gradients, resolved by class.

    Costs two decompositions and 32 N² operations for the errors, from a jackknife, which is somewhat too large for
    `between_trace` where the classes hardly differ.

    Args:
        gram: K, inner products of the gradients of the samples' own losses.
        labels: Class of each sample, integers.
        dataset_size: n, samples that the N are drawn from without replacement, whose own traces are then meant;
            infinite if left out.

    Raises:
        ValueError: If `gram` is no matrix of inner products, or there is not one integer label a sample.

    Example:
        >>> g = torch.tensor([[3.0, 1.0], [3.0, -1.0], [-3.0, 1.0], [-3.0, -1.0]])  # classes apart along the first axis
        >>> found = class_covariance(g @ g.mT, torch.tensor([0, 0, 1, 1]))
        >>> [round(x, 6) for x in (found.between[0].item(), found.within[0].item())]
        [9.0, 1.0]
    """
    gram = checked_gram(gram)
    N = len(gram)
    if labels.shape != (N,) or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} and type {labels.dtype} for {N} gradients; pass one integer for "
            "each sample."
        )
    _, labels, counts = torch.unique(labels.cpu(), return_inverse=True, return_counts=True)
    members = torch.nn.functional.one_hot(labels, len(counts)).double()  # (N, C)
    means = members / members.sum(0)
    rest = torch.eye(N, dtype=torch.float64) - means @ members.mT
    off = (means - 1 / N) * (members.sum(0) / N).sqrt()  # columns make √(N_c/N) (ḡ_c - ḡ) of the gradients

    within = torch.linalg.eigvalsh(rest @ gram @ rest.mT).flip(0).clamp(min=0) / N
    between = torch.linalg.eigvalsh(off.mT @ gram @ off).flip(0).clamp(min=0)
    n = finite_size(N, dataset_size)
    if n <= N:
        exact = Estimate(within.sum().item(), 0.0, N), Estimate(between.sum().item(), 0.0, N)
        return ClassCovariance(within, between, *exact, counts)

    def trace(part: int) -> Estimate:
        def of(chosen: Tensor) -> float:
            return _traces(gram[chosen][:, chosen], members[chosen], n)[part]

        error = jackknife(of, N, dataset_size=n, num_groups=_GROUPS)
        return Estimate(of(torch.arange(N)), math.inf if math.isnan(error) else error, N)

    return ClassCovariance(within, between, trace(0), trace(1), counts)


def _traces(
    gram: Tensor,  # (N, N)
    members: Tensor,  # (N, C)
    n: int,
) -> tuple[float, float]:
    """Return tr W and tr B of the n samples, without bias."""
    N, counts = len(gram), members.sum(0)
    own = gram.diagonal()
    several = counts > 1
    if not several.any():
        return math.nan, math.nan
    squares = own @ members - (members * (gram @ members)).sum(0) / counts.clamp(min=1)
    weights = counts[several]
    # About their own mean, the n_c samples of a class have 1 - 1/n_c of the variance, and n_c is near N_c n/N.
    within = (squares[several] / (weights - 1) @ (weights - N / n) / weights.sum()).item()
    whole = (own.sum() - gram.mean() * N).item() / (N - 1) * (1 - 1 / n)
    return within, whole - within

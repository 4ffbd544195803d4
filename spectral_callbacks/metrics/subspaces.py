"""Overlap of subspaces, and how gradient and noise lie against the curvature."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from spectral_callbacks.linalg import Estimate
from spectral_callbacks.metrics.covariance_spectrum import checked_gram
from spectral_callbacks.metrics.pair_mean import mean_of_all

_ORTHONORMAL = 1e-2  # largest entry of VᵀV - I, or excess of a cosine over 1, that passes for rounding


@dataclasses.dataclass(frozen=True)
class SubspaceOverlap:
    """How close a k-dimensional and an l-dimensional subspace of n dimensions are, and how close chance makes them.

    Attributes:
        cosines: Of the principal angles, (min(k, l),), float64, descending.
        dimensions: (k, l, n).
    """

    cosines: Tensor
    dimensions: tuple[int, int, int]

    @property
    def value(self) -> float:
        """Mean squared cosine of the principal angles, ‖UᵀV‖²/min(k, l).

        1 if the smaller subspace lies in the larger, 0 if they are orthogonal.
        """
        return self.cosines.square().mean().item() if len(self.cosines) else math.nan

    @property
    def angles(self) -> Tensor:  # (min(k, l),)
        """Principal angles in radians, ascending, from 0 to π/2."""
        return self.cosines.acos()

    @property
    def null(self) -> Estimate:
        """Overlap of random subspaces: its expectation max(k, l)/n, and its standard deviation.

        ‖UᵀV‖² has the expectation k l/n and the variance 2 k l (n - k)(n - l) / (n² (n - 1)(n + 2)).
        """
        k, l, n = self.dimensions  # noqa: E741
        if not min(k, l):
            return Estimate(math.nan, math.inf, 0)
        if n == 1:
            return Estimate(1.0, 0.0, 1)
        variance = 2 * k * l * (n - k) * (n - l) / (n**2 * (n - 1) * (n + 2))
        return Estimate(max(k, l) / n, math.sqrt(variance) / min(k, l), min(k, l))


def subspace_overlap(
    U: Tensor,  # (n, k)
    V: Tensor,  # (n, l)
) -> SubspaceOverlap:
    """Return the overlap of two subspaces given by orthonormal bases.

    Raises:
        ValueError: If the bases have different lengths, or are not orthonormal.

    Example:
        >>> overlap = subspace_overlap(torch.eye(10)[:, :2], torch.eye(10)[:, 1:4])
        >>> overlap.value, overlap.null.value
        (0.5, 0.3)
    """
    if U.ndim != 2 or V.ndim != 2 or len(U) != len(V):
        raise ValueError(f"bases of shapes {tuple(U.shape)} and {tuple(V.shape)}; pass (n, k) and (n, l).")
    for basis in (U, V):
        excess = (basis.mT @ basis).double().cpu() - torch.eye(basis.shape[1], dtype=torch.float64)
        if not excess.abs().max() < _ORTHONORMAL:
            raise ValueError("a basis is not orthonormal; pass torch.linalg.qr(basis).Q, or eigenvectors.")
    return _overlap((U.mT @ V).to("cpu", torch.float64), len(U))


def covariance_overlap(
    values: Tensor,  # (k,)
    vectors: Tensor,  # (N, k)
    along: Tensor,  # (N, l)
    *,
    dimension: int,
) -> SubspaceOverlap:
    """Return the overlap of the covariance's top eigenvectors with a subspace, without forming them.

    With P = G V the products of the N gradients with an orthonormal basis V, the eigenvector v_j of the covariance has
    ⟨v_j, V⟩ = u_jᵀ P / √(N σ_j).

    How to read it: against `null`, the overlap of random subspaces. The subspace of N gradients is itself a noisy
    estimate, so that 1 is not reached even where both matrices have the same eigenvectors.

    Args:
        values: σ, largest eigenvalues of the covariance; those that are 0 have no vector, and are left out.
        vectors: u, as `CovarianceSpectrum` has them.
        along: P, inner products of each sample's gradient with the basis, for example of Hessian eigenvectors.
        dimension: n, number of parameters.

    Raises:
        ValueError: If the shapes do not fit, or a cosine comes out above 1: the basis is not orthonormal then, or the
            products are those of other gradients.
    """
    values, vectors, along = (t.to("cpu", torch.float64) for t in (values, vectors, along))
    N = len(vectors)
    if vectors.shape != (N, len(values)) or along.ndim != 2 or len(along) != N or max(along.shape[1], 1) > dimension:
        raise ValueError(
            f"{len(values)} values, vectors {tuple(vectors.shape)} and products {tuple(along.shape)} in "
            f"{dimension} dimensions; pass (k,), (N, k) and (N, l), with l at most the dimension."
        )
    some = values > 0
    centered = along - along.mean(0)
    return _overlap((vectors[:, some] / (N * values[some]).sqrt()).mT @ centered, dimension)


def top_subspace_share(
    gram: Tensor,  # (N, N)
    along: Tensor,  # (N, l)
    *,
    dataset_size: int | None = None,
) -> Estimate:
    """Return |Vᵀḡ|² / |ḡ|², the share of the mean gradient in the span of V.

    A random subspace has the share l/n. Near 1 for the top eigenvectors of the Hessian, one for each class, the
    gradient lies in a tiny subspace (Gur-Ari, Roberts and Dyer 2018, arXiv:1812.04754). ḡ has the noise of N samples in
    it, which brings in the noise's own share with the weight tr Σ/(N |ḡ|²); the error does not contain this bias.

    Args:
        gram: K, inner products of the gradients of the samples' own losses.
        along: P = G V, inner products of each sample's gradient with an orthonormal basis.
        dataset_size: n, samples that the N are drawn from without replacement; infinite if left out.

    Returns:
        The error is that over draws of N samples, by the delta method; NaN where ḡ is 0.

    Raises:
        ValueError: If `gram` is no matrix of inner products, or the shapes do not fit.

    Example:
        >>> g = torch.tensor([[3.0, 4.0], [3.0, 4.0], [3.0, 4.0]])
        >>> round(top_subspace_share(g @ g.mT, g[:, :1]).value, 9)
        0.36
    """
    gram = checked_gram(gram)
    along = along.to("cpu", torch.float64)
    N = len(gram)
    if along.ndim != 2 or len(along) != N:
        raise ValueError(f"products of shape {tuple(along.shape)} for {N} gradients; pass (N, l).")
    square = gram.mean().item()
    if not square > 0:
        return Estimate(math.nan, math.inf, N)
    share = along.mean(0).square().sum().item() / square
    return Estimate(share, mean_of_all(along @ along.mT - share * gram, dataset_size=dataset_size).error / square, N)


def noise_weights(
    num_samples: int,
    num_vectors: int,
    *,
    generator: torch.Generator,
) -> Tensor:  # (N, num_vectors), float64
    """Return the weights c that make random vectors w = Σ_i c_i g_i with the covariance Σ of N gradients as their own.

    They are random signs, less their mean, over √N: E w wᵀ = 1/N Σ_i (g_i - ḡ)(g_i - ḡ)ᵀ.

    Args:
        num_samples: N.
        num_vectors: Columns.
        generator: Source of the signs; on the CPU.
    """
    signs = torch.randint(2, (num_samples, num_vectors), generator=generator).double() * 2 - 1
    return (signs - signs.mean(0)) / math.sqrt(num_samples)


def noise_curvature_alignment(
    curvatures: Tensor,  # (k,)
    squares: Tensor,  # (k,)
    mean_eigenvalue: Estimate,
) -> Estimate:
    """Return tr(ΣH) / (tr Σ · λ̄), the mean curvature that the noise sees over that of a random direction.

    1 for noise that knows nothing of the curvature, n for noise along the only curved direction, tr H²/(n λ̄²) for Σ in
    proportion to H. From vectors w with E w wᵀ = Σ as the ratio of the means of wᵀHw and |w|².

    Args:
        curvatures: wᵀHw of vectors made with `noise_weights`.
        squares: |w|².
        mean_eigenvalue: λ̄ = tr H/n, with its error (0 if it is exact).

    Returns:
        The error is that of the random vectors and of λ̄, by the delta method, at these N samples; NaN where λ̄ is not
        positive or there is no noise.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> curvatures, squares = torch.tensor([2.0, 6.0, 4.0]), torch.tensor([1.0, 2.0, 1.0])
        >>> round(noise_curvature_alignment(curvatures, squares, Estimate(0.5, 0.0, num_samples=1)).value, 9)
        6.0
    """
    if curvatures.ndim != 1 or curvatures.shape != squares.shape:
        raise ValueError(f"{tuple(curvatures.shape)} curvatures and {tuple(squares.shape)} squares; pass (k,) of each.")
    curvatures, squares = curvatures.to("cpu", torch.float64), squares.to("cpu", torch.float64)
    k, scale = len(curvatures), mean_eigenvalue.value
    size = squares.mean().item() if k else 0.0
    if not (size > 0 and scale > 0):
        return Estimate(math.nan, math.inf, k)
    along = curvatures.mean().item() / size
    error = (curvatures - along * squares).std().item() / size / math.sqrt(k) if k > 1 else math.inf
    return Estimate(along / scale, math.hypot(error, along / scale * mean_eigenvalue.error) / scale, k)


def _overlap(products: Tensor, dimension: int) -> SubspaceOverlap:
    k, l = products.shape  # noqa: E741
    cosines = torch.linalg.svdvals(products)
    if len(cosines) and not cosines[0] <= 1 + _ORTHONORMAL:
        raise ValueError(
            f"a principal angle has the cosine {cosines[0].item():.3g}: a basis is not orthonormal, or the products "
            "are not those of the same gradients; pass unit eigenvectors, and products at the same parameters."
        )
    return SubspaceOverlap(cosines.clamp(max=1), (k, l, dimension))

"""The spectrum of the gradients' covariance, exactly, from the inner products of N gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectral_callbacks.linalg import Estimate
from spectral_callbacks.metrics.jackknife import jackknife

_ASYMMETRY = 1e-4  # relative; inner products in float32 stay far below
_GROUPS = 16  # decompositions behind an error of λ_max: it is known to 18 %


def covariance_spectrum(
    gram: Tensor,  # (N, N)
    *,
    center: bool = True,
) -> Tensor:
    """Return the N largest eigenvalues of the covariance Σ = 1/N Σ_i (g_i - ḡ)(g_i - ḡ)ᵀ of N gradients, descending.

    They are those of H K H / N, with K_ij = ⟨g_i, g_j⟩ and H = I - 11ᵀ/N, and all others of Σ are 0, the last of these
    N as well. Their sum is m - |ḡ|², which is (N - 1)/N of the unbiased trace. Exact to rounding, below which a
    value is returned as 0. Costs one decomposition of an N×N matrix.

    How to read it: this is the spectrum of N gradients, not of the distribution behind them. N gradients in n > N
    dimensions spread a flat spectrum into N eigenvalues between tr Σ/N (1 - √γ)² and tr Σ/N (1 + √γ)², γ = N/n
    (Marchenko and Pastur 1967). An eigenvalue tells of the distribution if it stands clear of such a bulk, see
    `outliers`.

    Args:
        gram: K, inner products of the gradients of the samples' own losses.
        center: False leaves ḡ in: the empirical Fisher matrix 1/N Σ_i g_i g_iᵀ, from K / N.

    Returns:
        (N,), float64, on the CPU.

    Raises:
        ValueError: If `gram` is no matrix of inner products.

    Example:
        >>> gram = torch.diag(torch.tensor([1.0, 2.0, 6.0]))  # three orthogonal gradients
        >>> covariance_spectrum(gram, center=False)
        tensor([2.0000, 0.6667, 0.3333], dtype=torch.float64)
        >>> round(covariance_spectrum(gram).sum().item(), 9)  # m - |ḡ|² = 3 - 1
        2.0
    """
    gram = checked_gram(gram)
    return _clipped(torch.linalg.eigvalsh(centered(gram) if center else gram), gram)


def covariance_eigenvectors(
    gram: Tensor,  # (N, N)
    k: int,
) -> tuple[Tensor, Tensor]:
    """Return the k largest eigenvalues of the covariance, (k,), and their vectors in the space of samples, (N, k).

    The eigenvector in parameter space to u_j is v_j = Σ_i u_ij (g_i - ḡ) / √(N σ_j), and as the columns of u are
    orthogonal to 1 where σ_j > 0, ḡ drops out.

    Args:
        gram: K, inner products of the gradients of the samples' own losses.
        k: At most N.

    Raises:
        ValueError: If `gram` is no matrix of inner products, or of fewer than k.
    """
    gram = checked_gram(gram)
    if not 1 <= k <= len(gram):
        raise ValueError(f"k={k!r} eigenvectors of {len(gram)} gradients; pass 1 to {len(gram)}.")
    values, vectors = torch.linalg.eigh(centered(gram))
    return _clipped(values, gram)[:k], vectors.flip(1)[:, :k]


def covariance_lambda_max(
    gram: Tensor,  # (N, N)
    *,
    dataset_size: int | None = None,
) -> Estimate:
    """Return the largest eigenvalue of the covariance of N gradients, with a jackknife error.

    It is biased upward, the more the flatter the spectrum and the smaller N: for Σ = σ² I in n dimensions it is near
    σ² (1 + √(n/N))², not σ², and an isolated eigenvalue ℓ is seen near ℓ + b, b = tr Σ/N of the rest where that rest is
    flat (Baik and Silverstein 2006, arXiv:math/0408165). The error does not contain this bias. `held_out_lambda_max` is
    biased the other way: where both agree the eigenvalue is known, where they do not it is the sample's own.

    Args:
        gram: K, inner products of the gradients of the samples' own losses.
        dataset_size: Samples that the N are drawn from without replacement; infinite if left out.

    Returns:
        The error is from 16 groups left out in turn, 0 where the whole dataset was seen, and somewhat too large where
        no eigenvalue stands clear. Costs 16 decompositions.

    Raises:
        ValueError: If `gram` is no matrix of inner products.

    Example:
        >>> g = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 1.0, 1.0])
        >>> top = covariance_lambda_max(g @ g.mT)
        >>> round(top.value, 2), round(top.error, 2)  # 9 ± 9 √(2/64) = 1.6
        (7.15, 1.41)
    """
    gram = checked_gram(gram)
    N = len(gram)

    def largest(chosen: Tensor) -> float:
        return torch.linalg.eigvalsh(centered(gram[chosen][:, chosen]))[-1].item() / len(chosen)

    value = max(largest(torch.arange(N)), 0.0)
    return Estimate(value, jackknife(largest, N, dataset_size=finite_size(N, dataset_size), num_groups=_GROUPS), N)


def held_out_lambda_max(
    gram: Tensor,  # (N, N)
) -> Estimate:
    """Return the variance of gradients along top eigenvectors that were found without them.

    Each of 16 groups of samples is left out in turn; v is the top eigenvector of the others' covariance, and the value
    is the mean of ⟨g - ḡ_others, v⟩² over the samples left out, divided by 1 + 1/N_others: an unbiased estimate of
    vᵀΣv, which is at most λ_max(Σ), and near tr Σ/n where v is a chance direction.

    Args:
        gram: K, inner products of the gradients of the samples' own losses.

    Returns:
        The error is the standard error of that mean, without the chance in the vectors: about right where an
        eigenvalue stands clear, half of the true one on a flat spectrum. NaN below 3 samples. Costs 16 decompositions.

    Raises:
        ValueError: If `gram` is no matrix of inner products.
    """
    gram = checked_gram(gram)
    N = len(gram)
    if N < 3:
        return Estimate(math.nan, math.inf, N)
    squares = torch.zeros(N, dtype=torch.float64)
    for held in torch.arange(N).tensor_split(min(_GROUPS, N)):
        seen = torch.ones(N, dtype=torch.bool).index_fill(0, held, False).nonzero().squeeze(1)
        values, vectors = torch.linalg.eigh(centered(gram[seen][:, seen]))
        # ⟨g - ḡ, v⟩ with v = Σ u_i (g_i - ḡ) / √λ, and u orthogonal to 1
        u = vectors[:, -1] - vectors[:, -1].mean()
        projections = (gram[held][:, seen] - gram[seen][:, seen].mean(0)) @ u
        scale = values[-1].item() * (1 + 1 / len(seen))
        squares[held] = projections.square() / scale if scale > 0 else 0.0
    return Estimate(squares.mean().item(), squares.std().item() / math.sqrt(N), N)


def effective_rank(
    eigenvalues: Tensor,  # (k,)
) -> float:
    """Return exp(-Σ p_i ln p_i), p_i = λ_i/Σ λ: how many directions share the variance.

    Of the eigenvalues of the covariance, not of singular values, their roots, which count the tail far more (Roy and
    Vetterli 2007 take those). From 1 to the number of eigenvalues, so at most N - 1 for the covariance of N gradients,
    and near that for a flat spectrum in n ≫ N dimensions, whatever n: compare at equal N only.

    Args:
        eigenvalues: All that are not negligible; negative ones count as 0.

    Returns:
        NaN where all are 0.

    Example:
        >>> round(effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])), 9)
        3.0
    """
    p = eigenvalues.to("cpu", torch.float64).clamp(min=0)
    total = p.sum()
    return math.exp(torch.special.entr(p / total).sum().item()) if total > 0 else math.nan


def participation_ratio(
    eigenvalues: Tensor,  # (k,)
) -> float:
    """Return (Σ λ_i)² / Σ λ_i²: the effective rank that weighs large eigenvalues most; at most `effective_rank`.

    Args:
        eigenvalues: All that are not negligible; negative ones count as 0.

    Returns:
        NaN where all are 0.

    Example:
        >>> participation_ratio(torch.tensor([2.0, 2.0, 2.0, 0.0]))
        3.0
    """
    p = eigenvalues.to("cpu", torch.float64).clamp(min=0)
    total = p.sum()
    return 1 / (p / total).square().sum().item() if total > 0 else math.nan


def centered(
    gram: Tensor,  # (N, N)
) -> Tensor:  # (N, N)
    """Return the inner products of the gradients less their mean: H K H."""
    rows = gram - gram.mean(0)
    return rows - rows.mean(1, keepdim=True)


def checked_gram(
    gram: Tensor,  # (N, N)
) -> Tensor:  # (N, N), float64, on the CPU
    """Return the matrix made exactly symmetric, or refuse what cannot be inner products of gradients."""
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not len(gram):
        raise ValueError(f"gram has shape {tuple(gram.shape)}; pass the inner products of N gradients, (N, N).")
    gram = gram.detach().to("cpu", torch.float64)
    size = gram.abs().max().item()
    if not math.isfinite(size):
        raise ValueError(
            "an inner product of two gradients is not finite; look for NaN or infinity in the weights, or for "
            "gradients beyond 1e19, whose squares float32 cannot hold."
        )
    own = gram.diagonal()
    if (gram - gram.mT).abs().max() > _ASYMMETRY * size or size > (1 + _ASYMMETRY) * own.max().item():
        raise ValueError(
            "gram is not a matrix of inner products: it must be symmetric, and no |K_ij| larger than every K_ii; pass "
            "K_ij = ⟨g_i, g_j⟩ of the samples' gradients."
        )
    return (gram + gram.mT) / 2


def _clipped(
    values: Tensor,  # (N,), ascending, of the centered Gram matrix
    gram: Tensor,  # (N, N), which its rounding comes from
) -> Tensor:  # (N,), descending, of the covariance
    least = len(values) * torch.finfo(values.dtype).eps * max(values[-1].item(), gram.max().item())
    return torch.where(values > least, values, 0.0).flip(0) / len(values)


def finite_size(num_samples: int, dataset_size: int | None) -> int:
    """Return a dataset's size for `jackknife`: for an infinite one, so many that N make no difference."""
    return dataset_size if dataset_size is not None else num_samples * 10**15

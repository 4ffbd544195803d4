"""How many eigenvalues matter: ranks of a spectrum that need no threshold, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor


def entropy_of_eigenvalues(
    eigenvalues: Tensor,  # (k,)
) -> Tensor:  # ()
    """Return -Σ p_i ln p_i, p_i = λ_i/Σ λ, in nats: from 0, one eigenvalue alone, to ln k, all equal.

    Args:
        eigenvalues: All that are not negligible; negative ones count as 0.

    Returns:
        float64, NaN where all are 0.

    Example:
        >>> entropy_of_eigenvalues(torch.tensor([2.0, 2.0, 2.0, 0.0]))
        tensor(1.0986, dtype=torch.float64)
    """
    return torch.special.entr(_shares(eigenvalues)).sum()


def effective_rank_of_eigenvalues(
    eigenvalues: Tensor,  # (k,)
) -> Tensor:  # ()
    """Return exp(-Σ p_i ln p_i), p_i = λ_i/Σ λ: how many directions share the variance.

    Of the eigenvalues of the covariance, not of singular values, their roots, which count the tail far more (Roy and
    Vetterli 2007 take those). From 1 to the number of eigenvalues, so at most N - 1 for the covariance of N samples,
    and near that for a flat spectrum in n ≫ N dimensions, whatever n: compare at equal N only.

    Args:
        eigenvalues: All that are not negligible; negative ones count as 0.

    Returns:
        float64, NaN where all are 0.

    Example:
        >>> effective_rank_of_eigenvalues(torch.tensor([2.0, 1.0, 1.0, 0.0]))  # √8
        tensor(2.8284, dtype=torch.float64)
    """
    return entropy_of_eigenvalues(eigenvalues).exp()


def participation_ratio_of_eigenvalues(
    eigenvalues: Tensor,  # (k,)
) -> Tensor:  # ()
    """Return (Σ λ_i)² / Σ λ_i²: the effective rank that weighs large eigenvalues most; at most the one of the entropy.

    Args:
        eigenvalues: All that are not negligible; negative ones count as 0.

    Returns:
        float64, NaN where all are 0.

    Example:
        >>> participation_ratio_of_eigenvalues(torch.tensor([2.0, 1.0, 1.0, 0.0]))
        tensor(2.6667, dtype=torch.float64)
    """
    return 1 / _shares(eigenvalues).square().sum()


def stable_rank_of_eigenvalues(
    eigenvalues: Tensor,  # (k,)
) -> Tensor:  # ()
    """Return Σ λ_i / max λ: at most the participation ratio.

    Args:
        eigenvalues: All that are not negligible; negative ones count as 0.

    Returns:
        float64, NaN where all are 0.

    Example:
        >>> stable_rank_of_eigenvalues(torch.tensor([2.0, 1.0, 1.0, 0.0]))
        tensor(2., dtype=torch.float64)
    """
    return 1 / _shares(eigenvalues).max()


def _shares(eigenvalues: Tensor) -> Tensor:
    positive = eigenvalues.double().clamp(min=0)
    return positive / positive.sum()

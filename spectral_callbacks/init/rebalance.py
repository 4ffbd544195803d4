"""One-step rebalancing of two factors: their product stays, and its slow directions converge at one rate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spectral_callbacks.metrics.factor_imbalance import check_factors


def rebalanced(
    F: Tensor,  # (m, k)
    G: Tensor,  # (n, k)
    beta: float = 1.0,
) -> tuple[Tensor, Tensor]:  # (m, k), (n, k)
    """Return other factors of the same F Gᵀ, with FᵀF = beta² I.

    With F = A S Bᵀ they are F B diag(beta/s) = beta A and G B diag(s/beta). In over-parameterised matrix sensing, the
    superfluous part of the product dies out at a rate of the learning rate times the smallest eigenvalue of FᵀF while G
    is small: from balanced or small factors it crawls, after this step it does not depend on their scale any more
    (Xiong et al. 2024, arXiv:2310.01769, section 5). Take the step once the loss is small; beta is about the square
    root of the largest singular value of the product, and a learning rate below 2 / beta² is needed.

    Args:
        F: The factor that becomes orthogonal; needs rank k.
        G: The other.
        beta: All singular values of the new F.

    Returns:
        New tensors of the old dtypes; computed in float64. Cost: a decomposition of an m × k matrix, once.

    Raises:
        ValueError: If these are no factors of one matrix, beta is not positive, or F has a rank below k.

    Example:
        >>> F, G = torch.tensor([[0.1, 0.0], [0.0, 0.2]]), torch.tensor([[1.0, 2.0]])
        >>> new_F, new_G = rebalanced(F, G)
        >>> torch.allclose(new_F @ new_G.T, F @ G.T), torch.allclose(new_F.T @ new_F, torch.eye(2))
        (True, True)
    """
    check_factors(F, G)
    if not beta > 0:
        raise ValueError(f"beta is {beta!r}, and must be positive: it is every singular value of the new F.")
    A, s, Bh = torch.linalg.svd(F.detach().double(), full_matrices=False)
    tolerance = s[:1].sum() * max(F.shape) * torch.finfo(F.dtype).eps
    rank = int((s > tolerance).sum().item())
    if rank < F.shape[1]:
        raise ValueError(
            f"F {tuple(F.shape)} has rank {rank}, and {F.shape[1]} is needed: a direction that F does not reach has no "
            "scale to be changed. Rebalance the other factor, use fewer columns, or start from a random F."
        )
    new_F = beta * A
    new_G = G.detach().double() @ Bh.T * (s / beta)
    return new_F.to(F.dtype), new_G.to(G.dtype)


@torch.no_grad()
def rebalance_(F: Tensor, G: Tensor, beta: float = 1.0) -> None:
    """Replace the values of two factors by those of `rebalanced`, in place.

    What an optimizer remembers of them, as momentum, belongs to the old coordinates: clear its state of both.

    Args:
        F: (m, k), becomes orthogonal.
        G: (n, k).
        beta: All singular values of the new F.

    Raises:
        ValueError: As `rebalanced`; then both are as they were.

    Example:
        >>> F, G = torch.tensor([[2.0]]), torch.tensor([[3.0]])
        >>> rebalance_(F, G)
        >>> F.abs(), (F @ G.T).item()
        (tensor([[1.]]), 6.0)
    """
    new_F, new_G = rebalanced(F, G, beta)
    F.copy_(new_F)
    G.copy_(new_G)


@torch.no_grad()
def rebalance_layers_(first: nn.Linear, second: nn.Linear, beta: float = 1.0) -> None:
    """Rebalance two linear layers that follow each other, in place; what they compute together stays.

    The second layer's weight is F, and becomes orthogonal; the first one's is Gᵀ. The first one's bias is a column more
    of its weight, and is changed with it. What an optimizer remembers of them belongs to the old coordinates.

    Args:
        first: (n -> k).
        second: (k -> m), takes the outputs of the first as they are, with nothing in between.
        beta: All singular values of the second layer's new weight.

    Raises:
        ValueError: If the second does not fit behind the first, or a weight or bias is computed from other parameters;
            and as `rebalanced`. Then both are as they were.

    Example:
        >>> first, second, x = nn.Linear(5, 2), nn.Linear(2, 4), torch.ones(5)
        >>> before = second(first(x))
        >>> rebalance_layers_(first, second)
        >>> torch.allclose(second(first(x)), before, atol=1e-5)
        True
    """
    if first.out_features != second.in_features:
        raise ValueError(
            f"the second layer takes {second.in_features} numbers, and the first gives {first.out_features}: pass two "
            "layers of which the second takes the outputs of the first."
        )
    bias: Tensor | None = first.bias
    for name, value in (("first.weight", first.weight), ("first.bias", bias), ("second.weight", second.weight)):
        if value is not None and not isinstance(value, nn.Parameter):
            raise ValueError(
                f"{name} is computed from other parameters, as by `split_bias` or a weight norm, so that its values "
                "cannot be replaced: rebalance the layers first, and parametrize them then."
            )
    rows = first.weight if bias is None else torch.cat([first.weight, bias[:, None]], dim=1)
    new_F, new_G = rebalanced(second.weight, rows.T, beta)
    second.weight.copy_(new_F)
    first.weight.copy_(new_G[: first.in_features].T)
    if bias is not None:
        bias.copy_(new_G[-1])

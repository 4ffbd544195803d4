"""Centered kernel alignment: how much two representations of the same samples have in common."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from spectral_callbacks.linalg import Estimate
from spectral_callbacks.metrics.representations.feature_matrix import centered_features

_FEWEST = 4  # samples: HSIC_1 has n - 3 in a denominator
_BLOCK = 2**22  # numbers held at a time, 32 MiB
_ROUNDING = 1e-12  # of tr K K: an alignment of a representation with itself below it is none
_SINGLE = 1e-9  # of tr K K: what is left without one sample has lost its digits, or is 0, as HSIC_1 is of three


def cka(
    X: Tensor,  # (n, d1)
    Y: Tensor,  # (n, d2)
    *,
    unbiased: bool = True,
) -> Estimate:
    """Return the linear centered kernel alignment of two representations of the same n samples.

    CKA = HSIC(K, L)/√(HSIC(K, K) HSIC(L, L)), with K = X Xᵀ and L = Y Yᵀ. It is 1 if one is a rotation, shift and
    scaling of the other, and 0 if they are unrelated. It sees the large directions: two layers that agree on one
    dominant direction and nowhere else have a CKA near 1.

    The biased form has HSIC = |Xcᵀ Yc|²/(n - 1)², of centered features: for fewer samples than features it tends to 1
    whatever they are, 0.89 for independent ones with n = 64, d = 512. The unbiased form has the estimator HSIC_1 of
    each HSIC, with no sample compared to itself, and shows 0 there within its error. It lies between -1 and 1; as a
    ratio it still has a bias of order 1/n.

    Error: the jackknife, leaving out one sample at a time, in closed form. It counts what is of second order in the
    samples twice (Efron and Stein 1981), and is too large by up to a half where the representations are unrelated, or
    spread evenly over many directions. It is infinite where all hangs on a single one, and for 4 samples.

    Costs n² (d1 + d2) or 2 n (d1² + d1 d2 + d2²) operations, whichever is less, in float64; both are exact. Holds the
    features, centered, and no more numbers than these beside.

    Args:
        X: One row a sample.
        Y: Of the same samples in the same order.
        unbiased: False for the biased form.

    Returns:
        The value is the same for any scale, shift and rotation of X and of Y.

    Raises:
        ValueError: If a representation is no finite matrix of at least 4 samples, or has no variation, or the two are
            of different numbers of samples; in the unbiased form also if all samples of one are equally far apart.

    Reference: Kornblith et al. 2019, arXiv:1905.00414 (biased); Nguyen et al. 2021, arXiv:2010.15327 (unbiased), with
    HSIC_1 of Song et al. 2012, JMLR 13, equation 5.

    Example:
        >>> X = torch.randn(100, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> Y = torch.randn(100, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        >>> round(cka(X, 3 * X.flip(1) + 1).value, 9)
        1.0
        >>> round(cka(X, Y, unbiased=False).value, 1), abs(cka(X, Y).value) < 0.05
        (0.4, True)
    """
    if len(X) != len(Y):
        raise ValueError(f"X has {len(X)} samples, Y {len(Y)}; pass two representations of the same samples.")
    X, Y = (_scaled(centered_features(Z, fewest=_FEWEST, called=name)) for Z, name in ((X, "X"), (Y, "Y")))
    n = len(X)
    xx, xy, yy = _overlaps(X, Y)
    pairs = _Pair.of(X, X, xx), _Pair.of(X, Y, xy), _Pair.of(Y, Y, yy)
    own_x, cross, own_y = (pair.hsic(unbiased=unbiased).item() for pair in pairs)
    for name, own, overlap in (("X", own_x, xx), ("Y", own_y, yy)):
        if own <= _ROUNDING * overlap.sum().item():
            raise ValueError(
                f"{name}: all {n} samples are equally far apart, so that the unbiased HSIC of it with itself is 0 and "
                "CKA is not defined. Pass more samples than features, or unbiased=False."
            )
    value = cross / math.sqrt(own_x * own_y)
    rest_x, rest, rest_y = (pair.without_one(unbiased=unbiased) for pair in pairs)
    if (rest_x <= _SINGLE * xx.sum()).any() or (rest_y <= _SINGLE * yy.sum()).any():
        return Estimate(value, math.inf, n)
    left = rest / (rest_x * rest_y).sqrt()
    return Estimate(value, math.sqrt((n - 1) * left.var(correction=0).item()), n)


@dataclasses.dataclass(frozen=True)
class _Pair:
    """What the HSIC of two centered representations is made of, for each sample i.

    With K, L their matrices of inner products, whose rows add up to 0.
    """

    a: Tensor  # K_ii
    b: Tensor  # L_ii
    overlap: Tensor  # Σ_j K_ij L_ij
    Kb: Tensor  # Σ_j K_ij L_jj
    La: Tensor  # Σ_j L_ij K_jj

    @classmethod
    def of(cls, X: Tensor, Y: Tensor, overlap: Tensor) -> _Pair:
        a, b = (X * X).sum(1), (Y * Y).sum(1)
        return cls(a, b, overlap, X @ (X.mT @ b), Y @ (Y.mT @ a))

    def hsic(self, *, unbiased: bool) -> Tensor:  # ()
        """Return n (n - 3) HSIC_1, or (n - 1)² HSIC_0; the factors cancel in CKA."""
        sums = self.overlap.sum(), self.a @ self.b, self.a.sum(), self.b.sum()
        return _hsic(*sums, len(self.a), unbiased=unbiased)

    def without_one(self, *, unbiased: bool) -> Tensor:  # (n,)
        """Return it of all but sample i, for each i.

        Without x_i the mean moves to -x_i/m, m = n - 1: the others' vectors become x_j + x_i/m, and the
        cross-covariance C = Xᵀ Y loses c x_i y_iᵀ, c = n/(n - 1). The rest is the squares of these, expanded.
        """
        a, b, n = self.a, self.b, len(self.a)
        m, c = n - 1, n / (n - 1)
        overlap = self.overlap.sum() - 2 * c * self.overlap + c**2 * a * b
        products = (
            (a @ b)
            + (2 / m) * (self.La + self.Kb)
            + (a * b.sum() + b * a.sum() + 4 * self.overlap) / m**2
            + (n / m**4 - c**4) * a * b
        )
        return _hsic(overlap, products, a.sum() - c * a, b.sum() - c * b, m, unbiased=unbiased)


def _hsic(overlap: Tensor, products: Tensor, a: Tensor, b: Tensor, n: int, *, unbiased: bool) -> Tensor:
    """From tr K L, Σ K_ii L_ii, tr K and tr L of centered features.

    HSIC_1 needs K and L without their diagonals, whose rows then add up to -K_ii, and the sums in it to those here. It
    does not change when K_ij becomes K_ij + f_i + f_j, so that centering does not bias it.
    """
    if not unbiased:
        return overlap
    return overlap - n / (n - 2) * products + a * b / ((n - 1) * (n - 2))


def _overlaps(X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Σ_j K_ij², Σ_j K_ij L_ij and Σ_j L_ij² for each sample i, by the smaller side."""
    n, d, e = len(X), X.shape[1], Y.shape[1]
    if 2 * (d * d + d * e + e * e) <= n * (d + e):
        sides = (X, X), (X, Y), (Y, Y)
        xx, xy, yy = ((A @ (A.mT @ B) * B).sum(1) for A, B in sides)
        return xx, xy, yy
    rows = []
    for chosen in torch.arange(n).split(max(_BLOCK // n, 1)):
        K, L = X[chosen] @ X.mT, Y[chosen] @ Y.mT
        rows.append(torch.stack([(K * K).sum(1), (K * L).sum(1), (L * L).sum(1)]))
    xx, xy, yy = torch.cat(rows, dim=1)
    return xx, xy, yy


def _scaled(rows: Tensor) -> Tensor:
    """Return the features in a unit in which fourth powers neither overflow nor vanish."""
    return rows / rows.abs().max()

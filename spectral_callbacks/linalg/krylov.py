"""A growing orthonormal basis, and a symmetric operator projected on it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectral_callbacks.linalg.operator import LinearOperator

_INITIAL_CAPACITY = 8
_CLOSED = 10.0  # a remainder below this many rounding errors of ‖A‖ is no direction


class Krylov:
    """Orthonormal columns V = [Q, W] with A Q = V H, for a symmetric A.

    The m columns of Q have been multiplied by A; the p columns of W are directions that have not. Expanding multiplies
    one direction of the span of W, which moves it to Q and appends what A made of it to W. One start vector gives
    Lanczos, several give its block form one product at a time, and the residual of a Ritz vector Q s is ‖H[m:] s‖
    whatever was expanded, in whatever order. Every product is orthogonalised twice against all of V, so no eigenvalue
    is found twice.

    Args:
        A: Symmetric operator, (n, n).
    """

    def __init__(self, A: LinearOperator) -> None:
        self._A = A
        self._rows = torch.empty(_INITIAL_CAPACITY, A.shape[0], dtype=A.dtype, device=A.device)
        self._H = torch.zeros(0, 0, dtype=torch.float64)
        self._past_asymmetry = 0.0
        self.num_matvecs = 0
        self.finite = True

    @property
    def dimension(self) -> int:
        """Number m of columns of Q."""
        return self._H.shape[1]

    @property
    def num_directions(self) -> int:
        """Number p of columns of W."""
        return self._H.shape[0] - self._H.shape[1]

    @property
    def norm(self) -> float:
        """Largest entry of H so far: a lower bound of ‖A‖ that soon has its size."""
        return self._H.abs().max().item() if self._H.numel() else 0.0

    @property
    def projection(self) -> Tensor:
        """Q^T A Q, made symmetric, (m, m)."""
        T = self._H[: self.dimension]
        return (T + T.mT) / 2

    @property
    def asymmetry(self) -> float:
        """Largest entry of T - T^T relative to that of H, now or before a compression: rounding for a symmetric A."""
        T = self._H[: self.dimension]
        now = ((T - T.mT).abs().max() / self.norm).item() if self.norm else 0.0
        return max(now, self._past_asymmetry)

    def residuals(
        self,
        S: Tensor,  # (m, k)
    ) -> Tensor:  # (k,)
        """Return ‖A Q s - Q T s‖ for each column s."""
        return torch.linalg.vector_norm(self.coupling(S), dim=0)

    def asymmetric_part(
        self,
        S: Tensor,  # (m, k)
    ) -> Tensor:  # (k,)
        """Return ‖(T - T^T) s‖ / 2, what rounding of the products adds to the residual of each column s."""
        T = self._H[: self.dimension]
        return torch.linalg.vector_norm((T - T.mT) @ S, dim=0) / 2

    def coupling(
        self,
        S: Tensor,  # (m,) or (m, k)
    ) -> Tensor:  # (p,) or (p, k)
        """Return the part of A Q s outside span Q, in coordinates of W."""
        return self._H[self.dimension :] @ S

    def vectors(
        self,
        S: Tensor,  # (m, k)
    ) -> Tensor:  # (n, k)
        """Return the combinations Q S of the basis."""
        return self._rows[: self.dimension].mT @ S.to(self._rows)

    def add(
        self,
        x: Tensor,  # (n,)
    ) -> bool:
        """Append the part of x that is new as a direction; return whether there was any."""
        x = x.to(self._rows)
        size = self._A.gram(x[:, None], x[:, None])[0, 0].sqrt()
        _, norm = self._orthogonalize(x / size)
        # A start vector that repeats the basis to half the digits would add rounding noise only.
        if not norm > math.sqrt(torch.finfo(self._A.dtype).eps):
            return False
        self._rows[self._H.shape[0]] /= norm
        self._H = torch.nn.functional.pad(self._H, (0, 0, 0, 1))
        return True

    def expand(
        self,
        direction: Tensor | None = None,  # (p,)
    ) -> None:
        """Multiply one direction of span W: the last column, or the one with the coordinates given."""
        m, p = self.dimension, self.num_directions
        self._rotate(torch.eye(p, dtype=torch.float64)[-1] if direction is None else direction)
        product = self._A.matmat(self._rows[m][:, None])[:, 0]
        self.num_matvecs += 1
        coefficients, norm = self._orthogonalize(product)
        if not math.isfinite(coefficients.sum().item() + norm):
            self.finite = False
            return
        H = torch.zeros(m + p + 1, m + 1, dtype=torch.float64)
        H[: m + p, :m] = self._H
        H[: m + p, m] = coefficients
        H[m + p, m] = norm
        closed = norm <= _CLOSED * torch.finfo(self._A.dtype).eps * H.abs().max().item()
        if not closed:
            self._rows[m + p] /= norm
        self._H = H[: m + p] if closed else H

    def compress(
        self,
        S: Tensor,  # (m, k), orthonormal
        values: Tensor,  # (k,)
    ) -> None:
        """Replace Q by the Ritz vectors Q S, whose projection is diag(values); W stays."""
        self._past_asymmetry = self.asymmetry
        m, p, k = self.dimension, self.num_directions, S.shape[1]
        kept = self.vectors(S).mT.contiguous()
        self._rows[k : k + p] = self._rows[m : m + p].clone()
        self._rows[:k] = kept
        self._H = torch.cat([torch.diag(values), self._H[m:] @ S])

    def _orthogonalize(self, x: Tensor) -> tuple[Tensor, float]:
        """Write the part of x outside span V behind V; return the coordinates of the part inside, and its norm."""
        used = self._H.shape[0]
        self._reserve(used + 1)
        V, remainder = self._rows[:used].mT, self._rows[used]
        first = self._A.gram(V, x[:, None])[:, 0]
        torch.addmv(x, V, first, alpha=-1, out=remainder)
        # One product gives the second pass and the norm before it; the norm after it is theirs by Pythagoras.
        second = self._A.gram(self._rows[: used + 1].mT, remainder[:, None])[:, 0]
        remainder.addmv_(V, second[:used], alpha=-1)
        numbers = torch.cat([first, second]).to("cpu", torch.float64)  # one transfer
        first, second, square = numbers[:used], numbers[used:-1], numbers[-1]
        return first + second, (square - second.square().sum()).clamp_min(0.0).sqrt().item()

    def _rotate(self, direction: Tensor) -> None:
        """Turn W within its span so that its first column is the direction with these coordinates."""
        m, p = self.dimension, self.num_directions
        if p == 1:
            return
        d = direction / torch.linalg.vector_norm(direction)
        reflector = d.clone()
        reflector[0] -= 1.0
        size = torch.linalg.vector_norm(reflector)
        if size < torch.finfo(torch.float64).eps:
            return
        householder = torch.eye(p, dtype=torch.float64) - 2 * torch.outer(reflector, reflector) / size**2
        self._rows[m : m + p] = householder.to(self._rows) @ self._rows[m : m + p]
        self._H[m:] = householder @ self._H[m:]

    def _reserve(self, num_rows: int) -> None:
        if num_rows > self._rows.shape[0]:
            rows = torch.empty(2 * num_rows, self._rows.shape[1], dtype=self._rows.dtype, device=self._rows.device)
            rows[: self._rows.shape[0]] = self._rows
            self._rows = rows

"""Gradients by the weights of linear maps: sums of outer products."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import final

import torch
from torch import Tensor

from spectral_callbacks.operators import tiles
from spectral_callbacks.operators.factors import Factor, LatestRows
from spectral_callbacks.operators.tiles import (
    GramSum,
    Scratch,
    blocks,
    group_pieces,
    mirrored,
    pieces,
    promoted,
    tile_bytes,
)

_ENTRY = 16  # operations that one product of two inner products costs, beyond the inner products themselves


@final
class Outer(Factor):
    """Sums of outer products: what a linear map y = w x has, J_i = Σ_t (d loss/d y_it) x_itᵀ, for each of G groups.

    The Gram matrix is that of the summands, N² T² (r + c) operations a group, or that of the gradients themselves,
    N T r c + N² r c, whichever is less: the first where there are few positions, always at T = 1. By symmetry either
    is half of it for many samples.

    Args:
        left: (N, G, T, r), the gradients by the outputs.
        right: (N, G, T, c), the inputs.
        shape: Of w, with G r c entries in this order.

    References:
        Goodfellow 2015, Efficient per-example gradient computations, arXiv:1510.01799; Rochette et al. 2019,
        arXiv:1912.06015.

    Example:
        >>> import torch
        >>> outputs, inputs = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> factor = Outer(outputs[:, None, None], inputs[:, None, None], (1, 2))
        >>> factor.gram().tolist(), factor.block(slice(0, 1)).tolist()
        ([[1.0, 2.0], [2.0, 8.0]], [[1.0, 0.0], [2.0, 2.0]])
    """

    def __init__(self, left: Tensor, right: Tensor, shape: Sequence[int]) -> None:
        self._left, self._right = promoted(left, right)
        self.num_samples = len(left)
        self.shape = torch.Size(shape)

    @property
    def kind(self) -> Hashable:
        """The shape, and how it is made."""
        _, G, _, r = self._left.shape
        return (Outer, self.shape, G, r)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The left and the right side."""
        return self._left, self._right

    def joined(self, tensors: Sequence[tuple[Tensor, ...]]) -> Outer:
        """Return the sum: the positions of one after those of the other."""
        left, right = (torch.cat(sides, dim=2) for sides in zip(*tensors, strict=True))
        return Outer(left, right, self.shape)

    def block(self, part: slice) -> Tensor:
        """Return the gradients by these rows of w, flattened."""
        r, c = self._left.shape[3], self._right.shape[3]
        start, stop = (edge * self.shape[1:].numel() for edge in (part.start, part.stop))
        found = [
            (self._left[:, groups, :, rows].mT @ self._right[:, groups]).flatten(1)
            for groups, rows in group_pieces(slice(start // c, -(-stop // c)), r)
        ]
        J = found[0] if len(found) == 1 else torch.cat(found, dim=1)
        return J[:, start % c : start % c + stop - start]

    def gram(self) -> Tensor:
        """Return the inner products <J_i, J_j>, by the cheaper side."""
        N, _, T, r = self._left.shape
        return self._gram_of_summands() if is_pairwise(N, T, r, self._right.shape[3]) else self._gram_of_gradients()

    def gram_after(self, latest: LatestRows) -> Tensor:
        """Return the inner products, and leave those of the left side where they are part of the work."""
        if self._left.shape[1] * self._left.shape[2] > 1:
            return self.gram()
        left = self._left[:, 0, 0]
        K, of_left = self._gram_of_rows(left)
        panel = _panel(len(K))
        latest.keep(left, of_left if panel == len(K) else mirrored(of_left, panel))
        return K

    def _gram_of_rows(self, left: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inner products, and those of the left side, the upper triangle of these for many samples."""
        right = self._right[:, 0, 0]
        N, panel = len(left), _panel(len(left))
        if panel == N:
            of_left = torch.mm(left, left.T)
            return torch.mm(right, right.T).mul_(of_left), of_left
        K, of_left = left.new_empty(N, N), left.new_empty(N, N)
        for columns in pieces(N, panel):
            rows = slice(0, columns.stop)
            A = torch.mm(left[rows], left[columns].T, out=of_left[rows, columns])
            torch.mul(A, torch.mm(right[rows], right[columns].T), out=K[rows, columns])
        return mirrored(K, panel), of_left

    def _gram_of_summands(self) -> Tensor:
        N, G, T, _ = self._left.shape
        if G == T == 1:
            return self._gram_of_rows(self._left[:, 0, 0])[0]
        sides = self._left.transpose(0, 1), self._right.transpose(0, 1)
        if sum(x.nbytes for x in sides) <= tiles.MAX_BYTES // 2:
            sides = sides[0].contiguous(), sides[1].contiguous()  # once, not block by block
        tile = tile_bytes(sides[0]) // (2 * T * T * sides[0].itemsize)  # pairs of samples
        K = sides[0].new_zeros(N, N)
        panel = min(max(N // 8, 256 // T), tile)
        for columns in pieces(N, panel):
            width = columns.stop - columns.start
            for groups in pieces(G, tile // width):
                for rows in pieces(columns.stop, tile // (width * (groups.stop - groups.start))):
                    A, B = (
                        torch.bmm(x[groups, rows].flatten(1, 2), x[groups, columns].flatten(1, 2).mT) for x in sides
                    )
                    pairs = A.mul_(B).view(len(A), -1, T, width * T).sum((0, 2))
                    K[rows, columns] += pairs.view(-1, width, T).sum(2)
        return mirrored(K, panel)

    def _gram_of_gradients(self) -> Tensor:
        left, right = self._left, self._right
        N, G, T, r = left.shape
        c = right.shape[3]
        total, scratch = GramSum(left, N), Scratch(left)
        of_group = N * left.itemsize * (r * c + (T * (r + c) if G > 1 else 0))  # several groups at once are copied
        for groups in pieces(G, tile_bytes(left) // of_group):
            for rows, columns in blocks(r, c, tile_bytes(left) // (N * left.itemsize)):
                a, b = left[:, groups, :, rows], right[:, groups, :, columns]
                J = scratch.take(N, a.shape[1], a.shape[3], b.shape[3])
                torch.bmm(a.flatten(0, 1).mT, b.flatten(0, 1), out=J.flatten(0, 1))
                total.add(J.view(N, -1))
        return total.value()

    def products(self, V: Tensor) -> Tensor:
        """Return the inner products <J_i, V_j> = Σ_t left_it · V_j right_it."""
        N, G, T, r = self._left.shape
        V = V.to(self._left.dtype).reshape(len(V), G, r, -1)
        result = self._left.new_empty(N, len(V))
        for samples in pieces(N, tile_bytes(V) // (G * T * r * V.itemsize)):
            left, right = (x[samples].transpose(0, 1).flatten(1, 2) for x in (self._left, self._right))
            for j, v in enumerate(V):
                result[samples, j] = torch.bmm(right, v.mT).mul_(left).view(G, -1, T * r).sum((0, 2))
        return result

    def combined(self, C: Tensor) -> Tensor:
        """Return the sums Σ_i C_ij J_i: for each j one product over all samples and positions."""
        N, G, T, r = self._left.shape
        c = self._right.shape[3]
        C = C.to(self._left.dtype)
        result = C.new_zeros(C.shape[1], G, r, c)
        for samples in pieces(N, tile_bytes(C) // (G * T * (r + c) * C.itemsize)):
            right = self._right[samples].transpose(0, 1).flatten(1, 2)
            for j, weights in enumerate(C[samples].T):
                left = (self._left[samples] * weights[:, None, None, None]).transpose(0, 1)
                result[j].baddbmm_(left.flatten(1, 2).mT, right)
        return result.view(-1, *self.shape)


def is_pairwise(num_samples: int, num_positions: int, rows: int, columns: int) -> bool:
    """Say whether inner products of summands are cheaper than those of gradients, each by half of all pairs."""
    summands = num_samples * num_positions**2 * (rows + columns + _ENTRY)
    return summands < (2 * num_positions + num_samples) * rows * columns


def _panel(num_samples: int) -> int:
    """Return how many columns of the Gram matrix of vectors to compute together: of few vectors all."""
    return num_samples if num_samples < 192 else max(64, num_samples // 8)

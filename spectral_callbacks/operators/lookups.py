"""Gradients by the weights of embeddings."""

from __future__ import annotations

import bisect
import dataclasses
import operator
from collections.abc import Hashable, Iterator, Sequence
from typing import final

import torch
from torch import Tensor

from spectral_callbacks.operators import tiles
from spectral_callbacks.operators.factors import Factor
from spectral_callbacks.operators.tiles import GramSum, Scratch, pieces, promoted, tile_bytes

_SCATTER = 64  # operations that adding one number to a place named by an index costs


@final
class Lookup(Factor):
    """Gradients by a table of V rows of which each sample looks up T: the gradients of equal tokens add up.

    Two samples share only the tokens that both hold. Tokens that many samples hold are laid out sample by sample and
    multiplied; of those that few hold, only the pairs that there are: never more than N² operations an entry of the
    rows that occur, and for most texts far less.

    Args:
        indices: (N, T), which rows.
        gradient: (N, T, w), by what was looked up.
        shape: Of the table, (V, w).
        padding_idx: The row without gradient; None or a negative number if there is none.

    Example:
        >>> import torch
        >>> indices = torch.tensor([[0, 2, 2], [2, 1, 1]])
        >>> Lookup(indices, torch.ones(2, 3, 1), (3, 1)).gram().tolist()
        [[5.0, 2.0], [2.0, 5.0]]
    """

    def __init__(self, indices: Tensor, gradient: Tensor, shape: Sequence[int], padding_idx: int | None = None) -> None:
        self._indices = indices.long()
        (self._gradient,) = promoted(gradient)
        self.num_samples = len(indices)
        self.shape = torch.Size(shape)
        self._padding = -1 if padding_idx is None else max(-1, padding_idx)

    @property
    def kind(self) -> Hashable:
        """The shape and the row without gradient."""
        return (Lookup, self.shape, self._padding)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The indices and the gradient."""
        return self._indices, self._gradient

    def joined(self, tensors: Sequence[tuple[Tensor, ...]]) -> Lookup:
        """Return the sum: the lookups of one after those of the other."""
        indices, gradient = (torch.cat(positions, dim=1) for positions in zip(*tensors, strict=True))
        return Lookup(indices, gradient, self.shape, self._padding)

    def block(self, part: slice) -> Tensor:
        """Return the gradients by these rows of w, flattened."""
        N, rows, width = self.num_samples, part.stop - part.start, self.shape[1]
        J = self._gradient.new_zeros(N * rows, width)
        inside = (self._indices >= part.start) & (self._indices < part.stop) & (self._indices != self._padding)
        samples, positions = inside.nonzero(as_tuple=True)
        places = samples * rows + self._indices[samples, positions] - part.start
        for some in pieces(len(places), tile_bytes(J) // (width * J.itemsize)):
            J.index_add_(0, places[some], self._gradient[samples[some], positions[some]])
        return J.view(N, -1)

    def gram(self) -> Tensor:
        """Return the inner products <J_i, J_j>."""
        N, T, width = self._gradient.shape
        samples = torch.arange(N, device=self._indices.device)[:, None]
        keys, entries = torch.unique(self._indices * N + samples, return_inverse=True)
        held = _Held.of(keys, N, self._padding)
        is_common = held.counts**2 * (width + _SCATTER) > N**2 * width
        num_common = int(is_common.sum())  # the largest come first
        common, rare = held.part(slice(0, num_common)), held.part(slice(num_common, None))
        total, scratch = GramSum(self._gradient, N), Scratch(self._gradient)
        pairs = self._gradient.new_zeros(N * N)
        for columns in pieces(width, tiles.MAX_BYTES // 4 // (N * T * self._gradient.itemsize)):
            some = self._gradient[:, :, columns].flatten(0, 1)
            gradient = some.new_zeros(len(keys), some.shape[1]).index_add_(0, entries.flatten(), some)
            tile = tile_bytes(gradient) // gradient.itemsize
            for part in pieces(num_common, tile // (N * gradient.shape[1])):
                tokens, places = common.part(part).entries()
                J = scratch.take(N, part.stop - part.start, gradient.shape[1]).zero_()
                J[held.samples[places], tokens] = gradient[places]
                total.add(J.flatten(1))
            for part in rare.alike(tile // 4, gradient.shape[1]):
                places, is_there = rare.part(part).grid()
                found = gradient[places].mul_(is_there[:, :, None])
                where = held.samples[places]
                where = where[:, :, None] * N + where[:, None, :]
                pairs.index_add_(0, where.flatten(), torch.bmm(found, found.mT).flatten())
        return pairs.view(N, N).add_(total.value())

    def products(self, V: Tensor) -> Tensor:
        """Return the inner products <J_i, V_j>: of the gradient and what is looked up in V_j."""
        N, T, width = self._gradient.shape
        V = V.to(self._gradient.dtype)
        result = self._gradient.new_empty(N, len(V))
        for samples in pieces(N, tile_bytes(V) // (T * width * V.itemsize)):
            indices, gradient = self._indices[samples], self._gradient[samples]
            is_padding = indices == self._padding
            for j, v in enumerate(V):
                along = v[indices].mul_(gradient).sum(2)
                result[samples, j] = along.masked_fill_(is_padding, 0).sum(1)
        return result

    def combined(self, C: Tensor) -> Tensor:
        """Return the sums Σ_i C_ij J_i."""
        N, T, width = self._gradient.shape
        C = C.to(self._gradient.dtype)
        result = C.new_zeros(C.shape[1], *self.shape)
        for samples in pieces(N, tile_bytes(C) // (T * width * C.itemsize)):
            indices, gradient = self._indices[samples].flatten(), self._gradient[samples]
            for j, weights in enumerate(C[samples].T):
                result[j].index_add_(0, indices, (gradient * weights[:, None, None]).flatten(0, 1))
        if self._padding >= 0:
            result[:, self._padding] = 0
        return result


@dataclasses.dataclass(frozen=True)
class _Held:
    """Which samples hold which tokens: entries, a sample that holds a token, in the order of tokens.

    Attributes:
        samples: (E,), of the entries.
        firsts: (U,), the first entry of each token.
        counts: (U,), how many samples hold it, the most first.
    """

    samples: Tensor
    firsts: Tensor
    counts: Tensor

    @classmethod
    def of(cls, keys: Tensor, num_samples: int, padding: int) -> _Held:
        tokens, counts = torch.unique_consecutive(keys // num_samples, return_counts=True)
        firsts = counts.cumsum(0) - counts
        counts, order = counts.masked_fill(tokens == padding, 0).sort(descending=True)
        there = int(counts.count_nonzero())
        return cls(keys % num_samples, firsts[order[:there]], counts[:there])

    def part(self, tokens: slice) -> _Held:
        return _Held(self.samples, self.firsts[tokens], self.counts[tokens])

    def alike(self, most: int, width: int) -> Iterator[slice]:
        """Yield tokens whose counts differ by less than a factor of two, and whose entries and pairs fit a tile."""
        counts = self.counts.tolist()
        start = 0
        while start < len(counts):
            largest = counts[start]
            alike = bisect.bisect_left(counts, -(largest // 2), key=operator.neg) - start
            stop = start + max(1, min(alike, most // (largest * max(width, 3 * largest))))
            yield slice(start, stop)
            start = stop

    def grid(self) -> tuple[Tensor, Tensor]:  # (U, largest), (U, largest)
        """Return the entries of each token, filled up with the first, and which of them are its own."""
        numbers = torch.arange(int(self.counts[0]), device=self.counts.device)
        is_there = numbers < self.counts[:, None]
        return self.firsts[:, None] + numbers * is_there, is_there

    def entries(self) -> tuple[Tensor, Tensor]:  # (E,), (E,)
        """Return the token's number and the entry, of all entries."""
        grid, is_there = self.grid()
        return is_there.nonzero(as_tuple=True)[0], grid[is_there]

"""Gradients by the weights of convolutions."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from spectral_callbacks.operators import tiles
from spectral_callbacks.operators.factors import Factor
from spectral_callbacks.operators.outer_products import Outer, is_pairwise
from spectral_callbacks.operators.tiles import GramSum, Scratch, blocks, group_pieces, pieces, promoted, tile_bytes

_CONVOLVE = (F.conv1d, F.conv2d, F.conv3d)
_BY_WEIGHT: tuple[Callable[..., Tensor], ...] = (conv1d_weight, conv2d_weight, conv3d_weight)


@final
class Convolution(Factor):
    """Gradients by the weight of a convolution in one, two or three dimensions: outer products over its positions.

    The windows of the input are laid out for a few samples and channels at a time and used up at once, or for all of
    them where these fit and inner products of summands are cheaper (`Outer`). Products and combinations are
    convolutions and need no windows. A transposed convolution is one of its output's gradient, with its input as the
    gradient.

    Args:
        input: (N, B, C_in, *space), B images a sample.
        gradient: (N, B, C_out, *out), by the outputs.
        shape: Of the weight, (C_out, C_in / groups, *kernel).
        stride: One number, or one for each dimension; as all that follow.
        padding: With zeros, on either side.
        dilation: Of the kernel.
        groups: Of channels.

    Example:
        >>> import torch
        >>> signal, gradient = torch.tensor([[[[1.0, 2.0, 3.0]]]]), torch.tensor([[[[1.0, 10.0]]]])
        >>> Convolution(signal, gradient, (1, 1, 2)).block(slice(0, 1)).tolist()
        [[21.0, 32.0]]
    """

    def __init__(
        self,
        input: Tensor,
        gradient: Tensor,
        shape: Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> None:
        self._input, self._gradient = promoted(input, gradient)
        self.num_samples = len(input)
        self.shape = torch.Size(shape)
        self._kernel = self.shape[2:]
        self._stride, self._padding, self._dilation = (self._each(x) for x in (stride, padding, dilation))
        self._groups = groups

    @property
    def kind(self) -> Hashable:
        """The shapes and the geometry."""
        spaces = self._input.shape[3:], self._gradient.shape[3:]
        return (Convolution, self.shape, *spaces, self._stride, self._padding, self._dilation, self._groups)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The input and the gradient."""
        return self._input, self._gradient

    def joined(self, tensors: Sequence[tuple[Tensor, ...]]) -> Convolution:
        """Return the sum: the images of one after those of the other."""
        input, gradient = (torch.cat(images, dim=1) for images in zip(*tensors, strict=True))
        return Convolution(input, gradient, self.shape, *self._geometry)

    def block(self, part: slice) -> Tensor:
        """Return the gradients by these rows of w, flattened."""
        channels, per_group = slice(0, self.shape[1]), self.shape[0] // self._groups
        found: list[Tensor] = []
        scratch = Scratch(self._input)
        for groups, rows in group_pieces(part, per_group):
            size = (groups.stop - groups.start, rows.stop - rows.start, self.shape[1:].numel())
            J = self._gradient.new_empty(self.num_samples, *size)
            self._fill(J, scratch, groups, rows, channels)
            found.append(J.flatten(1))
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def gram(self) -> Tensor:
        """Return the inner products <J_i, J_j>, by the cheaper side."""
        N, B = self._input.shape[:2]
        dim = len(self._kernel)
        T, r = self._gradient.shape[3:].numel(), self.shape[0] // self._groups
        if B == 1 and self._is_pointwise:
            return self._outer(self._input.reshape(N, self._groups, -1, T).mT).gram()
        num_windows = N * B * T * self._groups * self.shape[1:].numel()
        fits = num_windows * self._input.itemsize <= tiles.MAX_BYTES // 2
        if fits and is_pairwise(N, B * T, r, self.shape[1:].numel()):
            sizes = N, B, self._groups, self.shape[1], self._gradient.shape[3]
            windows = self._windows(*(slice(0, n) for n in sizes)).movedim(3, dim + 3).movedim(1, 2)
            return self._outer(windows.reshape(N, self._groups, B * T, -1)).gram()
        return self._gram_of_gradients(r)

    def products(self, V: Tensor) -> Tensor:
        """Return the inner products <J_i, V_j>: of the gradient and the input's convolution with V_j."""
        convolve = _CONVOLVE[len(self._kernel) - 1]
        V = V.to(self._input.dtype)
        result = self._input.new_empty(self.num_samples, len(V))
        for samples in pieces(self.num_samples, tile_bytes(V) // self._gradient[0].nbytes):
            images, gradient = self._input[samples].flatten(0, 1), self._gradient[samples]
            for j, v in enumerate(V):
                outputs = convolve(images, v, None, *self._geometry).view_as(gradient)
                result[samples, j] = outputs.mul_(gradient).flatten(1).sum(1)
        return result

    def combined(self, C: Tensor) -> Tensor:
        """Return the sums Σ_i C_ij J_i: for each j one gradient by the weight."""
        by_weight = _BY_WEIGHT[len(self._kernel) - 1]
        C = C.to(self._input.dtype)
        result = C.new_zeros(C.shape[1], *self.shape)
        for samples in pieces(self.num_samples, tiles.MAX_BYTES // 8 // self._gradient[0].nbytes):
            images, gradient = self._input[samples].flatten(0, 1), self._gradient[samples]
            for j, weights in enumerate(C[samples].T):
                weighted = (gradient * weights.view(-1, *[1] * (gradient.dim() - 1))).flatten(0, 1)
                result[j] += by_weight(images, self.shape, weighted, *self._geometry)
        return result

    @property
    def _geometry(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
        return self._stride, self._padding, self._dilation, self._groups

    @property
    def _is_pointwise(self) -> bool:
        return self._kernel.numel() == 1 and set(self._stride) == {1} and set(self._padding) == {0}

    def _each(self, number: int | Sequence[int]) -> tuple[int, ...]:
        sizes = (number,) if isinstance(number, int) else tuple(number)
        return sizes * len(self._kernel) if len(sizes) == 1 else sizes

    def _outer(
        self,
        windows: Tensor,  # (N, G, T, c)
    ) -> Outer:
        N, G, T = windows.shape[:3]
        gradient = self._gradient.unflatten(2, (G, -1)).movedim(1, 3).reshape(N, G, -1, T)
        return Outer(gradient.mT, windows, self.shape)

    def _gram_of_gradients(self, per_group: int) -> Tensor:
        total = GramSum(self._gradient, self.num_samples)
        scratch, gradients = Scratch(self._input), Scratch(self._input)
        area = self._kernel.numel()
        most = tile_bytes(self._input) // (self.num_samples * self._input.itemsize)
        for groups in pieces(self._groups, most // (per_group * self.shape[1] * area)):
            for rows, channels in blocks(per_group, self.shape[1], most, area):
                size = (groups.stop - groups.start, rows.stop - rows.start, (channels.stop - channels.start) * area)
                J = gradients.take(self.num_samples, *size)
                self._fill(J, scratch, groups, rows, channels)
                total.add(J.flatten(1))
        return total.value()

    def _fill(
        self,
        J: Tensor,  # (N, G, r, c), contiguous
        scratch: Scratch,
        groups: slice,
        rows: slice,
        channels: slice,
    ) -> None:
        """Write the gradients by these entries of the weight."""
        left = self._gradient.unflatten(2, (self._groups, -1))[:, :, groups, rows]
        dim = len(self._kernel)
        order = (0, 2, 3, *range(4 + dim, 4 + 2 * dim), 1, *range(4, 4 + dim))  # groups, entries, then positions
        for samples, images, lines in self._windowed(J[0, :, 0].numel()):
            windows = self._windows(samples, images, groups, channels, lines).permute(order)
            windows = (
                scratch.take(*windows.shape).copy_(windows).view(-1, J.shape[3], windows.shape[-dim - 1 :].numel())
            )
            gradient = left[samples, images].narrow(4, lines.start, lines.stop - lines.start).movedim(1, 3)
            gradient = gradient.reshape(-1, J.shape[2], windows.shape[2])
            is_first = images.start == lines.start == 0
            J[samples].flatten(0, 1).baddbmm_(gradient, windows.mT, beta=0 if is_first else 1)

    def _windowed(self, num_entries: int) -> Iterator[tuple[slice, slice, slice]]:
        """Yield samples, images and lines of positions such that so many window entries at each of them fill a tile."""
        out = self._gradient.shape[3:]
        of_line = num_entries * out[1:].numel() * self._input.itemsize
        tile = tile_bytes(self._input)
        for samples in pieces(self.num_samples, tile // (of_line * out[0] * self._input.shape[1])):
            for images in pieces(self._input.shape[1], tile // (of_line * out[0])):
                for lines in pieces(out[0], tile // of_line):
                    yield samples, images, lines

    def _windows(
        self, samples: slice, images: slice, groups: slice, channels: slice, lines: slice
    ) -> Tensor:  # (N, B, G, c, *out, *kernel)
        """View the entries of the input that each entry of the kernel meets at each position."""
        out = [range(lines.start, lines.stop), *map(range, self._gradient.shape[4:])]
        spans = [d * (k - 1) + 1 for d, k in zip(self._dilation, self._kernel, strict=True)]
        starts = [o[0] * s - p for o, s, p in zip(out, self._stride, self._padding, strict=True)]
        sizes = [(len(o) - 1) * s + span for o, s, span in zip(out, self._stride, spans, strict=True)]
        source = tuple(slice(max(0, a), max(0, a + n)) for a, n in zip(starts, sizes, strict=True))
        input = self._input[samples, images].unflatten(2, (self._groups, -1))[(..., groups, channels, *source)]
        if input.shape[4:] != torch.Size(sizes):
            firsts = [min(n, max(0, -a)) for a, n in zip(starts, sizes, strict=True)]
            target = tuple(slice(f, f + n) for f, n in zip(firsts, input.shape[4:], strict=True))
            padded = input.new_zeros(*input.shape[:4], *sizes)
            padded[(..., *target)] = input
            input = padded
        for axis, (span, stride, dilation) in enumerate(zip(spans, self._stride, self._dilation, strict=True), start=4):
            input = input.unfold(axis, span, stride)[..., ::dilation]
        return input

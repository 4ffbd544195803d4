"""First to fourth moments of features that come in batches, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from spectral_callbacks.metrics.representations.row_sample import RowSample
from spectral_callbacks.metrics.representations.spectrum import CovarianceSide, FeatureSpectrum, GramSide

_BLOCK = 1024  # rows or columns that are widened to float64 at a time
_FOURTH = 1e-280, 1e280  # with room for sums and products with numbers of samples
_SEED = 0x5EED  # of the rows that the errors of one-shot features come from


class FeatureMoments:
    """Collects batches of features (n_b, d), and returns the spectrum of all n rows.

    Up to n = max(d, num_kept), all rows are held in their own dtype, halves as float32. Beyond, what is held is, in
    float64, the mean, the (d, d) centred second moment, and the sums of |x - x̄|² (x - x̄) and of |x - x̄|⁴, merged
    batch by batch (Chan, Golub and LeVeque 1983), which loses no digits to a large mean. Beside them are kept
    `num_kept` of the rows. That is d² + num_kept · d numbers whatever n; their decomposition takes some 4 d² more. The
    spectrum depends on the batch sizes by rounding only.

    Everything stays on the features' device, except on Apple's, which has no float64.

    Args:
        num_kept: Rows of the random sample that `rows` returns, and that errors come from where n > d.
        generator: Of that sample, on the CPU. With the same seed and order, the same rows are taken whatever the
            features and the batch sizes: in every layer, at every measurement.

    Example:
        >>> moments = FeatureMoments(generator=torch.Generator().manual_seed(0))
        >>> for batch in torch.eye(6).split(4):
        ...     moments.update(batch)
        >>> moments.num_samples, moments.spectrum().eigenvalues  # (I - 11ᵀ/6)/6
        (6, tensor([0.1667, 0.1667, 0.1667, 0.1667, 0.1667], dtype=torch.float64))
    """

    def __init__(self, num_kept: int = 1024, *, generator: torch.Generator) -> None:
        if num_kept < 2:
            raise ValueError(f"num_kept={num_kept!r} must be at least 2, for example 1024.")
        self._num_kept, self._sample = num_kept, RowSample(num_kept, generator=generator)
        self._num_samples = self._num_features = 0
        self._origin = torch.empty(0, dtype=torch.float64)  # the first row
        self._held: list[Tensor] = []
        self._sums: _Sums | None = None  # of what is no longer held

    @property
    def num_samples(self) -> int:
        """n, rows seen so far."""
        return self._num_samples

    def update(
        self,
        batch: Tensor,  # (n_b, d)
    ) -> None:
        """Add a batch of features.

        Raises:
            ValueError: If it is no matrix of floating-point numbers, has another d than the batches before, or a row
                that is not finite. Nothing of it is added then.
        """
        batch = self._checked(batch.detach())
        if not len(batch):
            return
        if not self._num_samples:
            self._num_features, self._origin = batch.shape[1], batch[0].double()
        self._num_samples += len(batch)
        self._sample.update(batch)
        if self._sums is None and self._num_samples <= max(self._num_features, self._num_kept):
            self._held.append(batch.clone())
        else:
            self._sums = self._summed([*self._held, batch])
            self._held = []

    def rows(self) -> Tensor:  # (min(n, num_kept), d)
        """Return the random sample of the rows, in the order they came; all of them up to num_kept."""
        return self._sample.rows

    def spectrum(self) -> FeatureSpectrum:
        """Return the spectrum of the rows seen so far; it decomposes itself when used, in some min(n, d)³ operations.

        Raises:
            ValueError: If there are fewer than two samples, or all are the same, or differ by more than 1e70 or less
                than 1e-70.
        """
        if self._num_samples < 2:
            raise ValueError(
                f"{self._num_samples} samples: a single sample has no covariance; add at least 2, better 4 times the "
                "number of features."
            )
        if self._num_samples <= self._num_features:
            side = self._gram_side()
            own = side.gram.diagonal()
            variance, fourth = own.mean().item(), own.square().mean().item()
        else:
            sums = self._sums or self._summed(self._held)
            side = CovarianceSide(sums.second / sums.count, sums.mean + self._origin, self.rows(), sums.count)
            variance, fourth = sums.second.trace().item() / sums.count, sums.fourth / sums.count
        if not variance > 0:
            raise ValueError(
                f"the features are constant: all {self._num_samples} samples have the same; the layer may be dead, or "
                "collapsed."
            )
        if not _FOURTH[0] < fourth < _FOURTH[1]:
            raise ValueError(
                f"the features deviate by {math.sqrt(variance):.1g} from their mean; fourth powers of that do not fit "
                "into float64; divide all by the largest."
            )
        return FeatureSpectrum(side, self._num_samples, self._num_features, fourth)

    def _checked(self, batch: Tensor) -> Tensor:
        if batch.ndim != 2 or not batch.shape[1] or not batch.is_floating_point():
            raise ValueError(
                f"features have shape {tuple(batch.shape)} and type {batch.dtype}; pass one row of real features for "
                "each sample, (n, d)."
            )
        if self._num_samples and batch.shape[1] != self._num_features:
            raise ValueError(
                f"a batch with d={batch.shape[1]} features after one with {self._num_features}; pass one layer's only."
            )
        broken = int((~batch.isfinite().all(1)).sum())
        if broken:
            raise ValueError(
                f"{broken} of {len(batch)} rows of features are not finite; look for NaN or infinity in the weights, "
                "the batch or the layer."
            )
        if batch.device.type == "mps":
            batch = batch.cpu()
        return batch.float() if batch.dtype.itemsize < 4 else batch

    def _summed(self, batches: Iterable[Tensor]) -> _Sums:
        """Return the sums with more batches in them, of the rows less the first one: constant ones add up to 0."""
        sums = self._sums or _Sums(self._num_features, self._origin.device)
        for batch in batches:
            for block in batch.split(_BLOCK):
                sums.add(block.double() - self._origin)
        return sums

    def _gram_side(self) -> GramSide:
        n, origin = self._num_samples, self._origin
        gram, along_mean, squared_mean = origin.new_zeros(n, n), origin.new_zeros(n), 0.0
        for start in range(0, self._num_features, _BLOCK):
            columns = slice(start, start + _BLOCK)
            rows = torch.cat([batch[:, columns] for batch in self._held]).double() - origin[columns]
            mean = rows.mean(0)
            rows -= mean
            mean += origin[columns]
            gram.addmm_(rows, rows.mT)
            along_mean.addmv_(rows, mean)
            squared_mean += (mean @ mean).item()
        return GramSide(gram, along_mean, squared_mean)


class _Sums:
    """Sums over rows x, with y = x - x̄: their number, x̄, Σ y yᵀ, Σ |y|² y and Σ |y|⁴."""

    def __init__(self, num_features: int, device: torch.device) -> None:
        zero = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.count, self.mean = 0, zero
        self.second = zero.new_zeros(num_features, num_features)
        self.third, self.fourth = zero, 0.0

    def add(
        self,
        rows: Tensor,  # (b, d), float64
    ) -> None:
        """Add some rows."""
        mean = rows.mean(0)
        y = rows - mean
        squares = y.square().sum(1)
        gap, total = mean - self.mean, self.count + len(rows)
        moved, back = gap * (len(rows) / total), gap * (-self.count / total)  # from either mean to the common one
        ours = _about(moved, self.count, self.second @ moved, self.second.trace(), self.third, self.fourth)
        theirs = _about(back, len(rows), y.mT @ (y @ back), squares.sum(), squares @ y, (squares @ squares).item())
        self.third, self.fourth = ours[0] + theirs[0], ours[1] + theirs[1]
        self.second.addmm_(y.mT, y).addr_(gap, gap, alpha=self.count * len(rows) / total)
        self.mean, self.count = self.mean + moved, total


def _about(
    shift: Tensor,  # (d,)
    count: int,
    second: Tensor,  # Σ y yᵀ shift, (d,)
    trace: Tensor,  # Σ |y|², ()
    third: Tensor,  # Σ |y|² y, (d,)
    fourth: float,  # Σ |y|⁴
) -> tuple[Tensor, float]:
    """Return Σ |z|² z and Σ |z|⁴ of z = y - shift, where Σ y = 0."""
    square = shift @ shift
    moved = fourth + (4 * shift @ second + count * square**2 - 4 * shift @ third + 2 * square * trace).item()
    return third - 2 * second - (trace + count * square) * shift, moved


def feature_spectrum(
    features: Tensor,  # (n, d)
) -> FeatureSpectrum:
    """Return the spectrum of features that are all at hand.

    The rows that its errors come from, where n > d, are 1,024 taken with a fixed seed.

    Args:
        features: One row a sample, of any floating-point type.

    Raises:
        ValueError: If they are no matrix, not finite or constant, or a single sample.

    Example:
        >>> feature_spectrum(torch.eye(4)).eigenvalues
        tensor([0.2500, 0.2500, 0.2500], dtype=torch.float64)
    """
    moments = FeatureMoments(generator=torch.Generator().manual_seed(_SEED))
    moments.update(features)
    return moments.spectrum()

"""Readings: what a diagnostic returns for each of its tags."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

_NUM_BINS = 60


class Picture(abc.ABC):
    """A reading that is more than a number: TensorBoard alone can show it."""

    @abc.abstractmethod
    def write(self, writer: SummaryWriter, tag: str, step: int) -> None:
        """Write it to TensorBoard."""


@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum(Picture):
    """Eigenvalues with weights, drawn as a histogram on a signed logarithmic axis.

    The axis is x = sign(λ) log10(1 + |λ| / linear_below): linear around 0, one unit a decade further out. The height of
    a bin is log10(1 + number of eigenvalues in it), so that a single outlier is seen beside a bulk of a million.

    Attributes:
        values: (m,), eigenvalues, or the nodes of a quadrature.
        weights: (m,), the share of the spectrum at each; they sum to 1.
        num_eigenvalues: How many eigenvalues the whole spectrum has.
        linear_below: |λ| up to which the axis is linear, in the unit of the eigenvalues.

    Raises:
        ValueError: If there is no eigenvalue, or one is not finite, or not every one has a weight.

    Example:
        >>> spectrum = Spectrum(torch.tensor([-1.0, 0.0, 9.0]), torch.full((3,), 1 / 3), 3, linear_below=1.0)
        >>> edges, heights = spectrum.histogram()
        >>> round(edges[-1].item(), 3), round(heights.sum().item(), 3)  # 3 log10 2
        (1.0, 0.903)
    """

    values: Tensor
    weights: Tensor
    num_eigenvalues: int
    linear_below: float

    def __post_init__(self) -> None:
        if self.values.ndim != 1 or not len(self.values) or self.values.shape != self.weights.shape:
            raise ValueError(
                f"a spectrum of values {tuple(self.values.shape)} and weights {tuple(self.weights.shape)}: pass one "
                "weight for each of at least one value."
            )
        if not self.values.isfinite().all() or not self.weights.isfinite().all():
            raise ValueError("a spectrum holds numbers that are not finite; leave it out of what is returned.")
        check_axis(self.linear_below)

    def histogram(self) -> tuple[Tensor, Tensor]:  # (b + 1,), (b,)
        """Return the edges of the bins on the signed logarithmic axis, and their heights."""
        values = self.values.detach().to("cpu", torch.float64)
        x = values.sign() * torch.log10(1 + values.abs() / self.linear_below)
        low, high = x.min().item(), x.max().item()
        if low == high:
            low, high = low - 0.5, high + 0.5
        edges = torch.linspace(low, high, _NUM_BINS + 1, dtype=torch.float64)
        bins = torch.bucketize(x, edges[1:-1], right=True)
        mass = torch.zeros(_NUM_BINS, dtype=torch.float64).index_add_(0, bins, self.weights.to("cpu", torch.float64))
        return edges, torch.log10(1 + mass.clamp_min(0) * self.num_eigenvalues)

    def points(self) -> Tensor:  # (m, 2)
        """Return eigenvalues and weights side by side, unrounded."""
        return torch.stack([self.values, self.weights], dim=1).detach().cpu()

    def write(self, writer: SummaryWriter, tag: str, step: int) -> None:
        """Write a histogram under the tag, and under `<tag>_points` a tensor of eigenvalues and weights."""
        edges, heights = self.histogram()
        centers = (edges[:-1] + edges[1:]) / 2
        writer.add_histogram_raw(
            tag,
            min=edges[0].item(),
            max=edges[-1].item(),
            num=heights.sum().item(),
            sum=(heights @ centers).item(),
            sum_squares=(heights @ centers.square()).item(),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=heights.tolist(),
            global_step=step,
        )
        writer.add_tensor(f"{tag}_points", self.points(), step)


@dataclasses.dataclass(frozen=True)
class Text(Picture):
    """Words about a step, as TensorBoard's text tab shows them.

    Attributes:
        words: Markdown.
    """

    words: str

    def write(self, writer: SummaryWriter, tag: str, step: int) -> None:
        """Write the words."""
        writer.add_text(tag, self.words, step)


@dataclasses.dataclass(frozen=True, eq=False)
class Embedding(Picture):
    """Points with labels, as TensorBoard's projector shows them.

    Attributes:
        points: (n, d).
        labels: A word for each point; none if empty.
    """

    points: Tensor
    labels: Sequence[str] = ()

    def write(self, writer: SummaryWriter, tag: str, step: int) -> None:
        """Write the points, to be looked at in the projector's tab."""
        writer.add_embedding(self.points, list(self.labels) or None, global_step=step, tag=tag)


def check_axis(linear_below: float) -> None:
    """Raise unless the axis has a linear part.

    Raises:
        ValueError: Naming the number.
    """
    if not linear_below > 0:
        raise ValueError(f"linear_below={linear_below} must be a positive eigenvalue, for example 1e-3.")


Reading = float | Picture

"""Self-report: what an optimizer tells of its last step, over all its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from spectral_callbacks.callbacks.reading import Reading, Spectrum
from spectral_callbacks.metrics.update import whole

_MOST_ENTRIES = 1 << 20  # that quantiles are taken of
_QUANTILES = (5, 50, 95)  # per cent
_NUM_POINTS = 256  # of a histogram
_Q = [percent / 100 for percent in _QUANTILES] + [(i + 0.5) / _NUM_POINTS for i in range(_NUM_POINTS)]


@dataclasses.dataclass(frozen=True)
class SelfReport:
    """One diagnostic of an optimizer.

    Attributes:
        name: That the optimizer gives it.
        values: One tensor a parameter: a scalar, or one value an entry.
        layers: Of those parameters.
    """

    name: str
    values: list[Tensor]
    layers: list[str]

    @property
    def is_entrywise(self) -> bool:
        """Whether there is a value for each entry."""
        return any(value.ndim for value in self.values)

    def mean(self, layer: str | None = None) -> float:
        """Return the mean over all values, or over those of a layer."""
        values = [v for v, own in zip(self.values, self.layers, strict=True) if layer is None or own == layer]
        totals = torch.stack([v.sum(dtype=torch.float64).cpu() for v in values])
        return totals.sum().item() / sum(v.numel() for v in values)

    def entries(self, seed: int) -> Tensor:  # (e,)
        """Return all values, or of a million or more about a million, drawn with replacement in proportion."""
        total = sum(v.numel() for v in self.values)
        drawn = []
        for value in (v.reshape(-1) for v in self.values):
            if total > _MOST_ENTRIES:
                generator = torch.Generator(value.device).manual_seed(seed)
                size = (-(-_MOST_ENTRIES * len(value) // total),)
                value = value[torch.randint(len(value), size, generator=generator, device=value.device)]
            drawn.append(value.to("cpu", torch.float64))
        return torch.cat(drawn)

    def readings(self, tag: str, *, seed: int, linear_below: float) -> dict[str, Reading]:
        """Return the mean, and of a diagnostic with a value for each entry quantiles and a histogram.

        Args:
            tag: Of the mean; the others begin with it.
            seed: Of the entries that are drawn.
            linear_below: Of the histogram.
        """
        found: dict[str, Reading] = {tag: self.mean()}
        if not self.is_entrywise:
            return found
        entries = self.entries(seed)
        values = torch.quantile(entries, entries.new_tensor(_Q))
        for percent, value in zip(_QUANTILES, values.tolist(), strict=False):
            found[f"{tag}_q{percent:02d}"] = value
        points = values[len(_QUANTILES) :]
        if points.isfinite().all():
            weights = torch.full_like(points, 1 / _NUM_POINTS)
            found[f"{tag}_entries"] = Spectrum(points, weights, len(entries), linear_below)
        return found


def gather(told: Mapping[Tensor, Mapping[str, Tensor]], layers: Mapping[Tensor, str]) -> list[SelfReport]:
    """Return what an optimizer tells, one diagnostic at a time.

    Args:
        told: Parameter -> name -> value.
        layers: Parameter -> name of its layer.
    """
    found: dict[str, SelfReport] = {}
    for parameter, diagnostics in told.items():
        for name, value in diagnostics.items():
            if not value.numel():
                continue
            one = found.setdefault(name, SelfReport(name, [], []))
            one.values.append(whole(value.detach()))
            one.layers.append(layers[parameter])
    return list(found.values())

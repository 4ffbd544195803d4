"""FactorImbalance: matrices that are trained as products, and whether balance slows them down."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl

from spectral_callbacks.callbacks.attempts import Attempts
from spectral_callbacks.callbacks.base import SpectralCallback
from spectral_callbacks.callbacks.factor_pairs import FactorPair, find_pairs, named_parameters
from spectral_callbacks.callbacks.findings import Findings
from spectral_callbacks.callbacks.reading import Reading
from spectral_callbacks.callbacks.refusals import refusal_of_loss
from spectral_callbacks.linalg import Estimate, Status
from spectral_callbacks.metrics.factor_imbalance import (
    apparent_rank,
    excess_energy,
    imbalance,
    product_singular_values,
    rate_exponent,
)
from spectral_callbacks.probe import Probe
from spectral_callbacks.tags import Chart

_DECADE = 10.0  # how far back a rate looks, as a ratio of steps
_SPACING = 1.05  # ratio of the steps of two points that are kept for it
_FEWEST = 5  # points of a slope


class FactorImbalance(SpectralCallback):
    """Products W = F Gᵀ of trained factors, such as LoRA's: their imbalance, and the part that a target does not need.

    Gradient descent on F and G conserves the imbalance FᵀF - GᵀG to first order. With more columns than the rank of
    what is to be learned, balanced factors lose their superfluous part at 1/t² only, at a rate that does not depend on
    how small they began; unequal factors lose it exponentially (Xiong et al. 2024, arXiv:2310.01769). The remedy is one
    step: `spectral_callbacks.init.rebalance_` makes F orthogonal and leaves the product as it is.

    Tags, for each pair: `imbalance/frobenius/<pair>` = ‖FᵀF - GᵀG‖ in the Frobenius norm, in units of the weights
    squared; `imbalance/excess_energy/<pair>` = Σ s_i² over the singular values of F Gᵀ beyond `rank`, or beyond where
    they fall most, and then `imbalance/rank/<pair>`, how many those are; `imbalance/rate_exponent/<pair>`, the slope of
    log excess energy against log step over the last decade of steps, and `imbalance/rate_exponent_error/<pair>`, its
    standard error. Of the whole network, where its loss can be run: `imbalance/rate_exponent`, the same slope of the
    loss, and `imbalance/rate_exponent_error`. Slopes need five looks at least 5 % of the steps apart, and a resumed run
    begins them anew; the errors are those of independent deviations from a line. `imbalance/status` (0 fine, 2 a
    failure that was reported, 3 not finite).

    How to read it: an exponent of -2 that stays, with an excess energy far above rounding, is the curse: rebalance. An
    exponent that falls on and on is exponential convergence, 0 is a floor. An imbalance that moves is the mark of
    large steps, weight decay or an adaptive optimizer. Where the loss ends above 0, only the excess energy has a rate.

    Cost: one evaluation of the loss, and for each pair about 3 (m + n) k² multiplications, far below one step; F Gᵀ is
    never formed.

    Args:
        pairs: Each two names, or "first:second", of parameters or modules, in the order in which they are applied:
            weights (k, n) and (m, k) of layers have the product second @ first, F the second one's. Two matrices of as
            many columns that do not fit so are F and G. `*` stands for the same in both: "*.lora_A.*:*.lora_B.*" are
            those of PEFT, whose names end in an adapter's.
        rank: Of what is to be learned; without it, where the singular values of a product fall most at each look.
        **options: Those of `SpectralCallback`; under manual optimization the rate of the loss needs `loss`.

    Raises:
        ValueError: If there is no pair, or the rank is not positive.

    Example:
        >>> FactorImbalance([("down", "up")], rank=3, every_n_steps="geometric").name
        'imbalance'
    """

    diagnostic: ClassVar[str] = "imbalance"
    runs_loss: ClassVar[bool] = False

    def __init__(self, pairs: Sequence[str | tuple[str, str]], *, rank: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        if not pairs or isinstance(pairs, str):
            raise ValueError(f"pairs={pairs!r} must be a list of pairs, for example ['*.lora_A.*:*.lora_B.*'].")
        if rank is not None and rank < 1:
            raise ValueError(f"rank={rank!r} must be at least 1; leave it out to take where singular values fall most.")
        self._wanted = list(pairs)
        self._rank = rank
        self._pairs: dict[str, FactorPair] = {}
        self._rates: dict[str, _Rate] = {}
        self._has_loss = True
        self._attempt = Attempts(self.say)

    def prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Find the pairs, and whether there is a loss to be run."""
        self._pairs = find_pairs(module, self._wanted)
        self._has_loss = refusal_of_loss(module, self.loss) is None
        self.charts = (Chart("imbalance of factors", tuple(f"imbalance/frobenius/{tag}" for tag in self._pairs)),)

    def forget(self) -> None:
        """Begin the rates anew."""
        self._rates.clear()
        self._attempt.forget()

    def failure(self) -> Mapping[str, float]:
        """Return the status of a failed measurement."""
        return {"imbalance/status": float(Status.BREAKDOWN)}

    def measure(self, probe: Probe) -> Mapping[str, Reading]:
        """Return the state of each pair, and the rates so far."""
        found = Findings(counts_products=False)
        parameters = named_parameters(probe.module)
        for tag, pair in self._pairs.items():
            F, G = pair.factors(parameters)
            if not (F.isfinite().all() and G.isfinite().all()):
                found.statuses.append(Status.NONFINITE)
                continue
            values = product_singular_values(F, G)
            rank = self._rank
            if rank is None:
                rank = apparent_rank(values)
                found.readings[f"imbalance/rank/{tag}"] = float(rank)
            energy = excess_energy(values, rank)
            found.readings[f"imbalance/frobenius/{tag}"] = imbalance(F, G).norm().item()
            found.readings[f"imbalance/excess_energy/{tag}"] = energy
            self._add_rate(found, f"/{tag}", probe.step, energy)
        loss = self._attempt("rate_exponent of the loss", probe.loss) if self._has_loss else None
        if loss is not None:
            self._add_rate(found, "", probe.step, loss)
        return found.concluded("imbalance", self.say)

    def _add_rate(self, found: Findings, tag: str, step: int, value: float) -> None:
        exponent = self._rates.setdefault(tag, _Rate()).after(step, value)
        if exponent is not None:
            found.readings[f"imbalance/rate_exponent{tag}"] = exponent.value
            found.readings[f"imbalance/rate_exponent_error{tag}"] = exponent.error


class _Rate:
    """The last decade of a quantity, and how fast it falls."""

    def __init__(self) -> None:
        self._points: list[tuple[int, float]] = []

    def after(self, step: int, value: float) -> Estimate | None:
        """Return the exponent with one value more, if there are enough."""
        if step < 1 or not 0 < value < math.inf:
            return None
        if not self._points or step >= _SPACING * self._points[-1][0]:
            self._points.append((step, value))
        self._points = [point for point in self._points if point[0] * _DECADE >= step]
        if len(self._points) < _FEWEST:
            return None
        return rate_exponent(*zip(*self._points, strict=True))

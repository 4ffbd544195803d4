"""OptimizerState: what the optimizer does with the gradient, and what it tells of itself."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from spectral_callbacks.callbacks.base import SpectralCallback
from spectral_callbacks.callbacks.findings import Findings
from spectral_callbacks.callbacks.layers import layer_of, layer_tags
from spectral_callbacks.callbacks.reading import Reading, check_axis
from spectral_callbacks.callbacks.schedule import clock
from spectral_callbacks.callbacks.self_report import gather
from spectral_callbacks.callbacks.step_rider import StepRider
from spectral_callbacks.linalg import Status
from spectral_callbacks.metrics.update import Update, update_products
from spectral_callbacks.probe import Probe
from spectral_callbacks.stability import ObservableOptimizer
from spectral_callbacks.tags import Chart

_HALF = 0.5
_NEAR = 0.01  # relative distance of the mean friction from one half at which it does nothing of its own


class OptimizerState(SpectralCallback):
    """What the optimizer makes of the gradient: how far it steps, where to, and what it tells of itself.

    Looks at the very step that training takes, of any `torch.optim.Optimizer`: the trained parameters are copied before
    it and compared with those behind it. Gradients are those that the step has used: unscaled, accumulated and clipped.
    Nothing is run again, and no loss is needed, also under manual optimization; there the first step within a batch of
    the chosen `optimizer` is seen. A step that a gradient scaler skips is no step, and the next one is looked at. Only
    parameters with a gradient count.

    Tags, w the weights before the step, Δw the step and g the gradient: `optimizer/update_norm` = |Δw|, in units of the
    parameter; `optimizer/update_to_weight` = |Δw| / |w|; `optimizer/update_gradient_cosine`, the cosine of the angle
    between Δw and steepest descent -g (with `maximize`, ascent g): 1 for plain gradient descent, 0 for a step at right
    angles, negative for one uphill; `optimizer/effective_lr` = |Δw| / |g|, the learning rate at which plain gradient
    descent would step as far; `optimizer/status` (0 fine, 2 a failure that was reported, 3 not finite). What is divided
    by zero is left out.

    Of an optimizer that tells of itself (`spectral_callbacks.stability.ObservableOptimizer`, as all of
    `spectral_callbacks.optim` do), `optimizer/<name>` for each thing it names: the mean over its parameters, and where
    it has a value for each entry the mean over all entries, with the quantiles `optimizer/<name>_q05`,
    `optimizer/<name>_q50` and `optimizer/<name>_q95`, exact up to 2²⁰ entries and else of so many drawn at random
    (standard error of a rank: 0.05 % at most), and their distribution as a histogram on a signed logarithmic axis,
    `optimizer/<name>_entries`, which stands for its 256 middle quantiles. With `per_layer`, all of them but quantiles
    and histograms for each module's own parameters, as `optimizer/update_norm/<layer>` and so on.

    How to read it: an update of about 1e-3 of the weights a step is common; one that falls far below has stopped
    training, one far above unlearns. A cosine near 0 says that momentum or the metric decides, not this gradient. An
    effective learning rate that grows while the set one is constant shows an adaptive optimizer that divides by small
    gradients. diffGrad's friction near one half means that it is Adam at half the learning rate, which is said once.

    Cost: no gradient. A copy of the trained parameters while the step runs (Lightning's closure runs the network within
    it), and one pass behind it over weights, copy and gradients: on a CPU together 1.5 eager steps of AdamW or 7 fused
    ones. An optimizer that is asked to tell may keep tensors of the parameters' size for it from then on, as diffGrad
    keeps its friction; of those a sum and at most 2²⁰ entries are taken.

    Args:
        per_layer: Whether each module is logged too.
        linear_below: Value up to which the axis of histograms is linear.
        **options: Those of `SpectralCallback`. As nothing is run again, `data`, `num_batches`, `mode`, `loss`,
            `outputs` and `precision` have no part in it. With `every_n_epochs` it is the step after the epoch's end.

    Example:
        >>> OptimizerState(per_layer=True, every_n_steps=100).name
        'optimizer'
    """

    diagnostic: ClassVar[str] = "optimizer"
    runs_loss: ClassVar[bool] = False
    takes_batches: ClassVar[bool] = False
    charts: tuple[Chart, ...] = (
        Chart("step against the weights", ("optimizer/update_to_weight",)),
        Chart("step against the gradient", ("optimizer/effective_lr",)),
    )

    def __init__(self, per_layer: bool = False, *, linear_below: float = 1e-3, **options: Any) -> None:
        options |= {"data": "current", "num_batches": 1}
        super().__init__(**options)
        check_axis(linear_below)
        self._per_layer = per_layer
        self._linear_below = linear_below
        self._optimizer: torch.optim.Optimizer | None = None
        self._layers: dict[Tensor, str] = {}
        self.rider = self._steps = StepRider(self._read, self.say)

    def prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Follow the optimizer, and ask it to tell."""
        optimizer = self._optimizer = trainer.optimizers[self.optimizer]
        names = {parameter: layer_of(name) for name, parameter in module.named_parameters()}
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        self._layers = {p: names.get(p, type(optimizer).__name__) for p in trained}
        self._steps.follow(optimizer, functools.partial(clock, trainer))
        if isinstance(optimizer, ObservableOptimizer):
            optimizer.observe()

    def forget(self) -> None:
        """Let go of the optimizer."""
        self._steps.forget()
        self._optimizer, self._layers = None, {}

    def failure(self) -> Mapping[str, float]:
        """Return the status of a failed measurement."""
        return {"optimizer/status": float(Status.BREAKDOWN)}

    def measure(self, probe: Probe) -> Mapping[str, Reading]:
        """Return what the optimizer tells of its last step; how far it moved is seen only while training takes it."""
        found = Findings(counts_products=False)
        trained = [p for group in probe.optimizer.param_groups for p in group["params"]]
        names = dict(zip(probe.space.tensors, probe.space.names, strict=True))
        self._listen(probe.optimizer, {p: layer_of(names[p]) for p in trained if p in names}, found)
        return found.concluded("optimizer", self.say)

    def _read(self, before: Mapping[Tensor, Tensor]) -> Mapping[str, Reading] | None:
        """Return the readings behind a step, or None if nothing was to be moved or the step was skipped."""
        optimizer = self._optimizer
        if optimizer is None:
            return None
        products: dict[Tensor, Tensor] = {}
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p in before and p.grad is not None:
                    products[p] = update_products(before[p], p, p.grad, maximize=group.get("maximize", False))
        if not products:
            return None
        updates = {p: Update(*one.tolist()) for p, one in products.items()}  # only now the device is waited for
        total = _sum(updates.values())
        if total.was_skipped:
            return None
        found = Findings(counts_products=False)
        if not total.is_finite:
            found.statuses.append(Status.NONFINITE)
        elif total.step == 0 < total.gradient and any(float(group["lr"]) > 0 for group in optimizer.param_groups):
            self.say(
                "a step moved no weight, though there are gradients: it was below the precision of the weights, as can "
                "be in bfloat16, or was discarded. Keep the weights in float32, or raise the learning rate."
            )
        _add_update(found, total)
        layers = {p: self._layers[p] for p in updates}
        for layer, tag in self._layer_tags(layers.values()).items():
            _add_update(found, _sum(u for p, u in updates.items() if layers[p] == layer), f"/{tag}")
        self._listen(optimizer, layers, found)
        return found.concluded("optimizer", self.say)

    def _listen(self, optimizer: torch.optim.Optimizer, layers: Mapping[Tensor, str], found: Findings) -> None:
        """Add what an optimizer tells of these parameters."""
        if not isinstance(optimizer, ObservableOptimizer):
            return
        for told in gather({p: optimizer.diagnostics(p) for p in layers}, layers):
            tag = f"optimizer/{told.name}"
            found.readings |= told.readings(tag, seed=self.seed, linear_below=self._linear_below)
            if told.name == "friction":
                self._remark(told.mean())
            for layer, name in self._layer_tags(told.layers).items():
                found.readings[f"{tag}/{name}"] = told.mean(layer)

    def _remark(self, friction: float) -> None:
        """Say so where diffGrad's friction has no part in its steps."""
        if abs(friction - _HALF) <= _NEAR * _HALF:
            self.say(
                f"the mean friction is within {_NEAR:.0%} of 1/2, so this is Adam at half the learning rate: gradients "
                "change little from step to step in absolute size. A scale-free friction (friction='relative') acts."
            )

    def _layer_tags(self, layers: Iterable[str]) -> dict[str, str]:
        return layer_tags(dict.fromkeys(layers)) if self._per_layer else {}


def _sum(updates: Iterable[Update]) -> Update:
    return functools.reduce(Update.__add__, updates)


def _add_update(found: Findings, update: Update, layer: str = "") -> None:
    numbers = {
        "update_norm": update.norm,
        "update_to_weight": update.to_weight,
        "update_gradient_cosine": update.gradient_cosine,
        "effective_lr": update.effective_lr,
    }
    found.readings |= {f"optimizer/{name}{layer}": value for name, value in numbers.items() if value is not None}

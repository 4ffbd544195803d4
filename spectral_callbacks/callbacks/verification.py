"""The self-test in a run: derivatives are tested on the first probe, and again against training's own gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import torch

from spectral_callbacks.callbacks.batches import FrozenBatch
from spectral_callbacks.operators import Hessian, ParameterSpace
from spectral_callbacks.probe import Probe, WrongDerivativeError, check_reached, check_symmetry, unreached_parameters

if TYPE_CHECKING:
    from spectral_callbacks.callbacks.base import SpectralCallback

_ROUGH = 0.05  # relative error of products in half precision or TF32; bfloat16 autocast was off by up to 1.2e-2


@dataclasses.dataclass(frozen=True)
class _Suspicion:
    """Parameters that a probe did not reach, until training's own gradients tell whether it should have."""

    key: Hashable
    callbacks: tuple[SpectralCallback, ...]
    space: ParameterSpace
    unreached: tuple[str, ...]


class Verification:
    """Remembers which probes have been tested, and what is still suspected."""

    def __init__(self) -> None:
        self._passed: set[Hashable] = set()
        self._suspicions: list[_Suspicion] = []

    @property
    def awaits_gradients(self) -> bool:
        """Whether training's next gradients are to be compared with what a probe reached."""
        return bool(self._suspicions)

    def is_due(self, key: Hashable) -> bool:
        """Return whether probes of this kind have not been tested yet."""
        return key not in self._passed

    def test(
        self,
        probe: Probe,
        key: Hashable,
        callbacks: Sequence[SpectralCallback],
        upcoming: FrozenBatch | None,
        generator: torch.Generator,
    ) -> None:
        """Test the products of a probe, and note which parameters the next training step must not reach alone.

        Args:
            probe: Open.
            key: Its kind.
            callbacks: Who relies on its second derivatives.
            upcoming: The batch that training takes next, if that runs the same loss.
            generator: Draws test vectors.

        Raises:
            WrongDerivativeError: If the products are not those of a symmetric matrix.
        """
        unreached: tuple[str, ...] = ()
        if upcoming is not None:
            unreached = unreached_parameters(probe.evaluate(upcoming, seed=None), probe.space)
        noise = _ROUGH if _is_rough(probe, callbacks[0]) else None
        told = check_symmetry(
            probe.operator(Hessian), probe.space, probe.module, generator=generator, noise=noise, unreached=unreached
        )
        if told:
            self._passed.add(key)
        if unreached:
            self._suspicions.append(_Suspicion(key, tuple(callbacks), probe.space, unreached))

    def judge(self) -> dict[SpectralCallback, WrongDerivativeError]:
        """Compare with the gradients that training has just taken; return who rests on a wrong derivative."""
        guilty: dict[SpectralCallback, WrongDerivativeError] = {}
        for suspicion in self._suspicions:
            try:
                check_reached(suspicion.unreached, suspicion.space)
            except WrongDerivativeError as error:
                self._passed.discard(suspicion.key)  # for callbacks that were not due yet
                guilty.update(dict.fromkeys(suspicion.callbacks, error))
        self._suspicions.clear()
        return guilty


def _is_rough(probe: Probe, callback: SpectralCallback) -> bool:
    backends = torch.backends
    tf32 = probe.space.device.type == "cuda" and bool(backends.cudnn.allow_tf32 or backends.cuda.matmul.allow_tf32)
    half = any(p.dtype.itemsize < probe.space.dtype.itemsize for p in probe.space.tensors)
    return tf32 or half or callback.precision == "training"

"""GramRider: the inner products of samples' gradients, off the backward pass that training runs anyway."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from spectral_callbacks.callbacks.batches import FrozenBatch
from spectral_callbacks.callbacks.reading import Reading
from spectral_callbacks.callbacks.rider import Passed, Rider
from spectral_callbacks.linalg import Eigenpairs
from spectral_callbacks.operators import (
    GramRide,
    ParameterSpace,
    SampleGram,
    SampleStructure,
    StructureChangedError,
)
from spectral_callbacks.probe import Probe, num_samples
from spectral_callbacks.probe.batches import signature

Read = Callable[[SampleGram, Eigenpairs | None], Mapping[str, Reading]]


@dataclasses.dataclass(frozen=True)
class _Coming:
    """What is known of a batch before training takes it, and may change it.

    Attributes:
        size: Number of samples.
        kind: Its signature.
        read: Makes readings of inner products, and of the Hessian's eigenpairs where some are known.
        structure: Of such batches.
        is_new: Whether the structure was found on this very batch.
    """

    size: int
    kind: Hashable
    read: Read
    structure: SampleStructure
    is_new: bool


class GramRider(Rider):
    """Takes the looks of one callback from hooks on the backward pass of training.

    What it must know beforehand, which entry of the network's tensors belongs to which sample, it learns on a probe of
    the first batch of each shape that it rides on. Where a batch runs through other operations, it learns anew on the
    next one; so it does where other parameters are trained than before.

    Args:
        num_samples: How many to look at, at most.
        by_parameter: Whether inner products are kept by parameter.
        reader: Looks at a batch before training takes it, and returns what makes readings of its inner products.
        say: Is told what is left out, and why.
    """

    waits_for_step: ClassVar[bool] = False

    def __init__(
        self,
        num_samples: int,
        *,
        by_parameter: bool,
        reader: Callable[[FrozenBatch], Read],
        say: Callable[[str], None],
    ) -> None:
        self._num_samples = num_samples
        self._by_parameter = by_parameter
        self._reader = reader
        self._say = say
        self._structures: dict[Hashable, SampleStructure] = {}
        self._is_refused = False
        self._coming: _Coming | None = None
        self._pairs: Eigenpairs | None = None
        self._loss: Tensor | None = None
        self._ride: GramRide | None = None
        self._seeded: RemovableHandle | None = None
        self._seed: Tensor | None = None

    def forget(self) -> None:
        """Get off, and know nothing of the network."""
        self.get_off()
        self._structures.clear()
        self._is_refused = False

    def board(self, batch: FrozenBatch, open_probe: Callable[[], Probe]) -> bool:
        """Wait for the backward pass of a batch; return False if it must be measured on a probe.

        Args:
            batch: That training takes next.
            open_probe: Makes a probe of this batch and the loss of training.

        Raises:
            ValueError: If samples have no gradient of their own.
        """
        if self._is_refused or num_samples(batch) < 2:  # a single sample is none to tell apart
            return False
        kind, probe = signature(batch), open_probe()
        structure = self._structures.get(kind)
        is_new = structure is None or not structure.is_of(probe.space)
        if structure is None or is_new:
            with probe:
                structure = probe.sample_structure(self._num_samples)
            if not structure.is_final:  # true of these weights alone, and training is about to change them
                return False
            if structure.untreated:
                self._refuse(structure.explain())
                return False
            self._structures[kind] = structure
        self._coming = _Coming(num_samples(batch), kind, self._reader(batch), structure, is_new)
        return True

    def attach(self, loss: Tensor, pairs: Eigenpairs | None, trained: Callable[[], ParameterSpace]) -> bool:
        """Hook on to the graph of the loss that training is about to differentiate; return whether there is a way.

        Args:
            loss: As it is differentiated, scaled if it is.
            pairs: Eigenpairs of the Hessian, where some are known.
            trained: Finds the parameters that are trained.
        """
        coming = self._coming
        if coming is None:
            return False
        space = trained()
        if not coming.structure.is_of(space):
            self._say("the parameters that are trained changed while a batch ran; the look is taken on the next.")
            self.get_off()
            return False
        self._pairs = pairs if pairs is not None and len(pairs.vectors) == space.size else None
        try:
            self._ride = GramRide(
                loss,
                coming.structure,
                batch_size=coming.size,
                num_samples=self._num_samples,
                by_parameter=self._by_parameter,
                directions=None if self._pairs is None else self._pairs.vectors,
            )
        except StructureChangedError:
            if coming.is_new:
                self._refuse(
                    "training runs through other operations than a probe of the same batch does, as it does with a "
                    "compiled network or checkpointed activations"
                )
            else:
                self._say("a batch runs through other operations than those before it; the look is taken on the next.")
            self.get_off()
            del self._structures[coming.kind]
            return False
        self._loss = loss.detach()
        if loss.grad_fn is not None:
            self._seeded = loss.grad_fn.register_prehook(self._see_seed)
        return True

    def conclude(self, factor: float, scaler: object | None) -> Passed:
        """Get off, and return what was seen.

        Args:
            factor: Of the loss that was hooked on to, against the loss of the batch.
            scaler: Of gradients, if there is one whose factor may be too large.

        Raises:
            RuntimeError: If the ride failed.
        """
        ride, coming, pairs, seed, loss = self._ride, self._coming, self._pairs, self._seed, self._loss
        self.get_off()
        if ride is None or coming is None or loss is None:
            raise RuntimeError("the backward pass was concluded without a ride on it.")
        gram = ride.conclude(factor if seed is None else factor * seed.item())
        if gram is None:
            raise RuntimeError(f"the ride on training's backward pass ended early: {ride.reason}.")
        if scaler is not None and not gram.gram.isfinite().all() and loss.isfinite():
            self._say(
                f"gradients overflowed under the factor of {type(scaler).__name__}, which skips such a step and lowers "
                "the factor; the look is taken on the next."
            )
            return Passed(None, ride.seconds)
        return Passed(coming.read(gram, pairs), ride.seconds)

    def get_off(self) -> None:
        """Take the hooks away, and wait for nothing."""
        if self._ride is not None:
            self._ride.remove()
        if self._seeded is not None:
            self._seeded.remove()
        self._ride = self._coming = self._pairs = self._loss = self._seeded = self._seed = None

    def _refuse(self, reason: str) -> None:
        self._is_refused = True
        self._say(
            f"the samples' gradients cannot be read off training's own backward pass: {reason}. They are taken on a "
            "probe of the current batch instead, at the cost of a pass of its own."
        )

    def _see_seed(self, gradients: tuple[Tensor | None, ...]) -> None:
        """Note the factor that comes from behind the loss: 1, unless a module's `backward` differentiates another."""
        self._seed = gradients[0]


def options_of_a_ride(options: dict[str, Any], *, hessian: bool) -> dict[str, Any]:
    """Return the options of a callback that looks on at training's own backward pass.

    Args:
        options: Those of `SpectralCallback`.
        hessian: Whether the callback searches eigenvectors itself.

    Raises:
        ValueError: If one of them asks for what a ride cannot give.
    """
    data = options.get("data", "fixed")
    others = {
        "loss": (options.get("loss") is None, "the loss that it differentiates is training's"),
        "data": (isinstance(data, str) and data in ("fixed", "current"), "the batch is the one that training takes"),
        "num_batches": (options.get("num_batches", 1) == 1, "a backward pass has one batch"),
        "mode": (options.get("mode", "train") == "train", "training runs in mode 'train'"),
        "every_n_epochs": (options.get("every_n_epochs") is None, "at an epoch's end nothing runs backward"),
    }
    for knob, (fits, reason) in others.items():
        if not fits:
            raise ValueError(
                f"{knob}={options[knob]!r} does not go with ride=True, which looks on at training's own backward pass: "
                f"{reason}. Leave out one of the two."
            )
    if hessian:
        raise ValueError(
            "hessian=True spends products of its own, and ride=True no pass at all. Leave out one of the two; the "
            "eigenvectors that Sharpness or HessianSpectrum finds at the same step are used in any case."
        )
    return {**options, "data": "current"}

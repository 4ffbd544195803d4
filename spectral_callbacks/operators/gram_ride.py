"""A ride on the training backward: the Gram matrix of the samples' gradients from a pass that runs anyway."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence

from torch import Tensor

from spectral_callbacks.operators.sample_gradients import SampleGram, SampleGramSum
from spectral_callbacks.operators.structure import SampleStructure
from spectral_callbacks.operators.uses import find_uses
from spectral_callbacks.operators.watch import FactorStream, watch


class GramRide:
    """Looks on while training computes its gradient, and changes nothing: hooks on the graph of one loss, no pass.

    The hooks go with the graph. What goes wrong inside them ends the ride, not training.

    Args:
        loss: Of the batch, with the graph that training is about to run backward through; scaled, if it is.
        structure: Of such a batch, with every parameter treated.
        batch_size: Number of samples in the batch.
        num_samples: How many samples to take at most, the first ones.
        by_parameter: Whether the inner products are also kept by parameter.
        directions: (n, k), whose inner products with the samples' gradients are taken too.

    Attributes:
        reason: Why the ride ended, or None.
        seconds: Spent inside the hooks.

    Raises:
        StructureChangedError: If the batch runs through other operations than the structure was found on.
    """

    def __init__(
        self,
        loss: Tensor,
        structure: SampleStructure,
        *,
        batch_size: int,
        num_samples: int = 64,
        by_parameter: bool = False,
        directions: Tensor | None = None,
    ) -> None:
        began = time.perf_counter()
        self.reason: str | None = None
        uses, layouts = structure.treated(find_uses(loss, structure.space.tensors), batch_size)
        self._batch_size = batch_size
        first = min(num_samples, batch_size)
        self._sum = SampleGramSum(structure.space, first, by_parameter=by_parameter, directions=directions)
        self._stream = FactorStream(uses.uses, layouts, batch_size, first, self._sum.add)
        self._unseen = set(range(len(uses.uses)))
        self._handles = watch(uses.uses, self._weak_see())
        self.seconds = time.perf_counter() - began

    def conclude(self, scale: float) -> SampleGram | None:
        """Take the hooks away and return what they saw; None if the ride ended early, with the `reason`.

        Args:
            scale: What training multiplied its loss with: that of a gradient scaler, over the batches that are
                accumulated.
        """
        self.remove()
        if self._unseen and self.reason is None:
            self.reason = "no backward pass reached all operations that parameters are used in"
        if self.reason is None:
            self._guarded(self._stream.finish)
        return None if self.reason is not None else self._sum.result(self._batch_size / scale)

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _weak_see(self) -> Callable[[Sequence[int], Tensor], None]:
        """Return `_see` without hold on the ride, which holds the graph, which holds the hooks: none could be freed."""
        this = weakref.ref(self)

        def see(indices: Sequence[int], gradient: Tensor) -> None:
            ride = this()
            if ride is not None:
                ride._see(indices, gradient)

        return see

    def _see(self, indices: Sequence[int], gradient: Tensor) -> None:
        if self.reason is None:
            began = time.perf_counter()
            if not self._unseen.issuperset(indices):
                self.reason = "more than one backward pass ran through the graph of the loss"
                return
            self._unseen.difference_update(indices)
            self._guarded(lambda: self._stream.see(indices, gradient))
            self.seconds += time.perf_counter() - began

    def _guarded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001 - it must not reach the backward pass of training
            self.reason = f"{type(error).__name__}: {error}"

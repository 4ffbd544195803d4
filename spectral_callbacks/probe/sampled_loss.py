"""A loss on some of the samples of frozen batches: together, each alone, or told apart within one backward pass."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from spectral_callbacks.operators import (
    Consume,
    Cut,
    Factors,
    FactorStream,
    GradientGraph,
    Objective,
    OutputObjective,
    ParameterSpace,
    Rows,
    SampleCurvature,
    SampleGradients,
    SampleGram,
    SampleGramSum,
    Samples,
    SampleStructure,
    StructureChangedError,
    find_structure,
    find_uses,
    jacobian_gram,
    sample_curvature,
    samples_of,
    visit,
)
from spectral_callbacks.probe.batches import copied, joined, num_samples, selected, shares, signature
from spectral_callbacks.probe.isolation import Isolation
from spectral_callbacks.probe.means import check_mean, refuse_coupling
from spectral_callbacks.probe.outputs import cut
from spectral_callbacks.probe.samples import FrozenSamples, loss_on_samples, running_on

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class SampledLoss:
    """A loss on some of the samples of frozen batches.

    Attributes:
        isolation: Of the module.
        module: In training.
        space: Its parameters that are measured.
        loss: (module, batch) -> scalar Tensor.
        batches: All of them.
        seed: Of the random numbers.
        learned: Structures that were found, by the signature of the batch; new ones are added, if they are final.
    """

    isolation: Isolation
    module: nn.Module
    space: ParameterSpace
    loss: Callable[[nn.Module, Any], Tensor]
    batches: Sequence[Any]
    seed: int
    learned: MutableMapping[Any, SampleStructure]

    def subset(self, indices: Tensor) -> Objective:
        """Return the mean over some samples, batch by batch.

        Raises:
            ValueError: If there is no such sample, or samples are not defined.
        """
        places, own = zip(*shares(self.batches, indices), strict=True)
        losses = [
            functools.partial(self.evaluate, selected(self.batches[place], chosen), seed=self.seed + place)
            for place, chosen in zip(places, own, strict=True)
        ]
        return _Subset(self.space, losses, list(map(len, own)))

    def through(self, outputs: str) -> OutputObjective:
        """Return the loss over the batches as a function of the outputs of a submodule."""
        cuts = [functools.partial(self._cut, batch, outputs, self.seed + i) for i, batch in enumerate(self.batches)]
        sizes = [num_samples(batch) for batch in self.batches]
        return OutputObjective(self.space, cuts, sizes, source=f"outputs={outputs!r}")

    def gram(self, num_wanted: int | None, *, by_parameter: bool, directions: Tensor | None) -> SampleGram:
        """Return the inner products of the gradients of the first samples.

        Raises:
            ValueError: If samples have no loss of their own.
        """
        whole = self._whole(num_wanted)

        def measure(structure: SampleStructure) -> SampleGram:
            return self._gram(structure, whole, by_parameter=by_parameter, directions=directions)

        return self._with_structure(whole, measure)

    def _gram(
        self, structure: SampleStructure, whole: Any, *, by_parameter: bool, directions: Tensor | None
    ) -> SampleGram:
        rest = self._untreated(structure, whole)
        number = num_samples(whole) if rest is None else rest.num_samples
        total = SampleGramSum(self.space, number, by_parameter=by_parameter, directions=directions)
        self._hand_on(structure, whole, rest, self.seed, number, total.add)
        result = total.result(num_samples(whole))
        if len(structure.untreated) == len(self.space.tensors):
            self._check_mean(result.gram, None)
        return result

    def gradients(self, num_wanted: int | None) -> SampleGradients:
        """Return the gradients of the first samples, batch by batch.

        Raises:
            ValueError: If samples have no loss of their own, or those of a batch that cannot be told apart in one pass
                take too much memory.
        """
        parts = self._parts(num_wanted)

        def factors(place: int) -> Factors:
            return self._with_structure(
                parts[place], lambda structure: self._factors(structure, parts[place], self.seed + place)
            )

        batches = [functools.partial(factors, place) for place in range(len(parts))]
        return SampleGradients(self.space, batches, list(map(num_samples, parts)))

    def curvature(self, num_wanted: int | None, outputs: str) -> SampleCurvature:
        """Return the Gauss-Newton matrices of the first samples.

        Raises:
            ValueError: If samples have no loss of their own.
        """
        parts = self._parts(num_wanted)
        with running_on(1):
            samples = samples_of(self.space, self._alone(self.space, parts, outputs))
            result = sample_curvature(samples, self._jacobian_gram(parts, outputs, samples))
            self._check_mean(result.gradient_gram(), result.losses)
        return result

    def structure(self, num_wanted: int | None) -> SampleStructure:
        """Return which entry belongs to which sample, found by experiment where it is not yet known.

        Raises:
            ValueError: If samples have no loss of their own.
        """
        return self._structure(self._whole(num_wanted))

    def evaluate(self, batch: Any, *, seed: int, in_eval_mode: bool = False) -> Tensor:  # ()
        """Return the loss of a batch of samples with its graph.

        Raises:
            ValueError: If the loss does not run on them.
        """

        def run() -> Tensor:
            module = self.module.eval() if in_eval_mode else self.module  # until the evaluation ends
            return loss_on_samples(self.loss, module, copied(batch))

        return self.isolation.evaluate(run, seed=seed)

    def _cut(self, batch: Any, outputs: str, seed: int) -> Cut:
        def evaluate() -> Cut:
            return cut(self.module, outputs, lambda: self.loss(self.module, copied(batch)), self.space.tensors)

        return self.isolation.evaluate(evaluate, seed=seed)

    def _parts(self, num_wanted: int | None) -> list[Any]:
        """Return the batches that hold the first samples, cut to these."""
        total = sum(map(num_samples, self.batches))
        number = total if num_wanted is None else num_wanted
        if number < 1:
            raise ValueError(f"num_samples={number} must be at least 1; pass None to measure on all samples.")
        refuse_coupling(self.module)
        chosen = shares(self.batches, torch.arange(min(number, total)))
        return [selected(self.batches[place], indices) for place, indices in chosen]

    def _whole(self, num_wanted: int | None) -> Any:
        """Return the first samples as one batch."""
        return joined(self._parts(num_wanted))

    def _structure(self, batch: Any, *, anew: bool = False) -> SampleStructure:
        key = signature(batch)
        known = None if anew else self.learned.get(key)
        if known is None or not known.is_of(self.space):

            def run(indices: Tensor | None, *, seed: int = 0, in_eval_mode: bool = False) -> Tensor:
                part = batch if indices is None else selected(batch, indices)
                return self.evaluate(part, seed=self.seed + seed, in_eval_mode=in_eval_mode)

            with running_on(1):
                known = find_structure(self.space, run, num_samples(batch))
            self.learned.pop(key, None)
            if known.is_final:
                self.learned[key] = known
        return known

    def _hand_on(
        self, structure: SampleStructure, batch: Any, rest: Samples | None, seed: int, first: int, consume: Consume
    ) -> None:
        """Hand on the gradients of the first samples of a batch by all parameters, as shares in its mean."""
        size = num_samples(batch)
        if rest is not None:
            for parameter, rows in _rows(structure, rest):
                consume(parameter, Rows(rows / size))
        if len(structure.untreated) == len(self.space.tensors):
            return
        loss = self.evaluate(batch, seed=seed)
        treated, layouts = structure.treated(find_uses(loss, self.space.tensors), size)
        stream = FactorStream(treated.uses, layouts, size, first, consume)
        visit(loss, treated, stream.see)
        stream.finish()

    def _with_structure(self, batch: Any, measure: Callable[[SampleStructure], _T]) -> _T:
        """Return what is measured with the structure that is known, else with the batch's own."""
        try:
            return measure(self._structure(batch))
        except StructureChangedError:  # the network may choose its way by the weights, and by the data
            return measure(self._structure(batch, anew=True))

    def _factors(self, structure: SampleStructure, batch: Any, seed: int) -> Factors:
        rest = self._untreated(structure, batch)
        size = num_samples(batch)
        if rest is not None and rest.num_samples < size:
            raise ValueError(
                f"{structure.explain()} cannot be told apart by sample in one pass, and the gradients of {size} "
                f"samples do not fit in memory, only {rest.num_samples}; lower num_samples."
            )
        found: Factors = []
        self._hand_on(structure, batch, rest, seed, size, lambda parameter, factor: found.append((parameter, factor)))
        return found

    def _jacobian_gram(self, parts: Sequence[Any], outputs: str, samples: Samples) -> Tensor | None:  # (N C, N C)
        """Return the inner products of the rows of the samples' Jacobians by one pass over all for each output.

        None where that is not possible, would take too much memory, or does not agree with rows of single samples.
        """
        try:
            whole = joined(parts)
            N, C = num_samples(whole), samples.num_outputs
            structure = self._structure(whole)
            if structure.untreated or structure.is_random:
                return None
            first, *others = self._cut(whole, outputs, self.seed).outputs
            if others or len(first) != N or first.numel() != N * C:
                return None
            gram = jacobian_gram(structure, first.reshape(N, C), samples.num_samples)
        except (ValueError, TypeError):  # batches that do not fit together, a number: the samples alone will tell
            return None
        return gram if gram is not None and samples.agree_with(gram) else None

    def _untreated(self, structure: SampleStructure, batch: Any) -> Samples | None:
        """Return the samples, each alone, as functions of the parameters that are not told apart in one pass."""
        if not structure.untreated:
            return None
        space = ParameterSpace(self.module, [self.space.tensors[index] for index in structure.untreated])
        with running_on(1):
            return samples_of(space, self._alone(space, [batch], None))

    def _alone(self, space: ParameterSpace, parts: Sequence[Any], outputs: str | None) -> list[FrozenSamples]:
        return [
            FrozenSamples(
                self.isolation, self.module, space, self.loss, part, num_samples(part), outputs,
                range(self.seed + i, self.seed + i + num_samples(part) * len(self.batches), len(self.batches)),
            )
            for i, part in enumerate(parts)
        ]  # fmt: skip

    def _check_mean(self, gram: Tensor, losses: Tensor | None) -> None:
        check_mean(self.space, self.batches, self.evaluate, seed=self.seed, gram=gram, losses=losses)


def _rows(structure: SampleStructure, samples: Samples) -> Iterator[tuple[int, Tensor]]:
    """Yield each untreated parameter with the gradients of its samples, (N, *shape)."""
    with running_on(1):
        parts = zip(*(samples.rows(chunk) for chunk in samples.chunks()), strict=True)
        whole = list(map(torch.cat, parts))
    for index, rows in zip(sorted(structure.untreated), whole, strict=True):
        yield index, rows.view(len(rows), *structure.space.tensors[index].shape)


class _Subset(Objective):
    """The loss on some samples, which it may not run on."""

    def __init__(self, space: ParameterSpace, losses: Sequence[Callable[[], Tensor]], sizes: Sequence[int]) -> None:
        super().__init__(space, losses, sizes)
        self._sizes = tuple(sizes)

    def _differentiate(self, index: int, *, create_graph: bool) -> GradientGraph:
        with running_on(self._sizes[index]):
            return super()._differentiate(index, create_graph=create_graph)

"""The Jacobian of a network's outputs by its parameters, sample by sample: inner products of its rows."""

from __future__ import annotations

from torch import Tensor

from spectral_callbacks.operators.sample_gradients import SampleGramSum
from spectral_callbacks.operators.structure import SampleStructure
from spectral_callbacks.operators.uses import find_uses
from spectral_callbacks.operators.watch import FactorStream, visit

_STACK_BYTES = 2**31  # of what the passes for all outputs leave


def jacobian_gram(
    structure: SampleStructure,
    outputs: Tensor,  # (N, C), with their graph
    num_samples: int,
) -> Tensor | None:  # (m C, m C)
    """Return the inner products of the Jacobian rows of the first m samples, float64 on the CPU: C backward passes.

    None where the passes would leave more than 2 GiB.

    Args:
        structure: Of the batch, with every parameter treated.
        outputs: Of all its samples.
        num_samples: m.

    Raises:
        StructureChangedError: If the outputs are made by other operations than the structure was found on.
    """
    N, C = outputs.shape
    uses, layouts = structure.treated(find_uses(outputs.sum(), structure.space.tensors), N, same_loss=False)
    total = SampleGramSum(structure.space, num_samples * C)
    stream = FactorStream(uses.uses, layouts, N, num_samples, total.add, num_passes=C)
    for column in outputs.mT:
        visit(column.sum(), uses, stream.see, retain_graph=True)
        if stream.num_bytes * C > _STACK_BYTES:
            return None
    stream.finish()
    return total.result(1.0).gram

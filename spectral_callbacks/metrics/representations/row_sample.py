"""A random sample of rows that come in batches."""

from __future__ import annotations

import torch
from torch import Tensor


class RowSample:
    """Keeps num_kept of the rows, each with equal probability: those with the smallest of random keys.

    Which ones depends on the generator's seed and the number of rows alone, not on the batch sizes, nor on what is in
    the rows.

    Args:
        num_kept: Rows to keep; all of them up to that.
        generator: Of the keys, on the CPU.

    Example:
        >>> sample = RowSample(3, generator=torch.Generator().manual_seed(0))
        >>> for batch in torch.arange(8.0)[:, None].split(5):
        ...     sample.update(batch)
        >>> sample.rows.flatten().tolist() == sorted(sample.rows.flatten().tolist()), len(sample.rows)
        (True, 3)
    """

    def __init__(self, num_kept: int, *, generator: torch.Generator) -> None:
        self._num_kept, self._generator = num_kept, generator
        self._keys = torch.empty(0, dtype=torch.float64)
        self._rows: Tensor | None = None

    @property
    def rows(self) -> Tensor:  # (min(n, num_kept), d)
        """Those kept, in the order they came.

        Raises:
            ValueError: If none came.
        """
        if self._rows is None:
            raise ValueError("no rows were added; call update with a batch (n_b, d) first.")
        return self._rows

    def update(
        self,
        batch: Tensor,  # (n_b, d)
    ) -> None:
        """Add a batch, of which the rows that are kept are copied."""
        old = len(self._keys)
        keys = torch.cat([self._keys, torch.rand(len(batch), generator=self._generator, dtype=torch.float64)])
        chosen = keys.topk(min(self._num_kept, len(keys)), largest=False, sorted=False).indices.sort().values
        self._keys = keys[chosen]
        new = batch[(chosen[chosen >= old] - old).to(batch.device)]
        if self._rows is None:
            self._rows = new
        elif len(new):
            self._rows = torch.cat([self._rows[chosen[chosen < old].to(batch.device)], new])

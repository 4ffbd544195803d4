"""Layout: which item of a batched tensor belongs to which sample."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Layout(NamedTuple):
    """Item r belongs to sample (r // after) mod N; there are before · N · after items.

    Attributes:
        before: How often all samples follow each other: 1 where samples come first, T for sequences (T, N, ...).
        after: Items in a row that belong to one sample: T for sequences (N, T, ...).
    """

    before: int
    after: int


def regrouped(
    t: Tensor,  # (before N after, ...)
    layout: Layout,
    num_samples: int,
) -> Tensor:  # (N, before after, ...)
    """Return the items sample by sample: a view where samples come first, else a copy."""
    if layout == (1, 1) and len(t) == num_samples:
        return t.unsqueeze(1)
    if layout.before == 1:
        return t.unflatten(0, (num_samples, layout.after))
    return t.unflatten(0, (layout.before, num_samples, layout.after)).movedim(1, 0).flatten(1, 2)


def find_layout(
    changed: Tensor,  # (R,), bool
    replaced: Tensor,  # (N,), bool
) -> Layout | None:
    """Return the layout that explains which items changed when some samples were replaced.

    Of all layouts under which no item of another sample changed, it is the one under which most of the replaced samples
    have an item that changed; among equals, the one with the fewest `before`. The more samples are replaced, in an
    irregular pattern, the less another layout explains by chance.

    Returns:
        None if R is no multiple of N; if items of samples that were not replaced changed under every layout, as then
        samples are coupled; and if nothing changed, which tells nothing, unless each sample has but one item.

    Example:
        >>> import torch
        >>> replaced = torch.tensor([True, False, False])
        >>> find_layout(torch.tensor([True, False, False, True, False, False]), replaced)  # (T, N) with T = 2
        Layout(before=2, after=1)
    """
    num_samples, num_items = len(replaced), len(changed)
    if not num_samples or num_items % num_samples:
        return None
    per_sample = num_items // num_samples
    best, most = None, 0 if per_sample > 1 else -1
    for before in (b for b in range(1, per_sample + 1) if per_sample % b == 0):
        layout = Layout(before, per_sample // before)
        samples = regrouped(changed, layout, num_samples).any(1)
        explained = int((samples & replaced).sum())
        if explained > most and not bool((samples & ~replaced).any()):
            best, most = layout, explained
    return best

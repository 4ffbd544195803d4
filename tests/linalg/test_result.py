from __future__ import annotations

import dataclasses

import pytest
import torch

from spectral_callbacks.linalg import Eigenpairs, Status


def test_statuses_are_ordered_from_the_best_to_the_worst() -> None:
    assert [status.name for status in sorted(Status)] == ["CONVERGED", "BUDGET", "BREAKDOWN", "NONFINITE"]
    assert [int(status) for status in Status] == [0, 1, 2, 3]


def test_every_status_says_what_happened_and_what_to_do() -> None:
    remedies = [status.remedy for status in Status]
    assert len(set(remedies)) == len(remedies)
    assert all(remedy.endswith(".") for remedy in remedies)
    assert "max_matvecs" in Status.BUDGET.remedy


def test_a_result_cannot_be_edited() -> None:
    pairs = Eigenpairs(torch.ones(1), torch.ones(1, 1), torch.zeros(1), Status.CONVERGED, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        pairs.status = Status.BUDGET  # pyright: ignore[reportAttributeAccessIssue]

"""A feature matrix: one row of features for each sample; and the groups of its rows."""

from __future__ import annotations

from torch import Tensor


def checked_features(
    features: Tensor,  # (n, d)
    *,
    fewest: int,
    called: str = "features",
) -> Tensor:  # (n, d), float64, on the CPU
    """Return the features in float64, or refuse what is no feature matrix.

    Args:
        features: One row a sample.
        fewest: Samples that are needed.
        called: What the caller calls them, for the messages.

    Raises:
        ValueError: If the shape is another, the type not floating-point, or a feature not finite.
    """
    if features.ndim != 2 or not features.shape[1] or not features.is_floating_point():
        raise ValueError(
            f"{called} has shape {tuple(features.shape)} and type {features.dtype}; pass one row of real features for "
            "each sample, (n, d)."
        )
    if len(features) < fewest:
        raise ValueError(f"{called} holds n={len(features)} samples; at least {fewest} are needed: collect more.")
    rows = features.detach().cpu().double()
    _refuse_not_finite(rows, called)
    return rows


def centered_features(
    features: Tensor,  # (n, d)
    *,
    fewest: int,
    called: str = "features",
) -> Tensor:  # (n, d), float64, on the CPU
    """Return the features less their mean over the samples, or refuse what is no matrix of features that vary.

    Args:
        features: One row a sample.
        fewest: Samples that are needed.
        called: What the caller calls them, for the messages.

    Raises:
        ValueError: As `checked_features`; and if all samples have the same features.
    """
    rows = checked_features(features, fewest=fewest, called=called)
    rows = rows - rows[0]  # less a sample before the mean, so that equal samples become exactly 0
    _refuse_not_finite(rows, called)  # near 1e308 a difference is not
    if not rows.any():
        raise ValueError(
            f"{called} is constant: all {len(rows)} samples have the same features; the layer may be dead, or "
            "collapsed."
        )
    return rows.sub_(rows.mean(0))


def checked_groups(
    groups: Tensor,  # (n,)
    num_samples: int,
) -> Tensor:  # (n,), on the CPU
    """Return the groups, or refuse what is not one integer for each sample.

    Raises:
        ValueError: If it is not.
    """
    if groups.shape != (num_samples,) or groups.is_floating_point() or groups.is_complex():
        raise ValueError(
            f"groups has shape {tuple(groups.shape)} and type {groups.dtype}; pass one integer for each of the "
            f"{num_samples} samples, for other labels those of `label_groups`."
        )
    return groups.detach().cpu()


def _refuse_not_finite(rows: Tensor, called: str) -> None:
    if not rows.isfinite().all():
        raise ValueError(
            f"{called} has entries that are not finite; look for NaN or infinity in the weights, the batch or "
            "the layer."
        )

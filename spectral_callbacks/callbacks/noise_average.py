"""The noise scale over several looks: numerator and denominator averaged apart, and then divided."""

from __future__ import annotations

from spectral_callbacks.metrics.gradient_noise import GradientMoments, NoiseScale


class NoiseAverage:
    """Averages the moments of gradients over looks, for any number of parts of a network.

    Args:
        decay: Weight of a look against that of the next; 0 lets each stand alone.
        same_samples: Whether all looks are at the same samples, whose errors then do not average out.
    """

    def __init__(self, decay: float, *, same_samples: bool) -> None:
        self._decay = decay
        self._same_samples = same_samples
        self._moments: dict[str, GradientMoments] = {}

    def __call__(self, part: str, newer: GradientMoments) -> NoiseScale:
        """Return the noise scale of a part of the network with one more look.

        A look at fewer than 4 samples does not know its own error, and is left out if there are others.
        """
        known = self._moments.get(part)
        if not newer.covariance.isfinite().all():
            return (newer if known is None else known).noise_scale()
        average = newer if known is None else known.averaged(newer, self._decay, same_samples=self._same_samples)
        self._moments[part] = average
        return average.noise_scale()

    def forget(self) -> None:
        """Begin anew."""
        self._moments.clear()

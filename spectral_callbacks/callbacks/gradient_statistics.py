"""What the inner products of samples' gradients tell, as readings."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spectral_callbacks.callbacks.findings import Findings
from spectral_callbacks.callbacks.layers import layer_of, layer_tags
from spectral_callbacks.callbacks.noise_average import NoiseAverage
from spectral_callbacks.callbacks.reading import Spectrum
from spectral_callbacks.linalg import Eigenpairs
from spectral_callbacks.metrics.class_covariance import class_covariance
from spectral_callbacks.metrics.covariance_spectrum import CovarianceSpectrum
from spectral_callbacks.metrics.gradient_noise import GradientMoments, gradient_norm, mean_pairwise_cosine
from spectral_callbacks.metrics.subspaces import covariance_overlap, top_subspace_share
from spectral_callbacks.operators import SampleGram


def add_spectrum(
    found: Findings, spectrum: CovarianceSpectrum, *, dataset_size: int | None, linear_below: float
) -> None:
    """Add the spectrum of the covariance, and what follows from it alone.

    Args:
        found: Takes the readings.
        spectrum: Of at least two samples' gradients.
        dataset_size: Samples that they were drawn from.
        linear_below: Of the histogram.
    """
    values = spectrum.values
    weights = torch.full_like(values, 1 / len(values))
    found.add_estimate("gradient/covariance_lambda_max", spectrum.lambda_max(dataset_size=dataset_size))
    found.readings |= {
        "gradient/covariance": Spectrum(values, weights, len(values), linear_below),
        "gradient/effective_rank": spectrum.effective_rank(),
        "gradient/second_moment_lambda_max": spectrum.second_moment_lambda_max(),
    }


def add_noise(found: Findings, seen: SampleGram, average: NoiseAverage, *, dataset_size: int | None) -> None:
    """Add the size of the noise against the signal, by layer where inner products are known so.

    Args:
        found: Takes the readings.
        seen: Of at least two samples.
        average: Over looks.
        dataset_size: Samples that they were drawn from.
    """
    moments = GradientMoments.from_gram(seen.gram, dataset_size=dataset_size)
    found.add_estimate("gradient/covariance_trace", moments.trace())
    found.add_estimate("gradient/signal_to_noise", moments.signal_to_noise())
    found.add_estimate("gradient/mean_cosine", mean_pairwise_cosine(seen.gram, dataset_size=dataset_size))
    scale = average("", moments)
    found.readings |= {
        "gradient/norm": gradient_norm(seen.gram).value,
        "gradient/noise_scale": scale.value,
        "gradient/noise_scale_error": scale.error,
        "gradient/noise_scale_low": scale.low,
        "gradient/noise_scale_high": scale.high,
    }
    layers = _by_layer(seen.by_parameter or {})
    for layer, tag in layer_tags(layers).items():
        of_layer = average(layer, GradientMoments.from_gram(layers[layer], dataset_size=dataset_size))
        found.readings[f"gradient/noise_scale/{tag}"] = of_layer.value
        found.readings[f"gradient/noise_scale_error/{tag}"] = of_layer.error


def add_overlap(
    found: Findings,
    seen: SampleGram,
    spectrum: CovarianceSpectrum,
    pairs: Eigenpairs,
    num_eigenvalues: int,
    *,
    dataset_size: int | None,
) -> None:
    """Add how noise and gradient lie against the eigenvectors of the Hessian.

    Args:
        found: Takes the readings.
        seen: With the inner products along those eigenvectors.
        spectrum: Of the same inner products.
        pairs: Of the Hessian.
        num_eigenvalues: How many eigenvectors of each to compare, at most.
        dataset_size: Samples that they were drawn from.
    """
    if seen.along is None:
        return
    n, known = pairs.vectors.shape
    k = min(num_eigenvalues, known, len(seen.gram) - 1)
    found.statuses.append(pairs.status)
    overlap = covariance_overlap(spectrum.values[:k], spectrum.vectors[:, :k], seen.along[:, :k], dimension=n)
    found.add_estimate(
        "gradient/top_subspace_share", top_subspace_share(seen.gram, seen.along, dataset_size=dataset_size)
    )
    found.readings |= {
        "gradient/top_subspace_share_null": known / n,
        "gradient/hessian_overlap": overlap.value,
        "gradient/hessian_overlap_null": overlap.null.value,
    }


def add_classes(found: Findings, gram: Tensor, labels: Tensor, *, dataset_size: int | None) -> None:
    """Add the noise within classes and that of their means.

    Args:
        found: Takes the readings.
        gram: (N, N).
        labels: (N,).
        dataset_size: Samples that they were drawn from.
    """
    resolved = class_covariance(gram, labels, dataset_size=dataset_size)
    found.add_estimate("gradient/within_class_trace", resolved.within_trace)
    found.add_estimate("gradient/between_class_trace", resolved.between_trace)


def _by_layer(by_parameter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the inner products of the gradients by each module's own parameters."""
    layers: dict[str, Tensor] = {}
    for name, gram in by_parameter.items():
        layer = layer_of(name)
        layers[layer] = layers[layer] + gram if layer in layers else gram
    return layers

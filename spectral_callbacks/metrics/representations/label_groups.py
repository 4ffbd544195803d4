"""Groups of samples by their labels: classes as they are, intervals of numbers, clusters of vectors."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import scipy.sparse.csgraph
import scipy.sparse.linalg
import torch
from torch import Tensor

from spectral_callbacks.metrics.representations.diffusion_kernel import distances
from spectral_callbacks.metrics.representations.feature_matrix import checked_features

_NUM_NEIGHBORS = 9  # 10 with the sample itself, the default of sklearn's SpectralClustering, which dse-dsmi uses


def label_groups(
    labels: Tensor,  # (N,) or (N, ...)
    *,
    num_classes: int = 10,
    generator: torch.Generator,
) -> Tensor:  # (N,), int64, on the CPU
    """Return a group for each sample, for `diffusion_mutual_information`; compute it once and keep it.

    - Integers (N,) or (N, 1) are classes, and are returned as they are.
    - Numbers (N,) or (N, 1) are put into num_classes intervals of equal width between their least and their largest:
      each contains its lower edge, and the last one both, so that the largest is in it, as in the official code. Some
      may be empty.
    - Vectors, images and the like, (N, ...), are clustered spectrally: the graph that joins each sample to the 9
      nearest others in Euclidean distance; the num_classes lowest eigenvectors of its normalized Laplacian; and of
      these the assignment that a pivoted QR decomposition finds, without k-means and its restarts. On a connected graph
      it is sklearn's SpectralClustering(num_classes, affinity="nearest_neighbors", assign_labels="cluster_qr"). Parts
      that nothing joins are eigenvectors of one eigenvalue, which an iteration from one vector may miss: they are
      found first. Where there are more of them than groups, the last group is all of the smallest together.

    Costs for vectors N² (d + 10) operations and 12 N² bytes; 0.2 s at N = 1,800, d = 64.

    Args:
        labels: What each sample is told apart by: the target, or the input itself.
        num_classes: Intervals or clusters.
        generator: Source of the start of an eigensolver, on the CPU, which the clusters do not depend on.

    Raises:
        ValueError: If labels other than classes are not finite, are all equal, or are fewer than the groups.

    References:
        Damle, Minden, Ying, Simple, direct and efficient multi-way spectral clustering (2019).

    Example:
        >>> label_groups(torch.tensor([0.0, 0.26, 0.5, 1.0]), num_classes=4, generator=torch.Generator())
        tensor([0, 1, 2, 3])
    """
    labels = labels.detach().cpu()
    if not labels.ndim or labels.is_complex():
        raise ValueError(f"labels has shape {tuple(labels.shape)} and dtype {labels.dtype}; pass one for each sample.")
    flat = labels.reshape(len(labels), -1)
    scalar = flat.shape[1] == 1
    if scalar and not flat.is_floating_point():
        return flat[:, 0].long()
    if not 2 <= num_classes <= len(flat):
        raise ValueError(f"num_classes={num_classes} must lie between 2 and the number of samples, {len(flat)}.")
    vectors = checked_features(flat.double(), fewest=2, called="labels")
    if (vectors == vectors[0]).all():
        raise ValueError("labels are all equal; groups need labels that differ.")
    return _intervals(vectors[:, 0], num_classes) if scalar else _clusters(vectors, num_classes, generator)


def _intervals(numbers: Tensor, num_classes: int) -> Tensor:
    least, most = numbers.aminmax()
    return ((numbers - least) / (most - least) * num_classes).long().clamp_(max=num_classes - 1)


def _clusters(vectors: Tensor, num_classes: int, generator: torch.Generator) -> Tensor:
    graph = _neighbors(vectors)
    num_parts, part = scipy.sparse.csgraph.connected_components(graph, directed=False)
    if num_parts >= num_classes:
        return _largest(torch.from_numpy(part).long(), num_classes)
    roots = np.sqrt(graph.sum(0))
    affinity = graph.multiply(1 / roots[:, None]).multiply(1 / roots).tocsr()
    stationary = roots[:, None] * (part[:, None] == np.arange(num_parts))
    stationary /= np.linalg.norm(stationary, axis=0)
    # Their eigenvalue 1 becomes -1, the least.
    as_operator = scipy.sparse.linalg.aslinearoperator
    rest = as_operator(affinity) - as_operator(2 * stationary) @ as_operator(stationary.T)
    start = torch.randn(len(roots), dtype=torch.float64, generator=generator).numpy()
    _, found = scipy.sparse.linalg.eigsh(rest, num_classes - num_parts, which="LA", v0=start)
    return torch.from_numpy(_assignment(np.hstack([stationary, found]) / roots[:, None]))


def _largest(part: Tensor, num_classes: int) -> Tensor:
    """Return the parts by size, those beyond the last group in it."""
    order = part.bincount().argsort(descending=True, stable=True)
    return order.argsort()[part].clamp_(max=num_classes - 1)


def _neighbors(vectors: Tensor) -> scipy.sparse.csr_array:
    """Return the symmetric graph, (N, N): 1 between samples that are near to each other, 1/2 where only one is."""
    squared = distances(vectors, "sqrt_dim").squared
    squared.fill_diagonal_(torch.inf)
    N, k = len(vectors), min(_NUM_NEIGHBORS, len(vectors) - 1)
    nearest = squared.topk(k, largest=False).indices.flatten().numpy()
    directed = scipy.sparse.csr_array((np.ones(N * k), nearest, np.arange(0, N * k + 1, k)), shape=(N, N))
    return scipy.sparse.csr_array((directed + directed.T) / 2)


def _assignment(
    vectors: np.ndarray,  # (N, k)
) -> np.ndarray:  # (N,)
    """Return which of k orthogonal directions each row is along.

    Rows of one cluster are near a direction of its own. The k rows that a pivoted QR decomposition takes first are one
    of each; the rotation nearest to them, of their polar decomposition, turns the directions into axes.
    """
    k = vectors.shape[1]
    pivots = scipy.linalg.qr(vectors.T, mode="r", pivoting=True)[-1]
    left, _, right = scipy.linalg.svd(vectors[pivots[:k]].T)
    return np.abs(vectors @ (left @ right)).argmax(1)

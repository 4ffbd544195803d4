"""Stability of SGD at a minimum: closed forms, and the second moments themselves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spectral_callbacks.metrics import (
    SampleHessians,
    alignment,
    directional_condition,
    jackknife,
    noise_fraction,
    sgd_threshold,
)

SAMPLING = [False, True]
GOLDEN = {False: (0.25, 0.5, 1.0, 2.0), True: (0.25, 0.4444, 0.7273, 1.0667)}  # at B = 1, 2, 4, 8, without and with


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthogonal(n: int) -> Tensor:  # (n, n, n)
    """n orthogonal samples of which the mean Hessian is I."""
    return torch.diag_embed(n * torch.eye(n, dtype=torch.float64))


def rank_one(g: Tensor) -> Tensor:  # (n, d) -> (n, d, d)
    return g[:, :, None] * g[:, None, :]


def several_outputs(n: int, d: int, num_outputs: int, seed: int = 0) -> Tensor:
    J = randn(n, num_outputs, d, seed=seed)
    return J.mT @ J


POWERS = torch.arange(1, 7, dtype=torch.float64) ** -1.0
FAMILIES: dict[str, Tensor] = {
    "gaussian": rank_one(randn(12, 5)),
    "power law": rank_one(randn(10, 6, seed=1) * POWERS),
    "fewer samples than parameters": rank_one(randn(4, 6, seed=2)),
    "two outputs": several_outputs(8, 5, 2, seed=3),
    "samples of different size": rank_one(randn(9, 4, seed=4) * torch.logspace(-1, 1, 9, dtype=torch.float64)[:, None]),
}


def second_moment_map(hessians: Tensor, lr: float, batch_size: int, replacement: bool) -> Tensor:  # (d², d²)
    """E of M_𝓑 ⊗ M_𝓑 over every batch that can be drawn, for the step M_𝓑 = I - η/B Σ_{i ∈ 𝓑} H_i."""
    n, d = hessians.shape[:2]
    draw = (
        itertools.product(range(n), repeat=batch_size) if replacement else itertools.combinations(range(n), batch_size)
    )
    total = torch.zeros(d * d, d * d, dtype=torch.float64)
    batches = list(draw)
    for batch in batches:
        M = torch.eye(d, dtype=torch.float64) - lr * hessians[list(batch)].mean(0)
        total += torch.kron(M, M)
    return total / len(batches)


def on_the_range(hessians: Tensor) -> Tensor:
    """The Hessians where their mean is not flat: along flat directions nothing ever moves."""
    values, vectors = torch.linalg.eigh(hessians.mean(0))
    Q = vectors[:, values > 1e-10 * values[-1]]
    return Q.mT @ hessians @ Q


def bisected_threshold(hessians: Tensor, batch_size: int, replacement: bool) -> float:
    hessians = on_the_range(hessians)
    low, high = 0.0, 4 / torch.linalg.eigvalsh(hessians.mean(0))[-1].item()
    for _ in range(50):
        middle = (low + high) / 2
        radius = torch.linalg.eigvals(second_moment_map(hessians, middle, batch_size, replacement)).abs().max()
        low, high = (middle, high) if radius <= 1 else (low, middle)
    return low


# ---- The exact threshold


@pytest.mark.parametrize("replacement", SAMPLING)
def test_the_threshold_of_orthogonal_samples_is_the_one_in_closed_form(replacement: bool) -> None:
    for batch_size, golden in zip((1, 2, 4, 8), GOLDEN[replacement], strict=True):
        threshold = sgd_threshold(orthogonal(8), batch_size=batch_size, replacement=replacement)
        p = noise_fraction(8, batch_size, replacement=replacement)
        assert threshold == pytest.approx(2 / ((1 - p) + 8 * p), rel=1e-12)
        assert threshold == pytest.approx(golden, abs=5e-5)


@pytest.mark.parametrize("replacement", SAMPLING)
@pytest.mark.parametrize("batch_size", [1, 2, 4, 8])
def test_the_trace_condition_of_orthogonal_samples_is_met_exactly_at_the_threshold(
    batch_size: int, replacement: bool
) -> None:
    threshold = sgd_threshold(orthogonal(8), batch_size=batch_size, replacement=replacement)
    condition = SampleHessians.from_dense(orthogonal(8)).trace_condition(batch_size=batch_size, replacement=replacement)
    assert threshold * condition / 2 == pytest.approx(1, rel=1e-12)


def test_second_moments_of_orthogonal_samples_shrink_below_the_threshold_and_grow_above() -> None:
    factors = [second_moment_map(orthogonal(8)[:, :1, :1], lr, 1, False).item() for lr in (0.249, 0.25, 0.251)]
    assert factors == pytest.approx([0.998008, 1, 1.002008], abs=1e-12)


@pytest.mark.parametrize("replacement", SAMPLING)
@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_threshold_is_where_the_second_moments_begin_to_grow(
    family: str, batch_size: int, replacement: bool
) -> None:
    threshold = sgd_threshold(FAMILIES[family], batch_size=batch_size, replacement=replacement)
    assert threshold == pytest.approx(bisected_threshold(FAMILIES[family], batch_size, replacement), rel=1e-7)


def test_the_law_of_second_moments_is_that_of_steps_on_drawn_batches() -> None:
    hessians, lr, batch_size = FAMILIES["gaussian"], 0.1, 2
    generator = torch.Generator().manual_seed(0)
    start = randn(5, seed=9)
    batches = torch.rand(40_000, 12, generator=generator).argsort(1)[:, :batch_size]
    moved = start - lr * hessians[batches].mean(1) @ start
    found = moved.mT @ moved / len(moved)
    law = (second_moment_map(hessians, lr, batch_size, False) @ torch.outer(start, start).flatten()).reshape(5, 5)
    spread = (moved[:, :, None] * moved[:, None, :]).std(0) / len(moved) ** 0.5
    assert ((found - law).abs() <= 4 * spread + 1e-12).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_full_batch_has_the_threshold_of_gradient_descent(family: str) -> None:
    hessians = FAMILIES[family]
    edge = 2 / torch.linalg.eigvalsh(hessians.mean(0))[-1].item()
    assert sgd_threshold(hessians, batch_size=len(hessians), replacement=False) == pytest.approx(edge, rel=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_larger_batches_are_stable_up_to_larger_learning_rates(family: str) -> None:
    thresholds = [
        sgd_threshold(FAMILIES[family], batch_size=b, replacement=False) for b in range(1, len(FAMILIES[family]) + 1)
    ]
    assert thresholds == sorted(thresholds)
    assert thresholds[0] < 0.9 * thresholds[-1]


def test_the_threshold_depends_neither_on_the_basis_nor_on_flat_directions() -> None:
    hessians = FAMILIES["power law"]
    Q, _ = torch.linalg.qr(randn(9, 9, seed=5))
    lifted = Q[:, :6] @ hessians @ Q[:, :6].mT
    for batch_size in (1, 3, 10):
        expected = sgd_threshold(hessians, batch_size=batch_size, replacement=False)
        assert sgd_threshold(lifted, batch_size=batch_size, replacement=False) == pytest.approx(expected, rel=1e-9)


def test_an_almost_flat_direction_does_not_move_the_threshold() -> None:
    g = torch.cat([randn(8, 3), 1e-7 * randn(8, 1, seed=1)], 1)
    for batch_size in (1, 2):
        expected = sgd_threshold(rank_one(g[:, :3]), batch_size=batch_size, replacement=False)
        assert sgd_threshold(rank_one(g), batch_size=batch_size, replacement=False) == pytest.approx(expected, rel=1e-6)


def test_hessians_that_are_all_zero_are_stable_at_any_learning_rate() -> None:
    assert sgd_threshold(torch.zeros(3, 2, 2), batch_size=1, replacement=False) == math.inf


# ---- Necessary conditions


@pytest.mark.parametrize("replacement", SAMPLING)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_necessary_condition_refuses_a_stable_learning_rate(family: str, replacement: bool) -> None:
    hessians = FAMILIES[family]
    values, vectors = torch.linalg.eigh(hessians.mean(0))
    along = torch.einsum("a,nab,b->n", vectors[:, -1], hessians, vectors[:, -1])
    for batch_size in range(1, len(hessians) + 1):
        kind = {"batch_size": batch_size, "replacement": replacement}
        threshold = sgd_threshold(hessians, **kind)
        assert 2 / SampleHessians.from_dense(hessians).trace_condition(**kind) >= threshold * (1 - 1e-10)
        assert 2 / directional_condition(along, **kind) >= threshold * (1 - 1e-10)
        assert 2 / values[-1].item() >= threshold * (1 - 1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_directional_condition_is_necessary_along_every_direction(family: str) -> None:
    hessians = FAMILIES[family]
    threshold = sgd_threshold(hessians, batch_size=2, replacement=False)
    for direction in torch.nn.functional.normalize(randn(100, hessians.shape[1], seed=11)):
        along = torch.einsum("a,nab,b->n", direction, hessians, direction)
        assert 2 / directional_condition(along, batch_size=2, replacement=False) >= threshold * (1 - 1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_at_full_batch_the_directional_condition_is_the_largest_eigenvalue(family: str) -> None:
    hessians = FAMILIES[family]
    values, vectors = torch.linalg.eigh(hessians.mean(0))
    along = torch.einsum("a,nab,b->n", vectors[:, -1], hessians, vectors[:, -1])
    found = directional_condition(along, batch_size=len(hessians), replacement=False)
    assert found == pytest.approx(values[-1].item(), rel=1e-12)


def test_for_batch_size_1_and_a_scalar_output_the_trace_bound_follows_and_is_looser() -> None:
    for family in ("gaussian", "power law", "samples of different size"):
        samples = SampleHessians.from_dense(FAMILIES[family])
        assert samples.trace() == pytest.approx(FAMILIES[family].mean(0).trace().item(), rel=1e-12)
        assert samples.trace_condition(batch_size=1, replacement=False) >= samples.trace()


def test_for_several_outputs_the_trace_may_exceed_two_over_lr_as_often_as_there_are_outputs() -> None:
    hessians = torch.zeros(6, 24, 24, dtype=torch.float64)  # 6 samples of 4 outputs, all orthogonal
    for i in range(6):
        hessians[i, 4 * i : 4 * i + 4, 4 * i : 4 * i + 4] = 6 * torch.eye(4, dtype=torch.float64)
    threshold = sgd_threshold(hessians, batch_size=1, replacement=False)
    assert threshold * SampleHessians.from_dense(hessians).trace() / 2 == pytest.approx(4, rel=1e-9)


# ---- From the Gram matrix of the output Jacobians


def network(n: int = 6, num_outputs: int = 3, d: int = 7) -> dict[str, Tensor]:
    J, root = randn(n, num_outputs, d, seed=6), randn(n, num_outputs, num_outputs, seed=7)
    return {
        "J": J,
        "gram": torch.einsum("iap,jbp->iajb", J, J),
        "slopes": randn(n, num_outputs, seed=8),
        "curvatures": root @ root.mT,
        "losses": randn(n, seed=9).abs(),
    }


def test_gram_and_dense_hessians_tell_the_same() -> None:
    net = network()
    dense = SampleHessians.from_dense(net["J"].mT @ net["curvatures"] @ net["J"])
    gram = SampleHessians.from_gram(net["gram"], net["curvatures"])
    torch.testing.assert_close(gram.products, dense.products)
    torch.testing.assert_close(gram.traces, dense.traces)


def test_the_frobenius_norm_is_that_of_the_mean() -> None:
    for hessians in FAMILIES.values():
        expected = torch.linalg.matrix_norm(hessians.mean(0)).item()
        assert SampleHessians.from_dense(hessians).frobenius_norm() == pytest.approx(expected, rel=1e-12)


def dense_alignment(net: dict[str, Tensor]) -> float:
    gradients = torch.einsum("iap,ia->ip", net["J"], net["slopes"])
    G = (net["J"].mT @ net["curvatures"] @ net["J"]).mean(0)
    noise = torch.cov(gradients.mT, correction=0)
    return ((noise * G).sum() / (2 * net["losses"].mean() * G.square().sum())).item()


def of_gram(net: dict[str, Tensor], chosen: Tensor | None = None, dataset_size: int | None = None) -> float:
    i = torch.arange(len(net["losses"])) if chosen is None else chosen
    gram = net["gram"][i][:, :, i]
    return alignment(gram, net["slopes"][i], net["curvatures"][i], net["losses"][i], dataset_size=dataset_size)


def test_alignment_is_that_of_the_dense_matrices() -> None:
    assert of_gram(network()) == pytest.approx(dense_alignment(network()), rel=1e-10)


def test_noise_of_the_shape_of_the_curvature_and_the_size_of_the_loss_has_alignment_1() -> None:
    n = 4
    residuals = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)[:, None]
    J = torch.ones(n, 1, 1, dtype=torch.float64)  # all samples alike, residuals that cancel
    gram = torch.einsum("iap,jbp->iajb", J, J)
    ones = torch.ones(n, 1, 1, dtype=torch.float64)
    assert alignment(gram, residuals, ones, residuals[:, 0] ** 2 / 2) == pytest.approx(1, rel=1e-12)


def test_without_loss_or_curvature_there_is_no_alignment() -> None:
    net = network()
    assert math.isnan(alignment(net["gram"], net["slopes"], net["curvatures"], torch.zeros(6)))
    assert math.isnan(alignment(0 * net["gram"], net["slopes"], net["curvatures"], net["losses"]))


# ---- Some of the samples


def subsets(n: int, m: int) -> list[Tensor]:
    return [torch.tensor(chosen) for chosen in itertools.combinations(range(n), m)]


def test_estimates_from_some_of_the_samples_are_unbiased_over_all_ways_to_draw_them() -> None:
    net = network()
    everyone = SampleHessians.from_gram(net["gram"], net["curvatures"])
    along = everyone.traces
    norms, traces, variances, numerators = [], [], [], []
    for chosen in subsets(6, 4):
        some = everyone.take(chosen)
        norms.append(some.frobenius_norm(dataset_size=6) ** 2)
        traces.append(some.trace_condition(dataset_size=6, batch_size=2, replacement=False) * some.trace())
        mean = along[chosen].mean().item()
        variances.append(
            (directional_condition(along[chosen], dataset_size=6, batch_size=2, replacement=False) - mean) * mean
        )
        # What alignment divides by is undone: its numerator is the estimate.
        numerators.append(of_gram(net, chosen, 6) * norms[-1] * net["losses"][chosen].mean().item())
    mean = torch.tensor([norms, traces, variances, numerators], dtype=torch.float64).mean(1).tolist()
    p = noise_fraction(6, 2, replacement=False)
    assert mean[0] == pytest.approx(everyone.frobenius_norm() ** 2, rel=1e-10)
    assert mean[1] == pytest.approx(
        everyone.trace_condition(batch_size=2, replacement=False) * everyone.trace(), rel=1e-10
    )
    assert mean[2] == pytest.approx(p * along.var(correction=0).item(), rel=1e-10)
    assert mean[3] == pytest.approx(
        of_gram(net) * everyone.frobenius_norm() ** 2 * net["losses"].mean().item(), rel=1e-10
    )


def test_the_whole_dataset_is_no_estimate() -> None:
    net = network()
    everyone = SampleHessians.from_gram(net["gram"], net["curvatures"])
    kind = {"batch_size": 2, "replacement": False}
    assert everyone.frobenius_norm(dataset_size=6) == everyone.frobenius_norm()
    assert everyone.trace_condition(**kind, dataset_size=6) == everyone.trace_condition(**kind)
    assert of_gram(net, dataset_size=6) == of_gram(net)


def test_too_few_samples_of_more_say_nothing() -> None:
    net = network()
    one = SampleHessians.from_gram(net["gram"], net["curvatures"]).take(torch.tensor([0]))
    assert math.isnan(one.frobenius_norm(dataset_size=6))
    assert math.isnan(one.trace_condition(batch_size=2, replacement=False, dataset_size=6))
    assert math.isnan(directional_condition(torch.ones(1), batch_size=2, replacement=False, dataset_size=6))
    assert math.isnan(of_gram(net, torch.tensor([0, 1]), 6))
    assert one.frobenius_norm() == pytest.approx(one.products.sqrt().item())


@pytest.mark.parametrize("num_groups", [None, 10])
def test_the_jackknife_error_is_the_spread_over_draws(num_groups: int | None) -> None:
    """Of the trace condition of 30 out of 60 samples: root mean square error against mean squared reported error."""
    hessians = SampleHessians.from_dense(rank_one(randn(60, 5, seed=10)))
    kind = {"batch_size": 1, "replacement": False, "dataset_size": 60}
    truth = hessians.trace_condition(**kind)
    generator = torch.Generator().manual_seed(0)
    squares, reported = [], []
    for _ in range(300):
        some = hessians.take(torch.randperm(60, generator=generator)[:30])
        squares.append((some.trace_condition(**kind) - truth) ** 2)
        statistic: Callable[[Tensor], float] = lambda i, some=some: some.take(i).trace_condition(**kind)  # noqa: E731
        reported.append(jackknife(statistic, 30, dataset_size=60, num_groups=num_groups) ** 2)
    ratio = sum(reported) / sum(squares)
    assert 0.7 < ratio < 1.4  # the ratio of two means of 300 squares is known to some 10 %


def test_the_jackknife_knows_the_whole_dataset_and_the_single_sample() -> None:
    assert jackknife(lambda chosen: float(len(chosen)), 5, dataset_size=5) == 0
    assert jackknife(lambda chosen: 0.0, 1, dataset_size=5) == math.inf


# ---- What is refused


def test_the_noise_of_a_full_batch_is_none_and_of_a_single_sample_all() -> None:
    assert [noise_fraction(8, b, replacement=False) for b in (1, 8)] == [1, 0]
    assert [noise_fraction(8, b, replacement=True) for b in (1, 8, 16)] == [1, 1 / 8, 1 / 16]
    assert noise_fraction(1, 1, replacement=False) == 0


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_no_samples_is_refused(batch_size: int) -> None:
    with pytest.raises(ValueError, match=rf"batch_size={batch_size} of 8 samples: both must be at least 1"):
        noise_fraction(8, batch_size, replacement=False)


def test_a_batch_of_more_samples_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size=9 is more than the 8 samples there are"):
        noise_fraction(8, 9, replacement=False)


def test_hessians_that_are_not_positive_semidefinite_or_not_symmetric_are_refused() -> None:
    for wrong in (torch.diag_embed(torch.tensor([[1.0, -1.0]])), torch.tensor([[[1.0, 2.0], [0.0, 1.0]]])):
        with pytest.raises(ValueError, match="must be symmetric and positive semidefinite"):
            sgd_threshold(wrong, batch_size=1, replacement=False)


def test_hessians_that_are_not_finite_or_not_square_are_refused() -> None:
    with pytest.raises(ValueError, match="a Hessian is not finite"):
        sgd_threshold(torch.full((1, 2, 2), math.nan), batch_size=1, replacement=False)
    with pytest.raises(ValueError, match=r"hessians has shape \(2, 2\); pass one square matrix a sample"):
        sgd_threshold(torch.eye(2), batch_size=1, replacement=False)


def test_a_rank_too_large_to_enumerate_is_refused_but_not_a_dimension() -> None:
    with pytest.raises(ValueError, match="rank 65, and the exact threshold is for at most 64"):
        sgd_threshold(torch.eye(65)[None], batch_size=1, replacement=False)
    lifted = torch.zeros(1, 300, 300)
    lifted[0, 0, 0] = 4.0
    assert sgd_threshold(lifted, batch_size=1, replacement=False) == pytest.approx(0.5)

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import pytest
import torch
from torch import Tensor

from spectral_callbacks.linalg import Eigenpairs, Estimate, Matrix, Status, eigsh
from spectral_callbacks.linalg.trace import Method, frobenius_norm, trace
from tests.linalg.test_sharding import NUM_RANKS, Group, Shard
from tests.linalg.trained import trained_hessian
from tests.problems import SPECTRA, Counting, Diagonal, Scaled, symmetric

METHODS: tuple[Method, ...] = get_args(Method)
LEARNING = ("hutch++", "xtrace")


@dataclasses.dataclass(frozen=True)
class Trials:
    """Estimates from as many seeds, against the truth."""

    errors: Tensor
    claimed: Tensor

    @property
    def rms(self) -> float:
        return self.errors.square().mean().sqrt().item()

    @property
    def rms_claimed(self) -> float:
        return self.claimed.square().mean().sqrt().item()

    @property
    def coverage(self) -> float:
        return (self.errors.abs() <= 2 * self.claimed).double().mean().item()

    @property
    def z_of_bias(self) -> float:
        return (self.errors.mean() / self.errors.std() * math.sqrt(len(self.errors))).item()


def _trials(estimate: Callable[[torch.Generator], Estimate], truth: float, *, num_seeds: int = 200) -> Trials:
    found = [estimate(torch.Generator().manual_seed(seed)) for seed in range(num_seeds)]
    values, errors = torch.tensor([(e.value, e.error) for e in found], dtype=torch.float64).unbind(1)
    return Trials(values - truth, errors)


def _pairs(A: Tensor, k: int, *, noise: float = 0.0) -> Eigenpairs:
    """The k eigenpairs of largest magnitude, or Ritz pairs of a perturbed subspace."""
    values, X = torch.linalg.eigh(A)
    chosen = X[:, values.abs().argsort(descending=True)[:k]]
    X = torch.linalg.qr(chosen + noise * torch.randn(chosen.shape, dtype=torch.float64))[0]
    ritz, S = torch.linalg.eigh(X.mT @ A @ X)
    X = X @ S
    return Eigenpairs(ritz, X, torch.linalg.vector_norm(A @ X - X * ritz, dim=0), Status.CONVERGED, 0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["positive", "indefinite", "clustered", "repeated", "graded", "negative"])
def test_no_method_is_biased_and_each_knows_its_error(name: str, method: Method) -> None:
    """Coverage at 2 standard errors, over 200 seeds, a binomial spread of 1.6 points.

    The t distribution has 95 % at 30 samples, 93.5 % at the 15 of xtrace, 92.3 % at the 10 of hutch++.
    """
    A, pairs = symmetric(SPECTRA[name]), None
    if method == "deflated":
        pairs = _pairs(A, 4, noise=0.1)
    trials = _trials(
        lambda generator: trace(Matrix(A), method=method, generator=generator, eigenpairs=pairs),
        SPECTRA[name].sum().item(),
    )
    assert abs(trials.z_of_bias) < 4
    assert 0.8 < trials.rms_claimed / trials.rms < 1.3
    assert 0.88 <= trials.coverage <= 0.98


@pytest.mark.parametrize("name", ["indefinite", "repeated"])
def test_the_error_of_hutchinson_is_that_of_theory(name: str) -> None:
    A = symmetric(SPECTRA[name])
    theory = math.sqrt(2 * (A.square().sum() - A.diagonal().square().sum()).item() / 30)
    trials = _trials(lambda generator: trace(Matrix(A), method="hutchinson", generator=generator), A.trace().item())
    assert abs(trials.rms / theory - 1) < 0.15
    assert abs(trials.rms_claimed / theory - 1) < 0.05


def test_the_error_of_deflation_is_that_of_theory_on_the_complement() -> None:
    A = symmetric(SPECTRA["indefinite"])
    pairs = _pairs(A, 3)
    rest = A - (pairs.vectors * pairs.values) @ pairs.vectors.mT
    theory = math.sqrt(2 * (rest.square().sum() - rest.diagonal().square().sum()).item() / 30)
    trials = _trials(
        lambda generator: trace(Matrix(A), method="deflated", generator=generator, eigenpairs=pairs), A.trace().item()
    )
    assert abs(trials.rms / theory - 1) < 0.15
    assert abs(trials.rms_claimed / theory - 1) < 0.05


def test_on_a_trained_network_xtrace_is_three_times_better_than_hutchinson_and_honest() -> None:
    """Its test vectors are Gaussian: the network's eigenvalues on a diagonal are the network to it."""
    H, eigenvalues = trained_hessian()
    hutchinson = math.sqrt(2 * (H.square().sum() - H.diagonal().square().sum()).item() / 30)
    trials = _trials(
        lambda generator: trace(Diagonal(eigenvalues), generator=generator), eigenvalues.sum().item(), num_seeds=400
    )
    assert trials.rms <= hutchinson / 3
    assert abs(trials.z_of_bias) < 4
    assert 0.93 <= trials.coverage <= 0.97
    assert abs(trials.rms_claimed / trials.rms - 1) < 0.15


def test_eigenpairs_help_xtrace_too() -> None:
    _, eigenvalues = trained_hessian()
    A = Diagonal(eigenvalues)
    pairs = eigsh(A, 10, rtol=1e-2, generator=torch.Generator().manual_seed(0))
    with_pairs, alone = (
        _trials(lambda g, p=p: trace(A, generator=g, eigenpairs=p), eigenvalues.sum().item(), num_seeds=60)
        for p in (pairs, None)
    )
    assert with_pairs.rms < alone.rms
    assert with_pairs.rms_claimed < alone.rms_claimed
    assert abs(with_pairs.z_of_bias) < 4


@pytest.mark.parametrize("name", ["positive", "indefinite", "clustered", "repeated", "graded", "negative"])
def test_the_frobenius_norm_knows_its_error(name: str) -> None:
    A = symmetric(SPECTRA[name])
    trials = _trials(lambda generator: frobenius_norm(Matrix(A), generator=generator), A.norm().item())
    assert abs(trials.errors.mean()) < 0.3 * trials.rms  # the root has a bias, which its docstring says
    assert 0.8 < trials.rms_claimed / trials.rms < 1.7  # a covariance is not taken to be negative: on the safe side
    assert 0.88 <= trials.coverage <= 0.98


def test_on_a_trained_network_the_frobenius_norm_is_right_to_one_percent() -> None:
    _, eigenvalues = trained_hessian()
    norm = eigenvalues.norm().item()
    trials = _trials(lambda generator: frobenius_norm(Diagonal(eigenvalues), generator=generator), norm, num_seeds=100)
    assert trials.rms < 0.01 * norm
    assert trials.coverage >= 0.88


@pytest.mark.parametrize("method", LEARNING)
def test_a_matrix_of_low_rank_is_estimated_exactly(method: Method, generator: torch.Generator) -> None:
    spectrum = SPECTRA["rank deficient"]
    for dtype in (torch.float32, torch.float64):
        A = Matrix(symmetric(spectrum).to(dtype))
        estimate, norm = trace(A, method=method, generator=generator), frobenius_norm(A, generator=generator)
        limit = 300 * torch.finfo(dtype).eps
        assert abs(estimate.value - spectrum.sum().item()) <= limit
        assert abs(norm.value - spectrum.norm().item()) <= limit
        assert max(estimate.error, norm.error) <= limit


@pytest.mark.parametrize("method", METHODS)
def test_where_n_products_are_enough_the_trace_is_exact(method: Method, generator: torch.Generator) -> None:
    A = torch.randn(30, 30, dtype=torch.float64, generator=generator)
    A = A + A.mT
    pairs = _pairs(A, 2)
    counting = Counting(Matrix(A))
    estimate = trace(counting, method=method, generator=generator, eigenpairs=pairs)
    assert estimate.value == pytest.approx(A.trace().item(), abs=1e-11)
    assert 0 < estimate.error < 1e-13
    assert counting.num_matvecs == 30
    assert frobenius_norm(counting, generator=generator).value == pytest.approx(A.norm().item(), rel=1e-12)


@pytest.mark.parametrize("num_matvecs", [1, 2, 3, 5, 6, 7, 20, 31])
@pytest.mark.parametrize("method", METHODS)
def test_no_more_products_are_spent_than_allowed(method: Method, num_matvecs: int, generator: torch.Generator) -> None:
    A = symmetric(SPECTRA["indefinite"])
    counting, pairs = Counting(Matrix(A)), _pairs(A, 2)
    estimate = trace(counting, method=method, num_matvecs=num_matvecs, generator=generator, eigenpairs=pairs)
    assert num_matvecs - 2 <= counting.num_matvecs <= num_matvecs
    assert math.isfinite(estimate.value)
    assert math.isinf(estimate.error) == (num_matvecs == 1)
    assert 1 <= estimate.num_samples <= num_matvecs
    counting.num_matvecs = 0
    frobenius_norm(counting, num_matvecs=num_matvecs, generator=generator)
    assert num_matvecs - 1 <= counting.num_matvecs <= num_matvecs


@pytest.mark.parametrize("method", LEARNING)
def test_with_few_products_the_learning_methods_are_hutchinsons(method: Method) -> None:
    A = Matrix(symmetric(SPECTRA["indefinite"]))
    same, other = (
        [
            trace(A, num_matvecs=num_matvecs, method=m, generator=torch.Generator().manual_seed(0))
            for m in (method, "hutchinson")
        ]
        for num_matvecs in (5, 6)
    )
    assert same[0] == same[1]
    assert other[0] != other[1]


@pytest.mark.parametrize("method", LEARNING)
def test_only_inner_products_of_gram_count(method: Method, generator: torch.Generator) -> None:
    """D⁻¹ A D of low rank: exact for any test vectors, as long as the bases are orthonormal in its inner product."""
    spectrum, scale = SPECTRA["rank deficient"], torch.linspace(1.0, 4.0, 65, dtype=torch.float64)
    A = Scaled(symmetric(spectrum), scale)
    estimate, norm = trace(A, method=method, generator=generator), frobenius_norm(A, generator=generator)
    assert estimate.value == pytest.approx(spectrum.sum().item(), abs=1e-11)
    assert norm.value == pytest.approx(spectrum.norm().item(), abs=1e-11)
    assert max(estimate.error, norm.error) < 1e-10
    whole = trace(A, num_matvecs=65, generator=generator)
    assert whole.value == pytest.approx(spectrum.sum().item(), abs=1e-11)
    pairs = eigsh(A, 5, which="BE", rtol=1e-10, generator=generator)
    deflated = trace(A, method="deflated", generator=generator, eigenpairs=pairs)
    assert deflated.value == pytest.approx(spectrum.sum().item(), abs=1e-6)


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_ranks_that_share_the_vectors_find_the_same_trace(method: Method) -> None:
    A, group = symmetric(SPECTRA["indefinite"]), Group()

    def estimates(rank: int) -> list[tuple[Estimate, Estimate]]:
        shard, generator = Shard(A, rank, group), torch.Generator().manual_seed(rank)
        return [
            (trace(shard, method=method, generator=generator), frobenius_norm(shard, generator=generator))
            for _ in range(100)
        ]

    with ThreadPoolExecutor(NUM_RANKS) as ranks:
        first, second = ranks.map(estimates, range(NUM_RANKS))
    assert first == second
    for found, truth in zip(zip(*first, strict=True), (A.trace(), A.norm()), strict=True):
        z = torch.tensor([(e.value - truth.item()) / e.error for e in found])
        assert abs(z.mean()) < 0.6  # 4 standard errors of 100 with some skew
        assert (z.abs() <= 2).double().mean() > 0.8


@pytest.mark.parametrize("num_matvecs", [3, 30, 200])
@pytest.mark.parametrize("method", METHODS)
def test_a_product_that_is_not_finite_gives_no_number(
    method: Method, num_matvecs: int, generator: torch.Generator
) -> None:
    A = symmetric(SPECTRA["indefinite"])
    pairs = _pairs(A, 2)
    A[3, 4] = torch.inf
    estimate = trace(Matrix(A), method=method, num_matvecs=num_matvecs, generator=generator, eigenpairs=pairs)
    norm = frobenius_norm(Matrix(A), num_matvecs=num_matvecs, generator=generator)
    for found in (estimate, norm):
        assert math.isnan(found.value)
        assert math.isinf(found.error)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", METHODS)
def test_an_eigenvalue_that_is_not_finite_gives_no_number(
    method: Method, value: float, generator: torch.Generator
) -> None:
    A = symmetric(SPECTRA["indefinite"])
    pairs = _pairs(A, 2)
    pairs = dataclasses.replace(pairs, values=torch.tensor([1.0, value], dtype=torch.float64))
    estimate = trace(Matrix(A), method=method, generator=generator, eigenpairs=pairs)
    assert math.isnan(estimate.value)
    assert math.isinf(estimate.error)


@pytest.mark.parametrize("num_matvecs", [5, 30, 100])
@pytest.mark.parametrize("method", METHODS)
def test_trace_and_norm_are_homogeneous(method: Method, num_matvecs: int) -> None:
    """In value and error, exactly for a unit that is a power of two."""
    for dtype, exponents in ((torch.float32, (-100, -40, 40, 100)), (torch.float64, (-500, -66, 66, 500))):
        A = symmetric(SPECTRA["indefinite"]).to(dtype)
        pairs = _pairs(A.double(), 2)
        pairs = dataclasses.replace(pairs, vectors=pairs.vectors.to(dtype))

        def estimates(unit: float, A: Tensor = A, pairs: Eigenpairs = pairs) -> tuple[Estimate, Estimate]:
            known = dataclasses.replace(pairs, values=unit * pairs.values)
            matrix, generator = Matrix(unit * A), torch.Generator().manual_seed(0)
            return (
                trace(matrix, num_matvecs=num_matvecs, method=method, generator=generator, eigenpairs=known),
                frobenius_norm(matrix, num_matvecs=num_matvecs, generator=generator),
            )

        for exponent in exponents:
            unit = 2.0**exponent
            for one, other in zip(estimates(1.0), estimates(unit), strict=True):
                assert other.value == pytest.approx(unit * one.value, rel=1e-12, abs=0)
                assert other.error == pytest.approx(unit * one.error, rel=1e-12, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_a_sum_of_what_cancels_is_known_to_rounding(method: Method, dtype: torch.dtype) -> None:
    """±1e6 beside zeros: exact paths, closed sketches, and what known pairs leave err by rounding, and say so."""
    A = symmetric(torch.cat([torch.tensor([1e6, -1e6]), torch.zeros(118)])).to(dtype)
    pairs = _pairs(A.double(), 2)
    known = None if method in LEARNING else dataclasses.replace(pairs, vectors=pairs.vectors.to(dtype))
    truth, norm = math.fsum(A.diagonal().tolist()), math.sqrt(math.fsum(A.double().square().flatten().tolist()))
    for m in (30, 120):
        for measure, value in (
            (lambda g, m=m: trace(Matrix(A), num_matvecs=m, method=method, generator=g, eigenpairs=known), truth),
            (lambda g, m=m: frobenius_norm(Matrix(A), num_matvecs=m, generator=g), norm),
        ):
            trials = _trials(measure, value, num_seeds=20)
            assert trials.coverage >= 0.95
            assert trials.rms_claimed <= 20 * torch.finfo(dtype).eps * norm


def test_zero_has_trace_and_norm_zero(generator: torch.Generator) -> None:
    A = Diagonal(torch.zeros(50))
    for method in ("hutchinson", *LEARNING):
        assert trace(A, method=method, generator=generator).value == 0
    assert frobenius_norm(A, generator=generator).value == 0


def test_bad_arguments_are_named(generator: torch.Generator) -> None:
    A = Matrix(torch.eye(40))
    with pytest.raises(ValueError, match="num_matvecs=0 must be at least 1"):
        trace(A, num_matvecs=0, generator=generator)
    with pytest.raises(ValueError, match="num_matvecs=0 must be at least 1"):
        frobenius_norm(A, num_matvecs=0, generator=generator)
    with pytest.raises(ValueError, match="method='power' must be one of 'hutchinson'"):
        trace(A, method="power", generator=generator)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match='method="deflated" needs eigenpairs'):
        trace(A, method="deflated", generator=generator)
    with pytest.raises(ValueError, match=r"shape \(3, 2\); only a square one"):
        trace(Matrix(torch.ones(3, 2)), generator=generator)

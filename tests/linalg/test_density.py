from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spectral_callbacks.linalg import Eigenpairs, Estimate, Matrix, Status, eigsh
from spectral_callbacks.linalg.density import Density, spectral_density
from spectral_callbacks.linalg.quadrature import mass_bounds
from tests.linalg.trained import trained_hessian
from tests.problems import SPECTRA, Counting, Diagonal, Scaled, symmetric


def _uniform(n: int, low: float = -1.0, high: float = 3.0) -> Tensor:
    return torch.linspace(low, high, n, dtype=torch.float64)


def _largest(eigenvalues: Tensor, k: int) -> Eigenpairs:
    """Exact, of a diagonal matrix."""
    chosen = eigenvalues.abs().argsort(descending=True)[:k]
    vectors = torch.eye(len(eigenvalues), dtype=torch.float64)[:, chosen]
    return Eigenpairs(eigenvalues[chosen], vectors, torch.zeros(k, dtype=torch.float64), Status.CONVERGED, 0)


def _share_below(eigenvalues: Tensor, x: float) -> float:
    return (eigenvalues < x).double().mean().item()


def _z_scores(measure: Callable[[Density], Estimate], densities: list[Density], truth: float) -> Tensor:
    found = [measure(density) for density in densities]
    return torch.tensor([(e.value - truth) / e.error for e in found], dtype=torch.float64)


@pytest.fixture(scope="module")
def densities() -> list[Density]:
    """Of a trained network, by 60 seeds; the start vectors are Gaussian, so that its eigenvectors do not matter."""
    A = Diagonal(trained_hessian()[1])
    return [spectral_density(A, generator=torch.Generator().manual_seed(seed)) for seed in range(60)]


@pytest.mark.parametrize("name", SPECTRA)
def test_moments_below_degree_2m_are_those_of_the_start_vectors(name: str) -> None:
    """The nodes and weights give vᵀAᵏv of the very vectors that were drawn."""
    A = symmetric(SPECTRA[name])
    density = spectral_density(Matrix(A), num_steps=4, num_probes=2, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    V = torch.cat([torch.randn(len(A), 1, dtype=torch.float64, generator=generator) for _ in range(2)], dim=1)
    V = V / torch.linalg.vector_norm(V, dim=0)
    assert density.nodes.shape == density.weights.shape == (2, 4)
    torch.testing.assert_close(density.weights.sum(1), torch.ones(2, dtype=torch.float64))
    power = V
    for k in range(1, 8):
        power = A @ power
        moments = (V * power).sum(0)
        torch.testing.assert_close((density.weights * density.nodes**k).sum(1), moments, rtol=1e-9, atol=1e-10)
        assert density.moment(k).value == pytest.approx(moments.mean().item(), rel=1e-9, abs=1e-10)
    power = A @ power
    wrong = (density.weights * density.nodes**8).sum(1)
    assert ((wrong - (V * power).sum(0)).abs() > 1e-9 * wrong.abs()).all()


def test_on_a_trained_network_mass_mean_and_variance_are_within_their_errors(densities: list[Density]) -> None:
    _, eigenvalues = trained_hessian()
    eigenvalues = torch.where(eigenvalues.abs() < 1e-9, 0.0, eigenvalues)
    measures: dict[str, tuple[Callable[[Density], Estimate], float]] = {
        "mean": (lambda d: d.moment(1), eigenvalues.mean().item()),
        "variance": (Density.variance, eigenvalues.var(correction=0).item()),
        "fourth moment": (lambda d: d.moment(4), (eigenvalues**4).mean().item()),
        **{
            f"mass below {x}": (lambda d, x=x: d.mass_below(x), _share_below(eigenvalues, x))
            for x in (-0.01, 0.05, 0.5, 1.5)
        },
    }
    for name, (measure, truth) in measures.items():
        z = _z_scores(measure, densities, truth)
        assert (z.abs() <= 2).double().mean() >= 0.9, name
        assert z.square().mean() > 0.2, name  # and they are not so large that they say nothing


def test_errors_of_moments_are_those_of_theory() -> None:
    """Flat spectrum: no outlier, so that the variance is known well; 2 (mean λ² - (mean λ)²) / (p (n + 2))."""
    eigenvalues = _uniform(400)
    densities = [
        spectral_density(Diagonal(eigenvalues), num_steps=10, generator=torch.Generator().manual_seed(seed))
        for seed in range(100)
    ]
    for k in (1, 2):
        values = eigenvalues**k
        theory = math.sqrt(2 * values.var(correction=0).item() / (3 * 402))
        found = [density.moment(k) for density in densities]
        errors = torch.tensor([e.value for e in found]) - values.mean()
        assert abs(errors.square().mean().sqrt() / theory - 1) < 0.2
        assert abs(errors.mean()) < 4 * theory / 10
        torch.testing.assert_close(torch.tensor([e.error for e in found]).mean().item(), theory, rtol=0.05, atol=0)


@pytest.mark.parametrize("known", [0, 10])
def test_the_negative_mass_of_a_trained_network_is_within_its_error_and_by_90_steps_within_two_points(
    known: int,
) -> None:
    """Exact zeros, 7 % of all, have no sign: what is found lies between the shares without and with them."""
    _, eigenvalues = trained_hessian()
    fewest, most = _share_below(eigenvalues, -1e-9), _share_below(eigenvalues, 1e-9)
    pairs = _largest(eigenvalues, known) if known else None
    for num_steps, num_probes, points in ((30, 3, 0.1), (90, 1, 0.02)):
        values = []
        for seed in range(10):
            density = spectral_density(
                Diagonal(eigenvalues), num_steps=num_steps, num_probes=num_probes,
                generator=torch.Generator().manual_seed(seed), eigenpairs=pairs,
            )  # fmt: skip
            negative = density.mass_below(0.0)
            assert fewest - 2 * negative.error <= negative.value <= most + 2 * negative.error
            values.append(negative.value)
        assert fewest - points <= sum(values) / len(values) <= most + points


def test_known_outliers_make_moments_exact(densities: list[Density]) -> None:
    _, eigenvalues = trained_hessian()
    density = spectral_density(
        Diagonal(eigenvalues), generator=torch.Generator().manual_seed(0), eigenpairs=_largest(eigenvalues, 10)
    )
    assert density.nodes.shape == (3, 40)
    torch.testing.assert_close(density.weights.sum(1), torch.ones(3, dtype=torch.float64))
    for measure, truth in (
        (lambda d: d.moment(1), eigenvalues.mean().item()),
        (Density.variance, eigenvalues.var(correction=0).item()),
    ):
        estimate = measure(density)
        assert estimate.error < measure(densities[0]).error / 3
        assert abs(estimate.value - truth) < 3 * estimate.error
    above = _share_below(eigenvalues, 1.0)
    assert density.mass_below(1.0).value == pytest.approx(above, abs=0.1 / len(eigenvalues))


def test_eigenpairs_of_a_search_do_as_well_as_exact_ones() -> None:
    eigenvalues = SPECTRA["indefinite"].repeat_interleave(3) + 1e-3 * torch.arange(3 * len(SPECTRA["indefinite"]))
    A = Matrix(symmetric(eigenvalues))
    pairs = eigsh(A, 4, which="BE", generator=torch.Generator().manual_seed(0))
    density = spectral_density(A, num_steps=20, generator=torch.Generator().manual_seed(0), eigenpairs=pairs)
    mean = density.moment(1)
    assert abs(mean.value - eigenvalues.mean().item()) < 3 * mean.error
    assert density.num_matvecs == 60


@pytest.mark.parametrize("q", [0.1, 0.5, 0.9])
def test_quantiles_are_within_their_errors(q: float) -> None:
    eigenvalues = _uniform(1000)
    found = [
        spectral_density(Diagonal(eigenvalues), generator=torch.Generator().manual_seed(seed)).quantile(q)
        for seed in range(10)
    ]
    errors = torch.tensor([e.value for e in found]) - (-1 + 4 * q)
    claimed = torch.tensor([e.error for e in found])
    assert (errors.abs() <= 2 * claimed).all()
    assert (claimed < 0.1).all()


def test_a_histogram_adds_up_and_agrees_with_the_spectrum() -> None:
    eigenvalues = _uniform(1000)
    density = spectral_density(Diagonal(eigenvalues), generator=torch.Generator().manual_seed(0))
    edges = torch.linspace(-1.5, 3.5, 11, dtype=torch.float64)
    masses = density.histogram(edges)
    counts = torch.histc(eigenvalues, 10, -1.5, 3.5) / 1000
    assert masses.shape == (10,)
    assert (masses >= 0).all()
    assert masses.sum().item() == pytest.approx(1.0, abs=1e-3)
    torch.testing.assert_close(masses, counts, rtol=0, atol=0.05)


def test_masses_of_a_few_atoms_are_the_random_weights_exactly() -> None:
    """Three distinct eigenvalues: the basis closes after three steps; at x, half is below x unless nothing else is."""
    spectrum = torch.tensor([0.0] * 270 + [1.0] * 20 + [-2.0] * 10)
    for dtype in (torch.float32, torch.float64):
        A = Counting(Matrix(symmetric(spectrum).to(dtype)))
        density = spectral_density(A, num_probes=2, generator=torch.Generator().manual_seed(0))
        assert A.num_matvecs == density.num_matvecs == 6
        assert density.status is Status.CONVERGED
        weights = density.weights.mean(0)
        negative = weights[density.nodes[0] < -1].sum().item()
        zero = weights[density.nodes[0].abs() < 1e-3].sum().item()
        for x, mass in ((-2.5, 0.0), (-2.0, 0.0), (-1.0, negative), (0.0, negative + zero / 2), (2.0, 1.0)):
            assert density.mass_below(x).value == pytest.approx(mass, abs=1e-5)
        assert abs(density.mass_below(-1.0).value - 1 / 30) < 3 * density.mass_below(-1.0).error < 0.1
        assert density.mass_below(-2.5).error == density.mass_below(2.0).error == 0
        assert density.mass_below(-2.0).error == pytest.approx(negative / math.sqrt(3))
        assert density.mass_below(0.0).error == pytest.approx(zero / math.sqrt(12), rel=0.02)
        assert density.quantile(0.5).value == pytest.approx(0.0, abs=1e-3)
        assert density.quantile(0.99).value == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("A", [torch.eye(200), torch.zeros(200, 200)])
def test_one_eigenvalue_is_found_in_one_step(A: Tensor, generator: torch.Generator) -> None:
    density = spectral_density(Matrix(A), generator=generator)
    assert density.num_matvecs == 3
    assert density.moment(1).value == pytest.approx(A[0, 0].item(), abs=1e-6)
    assert density.variance().value == pytest.approx(0.0, abs=1e-6)
    assert density.mass_below(0.5).value == pytest.approx(1 - A[0, 0].item())
    assert density.quantile(0.3).value == pytest.approx(A[0, 0].item(), abs=1e-3)


@pytest.mark.parametrize("name", SPECTRA)
def test_where_n_products_are_enough_the_spectrum_is_exact(name: str, generator: torch.Generator) -> None:
    spectrum = SPECTRA[name]
    scale = torch.linspace(1.0, 4.0, len(spectrum), dtype=torch.float64)
    for A in (Matrix(symmetric(spectrum)), Scaled(symmetric(spectrum), scale)):
        density = spectral_density(A, generator=generator)
        assert density.num_matvecs == len(spectrum)
        mean, below, median = density.moment(1), density.mass_below(0.31), density.quantile(0.25)
        assert mean.value == pytest.approx(spectrum.mean().item(), abs=1e-10 * spectrum.abs().max().item())
        assert below.value == pytest.approx(_share_below(spectrum, 0.31))
        assert 0 < mean.error < 1e-14 * spectrum.abs().max().item()
        assert below.error == 0
        assert median.error < 1e-8 * spectrum.abs().max().item()
        quarter = spectrum.sort().values[math.ceil(len(spectrum) / 4) - 1].item()
        assert median.value == pytest.approx(quarter, abs=1e-8 * spectrum.abs().max().item())


def test_the_mass_below_a_point_lies_between_the_bounds_whatever_the_steps() -> None:
    """Of the distribution that the start vector sees, of which the moments are: exactly, at every point."""
    eigenvalues = trained_hessian()[1]
    v = torch.randn(len(eigenvalues), dtype=torch.float64, generator=torch.Generator().manual_seed(0)).square()
    seen = v / v.sum()
    points = torch.tensor([-0.02, -1e-3, 0.0, 1e-4, 0.01, 0.3, 1.0, 5.0], dtype=torch.float64)
    truth = torch.stack([seen[eigenvalues < x].sum() for x in points])
    widths = []
    for num_steps in (1, 5, 20, 60):
        density = spectral_density(
            Diagonal(eigenvalues), num_steps=num_steps, num_probes=1, generator=torch.Generator().manual_seed(0)
        )
        low, open_, _ = (b[0] for b in mass_bounds(density.diagonals, density.couplings, points, rounding=1e-12))
        assert (low <= truth + 1e-9).all()
        assert (truth <= low + open_ + 1e-9).all()
        widths.append(open_)
    for wider, narrower in itertools.pairwise(widths):
        assert (narrower <= wider + 1e-9).all()
    assert not (widths[-1] > 0.3).all()


def test_inner_products_of_gram_are_the_only_ones() -> None:
    """D⁻¹ A D has A's eigenvalues, and is symmetric in the inner product of its gram alone."""
    spectrum = torch.cat([_uniform(300), torch.tensor([8.0, -6.0])])
    A = Scaled(symmetric(spectrum), torch.linspace(1.0, 3.0, 302, dtype=torch.float64))
    density = spectral_density(A, num_steps=20, generator=torch.Generator().manual_seed(0))
    assert density.status is Status.CONVERGED
    for end, value in ((density.nodes.amax(1), 8.0), (density.nodes.amin(1), -6.0)):
        torch.testing.assert_close(end, torch.full((3,), value, dtype=torch.float64))


@pytest.mark.parametrize("n", [60, 200])
def test_products_of_no_symmetric_matrix_are_noticed(n: int, generator: torch.Generator) -> None:
    A = torch.randn(n, n, dtype=torch.float64, generator=generator)
    assert spectral_density(Matrix(A), generator=generator).status is Status.BREAKDOWN
    assert spectral_density(Matrix(A + A.mT), generator=generator).status is Status.CONVERGED


@pytest.mark.parametrize("n", [60, 200])
def test_a_product_that_is_not_finite_gives_no_number(n: int, generator: torch.Generator) -> None:
    A = torch.eye(n)
    A[3, 4] = torch.nan
    density = spectral_density(Matrix(A), generator=generator)
    assert density.status is Status.NONFINITE
    for estimate in (density.moment(1), density.variance(), density.mass_below(0.0), density.quantile(0.5)):
        assert math.isnan(estimate.value)
        assert math.isinf(estimate.error)
    assert density.histogram(torch.linspace(0, 1, 4)).isnan().all()
    assert density.nodes.isnan().any()


def test_single_precision_is_enough(generator: torch.Generator) -> None:
    eigenvalues = _uniform(1000)
    density = spectral_density(Diagonal(eigenvalues.float()), generator=generator)
    assert density.nodes.dtype == density.weights.dtype == torch.float64
    for estimate, truth in ((density.moment(1), 1.0), (density.mass_below(0.0), 0.25), (density.quantile(0.5), 1.0)):
        assert abs(estimate.value - truth) < 3 * estimate.error < 0.3


def test_bad_arguments_are_named(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="num_steps=0 must be at least 1"):
        spectral_density(Matrix(torch.eye(4)), num_steps=0, generator=generator)
    with pytest.raises(ValueError, match="num_probes=0 must be at least 1"):
        spectral_density(Matrix(torch.eye(4)), num_probes=0, generator=generator)
    with pytest.raises(ValueError, match=r"shape \(3, 2\); only a square one"):
        spectral_density(Matrix(torch.ones(3, 2)), generator=generator)
    with pytest.raises(ValueError, match=r"q=1.5 must lie between 0 and 1"):
        spectral_density(Matrix(torch.eye(4)), generator=generator).quantile(1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_beside_all_nonzero_eigenvalues_there_is_nothing_but_rounding(dtype: torch.dtype) -> None:
    """Known pairs that exhaust the rank leave products that are rounding errors of A, which are no asymmetry."""
    generator = torch.Generator().manual_seed(0)
    B = torch.randn(160, 28, generator=generator, dtype=torch.float64)
    A = Matrix((B @ B.mT / 160).to(dtype))
    known = eigsh(A, 28, max_matvecs=300, generator=generator)
    density = spectral_density(A, generator=generator, eigenpairs=known)
    assert density.status is Status.CONVERGED
    assert density.moment(1).value == pytest.approx(B.square().sum().item() / 160 / 160, rel=1e-5)
    for x, value, error in (
        (-2 * density.rounding, 0.0, 0.0),
        (0.0, 0.0, 132 / 160 / math.sqrt(3)),  # nothing is below, and 0 within rounding may be
        (2 * density.rounding, 132 / 160, None),
    ):
        found = density.mass_below(x)
        assert found.value == pytest.approx(value, abs=1e-12)
        assert error is None or found.error == pytest.approx(error, abs=1e-12)


_TINY_BESIDE_LARGE = {
    "both signs": torch.cat([torch.tensor([100.0, 50.0, 20.0]), 1e-4 * torch.linspace(-1.0, 1.0, 147)]),
    "mostly positive": torch.cat([torch.tensor([1e3]), torch.full((30,), -1e-3), torch.full((119,), 1e-3)]),
    "one resolved": torch.cat([torch.tensor([100.0, -50.0]), torch.full((148,), -1e-4)]),
    "zero": torch.cat([torch.tensor([3.0]), torch.zeros(149)]),
    "negative or zero": torch.cat([torch.tensor([-3.0]), torch.zeros(149)]),
    "nothing": torch.zeros(150),
}


@pytest.mark.parametrize("num_steps", [30, 50])  # 3 x 50 are n: all eigenvalues
@pytest.mark.parametrize("name", _TINY_BESIDE_LARGE)
def test_eigenvalues_within_rounding_of_a_point_may_be_on_either_side(name: str, num_steps: int) -> None:
    """Runs close within rounding of ‖A‖, which does not mean that they know the signs of what is smaller."""
    spectrum = _TINY_BESIDE_LARGE[name]
    A = Matrix(symmetric(spectrum).float())
    unsure = (spectrum.abs() < 0.01).double().mean().item()
    below = _share_below(spectrum, -0.01)
    for seed in range(5):
        density = spectral_density(A, num_steps=num_steps, generator=torch.Generator().manual_seed(seed))
        found = density.mass_below(0.0)
        assert abs(found.value - _share_below(spectrum, 0.0)) <= 2 * found.error
        part = 0.5 if below else 0.0
        assert found.value == pytest.approx(below + part * unsure, abs=0.03)
        assert found.error == pytest.approx(unsure / math.sqrt(12 if below else 3), rel=0.03)
        for x in (-0.01, 0.01):
            assert density.mass_below(x).value == pytest.approx(_share_below(spectrum, x), abs=0.03)
            assert density.mass_below(x).error < 0.02


@pytest.mark.parametrize("num_steps", [30, 134])
def test_a_positive_semi_definite_matrix_has_no_negative_mass(num_steps: int) -> None:
    """Of full rank or not: zeros are not counted, and an error says how many of them there may be."""
    for zeros in (0, 40, 350):
        spectrum = torch.cat([torch.zeros(zeros), torch.rand(400 - zeros, generator=torch.Generator().manual_seed(0))])
        for dtype in (torch.float32, torch.float64):
            density = spectral_density(
                Matrix(symmetric(spectrum).to(dtype)), num_steps=num_steps, generator=torch.Generator().manual_seed(0)
            )
            found = density.mass_below(0.0)
            assert found.value == 0
            assert found.error >= 0.9 * zeros / 400 / math.sqrt(3)
            assert found.error <= (zeros / 400 + 0.1) / math.sqrt(3)


def test_no_share_within_the_bounds_is_more_than_two_errors_from_the_value(densities: list[Density]) -> None:
    for density in densities[:5]:
        for x in (-0.1, -0.01, -1e-3, 0.0, 1e-3, 0.05, 0.5, 1.5):
            low, open_, _ = (b.mean().item() for b in mass_bounds(
                density.diagonals, density.couplings, torch.tensor([x], dtype=torch.float64), rounding=density.rounding
            ))  # fmt: skip
            found = density.mass_below(x)
            assert low - 1e-12 <= found.value <= low + open_ + 1e-12
            assert max(found.value - low, low + open_ - found.value) <= 2 * found.error + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("unit", [2.0**-17, 2.0**17])
@pytest.mark.parametrize("name", ["indefinite", "rank deficient", "spread"])
def test_masses_have_no_unit_and_moments_have_that_of_the_matrix(name: str, unit: float, dtype: torch.dtype) -> None:
    spectrum = torch.randn(150, generator=torch.Generator().manual_seed(0)) if name == "spread" else SPECTRA[name]
    spectrum = spectrum.double().repeat_interleave(2)
    found = [
        spectral_density(
            Matrix((c * symmetric(spectrum)).to(dtype)), num_steps=20, generator=torch.Generator().manual_seed(0)
        )
        for c in (1.0, unit)
    ]
    accuracy = 1e-12  # a power of two is no rounding
    one, other = found
    largest = spectrum.abs().max().item()
    assert other.rounding == pytest.approx(unit * one.rounding, rel=accuracy)
    torch.testing.assert_close(other.nodes.amax(1) / unit, one.nodes.amax(1), rtol=accuracy, atol=accuracy)
    for x in (-1.1, -0.05, 0.05, 0.31, 0.9):
        for first, second in zip(
            *(dataclasses.astuple(d.mass_below(c * x)) for c, d in zip((1.0, unit), found, strict=True)), strict=True
        ):
            assert second == pytest.approx(first, abs=accuracy)
    for k in (1, 2, 3):
        first, second = one.moment(k), other.moment(k)
        assert second.value / unit**k == pytest.approx(first.value, abs=accuracy * largest**k)
        assert second.error / unit**k == pytest.approx(first.error, abs=accuracy * largest**k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_steps", [20, 50])
def test_the_variance_and_the_errors_do_not_depend_on_the_mean(num_steps: int, dtype: torch.dtype) -> None:
    """A spread of 1e-3 beside 1, and in double precision one of 1e-7: rounding is in the error, and nothing else is."""
    for spread in (1e-3,) if dtype == torch.float32 else (1e-3, 1e-7):
        spectrum = torch.randn(150, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        A = symmetric(spectrum)
        around, shifted = (
            spectral_density(
                Matrix((c * torch.eye(150, dtype=torch.float64) + s * A).to(dtype)),
                num_steps=num_steps, generator=torch.Generator().manual_seed(0),
            )
            for c, s in ((0.0, 1.0), (1.0, spread))
        )  # fmt: skip
        eps, truth = torch.finfo(dtype).eps, spectrum.var(correction=0).item() * spread**2
        for found, reference, power in (
            (shifted.moment(1), around.moment(1), 1), (shifted.variance(), around.variance(), 2),
        ):  # fmt: skip
            rounding = 10 * eps * spread ** (power - 1)
            assert found.error <= reference.error * spread**power * 1.2 + rounding
        assert abs(shifted.moment(1).value - 1 - spread * spectrum.mean().item()) <= 2 * shifted.moment(1).error
        assert abs(shifted.variance().value - truth) <= 3 * shifted.variance().error
        assert shifted.variance().value == pytest.approx(
            spread**2 * around.variance().value, rel=1e-3, abs=20 * eps * spread
        )


@pytest.mark.parametrize("num_steps", [20, 50])
def test_moments_of_what_cancels_are_known_to_rounding(num_steps: int) -> None:
    """±1e6 in single precision: their rounding is larger than the mean of all other eigenvalues."""
    spectrum = torch.cat([torch.tensor([1e6, -1e6]), torch.full((148,), 1e-3)])
    A = symmetric(spectrum).float()
    truth = A.double().trace().item() / 150
    for seed in range(20):
        pairs = eigsh(Matrix(A), 2, which="BE", rtol=1e-6, generator=torch.Generator().manual_seed(seed))
        mean = spectral_density(
            Matrix(A), num_steps=num_steps, generator=torch.Generator().manual_seed(seed), eigenpairs=pairs
        ).moment(1)
        assert abs(mean.value - truth) <= 2 * mean.error
        assert mean.error < 1.0


def test_masses_of_all_eigenvalues_are_not_rounded_to_single_precision(generator: torch.Generator) -> None:
    spectrum = torch.cat([torch.full((30,), -1.0), torch.ones(60)])
    assert spectral_density(Matrix(symmetric(spectrum)), generator=generator).mass_below(0.0).value == 1 / 3

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectral_callbacks.linalg import Eigenpairs, LinearOperator, Matrix, Status, eigsh
from spectral_callbacks.linalg.eigsh import Which
from tests import oracles
from tests.problems import SPECTRA, Counting, Diagonal, Scaled, symmetric

ENDS: tuple[Which, ...] = ("LA", "SA", "BE")
FLOATS = (torch.float32, torch.float64)
ISOLATED_AT_BOTH_ENDS = ("indefinite", "clustered", "repeated", "rank deficient")


def _seeded(seed: int = 100) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _defects(A: LinearOperator, pairs: Eigenpairs, eigenvalues: Tensor, *, rtol: float, k: int) -> list[str]:
    """What of the promises that hold for every spectrum and every budget is broken."""
    X, values, residuals = pairs.vectors.double(), pairs.values, pairs.residuals
    norm = eigenvalues.abs().max().item()
    rounding = 100 * torch.finfo(A.dtype).eps
    true_residuals = torch.linalg.vector_norm(A.matmat(pairs.vectors).double() - X * values, dim=0)
    distances = (eigenvalues[:, None] - values).abs().amin(dim=0)
    target = (rtol * values.abs()).clamp_min(rtol * norm / 100).clamp_min(rounding * norm)
    promises = {
        "shape": values.shape == residuals.shape == (k,) and pairs.vectors.shape == (A.shape[1], k),
        "dtype": values.dtype == residuals.dtype == torch.float64 and pairs.vectors.dtype == A.dtype,
        "orthonormal": bool(((X.mT @ X - torch.eye(k).double()).abs() <= rounding).all()),
        "residuals are true": bool(((true_residuals - residuals).abs() <= rounding * norm).all()),
        "an eigenvalue within each residual": bool((distances <= residuals + rounding * norm).all()),
        "converged only within tolerance": pairs.status is not Status.CONVERGED or bool((residuals <= target).all()),
    }
    return [promise for promise, holds in promises.items() if not holds]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("name", SPECTRA)
def test_every_pair_keeps_its_promises_on_every_spectrum(name: str, which: Which, k: int, dtype: torch.dtype) -> None:
    A = Matrix(symmetric(SPECTRA[name]).to(dtype))
    pairs = eigsh(A, k, which=which, rtol=1e-3, generator=_seeded())
    assert not _defects(A, pairs, SPECTRA[name], rtol=1e-3, k=k)


@pytest.mark.parametrize("max_matvecs", [5, 9, 20])
@pytest.mark.parametrize("which", ENDS)
def test_every_pair_keeps_its_promises_on_every_budget(which: Which, max_matvecs: int) -> None:
    for name, spectrum in SPECTRA.items():
        A = Matrix(symmetric(spectrum))
        pairs = eigsh(A, 5, which=which, rtol=1e-3, max_matvecs=max_matvecs, generator=_seeded())
        assert not _defects(A, pairs, spectrum, rtol=1e-3, k=5), name
        assert pairs.num_matvecs <= max_matvecs


def test_the_promises_see_planted_errors() -> None:
    spectrum = SPECTRA["positive"]
    A = Matrix(symmetric(spectrum))
    good = eigsh(A, 2, rtol=1e-3, generator=_seeded())

    def defects(
        values: Tensor = good.values, vectors: Tensor = good.vectors, residuals: Tensor = good.residuals
    ) -> list[str]:
        return _defects(A, Eigenpairs(values, vectors, residuals, good.status, 9), spectrum, rtol=1e-3, k=2)

    assert not defects()
    assert "dtype" in defects(values=good.values.float())
    assert "shape" in defects(values=good.values[:1], residuals=good.residuals[:1])
    assert "orthonormal" in defects(vectors=good.vectors[:, [0, 0]])
    assert defects(residuals=good.residuals + 1e-6) == ["residuals are true"]
    assert "an eigenvalue within each residual" in defects(values=good.values + 0.1)
    loose = eigsh(A, 2, rtol=0.3, generator=_seeded())
    assert "converged only within tolerance" in _defects(A, loose, spectrum, rtol=1e-3, k=2)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("name", "which"),
    [("positive", "LA"), ("negative", "SA"), *((name, which) for name in ISOLATED_AT_BOTH_ENDS for which in ENDS)],
)
def test_the_leading_eigenvalue_is_right_to_1e_5_at_rtol_1e_3(name: str, which: Which, dtype: torch.dtype) -> None:
    A = symmetric(SPECTRA[name])
    pairs = eigsh(Matrix(A.to(dtype)), which=which, rtol=1e-3, generator=_seeded())
    assert pairs.status is Status.CONVERGED
    assert oracles.relative_error(pairs.values, oracles.extreme_eigenvalues(A, 1, which)) <= 1e-5


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("which", ENDS)
def test_an_indefinite_spectrum_comes_algebraically_and_in_order(which: Which, k: int) -> None:
    A = symmetric(SPECTRA["indefinite"])
    pairs = eigsh(Matrix(A), k, which=which, rtol=1e-3, generator=_seeded())
    assert pairs.status is Status.CONVERGED
    assert oracles.relative_error(pairs.values, oracles.extreme_eigenvalues(A, k, which)) <= 1e-4


def test_the_largest_eigenvalue_is_the_algebraic_one_however_large_a_negative_one_is() -> None:
    spectrum = torch.cat([torch.tensor([1.0, -100.0]), torch.linspace(-0.5, 0.5, 50)])
    pairs = eigsh(Matrix(symmetric(spectrum)), rtol=1e-3, generator=_seeded())
    assert pairs.values.item() == pytest.approx(1.0, rel=1e-4)


def test_one_pair_from_both_ends_is_the_largest() -> None:
    A = Matrix(symmetric(SPECTRA["indefinite"]))
    both, largest = (eigsh(A, which=which, generator=_seeded()) for which in ("BE", "LA"))
    assert torch.equal(both.values, largest.values)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", range(1, 9))
def test_each_repeated_eigenvalue_comes_exactly_as_often_as_it_occurs(k: int, dtype: torch.dtype) -> None:
    A = symmetric(SPECTRA["repeated"])  # 5, 5, 5, 2, 2, 2, 2, 0.3, ...
    pairs = eigsh(Matrix(A.to(dtype)), k, rtol=1e-3, generator=_seeded())
    assert pairs.status is Status.CONVERGED
    assert oracles.relative_error(pairs.values, SPECTRA["repeated"][:k]) <= 1e-5


def test_each_repeated_eigenvalue_comes_as_often_at_both_ends() -> None:
    A = symmetric(SPECTRA["repeated"])
    pairs = eigsh(Matrix(A), 6, which="BE", rtol=1e-3, generator=_seeded())
    expected = torch.tensor([5.0, 5.0, 5.0, -0.3, -3.0, -3.0], dtype=torch.float64)
    assert oracles.relative_error(pairs.values, expected) <= 1e-4


@pytest.mark.parametrize("k", [1, 3, 8, 12])
@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("scale", [1.0, -2.5, 0.0])
def test_a_multiple_of_the_identity_takes_one_product_a_pair_and_a_look(scale: float, which: Which, k: int) -> None:
    A = Counting(Matrix(scale * torch.eye(12)))
    pairs = eigsh(A, k, which=which, generator=_seeded())
    assert pairs.status is Status.CONVERGED
    torch.testing.assert_close(pairs.values, torch.full((k,), scale, dtype=torch.float64), rtol=1e-6, atol=0)
    assert pairs.residuals.max() <= 1e-6
    assert A.num_matvecs <= k + 3


@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rank_one_has_one_eigenvalue_and_zeros(sign: float, which: Which) -> None:
    u = torch.randn(40, dtype=torch.float64)
    A = sign * torch.outer(u, u)
    for k in (1, 2, 4):
        pairs = eigsh(Matrix(A), k, which=which, rtol=1e-3, generator=_seeded())
        assert pairs.status is Status.CONVERGED
        expected = oracles.extreme_eigenvalues(A, k, which)
        torch.testing.assert_close(pairs.values, expected, rtol=1e-9, atol=1e-9 * u.square().sum().item())


@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize(
    "spectrum", [[2.0], [-2.0], [2.0, -3.0], [1.0, 1.0], [2.0, 2.0, -3.0], [0.0, 0.0, 0.0], [3.0, 2.0, 1.0]]
)
def test_small_operators_are_solved_completely(spectrum: list[float], which: Which) -> None:
    A = symmetric(torch.tensor(spectrum))
    for k in range(1, len(spectrum) + 1):
        pairs = eigsh(Matrix(A), k, which=which, generator=_seeded())
        assert pairs.status is Status.CONVERGED
        torch.testing.assert_close(pairs.values, oracles.extreme_eigenvalues(A, k, which), rtol=1e-12, atol=1e-12)
        assert pairs.num_matvecs <= len(spectrum)


@pytest.mark.parametrize("which", ENDS)
def test_all_pairs_of_a_graded_matrix_are_found(which: Which) -> None:
    A = symmetric(SPECTRA["graded"])
    n = len(A)
    pairs = eigsh(Matrix(A), n, which=which, generator=_seeded())
    assert pairs.status is Status.CONVERGED
    assert pairs.num_matvecs <= n
    torch.testing.assert_close(pairs.values, oracles.extreme_eigenvalues(A, n, which), rtol=0, atol=1e-11)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("which", ENDS)
def test_the_budget_is_not_called_spent_while_products_are_left(which: Which, k: int) -> None:
    for name, spectrum in SPECTRA.items():
        pairs = eigsh(Matrix(symmetric(spectrum)), k, which=which, rtol=1e-3, max_matvecs=400, generator=_seeded())
        assert pairs.status is Status.CONVERGED or pairs.num_matvecs == 400, name


@pytest.mark.parametrize("which", ENDS)
def test_a_close_cluster_is_resolved_to_its_residual(which: Which) -> None:
    """Eigenvalues closer than the tolerance cannot be told apart; each value is an eigenvalue within its residual."""
    spectrum = torch.cat([1 - 1e-3 * torch.arange(4), -1 + 1e-3 * torch.arange(4), torch.linspace(-0.3, 0.3, 60)])
    A = symmetric(spectrum)
    pairs = eigsh(Matrix(A), which=which, rtol=1e-3, generator=_seeded())
    error = (pairs.values - oracles.extreme_eigenvalues(A, 1, which)).abs().item()
    assert error <= 3e-3
    assert not _defects(Matrix(A), pairs, spectrum.double(), rtol=1e-3, k=1)


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("which", ENDS)
def test_a_hard_spectrum_comes_right_through_compressions_of_the_basis(which: Which, k: int) -> None:
    spectrum = torch.linspace(-1.0, 1.0, 500, dtype=torch.float64)  # no gap anywhere
    A = Diagonal(spectrum)
    pairs = eigsh(A, k, which=which, rtol=1e-5, max_matvecs=1000, generator=_seeded())
    assert pairs.status is Status.CONVERGED
    assert pairs.num_matvecs > 80  # the basis holds at most 80 columns
    expected = oracles.extreme_eigenvalues(torch.diag(spectrum), k, which)
    torch.testing.assert_close(pairs.values, expected, rtol=0, atol=1e-7)
    assert not _defects(A, pairs, spectrum, rtol=1e-5, k=k)


def test_hardly_any_start_ends_at_the_second_eigenvalue() -> None:
    """The second at 0.96, the third at 0.55, and a bulk that goes on from there: found from 99 % of all starts."""
    A = Diagonal(torch.cat([torch.tensor([1.0, 0.96, 0.55]), 0.5 * 10.0 ** torch.linspace(0, -6, 1000)]))
    pairs = [eigsh(A, generator=_seeded(seed)) for seed in range(300)]
    assert sum(p.values.item() < 0.99 for p in pairs) < 3
    assert sum(p.num_matvecs for p in pairs) / 300 < 15  # which no brute force bought


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("which", ENDS)
def test_no_budget_is_ever_exceeded_and_every_product_is_counted(which: Which, k: int, warm: bool) -> None:
    for name, spectrum in SPECTRA.items():
        matrix = symmetric(spectrum)
        start = torch.randn(len(matrix), 7, dtype=torch.float64) if warm else None
        for max_matvecs in (k, k + 1, 6, 11, 30):
            if max_matvecs < k:
                continue
            A = Counting(Matrix(matrix))
            pairs = eigsh(A, k, which=which, rtol=1e-6, max_matvecs=max_matvecs, generator=_seeded(), start=start)
            assert A.num_matvecs == pairs.num_matvecs <= max_matvecs, name


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("which", ENDS)
def test_a_budget_too_small_is_reported(which: Which, k: int, warm: bool) -> None:
    A = Diagonal(torch.linspace(-1.0, 1.0, 500))
    start = torch.randn(500, 7) if warm else None
    pairs = eigsh(A, k, which=which, rtol=1e-4, max_matvecs=8, generator=_seeded(), start=start)
    assert pairs.status is Status.BUDGET
    assert pairs.num_matvecs == 8
    assert pairs.values.shape == (k,)


@pytest.mark.parametrize("name", ["positive", "indefinite", "repeated", "rank deficient"])
def test_a_budget_that_ends_before_the_last_look_around_is_reported(name: str) -> None:
    """For several pairs the search looks on from fresh vectors; what that takes belongs to the search."""
    A = Matrix(symmetric(SPECTRA[name]))
    needed = eigsh(A, 3, rtol=1e-3, generator=_seeded()).num_matvecs
    assert eigsh(A, 3, rtol=1e-3, max_matvecs=needed, generator=_seeded()).status is Status.CONVERGED
    for max_matvecs in range(3, needed):
        pairs = eigsh(A, 3, rtol=1e-3, max_matvecs=max_matvecs, generator=_seeded())
        assert pairs.status is Status.BUDGET
        assert pairs.num_matvecs == max_matvecs


def test_an_operator_that_is_not_symmetric_breaks_down() -> None:
    B = torch.randn(30, 30, dtype=torch.float64)
    for matrix in (B, B - B.mT, B.triu(), torch.diag(torch.ones(29).double(), 1)):
        assert eigsh(Matrix(matrix), generator=_seeded()).status is Status.BREAKDOWN


def test_an_operator_that_answers_differently_each_time_breaks_down() -> None:
    class Noisy(Diagonal):
        def matmat(self, X: Tensor) -> Tensor:
            return super().matmat(X) + 0.3 * torch.randn(X.shape, dtype=X.dtype, generator=noise)

    noise = _seeded(1)
    A = Noisy(SPECTRA["indefinite"])
    assert eigsh(A, 3, rtol=1e-3, generator=_seeded()).status is Status.BREAKDOWN


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("first_bad", [1, 2, 5])
def test_a_product_that_is_not_finite_ends_the_search(first_bad: int, bad: float) -> None:
    class Failing(Counting):
        def matmat(self, X: Tensor) -> Tensor:
            Y = super().matmat(X)
            if self.num_matvecs >= first_bad:
                Y[3] = bad
            return Y

    A = Failing(Diagonal(SPECTRA["indefinite"]))
    pairs = eigsh(A, 4, rtol=1e-6, generator=_seeded())
    assert pairs.status is Status.NONFINITE
    assert pairs.values.shape == pairs.residuals.shape == (4,)
    assert pairs.values.isnan().all()
    assert pairs.residuals.isnan().all()
    assert pairs.vectors.shape == (len(SPECTRA["indefinite"]), 4)
    assert pairs.num_matvecs == A.num_matvecs == first_bad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, r"k=0 eigenpairs were asked for; ask for at least 1\."),
        ({"k": -2}, r"k=-2 eigenpairs were asked for; ask for at least 1\."),
        ({"k": 6}, r"k=6 eigenpairs of an operator of shape \(5, 5\): it must be square, with k at most n\."),
        ({"which": "LM"}, r"which='LM' must be one of 'LA', 'SA', 'BE'\."),
        ({"rtol": 0.0}, r"rtol=0\.0 must lie between 0 and 1"),
        ({"rtol": -1e-3}, r"rtol=-0\.001 must lie between 0 and 1"),
        ({"rtol": 1.0}, r"rtol=1\.0 must lie between 0 and 1"),
        ({"rtol": float("nan")}, r"rtol=nan must lie between 0 and 1"),
        ({"k": 3, "max_matvecs": 2}, r"max_matvecs=2 must be at least k=3: each pair takes a product\."),
        ({"start": torch.ones(4)}, r"start has shape \(4,\); pass \(n,\) or \(n, s\) with n = 5\."),
        ({"start": torch.ones(2, 5)}, r"start has shape \(2, 5\); pass"),
        ({"start": torch.ones(5, 1, 1)}, r"start has shape \(5, 1, 1\); pass"),
    ],
)
def test_a_bad_argument_is_named_with_its_rule(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eigsh(Matrix(torch.eye(5)), **{"generator": _seeded(), **arguments})


def test_an_operator_that_is_not_square_is_refused() -> None:
    with pytest.raises(ValueError, match=r"k=1 eigenpairs of an operator of shape \(2, 3\): it must be square"):
        eigsh(Matrix(torch.ones(2, 3)), generator=_seeded())


def test_a_good_start_costs_few_products() -> None:
    A = symmetric(SPECTRA["indefinite"])
    vectors = torch.linalg.eigh(A).eigenvectors
    one = eigsh(Matrix(A), rtol=1e-3, generator=_seeded(), start=vectors[:, -1])
    assert one.num_matvecs <= 3
    block = eigsh(Matrix(A), 3, rtol=1e-3, generator=_seeded(), start=vectors[:, -3:])
    cold = eigsh(Matrix(A), 3, rtol=1e-3, generator=_seeded())
    assert block.num_matvecs < cold.num_matvecs
    assert oracles.relative_error(block.values, SPECTRA["indefinite"][:3]) <= 1e-5


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", ["vector", "block", "duplicated", "zero", "nan", "more columns than rows"])
def test_any_start_leads_to_the_same_eigenvalues(kind: str, k: int) -> None:
    spectrum = SPECTRA["positive"]
    n = len(spectrum)
    x = torch.randn(n, dtype=torch.float64)
    starts = {
        "vector": x,
        "block": torch.randn(n, 4, dtype=torch.float64),
        "duplicated": torch.stack([x, x, -2 * x, x + 1e-12], dim=1),
        "zero": torch.stack([torch.zeros_like(x), x, torch.zeros_like(x)], dim=1),
        "nan": torch.stack([torch.full_like(x, torch.nan), x], dim=1),
        "more columns than rows": torch.randn(n, n + 5, dtype=torch.float64),
    }
    A = Matrix(symmetric(spectrum))
    pairs = eigsh(A, k, rtol=1e-3, generator=_seeded(), start=starts[kind])
    assert pairs.status is Status.CONVERGED
    assert oracles.relative_error(pairs.values, spectrum[:k]) <= 1e-5
    assert not _defects(A, pairs, spectrum, rtol=1e-3, k=k)


def test_a_start_of_zeros_only_is_as_good_as_none() -> None:
    A = Matrix(symmetric(SPECTRA["positive"]))
    with_zeros = eigsh(A, generator=_seeded(), start=torch.zeros(len(SPECTRA["positive"])).double())
    assert torch.equal(with_zeros.values, eigsh(A, generator=_seeded()).values)


def test_a_start_is_left_as_it_was() -> None:
    start = torch.randn(65, 2, dtype=torch.float64)
    before = start.clone()
    eigsh(Matrix(symmetric(SPECTRA["positive"])), 2, generator=_seeded(), start=start)
    assert torch.equal(start, before)


def test_the_same_generator_gives_the_same_bits() -> None:
    A = Matrix(symmetric(SPECTRA["indefinite"]))
    first, second, other = (eigsh(A, 3, generator=_seeded(seed)) for seed in (5, 5, 6))
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.vectors, second.vectors)
    assert not torch.equal(first.vectors, other.vectors)


def test_global_random_numbers_are_untouched() -> None:
    before = oracles.global_random_state()
    eigsh(Matrix(symmetric(SPECTRA["repeated"])), 4, which="BE", generator=_seeded())
    assert oracles.global_random_state() == before


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("name", SPECTRA)
def test_no_inner_product_is_taken_outside_gram(name: str, which: Which, k: int, warm: bool) -> None:
    """On an operator that is symmetric in the inner product of `gram` only, all promises hold in that inner product."""
    spectrum = SPECTRA[name]
    n = len(spectrum)
    scale = torch.rand(n, dtype=torch.float64, generator=_seeded(1)) * 5 + 0.1
    A = Scaled(symmetric(spectrum), scale)
    start = torch.randn(n, 3, dtype=torch.float64) if warm else None
    pairs = eigsh(A, k, which=which, rtol=1e-3, generator=_seeded(), start=start)
    X, norm = scale[:, None] * pairs.vectors, spectrum.abs().max().item()  # eigenvectors of the matrix that was scaled
    seen_in_plain_coordinates = Eigenpairs(pairs.values, X, pairs.residuals, pairs.status, pairs.num_matvecs)
    assert pairs.status is not Status.BREAKDOWN
    assert not _defects(Matrix(symmetric(spectrum)), seen_in_plain_coordinates, spectrum, rtol=1e-3, k=k)
    if pairs.status is Status.CONVERGED and which == "LA" and name not in ("negative", "graded"):
        assert (pairs.values[0] - spectrum[0]).abs() <= 1e-5 * norm

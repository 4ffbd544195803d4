"""Other ways to the eigenvalues, the trace and the spectral density of a Hessian, and the truth for all of them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from _problems import Problem, seeded


@dataclasses.dataclass(frozen=True)
class Answer:
    """Eigenvalues in descending order, (k,), and the products they took."""

    values: np.ndarray
    num_matvecs: int


_FEWEST = 20  # products of the truth, so that it does not stop at the second eigenvalue

Solver = Callable[[Problem, int, int], Answer]
"""(problem, k, seed) -> Answer; builds all it needs from the bare model, so that its whole cost is seen."""


def _package(name: str) -> Any:
    """Import a package whose types are not to be checked: it may not be installed, or ships none."""
    return importlib.import_module(name)


def missing(package: str) -> str | None:
    """Return why a peer is skipped, or None if it is installed."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed (pip install --no-deps -r benchmarks/requirements.txt)"
    return None


def pyhessian(problem: Problem, k: int, seed: int) -> Answer:
    """PyHessian 0.1 with its defaults: power iteration on a kept gradient graph until two values differ by 1e-3."""
    hessian = _package("pyhessian").hessian
    module = sys.modules["pyhessian.hessian"]  # the package shadows it with the class
    with _counted(module, "hessian_vector_product") as count, seeded(seed), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using backward")
        data = (problem.inputs, problem.targets)
        solver = hessian(problem.model, problem.criterion, data=data, cuda=False)
        values, _ = solver.eigenvalues(top_n=k)
    problem.model.zero_grad()  # it leaves its graph in .grad
    return Answer(np.sort(np.array(values))[::-1], count[0])


def curvlinops_eigsh(problem: Problem, k: int, seed: int, *, ncv: int | None = None) -> Answer:
    """curvlinops 3.0.1 and SciPy's `eigsh` at tol=1e-3; ncv=None is SciPy's default, 20 vectors for k <= 9."""
    A = _curvlinops_hessian(problem).to_scipy(dtype=np.dtype(np.float32))
    return _arpack(lambda v: A @ v, problem.size, k, seed, tol=1e-3, ncv=ncv, dtype=np.dtype(np.float32))


def eigenthings(problem: Problem, k: int, seed: int, *, max_iter: int | None = None) -> Answer:
    """hessian-eigenthings 1.0.0a5, Lanczos for the largest algebraic ones; max_iter=None is its default, 2 k steps."""
    package = _package("hessian_eigenthings")
    data = [(problem.inputs, problem.targets)]
    operator = package.HessianOperator(problem.model, data, package.supervised_loss(problem.criterion))
    result = package.lanczos(operator, k=k, max_iter=max_iter, which="LA", seed=seed)
    return Answer(np.sort(result.eigenvalues.double().numpy())[::-1], result.iterations)


def truth(problem: Problem, k: int, *, tol: float = 1e-5) -> np.ndarray:  # (k,)
    """Return the k largest eigenvalues by textbook Lanczos from a cold start, at least 20 products.

    Each vector is orthogonalised twice against all others, in float64; the products are float32, so that errors below
    about 1e-6 carry no meaning. ARPACK in float64 agrees with it to 4e-7, at three times the cost.

    Args:
        problem: Whose Hessian.
        k: How many.
        tol: Residual, relative to each value.
    """
    product = _double_backward(problem)
    Q = np.random.default_rng(0).standard_normal((1, problem.size))
    Q /= np.linalg.norm(Q)
    T = np.zeros((0, 0))
    while True:
        w = product(Q[-1])
        T = np.pad(T, (0, 1))
        for _ in range(2):
            overlaps = Q @ w
            w -= overlaps @ Q
            T[:, -1] += overlaps
        norm = np.linalg.norm(w)
        values, S = np.linalg.eigh(T, UPLO="U")
        if len(T) >= _FEWEST and np.all(norm * np.abs(S[-1, -k:]) <= tol * np.abs(values[-k:])):
            return values[: -k - 1 : -1]
        Q = np.vstack([Q, w / norm])


@dataclasses.dataclass(frozen=True)
class DenseHessian:
    """The whole matrix, (n, n), and its eigenvalues in ascending order, (n,), float64."""

    matrix: Tensor
    eigenvalues: Tensor


def dense_hessian(problem: Problem) -> DenseHessian:
    """Return the Hessian of a small problem by one backward pass in float64 for each row."""
    double = dataclasses.replace(problem, model=copy.deepcopy(problem.model).double(), inputs=problem.inputs.double())
    gradient = torch.autograd.grad(double.loss(), double.parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    rows = []
    for unit in torch.eye(len(flat), dtype=flat.dtype).split(128):
        row = torch.autograd.grad(flat, double.parameters, unit, retain_graph=True, is_grads_batched=True)
        rows.append(torch.cat([r.reshape(len(unit), -1) for r in row], dim=1))
    H = torch.cat(rows)
    return DenseHessian((H + H.mT) / 2, torch.linalg.eigvalsh((H + H.mT) / 2))


def pyhessian_trace(problem: Problem, num_matvecs: int, seed: int, *, tol: float = 1e-3) -> Answer:
    """PyHessian 0.1: Hutchinson's until the mean changes by less than tol, its default; tol=0 takes all products."""
    with seeded(seed), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using backward")
        data = (problem.inputs, problem.targets)
        solver = _package("pyhessian").hessian(problem.model, problem.criterion, data=data, cuda=False)
        samples = solver.trace(maxIter=num_matvecs, tol=tol)
    problem.model.zero_grad()
    return Answer(np.array([np.mean(samples)]), len(samples))


def pyhessian_density(problem: Problem) -> str:
    """Return how PyHessian 0.1's density ends."""
    try:
        with seeded(0), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Using backward")
            data = (problem.inputs, problem.targets)
            _package("pyhessian").hessian(problem.model, problem.criterion, data=data, cuda=False).density(iter=3)
    except RuntimeError as error:
        return f"fails: {str(error).splitlines()[0][:70]}"
    finally:
        problem.model.zero_grad()
    return "works"


def curvlinops_trace(H: Tensor, num_matvecs: int, seed: int, *, method: str) -> float:
    """curvlinops 3.0.1's `hutchinson_trace`, `hutchpp_trace` or `xtrace` of a dense matrix."""
    with seeded(seed):
        return getattr(_package("curvlinops"), method)(H, num_matvecs).item()


def curvlinops_density(
    problem: Problem,
    boundaries: tuple[float, float],
    seed: int,
    *,
    num_steps: int,
    num_probes: int,
) -> tuple[Tensor, Tensor]:  # (g,), (g,)
    """curvlinops 3.0.1's Lanczos density with its defaults, as points and their mass.

    It is given the ends of the spectrum, which it would find by some 40 more products.
    """
    with seeded(seed):
        grid, density = _package("curvlinops").lanczos_approximate_spectrum(
            _curvlinops_hessian(problem), num_steps, num_repeats=num_probes, boundaries=boundaries
        )
    return grid, density / density.sum()


def _double_backward(problem: Problem) -> Callable[[np.ndarray], np.ndarray]:
    """Return v -> H v, float64 outside and float32 inside."""
    parameters = problem.parameters
    gradient = torch.autograd.grad(problem.loss(), parameters, create_graph=True)
    sizes = [p.numel() for p in parameters]

    def product(v: np.ndarray) -> np.ndarray:
        direction = torch.from_numpy(v).to(gradient[0].dtype).reshape(-1).split(sizes)
        direction = [d.view_as(p) for d, p in zip(direction, parameters, strict=True)]
        columns = torch.autograd.grad(gradient, parameters, direction, retain_graph=True)
        return torch.cat([c.reshape(-1) for c in columns]).double().numpy()

    return product


def _arpack(
    product: Callable[[np.ndarray], np.ndarray],
    n: int,
    k: int,
    seed: int,
    *,
    tol: float,
    ncv: int | None,
    dtype: np.dtype[Any],
) -> Answer:
    scipy = _package("scipy.sparse.linalg")
    count = 0

    def counted(v: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        return product(v)

    A = scipy.LinearOperator((n, n), matvec=counted, dtype=dtype)
    start = np.random.default_rng(seed).standard_normal(n).astype(dtype)
    values = scipy.eigsh(A, k, which="LA", tol=tol, ncv=ncv, v0=start, return_eigenvectors=False)
    return Answer(np.sort(values.astype(np.float64))[::-1], count)


@contextlib.contextmanager
def _counted(owner: object, name: str) -> Iterator[list[int]]:
    original = getattr(owner, name)
    count = [0]

    def counting(*args: object) -> object:
        count[0] += 1
        return original(*args)

    setattr(owner, name, counting)
    try:
        yield count
    finally:
        setattr(owner, name, original)


def _curvlinops_hessian(problem: Problem) -> Any:
    data = [(problem.inputs, problem.targets)]
    return _package("curvlinops").HessianLinearOperator(
        problem.model, _as_module(problem), problem.parameters, data,
        check_deterministic=False, num_data=len(problem.inputs),
    )  # fmt: skip


def _as_module(problem: Problem) -> torch.nn.Module:
    """Return the criterion as the torch.nn module that curvlinops asks for."""
    if problem.criterion is torch.nn.functional.cross_entropy:
        return torch.nn.CrossEntropyLoss()
    raise ValueError(f"{problem.name} has criterion {problem.criterion}; curvlinops takes cross_entropy here.")


def relative_error(values: np.ndarray | Tensor, reference: np.ndarray) -> float:
    """Return the largest relative error among the values."""
    return float(np.max(np.abs(np.asarray(values, dtype=np.float64) / reference[: len(values)] - 1)))

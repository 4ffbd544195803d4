"""Self-test: wrong second derivatives, and parameters that the probe cannot reach, found before anything is logged."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spectral_callbacks.linalg import LinearOperator
from spectral_callbacks.operators import ParameterSpace

_MARGIN = 3.0  # in units of √ε; rounding alone stays below 0.1 on the nets of the tests
_LISTED = 3
_CAUSE = "A custom autograd function that runs backward() inside does this: avoid it, or pass loss= without it."


class WrongDerivativeError(RuntimeError):
    """A derivative that measuring rests on is wrong; the message names the module."""


def check_symmetry(
    A: LinearOperator,  # (n, n)
    space: ParameterSpace,
    module: nn.Module,
    *,
    generator: torch.Generator,
    noise: float | None = None,
    unreached: Sequence[str] = (),
) -> bool:
    """Raise unless uᵀA v = vᵀA u for two random vectors; two products if it holds.

    The difference is ‖A - Aᵀ‖_F times a standard normal number. Where it is not rounding, blocks of the matrix are
    tested module by module (two products each) to name the culprit.

    Args:
        A: The operator, on this space.
        space: Its parameters.
        module: Names the culprit.
        generator: Draws u and v.
        noise: Relative error that the products may have; by default a small multiple of the rounding error.
        unreached: Parameters that `unreached_parameters` found, suspects if there is a defect.

    Returns:
        Whether the products tell anything: not if they are zero, or not finite.

    Raises:
        WrongDerivativeError: If the products are not those of a symmetric matrix.
    """
    limit = _MARGIN * math.sqrt(torch.finfo(A.dtype).eps) if noise is None else noise
    X = torch.randn(space.size, 2, generator=generator, dtype=A.dtype, device=A.device)
    products = A.matmat(X)
    defect = _asymmetry(A, X, products)
    if not defect > limit:
        return math.isfinite(defect)
    inside: list[tuple[float, str]] = []
    across: list[tuple[float, str]] = []
    for name, places in _modules(space, module).items():
        block, own_products = torch.zeros_like(X), torch.zeros_like(X)
        for place in places:
            block[place] = X[place]
        block_products = A.matmat(block)
        for place in places:
            own_products[place] = block_products[place]
        inside.append((_asymmetry(A, block, own_products), name))
        across.append((abs((A.gram(block, products)[0, 1] - A.gram(X, block_products)[1, 0]).item()), name))
    guilty = [name for size, name in sorted(inside, reverse=True) if size > limit]
    suspects = [name for _, name in sorted(across, reverse=True)]
    where = f"in {', '.join(guilty[:_LISTED])}" if guilty else f"between {' and '.join(suspects[:2])}"
    hint = f" Autograd finds no path to {_listed(unreached)}. {_CAUSE}" if unreached else ""
    raise WrongDerivativeError(
        f"the second derivative is wrong {where}: uᵀHv and vᵀHu differ by {defect:.1%} of ‖Hv‖, and a Hessian is "
        "symmetric. Some operation there has a wrong derivative, or its result is random; nothing is logged from it. "
        f"Replace the operation by elementary ones, or pass loss= without it.{hint}"
    )


def unreached_parameters(
    loss: Tensor,  # ()
    space: ParameterSpace,
) -> tuple[str, ...]:
    """Return the names of the parameters that the loss's graph does not lead to: their derivative comes out as zero."""
    reached: set[int] = set()
    seen: set[object] = set()
    stack = [loss.grad_fn] if loss.grad_fn is not None else []
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(variable := getattr(node, "variable", None), Tensor):  # only AccumulateGrad has one
            reached.add(id(variable))
        stack.extend(parent for parent, _ in node.next_functions if parent is not None)
    return tuple(name for name, p in zip(space.names, space.tensors, strict=True) if id(p) not in reached)


def check_reached(unreached: tuple[str, ...], space: ParameterSpace) -> None:
    """Raise if training has just given a gradient to a parameter that the probe could not reach.

    Args:
        unreached: What `unreached_parameters` found for the loss of the same batch.
        space: Its parameters, with the gradients of training in place.

    Raises:
        WrongDerivativeError: Naming the modules of those parameters.
    """
    gradients = {name: p.grad for name, p in zip(space.names, space.tensors, strict=True)}
    missed = [name for name in unreached if (g := gradients[name]) is not None and bool((g != 0).any())]
    if missed:
        owners = list(dict.fromkeys(name.rpartition(".")[0] or name for name in missed))
        raise WrongDerivativeError(
            f"training gives a gradient to {_listed(missed)}, but torch.autograd.grad finds none, so the curvature of "
            f"{_listed(owners)} would be taken for zero; nothing is logged from it. {_CAUSE}"
        )


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:_LISTED])}{', ...' if len(names) > _LISTED else ''}"


def _asymmetry(A: LinearOperator, X: Tensor, products: Tensor) -> float:
    cross = A.gram(X, products)
    scale = A.gram(products, products).diagonal().sqrt().sum()
    return ((cross[0, 1] - cross[1, 0]).abs() / scale).item()


def _modules(space: ParameterSpace, module: nn.Module) -> dict[str, list[slice]]:
    """Group the space by the module that owns each parameter; a parametrized weight belongs to the layer it shapes."""
    places: dict[str, list[slice]] = {}
    for name, place in space.slices.items():
        owner = name.split(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]
        places.setdefault(owner or type(module).__name__, []).append(place)
    return places

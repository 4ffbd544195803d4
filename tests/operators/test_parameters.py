from __future__ import annotations

import pytest
import torch
from torch import nn

from spectral_callbacks.operators import ParameterSpace


class _Model(nn.Module):
    """Tied, frozen, unused and sparse parameters, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3, sparse=True)
        self.hidden = nn.Linear(3, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.unused = nn.Parameter(torch.randn(2, 2))
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("running", torch.ones(4))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.scalar * self.head(self.frozen(self.hidden(self.embedding(tokens)).tanh()))


def test_a_vector_holds_each_trainable_parameter_once_in_the_order_of_its_names() -> None:
    model = _Model()
    space = ParameterSpace(model)
    expected = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert space.names == tuple(expected) == ("unused", "scalar", "embedding.weight", "hidden.weight", "hidden.bias")
    assert all(p is q for p, q in zip(space.tensors, expected.values(), strict=True))
    assert space.size == 4 + 1 + 15 + 9 + 3
    vector = space.flatten(space.tensors)
    for name, p in expected.items():
        assert torch.equal(vector[space.slices[name]], p.detach().reshape(-1))


def test_flatten_and_unflatten_are_inverse() -> None:
    space = ParameterSpace(_Model())
    vector = torch.randn(space.size)
    tensors = space.unflatten(vector)
    assert [t.shape for t in tensors] == [p.shape for p in space.tensors]
    assert torch.equal(space.flatten(tensors), vector)


def test_a_vector_shares_no_memory_with_the_parameters() -> None:
    model = _Model()
    space = ParameterSpace(model)
    before = model.scalar.item()
    space.flatten(space.tensors).zero_()
    assert model.scalar.item() == before
    assert not space.flatten(space.tensors).requires_grad


def test_a_parameter_without_a_gradient_stands_for_zeros() -> None:
    space = ParameterSpace(nn.Linear(2, 2))
    assert space.flatten([None, torch.ones(2)]).tolist() == [0, 0, 0, 0, 1, 1]


def test_sparse_gradients_are_flattened_like_dense_ones() -> None:
    model, tokens = _Model(), torch.tensor([1, 1, 3])
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding.weight = model.embedding.weight
    space = ParameterSpace(embedding)
    gradients = []
    for sparse in (True, False):
        embedding.sparse = sparse
        gradient = torch.autograd.grad(embedding(tokens).pow(2).sum(), space.tensors)
        assert gradient[0].is_sparse is sparse
        gradients.append(space.flatten(gradient))
    assert torch.equal(*gradients)


def test_a_gradient_that_is_not_contiguous_is_read_by_rows() -> None:
    space = ParameterSpace(nn.Linear(2, 3, bias=False))
    G = torch.arange(6.0).view(2, 3).mT
    assert not G.is_contiguous()
    assert torch.equal(space.flatten([G]), G.reshape(-1))


def test_the_parameters_of_an_optimizer_span_a_subspace() -> None:
    model = _Model()
    optimizer = torch.optim.SGD([model.hidden.weight, model.scalar], lr=0.1)
    chosen = [p for group in optimizer.param_groups for p in group["params"]]
    assert ParameterSpace(model, chosen).names == ("scalar", "hidden.weight")
    assert ParameterSpace(model, iter(chosen)).names == ("scalar", "hidden.weight")


def test_a_number_for_each_parameter_is_spread_over_its_entries() -> None:
    space = ParameterSpace(nn.Linear(2, 1))
    assert space.broadcast([3.0, -1.0]).tolist() == [3.0, 3.0, -1.0]


@pytest.mark.parametrize(
    ("stored", "vectors"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_vectors_are_never_shorter_than_float32(stored: torch.dtype, vectors: torch.dtype) -> None:
    model = nn.Linear(3, 2).to(stored)
    space = ParameterSpace(model)
    assert space.dtype == vectors
    vector = space.flatten([p.detach() for p in space.tensors])
    assert vector.dtype == vectors
    assert all(t.dtype == stored for t in space.unflatten(vector))
    assert all(torch.equal(t, p) for t, p in zip(space.unflatten(vector), space.tensors, strict=True))


def test_vectors_have_the_longest_dtype_of_the_parameters() -> None:
    model = nn.ModuleList([nn.Linear(1, 1).bfloat16(), nn.Linear(1, 1).double()])
    assert ParameterSpace(model).dtype == torch.float64


def test_nothing_to_measure_is_refused() -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"Linear has no parameter with requires_grad=True, so .* unfreeze a parameter"
    ):
        ParameterSpace(frozen)
    with pytest.raises(ValueError, match=r"requires_grad=True among the 1 tensors given"):
        ParameterSpace(nn.Linear(2, 2), [torch.ones(1)])


def test_a_lazy_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"parameter weight is not initialised yet; run one batch through the module"):
        ParameterSpace(nn.LazyLinear(2))


def test_a_complex_parameter_is_refused() -> None:
    module = nn.ParameterDict({"phase": nn.Parameter(torch.ones(2, dtype=torch.complex64))})
    with pytest.raises(ValueError, match=r"parameter phase has dtype torch\.complex64, .* \(torch\.view_as_real\)"):
        ParameterSpace(module)


def test_parameters_on_several_devices_are_refused() -> None:
    module = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1, device="meta")])
    with pytest.raises(
        ValueError, match=r"the parameters lie on \['cpu', 'meta'\]; a parameter space lives on one device"
    ):
        ParameterSpace(module)

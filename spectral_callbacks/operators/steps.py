"""Steps: the single operations of which paths consist."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Hashable
from typing import final

from torch import Size, Tensor


class Step(abc.ABC):
    """One operation of a path: each entry of its result is a multiple of one entry of what it takes.

    Equal steps are the same map.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> Size:
        """Of its result."""

    @property
    def gain(self) -> float | None:
        """Factor by which `pull` multiplies all inner products; None where that depends on the direction."""
        return 1.0

    @property
    def key(self) -> Hashable:
        """Of what kind it is, the same for every batch that the same code runs on."""
        return type(self).__name__

    @property
    def content(self) -> Tensor | None:
        """What it is made with, which may depend on the batch: factors, indices."""
        return None

    @abc.abstractmethod
    def push(self, V: Tensor) -> Tensor:  # (k, *in_shape) -> (k, *shape)
        """Apply it to k tensors."""

    @abc.abstractmethod
    def pull(self, U: Tensor) -> Tensor:  # (k, *shape) -> (k, *in_shape)
        """Apply its adjoint."""

    def source(self, index: Tensor) -> Tensor:  # (1, *in_shape) -> (1, *shape)
        """Return, for labels of the entries it takes, those that the entries of its result come from."""
        return self.push(index)


@final
@dataclasses.dataclass(frozen=True)
class Reshape(Step):
    """The same entries in the same order."""

    in_shape: Size
    out_shape: Size

    @property
    def shape(self) -> Size:
        """The new one."""
        return self.out_shape

    def push(self, V: Tensor) -> Tensor:
        """Return the entries in the new shape."""
        return V.reshape(len(V), *self.out_shape)

    def pull(self, U: Tensor) -> Tensor:
        """Return the entries in the old shape."""
        return U.reshape(len(U), *self.in_shape)


@final
@dataclasses.dataclass(frozen=True)
class Permute(Step):
    """The axes in another order: axis i of the result was axis `dims[i]`, none of them negative."""

    in_shape: Size
    dims: tuple[int, ...]

    @property
    def shape(self) -> Size:
        """The sizes in their new order."""
        return Size(self.in_shape[d] for d in self.dims)

    @property
    def key(self) -> Hashable:
        """The order."""
        return ("Permute", *self.dims)

    def push(self, V: Tensor) -> Tensor:
        """Permute the axes."""
        return V.permute(0, *(d + 1 for d in self.dims))

    def pull(self, U: Tensor) -> Tensor:
        """Permute them back."""
        return U.permute(0, *(self.dims.index(d) + 1 for d in range(len(self.dims))))


@final
@dataclasses.dataclass(frozen=True)
class Part(Step):
    """The entries `places` along one axis, a range that goes up; or one entry, which drops the axis."""

    in_shape: Size
    dim: int
    places: range | int

    @property
    def shape(self) -> Size:
        """The one of the part."""
        kept = [len(self.places)] if isinstance(self.places, range) else []
        return Size([*self.in_shape[: self.dim], *kept, *self.in_shape[self.dim + 1 :]])

    @property
    def key(self) -> Hashable:
        """The axis; what is taken may depend on the batch, as the length of a sequence."""
        return ("Part", self.dim)

    def push(self, V: Tensor) -> Tensor:
        """Take the part."""
        return V[self._index]

    def pull(self, U: Tensor) -> Tensor:
        """Put the part into zeros."""
        whole = U.new_zeros(len(U), *self.in_shape)
        whole[self._index] = U
        return whole

    @property
    def _index(self) -> tuple[slice | int, ...]:
        where = self.places
        taken = slice(where.start, where.stop, where.step) if isinstance(where, range) else where
        return (*(slice(None),) * (self.dim + 1), taken)


@final
@dataclasses.dataclass(frozen=True, eq=False)
class Take(Step):
    """Rows of a table, by indices of any shape that are the same for all samples."""

    in_shape: Size
    indices: Tensor

    @property
    def shape(self) -> Size:
        """The shape of the indices, and of a row."""
        return Size([*self.indices.shape, *self.in_shape[1:]])

    @property
    def content(self) -> Tensor:
        """The indices."""
        return self.indices

    @property
    def gain(self) -> float | None:
        """1 where no row is taken twice."""
        return 1.0 if len(self.indices.unique()) == self.indices.numel() else None

    def push(self, V: Tensor) -> Tensor:
        """Look the rows up."""
        return V.index_select(1, self.indices.reshape(-1).to(V.device)).reshape(len(V), *self.shape)

    def pull(self, U: Tensor) -> Tensor:
        """Add the rows to those that they come from."""
        rows = U.reshape(len(U), self.indices.numel(), *self.in_shape[1:])
        return U.new_zeros(len(U), *self.in_shape).index_add_(1, self.indices.reshape(-1).to(U.device), rows)


@final
@dataclasses.dataclass(frozen=True, eq=False)
class Scale(Step):
    """Entry by entry times a tensor that broadcasts to their shape."""

    in_shape: Size
    factor: Tensor

    @property
    def shape(self) -> Size:
        """The same."""
        return self.in_shape

    @property
    def content(self) -> Tensor:
        """The factor."""
        return self.factor

    @property
    def gain(self) -> float | None:
        """The square of the factor where it is one number."""
        return None if self.factor.numel() > 1 else self.factor.double().square().item()

    def push(self, V: Tensor) -> Tensor:
        """Multiply."""
        return V * self.factor.to(V.device, V.dtype)

    def pull(self, U: Tensor) -> Tensor:
        """Multiply."""
        return self.push(U)

    def source(self, index: Tensor) -> Tensor:
        """Return the labels as they are."""
        return index

r"""Forward operators: what an experiment sees of an unknown, as a differentiable map.

.. math:: y \approx A(x), \qquad x: (batch, *event), \quad A(x): (batch, *data)

An operator belongs to no grid. It acts on the values of a function at the midpoints of whatever grid the array's shape
says (:mod:`undrift.space`), so the same operator serves every resolution; leading axes of an event are channels.
A linear operator has an adjoint: the transpose :math:`A^\top` for the Euclidean products of the values,
:math:`\sum_i y_i (A x)_i = \sum_j (A^\top y)_j x_j`. On a grid of cell volume :math:`h^d` the adjoint for
:math:`L^2` is :math:`h^{-d} A^\top`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Composition", "LinearComposition", "LinearOperator", "Operator"]

_LARGEST_DENSE = 2**26  # numbers in a matrix written out: half a gigabyte


class Operator(ABC):
    """Base of all forward operators. ``second @ first`` applies ``first``, then ``second``."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """A(x) of x (batch, *event): (batch, *data), differentiable in x, same dtype and device."""

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)

    @property
    def data_shape(self) -> tuple[int, ...] | None:
        """The last sizes of the data where they are the same on every grid, or None."""
        return None

    def vjp(self, x: Tensor, cotangent: Tensor) -> Tensor:
        r"""Transposed derivative :math:`A'(x)^\top r`, by automatic differentiation unless a class knows better.

        Args:
            x: where, (batch, *event).
            cotangent: r (batch, *data).

        Returns:
            (batch, *event), not differentiable further.
        """
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            return torch.autograd.grad(self.forward(point), point, cotangent)[0]

    def jacobian(self, x: Tensor) -> Tensor:
        """Derivative at x (batch, *event) as matrices (batch, numbers of data, numbers of an event), one vjp a row."""
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            data = self.forward(point).flatten(1)
            _check_dense(data.shape[1], x[0].numel(), type(self).__name__)
            rows = [
                torch.autograd.grad(data[:, i].sum(), point, retain_graph=i + 1 < data.shape[1])[0]
                for i in range(data.shape[1])
            ]
        return torch.stack(rows, 1).flatten(2)

    def __matmul__(self, first: Operator) -> Operator:
        if not isinstance(first, Operator):
            return NotImplemented
        if isinstance(self, LinearOperator) and isinstance(first, LinearOperator):
            return LinearComposition(self, first)
        return Composition(self, first)


class LinearOperator(Operator):
    """Base of linear operators: A(0) = 0, so what is affine is not meant."""

    def adjoint(self, y: Tensor, event: Sequence[int]) -> Tensor:
        r"""Transpose :math:`A^\top y`, differentiable in y.

        Args:
            y: (batch, *data).
            event: shape of one event; the data do not say on which grid it lives.

        Returns:
            (batch, *event), y's dtype and device.
        """
        with torch.enable_grad():
            zero = torch.zeros(y.shape[0], *event, dtype=y.dtype, device=y.device, requires_grad=True)
            return torch.autograd.grad(self.forward(zero), zero, y, create_graph=y.requires_grad)[0]

    def vjp(self, x: Tensor, cotangent: Tensor) -> Tensor:
        return self.adjoint(cotangent, x.shape[1:])

    def dense(self, event: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
        """The matrix on one grid (numbers of data, numbers of an event), on the CPU: A applied to the unit vectors.

        Raises:
            ValueError: if it had more than 2^26 entries.
        """
        size = math.prod(event)
        _check_dense(self.forward(torch.zeros(1, *event, dtype=dtype)).numel(), size, type(self).__name__)
        return self.forward(torch.eye(size, dtype=dtype).reshape(size, *event)).flatten(1).T.contiguous()

    def jacobian(self, x: Tensor) -> Tensor:
        return self.dense(x.shape[1:], x.dtype).to(x.device).expand(x.shape[0], -1, -1)

    def gram(self, event: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
        r""":math:`A A^\top` on one grid (numbers of data, numbers of data)."""
        matrix = self.dense(event, dtype)
        return matrix @ matrix.T


@dataclass(frozen=True, eq=False)
class Composition(Operator):
    """``second(first(x))``, written ``second @ first``."""

    second: Operator
    first: Operator

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    @property
    def data_shape(self) -> tuple[int, ...] | None:
        return self.second.data_shape


@dataclass(frozen=True, eq=False)
class LinearComposition(LinearOperator):
    """``second(first(x))`` of linear operators, written ``second @ first``."""

    second: LinearOperator
    first: LinearOperator

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    def adjoint(self, y: Tensor, event: Sequence[int]) -> Tensor:
        between = self.first(torch.zeros(1, *event, dtype=y.dtype, device=y.device)).shape[1:]
        return self.first.adjoint(self.second.adjoint(y, between), event)

    @property
    def data_shape(self) -> tuple[int, ...] | None:
        return self.second.data_shape


def _check_dense(rows: int, columns: int, owner: str) -> None:
    if rows * columns > _LARGEST_DENSE:
        raise ValueError(
            f"{owner}: a dense matrix of {rows} x {columns} numbers is too large; use forward and adjoint (or vjp), "
            "or a coarser grid."
        )

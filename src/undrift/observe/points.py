r"""Operators that pick, average or weigh values.

Point observations see a function, not an array: value m is :math:`u(s_m)` at a place :math:`s_m` of the unit cube, from
the values at the midpoints :math:`(i + \frac12) / n` of any grid,

.. math:: (A u)_m = \sum_{i_1 \dots i_d} W^{(1)}_{m i_1} \cdots W^{(d)}_{m i_d} u_{i_1 \dots i_d},

one row of weights per axis. Linear interpolation continues the outermost line over the last half cell, so that its
error is second order in the cell size everywhere; in a basis of :mod:`undrift.space` the interpolation is the synthesis
at s, which is exact for every function the grid can carry. Both give the array's own value at a grid point.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from undrift.observe.base import LinearOperator
from undrift.space.basis import Basis, Cosine, Fourier, Sine

__all__ = ["Downsample", "Identity", "Mask", "Matrix", "Points"]


@dataclass(frozen=True, eq=False)
class Identity(LinearOperator):
    """All values, as they are."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def adjoint(self, y: Tensor, event: Sequence[int]) -> Tensor:
        return y.reshape(-1, *event)


@dataclass(frozen=True, eq=False)
class Matrix(LinearOperator):
    """Any matrix, acting on the flattened event.

    Args:
        matrix: (numbers of data, numbers of an event).
    """

    matrix: Tensor

    def __post_init__(self) -> None:
        matrix = torch.as_tensor(self.matrix)
        if matrix.ndim != 2 or not bool(torch.isfinite(matrix).all()):
            raise ValueError(
                f"Matrix: matrix must be a finite (data, event) matrix, got shape {tuple(matrix.shape)}"
                f"{'' if bool(torch.isfinite(matrix).all()) else ' with values that are not finite'}."
            )
        object.__setattr__(self, "matrix", matrix)

    @property
    def data_shape(self) -> tuple[int, ...]:
        return (self.matrix.shape[0],)

    def forward(self, x: Tensor) -> Tensor:
        if x[0].numel() != self.matrix.shape[1]:
            raise ValueError(
                f"Matrix: its rows hold {self.matrix.shape[1]} numbers, an event of shape {tuple(x.shape[1:])} "
                f"{x[0].numel()}."
            )
        return x.flatten(1) @ self.matrix.T.to(x)

    def adjoint(self, y: Tensor, event: Sequence[int]) -> Tensor:
        return (y @ self.matrix.to(y)).reshape(-1, *event)


@dataclass(frozen=True, eq=False)
class Mask(LinearOperator):
    """Some coordinates of an array, in row-major order: (batch, *channels, *mask.shape) -> (batch, *channels, known).

    Args:
        mask: true (or 1) where a coordinate is known, the shape of the event or of its last axes; then the same
            coordinates of every channel are known.
    """

    mask: Tensor

    def __post_init__(self) -> None:
        mask = torch.as_tensor(self.mask)
        if mask.ndim == 0 or not bool(((mask == 0) | (mask == 1)).all()) or not bool(mask.any()):
            raise ValueError(
                "Mask: mask must be an array of true and false (or 1 and 0) in which something is known, got "
                f"shape {tuple(mask.shape)} with {int((mask == 1).sum())} of {mask.numel()} values true."
            )
        object.__setattr__(self, "mask", mask.bool())

    @property
    def data_shape(self) -> tuple[int, ...]:
        return (int(self.mask.sum()),)

    def _index(self, shape: Sequence[int], device: torch.device) -> Tensor:
        if tuple(shape[len(shape) - self.mask.ndim :]) != tuple(self.mask.shape):
            raise ValueError(
                f"Mask: an event of shape {tuple(shape)} does not end in the mask's {tuple(self.mask.shape)}."
            )
        return self.mask.flatten().nonzero()[:, 0].to(device)

    def forward(self, x: Tensor) -> Tensor:
        index = self._index(x.shape[1:], x.device)
        return x.flatten(x.ndim - self.mask.ndim)[..., index]

    def adjoint(self, y: Tensor, event: Sequence[int]) -> Tensor:
        index = self._index(event, y.device)
        flat = y.new_zeros(*y.shape[:-1], self.mask.numel())
        return flat.index_copy(-1, index, y).reshape(-1, *event)


@dataclass(frozen=True, eq=False)
class Downsample(LinearOperator):
    """Means over blocks of neighbouring cells, along the last axes.

    The mean over a cell of a coarse grid is the same observation of the function from every finer grid, to second
    order in the fine cells.

    Args:
        factor: cells per block and axis; it must divide the grid.
        dims: how many axes, 1, 2 or 3.
    """

    factor: int
    dims: int = 2

    def __post_init__(self) -> None:
        if self.factor < 1 or self.dims not in (1, 2, 3):
            raise ValueError(f"Downsample: needs factor >= 1 and dims 1, 2 or 3, got {self.factor} and {self.dims}.")

    def _check(self, event: Sequence[int]) -> None:
        grid = tuple(event[len(event) - self.dims :])
        if len(event) < self.dims or any(n % self.factor for n in grid):
            raise ValueError(
                f"Downsample: an event of shape {tuple(event)} does not end in {self.dims} axes that "
                f"{self.factor} divides."
            )

    def forward(self, x: Tensor) -> Tensor:
        self._check(x.shape[1:])
        for axis in range(-self.dims, 0):
            x = x.unflatten(axis, (x.shape[axis] // self.factor, self.factor)).mean(axis)
        return x

    def adjoint(self, y: Tensor, event: Sequence[int]) -> Tensor:
        self._check(event)
        for axis in range(-self.dims, 0):
            y = y.repeat_interleave(self.factor, axis)
        return y / self.factor**self.dims


@dataclass(frozen=True, eq=False)
class Points(LinearOperator):
    """Values of a function at places of the unit cube: (batch, *channels, *grid) -> (batch, *channels, places).

    Args:
        locations: the places, numbers in [0, 1] in one dimension, else one tuple of coordinates each.
        basis: a basis of the same dimension to interpolate in; None interpolates linearly along each axis.
    """

    locations: tuple[float | tuple[float, ...], ...]
    basis: Basis | None = None

    def __post_init__(self) -> None:
        table = places(self.locations, "Points")
        object.__setattr__(self, "locations", tuple(s[0] if len(s) == 1 else s for s in table))
        if self.basis is not None and self.basis.dims != len(table[0]):
            raise ValueError(
                f"Points: places of {len(table[0])} coordinates cannot be read in a basis of dims={self.basis.dims}."
            )

    @property
    def dims(self) -> int:
        """Dimension of the domain."""
        first = self.locations[0]
        return len(first) if isinstance(first, tuple) else 1

    @property
    def data_shape(self) -> tuple[int, ...]:
        return (len(self.locations),)

    def _weights(self, event: Sequence[int], like: Tensor) -> list[Tensor]:
        if len(event) < self.dims:
            raise ValueError(
                f"Points: places of {self.dims} coordinates need {self.dims} axes, got event {tuple(event)}."
            )
        kind = None if self.basis is None else type(self.basis)
        columns = zip(*places(self.locations, "Points"), strict=True)
        grid = event[len(event) - self.dims :]
        return [interpolation(s, n, kind).to(like) for s, n in zip(columns, grid, strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        *rest, last = self._weights(x.shape[1:], x)
        x = x @ last.T
        for w in reversed(rest):
            x = (x * w.T).sum(-2)
        return x

    def adjoint(self, y: Tensor, event: Sequence[int]) -> Tensor:
        *rest, last = self._weights(event, y)
        for w in rest:
            y = y.unsqueeze(-2) * w.T
        return (y @ last).reshape(-1, *event)


def places(locations: Sequence[float | Sequence[float]], owner: str) -> tuple[tuple[float, ...], ...]:
    """Locations as a table of coordinates, checked to lie in the unit cube; arrays are taken as well."""
    locations = locations.tolist() if isinstance(locations, Tensor | np.ndarray) else locations
    table = tuple(tuple(map(float, s)) if isinstance(s, Sequence) else (float(s),) for s in locations)
    if not table or len({len(s) for s in table}) != 1 or len(table[0]) not in (1, 2, 3):
        raise ValueError(
            f"{owner}: locations must be one or more places of 1, 2 or 3 coordinates each, got {locations}."
        )
    for m, s in enumerate(table):
        if not all(0 <= c <= 1 for c in s):
            raise ValueError(f"{owner}: location {m} is {s}; every coordinate must lie in [0, 1].")
    return table


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)  # what is kept may serve training later
def interpolation(s: tuple[float, ...], n: int, kind: type[Basis] | None) -> Tensor:
    """Weights (places, n) of the values on n midpoints that give the values at s: linear, or of a basis. float64."""
    at = torch.tensor(s, dtype=torch.float64)
    if kind is not None:
        return _functions(at, n, kind) @ kind(1).analyse(torch.eye(n, dtype=torch.float64)).T
    if n == 1:
        return torch.ones(len(s), 1, dtype=torch.float64)
    left = (at * n - 0.5).floor().clamp(0, n - 2).long()
    right = at * n - 0.5 - left
    rows = torch.arange(len(s))
    weights = torch.zeros(len(s), n, dtype=torch.float64)
    weights[rows, left], weights[rows, left + 1] = 1 - right, right
    return weights


def _functions(s: Tensor, n: int, kind: type[Basis]) -> Tensor:
    """The first n functions of a basis of the interval at s: (places, n)."""
    angle = s[:, None] * kind.wavenumbers(n)
    if kind is Cosine:
        values = math.sqrt(2) * angle.cos()
        values[:, 0] = 1
        return values
    if kind is Sine:
        values = math.sqrt(2) * angle.sin()
        values[:, -1] *= math.sqrt(0.5)
        return values
    if kind is Fourier:
        values = math.sqrt(2) * angle.cos()
        values[:, 1::2] = math.sqrt(2) * angle[:, 1::2].sin()
        values[:, 0] = 1
        if n % 2 == 0:
            values[:, -1] *= math.sqrt(0.5)
        return values
    raise ValueError(f"Points: no interpolation in a {kind.__name__} basis; use Cosine, Sine, Fourier or None.")

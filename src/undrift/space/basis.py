r"""Orthonormal bases of :math:`L^2([0,1]^d)`: eigenfunctions of minus the Laplacian.

A function u is known by its values on the midpoint grid :math:`x_i = (i + \frac12)/n` of every axis, or by its
coefficients :math:`c_j = \langle u, \phi_j\rangle`. Both are arrays of the same shape, and the shape is the grid: a
basis holds none, and acts on the last d axes of whatever it is given.

    Cosine    Neumann     1, sqrt2 cos(pi x), sqrt2 cos(2 pi x), ...           mu_j = (pi j)^2, j = 0, 1, ...
    Sine      Dirichlet   sqrt2 sin(pi x), sqrt2 sin(2 pi x), ...              mu_j = (pi (j + 1))^2
    Fourier   periodic    1, sqrt2 sin(2 pi x), sqrt2 cos(2 pi x), ...         mu = (2 pi k)^2, sine before cosine

The transforms are orthonormal for :math:`\langle u, v\rangle = h^d \sum_i u_i v_i`, so the same coefficients are the
same function on every grid, and Parseval's identity holds on each. One mode is an exception: the sine that alternates
from point to point (the last of Sine; of Fourier, on an even grid) has norm 1 on its grid without the sqrt2.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Basis", "Cosine", "Fourier", "Sine"]


@dataclass(frozen=True)
class Basis(ABC):
    """A tensor-product basis on the unit cube.

    Args:
        dims: dimension d of the domain: 1, 2 or 3.
    """

    dims: int = 1

    def __post_init__(self) -> None:
        if self.dims not in (1, 2, 3):
            raise ValueError(f"{type(self).__name__}: dims is the dimension of the domain, 1, 2 or 3, got {self.dims}.")

    @staticmethod
    @abstractmethod
    def _forward(u: Tensor) -> Tensor:
        """Coefficients along the last axis."""

    @staticmethod
    @abstractmethod
    def _inverse(c: Tensor) -> Tensor:
        """Values along the last axis."""

    @staticmethod
    @abstractmethod
    def wavenumbers(n: int) -> Tensor:
        """Square roots of the eigenvalues of minus the second derivative, of the first n modes (n,), float64."""

    @staticmethod
    @abstractmethod
    def heat_trace(s: Tensor) -> Tensor:
        """Sum of exp(-s mu_j) over all modes of one axis, for s > 0 of any shape, float64."""

    @staticmethod
    @abstractmethod
    def small_heat_trace() -> tuple[float, float]:
        """(a, b) of the expansion heat_trace(s) = a + b / sqrt(s), exact up to exp(-1/(4 s))."""

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The grid of an array of this shape: its last d sizes.

        Raises:
            ValueError: if there are too few axes.
        """
        if len(shape) < self.dims:
            raise ValueError(
                f"{type(self).__name__}(dims={self.dims}): a function needs {self.dims} "
                f"{'axis' if self.dims == 1 else 'axes'} of values at the end of its shape, got {tuple(shape)}."
            )
        return tuple(int(n) for n in shape[len(shape) - self.dims :])

    def analyse(self, u: Tensor) -> Tensor:
        """Coefficients of the functions with values u (..., *grid); same shape and dtype."""
        self.grid(u.shape)
        if not u.numel():  # not every FFT takes an empty batch
            return u
        for axis in range(-self.dims, 0):
            u = self._forward(u.movedim(axis, -1)).movedim(-1, axis)
        return u

    def synthesise(self, c: Tensor) -> Tensor:
        """Values of the functions with coefficients c (..., *grid); same shape and dtype."""
        self.grid(c.shape)
        if not c.numel():
            return c
        for axis in range(-self.dims, 0):
            c = self._inverse(c.movedim(axis, -1)).movedim(-1, axis)
        return c

    def eigenvalues(self, grid: Sequence[int]) -> Tensor:
        """Eigenvalues mu of minus the Laplacian, in the order of the coefficients, (*grid), float64."""
        out = torch.zeros(1, dtype=torch.float64)
        for axis, n in enumerate(self.grid(grid)):
            mu = self.wavenumbers(n).square()
            out = out + mu.reshape(-1, *[1] * (self.dims - axis - 1))
        return out

    def points(self, grid: Sequence[int]) -> Tensor:
        """Where the values are taken: the midpoints, (*grid, d), float64."""
        axes = [(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in self.grid(grid)]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)

    def fit(self, c: Tensor, grid: Sequence[int]) -> Tensor:
        """Coefficients c (..., *its grid) on another grid: cut off, or filled with zeros."""
        for axis, n in zip(range(-self.dims, 0), self.grid(grid), strict=True):
            here = c.shape[axis]
            c = c.narrow(axis, 0, n) if n < here else torch.nn.functional.pad(c, [0, 0] * (-axis - 1) + [0, n - here])
        return c

    def resample(self, u: Tensor, grid: Sequence[int]) -> Tensor:
        """Values u (..., *its grid) of the same functions on another grid, without the modes that it has not."""
        return self.synthesise(self.fit(self.analyse(u), grid))


@dataclass(frozen=True)
class Cosine(Basis):
    """Neumann: functions whose slope vanishes at the boundary. The discrete cosine transform of the second kind."""

    @staticmethod
    def _forward(u: Tensor) -> Tensor:
        return _dct(u)

    @staticmethod
    def _inverse(c: Tensor) -> Tensor:
        return _idct(c)

    @staticmethod
    def wavenumbers(n: int) -> Tensor:
        return math.pi * torch.arange(n, dtype=torch.float64)

    @staticmethod
    def heat_trace(s: Tensor) -> Tensor:
        return 1 + _theta(s)

    @staticmethod
    def small_heat_trace() -> tuple[float, float]:
        return 0.5, 0.5 / math.sqrt(math.pi)


@dataclass(frozen=True)
class Sine(Basis):
    """Dirichlet: functions that vanish at the boundary. The discrete sine transform of the second kind."""

    @staticmethod
    def _forward(u: Tensor) -> Tensor:
        # sin(pi (j + 1) x) is cos(pi (n - 1 - j) x) with the sign of every other point changed
        return _dct(_alternate(u)).flip(-1)

    @staticmethod
    def _inverse(c: Tensor) -> Tensor:
        return _alternate(_idct(c.flip(-1)))

    @staticmethod
    def wavenumbers(n: int) -> Tensor:
        return math.pi * torch.arange(1, n + 1, dtype=torch.float64)

    @staticmethod
    def heat_trace(s: Tensor) -> Tensor:
        return _theta(s)

    @staticmethod
    def small_heat_trace() -> tuple[float, float]:
        return -0.5, 0.5 / math.sqrt(math.pi)


@dataclass(frozen=True)
class Fourier(Basis):
    """Periodic functions: the real Fourier series, sine before cosine."""

    @staticmethod
    def _forward(u: Tensor) -> Tensor:
        n = u.shape[-1]
        k = torch.arange(n // 2 + 1, dtype=torch.float64, device=u.device)
        turned = torch.fft.rfft(u) * _phase(-k / (2 * n), u.dtype) * (math.sqrt(2) / n)
        pairs = torch.stack([-turned.imag, turned.real], -1).flatten(-2)  # sin 0, cos 0, sin 1, cos 1, ...
        scale = torch.ones(2 * len(k), dtype=u.dtype, device=u.device)
        scale[1] = math.sqrt(0.5)
        if n % 2 == 0:
            scale[n] = math.sqrt(0.5)
        return (pairs * scale)[..., 1 : n + 1]

    @staticmethod
    def _inverse(c: Tensor) -> Tensor:
        n = c.shape[-1]
        half = n // 2 + 1
        scale = torch.ones(2 * half, dtype=c.dtype, device=c.device)
        scale[1] = math.sqrt(2)
        if n % 2 == 0:
            scale[n] = math.sqrt(2)
        pairs = (torch.nn.functional.pad(c, (1, 2 * half - n - 1)) * scale).unflatten(-1, (half, 2))
        k = torch.arange(half, dtype=torch.float64, device=c.device)
        turned = torch.complex(pairs[..., 1], -pairs[..., 0]) * _phase(k / (2 * n), c.dtype) * (n / math.sqrt(2))
        return torch.fft.irfft(turned, n)

    @staticmethod
    def wavenumbers(n: int) -> Tensor:
        return 2 * math.pi * torch.div(torch.arange(n, dtype=torch.float64) + 1, 2, rounding_mode="floor")

    @staticmethod
    def heat_trace(s: Tensor) -> Tensor:
        return 1 + 2 * _theta(4 * s)

    @staticmethod
    def small_heat_trace() -> tuple[float, float]:
        return 0.0, 0.5 / math.sqrt(math.pi)


def _theta(s: Tensor) -> Tensor:
    """Sum over j = 1, 2, ... of exp(-pi^2 j^2 s), from whichever of its two forms converges fast."""
    j = torch.arange(1, 8, dtype=torch.float64)
    slow = s.unsqueeze(-1)
    direct = torch.exp(-(math.pi**2) * j.square() * slow).sum(-1)
    dual = ((1 + 2 * torch.exp(-j.square() / slow).sum(-1)) / (math.pi * s).sqrt() - 1) / 2
    return torch.where(s > 1 / math.pi, direct, dual)


def _phase(turns: Tensor, real: torch.dtype) -> Tensor:
    """exp(2 pi i turns) in the complex dtype that goes with ``real``."""
    angle = 2 * math.pi * turns
    return torch.complex(angle.cos(), angle.sin()).to(torch.complex128 if real == torch.float64 else torch.complex64)


def _alternate(u: Tensor) -> Tensor:
    signs = torch.ones(u.shape[-1], dtype=u.dtype, device=u.device)
    signs[1::2] = -1
    return u * signs


def _dct(u: Tensor) -> Tensor:
    """L2-orthonormal cosine coefficients along the last axis, by one FFT of the reordered values (Makhoul 1980)."""
    n = u.shape[-1]
    k = torch.arange(n, dtype=torch.float64, device=u.device)
    spectrum = torch.fft.fft(torch.cat([u[..., ::2], u[..., 1::2].flip(-1)], -1))
    scale = torch.full((n,), math.sqrt(2) / n, dtype=u.dtype, device=u.device)
    scale[0] = 1 / n
    return (spectrum * _phase(-k / (4 * n), u.dtype)).real * scale


def _idct(c: Tensor) -> Tensor:
    n = c.shape[-1]
    k = torch.arange(n // 2 + 1, dtype=torch.float64, device=c.device)
    scale = torch.full((n,), n / math.sqrt(2), dtype=c.dtype, device=c.device)
    scale[0] = n
    c = c * scale
    mirror = torch.nn.functional.pad(c.flip(-1), (1, 0))  # c_n = 0, c_{n-1}, ..., c_1
    half = torch.complex(c, -mirror[..., :n])[..., : n // 2 + 1]
    v = torch.fft.irfft(half * _phase(k / (4 * n), c.dtype), n)
    out = torch.empty_like(v)
    out[..., ::2], out[..., 1::2] = v[..., : (n + 1) // 2], v[..., (n + 1) // 2 :].flip(-1)
    return out

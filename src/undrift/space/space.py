r"""Where a diffusion lives: the array that a point is, and the colour of its noise.

A point is an array (batch, *event). On :class:`White`, an image or a vector, noise is independent in every coordinate.
On a :class:`FunctionSpace` the last d axes are a function on a grid, and noise is a random function of covariance
:math:`C = \sum_j \lambda_j \phi_j \otimes \phi_j`, the same law on every grid. A linear process on it is

.. math:: dz = (F \otimes I) z\,dt + (G \otimes C^{1/2})\,dw, \qquad
    z_t \mid x_0 \sim N\big(m_t \otimes x_0,\; S_t \otimes C\big),

so that its small matrices, its noise levels and the tables of its samplers are those of the process on white noise;
only how noise is drawn changes, and the inner product of scores and likelihoods. Three coordinates for one function u:

    physical        u(x_i)                              C is an operator; inner product h^d sum u v
    coefficients    c_j = <u, phi_j>                    C = diag(lambda)
    whitened        w_j = c_j / sqrt(lambda_j)          C = I; a sum of squares is the Cameron-Martin norm

Noise is one array xi of unit normals, in the order of the coefficients, whatever the coordinates: the same seed draws
the same function in all three.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from undrift.space.basis import Basis, Cosine
from undrift.space.covariance import Covariance, EmpiricalSpectrum, Matern

__all__ = ["Coordinates", "FunctionSpace", "Space", "White", "space_of"]

Coordinates = Literal["physical", "coefficients", "whitened"]


class Space(ABC):
    """What a diffusion asks of its space. Arrays have any leading axes."""

    @property
    @abstractmethod
    def white(self) -> bool:
        """Whether noise is independent, of variance 1, in the space's coordinates."""

    @abstractmethod
    def colour(self, xi: Tensor) -> Tensor:
        """A draw of the noise, from unit normals xi of its shape."""

    @abstractmethod
    def power(self, v: Tensor, exponent: float) -> Tensor:
        """C to a power, applied to v."""

    @abstractmethod
    def norm2(self, v: Tensor, theta: float = 0.0) -> Tensor:
        """Squared norm of each of v (batch, *event), (batch,)."""

    def encode(self, u: Tensor) -> Tensor:
        """The space's coordinates of physical values u."""
        return u

    def decode(self, x: Tensor) -> Tensor:
        """Physical values of the points with coordinates x."""
        return x

    def covariance(self, v: Tensor) -> Tensor:
        """C v."""
        return self.power(v, 1.0)

    def root(self, v: Tensor) -> Tensor:
        """The symmetric root of C, applied to v."""
        return self.power(v, 0.5)

    def precision(self, v: Tensor) -> Tensor:
        """C^-1 v."""
        return self.power(v, -1.0)

    def gradient(self, slope: Tensor) -> Tensor:
        """The gradient, for the space's inner product, of a function whose partial derivatives are ``slope``."""
        return slope


@dataclass(frozen=True)
class White(Space):
    """Independent noise in every coordinate: images, vectors, and anything else that is not a function."""

    @property
    def white(self) -> bool:
        return True

    def colour(self, xi: Tensor) -> Tensor:
        return xi

    def power(self, v: Tensor, exponent: float) -> Tensor:
        return v

    def norm2(self, v: Tensor, theta: float = 0.0) -> Tensor:
        return v.reshape(v.shape[0], -1).square().sum(1)


@dataclass(frozen=True)
class FunctionSpace(Space):
    r"""Functions on a grid of the unit cube, with noise that is a function.

    The array decides the grid: one space serves them all. An event is (*grid), or (channels, *grid) for a field of
    several components, each with noise of its own.

    Args:
        basis: Cosine, Sine or Fourier, of dimension d.
        spectrum: of the noise.
        coordinates: what the numbers of an array are.

    Raises:
        ValueError: if the spectrum is not trace class.

    References:
        Pidstrigach et al. 2023 (arXiv 2302.10130); Lim et al. 2023 (arXiv 2302.07400); Baldassari et al. 2023
        (arXiv 2305.19147).
    """

    basis: Basis = field(default_factory=Cosine)
    spectrum: Covariance = field(default_factory=Matern)
    coordinates: Coordinates = "physical"

    def __post_init__(self) -> None:
        if self.coordinates not in ("physical", "coefficients", "whitened"):
            raise ValueError(
                "FunctionSpace: coordinates must be 'physical', 'coefficients' or 'whitened', "
                f"got {self.coordinates!r}."
            )
        self.spectrum.check(self.basis)
        object.__setattr__(self, "_kept", {})

    @classmethod
    def of(cls, fields: Tensor, basis: Basis | None = None, coordinates: Coordinates = "physical") -> FunctionSpace:
        """Noise for data: a Matern fit to their spectrum, no smoother than alpha = (d + 1)/2.

        What to train a network on. Noise as smooth as the data would reach every mode at the same level, and a network
        would have to be right in modes that hold a millionth of the variance; see :meth:`matched`.

        Args:
            fields: data (N, ..., *grid), values on a grid, N > 1.
            basis: where to look at them; Cosine if None, of two dimensions if there are axes for it.
            coordinates: of the space.
        """
        chosen = _basis_for(fields, basis)
        return cls(chosen, Matern.fit(fields, chosen, smoothest=(chosen.dims + 1) / 2), coordinates)

    @classmethod
    def matched(
        cls, fields: Tensor, basis: Basis | None = None, coordinates: Coordinates = "physical"
    ) -> FunctionSpace:
        """Noise of the data's own spectrum, in which every mode of whitened data has variance 1.

        What Langevin dynamics wants, whose steps are limited by the roughness of noise relative to the prior.

        Args:
            fields, basis, coordinates: see :meth:`of`.
        """
        chosen = _basis_for(fields, basis)
        return cls(chosen, EmpiricalSpectrum.of(fields, chosen), coordinates)

    @property
    def white(self) -> bool:
        return self.coordinates == "whitened"

    def variances(self, grid: tuple[int, ...]) -> Tensor:
        """Variances lambda of the modes of a grid, in the order of its coefficients, (*grid), float64."""
        return self._powers(tuple(grid), 1.0, torch.zeros((), dtype=torch.float64))

    def _powers(self, grid: tuple[int, ...], exponent: float, like: Tensor) -> Tensor:
        kept: dict[object, Tensor] = self._kept  # type: ignore[attr-defined]
        key = (grid, exponent, like.dtype, like.device)
        if key not in kept:
            with torch.inference_mode(False):  # what is kept may serve training later
                kept[key] = self.spectrum.variances(self.basis, grid).pow(exponent).to(like)
        return kept[key]

    def _lambda(self, v: Tensor, exponent: float) -> Tensor:
        return self._powers(self.basis.grid(v.shape), exponent, v)

    def colour(self, xi: Tensor) -> Tensor:
        if self.coordinates == "whitened":
            return xi
        c = xi * self._lambda(xi, 0.5)
        return c if self.coordinates == "coefficients" else self.basis.synthesise(c)

    def power(self, v: Tensor, exponent: float) -> Tensor:
        if self.coordinates == "whitened":
            return v
        if self.coordinates == "coefficients":
            return v * self._lambda(v, exponent)
        return self.basis.synthesise(self.basis.analyse(v) * self._lambda(v, exponent))

    def norm2(self, v: Tensor, theta: float = 0.0) -> Tensor:
        r"""Squared norms :math:`\sum_j \lambda_j^{-\theta} \langle v, \phi_j\rangle^2` of v (batch, *event), (batch,).

        theta = 0 is the norm of H = L^2; theta = 1 that of Cameron and Martin, in which noise has infinite length.
        """
        if self.coordinates == "whitened":
            squares = v.square() if theta == 1.0 else v.square() * self._lambda(v, 1.0 - theta)
            return squares.reshape(v.shape[0], -1).sum(1)
        if theta == 0.0 and self.coordinates == "physical":
            return v.reshape(v.shape[0], -1).square().sum(1) / math.prod(self.basis.grid(v.shape))
        c = self.basis.analyse(v) if self.coordinates == "physical" else v
        squares = c.square() if theta == 0.0 else c.square() * self._lambda(v, -theta)
        return squares.reshape(v.shape[0], -1).sum(1)

    def encode(self, u: Tensor) -> Tensor:
        """The space's coordinates of the functions with values u (..., *grid)."""
        return _express(self, u, "physical", self.coordinates)

    def decode(self, x: Tensor) -> Tensor:
        """Values (..., *grid) of the functions with the space's coordinates x."""
        return _express(self, x, self.coordinates, "physical")

    def coefficients(self, x: Tensor) -> Tensor:
        """Coefficients (..., *grid) of the functions with the space's coordinates x."""
        return _express(self, x, self.coordinates, "coefficients")

    def gradient(self, slope: Tensor) -> Tensor:
        r"""The gradient in H, for the inner product of H, of a function whose partial derivatives are ``slope``.

        On physical values that is :math:`h^{-d}` times them; a slope by coefficients is a gradient already.
        """
        if self.coordinates == "physical":
            return slope * math.prod(self.basis.grid(slope.shape))
        return slope

    def in_coordinates(self, coordinates: Coordinates) -> FunctionSpace:
        """The same space in other coordinates."""
        other = FunctionSpace(self.basis, self.spectrum, coordinates)
        object.__setattr__(other, "_kept", self._kept)  # type: ignore[attr-defined]
        return other


def _basis_for(fields: Tensor, basis: Basis | None) -> Basis:
    return Cosine(max(1, min(2, fields.ndim - 1))) if basis is None else basis


def space_of(model: object, given: Space | None = None) -> Space:
    """The space that is given, or else the one that the model says it lives on, or else White.

    Raises:
        TypeError: if that is not a Space.
        ValueError: if the model lives on another space of functions than the one given.
    """
    own = getattr(model, "space", None)
    space = own if given is None else given
    if space is not None and not isinstance(space, Space):
        raise TypeError(f"space must be a Space, such as White() or a FunctionSpace, got a {type(space).__name__}.")
    if given is not None and isinstance(own, FunctionSpace) and own != given:
        raise ValueError(
            f"space: the {type(model).__name__} removes noise of {own}, and was given {given}. Leave the space out; "
            "where dataclasses.replace carries an old one along, give it space=None."
        )
    return White() if space is None else space


def _express(space: FunctionSpace, x: Tensor, of: Coordinates, to: Coordinates) -> Tensor:
    if of == to:
        return x
    if of == "physical":
        x = space.basis.analyse(x)
    elif of == "whitened":
        x = x * space._lambda(x, 0.5)
    if to == "physical":
        return space.basis.synthesise(x)
    return x * space._lambda(x, -0.5) if to == "whitened" else x

r"""Denoisers of functions: the exact one of a Gaussian field on every grid, and any one in other coordinates.

For data :math:`N(m, C_\mu)` and noise :math:`N(0, C)` with covariances diagonal in one basis, variances
:math:`\mu_j` and :math:`\lambda_j`, the posterior mean acts on each mode alone,

.. math:: \langle D(\tilde x, \sigma), \phi_j\rangle = m_j
    + \frac{\mu_j}{\mu_j + \sigma^2 \lambda_j} \bigl(\langle\tilde x, \phi_j\rangle - m_j\bigr),

whatever the grid: a finer one adds modes and changes none. In whitened coordinates this is Gaussian data of variances
:math:`\kappa_j = \mu_j/\lambda_j`, so every exact result about plans holds mode by mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from undrift.denoise.base import Denoiser, per_sample
from undrift.space import Covariance, FunctionSpace

__all__ = ["FieldGaussian", "OnFunctions"]


@dataclass(frozen=True, eq=False)
class FieldGaussian(Denoiser):
    """The exact denoiser of a Gaussian field, in any coordinates and on any grid.

    Args:
        space: where the points live, and the noise.
        data_covariance: spectrum of the data, in the space's basis.
        mean: values of the data's mean on any one grid (..., *grid), to which finer grids add no modes; None for 0.
            Leading axes broadcast against channels.

    Raises:
        TypeError: if the space is not one of functions.
        ValueError: if the data's spectrum is not trace class, or the mean is not finite or has too few axes.
    """

    space: FunctionSpace
    data_covariance: Covariance
    mean: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.space, FunctionSpace):
            raise TypeError(
                f"FieldGaussian: space must be a FunctionSpace, got a {type(self.space).__name__}; on White, "
                "GaussianDenoiser is exact."
            )
        object.__setattr__(self, "_data", FunctionSpace(self.space.basis, self.data_covariance, "coefficients"))
        if self.mean is not None:
            mean = torch.as_tensor(self.mean, dtype=torch.float64)
            if not bool(mean.isfinite().all()):
                raise ValueError("FieldGaussian: mean must be finite.")
            object.__setattr__(self, "mean", mean)
            object.__setattr__(self, "_centre", self.space.basis.analyse(mean))

    @property
    def data(self) -> FunctionSpace:
        """The space whose noise is the data's, by coefficients: ``data.variances(grid)`` are the mu_j."""
        return self._data  # type: ignore[attr-defined]

    def centre(self, grid: Sequence[int]) -> Tensor:
        """Coefficients of the mean on a grid, float64: (..., *grid)."""
        if self.mean is None:
            return torch.zeros(tuple(grid), dtype=torch.float64)
        return self.space.basis.fit(self._centre, grid)  # type: ignore[attr-defined]

    def draw(
        self, n: int, shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """Data (n, *shape) in the space's coordinates; shape is (*grid), or (channels, *grid)."""
        xi = torch.empty(n, *shape, dtype=torch.float64).normal_(generator=generator)
        c = self.data.colour(xi) + self.centre(self.space.basis.grid(xi.shape))
        return self._express(c, "coefficients", self.space.coordinates).to(dtype)

    def _express(self, x: Tensor, of: str, to: str) -> Tensor:
        """From ``of`` to ``to``, of which one is the space's and the other is by coefficients."""
        if of == to:
            return x
        if to == "coefficients":
            return self.space.coefficients(x)
        physical = self.space.basis.synthesise(x)
        return physical if to == "physical" else self.space.encode(physical)

    def __call__(self, x: Tensor, sigma: Tensor | float, **condition: Any) -> Tensor:
        """E[x0 | x0 + sigma n = x] of x (batch, *event); computed in float64, returned in x's dtype."""
        if condition:
            raise TypeError(f"FieldGaussian takes no condition, got {', '.join(condition)}.")
        z = x.double()
        c = self.space.coefficients(z)
        grid = self.space.basis.grid(x.shape)
        noise = per_sample(sigma, z).square() * self.space.variances(grid).to(z)
        data, centre = self.data.variances(grid).to(z), self.centre(grid).to(z)
        out = centre + data / (data + noise) * (c - centre)
        return self._express(out, "coefficients", self.space.coordinates).to(x)


@dataclass(frozen=True, eq=False)
class OnFunctions(Denoiser):
    """A denoiser of physical values, asked in another space's coordinates.

    A network reads functions from their values; a sampler, a likelihood or a Markov chain may want coefficients or
    whitened coordinates. Both are the same denoiser.

    Args:
        denoiser: takes and returns values on a grid.
        space: whose coordinates the points are in; the noise must have its spectrum.

    Raises:
        TypeError: if the space is not one of functions.
        ValueError: if the denoiser lives on a space of functions in other than physical coordinates.
    """

    denoiser: Denoiser
    space: FunctionSpace

    def __post_init__(self) -> None:
        if not isinstance(self.space, FunctionSpace):
            raise TypeError(f"OnFunctions: space must be a FunctionSpace, got a {type(self.space).__name__}.")
        inner = getattr(self.denoiser, "space", None)
        if isinstance(inner, FunctionSpace) and inner.coordinates != "physical":
            raise ValueError(
                f"OnFunctions: the denoiser works on {inner.coordinates} coordinates itself; give one of physical "
                "values."
            )

    def __call__(self, x: Tensor, sigma: Tensor | float, **condition: Any) -> Tensor:
        """The prediction in the space's coordinates, of x (batch, *event) in them; same shape and dtype."""
        return self.space.encode(self.denoiser(self.space.decode(x), sigma, **condition))  # type: ignore[arg-type]

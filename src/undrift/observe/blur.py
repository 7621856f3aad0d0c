r"""Smoothing operators that are diagonal in a basis: each mode is multiplied by a number of its eigenvalue.

.. math:: A u = \sum_j s(\mu_j) \langle u, \phi_j\rangle \phi_j, \qquad -\Delta \phi_j = \mu_j \phi_j

Modes keep their numbers on every grid, so these act on functions. Their matrices are symmetric.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from undrift.observe.base import LinearOperator
from undrift.space.basis import Basis, Cosine

__all__ = ["Blur", "Heat", "SpectralFilter"]


class SpectralFilter(LinearOperator):
    """Base of operators that multiply the modes of ``basis``: (batch, *channels, *grid), same shape."""

    basis: Basis

    @abstractmethod
    def symbol(self, mu: Tensor) -> Tensor:
        """Factors s of eigenvalues mu of minus the Laplacian, float64, same shape."""

    def forward(self, x: Tensor) -> Tensor:
        factors = self.symbol(self.basis.eigenvalues(self.basis.grid(x.shape[1:]))).to(x)
        return self.basis.synthesise(factors * self.basis.analyse(x))

    def adjoint(self, y: Tensor, event: Sequence[int]) -> Tensor:
        return self.forward(y.reshape(-1, *event))


@dataclass(frozen=True, eq=False)
class Heat(SpectralFilter):
    r"""The heat equation :math:`\partial_t u = \Delta u` run for a time: :math:`s = e^{-\mu t}`.

    Args:
        time: at least 0.
        basis: Cosine for an insulated boundary, Sine for one held at 0, Fourier for a torus.
    """

    time: float
    basis: Basis = field(default_factory=Cosine)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.time) and self.time >= 0):
            raise ValueError(f"Heat: time must be a finite number of at least 0, got {self.time}.")

    def symbol(self, mu: Tensor) -> Tensor:
        return torch.exp(-self.time * mu)


@dataclass(frozen=True, eq=False)
class Blur(SpectralFilter):
    r"""Gaussian blur: the heat equation at time width^2/2, :math:`s = e^{-\mu\, width^2 / 2}`.

    Away from the boundary this is the convolution with a Gaussian density; at the boundary the function is continued
    as the basis continues it: mirrored (Cosine), mirrored with the other sign (Sine), or periodically (Fourier).

    Args:
        width: standard deviation of the Gaussian, in units of the domain's side (not of pixels), at least 0.
        basis: see above; its ``dims`` are the axes that are blurred, the last ones.
    """

    width: float
    basis: Basis = field(default_factory=lambda: Cosine(2))

    def __post_init__(self) -> None:
        if not (math.isfinite(self.width) and self.width >= 0):
            raise ValueError(f"Blur: width must be a finite number of at least 0, got {self.width}.")

    def symbol(self, mu: Tensor) -> Tensor:
        return torch.exp(-0.5 * self.width**2 * mu)

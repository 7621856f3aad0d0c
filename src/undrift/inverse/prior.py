r"""What posterior sampling asks of a prior on functions: its slope, at a little noise.

Along the Ornstein-Uhlenbeck process :math:`dX = -\frac12 X\,d\tau + C^{1/2} dW` from data :math:`X_0 \sim \mu`, the
score is defined without densities, as the H-valued function

.. math:: S(x, \tau) = -\frac{x - e^{-\tau/2}\, E[X_0 \mid X_\tau = x]}{1 - e^{-\tau}}
    \qquad (= C \nabla \log p_\tau(x) \text{ on a grid}),

and is finite on every grid. A denoiser D of the library knows the conditional mean at any noise level, whatever process
it was trained for: with :math:`\tilde x = e^{\tau/2} x` and :math:`\sigma^2 = e^\tau - 1`,

.. math:: E[X_0 \mid X_\tau = x] = D(e^{\tau/2} x, \sqrt{e^\tau - 1}).

A sampler that uses S at a small tau > 0 samples, at best, the posterior of the prior at tau, a bias of order tau.

A prior that is absolutely continuous with respect to the Gaussian measure of the space's noise, N(0, C), may tell the
ratio :math:`\log d\mu / dN(0, C)`, which is what Metropolised moves and tempering need to be exact.

References:
    Pidstrigach et al. 2023 (arXiv 2302.10130), definition 1; Baldassari et al. 2024 (arXiv 2405.15676).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from undrift.denoise.base import Denoiser, per_sample
from undrift.space import Covariance, FunctionSpace, Space, space_of

__all__ = ["DenoiserPrior", "FieldMixture", "Prior", "RatioPrior"]


@runtime_checkable
class Prior(Protocol):
    """Anything with a slope on a space."""

    @property
    def space(self) -> Space:
        """Where the points live; its noise has covariance C."""
        ...

    def slope(self, x: Tensor, tau: float) -> Tensor:
        """S(x, tau), C times the score at time tau, for x (batch, *event): same shape and dtype."""
        ...


@runtime_checkable
class RatioPrior(Prior, Protocol):
    """A prior with a density with respect to N(0, C)."""

    def log_ratio(self, x: Tensor) -> Tensor:
        """log d mu / d N(0, C) at x (batch, *event): (batch,), float64, differentiable in x."""
        ...


@dataclass(frozen=True, eq=False)
class DenoiserPrior:
    """The law that a denoiser has learned, or knows.

    Args:
        denoiser: any denoiser on the space.
        space: where the points live; by default the denoiser's, or White.
    """

    denoiser: Denoiser
    space: Space = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        object.__setattr__(self, "space", space_of(self.denoiser, self.space))
        if getattr(self.denoiser, "clock", None) is not None:
            raise ValueError(
                f"DenoiserPrior: the {type(self.denoiser).__name__} was made with a modal clock, on which every mode "
                "has a level of its own, and knows no slope at one time; take a denoiser without a clock, or walk the "
                "ModalDiffusion."
            )

    def slope(self, x: Tensor, tau: float) -> Tensor:
        """S(x, tau), tau > 0, for x (batch, *event): same shape and dtype.

        Raises:
            ValueError: if tau is not positive: a denoiser says nothing of a point without noise.
        """
        if not (math.isfinite(tau) and tau > 0):
            raise ValueError(
                f"DenoiserPrior: the slope of a denoiser is known at tau > 0 only, got {tau}; take a small one, "
                "such as 1e-3, and expect a bias of that order."
            )
        sigma = torch.full((x.shape[0],), math.sqrt(math.expm1(tau)), dtype=x.dtype, device=x.device)
        mean = self.denoiser(math.exp(tau / 2) * x, sigma)
        return (math.exp(-tau / 2) * mean - x) / -math.expm1(-tau)


@dataclass(frozen=True, eq=False)
class FieldMixture(Denoiser):
    r"""A mixture of Gaussian random fields, known exactly on every grid: prior, denoiser and truth in one.

    .. math:: \mu = \sum_k w_k N(m_k, C_\mu), \qquad C_\mu = \operatorname{diag}(\mu_j) \text{ in the space's basis},

    with the noise's variances :math:`\lambda_j`. One component is a Gaussian field. Means are given by finitely many
    coefficients, so responsibilities are sums over these modes alone, the same on every grid.

    Args:
        space: where the points live, of any coordinates.
        means: coefficients of the centres (M, *modes), as many modes as wanted; finer grids fill up with zeros. None
            for one component at 0.
        weights: (M,) positive, normalised here; equal if None.
        spectrum: of each component; None for that of the space's noise, and only then does the ratio exist.

    Raises:
        ValueError: if shapes do not fit, or a weight is not positive.
    """

    space: FunctionSpace
    means: Tensor | None = None
    weights: Tensor | Sequence[float] | None = None
    spectrum: Covariance | None = None

    def __post_init__(self) -> None:
        basis = self.space.basis
        means = torch.zeros(1, *[1] * basis.dims) if self.means is None else torch.as_tensor(self.means)
        if means.ndim != 1 + basis.dims or not bool(torch.isfinite(means).all()):
            raise ValueError(
                f"FieldMixture: means are finite coefficients (components, *modes) with {basis.dims} axes of modes, "
                f"got shape {tuple(means.shape)}."
            )
        weights = torch.ones(len(means)) if self.weights is None else torch.as_tensor(self.weights)
        if weights.shape != (len(means),) or not bool(((weights > 0) & torch.isfinite(weights)).all()):
            raise ValueError(
                f"FieldMixture: weights must be {len(means)} positive numbers, one a mean, got {weights.tolist()}."
            )
        # variances of a spectrum take an integral; a space keeps them
        own = self.space if self.spectrum is None else FunctionSpace(basis, self.spectrum)
        object.__setattr__(self, "_own", own)
        object.__setattr__(self, "means", means.double())
        object.__setattr__(self, "weights", weights.double() / weights.double().sum())

    def variances(self, grid: tuple[int, ...]) -> Tensor:
        """Variances mu of the modes of a component, (*grid), float64."""
        return self._own.variances(grid)  # type: ignore[attr-defined]

    def _responsibilities(self, c: Tensor, total: Tensor, shrink: float) -> tuple[Tensor, Tensor]:
        """Of a draw with coefficients c (batch, *grid) from sum_k w_k N(shrink m_k, total): r (batch, M) and m."""
        assert isinstance(self.means, Tensor)
        assert isinstance(self.weights, Tensor)
        if c.ndim != 1 + self.space.basis.dims:
            raise ValueError(
                f"FieldMixture: points are scalar fields (batch, *grid) with {self.space.basis.dims} axes of values, "
                f"got shape {tuple(c.shape)}."
            )
        centres = shrink * self.space.basis.fit(self.means, tuple(c.shape[1:])).to(c)
        flat = centres.flatten(1)
        # log N(c; m, total) without the term that the components share
        energy = (c / total).flatten(1) @ flat.T - 0.5 * (1 / total).expand(len(total), *c.shape[1:]).flatten(
            1
        ) @ flat.square().T
        return (self.weights.log().to(c) + energy).softmax(-1), centres

    def __call__(self, x: Tensor, sigma: Tensor | float, **condition: Any) -> Tensor:
        """E[X0 | X0 + sigma n = x], n ~ N(0, C): same shape and dtype as x (batch, *grid).

        Args:
            x: noisy points in the space's coordinates.
            sigma: one level or one per sample (batch,).
        """
        if condition:
            raise ValueError(f"FieldMixture takes no condition, got {', '.join(condition)}.")
        c = self.space.coefficients(x).double()
        own = self.variances(tuple(c.shape[1:])).to(c)
        total = own + per_sample(sigma, c).square() * self.space.variances(tuple(c.shape[1:])).to(c)
        share, centres = self._responsibilities(c, total, 1.0)
        mean = torch.tensordot(share, centres, 1)
        return from_coefficients(self.space, mean + own / total * (c - mean)).to(x.dtype)

    def slope(self, x: Tensor, tau: float) -> Tensor:
        """S(x, tau), tau >= 0, for x (batch, *grid): same shape and dtype; without cancellation at small tau."""
        c = self.space.coefficients(x).double()
        grid = tuple(c.shape[1:])
        noise = self.space.variances(grid).to(c)
        total = math.exp(-tau) * self.variances(grid).to(c) - math.expm1(-tau) * noise
        share, centres = self._responsibilities(c, total.unsqueeze(0), math.exp(-tau / 2))
        return from_coefficients(self.space, noise / total * (torch.tensordot(share, centres, 1) - c)).to(x.dtype)

    def log_ratio(self, x: Tensor) -> Tensor:
        r"""log d mu / d N(0, C) by the Cameron-Martin formula, for x (batch, *grid): (batch,), float64.

        .. math:: \log \sum_k w_k \exp\big(\langle m_k, C^{-1} x\rangle - \tfrac12 \|C^{-1/2} m_k\|^2\big)

        Raises:
            ValueError: if the components have another spectrum than the noise: such measures are singular.
        """
        if self.spectrum is not None:
            raise ValueError(
                "FieldMixture.log_ratio: the components' spectrum is not that of the space's noise, and such measures "
                "have no density with respect to each other. Make a space whose noise has the prior's spectrum."
            )
        assert isinstance(self.means, Tensor)
        assert isinstance(self.weights, Tensor)
        c = self.space.coefficients(x).double()
        grid = tuple(c.shape[1:])
        flat = self.space.basis.fit(self.means, grid).to(c).flatten(1)
        scaled = flat / self.space.variances(grid).to(c).flatten()
        energy = c.flatten(1) @ scaled.T - 0.5 * (flat * scaled).sum(1)
        return (self.weights.log().to(c) + energy).logsumexp(-1)

    def sample(self, n: int, grid: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """n draws (n, *grid) in the space's coordinates, float64."""
        assert isinstance(self.means, Tensor)
        assert isinstance(self.weights, Tensor)
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.empty(n, *grid, dtype=torch.float64).normal_(generator=generator)
        c = self.space.basis.fit(self.means, tuple(grid))[which] + noise * self.variances(tuple(grid)).sqrt()
        return from_coefficients(self.space, c)


def from_coefficients(space: FunctionSpace, c: Tensor) -> Tensor:
    """The space's coordinates of the functions with coefficients c (..., *grid)."""
    if space.coordinates == "coefficients":
        return c
    if space.coordinates == "physical":
        return space.basis.synthesise(c)
    return space.in_coordinates("coefficients").power(c, -0.5)

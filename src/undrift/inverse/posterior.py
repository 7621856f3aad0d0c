r"""A prior and an observation, and the coordinates in which a posterior on functions looks the same on every grid.

.. math:: \frac{d\pi}{d\mu}(x) \propto e^{\ell(x)}, \qquad \ell(x) = \log p(y \mid x).

Let L map unit normals to the space's noise, :math:`x = L \xi`, :math:`L L^\top = C`. In the *whitened* coordinates
:math:`\xi` the noise is independent, and the slope of the posterior at time tau of the prior is
:math:`L^{-1} S(x, \tau) + L^\top \nabla \ell(x)`; its negative Jacobian is, for a Gaussian prior of the noise's
covariance, :math:`I + B` with the prior-preconditioned Hessian :math:`B = -L^\top \nabla^2 \ell\, L`. The spectrum of B
belongs to the problem and not to the grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from undrift.inverse.prior import Prior
from undrift.space import FunctionSpace, Space

__all__ = ["Likelihood", "Posterior", "dot", "pull_back", "whiten"]


class Likelihood(Protocol):
    """What was observed: an :class:`undrift.observe.Observation`, or anything else with this method."""

    def log_likelihood(self, x: Tensor) -> Tensor:
        """log p(y | x) for fields x (batch, *event): (batch,), differentiable in x."""
        ...


@dataclass(frozen=True, eq=False)
class Posterior:
    """A prior given an observation.

    Args:
        prior: see :class:`undrift.inverse.Prior`.
        likelihood: an observation, which sees fields (physical values), or any callable from points in the space's
            coordinates to log p(y | x), (batch,). Data of shape (batch, *data) give every chain an observation of its
            own.
    """

    prior: Prior
    likelihood: Likelihood | Callable[[Tensor], Tensor]

    @property
    def space(self) -> Space:
        """Where the points live."""
        return self.prior.space

    def log_likelihood(self, x: Tensor) -> Tensor:
        """log p(y | x), for x (batch, *event) in the space's coordinates: (batch,), float64, differentiable."""
        if hasattr(self.likelihood, "log_likelihood"):
            value = self.likelihood.log_likelihood(self.space.decode(x))
        else:
            value = self.likelihood(x)
        if value.shape != x.shape[:1]:
            raise ValueError(
                f"Posterior: the likelihood must return one number a point, ({x.shape[0]},), got {tuple(value.shape)}."
            )
        return value.double()

    def with_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log p(y | x) (batch,), and its partial derivatives, x's shape and dtype; both without a graph."""
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            value = self.log_likelihood(point)
            (slope,) = torch.autograd.grad(value.sum(), point)
        return value.detach(), slope

    def hessian_slope(self, x: Tensor, v: Tensor) -> Tensor:
        """Minus the Hessian of the log-likelihood at x times L v, as partial derivatives; v whitened, (batch, *event).

        By differentiating twice, which every operator of the library allows.
        """
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.log_likelihood(point).sum(), point, create_graph=True)
            if not slope.requires_grad:  # the log-likelihood is linear
                return torch.zeros_like(v)
            product = torch.autograd.grad((slope * self.space.colour(v)).sum(), point, allow_unused=True)[0]
        return torch.zeros_like(v) if product is None else -product

    def hessian_product(self, x: Tensor, v: Tensor) -> Tensor:
        """B v at x, whitened: :meth:`hessian_slope` pulled back."""
        return pull_back(self.space, self.hessian_slope(x, v))

    def prior_product(self, x: Tensor, v: Tensor, tau: float) -> Tensor:
        """Minus the Jacobian of the whitened slope of the prior at x, times v (batch, *event): v for N(0, C).

        The Jacobian is symmetric if the slope is a gradient, so its transpose is taken, which costs one backward pass.
        """
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            slope = self.prior.slope(point, tau)
            # L^-1 is applied to the slope as L' C^-1, whose transpose acts on v
            weight = push_forward_inverse(self.space, v)
            (product,) = torch.autograd.grad((slope * weight).sum(), point)
        return -pull_back(self.space, product)


def whiten(space: Space, x: Tensor) -> Tensor:
    """Whitened coordinates xi of points x = L xi."""
    if not isinstance(space, FunctionSpace) or space.white:
        return x
    return space.in_coordinates("coefficients").power(space.coefficients(x), -0.5)


def pull_back(space: Space, slope: Tensor) -> Tensor:
    """L' applied to partial derivatives: the slope of a function of x, as a function of xi."""
    if not isinstance(space, FunctionSpace) or space.white:
        return slope
    c = space.gradient(slope)
    if space.coordinates == "physical":
        c = space.basis.analyse(c)
    return space.in_coordinates("coefficients").power(c, 0.5)


def push_forward_inverse(space: Space, v: Tensor) -> Tensor:
    """L'^-1 v: the covector whose products with points x are those of v with their whitened coordinates."""
    if not isinstance(space, FunctionSpace) or space.white:
        return v
    c = space.in_coordinates("coefficients").power(v, -0.5)
    if space.coordinates == "coefficients":
        return c
    return space.basis.synthesise(c) / (space.gradient(torch.ones_like(c[:1])).flatten()[0])


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Sums of products over all but the batch, (batch,), float64."""
    return (a.double() * b.double()).flatten(1).sum(1)

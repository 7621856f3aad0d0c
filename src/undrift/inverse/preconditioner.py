r"""Preconditioners of Langevin dynamics and of pCN: the prior's covariance, and what the data make of it.

A preconditioner is a covariance K on the space. The noise's own, C, makes every mode of the prior move at the pace of
its own scale, on every grid alike, and leaves the directions that the data inform, a few, with precisions 1 + b. The
posterior-informed one is the posterior covariance of the linearised problem,

.. math:: K = (C^{-1} + H)^{-1} = L\,(I - V \operatorname{diag}\tfrac{b}{1+b} V^\top)\,L^\top, \qquad
    L^\top H L \approx V \operatorname{diag}(b) V^\top,

with the leading eigenpairs of the prior-preconditioned Hessian at a point: of Gauss and Newton,
:math:`H = A'^\top W A'` with W the curvature of the noise, or the full one without its negative part.

The slope of a prior comes as :math:`S = C \nabla \log p`, whose K-gradient :math:`K C^{-1} S = S - L V \frac{b}{1+b}
(L^{-\top} V)^\top S` needs no division by small variances: :math:`L^{-\top} V = H L V b^{-1}`.

References:
    Cui, Law & Marzouk, Dimension-Independent Likelihood-Informed MCMC, 2016; Baldassari et al. 2025
    (arXiv 2505.18276): the posterior covariance is the best preconditioner of a linear problem.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from undrift.inverse.posterior import Posterior, pull_back
from undrift.observe import CorrelatedNoise, GaussianNoise, Observation
from undrift.space import Space

__all__ = ["PosteriorInformed", "Preconditioner", "PriorCovariance", "find_mode"]

_EXACT = 1024  # numbers of data up to which the Jacobian is written out
_MOST = 64  # eigenpairs beyond that, if not told


class Preconditioner(ABC):
    """A covariance K = L M L', with M in whitened coordinates."""

    space: Space

    @abstractmethod
    def of_score(self, score: Tensor) -> Tensor:
        """K C^-1 s for s = C grad log p (batch, *event)."""

    @abstractmethod
    def of_slope(self, slope: Tensor) -> Tensor:
        """K applied to partial derivatives (batch, *event)."""

    @abstractmethod
    def root(self, v: Tensor) -> Tensor:
        """The symmetric root of M, applied to whitened v (batch, *event)."""

    @abstractmethod
    def energy(self, x: Tensor) -> Tensor:
        """x' (K^-1 - C^-1) x / 2, what K's density has and C's has not, (batch,)."""

    def noise(self, xi: Tensor) -> Tensor:
        """A draw of N(0, K) from unit normals xi."""
        return self.space.colour(self.root(xi))


@dataclass(frozen=True, eq=False)
class PriorCovariance(Preconditioner):
    """K = C, the covariance of the space's noise.

    Args:
        space: where the points live.
    """

    space: Space

    def of_score(self, score: Tensor) -> Tensor:
        return score

    def of_slope(self, slope: Tensor) -> Tensor:
        return self.space.colour(pull_back(self.space, slope))

    def root(self, v: Tensor) -> Tensor:
        return v

    def energy(self, x: Tensor) -> Tensor:
        return torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)


@dataclass(frozen=True, eq=False)
class PosteriorInformed(Preconditioner):
    """K = (C^-1 + H)^-1 with H of low rank; made by :meth:`at`.

    Attributes:
        space: where the points live.
        values: eigenvalues b (r,), descending, float64.
        vectors: eigenvectors V, whitened, (r, *event), orthonormal.
        covectors: L'^-1 V, (r, *event), which act on points.
    """

    space: Space
    values: Tensor
    vectors: Tensor
    covectors: Tensor

    @classmethod
    def at(
        cls,
        posterior: Posterior,
        x: Tensor,
        rank: int | None = None,
        hessian: Literal["gauss-newton", "full"] = "gauss-newton",
        smallest: float = 1e-2,
        sweeps: int = 3,
        seed: int | torch.Generator = 0,
    ) -> PosteriorInformed:
        """Linearise at a point.

        Args:
            posterior: whose likelihood; Gauss-Newton needs an :class:`~undrift.observe.Observation`.
            x: where, (1, *event), in the space's coordinates; see :func:`find_mode`.
            rank: most eigenpairs that are kept; None for all, of up to 1024 data, or else 64.
            hessian: "gauss-newton" or "full" (its negative part is left out).
            smallest: eigenvalues b below this are left out: the prior's covariance is right about them already.
            sweeps: of the randomised subspace iteration that takes over where data are many, or with "full".
            seed: of its start.

        Raises:
            ValueError: if Gauss-Newton cannot be done, or nothing is informed.
        """
        if x.shape[0] != 1:
            raise ValueError(f"PosteriorInformed: one reference point (1, *event), got a batch of {x.shape[0]}.")
        if hessian not in ("gauss-newton", "full"):
            raise ValueError(f"PosteriorInformed: hessian must be 'gauss-newton' or 'full', got {hessian!r}.")
        x = x.detach()
        if hessian == "gauss-newton":
            observation = posterior.likelihood
            if not isinstance(observation, Observation):
                raise ValueError(
                    "PosteriorInformed: Gauss-Newton needs an Observation, whose operator and noise it can tell apart; "
                    "for any other log-likelihood take hessian='full'."
                )
            predicted = observation.operator(posterior.space.decode(x)).detach()
            if predicted.numel() <= _EXACT:
                values, vectors, covectors = _by_rows(posterior, observation, x, predicted)
                rank = len(values) if rank is None else rank
            else:
                values, vectors, covectors = _randomised(
                    lambda v: _gauss_newton(posterior, observation, x, predicted, v), posterior, x, rank, sweeps, seed
                )
        else:
            values, vectors, covectors = _randomised(
                lambda v: posterior.hessian_slope(x.expand(len(v), *x.shape[1:]), v), posterior, x, rank, sweeps, seed
            )
        keep = values >= smallest
        keep[_MOST if rank is None else rank :] = False
        return cls(posterior.space, values[keep], vectors[keep], covectors[keep])

    def _along(self, of: Tensor, by: Tensor, to: Tensor, factor: Tensor) -> Tensor:
        """sum_i to_i factor_i <by_i, of>, for of (batch, *event)."""
        shares = of.flatten(1) @ by.to(of).flatten(1).T * factor.to(of)
        return (shares @ to.to(of).flatten(1)).reshape(of.shape)

    def of_score(self, score: Tensor) -> Tensor:
        lifted = self.space.colour(self.vectors.to(score))
        return score - self._along(score, self.covectors, lifted, self.values / (1 + self.values))

    def of_slope(self, slope: Tensor) -> Tensor:
        v = pull_back(self.space, slope)
        return self.space.colour(v - self._along(v, self.vectors, self.vectors, self.values / (1 + self.values)))

    def root(self, v: Tensor) -> Tensor:
        return v - self._along(v, self.vectors, self.vectors, 1 - (1 + self.values).rsqrt())

    def energy(self, x: Tensor) -> Tensor:
        shares = x.double().flatten(1) @ self.covectors.to(x).double().flatten(1).T
        return 0.5 * (shares.square() * self.values.to(x.device)).sum(1)


def find_mode(posterior: Posterior, x: Tensor, iterations: int = 20, tolerance: float = 1e-6) -> Tensor:
    r"""Where :math:`\ell(x) - \frac12 \|C^{-1/2} x\|^2` is largest, by damped Gauss-Newton steps; (1, *event).

    That is the mode of the posterior for the prior N(0, C), and a place to linearise at for others. One step solves a
    linear problem exactly. A step that gains nothing, or leads to where the operator refuses to work, is halved.

    Args:
        posterior: whose likelihood is an observation.
        x: start (1, *event), float64.
        iterations: most steps.
        tolerance: stop where a step gains less than this.
    """
    space = posterior.space
    x = x.detach()

    def value(x: Tensor) -> float:
        return float(posterior.log_likelihood(x)) - 0.5 * float(space.norm2(x, 1.0))

    now = value(x)
    for _ in range(iterations):
        informed = PosteriorInformed.at(posterior, x, smallest=0.0)
        step = informed.of_score(-x) + informed.of_slope(posterior.with_slope(x)[1])
        length, best = 1.0, now
        while length > 1e-6:
            try:
                best = value(x + length * step)
            except (ValueError, FloatingPointError):
                best = -math.inf
            if math.isfinite(best) and best > now:
                break
            length /= 2
        else:
            break
        x = x + length * step
        gain, now = best - now, best
        if gain < tolerance:
            break
    return x


def _curvature(observation: Observation, predicted: Tensor) -> Tensor:
    """Curvature of minus the noise's log density in the prediction (1, *data): (m,) if independent, or (m, m)."""
    noise = observation.noise
    if isinstance(noise, GaussianNoise):
        return noise.variance.to(predicted).expand(predicted.shape[1:]).flatten().reciprocal()
    if isinstance(noise, CorrelatedNoise):
        return torch.linalg.inv(noise.covariance(predicted.shape[1:])).to(predicted)
    with torch.enable_grad():
        f = predicted.detach().requires_grad_()
        (slope,) = torch.autograd.grad(noise.log_prob(observation.y, f).sum(), f, create_graph=True)
        second = torch.autograd.grad(slope.sum(), f, allow_unused=True)[0] if slope.requires_grad else None
    curved = torch.zeros_like(predicted) if second is None else -second
    if not bool((curved > 0).any()):
        raise ValueError(
            f"PosteriorInformed: {type(noise).__name__} has no curvature at these data, so Gauss-Newton sees nothing; "
            "use the prior's covariance, or linearise with Gaussian noise of the same scale."
        )
    return curved.clamp(min=0).flatten()


def _by_rows(
    posterior: Posterior, observation: Observation, x: Tensor, predicted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenpairs and covectors from the whole Jacobian, one row a datum."""
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        data = observation.operator(posterior.space.decode(point)).flatten()
        rows = torch.cat(
            [torch.autograd.grad(data[i], point, retain_graph=i + 1 < len(data))[0] for i in range(len(data))]
        )
    weight = _curvature(observation, predicted)
    flat = rows.flatten(1)
    flat = weight.sqrt().unsqueeze(1) * flat if weight.ndim == 1 else torch.linalg.cholesky(weight).T @ flat
    pulled = pull_back(posterior.space, flat.reshape(rows.shape)).flatten(1)
    # by the smaller Gram matrix: singular values far below the largest do not matter
    left, s, right = torch.linalg.svd(pulled.double(), full_matrices=False)
    keep = s > 1e-12 * s[0]
    covectors = (left[:, keep].T @ flat.double()) / s[keep].unsqueeze(1)
    event = x.shape[1:]
    return s[keep].square(), right[keep].reshape(-1, *event), covectors.reshape(-1, *event)


def _gauss_newton(posterior: Posterior, observation: Observation, x: Tensor, predicted: Tensor, v: Tensor) -> Tensor:
    """A'^T W A' L v, as partial derivatives, for v (r, *event)."""
    weight = _curvature(observation, predicted)
    with torch.enable_grad():
        point = x.expand(len(v), *x.shape[1:]).detach().requires_grad_()
        data = observation.operator(posterior.space.decode(point))
        dual = torch.zeros_like(data, requires_grad=True)
        (back,) = torch.autograd.grad(data, point, dual, create_graph=True)
        (along,) = torch.autograd.grad((back * posterior.space.colour(v)).sum(), dual, retain_graph=True)
        flat = along.flatten(1)
        flat = flat * weight if weight.ndim == 1 else flat @ weight
        return torch.autograd.grad(data, point, flat.reshape(data.shape))[0]


def _randomised(
    product: Callable[[Tensor], Tensor],
    posterior: Posterior,
    x: Tensor,
    rank: int | None,
    sweeps: int,
    seed: int | torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Leading eigenpairs by subspace iteration (Halko, Martinsson & Tropp 2011), and their covectors.

    Pairs that have not converged must still be one covariance: K's draws are made of vectors V, and its density of
    covectors, so that V = L' times these has to hold exactly, for moves to be accepted rightly. One more application of
    the Hessian to approximate vectors gives such covectors, and V is what they are pulled back to, orthonormalised.
    """
    size = x[0].numel()
    count = min(size, (_MOST if rank is None else rank) + 8)
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator(x.device).manual_seed(seed)
    q = torch.empty(size, count, dtype=x.dtype, device=x.device).normal_(generator=generator)
    slopes = q.T
    for _ in range(sweeps + 1):
        q = torch.linalg.qr(q)[0]
        slopes = product(q.T.reshape(count, *x.shape[1:]))
        images = pull_back(posterior.space, slopes).flatten(1).T
        basis, inner, q = q, q.T @ images, images
    values, turn = torch.linalg.eigh(0.5 * (inner + inner.T).double())
    values, turn = values.flip(0), turn.flip(1)
    keep = values > 1e-10 * values[0].clamp(min=1e-300)
    if not bool(keep.any()):
        raise ValueError("PosteriorInformed: the Hessian has no positive eigenvalue here; take the prior's covariance.")
    turn = turn[:, keep].to(basis)
    covectors = turn.T @ slopes.flatten(1) / values[keep].to(basis).unsqueeze(1)
    vectors = pull_back(posterior.space, covectors.reshape(-1, *x.shape[1:])).flatten(1)
    # V is that of Ritz plus what is orthogonal to it: its Gram matrix is I or more, and Cholesky's factor is safe
    factor = torch.linalg.cholesky(vectors.double() @ vectors.double().T).to(vectors)
    vectors, covectors = (torch.linalg.solve_triangular(factor, v, upper=False) for v in (vectors, covectors))
    return values[keep], vectors.reshape(-1, *x.shape[1:]), covectors.reshape(-1, *x.shape[1:])

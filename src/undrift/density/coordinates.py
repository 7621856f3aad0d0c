r"""Where the centre is and how long a unit is: affine coordinates x = m + A z, given or estimated.

Every path is anchored at the origin and every step is isotropic, so centre and scale are the most valuable facts about
a target that a user can have. Given, they cost nothing; otherwise they can be estimated:

    Affine    given loc and scale
    Laplace   the best mode found by ascent from several starts, and the inverse curvature there
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from undrift.density.affine import AffineTarget
from undrift.density.law import positive
from undrift.density.target import Target, TargetError

__all__ = ["Affine", "Coordinates", "Laplace", "Modes", "ascend", "curvature", "factor_of", "spread"]


class Coordinates(ABC):
    """How to choose coordinates for a target."""

    @abstractmethod
    def choose(self, target: Target, generator: torch.Generator, dtype: torch.dtype) -> AffineTarget:
        """The target in the coordinates chosen."""


@dataclass(frozen=True, eq=False)
class Affine(Coordinates):
    """Given coordinates.

    Args:
        loc: centre m, a number or (d,).
        scale: A, a number, (d,), or a factor (d, d) of a covariance.
    """

    loc: float | Tensor = 0.0
    scale: float | Tensor = 1.0

    def choose(self, target: Target, generator: torch.Generator, dtype: torch.dtype) -> AffineTarget:
        return target.affine(self.loc, self.scale)


@dataclass(frozen=True, eq=False)
class Laplace(Coordinates):
    r"""Centre and curvature of the best mode found: m = argmax, A A' = inverse of minus the Hessian.

    Args:
        starts: points that ascents start from, drawn from N(0, radius^2 I).
        radius: their spread.
        steps: most iterations of the ascent.
    """

    starts: int = 8
    radius: float = 1.0
    steps: int = 200

    def __post_init__(self) -> None:
        positive(self, radius=self.radius)
        if self.starts < 1 or self.steps < 1:
            raise ValueError(f"Laplace: starts and steps must be at least 1, got {self.starts} and {self.steps}.")

    def choose(self, target: Target, generator: torch.Generator, dtype: torch.dtype) -> AffineTarget:
        x = torch.empty(self.starts, target.dim, dtype=torch.float64, device=generator.device)
        target.check(x.normal_(0, self.radius, generator=generator))
        found = ascend(target, x, self.steps)
        best = int(found.log_prob.nan_to_num(nan=-math.inf).argmax())
        return target.affine(found.x[best], factor_of(curvature(target, found.x[best])))


@dataclass(frozen=True, eq=False)
class Modes:
    """Ends of ascents.

    Attributes:
        x: (n, d).
        log_prob: (n,).
        flat: whether the ascent came to rest, (n,): by the curvature it saw, no more than a hundredth of a nat is left.
    """

    x: Tensor
    log_prob: Tensor
    flat: Tensor


def ascend(target: Target, x: Tensor, steps: int = 200) -> Modes:
    """Local maxima of log gamma by L-BFGS (SciPy's), from each of the points x (n, d) on its own."""
    from scipy.optimize import minimize  # half a second to import, for one function

    def downhill(flat: np.ndarray) -> tuple[float, np.ndarray]:
        value, score = target.log_prob_and_score(torch.from_numpy(flat).to(x).unsqueeze(0))
        if not bool(torch.isfinite(value).all() and torch.isfinite(score).all()):
            return 1e100, np.zeros_like(flat)  # a wall, from which the line search turns back
        return -float(value), -score[0].double().cpu().numpy()

    ends, left = [], []
    options = {"maxiter": steps, "maxfun": 4 * steps, "maxcor": 50, "gtol": 1e-7, "ftol": 1e-13}
    for start in x.double().cpu().numpy():
        found = minimize(downhill, start, jac=True, method="L-BFGS-B", options=options)
        ends.append(torch.from_numpy(found.x))
        left.append(0.5 * abs(float(found.jac @ found.hess_inv.dot(found.jac))))  # half the Newton decrement, in nats
    end = torch.stack(ends).to(x)
    value = target.log_prob(end)
    flat = torch.tensor(left, dtype=torch.float64, device=x.device) < 0.01
    # A slope that never bends shows no curvature; it goes on rising where the ascent was heading.
    further = [target.log_prob(end + reach * (end - x)) > value + 0.01 for reach in (1.0, 2.0, 4.0)]
    return Modes(end, value, flat & torch.isfinite(value) & ~torch.stack(further).all(0))


def curvature(target: Target, x: Tensor) -> Tensor:
    """Minus the Hessian of log gamma at x (d,), (d, d), by central differences of the score: 2 d gradients."""
    d = x.shape[0]
    x = x.double()
    h = 6e-6 * (1 + x.abs())
    steps = torch.diag(h)
    rows = torch.cat([target.score(part) for part in torch.cat([x + steps, x - steps]).split(1024)])
    hessian = (rows[:d] - rows[d:]) / (2 * h.unsqueeze(-1))
    return -0.5 * (hessian + hessian.mT)


def factor_of(precision: Tensor) -> Tensor:
    """A with A A' = precision^-1, (d, d); directions that curve the wrong way, or hardly, get the widest good width.

    Raises:
        TargetError: if no direction has positive curvature.
    """
    if not bool(torch.isfinite(precision).all()):
        raise TargetError("the density has no curvature where the ascent ended; give coordinates (loc and scale).")
    values, vectors = torch.linalg.eigh(precision)
    good = values > 1e-10 * values.abs().max()
    if not bool(good.any()):
        raise TargetError("the density has no maximum where the ascent ended; give coordinates (loc and scale).")
    values = torch.where(good, values, values[good].min())
    return vectors * values.rsqrt()


def spread(x: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean (d,) and a Cholesky factor (d, d) of the covariance of points x (n, d) of given weights (n,).

    With fewer than five effective points a coordinate the covariance is shrunk towards its diagonal, by d / (d + n):
    more would hide strong correlations, without need.
    """
    n, d = x.shape
    x = x.double()
    w = torch.full((n,), 1.0 / n, dtype=x.dtype, device=x.device) if weights is None else weights.double()
    mean = w @ x
    centred = x - mean
    cov = (w.unsqueeze(-1) * centred).T @ centred
    size = float(1 / w.square().sum())
    keep = size / (size + d) if size < 5 * d else 1.0
    diagonal = cov.diagonal().clamp(min=1e-30 * float(cov.diagonal().max().clamp(min=1e-270)))
    cov = keep * cov + (1 - keep) * torch.diag(diagonal)
    return mean, torch.linalg.cholesky(cov + 1e-12 * torch.diag(diagonal))

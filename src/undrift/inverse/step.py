r"""Whether a Langevin step is small enough: what the posterior's curvature makes of it.

In whitened coordinates, with the preconditioner's root R, the drift has the negative Jacobian
:math:`h = R^\top(\alpha P + B) R`, P that of the prior (the identity if it is N(0, C)), B the prior-preconditioned
Hessian of the data. Where the posterior is Gaussian a step gamma multiplies variances by

    Euler 1 / (1 - gamma h / 2),   Crank-Nicolson 1 / (1 - gamma b / 2), b = h - 1,

and explodes beyond gamma = 2 / h or 2 / b. Both depend on the problem, not on the grid, so that a run can be stable and
badly biased on every grid alike. Here the largest eigenvalue at the chains' own states is found by power iteration, and
the step is judged by it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from undrift.inverse.gaussian import Scheme
from undrift.inverse.posterior import Posterior, dot
from undrift.inverse.preconditioner import Preconditioner

__all__ = ["StepReport", "StepTooLarge", "check_step", "stiffness"]


@dataclass(frozen=True)
class StepReport:
    """What the curvature at some states says about a step.

    Attributes:
        step: gamma.
        scheme: "euler" or "crank-nicolson".
        stiffness: h (Euler) or b (Crank-Nicolson), a high quantile over the states.
        largest: its largest value over the states.
        iteration: of the run where the states were taken.
    """

    step: float
    scheme: Scheme
    stiffness: float
    largest: float
    iteration: int = 0

    @property
    def product(self) -> float:
        """gamma times the stiffness: the number that is judged."""
        return self.step * self.stiffness

    @property
    def limit(self) -> float:
        """Largest stable step."""
        return 2 / self.stiffness if self.stiffness > 0 else math.inf

    @property
    def variance_ratio(self) -> float:
        """What the step makes of the variance in the stiffest direction; inf if it is not stable."""
        return 1 / (1 - self.product / 2) if self.product < 2 else math.inf

    def advice(self, trusted: float) -> float:
        """The step whose product would be ``trusted``."""
        return trusted / self.stiffness if self.stiffness > 0 else math.inf

    def __str__(self) -> str:
        letter = "h" if self.scheme == "euler" else "b"
        effect = (
            f"the variance in the stiffest direction is predicted to be {self.variance_ratio:.3g} times too large"
            if self.product < 2
            else "the scheme is not stable"
        )
        return f"gamma {letter}_max = {self.step:.4g} x {self.stiffness:.4g} = {self.product:.3g}: {effect}"


class StepTooLarge(ValueError):
    """A Langevin step that the curvature forbids.

    Attributes:
        report: the numbers.
        advised: the step that would do.
    """

    def __init__(self, report: StepReport, trusted: float) -> None:
        self.report, self.advised = report, report.advice(trusted)
        super().__init__(
            f"at iteration {report.iteration}, {report}. A step of {self.advised:.4g} would keep the product at "
            f"{trusted:g}; or take a posterior-informed preconditioner, Metropolised moves (pcn), or trust=inf."
        )


def stiffness(
    posterior: Posterior,
    x: Tensor,
    tau: float,
    preconditioner: Preconditioner,
    alpha: float = 1.0,
    iterations: int = 15,
    seed: int = 0,
) -> Tensor:
    """Largest eigenvalue h of the drift's negative Jacobian at each of the states x (batch, *event): (batch,).

    By power iteration, so from below; one backward pass of the prior and two of the likelihood an iteration.

    Args:
        posterior: what is sampled.
        x: states, in the space's coordinates.
        tau: time of the prior.
        preconditioner: K.
        alpha: weight of the prior's slope.
        iterations: of the power method.
        seed: of its start.
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    v = torch.empty_like(x).normal_(generator=generator)
    found = torch.full((x.shape[0],), -math.inf, dtype=torch.float64, device=x.device)
    for _ in range(iterations):
        v = v / dot(v, v).sqrt().clamp(min=1e-300).to(v).reshape(-1, *[1] * (v.ndim - 1))
        w = preconditioner.root(v)
        w = alpha * posterior.prior_product(x, w, tau) + posterior.hessian_product(x, w)
        w = preconditioner.root(w)
        found = torch.maximum(found, dot(v, w))
        v = w
    return found


def check_step(
    posterior: Posterior,
    x: Tensor,
    tau: float,
    preconditioner: Preconditioner,
    step: float,
    scheme: Scheme,
    alpha: float = 1.0,
    states: int = 16,
    quantile: float = 0.5,
    iteration: int = 0,
) -> StepReport:
    """Judge a step by the curvature at some of the states x (batch, *event), evenly taken."""
    chosen = x[torch.linspace(0, len(x) - 1, min(states, len(x)), device=x.device).round().long()]
    h = stiffness(posterior, chosen, tau, preconditioner, alpha)
    if not bool(torch.isfinite(h).all()):
        return StepReport(step, scheme, math.inf, math.inf, iteration)
    b = h if scheme == "euler" else h - 1
    return StepReport(step, scheme, float(b.quantile(quantile)), float(b.max()), iteration)

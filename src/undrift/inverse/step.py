r"""Whether a Langevin step is small enough: what the posterior's curvature makes of it.

In whitened coordinates, with the preconditioner's root R, the drift has the negative Jacobian
:math:`h = R^\top(\alpha P + B) R`, P that of the prior (the identity if it is N(0, C)), B the prior-preconditioned
Hessian of the data. Where the posterior is Gaussian a step gamma multiplies variances by

    Euler 1 / (1 - gamma h / 2),   Crank-Nicolson 1 / (1 - gamma b / 2), b = h - 1,

and explodes beyond gamma = 2 / h or 2 / b. Both depend on the problem, not on the grid, so that a run can be stable and
badly biased on every grid alike. A direction in which the posterior is wider than the reference, b < 0, is always
stable, and is made too narrow: b is at least -1 where the posterior is log-concave, and elsewhere taken to be. Here the
extreme eigenvalues at the chains' own states are found by Lanczos's method, whatever their signs, and the step is
judged by the worse.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from undrift.inverse.gaussian import Scheme
from undrift.inverse.posterior import Posterior, dot
from undrift.inverse.preconditioner import Preconditioner
from undrift.observe import Observation

__all__ = ["StepReport", "StepTooLarge", "check_step", "extremes"]


@dataclass(frozen=True)
class StepReport:
    """What the curvature at some states says about a step.

    Attributes:
        step: gamma.
        scheme: "euler" or "crank-nicolson".
        stiffness: h (Euler) or b (Crank-Nicolson) of the direction that the step biases most, a quantile over the
            states; negative where that makes a variance too small.
        largest: the largest eigenvalue at any of the states.
        iteration: of the run where the states were taken.
    """

    step: float
    scheme: Scheme
    stiffness: float
    largest: float
    iteration: int = 0

    @property
    def product(self) -> float:
        """gamma times the size of the stiffness: the number that is judged."""
        return self.step * abs(self.stiffness)

    @property
    def limit(self) -> float:
        """Largest stable step."""
        most = self.stiffness if self.stiffness > 0 else self.largest
        return 2 / most if most > 0 else math.inf

    @property
    def variance_ratio(self) -> float:
        """What the step makes of the variance in that direction; inf if it is not stable."""
        signed = self.step * self.stiffness
        return 1 / (1 - signed / 2) if signed < 2 else math.inf

    def advice(self, trusted: float) -> float:
        """The step whose product would be ``trusted``."""
        return trusted / abs(self.stiffness) if self.stiffness != 0 else math.inf

    def __str__(self) -> str:
        letter = "h_max" if self.scheme == "euler" else "b_max" if self.stiffness >= 0 else "|b_min|"
        if self.stiffness < 0:
            effect = (
                f"the variance in the widest direction is predicted to be {1 / self.variance_ratio:.3g} times too small"
            )
        elif self.product < 2:
            effect = (
                f"the variance in the stiffest direction is predicted to be {self.variance_ratio:.3g} times too large"
            )
        else:
            effect = "the scheme is not stable"
        return f"gamma {letter} = {self.step:.4g} x {abs(self.stiffness):.4g} = {self.product:.3g}: {effect}"


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


def extremes(
    posterior: Posterior,
    x: Tensor,
    tau: float,
    preconditioner: Preconditioner,
    alpha: float = 1.0,
    iterations: int = 15,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Smallest and largest eigenvalue h of the drift's negative Jacobian at each state: (batch,) each, float64.

    By Lanczos's method with full orthogonalisation, so from within the spectrum; one backward pass of the prior and two
    of the likelihood an iteration. Of a learned prior, whose Jacobian need not be symmetric, the symmetric part counts.

    Args:
        posterior: what is sampled.
        x: states (batch, *event), in the space's coordinates.
        tau: time of the prior.
        preconditioner: K.
        alpha: weight of the prior's slope.
        iterations: of the method.
        seed: of its start.
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    count = min(iterations, x[0].numel())
    v = torch.empty_like(x).normal_(generator=generator).flatten(1)
    v = v / v.norm(dim=1, keepdim=True)
    inner = torch.zeros(len(x), count, count, dtype=torch.float64, device=x.device)
    basis: list[Tensor] = []
    for k in range(count):
        basis.append(v)
        w = preconditioner.root(v.reshape(x.shape))
        w = alpha * posterior.prior_product(x, w, tau) + posterior.hessian_product(x, w)
        w = preconditioner.root(w).flatten(1)
        inner[:, : k + 1, k] = torch.stack([dot(u, w) for u in basis], 1)
        scale = inner[:, : k + 1, : k + 1].abs().amax((1, 2))
        for u in basis * 2:  # twice is enough
            w = w - u * dot(u, w).to(w).unsqueeze(1)
        size = dot(w, w).sqrt()
        # an invariant subspace is spanned: what would follow is rounding, and is replaced by nothing
        v = torch.where((size > 100 * torch.finfo(x.dtype).eps * scale).unsqueeze(1), w / size.to(w).unsqueeze(1), 0.0)
    diagonal = inner.diagonal(dim1=1, dim2=2)
    spanned = torch.stack([dot(u, u) for u in basis], 1) > 0.5
    diagonal.copy_(torch.where(spanned, diagonal, diagonal[:, :1]))
    upper = inner.triu()
    found = upper + upper.mT - torch.diag_embed(diagonal)
    bad = ~torch.isfinite(found).flatten(1).all(1)
    values = torch.linalg.eigvalsh(torch.where(bad.reshape(-1, 1, 1), 0.0, found))
    return values[:, 0].masked_fill(bad, math.nan), values[:, -1].masked_fill(bad, math.nan)


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
    index = torch.linspace(0, len(x) - 1, min(states, len(x)), device=x.device).round().long()
    low, high = extremes(_at(posterior, x, index), x[index], tau, preconditioner, alpha)
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        return StepReport(step, scheme, math.inf, math.inf, iteration)
    if scheme == "euler":
        return StepReport(step, scheme, float(high.quantile(quantile)), float(high.max()), iteration)
    wide = float((low.clamp(min=0) - 1).quantile(1 - quantile))
    stiff = float((high - 1).quantile(quantile))
    return StepReport(step, scheme, stiff if stiff >= -wide else wide, float(high.max()) - 1, iteration)


def _at(posterior: Posterior, x: Tensor, index: Tensor) -> Posterior:
    """The posterior of some of the chains x, which may each have data of their own."""
    seen = posterior.likelihood
    if not isinstance(seen, Observation) or seen.shared(posterior.space.decode(x[:1])):
        return posterior
    return dataclasses.replace(posterior, likelihood=dataclasses.replace(seen, y=seen.y[index.to(seen.y.device)]))

r"""Annealed preconditioned Langevin dynamics with a diffusion prior, for linear and non-linear inverse problems.

.. math:: X_{k+1} = X_k + \gamma \big[\alpha_k K C^{-1} S(X_k, \tau_k) + K \nabla \ell(X_k)\big]
    + \sqrt{2\gamma}\, K^{1/2} \xi_k

with :math:`S = C \nabla \log p_\tau` the slope of the prior (:mod:`undrift.inverse.prior`), times :math:`\tau_k` that
fall to :math:`\tau_{min}` and weights :math:`\alpha_k \ge 1` that fall to 1. The Euler scheme is biased in every
direction, and so, in total, the more the finer the grid. The Crank-Nicolson scheme treats the Gaussian reference's
drift implicitly,

.. math:: (1 + \tfrac\gamma2) X' = (1 - \tfrac\gamma2) X
    + \gamma \big[X + K C^{-1} S + K \nabla \ell\big] + \sqrt{2\gamma}\, K^{1/2} \xi,

which is Euler's with step :math:`\gamma / (1 + \gamma/2)` and noise smaller by :math:`(1 + \gamma/2)^{-1/2}`; it is
exact, at every step size, where the posterior is Gaussian of covariance K, such as in all directions without data. With
the posterior-informed preconditioner that is the whole of a linear Gaussian problem.

No move is rejected. What the bias is depends on gamma times the curvature, which is measured on the way
(:mod:`undrift.inverse.step`): a run that would be silently biased is refused.

References:
    Baldassari et al. 2024 (arXiv 2405.15676), with weighted annealing after Sun et al. 2023 (arXiv 2310.10835).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from undrift._journal import Entry, Journal, digest
from undrift.inverse._resuming import APART, marks, packed, unpacked
from undrift.inverse.chains import Chains
from undrift.inverse.gaussian import Scheme
from undrift.inverse.posterior import Posterior
from undrift.inverse.preconditioner import Preconditioner, PriorCovariance
from undrift.inverse.step import StepReport, StepTooLarge, check_step

__all__ = ["TRUSTED", "Annealing", "langevin"]

TRUSTED = 0.4
"""Largest gamma b_max that is trusted: by the linear theory the stiffest variance is then a quarter too large."""


@dataclass(frozen=True, eq=False)
class Annealing:
    """Times and weights of the prior along a run.

    Args:
        tau_min: time that the prior is used at in the end; the posterior's bias is of this order.
        tau_start: time at the first step; None for tau_min, no annealing.
        share: of the run's steps after which tau_min is reached, geometrically; in (0, 1].
        alpha: weight of the prior at the first step, at least 1.
        alpha_end: share of the run's steps after which the weight has fallen, geometrically, to 1.
    """

    tau_min: float = 1e-3
    tau_start: float | None = None
    share: float = 0.5
    alpha: float = 1.0
    alpha_end: float = 0.5

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tau_min) and self.tau_min >= 0):
            raise ValueError(f"Annealing: tau_min must not be negative, got {self.tau_min}.")
        if self.tau_start is not None and not (self.tau_start >= self.tau_min > 0):
            raise ValueError(
                f"Annealing: tau must fall from tau_start to a positive tau_min, got {self.tau_start} and "
                f"{self.tau_min}."
            )
        if not self.alpha >= 1:
            raise ValueError(f"Annealing: alpha must be at least 1, got {self.alpha}.")
        for name in ("share", "alpha_end"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"Annealing: {name} must lie in (0, 1], got {getattr(self, name)}.")

    def at(self, k: int, steps: int) -> tuple[float, float]:
        """tau_k and alpha_k of step k of a run."""
        tau, alpha = self.tau_min, 1.0
        done = k / max(1.0, self.share * steps)
        if self.tau_start is not None and done < 1:
            tau = self.tau_start * (self.tau_min / self.tau_start) ** done
        done = k / max(1.0, self.alpha_end * steps)
        if self.alpha > 1 and done < 1:
            alpha = self.alpha ** (1 - done)
        return tau, alpha

    def length(self, steps: int) -> int:
        """Steps before tau_min and weight 1 are reached."""
        anneals = [self.share] * (self.tau_start is not None) + [self.alpha_end] * (self.alpha > 1)
        return math.ceil(max(anneals, default=0.0) * steps)


def advance(
    posterior: Posterior,
    x: Tensor,
    step: float,
    xi: Tensor,
    tau: float,
    preconditioner: Preconditioner,
    scheme: Scheme,
    alpha: float = 1.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One step from x (chains, *event) with unit normals xi; returns the new states, and the log-likelihood at x."""
    likelihood, slope = posterior.with_slope(x)
    with torch.no_grad():
        drift = preconditioner.of_score(alpha * posterior.prior.slope(x, tau))
        drift = drift + preconditioner.of_slope(temperature * slope)
        implicit = 1 + step / 2 if scheme == "crank-nicolson" else 1.0
        return x + (step * drift + math.sqrt(2 * step) * preconditioner.noise(xi)) / implicit, likelihood


def langevin(
    posterior: Posterior,
    start: Tensor,
    steps: int,
    step: float,
    scheme: Scheme = "crank-nicolson",
    seed: int | torch.Generator = 0,
    *,
    annealing: Annealing | None = None,
    preconditioner: Preconditioner | None = None,
    warmup: int | None = None,
    thin: int = 1,
    trust: float = TRUSTED,
    checks: int = 4,
    checkpoint: str | Path | Journal | None = None,
    progress: bool = False,
) -> Chains:
    """Unadjusted Langevin chains towards the posterior.

    Args:
        posterior: prior and observation.
        start: first states (chains, *event), in the space's coordinates; float64 is advised.
        steps: of every chain, warm-up included.
        step: gamma.
        scheme: "crank-nicolson" or "euler".
        seed: integer or generator.
        annealing: times and weights of the prior; ``Annealing()`` if None: tau = 1e-3 throughout.
        preconditioner: K; the prior's covariance if None.
        warmup: steps that are thrown away; None for the annealing, and at least a fifth of the run.
        thin: steps between kept states.
        trust: largest gamma b_max (Euler: gamma h_max), at the median state, that is accepted; inf for anything.
        checks: how often the curvature is measured: before the first step, at the end, and between; 0 never.
        checkpoint: file to keep the run's state in, so that an interrupted run goes on where it was; removed when the
            run is complete.
        progress: show a bar.

    Returns:
        Chains; if interrupted from the keyboard without a checkpoint, those of the states it had.

    Raises:
        ValueError: for unusable arguments, or a checkpoint of another run.
        StepTooLarge: where the curvature at the chains' states forbids the step.
        FloatingPointError: if states are not finite.
        KeyboardInterrupt: if interrupted with a checkpoint, which then holds what there was.
    """
    annealing = Annealing() if annealing is None else annealing
    k_matrix = PriorCovariance(posterior.space) if preconditioner is None else preconditioner
    warmup = max(annealing.length(steps), steps // 5) if warmup is None else warmup
    if scheme not in ("euler", "crank-nicolson"):
        raise ValueError(f"langevin: scheme must be 'euler' or 'crank-nicolson', got {scheme!r}.")
    if not (math.isfinite(step) and step > 0):
        raise ValueError(f"langevin: step must be positive, got {step}.")
    if not 0 <= warmup < steps or thin < 1 or steps - warmup < thin:
        raise ValueError(
            f"langevin: {steps} steps, {warmup} of them warm-up, thinned by {thin}, leave nothing to keep; steps must "
            "exceed warmup by at least thin >= 1."
        )
    if not trust > 0:
        raise ValueError(f"langevin: trust must be positive, got {trust}.")
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator(start.device).manual_seed(seed)
    x, first, pending = start.detach().clone(), 0, False
    reports: list[StepReport] = []
    kept: list[Tensor] = []
    likelihoods: list[Tensor] = []
    due = {round(i * (steps - 1) / max(1, checks - 1)) for i in range(checks)}

    def look(k: int) -> None:
        tau, alpha = annealing.at(k, steps)
        report = check_step(posterior, x, tau, k_matrix, step, scheme, alpha, iteration=k)
        reports.append(report)
        if report.product > trust:
            raise StepTooLarge(report, trust)

    def identity() -> str:
        probed = marks(posterior, start)
        settings = {
            "method": "langevin",
            "lengths": [steps, warmup, thin, checks],
            "step": [step, scheme, trust],
            "annealing": annealing,
            "moves": k_matrix.noise(probed["probe"]),
            "seed": generator.get_state(),
        }
        return digest(**probed, **settings)

    def snapshot(k: int) -> Entry:
        here, mark, waits = x, generator.get_state(), pending
        known, values, said = len(kept), len(likelihoods), len(reports)

        def entry() -> tuple[dict[str, Tensor], dict[str, Any]]:
            rows = [(r.stiffness, r.largest, r.iteration) for r in reports[:said]]
            tensors = {"x": here, "generator": mark, **packed(kept[:known], likelihoods[:values])}
            return tensors | {"reports": torch.tensor(rows, dtype=torch.float64)}, {"k": k, "pending": waits}

        return entry

    journal = Journal.of(checkpoint, identity, APART)
    found = journal.read()
    if found is not None:
        tensors, plain = found
        generator.set_state(tensors["generator"])
        x, first, pending = tensors["x"].to(x.device), plain["k"], plain["pending"]
        kept, likelihoods = unpacked(tensors, x.device)
        reports += [StepReport(step, scheme, b, most, int(k)) for b, most, k in tensors["reports"].tolist()]
    complete = True
    try:
        with journal:
            for k in tqdm(range(first, steps), disable=not progress, desc="Langevin", initial=first, total=steps):
                if k in due:
                    _require_finite(x, k)
                    look(k)
                tau, alpha = annealing.at(k, steps)
                xi = torch.empty_like(x).normal_(generator=generator)
                new, likelihood = advance(posterior, x, step, xi, tau, k_matrix, scheme, alpha)
                if pending:  # of the state kept before this step
                    likelihoods.append(likelihood)
                x = new
                pending = k >= warmup and (k - warmup + 1) % thin == 0
                if pending:
                    kept.append(x.clone())
                if journal.active:
                    journal.note(snapshot(k + 1))
    except StepTooLarge:
        journal.discard()
        raise
    except KeyboardInterrupt:
        if journal.active or not kept:
            raise
        complete = False
    _require_finite(x, steps)
    if len(likelihoods) < len(kept):
        with torch.no_grad():
            likelihoods.append(posterior.log_likelihood(kept[-1]))
    journal.close()
    return Chains(
        torch.stack(kept, 1),
        torch.stack(likelihoods, 1),
        None,
        posterior.space,
        step,
        tuple(reports),
        complete,
        f"{scheme} Langevin, step {step:.3g}, tau {annealing.tau_min:.2g}",
    )


def _require_finite(x: Tensor, k: int) -> None:
    bad = int((~torch.isfinite(x.flatten(1)).all(1)).sum())
    if bad:
        raise FloatingPointError(
            f"langevin: {bad} of {len(x)} chains are not finite before step {k}; the step is too large for where they "
            "were. Take a smaller one, or a posterior-informed preconditioner."
        )

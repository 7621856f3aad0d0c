r"""Sequential Monte Carlo from the prior to the posterior: right where annealed Langevin freezes the weights of modes.

Particles drawn from the prior mu carry weights along :math:`\pi_\phi \propto e^{\phi \ell} \mu`, phi from 0 to 1: each
rise multiplies them by :math:`e^{(\phi' - \phi)\ell}`, is as long as a conditional effective sample size allows, and is
followed by resampling where weights have become unequal and by moves that leave :math:`\pi_{\phi'}` invariant. The mean
weight tends to p(y), and weighted particles to the posterior, as they grow, whatever the moves forget; modes get their
weights from the prior's draws, not from barriers crossed. With levels fixed beforehand and at one move size the mean
weight has no bias at all; found from the particles themselves, as they are by default, one of order 1 / particles.

Moves are pCN where the prior's ratio to its Gaussian is known, and exact. For a learned prior, of which only the slope
is known, they are Crank-Nicolson Langevin steps at tau_min: their invariant law differs from :math:`\pi_\phi` by terms
of order gamma b and tau_min, and the weights, right for exact moves, inherit that bias. Where the diffusion itself can
be walked, :func:`undrift.sample.twisted` has no such bias.

References:
    Del Moral, Doucet & Jasra, Sequential Monte Carlo Samplers, 2006; Beskos, Jasra, Muzaffer & Stuart, Sequential Monte
    Carlo Methods for Bayesian Elliptic Inverse Problems, 2015.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from undrift._weights import effective_sample_size, log_mean_exp
from undrift.density.schedule import AdaptiveLevels, Levels, Resampling, conditional_ess
from undrift.inverse.langevin import TRUSTED, advance
from undrift.inverse.pcn import Kernel
from undrift.inverse.posterior import Posterior
from undrift.inverse.preconditioner import PriorCovariance
from undrift.inverse.step import StepTooLarge, check_step
from undrift.observe import Observation
from undrift.sample.particles import Particles

__all__ = ["LangevinMoves", "PCNMoves", "tempered"]


@dataclass(frozen=True, eq=False)
class PCNMoves:
    """Exact moves, for priors with a ratio.

    Args:
        count: moves at each level.
        beta: size of the first level's; steered to the target acceptance from level to level.
        target: share of accepted moves.
    """

    count: int = 10
    beta: float = 0.5
    target: float = 0.3

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 < self.beta <= 1 or not 0 < self.target < 1:
            raise ValueError(
                f"PCNMoves: needs count >= 1, beta in (0, 1] and target in (0, 1), got {self.count}, {self.beta} and "
                f"{self.target}."
            )


@dataclass(frozen=True, eq=False)
class LangevinMoves:
    """Unadjusted Crank-Nicolson moves, for priors of which only the slope is known.

    Args:
        step: gamma.
        tau: time of the prior.
        count: moves at each level.
        trust: largest gamma b_max, at the last level's median particle; inf for anything.
    """

    step: float = 0.01
    tau: float = 1e-3
    count: int = 10
    trust: float = TRUSTED

    def __post_init__(self) -> None:
        if self.count < 1 or not self.step > 0 or not self.tau >= 0 or not self.trust > 0:
            raise ValueError(
                f"LangevinMoves: needs count >= 1, step > 0, tau >= 0 and trust > 0, got {self.count}, {self.step}, "
                f"{self.tau} and {self.trust}."
            )


@torch.no_grad()
def tempered(
    posterior: Posterior,
    draws: Tensor,
    moves: PCNMoves | LangevinMoves | None = None,
    seed: int | torch.Generator = 0,
    *,
    runs: int = 1,
    levels: Levels | None = None,
    resampling: Resampling | None = None,
    progress: bool = False,
) -> Particles:
    """Draw from a posterior by tempering its likelihood.

    Args:
        posterior: prior and observation.
        draws: independent draws of the prior (runs times particles, *event), in the space's coordinates, by any
            sampler; particles of a run are neighbours.
        moves: at each level; None for pCN where the prior has a ratio. A prior without one needs ``LangevinMoves`` with
            a step that its curvature allows.
        seed: integer or generator.
        runs: independent groups of particles; the spread of their evidence is its standard error.
        levels: how far a level may rise; conditional ESS of .9, in the run where it is least, if None.
        resampling: when; systematic, below half of the particles, if None.
        progress: show a bar.

    Returns:
        Weighted particles; ``calls`` counts levels.

    Raises:
        ValueError: for unusable arguments.
        StepTooLarge: if Langevin moves are too long for the posterior.
        FloatingPointError: if all likelihoods of a run are 0.
    """
    if runs < 1 or len(draws) % runs or len(draws) < 2 * runs:
        raise ValueError(f"tempered: {len(draws)} draws cannot be {runs} runs of at least two particles each.")
    observation = posterior.likelihood
    if isinstance(observation, Observation) and not observation.shared(posterior.space.decode(draws[:1])):
        raise ValueError(
            f"tempered: data of shape {tuple(observation.y.shape)} are one observation for each particle, and "
            "particles trade places when they are resampled; call tempered once for each observation."
        )
    if moves is None:
        if getattr(posterior.prior, "log_ratio", None) is None:
            raise ValueError(
                f"tempered: a {type(posterior.prior).__name__} has no log_ratio, so moves cannot be accepted or "
                "rejected; give LangevinMoves(step=...), which are biased by their step and tau, or take twisted()."
            )
        moves = PCNMoves()
    levels = AdaptiveLevels(cess=0.9) if levels is None else levels
    resampling = Resampling() if resampling is None else resampling
    m = len(draws) // runs
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator(draws.device).manual_seed(seed)
    x = draws.detach().clone()
    likelihood = posterior.log_likelihood(x)
    log_w = torch.zeros(runs, m, dtype=torch.float64, device=x.device)
    log_z = torch.zeros(runs, dtype=torch.float64, device=x.device)
    lineage = torch.arange(m, device=x.device).expand(runs, m).clone()
    ess_path, resampled = [effective_sample_size(log_w)], []
    phi, k = 0.0, 0
    beta = moves.beta if isinstance(moves, PCNMoves) else math.nan
    with tqdm(total=1.0, disable=not progress, desc="tempering", bar_format="{l_bar}{bar}| {n:.4f}") as bar:
        while phi < 1:
            gain = torch.nan_to_num(likelihood, nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
            here = phi

            def cess(v: float, gain: Tensor = gain, here: float = here, log_w: Tensor = log_w) -> float:
                return min(
                    conditional_ess(w, (v - here) * g) for w, g in zip(log_w, gain.reshape(runs, m), strict=True)
                )

            following = levels.following(k, phi, cess)
            log_w = log_w + (following - phi) * gain.reshape(runs, m)
            lost = ~torch.isfinite(log_w.logsumexp(-1))
            if bool(lost.any()):
                raise FloatingPointError(
                    f"tempered: the likelihood is 0, or not a number, at all {m} particles of {int(lost.sum())} runs; "
                    "the data are impossible under these draws."
                )
            bar.update(following - phi)
            phi, k = following, k + 1
            due = resampling.due(log_w) if phi < 1 else torch.zeros(runs, dtype=torch.bool, device=x.device)
            resampled.append(due)
            if bool(due.any()):
                log_z = log_z + torch.where(due, log_mean_exp(log_w), 0.0)
                index = torch.where(
                    due.unsqueeze(1), resampling.ancestors(log_w, generator), torch.arange(m, device=x.device)
                )
                lineage = lineage.gather(1, index)
                flat = (index + m * torch.arange(runs, device=x.device).unsqueeze(1)).flatten()
                x = x[flat]
                log_w = torch.where(due.unsqueeze(1), 0.0, log_w)
            if isinstance(moves, PCNMoves):
                x, likelihood, beta = _metropolised(posterior, x, phi, beta, moves, generator)
            else:
                x, likelihood = _unadjusted(posterior, x, phi, moves, generator, k)
            ess_path.append(effective_sample_size(log_w))
    log_z = log_z + log_mean_exp(log_w)
    # runs count by their evidence: together they are one larger run
    share = log_w - log_w.logsumexp(-1, keepdim=True) + (log_z - log_z.logsumexp(0)).unsqueeze(1)
    resampled.append(torch.zeros(runs, dtype=torch.bool, device=x.device))
    return Particles(
        x,
        share.flatten() - share.flatten().logsumexp(0),
        log_z,
        torch.stack(ess_path),
        torch.stack(resampled),
        lineage,
        k,
    )


def _metropolised(
    posterior: Posterior, x: Tensor, phi: float, beta: float, moves: PCNMoves, generator: torch.Generator
) -> tuple[Tensor, Tensor, float]:
    kernel = Kernel(posterior, "pcn", temperature=phi)
    point, accepted = kernel.at(x), 0.0
    for _ in range(moves.count):
        point, moved = kernel.move(point, beta, generator)
        accepted += float(moved.double().mean()) / moves.count
    return point.x, point.log_likelihood, min(0.999, beta * math.exp(accepted - moves.target))


def _unadjusted(
    posterior: Posterior, x: Tensor, phi: float, moves: LangevinMoves, generator: torch.Generator, k: int
) -> tuple[Tensor, Tensor]:
    prior_covariance = PriorCovariance(posterior.space)
    for _ in range(moves.count):
        xi = torch.empty_like(x).normal_(generator=generator)
        x = advance(posterior, x, moves.step, xi, moves.tau, prior_covariance, "crank-nicolson", temperature=phi)[0]
    if phi >= 1:
        report = check_step(posterior, x, moves.tau, prior_covariance, moves.step, "crank-nicolson", iteration=k)
        if report.product > moves.trust:
            raise StepTooLarge(report, moves.trust)
    return x, posterior.log_likelihood(x)

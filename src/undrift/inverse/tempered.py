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
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from undrift._journal import Entry, Journal, digest
from undrift._weights import effective_sample_size, log_mean_exp
from undrift.density.schedule import AdaptiveLevels, Levels, Resampling, conditional_ess
from undrift.inverse._resuming import APART, marks
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
    checkpoint: str | Path | Journal | None = None,
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
        checkpoint: file to keep the run's state in between levels, so that an interrupted run goes on with the level it
            was at; removed when the run is complete.
        progress: show a bar.

    Returns:
        Weighted particles; ``calls`` counts levels.

    Raises:
        ValueError: for unusable arguments, or a checkpoint of another run.
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

    def identity() -> str:
        settings = {"method": "tempered", "runs": runs, "levels": levels, "resampling": resampling, "moves": moves}
        return digest(**marks(posterior, draws), **settings, seed=generator.get_state())

    def snapshot(now: _State) -> Entry:
        mark = generator.get_state()
        fields = now._asdict().items()
        tensors = {name: value for name, value in fields if isinstance(value, Tensor)}
        plain = {name: value for name, value in fields if not isinstance(value, Tensor)}
        return lambda: (tensors | {"generator": mark}, plain)

    journal = Journal.of(checkpoint, identity, APART)
    found = journal.read()
    if found is None:
        log_w = torch.zeros(runs, m, dtype=torch.float64, device=draws.device)
        state = _State(
            draws.detach().clone(),
            posterior.log_likelihood(draws),
            log_w,
            log_w[:, 0].clone(),
            torch.arange(m, device=draws.device).expand(runs, m).clone(),
            effective_sample_size(log_w).unsqueeze(0),
            torch.zeros(0, runs, dtype=torch.bool, device=draws.device),
            0.0,
            0,
            moves.beta if isinstance(moves, PCNMoves) else None,
        )
    else:
        tensors, plain = found
        generator.set_state(tensors.pop("generator"))
        parts: dict[str, Any] = {name: value.to(draws.device) for name, value in tensors.items()}
        state = _State(**parts, **plain)
    bar = tqdm(total=1.0, initial=state.phi, disable=not progress, desc="tempering", bar_format=_BAR)
    try:
        with bar, journal:
            while state.phi < 1:
                state = _risen(state, posterior, moves, levels, resampling, generator)
                bar.update(state.phi - bar.n)
                if journal.active:
                    journal.note(snapshot(state))
    except StepTooLarge:
        journal.discard()
        raise
    journal.close()
    log_w, log_z = state.log_w, state.log_z + log_mean_exp(state.log_w)
    # runs count by their evidence: together they are one larger run
    share = log_w - log_w.logsumexp(-1, keepdim=True) + (log_z - log_z.logsumexp(0)).unsqueeze(1)
    return Particles(
        state.x,
        share.flatten() - share.flatten().logsumexp(0),
        log_z,
        state.ess_path,
        torch.cat([state.resampled, torch.zeros_like(state.resampled[:1])]),
        state.lineage,
        state.k,
    )


_BAR = "{l_bar}{bar}| {n:.4f}"


class _State(NamedTuple):
    """Particles at a level, phi, the k-th; paths have a row a level."""

    x: Tensor
    likelihood: Tensor
    log_w: Tensor
    log_z: Tensor
    lineage: Tensor
    ess_path: Tensor
    resampled: Tensor
    phi: float
    k: int
    beta: float | None


def _risen(
    now: _State,
    posterior: Posterior,
    moves: PCNMoves | LangevinMoves,
    levels: Levels,
    resampling: Resampling,
    generator: torch.Generator,
) -> _State:
    """The state at the next level, after its moves."""
    runs, m = now.log_w.shape
    x, log_w, log_z, lineage, beta = now.x, now.log_w, now.log_z, now.lineage, now.beta
    gain = torch.nan_to_num(now.likelihood, nan=-math.inf, posinf=-math.inf, neginf=-math.inf).reshape(runs, m)

    def cess(v: float) -> float:
        return min(conditional_ess(w, (v - now.phi) * g) for w, g in zip(now.log_w, gain, strict=True))

    phi = levels.following(now.k, now.phi, cess)
    log_w = log_w + (phi - now.phi) * gain
    lost = ~torch.isfinite(log_w.logsumexp(-1))
    if bool(lost.any()):
        raise FloatingPointError(
            f"tempered: the likelihood is 0, or not a number, at all {m} particles of {int(lost.sum())} runs; "
            "the data are impossible under these draws."
        )
    due = resampling.due(log_w) if phi < 1 else torch.zeros(runs, dtype=torch.bool, device=x.device)
    if bool(due.any()):
        log_z = log_z + torch.where(due, log_mean_exp(log_w), 0.0)
        index = torch.where(due.unsqueeze(1), resampling.ancestors(log_w, generator), torch.arange(m, device=x.device))
        lineage = lineage.gather(1, index)
        x = x[(index + m * torch.arange(runs, device=x.device).unsqueeze(1)).flatten()]
        log_w = torch.where(due.unsqueeze(1), 0.0, log_w)
    if isinstance(moves, PCNMoves):
        assert beta is not None
        x, likelihood, beta = _metropolised(posterior, x, phi, beta, moves, generator)
    else:
        x, likelihood = _unadjusted(posterior, x, phi, moves, generator, now.k + 1)
    ess_path = torch.cat([now.ess_path, effective_sample_size(log_w).unsqueeze(0)])
    resampled = torch.cat([now.resampled, due.unsqueeze(0)])
    return _State(x, likelihood, log_w, log_z, lineage, ess_path, resampled, phi, now.k + 1, beta)


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

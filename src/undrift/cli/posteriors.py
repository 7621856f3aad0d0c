"""How undrift invert draws: chains, particles, and the prior's draws that they begin with."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from undrift._journal import Journal, digest
from undrift.config import ConfigError
from undrift.inverse import (
    Chains,
    FieldMixture,
    Posterior,
    PosteriorInformed,
    Preconditioner,
    PriorCovariance,
    check_step,
    find_mode,
    langevin,
    pcn,
    tempered,
)
from undrift.sample import Particles, sample, twisted

if TYPE_CHECKING:
    from undrift.cli.invert import InvertRun, Problem

__all__ = ["STEPS", "by_chains", "by_particles", "identity_of", "kept_draws", "prior_draws", "started"]

STEPS = 4000  # of a chain
_APART = "prior, setting or seed"
_BESIDE = {"data", "truth", "simulate", "source", "out", "resume", "overwrite", "progress"}  # of no effect on a prior


def prior_draws(run: InvertRun, problem: Problem, n: int, seed: int) -> Tensor:
    """Draws of the prior (n, *event), in the space's coordinates, float64."""
    if isinstance(problem.prior, FieldMixture):
        return problem.prior.sample(n, problem.event, torch.Generator().manual_seed(seed))
    x = sample(problem.diffusion, n, problem.event, run.sampler, seed, batch=256, dtype=torch.float64)
    assert isinstance(x, Tensor)
    return x


def kept_draws(run: InvertRun, problem: Problem, n: int, seed: int, place: Path) -> Tensor:
    """Draws of the prior, which a network takes long to make: kept in a file, if they are not found there."""
    journal = Journal(place, identity_of(run, problem, "draws of the prior"), apart=_APART, keep=True)
    found = journal.read()
    if found is not None:
        return found[0]["x"]
    x = prior_draws(run, problem, n, seed)
    if run.run is not None:
        journal.write(lambda: ({"x": x}, {}), force=True)
    return x


def identity_of(run: InvertRun, problem: Problem, what: str) -> str:
    """Of what is made from a run's settings and its prior, and not from its data."""
    settings = {f.name: getattr(run, f.name) for f in dataclasses.fields(run) if f.name not in _BESIDE}
    probe = torch.arange(math.prod(problem.event), dtype=torch.float64).cos().reshape(1, *problem.event)
    with torch.no_grad():
        return digest(what=what, slope=problem.prior.slope(problem.space.colour(probe), 0.1), **settings)


def started(run: InvertRun, problem: Problem, n: int) -> tuple[Tensor, Preconditioner, Tensor | None]:
    """First states of chains (n, *event), the shape of their moves, and the centre of pcn's.

    Informed ones begin around the mode: moves of the posterior's shape seldom lead back from where it has no mass, and
    unadjusted chains may meet a curvature there that forbids their step.
    """
    posterior, plain = problem.posterior, PriorCovariance(problem.space)
    if run.method == "pcn" and not run.informed:
        return prior_draws(run, problem, n, run.seed + 2), plain, None
    mode = find_mode(posterior, torch.zeros(1, *problem.event, dtype=torch.float64))
    try:
        informed = PosteriorInformed.at(posterior, mode)
    except ValueError as error:
        raise ConfigError(f"informed: {error}") from error
    generator = torch.Generator().manual_seed(run.seed + 2)
    xi = torch.empty(n, *problem.event, dtype=torch.float64).normal_(generator=generator)
    start = mode + informed.noise(xi)
    return start, informed if run.informed else plain, mode if run.method == "pcn" else None


def by_chains(
    run: InvertRun,
    posterior: Posterior,
    start: Tensor,
    preconditioner: Preconditioner,
    centre: Tensor | None = None,
    keep: int | None = None,
    journal: Journal | None = None,
) -> Chains:
    """Chains from first states (chains, *event), each thinned to ``keep`` states, or so that all make 4 run.draws.

    Raises:
        KeyboardInterrupt: if interrupted; half a run is of no use here.
    """
    chains = _chains(run, posterior, start, preconditioner, centre, keep, journal)
    if not chains.complete:
        raise KeyboardInterrupt
    return chains


def _chains(
    run: InvertRun,
    posterior: Posterior,
    start: Tensor,
    preconditioner: Preconditioner,
    centre: Tensor | None,
    keep: int | None,
    journal: Journal | None,
) -> Chains:
    steps = run.steps or STEPS
    keep = keep or -(-4 * run.draws // len(start))
    if run.method == "pcn":
        warmup = steps // 3
        return pcn(
            posterior,
            start,
            steps,
            run.beta,
            seed=run.seed + 3,
            reference=preconditioner,
            centre=centre,
            warmup=warmup,
            target=0.3,
            thin=max(1, (steps - warmup) // keep),
            checkpoint=journal,
            progress=run.progress,
        )
    warmup = max(run.annealing.length(steps), steps // 5)
    if warmup >= steps:
        raise ConfigError("annealing: takes the whole run; give a smaller share, and alpha_end.")
    step = allowed(run, posterior, start, preconditioner) if run.step is None else run.step
    return langevin(
        posterior,
        start,
        steps,
        step,
        run.scheme,
        run.seed + 3,
        annealing=run.annealing,
        preconditioner=preconditioner,
        warmup=warmup,
        thin=max(1, (steps - warmup) // keep),
        trust=run.trust,
        checkpoint=journal,
        progress=run.progress,
    )


def allowed(run: InvertRun, posterior: Posterior, start: Tensor, preconditioner: Preconditioner) -> float:
    """Half of the largest step of langevin that the curvature at the start allows, at the ends of the annealing."""
    found = []
    for tau, alpha in {run.annealing.at(0, 100), run.annealing.at(100, 100)}:
        found.append(check_step(posterior, start, tau, preconditioner, 1.0, run.scheme, alpha).stiffness)
    stiffest = max(found)
    if not math.isfinite(stiffest):
        raise ConfigError("step: the curvature of the posterior is not finite at the start; the prior or the data are.")
    return 0.5 * min(run.trust, 2.0) / max(stiffest, 0.5)


def by_particles(run: InvertRun, problem: Problem, given: Any, journal: Journal | None = None) -> Particles:
    """Weighted draws: by a potential for twisted sampling, from draws of the prior for tempering."""
    if run.method == "tempered":
        return tempered(
            problem.posterior,
            given,
            run.moves,
            run.seed + 3,
            runs=run.runs,
            checkpoint=journal,
            progress=run.progress,
        )
    return twisted(
        problem.diffusion,
        problem.observed,
        given,
        run.particles,
        problem.event,
        run.sampler,
        run.seed + 3,
        strength=run.strength,
        runs=run.runs,
        batch=1024,
        dtype=torch.float64,
        checkpoint=journal,
        progress=run.progress,
    )

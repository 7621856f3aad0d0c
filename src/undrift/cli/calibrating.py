"""Calibration of undrift invert: for truths of the prior, their ranks among draws of their posteriors."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from undrift._journal import Entry, Journal
from undrift.cli.inverted import mode_names, modes_of
from undrift.cli.posteriors import STEPS, by_chains, by_particles, identity_of, prior_draws, started
from undrift.cli.potentials import potential_of
from undrift.inverse import (
    Calibration,
    Posterior,
    PriorCovariance,
    calibrate,
)
from undrift.observe import Observation

if TYPE_CHECKING:
    from undrift.cli.invert import InvertRun, Problem

__all__ = ["calibration_of"]

_RANKED = 31  # draws of each truth that is ranked
_RANK_CHAINS, _RANK_STEPS = 8, 240  # that make them, if informed
_APART = "prior, setting or seed"


def calibration_of(run: InvertRun, problem: Problem, journal: Journal) -> tuple[Calibration, list[str]]:
    """Ranks of truths of the prior among draws of their posteriors; and what speaks against them.

    An interrupted one goes on with the truth that it had reached.
    """
    space, n = problem.space, run.calibrate
    truths = prior_draws(run, problem, n, run.seed + 5)
    generator = torch.Generator().manual_seed(run.seed + 6)
    experiment = Observation.simulate(run.observe, run.noise, space.decode(truths), generator)
    quiet = dataclasses.replace(run, progress=False)
    if run.method in ("pcn", "langevin") and not run.informed:
        # All truths at once, a chain each, from draws of the prior: at its own truth ranks would be uniform at once.
        start = prior_draws(run, problem, n, run.seed + 7)
        posterior = Posterior(problem.prior, experiment)
        chains = by_chains(quiet, posterior, start, PriorCovariance(space), keep=_RANKED, journal=journal)
        values = chains.states[:, -_RANKED:]
    else:
        values = _one_by_one(quiet, problem, experiment, journal, run.progress)
    modes = modes_of(problem, values.flatten(0, 1)).reshape(n, values.shape[1], -1)
    found = calibrate(modes_of(problem, truths), modes, mode_names(modes.shape[-1]), run.seed)
    centred = modes - modes.mean(1, keepdim=True)
    lag = (centred[:, 1:] * centred[:, :-1]).sum(1) / centred.square().sum(1).clamp(min=1e-300)
    worst = float(lag.mean(0).max())
    warnings = []
    if worst > 0.3:
        warnings.append(
            f"Draws of the calibration that follow one another are correlated by {worst:.2g}, and ranks are uniform "
            "for independent draws only; p-values are too small. Give more steps, or --informed true."
        )
    return found, warnings


def _one_by_one(run: InvertRun, problem: Problem, experiment: Observation, journal: Journal, progress: bool) -> Tensor:
    """Draws of the posterior of each experiment, (n, L, *event)."""
    journal = Journal.of(journal, lambda: identity_of(run, problem, "calibration"), _APART)
    found, n = journal.read(), len(experiment.y)
    each = [] if found is None else list(found[0]["draws"])

    def snapshot() -> Entry:
        known = [*each]
        return lambda: ({"draws": torch.stack(known)}, {})

    with journal:
        for i in tqdm(range(len(each), n), disable=not progress, desc="calibration", initial=len(each), total=n):
            one = dataclasses.replace(problem, observation=Observation(run.observe, run.noise, experiment.y[i]))
            each.append(_ranked(dataclasses.replace(run, seed=run.seed + 100 * (i + 1)), one))
            journal.note(snapshot())
    return torch.stack(each)


def _ranked(run: InvertRun, problem: Problem) -> Tensor:
    """Nearly independent draws of one posterior, (L, *event), in random order for particles."""
    if run.method == "twisted":
        particles = by_particles(run, problem, potential_of(run.potential, problem.observed, 1.0))
    elif run.method == "tempered":
        particles = by_particles(run, problem, prior_draws(run, problem, run.runs * run.particles, run.seed + 2))
    else:
        short = dataclasses.replace(run, steps=min(run.steps or STEPS, _RANK_STEPS))
        start = started(short, problem, _RANK_CHAINS)
        keep = -(-(_RANKED + 1) // _RANK_CHAINS)
        return (
            by_chains(short, problem.posterior, *start, keep=keep)
            .states[:, -keep:]
            .transpose(0, 1)
            .flatten(0, 1)[:_RANKED]
        )
    return particles.resample(_RANKED, torch.Generator().manual_seed(run.seed))

"""Plans made for the data: optimised schedules, searched processes, and levels of least path KL.

All but the last are slow, and kept: see :meth:`undrift.cli.design_task.Task.kept`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from undrift.cli.candidates import Candidate, memoryless
from undrift.cli.design_task import Task
from undrift.config import build, describe
from undrift.design.loss import LossCurve
from undrift.design.optimise import optimise
from undrift.design.path import held_by
from undrift.design.schedule import from_loss_curve
from undrift.design.search import search
from undrift.process import LinearProcess
from undrift.report import label
from undrift.sample import Grid, LogSigma, Rho, Sampler, TableSampler

__all__ = ["by_loss", "measured_loss", "optimised", "searched"]

_LEVELS = 25  # noise levels at which a loss is measured
_POINTS = 1024  # held-out points that a loss is measured on


def optimised(task: Task, pair: Candidate) -> Candidate | None:
    """The best schedule of a pair of process and sampler.

    That of a sampler that remembers predictions is the best one of order 1 in as many steps: at levels of its own law
    errors cancel on Gaussian data and on no other, and samples of a trained network were measured to be far worse.
    """
    sampler = replace(pair.sampler, grid=None)
    starts, by = _starts(task, pair, sampler), memoryless(sampler)

    def make() -> dict[str, Any]:
        design = optimise(pair.process, sampler, **task.goal(), by=by, starts=starts)
        return {"sampler": describe(design.sampler)}

    made = task.kept(
        f"{pair.budget} calls: schedule of {pair.names[1]} on {pair.names[0]}",
        task.settings(
            process=describe(pair.process),
            sampler=describe(sampler),
            by=None if by is None else describe(by),
            starts=describe(starts),
        ),
        make,
    )
    if made is None:
        return None
    found = build(made["sampler"], Sampler)
    return Candidate.of("optimised", pair.budget, pair.process, found, task.spectrum, task.resolution, grid="optimised")


def _starts(task: Task, pair: Candidate, sampler: TableSampler) -> list[Grid]:
    """Grids that an optimisation begins from: all that are compared, where they suit the process, and two more."""
    run, own = task.run, pair.sampler.grid
    grids = [*run.grids, LogSigma(run.sigma_min, run.sigma_max), Rho(7.0, run.sigma_min, run.sigma_max)]
    found: dict[str, Grid] = {}
    for grid in grids if own is None else [*grids, own]:
        try:
            grid.times(pair.process, sampler.nodes)
        except ValueError:
            continue
        found.setdefault(str(describe(grid)), grid)
    return list(found.values())


def searched(task: Task, channels: int, sampler: TableSampler, calls: int) -> Candidate | None:
    """The best process of so many channels for a sampler, with its levels."""
    sampler = replace(sampler, grid=None)

    def make() -> dict[str, Any]:
        design = search(channels, sampler, **task.goal())
        return {"process": describe(design.process), "sampler": describe(design.sampler)}

    name = f"{channels} channel{'s' if channels > 1 else ''}, searched"
    made = task.kept(
        f"{calls} calls: process of {name} with {label(sampler)}",
        task.settings(channels=channels, sampler=describe(sampler)),
        make,
    )
    if made is None:
        return None
    process, found = build(made["process"], LinearProcess), build(made["sampler"], Sampler)
    return Candidate.of("searched", calls, process, found, task.spectrum, task.resolution, grid="optimised", name=name)


def measured_loss(task: Task) -> LossCurve | None:
    """The denoiser's loss, on held-out points if there are any."""
    if task.checkpoint is None:
        return None
    run, denoiser, source = task.run, task.checkpoint.denoiser, task.unseen
    points = source.draw(torch.arange(min(len(source), _POINTS)), torch.Generator().manual_seed(run.seed))
    low, high = math.log(run.sigma_min), math.log(run.sigma_max)
    levels = torch.linspace(low, high, _LEVELS, dtype=torch.float64).exp()

    def make() -> dict[str, Any]:
        return LossCurve.measure(denoiser, points, levels, seed=run.seed, batch=run.batch).to_dict()

    shown = hashlib.sha256(points.contiguous().numpy().tobytes()).hexdigest()[:16]
    made = task.kept(
        f"loss of the denoiser on {len(points)} points of {source.name}",
        {"loss": task.digest, "points": shown, "levels": levels.tolist(), "seed": run.seed, "batch": run.batch},
        make,
    )
    if made is None:
        return None
    sigma, loss, error = (torch.tensor(made[k], dtype=torch.float64) for k in ("sigma", "loss", "std_error"))
    return LossCurve(sigma, loss, error, reference=task.spectrum)


def by_loss(task: Task, curve: LossCurve, calls: Sequence[int]) -> list[Candidate]:
    """Schedules of least path KL for the samplers that hold the prediction, from the measured loss."""
    run, found = task.run, []
    low = max(run.sigma_min, task.resolution)
    for process in run.processes:
        # Just inside, for the rounding of the way from a level to its time and back.
        high = min(run.sigma_max, (1 - 1e-9) * float(process.sigma(process.horizon)))
        for sampler in run.samplers:
            if held_by(sampler) != "prediction" or not low < high:
                continue
            assert isinstance(sampler, TableSampler)
            for n in calls:
                steps = n - 1 if sampler.final != "none" else n
                if steps >= 1:
                    grid = from_loss_curve(curve.loss, steps, high, low).grid()
                    made = replace(sampler, steps=n, grid=grid)
                    found.append(
                        Candidate.of(
                            "optimised", n, process, made, task.spectrum, task.resolution, grid="measured loss"
                        )
                    )
    return found

"""What a design writes down: the ranking, where the errors come from, and what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from undrift.cli.candidates import STRANGE, Candidate, chosen, ranked
from undrift.cli.design_task import Task
from undrift.cli.judge import Judge
from undrift.design.budget import budget
from undrift.design.gaussian import propagate
from undrift.design.loss import LossCurve
from undrift.design.path import held_by
from undrift.report import Cell, JsonLines, compare
from undrift.report.comparison import number
from undrift.report.design import CAVEAT
from undrift.sample import LogSigma, Rho

__all__ = ["account"]

_SETS = 3  # sets of samples that a measurement is a mean of
_REFINE = 32  # steps that an interval is cut into, to switch discretisation off


def account(
    task: Task,
    found: Sequence[Candidate],
    refused: dict[tuple[str, str, str, int], str],
    calls: Sequence[int],
    curve: LossCurve | None,
) -> dict[str, Any]:
    """Everything that design.json holds.

    Args:
        task: the design.
        found: all plans.
        refused: (process, sampler, grid, calls) -> why there is no such plan.
        calls: budgets.
        curve: the denoiser's loss, if there is one.
    """
    metric, s = task.run.metric, task.spectrum
    plans: list[Candidate] = []
    rows: list[dict[str, Any]] = []
    budgets: dict[str, dict[str, Any]] = {}
    measured: list[tuple[int, Candidate]] = []
    for n in calls:
        here = ranked([c for c in found if c.budget == n], metric)
        first = len(plans)
        base = chosen([c for c in here if c.kind == "classical"], metric)
        use = chosen(here, metric)
        assert base is not None
        assert use is not None
        place = {id(c): first + i for i, c in enumerate(here)}
        best = {}
        for kind in ("classical", "optimised", "searched"):
            leader = chosen([c for c in here if c.kind == kind], metric)
            if leader is not None:
                best[kind] = place[id(leader)]
                measured.append((place[id(leader)], leader))
        plans += here
        rows += [c.row(base.value(metric), metric) for c in here]
        task.say(f"{n} calls: where the error of the best plan comes from")
        budgets[str(n)] = {"use": place[id(use)], "best": best, **_sources(task, use, here, place, curve)}
    left = [{"process": p, "sampler": q, "grid": g, "calls": n, "why": why} for (p, q, g, n), why in refused.items()]
    loss = None
    if curve is not None:
        loss = {**curve.to_dict(), "mmse": s.mmse(curve.sigma).tolist(), "data": task.unseen.name}
    spectrum = {"name": s.name, "dim": s.dim, **{k: getattr(s, k).tolist() for k in ("variance", "mean", "count")}}
    return {
        "spectrum": spectrum,
        "metric": metric,
        "resolution": task.resolution,
        "strange": STRANGE,
        "caption": CAVEAT,
        "calls": list(calls),
        "plans": rows,
        "budgets": budgets,
        "left_out": left,
        "loss": loss,
        "verified": _verified(task, plans, measured),
    }


def _sources(
    task: Task, use: Candidate, here: Sequence[Candidate], place: dict[int, int], curve: LossCurve | None
) -> dict[str, Any]:
    """Where the error of a plan comes from, and its noise levels; the path KL of the best plan that has one."""
    s, process = task.spectrum, use.process
    excess = None
    if curve is not None:

        def excess(sigma: torch.Tensor) -> torch.Tensor:
            return (curve.loss(sigma) - s.mmse(sigma)).clamp(min=0)

    switched = budget(process, use.sampler, s, excess, refine=_REFINE)
    with torch.no_grad():
        law = propagate(use.plan, s)
    grids = {"this plan": use.plan.times}
    for name, grid in (("log σ", LogSigma()), ("ρ = 7", Rho())):
        grids[name] = grid.times(process, use.plan.calls)
    with torch.no_grad():
        levels = {name: process.sigma(t).tolist() for name, t in grids.items()}
    out: dict[str, Any] = {
        "modes": {"variance": law.variance.tolist(), "w2_squared": law.w2_modes.tolist()},
        "levels": levels,
        "sources": {case.name: case.w2 for case in switched.attribution},
        "path": None,
    }
    walker = next((c for c in here if held_by(c.sampler) is not None and len(c.plan.times) > 1), None)
    if walker is not None:
        path = budget(walker.process, walker.sampler, s, excess, attribution=False).path
        if path is not None:
            out["path"] = {
                "plan": place[id(walker)],
                "sigma": path.steps.sigma.tolist(),
                "start": path.start,
                "discretisation": path.discretisation.tolist(),
                "score": path.score.tolist() if excess is not None else None,
                "kl": path.kl,
            }
    return out


def _verified(task: Task, plans: Sequence[Candidate], best: Sequence[tuple[int, Candidate]]) -> dict[str, Any] | None:
    """The best of each kind, drawn and measured: the samples' distance beside the prediction."""
    if task.checkpoint is None or not task.run.verify:
        return None
    run, n = task.run, task.run.verify
    task.say("training the feature network" if task.data.labels is not None else "measuring by sliced W2")
    judge = Judge.of(task.data, task.holdout, run.seed)
    log, rows = JsonLines(task.out / "verify.jsonl"), []
    for i, c in best:
        before = len(log.rows)
        (row,) = compare(
            task.checkpoint.denoiser,
            [Cell(c.process, c.sampler, c.plan, c.budget)],
            judge.distance,
            task.checkpoint.event,
            n=n,
            repeats=_SETS,
            seed=run.seed,
            batch=run.batch,
            log=log,
            identity={**judge.identity, "checkpoint": task.digest},
        )
        if len(log.rows) > before:
            task.say(f"{c.budget} calls, {c.kind}, {c.title}: {number(row)}")
        rows.append({"plan": i, "distance": row["distance"], "std_error": row["std_error"]})
    caption = f"{judge.caption} {_SETS} sets of {n} samples a plan, mean and standard error."
    if judge.floor is not None and judge.size != n:
        caption += f" The floor is of {judge.size} held-out points, not of sets of {n}, and does not compare."
    return {"measure": judge.measure, "floor": judge.floor, "caption": caption, "rows": rows}

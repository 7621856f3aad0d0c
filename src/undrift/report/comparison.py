r"""Quality against network calls, for processes x samplers x calls over one trained denoiser.

Nothing is trained again: a denoiser serves every linear process. A cell of the comparison draws several independent
sets of samples; the quality is the mean of their distances to the data and its standard error is theirs. A distance
between finite sets is biased upwards by an amount that depends on their size, so the floor beside it, the distance of
held-out data, is only comparable to sets of its own size: the default size of a set.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from undrift.config import describe, schema
from undrift.denoise.base import Denoiser
from undrift.diffusion import Diffusion
from undrift.process.learned import LearnedProcess
from undrift.process.linear import LinearProcess
from undrift.report.files import JsonLines
from undrift.sample import Plan, Sampler, TableSampler, sample

__all__ = ["Cell", "at_calls", "cells", "compare", "label", "number", "shown", "table", "text_table"]

_REQUIRED = inspect.Parameter.empty


def label(obj: Any) -> str:
    """Name of a process or sampler with its order and the settings that differ from its defaults.

    Never the steps, nor what a learned process has learned, which is no setting.
    """
    plain = describe(obj)
    if not (isinstance(plain, dict) and "type" in plain):
        return str(plain)
    defaults = {key: describe(default) for key, (_, default) in schema(type(obj)).items() if default is not _REQUIRED}  # type: ignore[arg-type]
    hidden = {"type", "steps"}
    if isinstance(obj, LearnedProcess):
        parts = {"Q": "Q", "D": "D", "S": "S", "start": "start_cov", "clock": "clock"}
        hidden |= {parts[part] for part in obj.learn}
        defaults = {**describe(type(obj)(obj.channels)), "channels": defaults["channels"]}
    given = []
    for key, value in plain.items():
        if key not in hidden and (key == "order" or key not in defaults or value != defaults[key]):
            given.append(f"{key}={label(getattr(obj, key, value))}")
    return plain["type"] + (f"({', '.join(given)})" if given else "")


def at_calls(sampler: Sampler, process: LinearProcess, calls: int) -> tuple[TableSampler, Plan]:
    """The sampler with as many steps as ``calls`` model calls allow, and its plan: two-stage methods get half.

    Raises:
        ValueError: if the method does not apply to the process, or is not a table with a number of steps.
    """
    if not isinstance(sampler, TableSampler):
        raise ValueError(f"{type(sampler).__name__} chooses its own number of calls; compare fixed-step samplers.")
    for steps in (calls, (calls + 1) // 2, calls // 2):
        if steps >= 1:
            chosen = dataclasses.replace(sampler, steps=steps)
            plan = chosen.plan(process)
            if plan.calls <= calls:
                return chosen, plan
    raise ValueError(f"{label(sampler)} does not fit into {calls} calls.")


@dataclass(frozen=True, eq=False)
class Cell:
    """One process under one sampler with one number of calls."""

    process: LinearProcess
    sampler: TableSampler
    plan: Plan = field(repr=False)
    calls: int

    @property
    def names(self) -> tuple[str, str]:
        return label(self.process), label(self.sampler)


def cells(
    processes: Sequence[LinearProcess], samplers: Sequence[Sampler], calls: Sequence[int]
) -> tuple[list[Cell], dict[tuple[str, str], str]]:
    """All cells that exist, with their plans; and for pairs that do not apply, (process, sampler) -> why."""
    found, refused = [], {}
    for process in processes:
        for sampler in samplers:
            for count in calls:
                try:
                    chosen, plan = at_calls(sampler, process, count)
                except ValueError as error:
                    refused[label(process), label(sampler)] = str(error)
                    break
                found.append(Cell(process, chosen, plan, count))
    return found, refused


def compare(
    denoiser: Denoiser,
    work: Sequence[Cell],
    distance: Callable[[Tensor], float],
    shape: Sequence[int],
    *,
    n: int,
    repeats: int = 3,
    seed: int = 0,
    batch: int = 512,
    log: JsonLines | None = None,
    identity: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Rows of the comparison, in the order of ``work``.

    Args:
        denoiser: the one denoiser.
        work: what to compare, from :func:`cells`.
        distance: of a set of samples (n, *event) to the data; smaller is better.
        shape: event shape of a sample.
        n: samples in a set.
        repeats: independent sets a cell; the standard error needs two.
        seed: every cell draws from the same seed, so that their noise is shared and differences are sharper.
        batch: samples walked at a time.
        log: finished rows are kept here, and those found here are not computed again.
        identity: what else a row depends on (checkpoint, data, features): rows of another identity are not reused.
        say: called with a line of progress for each cell.
    """
    if n < 2 or repeats < 1:
        raise ValueError(f"compare: needs n of at least 2 and repeats of at least 1, got {n} and {repeats}.")
    known = {row["key"]: row for row in (log.rows if log else [])}
    rows = []
    for i, cell in enumerate(work):
        settings = {
            "process": describe(cell.process),
            "sampler": describe(cell.sampler),
            "n": n,
            "repeats": repeats,
            "seed": seed,
            "batch": batch,
            "identity": dict(identity or {}),
        }
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        if key in known:
            rows.append(known[key])
            continue
        clock = time.perf_counter()
        x = sample(Diffusion(cell.process, denoiser), n * repeats, shape, cell.plan, seed, batch=batch)
        assert isinstance(x, Tensor)
        values = torch.tensor([distance(part) for part in x.split(n)], dtype=torch.float64)
        names = cell.names
        row = {
            "key": key,
            "process": names[0],
            "sampler": names[1],
            "calls": cell.plan.calls,
            "budget": cell.calls,
            "distance": float(values.mean()),
            "std_error": float(values.std() / math.sqrt(repeats)) if repeats > 1 else None,
            "seconds": round(time.perf_counter() - clock, 3),
            "settings": settings,
        }
        rows.append(row)
        if log is not None:
            log.append(row)
        say(f"[{i + 1}/{len(work)}] {names[0]} {names[1]} {row['calls']} calls: {number(row)}")
    return rows


def number(row: Mapping[str, Any]) -> str:
    """A row's distance with its standard error, to the digits that mean something."""
    error = row["std_error"]
    digits = 3 if not error else max(0, min(4, 1 - math.floor(math.log10(error))))
    value = f"{row['distance']:.{digits}f}"
    return value if error is None else f"{value} ± {error:.{digits}f}"


def shown(measure: Mapping[str, Any]) -> str:
    """A measure of an evaluation, with its standard error where it has one."""
    return f"{measure['value']} ± {measure['std_error']}" if measure.get("std_error") else str(measure["value"])


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table: a line for each process and sampler, a column for each budget of calls.

    A method that takes two calls a step may use one less than its budget.
    """
    budgets = sorted({int(r["budget"]) for r in rows})
    pairs = list(dict.fromkeys((r["process"], r["sampler"]) for r in rows))
    found = {(r["process"], r["sampler"], r["budget"]): r for r in rows}
    lines = []
    for process, sampler in pairs:
        values = [number(found[process, sampler, b]) if (process, sampler, b) in found else "–" for b in budgets]
        lines.append([process, sampler, *values])
    return ["process", "sampler", *[f"{b} calls" for b in budgets]], lines


def text_table(head: Sequence[str], lines: Sequence[Sequence[str]], names: int = 2) -> str:
    """A table in plain text, columns aligned: the first ``names`` to the left, numbers to the right."""
    everything = [list(head), *[list(line) for line in lines]]
    widths = [max(len(line[i]) for line in everything) for i in range(len(head))]

    def row(line: Sequence[str]) -> str:
        return "  ".join(
            c.ljust(w) if i < names else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )

    rule = "  ".join("-" * w for w in widths)
    return "\n".join([row(everything[0]).rstrip(), rule, *[row(line).rstrip() for line in everything[1:]]])

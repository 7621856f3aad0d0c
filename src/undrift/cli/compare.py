"""undrift compare: processes x samplers x network calls, over one trained denoiser."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from undrift.cli.common import Checkpoint, Clock, begin, check_data, finish, keep_samples, open_checkpoint
from undrift.cli.judge import Judge, memorisation
from undrift.config import ConfigError
from undrift.diffusion import Diffusion
from undrift.process import CLD, MALDA, PSLD, VP, FlowMatching, LinearProcess
from undrift.report import JsonLines, cells, compare, label, table, text_table, write_json, write_report
from undrift.report.comparison import Cell
from undrift.sample import SSCS, Ancestral, Exponential, Sampler, sample
from undrift.train import Dataset, DataSource, Digits

__all__ = ["CompareRun", "compare_into"]


def _processes() -> list[LinearProcess]:
    return [VP(), CLD(), PSLD(), MALDA(), FlowMatching()]


def _samplers() -> list[Sampler]:
    return [Ancestral(), SSCS(), Exponential(order=1), Exponential(order=2)]


@dataclass(frozen=True, eq=False)
class CompareRun:
    """Compare processes and samplers over one trained denoiser: quality against network calls.

    Finished cells are kept in comparison.jsonl; the same command goes on where it stopped.

    Args:
        run: folder of a training run, or a checkpoint file, of a denoiser.
        data: what samples are compared with: the training data.
        holdout: data the model has not seen, for the floor; null for none.
        processes: what to compare, a list of names or of objects with settings.
        samplers: likewise; their steps follow from the calls. Pairs that do not apply are left out, and said.
        calls: budgets of network calls per sample; a method of two calls a step takes half as many steps.
        n: samples in a set; null for the size of the held-out data, or 1000 without any.
        repeats: independent sets in a cell; the standard error is over them.
        seed: of all sets.
        batch: samples walked at a time.
        out: folder of the comparison; null for one beside the checkpoint.
        overwrite: forget the finished cells.
    """

    run: str
    data: DataSource = field(default_factory=Digits)
    holdout: DataSource | None = field(default_factory=lambda: Digits("test"))
    processes: list[LinearProcess] = field(default_factory=_processes)
    samplers: list[Sampler] = field(default_factory=_samplers)
    calls: list[int] = field(default_factory=lambda: [5, 10, 20, 50])
    n: int | None = None
    repeats: int = 3
    seed: int = 0
    batch: int = 512
    out: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("processes", "samplers", "calls"):
            if not getattr(self, name):
                raise ConfigError(f"{name}: expected at least one, got an empty list.")
        if min(self.calls) < 1:
            raise ConfigError(f"calls: expected numbers of at least 1, got {self.calls}.")
        names = [label(p) for p in self.processes]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise ConfigError(f"processes: {name} is there twice; a row of the comparison goes by its name.")
        for name, least in (("repeats", 1), ("batch", 1), ("seed", 0), *((("n", 2),) if self.n is not None else ())):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: expected at least {least}, got {getattr(self, name)}.")

    def execute(self, command: Sequence[str]) -> int:
        clock = Clock()
        checkpoint = open_checkpoint(self.run)
        checkpoint.denoiser  # noqa: B018 - says now if the model serves one process only
        checkpoint.check_prior("undrift compare", "compare samplers in Python, by sample(..., observed=y)")
        data = self.data.load()
        holdout = None if self.holdout is None else self.holdout.load()
        check_data(data, self.data, checkpoint, "data")
        if holdout is not None and self.holdout is not None:
            check_data(holdout, self.holdout, checkpoint, "holdout")
        work, refused = plan_cells(self.processes, self.samplers, self.calls)
        out = checkpoint.path.parent / "compare" if self.out is None else Path(self.out)
        old = ("comparison.jsonl", "comparison.json", "report.html")
        begin(self, out, old if self.overwrite else (), self.overwrite)
        print("training the feature network" if data.labels is not None else "measuring by sliced W2", flush=True)
        judge = Judge.of(data, holdout, self.seed)
        compare_into(out, checkpoint, work, refused, judge, data, holdout, self.n, self.repeats, self.seed, self.batch)
        finish(out, command, clock)
        print(f"report  {write_report(out)}")
        return 0


def plan_cells(
    processes: Sequence[LinearProcess], samplers: Sequence[Sampler], calls: Sequence[int]
) -> tuple[list[Cell], dict[tuple[str, str], str]]:
    """All cells with their plans; ConfigError if a method applies to none of the processes."""
    work, refused = cells(processes, samplers, sorted(set(calls)))
    for sampler in samplers:
        reasons = [why for (_, name), why in refused.items() if name == label(sampler)]
        if len(reasons) >= len(processes):
            raise ConfigError(f"samplers: {label(sampler)} applies to none of the processes: {reasons[0]}")
    return work, refused


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=-]+", "-", name).strip("-")


def compare_into(
    out: Path,
    checkpoint: Checkpoint,
    work: Sequence[Cell],
    refused: dict[tuple[str, str], str],
    judge: Judge,
    data: Dataset,
    holdout: Dataset | None,
    n: int | None,
    repeats: int,
    seed: int,
    batch: int,
) -> list[dict[str, Any]]:
    """Run a comparison into a folder, print its table, keep a grid of samples of each process's best sampler."""
    denoiser = checkpoint.denoiser
    size = n or judge.size or 1000
    digest = hashlib.sha256(checkpoint.path.read_bytes()).hexdigest()[:16]
    log = JsonLines(out / "comparison.jsonl")
    rows = compare(
        denoiser,
        work,
        judge.distance,
        checkpoint.event,
        n=size,
        repeats=repeats,
        seed=seed,
        batch=batch,
        log=log,
        identity={**judge.identity, "checkpoint": digest},
        say=lambda line: print(line, flush=True),
    )
    for (process, sampler), why in refused.items():
        print(f"left out: {process} with {sampler}: {why}")
    best = []
    for _, group in itertools.groupby(zip(work, rows, strict=True), key=lambda pair: pair[1]["process"]):
        best.append(min(group, key=lambda pair: pair[1]["distance"]))
    copies: list[list[str]] = []
    for cell, row in best:
        diffusion = Diffusion(cell.process, denoiser)
        x = sample(diffusion, max(size, 64), checkpoint.event, cell.plan, seed, batch=batch)
        assert isinstance(x, torch.Tensor)
        keep_samples(out, f"samples-{_file_name(row['process'])}", x, diffusion, cell.sampler, checkpoint.tones, seed)
        if holdout is not None:
            near = memorisation(x, data, holdout)
            numbers = (f"{float(near.samples.median()):.3g}", f"{near.ratio:.3f}", f"{near.copied:.1%}")
            copies.append([row["process"], row["sampler"], str(row["calls"]), *numbers])
    how = f"{repeats} sets of {size} samples a cell, mean and standard error."
    if judge.size == size:
        how += f" The floor is the distance of the {size} held-out points, a set of the same size."
    about = {
        "measure": judge.measure,
        "floor": judge.floor,
        "caption": f"{judge.caption} {how}",
        "memorisation": copies,
        "rows": [row["key"] for row in rows],
    }
    write_json(out / "comparison.json", about)
    print()
    print(f"{judge.caption}\n{how}\n")
    print(text_table(*table(rows)))
    if judge.floor is not None:
        print(f"held-out data: {judge.floor:.4g}")
    if copies:
        print(
            "\nmemorisation check: distance to the nearest training point, and its ratio to that of held-out points\n"
        )
        print(text_table(["process", "sampler", "calls", "distance", "ratio", "copied"], copies))
    return rows

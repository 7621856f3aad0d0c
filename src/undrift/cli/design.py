"""undrift design: which process, sampler and schedule to use at a budget of network calls, before any is spent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from undrift.cli.candidates import check_samplers, classical, pairs
from undrift.cli.common import Clock, begin, check_data, finish, open_checkpoint
from undrift.cli.design_account import account
from undrift.cli.design_plans import by_loss, measured_loss, optimised, searched
from undrift.cli.design_task import Task
from undrift.config import ConfigError
from undrift.design.spectrum import Spectrum
from undrift.process import CLD, MALDA, PSLD, VP, FlowMatching, LinearProcess
from undrift.report import JsonLines, label, text_table, write_bytes, write_json, write_report
from undrift.report.comparison import number
from undrift.report.design import design_table, strange_line
from undrift.sample import (
    SSCS,
    Ancestral,
    Cosine,
    DPMSolver2M,
    Exponential,
    Grid,
    Heun,
    LogSigma,
    Published,
    Quadratic,
    Rho,
    Sampler,
    Tangent,
)
from undrift.train import Dataset, DataSource, Digits

__all__ = ["DesignRun"]

_GROUPS = 64  # eigenvalues that predictions are made for
_LARGEST = 4096  # coordinates of which the covariance is taken apart
_FILES = ("design.jsonl", "verify.jsonl", "design.json", "report.html")


def _processes() -> list[LinearProcess]:
    return [VP(), CLD(), PSLD(), MALDA(), FlowMatching()]


def _samplers() -> list[Sampler]:
    return [Ancestral(), SSCS(), Exponential(order=1), Exponential(order=2), DPMSolver2M(), Heun()]


def _grids() -> list[Grid]:
    return [LogSigma(), LogSigma(0.002, 80.0), Rho(), Quadratic(), Cosine(), Tangent(), Published("ays-sd15")]


@dataclass(frozen=True, eq=False)
class DesignRun:
    """Choose process, sampler and schedule for data and budgets of network calls, by exact errors on its spectrum.

    Finished optimisations, searches and measurements are kept in design.jsonl and verify.jsonl; the same command goes
    on where it stopped.

    Args:
        run: a training run, or a checkpoint file, of a denoiser, whose loss is then measured; null for the data alone.
        data: the data to be sampled, for its spectrum.
        holdout: data that the model has not seen, for its loss; null for the data. Used with a run only.
        calls: budgets of network calls per sample; a method of two calls a step takes half as many steps.
        processes: what to choose from, a list of names or of objects with settings.
        samplers: likewise; their steps follow from the calls. One with a grid of its own keeps to that.
        grids: likewise, for the samplers without one.
        basis: the spectrum's, pca for the data's own, or fft for plane waves, which cost little in high dimension.
        metric: what plans are ranked by and optimised for.
        resolution: level of noise, in data units, below which KL does not look; null for a hundredth of the data's
            deviation.
        optimise: look for the best schedules of the best pairs of process and sampler. Those of samplers that remember
            predictions are found by the error of Exponential(order=1) in as many steps: at levels of their own law,
            errors cancel on Gaussian data and on no other, and samples of a network were measured to be far worse.
        top: how many pairs, at each budget; they differ in sampler or number of channels.
        channels: numbers of channels to search a process for, with the samplers of those pairs.
        verify: with a run, size of the sets of samples, three for each plan, drawn by the best plan of each kind and
            measured; 0 for none.
        trust: weight of strange denoiser inputs while schedules and processes are optimised.
        sigma_min, sigma_max: range of noise levels of optimised schedules, those that the denoiser knows.
        iterations: of L-BFGS, for each of two starts.
        seed: of all randomness.
        batch: points or samples walked at a time.
        out: folder of the design; null for one beside the checkpoint, or runs/design without one.
        overwrite: forget what was finished.
    """

    run: str | None = None
    data: DataSource = field(default_factory=Digits)
    holdout: DataSource | None = field(default_factory=lambda: Digits("test"))
    calls: list[int] = field(default_factory=lambda: [5, 10, 20])
    processes: list[LinearProcess] = field(default_factory=_processes)
    samplers: list[Sampler] = field(default_factory=_samplers)
    grids: list[Grid] = field(default_factory=_grids)
    basis: Literal["pca", "fft"] = "pca"
    metric: Literal["w2", "kl"] = "w2"
    resolution: float | None = None
    optimise: bool = True
    top: int = 2
    channels: list[int] = field(default_factory=list)
    verify: int = 0
    trust: float = 3.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    iterations: int = 200
    seed: int = 0
    batch: int = 512
    out: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("calls", "processes", "samplers", "grids"):
            if not getattr(self, name):
                raise ConfigError(f"{name}: expected at least one, got an empty list.")
        for name in ("processes", "samplers", "grids"):
            names = [label(item) for item in getattr(self, name)]
            for i, twice in enumerate(names):
                if twice in names[:i]:
                    raise ConfigError(f"{name}: {twice} is there twice; a row of the ranking goes by its name.")
        for name in ("calls", "channels"):
            if min(getattr(self, name), default=1) < 1:
                raise ConfigError(f"{name}: expected numbers of at least 1, got {getattr(self, name)}.")
        for name, least in (("top", 1), ("verify", 0), ("iterations", 1), ("seed", 0), ("batch", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: expected at least {least}, got {getattr(self, name)}.")
        if self.verify and self.run is None:
            raise ConfigError("verify: samples are drawn from a model; give a run, or leave verify at 0.")
        if self.verify == 1:
            raise ConfigError("verify: a set needs at least 2 samples, got 1.")
        if self.resolution is not None and not 0 < self.resolution < math.inf:
            raise ConfigError(f"resolution: expected a positive number, got {self.resolution}.")
        if not 0 <= self.trust < math.inf:
            raise ConfigError(f"trust: expected a number of at least 0, got {self.trust}.")
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ConfigError(
                f"sigma_min: expected 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}."
            )

    def execute(self, command: Sequence[str]) -> int:
        clock = Clock()
        checkpoint = None if self.run is None else open_checkpoint(self.run)
        data, holdout = self.data.load(), None
        if checkpoint is not None:
            checkpoint.denoiser  # noqa: B018 - says now if the model serves one process only
            checkpoint.check_prior("undrift design", "leave --run out and design for the data alone")
            check_data(data, self.data, checkpoint, "data")
            if self.holdout is not None:
                holdout = self.holdout.load()
                check_data(holdout, self.holdout, checkpoint, "holdout")
        check_samplers(self.processes, self.samplers)
        spectrum = self.spectrum_of(data)
        resolution = self.resolution
        if resolution is None:
            resolution = 0.01 * math.sqrt(float((spectrum._count * spectrum.variance).sum()) / spectrum.dim)
        beside = Path("runs") if checkpoint is None else checkpoint.path.parent
        out = beside / "design" if self.out is None else Path(self.out)
        begin(self, out, _FILES if self.overwrite else (), self.overwrite)
        log = JsonLines(out / "design.jsonl")
        about = _work(Task(self, out, spectrum, resolution, checkpoint, data, holdout, log))
        self._write_plans(out, about)
        write_json(out / "design.json", about)
        finish(out, command, clock)
        _tell(about)
        for n in about["calls"]:
            print(f"{n} calls  {out / f'best-{n}.yaml'}")
        print(f"design  {out / 'design.json'}")
        print(f"report  {write_report(out)}")
        return 0

    def spectrum_of(self, data: Dataset) -> Spectrum:
        """The data's spectrum, equal variances joined.

        Raises:
            ConfigError: if the data are too few, too large for the basis, or do not vary.
        """
        size = math.prod(data.event)
        if len(data) < 2:
            raise ConfigError(f"data: a spectrum needs at least 2 points, {data.name} has {len(data)}.")
        if self.basis == "pca" and size > _LARGEST:
            raise ConfigError(
                f"basis: points of {data.name} have {size} coordinates; pca takes up to {_LARGEST}, give --basis fft."
            )
        if self.basis == "fft" and not data.event:
            raise ConfigError(f"basis: points of {data.name} are single numbers, which have no plane waves; give pca.")
        points = data.draw(torch.arange(len(data)), torch.Generator().manual_seed(self.seed))
        found = Spectrum.of(points.reshape(len(points), -1) if not data.event else points, self.basis, data.name)
        if not bool((found.variance > 0).any()):
            raise ConfigError(f"data: all points of {data.name} are the same.")
        return found.grouped(_GROUPS)

    def _write_plans(self, out: Path, about: dict[str, Any]) -> None:
        """A configuration for ``undrift sample`` for each budget, and none from an earlier call."""
        for n in about["calls"]:
            row = about["plans"][about["budgets"][str(n)]["use"]]
            head = (
                f"# {row['calls']} calls, {row['kind']}: predicted W2 {row['w2']:.4g}, KL {row['kl']:.4g} nats\n"
                f"# undrift sample RUN --config {out / f'best-{n}.yaml'}\n"
            )
            text = yaml.safe_dump(row["settings"], sort_keys=False, allow_unicode=True, width=110)
            write_bytes(out / f"best-{n}.yaml", (head + text).encode())
        names = {f"best-{n}.yaml" for n in about["calls"]}
        for old in out.glob("best-*.yaml"):
            if old.name not in names:
                old.unlink()


def _work(task: Task) -> dict[str, Any]:
    """Everything that design.json holds."""
    run, calls = task.run, sorted(set(task.run.calls))
    task.say(repr(task.spectrum))
    found, refused = classical(run.processes, run.samplers, run.grids, calls, task.spectrum, task.resolution, task.say)
    there = {c.names[:2] for c in found}
    whys = {(process, sampler): why for (process, sampler, *_), why in refused.items()}
    for (process, sampler), why in whys.items():
        if (process, sampler) not in there:
            task.say(f"left out: {process} with {sampler}: {why}")
    for n in calls:
        if not any(c.budget == n for c in found):
            raise ConfigError(f"calls: no plan fits into {n} calls: {next(iter(refused.values()))}")
    curve = measured_loss(task)
    if curve is not None:
        found += by_loss(task, curve, calls)
    for n in calls:
        best = pairs([c for c in found if c.budget == n and c.kind == "classical"], run.metric, run.top)
        if run.optimise:
            found += [c for pair in best if (c := optimised(task, pair)) is not None]
        samplers = {c.names[1]: c.sampler for c in best}
        for k in run.channels:
            found += [c for s in samplers.values() if (c := searched(task, k, s, n)) is not None]
    return account(task, found, refused, calls, curve)


def _tell(about: dict[str, Any]) -> None:
    """Print the rankings."""
    print()
    for n in about["calls"]:
        print(f"{n} calls\n")
        head, lines, _ = design_table(about, n)
        print(text_table(head, lines, names=4))
        warning = strange_line(about, n)
        if warning:
            print(f"warning: {warning}")
        print()
    if about["verified"]:
        told = about["verified"]
        print(f"{told['measure']}\n{told['caption']}\n")
        lines = []
        for row in told["rows"]:
            plan = about["plans"][row["plan"]]
            names = [plan[k] for k in ("kind", "process", "sampler", "grid")]
            lines.append([*names, str(plan["calls"]), f"{plan['w2']:.4g}", f"{plan['kl']:.4g}", number(row)])
        print(text_table(["kind", "process", "sampler", "grid", "calls", "W2", "KL", "measured"], lines, names=4))
        if told["floor"] is not None:
            print(f"held-out data: {told['floor']:.4g}")
        print()
    print(f"{about['caption']} KL is taken at a resolution of {about['resolution']:.3g}.\n")

"""undrift design: which process, sampler and schedule to use at a budget of network calls, before any is spent."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from undrift.cli.candidates import STRANGE, Candidate, check_samplers, chosen, classical, pairs, ranked
from undrift.cli.common import Checkpoint, Clock, begin, check_data, finish, open_checkpoint
from undrift.cli.judge import Judge
from undrift.config import ConfigError, build, describe
from undrift.design.budget import budget
from undrift.design.gaussian import propagate
from undrift.design.loss import LossCurve
from undrift.design.optimise import family, optimise
from undrift.design.path import held_by
from undrift.design.schedule import from_loss_curve
from undrift.design.search import search
from undrift.design.spectrum import Spectrum
from undrift.process import CLD, MALDA, PSLD, VP, FlowMatching, LinearProcess
from undrift.report import Cell, JsonLines, compare, label, text_table, write_bytes, write_json, write_report
from undrift.report.comparison import number
from undrift.report.design import CAVEAT, design_table, strange_line
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
    TableSampler,
    Tangent,
)
from undrift.train import Dataset, DataSource, Digits

__all__ = ["DesignRun"]

_GROUPS = 64  # eigenvalues that predictions are made for
_LARGEST = 4096  # coordinates of which the covariance is taken apart
_LEVELS = 25  # noise levels at which a loss is measured
_POINTS = 1024  # held-out points that a loss is measured on
_SETS = 3  # sets of samples that a measurement is a mean of
_REFINE = 32  # steps that an interval is cut into, to switch discretisation off
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
        optimise: look for the best schedules of the best pairs of process and sampler.
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
        task = _Task(self, out, spectrum, resolution, checkpoint, data, holdout)
        about = task.work()
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


@dataclass(frozen=True, eq=False)
class _Task:
    """A design at work."""

    run: DesignRun
    out: Path
    spectrum: Spectrum
    resolution: float
    checkpoint: Checkpoint | None
    data: Dataset
    holdout: Dataset | None

    def say(self, line: str) -> None:
        print(line, flush=True)

    def work(self) -> dict[str, Any]:
        """Everything that design.json holds."""
        run, calls = self.run, sorted(set(self.run.calls))
        log = JsonLines(self.out / "design.jsonl")
        self.say(repr(self.spectrum))
        found, refused = classical(
            run.processes, run.samplers, run.grids, calls, self.spectrum, self.resolution, self.say
        )
        there = {c.names[:2] for c in found}
        whys = {(process, sampler): why for (process, sampler, *_), why in refused.items()}
        for (process, sampler), why in whys.items():
            if (process, sampler) not in there:
                self.say(f"left out: {process} with {sampler}: {why}")
        for n in calls:
            if not any(c.budget == n for c in found):
                raise ConfigError(f"calls: no plan fits into {n} calls: {next(iter(refused.values()))}")
        curve = self.loss(log)
        if curve is not None:
            found += self.from_loss(curve, calls)
        for n in calls:
            best = pairs([c for c in found if c.budget == n and c.kind == "classical"], run.metric, run.top)
            if run.optimise:
                found += [c for pair in best if (c := self.optimised(pair, log)) is not None]
            samplers = {c.names[1]: c.sampler for c in best}
            for k in run.channels:
                found += [c for s in samplers.values() if (c := self.searched(k, s, n, log)) is not None]
        return self.about(found, refused, calls, curve)

    # -- slow parts, each kept ---------------------------------------------------------------------------------------

    def kept(self, log: JsonLines, what: str, settings: dict[str, Any], make: Callable[[], dict[str, Any]]) -> Any:
        """What was made with these settings before, or is made now; None, with a line, where it cannot be."""
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        for row in log.rows:
            if row["key"] == key:
                return row["made"]
        clock = time.perf_counter()
        try:
            made = make()
        except ValueError as error:
            self.say(f"left out: {what}: {error}")
            return None
        seconds = time.perf_counter() - clock
        log.append({"key": key, "what": what, "seconds": round(seconds, 2), "settings": settings, "made": made})
        self.say(f"{what}, {seconds:.1f} s")
        return made

    def settings(self, **more: Any) -> dict[str, Any]:
        """What an optimisation depends on."""
        s, run = self.spectrum, self.run
        numbers = torch.stack([s.variance, s._mean, s._count]).numpy().tobytes()
        common = {k: getattr(run, k) for k in ("metric", "trust", "sigma_min", "sigma_max", "iterations")}
        resolution = self.resolution if run.metric == "kl" else None
        return {"spectrum": hashlib.sha256(numbers).hexdigest()[:16], **common, "resolution": resolution, **more}

    def goal(self) -> dict[str, Any]:
        """Arguments that optimisation and search share."""
        names = ("metric", "sigma_max", "sigma_min", "trust", "iterations")
        resolution = self.resolution if self.run.metric == "kl" else None
        return {"spectra": family(self.spectrum), "resolution": resolution} | {k: getattr(self.run, k) for k in names}

    def starts(self, pair: Candidate, sampler: TableSampler) -> list[Grid]:
        """Grids that an optimisation begins from: all that are compared, where they suit the process, and two more."""
        run, own = self.run, pair.sampler.grid
        grids = [*run.grids, LogSigma(run.sigma_min, run.sigma_max), Rho(7.0, run.sigma_min, run.sigma_max)]
        found: dict[str, Grid] = {}
        for grid in grids if own is None else [*grids, own]:
            try:
                grid.times(pair.process, sampler.nodes)
            except ValueError:
                continue
            found.setdefault(str(describe(grid)), grid)
        return list(found.values())

    def optimised(self, pair: Candidate, log: JsonLines) -> Candidate | None:
        sampler = replace(pair.sampler, grid=None)
        starts = self.starts(pair, sampler)

        def make() -> dict[str, Any]:
            design = optimise(pair.process, sampler, **self.goal(), starts=starts)
            return {"sampler": describe(design.sampler)}

        made = self.kept(
            log,
            f"{pair.budget} calls: schedule of {pair.names[1]} on {pair.names[0]}",
            self.settings(process=describe(pair.process), sampler=describe(sampler), starts=describe(starts)),
            make,
        )
        if made is None:
            return None
        found = build(made["sampler"], Sampler)
        return Candidate.of(
            "optimised", pair.budget, pair.process, found, self.spectrum, self.resolution, grid="optimised"
        )

    def searched(self, channels: int, sampler: TableSampler, calls: int, log: JsonLines) -> Candidate | None:
        sampler = replace(sampler, grid=None)

        def make() -> dict[str, Any]:
            design = search(channels, sampler, **self.goal())
            return {"process": describe(design.process), "sampler": describe(design.sampler)}

        name = f"{channels} channel{'s' if channels > 1 else ''}, searched"
        made = self.kept(
            log,
            f"{calls} calls: process of {name} with {label(sampler)}",
            self.settings(channels=channels, sampler=describe(sampler)),
            make,
        )
        if made is None:
            return None
        process, found = build(made["process"], LinearProcess), build(made["sampler"], Sampler)
        return Candidate.of(
            "searched", calls, process, found, self.spectrum, self.resolution, grid="optimised", name=name
        )

    def loss(self, log: JsonLines) -> LossCurve | None:
        """The denoiser's loss, on held-out points if there are any."""
        if self.checkpoint is None:
            return None
        denoiser, source = self.checkpoint.denoiser, self.holdout or self.data
        points = source.draw(torch.arange(min(len(source), _POINTS)), torch.Generator().manual_seed(self.run.seed))
        low, high = math.log(self.run.sigma_min), math.log(self.run.sigma_max)
        levels = torch.linspace(low, high, _LEVELS, dtype=torch.float64).exp()

        def make() -> dict[str, Any]:
            return LossCurve.measure(denoiser, points, levels, seed=self.run.seed, batch=self.run.batch).to_dict()

        digest = hashlib.sha256(self.checkpoint.path.read_bytes() + points.contiguous().numpy().tobytes()).hexdigest()
        settings = {"loss": digest[:16], "levels": levels.tolist(), "seed": self.run.seed, "batch": self.run.batch}
        made = self.kept(log, f"loss of the denoiser on {len(points)} points of {source.name}", settings, make)
        if made is None:
            return None
        sigma, loss, error = (torch.tensor(made[k], dtype=torch.float64) for k in ("sigma", "loss", "std_error"))
        return LossCurve(sigma, loss, error, reference=self.spectrum)

    def from_loss(self, curve: LossCurve, calls: Sequence[int]) -> list[Candidate]:
        """Schedules of least path KL for the samplers that hold the prediction, from the measured loss."""
        found = []
        low = max(self.run.sigma_min, self.resolution)
        for process in self.run.processes:
            # Just inside, for the rounding of the way from a level to its time and back.
            high = min(self.run.sigma_max, (1 - 1e-9) * float(process.sigma(process.horizon)))
            for sampler in self.run.samplers:
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
                                "optimised", n, process, made, self.spectrum, self.resolution, grid="measured loss"
                            )
                        )
        return found

    def verified(self, plans: Sequence[Candidate], best: Sequence[tuple[int, Candidate]]) -> dict[str, Any] | None:
        """The best of each kind, drawn and measured: the samples' distance beside the prediction."""
        if self.checkpoint is None or not self.run.verify:
            return None
        run, n = self.run, self.run.verify
        self.say("training the feature network" if self.data.labels is not None else "measuring by sliced W2")
        judge = Judge.of(self.data, self.holdout, run.seed)
        digest = hashlib.sha256(self.checkpoint.path.read_bytes()).hexdigest()[:16]
        log, rows = JsonLines(self.out / "verify.jsonl"), []
        for i, c in best:
            before = len(log.rows)
            (row,) = compare(
                self.checkpoint.denoiser,
                [Cell(c.process, c.sampler, c.plan, c.budget)],
                judge.distance,
                self.checkpoint.event,
                n=n,
                repeats=_SETS,
                seed=run.seed,
                batch=run.batch,
                log=log,
                identity={**judge.identity, "checkpoint": digest},
            )
            if len(log.rows) > before:
                self.say(f"{c.budget} calls, {c.kind}, {c.title}: {number(row)}")
            rows.append({"plan": i, "distance": row["distance"], "std_error": row["std_error"]})
        caption = f"{judge.caption} {_SETS} sets of {n} samples a plan, mean and standard error."
        if judge.floor is not None and judge.size != n:
            caption += f" The floor is of {judge.size} held-out points, not of sets of {n}, and does not compare."
        return {"measure": judge.measure, "floor": judge.floor, "caption": caption, "rows": rows}

    # -- what is written ---------------------------------------------------------------------------------------------

    def about(
        self,
        found: Sequence[Candidate],
        refused: dict[tuple[str, str, str, int], str],
        calls: Sequence[int],
        curve: LossCurve | None,
    ) -> dict[str, Any]:
        metric, s = self.run.metric, self.spectrum
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
            self.say(f"{n} calls: where the error of the best plan comes from")
            budgets[str(n)] = {"use": place[id(use)], "best": best, **self.sources(use, here, place, curve)}
        left = [
            {"process": p, "sampler": q, "grid": g, "calls": n, "why": why} for (p, q, g, n), why in refused.items()
        ]
        loss = None
        if curve is not None:
            source = self.holdout or self.data
            loss = {**curve.to_dict(), "mmse": s.mmse(curve.sigma).tolist(), "data": source.name}
        spectrum = {"name": s.name, "dim": s.dim, **{k: getattr(s, k).tolist() for k in ("variance", "mean", "count")}}
        return {
            "spectrum": spectrum,
            "metric": metric,
            "resolution": self.resolution,
            "strange": STRANGE,
            "caption": CAVEAT,
            "calls": list(calls),
            "plans": rows,
            "budgets": budgets,
            "left_out": left,
            "loss": loss,
            "verified": self.verified(plans, measured),
        }

    def sources(
        self, use: Candidate, here: Sequence[Candidate], place: dict[int, int], curve: LossCurve | None
    ) -> dict[str, Any]:
        """Where the error of a plan comes from, and its noise levels; the path KL of the best plan that has one."""
        s, process = self.spectrum, use.process
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

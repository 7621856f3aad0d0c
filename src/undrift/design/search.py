r"""Processes that minimise the exact error of a sampler at a given number of calls: how to diffuse, computed.

(D, Q), and on request S, the auxiliaries' start and the clock, of a :class:`~undrift.process.LearnedProcess` are varied
together with the noise levels of the calls, on the objective of :mod:`undrift.design.objective`. The denoiser plays no
part, so the process found serves any denoiser that was trained before.

The objective has many minima, and L-BFGS finds the nearest one. So the search begins at several processes, takes a few
steps from each, and goes on from the best. A process of fewer channels is one of K channels whose others are not
coupled to it. There the objective is even in the coupling, a saddle that no gradient leaves, so the search begins
beside it; and what it was given is among what it chooses from in the end.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from undrift.design.objective import Descent, Metric, Numbers, Objective, Times
from undrift.design.optimise import Design, _begin, _design, _geometric_mean, _resolution, _start
from undrift.design.score_error import ScoreError
from undrift.design.spectrum import Spectrum
from undrift.process.catalog import CLD, HOLD, MALDA, PSLD, VP
from undrift.process.clock import ConstantClock
from undrift.process.learned import LearnedProcess, Part
from undrift.process.linear import LinearProcess
from undrift.process.recipe import Recipe, RecipeProcess
from undrift.sample.grid import Grid, log_linear
from undrift.sample.plan import TableSampler

__all__ = ["search"]

_FLOOR = 1e-4  # least noise in any direction
_COUPLING = 0.25  # of a new auxiliary to the data, in units of the fastest noise


def search(
    process: LearnedProcess | int,
    sampler: TableSampler,
    spectra: Spectrum | Sequence[Spectrum],
    *,
    metric: Metric = "w2",
    sigma_max: float = 80.0,
    sigma_min: float = 0.002,
    resolution: float | None = None,
    error: ScoreError | None = None,
    trust: float = 10.0,
    starts: Sequence[Grid] | None = None,
    candidates: Sequence[RecipeProcess | Design] = (),
    refined: int = 2,
    iterations: int = 300,
    say: Callable[[str], None] | None = None,
) -> Design:
    """The process, with its times, at which a sampler makes the smallest error; the denoiser is not touched.

    Args:
        process: a learned process to begin from, whose ``learn`` says what is free; it is not changed. Or a number of
            channels, to begin at the processes of the catalog that have no more, at a chain, and at two random ones,
            with everything free but the clock.
        sampler, spectra, metric, resolution, error, trust, starts: see :func:`~undrift.design.optimise.optimise`. More
            is free here, and more can be exploited: trust weighs more by default.
        sigma_max: the highest noise level that the denoiser knows: the walk starts no higher.
        sigma_min: lowest noise level.
        candidates: more to begin from, of as many channels or fewer: processes made by the recipe, and designs with
            such processes, whose noise levels, resampled to the calls of this sampler, are begun from too.
        refined: how many of the starts are followed to the end.
        iterations: of L-BFGS, for each of those; a fifteenth of it for each process before, to see which they are. An
            iteration is rarely more than one evaluation of the objective; :attr:`Design.evaluations` counts them.
        say: called with a line of progress.

    Returns:
        The design; its process is a plain :class:`~undrift.process.Recipe`, to be saved and used like any other. Its
        objective is never worse than that of any of ``candidates`` that is a design within the levels. The same
        arguments give the same design.

    Raises:
        ValueError: if there is nothing to learn, a candidate cannot be embedded, the sampler does not apply, or no
            start has a finite error.
    """
    objective = Objective(sampler, spectra, metric, error, trust, _resolution(resolution, metric, sampler, sigma_min))
    if refined < 1 or iterations < 1:
        raise ValueError(f"search: refined and iterations must be at least 1, got {refined} and {iterations}.")
    if isinstance(process, int):
        if process < 1:
            raise ValueError(f"search: a process needs at least one channel, got {process}.")
        channels, learn, floor = process, _parts(process), _FLOOR
        begun = [(label, LearnedProcess.like(p, learn=learn, floor=floor)) for label, p in _catalog(channels)]
    else:
        channels, learn, floor = process.channels, process.learn, process.floor
        if not any(p.requires_grad for p in process.parameters()):
            raise ValueError("search: the process has nothing to learn; name its parts in learn, or use optimise.")
        begun = [("given", copy.deepcopy(process))]

    def free(p: LinearProcess) -> Times:
        return Times.of(p, sampler.nodes, sigma_max, sigma_min, True, sampler.final != "none", changes=True)

    evaluations = 0
    known: list[tuple[float, Recipe, Tensor, tuple[float, ...]]] = []
    runs: list[_Run] = []
    for i, candidate in enumerate(candidates):
        inner = _recipe(candidate.process if isinstance(candidate, Design) else candidate, channels)
        learned = LearnedProcess.like(_embedded(inner, channels, _COUPLING), learn=learn, floor=floor)
        label = f"candidate {i} ({type(candidate.process if isinstance(candidate, Design) else candidate).__name__})"
        begun.append((label, learned))
        times = _times(candidate, inner, sampler.nodes, sigma_max, sigma_min) if isinstance(candidate, Design) else None
        if times is not None:
            with torch.no_grad():
                exact = _embedded(inner, channels, 0.0)
                value, (values, _) = float(objective(exact, times)), objective.report(exact, times)
            evaluations += 1
            if math.isfinite(value):
                known.append((value, exact, times, values))
            run = _Run(label, Descent(objective, learned, free(learned), _parameters(learned)))
            with torch.no_grad():
                levels = inner.sigma(times).clamp(max=0.999 * float(learned.sigma(learned.horizon)))
                start = _start(run.descent, run.descent.numbers(learned.time(levels)))
            if start is not None:
                runs.append(run.at(start))
    failure: ValueError | None = None
    for label, learned in begun:
        try:
            run = _Run(label, Descent(objective, learned, free(learned), _parameters(learned)))
            runs.append(run.at(min(_begin(run.descent, starts), key=lambda start: start[0])))
        except ValueError as error_:
            failure = error_
    if not runs:
        assert failure is not None
        raise failure

    for run in runs:
        run.go(max(1, iterations // 15))
    runs.sort(key=lambda run: run.value)
    for run in runs[:refined]:
        before = run.value
        taken = run.go(iterations)
        if say is not None:
            say(f"{run.label}: objective {run.begun:.4f} -> {before:.4f} -> {run.value:.4f}  ({taken} iterations)")
    evaluations += sum(run.descent.evaluations for run in runs)

    first = min([run.start_values for run in runs] + [values for *_, values in known], key=_geometric_mean)
    best = min(runs, key=lambda run: run.value)
    if known:
        value, exact, times, _ = min(known, key=lambda entry: entry[0])
        if value <= best.value:
            return _design(objective, exact, times, first, evaluations)
    times = best.descent.place(best.numbers)
    assert isinstance(best.descent.process, LearnedProcess)
    return _design(objective, best.descent.process.frozen(), times, first, evaluations)


@dataclass
class _Run:
    """A descent, and how far it has come."""

    label: str
    descent: Descent
    begun: float = math.inf
    value: float = math.inf
    numbers: Numbers = dataclasses.field(default_factory=lambda: torch.zeros(0, dtype=torch.float64).numpy())
    start_values: tuple[float, ...] = ()

    def at(self, start: tuple[float, Numbers, tuple[float, ...]]) -> _Run:
        self.value, self.numbers, self.start_values = start
        self.begun = self.value
        return self

    def go(self, iterations: int) -> int:
        value, numbers, taken = self.descent.run(self.numbers, iterations)
        if value < self.value:
            self.value, self.numbers = value, numbers
        return taken


def _parts(channels: int) -> tuple[Part, ...]:
    return ("Q", "D", "S", "start") if channels > 1 else ("D", "S")


def _parameters(process: LearnedProcess) -> list[torch.nn.Parameter]:
    return [p for p in process.parameters() if p.requires_grad]


def _catalog(channels: int) -> list[tuple[str, RecipeProcess]]:
    """Processes to begin from, all of that many channels."""
    found: list[tuple[str, RecipeProcess]] = [("VP", VP())]
    if channels > 1:
        found += [("CLD", CLD()), ("PSLD", PSLD()), ("MALDA", MALDA(channels - 1)), ("chain", _chain(channels))]
        found += [(f"random {i}", LearnedProcess.random(channels, i, clock=ConstantClock(10.0))) for i in range(2)]
    if channels > 2:
        found.append(("HOLD", HOLD()))
    return [(label, _embedded(process, channels, _COUPLING)) for label, process in found]


def _chain(channels: int) -> Recipe:
    """Like CLD and HOLD, the noise at the end of a chain; a little of it on every channel."""
    q = torch.diag(torch.ones(channels - 1, dtype=torch.float64), -1)
    d = torch.full((channels,), 0.05, dtype=torch.float64)
    d[-1] = 1.0
    return Recipe(torch.diag(d), q - q.mT, clock=ConstantClock(10.0), start_cov=0.04)


def _recipe(process: LinearProcess, channels: int) -> RecipeProcess:
    if not isinstance(process, RecipeProcess):
        raise ValueError(
            f"search: a {type(process).__name__} is not made by the recipe, having no stationary law, and cannot be a "
            "candidate; give VP or another with (D, Q, S)."
        )
    if process.channels > channels:
        raise ValueError(
            f"search: a candidate of {process.channels} channels has no place in a process of {channels}; search for "
            f"{process.channels}, or leave it out."
        )
    return process


def _embedded(process: RecipeProcess, channels: int, coupling: float) -> Recipe:
    """The process with more auxiliaries, coupled to the data if asked.

    No two of them are as quick as each other or the rest: among equals a coupling is a rotation, which changes nothing.
    """
    d, q, s = (m.detach() for m in process.terms())
    start = process.start().detach()[1:, 1:]
    k = len(d)
    rate = float(torch.linalg.eigvalsh(d)[-1])

    more = torch.arange(2, channels - k + 2, dtype=torch.float64)
    d, q, s, start = (
        torch.block_diag(m, torch.diag(fill))
        for m, fill in ((d, rate * more), (q, 0 * more), (s, more / more), (start, 0.25 * more / more))
    )
    q[0, k:], q[k:, 0] = -coupling * rate, coupling * rate
    return Recipe(d, q, s, copy.deepcopy(process.clock), start)


def _times(design: Design, process: RecipeProcess, nodes: int, sigma_max: float, sigma_min: float) -> Tensor | None:
    """The design's times, resampled to so many; None if they leave the range, or cannot be resampled."""
    sigma = design.sigma
    slack = 1 + 1e-9
    if not (float(sigma[0]) <= sigma_max * slack and float(sigma[-1]) * slack >= sigma_min):
        return None
    if len(sigma) != nodes and len(sigma) < 2:
        return None
    with torch.no_grad():
        return process.time(log_linear(sigma, nodes))

r"""Schedules that minimise the exact error of a sampler at a given number of calls.

The law of a plan on a spectrum is exact and differentiable in its times, so the error itself is the objective: no
trajectories, no network, no bound. Over a family of spectra :math:`\Lambda_j` it is

.. math:: \min_{t_0 > \dots > t_N}\ \frac1J \sum_j \ln W_2\bigl(\text{data}_j,\ \text{plan}(t)\bigr)

(or the same of the KL divergence), by L-BFGS in log times. A family keeps a schedule from being fitted to one spectrum
(multistep methods can cancel their errors on a one-parameter spectrum almost entirely, and on no other); it also makes
up for what a spectrum does not say about data that is not Gaussian.

The process can be searched in the same way: :mod:`undrift.design.search`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from undrift.config import describe
from undrift.design.gaussian import Law, propagate
from undrift.design.objective import Descent, Metric, Numbers, Objective, Times
from undrift.design.schedule import Schedule
from undrift.design.score_error import ScoreError
from undrift.design.spectrum import Spectrum
from undrift.process.learned import LearnedProcess
from undrift.process.linear import LinearProcess
from undrift.sample.grid import Given, Grid, LogSigma, Quadratic, Rho
from undrift.sample.plan import Plan, TableSampler

__all__ = ["Design", "Metric", "family", "optimise"]


@dataclass(frozen=True, eq=False)
class Design:
    """A plan that was optimised, with what it is expected to achieve.

    Attributes:
        process: the process, found or given.
        sampler: the sampler, its steps and its noise levels set.
        sigma: noise levels of its times, (N,), decreasing.
        metric: "w2" or "kl".
        values: the metric on each spectrum of the family, in their order.
        start_values: those of the start with the best metric: of a grid, its ends moved inside the range that was
            searched, or of a design that was given to begin from.
        strangeness: summed over the calls, nats per coordinate over the family; well below 1 where the denoiser is
            asked little that it was not trained for. See :func:`~undrift.design.gaussian.strangeness`.
        objective: the mean log of the metric, and ``trust`` times the strangeness: what was minimised, unless another
            sampler decided.
        evaluations: evaluations of the objective with its gradient.
    """

    process: LinearProcess
    sampler: TableSampler
    sigma: Tensor
    metric: Metric
    values: tuple[float, ...]
    start_values: tuple[float, ...]
    strangeness: float
    objective: float
    evaluations: int

    def plan(self) -> Plan:
        """The table of the sampler on the process."""
        return self.sampler.plan(self.process)

    def law(self, spectrum: Spectrum, error: ScoreError | None = None) -> Law:
        """The exact law of the plan's samples for data of another spectrum."""
        return propagate(self.plan(), spectrum, error)

    @property
    def value(self) -> float:
        """Geometric mean of the metric over the family."""
        return _geometric_mean(self.values)

    @property
    def gain(self) -> float:
        """How many times smaller :attr:`value` is than at the best start."""
        return _geometric_mean(self.start_values) / self.value

    @property
    def schedule(self) -> Schedule:
        """The noise levels alone, for other processes, samplers and numbers of steps."""
        name = {"w2": "W2", "kl": "KL"}[self.metric]
        made = f"{type(self.sampler).__name__} on {type(self.process).__name__}"
        return Schedule(self.sigma, self.value, f"{name} of {made}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data; process and sampler as descriptions that :func:`undrift.config.build` reads.

        Raises:
            ConfigError: if the process has no description, such as one on a clock made of a Python function.
        """
        return {
            "process": describe(self.process),
            "sampler": describe(self.sampler),
            "sigma": self.sigma.tolist(),
            "metric": self.metric,
            "values": list(self.values),
            "start_values": list(self.start_values),
            "gain": self.gain,
            "strangeness": self.strangeness,
            "evaluations": self.evaluations,
        }


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(max(v, 1e-150)) for v in values) / len(values))


def family(spectrum: Spectrum, tilts: Sequence[float] = (-0.3, 0.0, 0.3)) -> list[Spectrum]:
    r"""Spectra around one: :math:`\lambda_i^{1 + \tau}`, each scaled to the same trace.

    Args:
        spectrum: the middle of the family.
        tilts: the exponents tau; negative ones are flatter.

    Raises:
        ValueError: if a tilt is -1 or below, or none is given, or all eigenvalues are zero.
    """
    if not tilts or min(tilts) <= -1:
        raise ValueError(f"family: tilts must be above -1, and at least one, got {list(tilts)}.")
    count = spectrum._count
    trace = (count * spectrum.variance).sum()
    if not bool(trace > 0):
        raise ValueError("family: all eigenvalues are zero; a point has no family.")
    members = []
    for tilt in tilts:
        values = torch.where(spectrum.variance > 0, spectrum.variance ** (1 + tilt), 0.0)
        values = values * (trace / (count * values).sum())
        members.append(Spectrum(values, spectrum._mean, count, f"{spectrum.name}, tilt {tilt:+g}"))
    return members


def optimise(
    process: LinearProcess,
    sampler: TableSampler,
    spectra: Spectrum | Sequence[Spectrum],
    *,
    metric: Metric = "w2",
    sigma_max: float | None = None,
    sigma_min: float = 0.002,
    free_start: bool = True,
    free_end: bool | None = None,
    resolution: float | None = None,
    error: ScoreError | None = None,
    trust: float = 3.0,
    by: TableSampler | None = None,
    starts: Sequence[Grid] | None = None,
    iterations: int = 200,
    say: Callable[[str], None] | None = None,
) -> Design:
    """The times at which a sampler makes the smallest error on a family of spectra.

    Args:
        process: any linear process that the sampler applies to; fixed.
        sampler: with its number of steps; its grid is what is looked for.
        spectra: one, or a family; see :func:`family`.
        metric: what to minimise, the geometric mean of it over the family.
        sigma_max: highest noise level; None for what the process reaches, which is never exceeded.
        sigma_min: lowest noise level.
        free_start: let the first time be earlier than that of ``sigma_max``: the walk then starts from the prior at a
            lower level, which costs accuracy at the start, counted exactly, and saves calls.
        free_end: let the last time be later than that of ``sigma_min``; None for so if the sampler ends with a final
            call, which removes the noise left, and not if it ends with noise.
        resolution: noise level added to both laws before they are compared. None for 0, but ``sigma_min`` for the KL of
            a sampler that ends with a prediction: that leaves no noise, and without any the KL would be one of
            directions in which the data hardly varies.
        error: of the denoiser; None for an exact one.
        trust: weight of :func:`~undrift.design.gaussian.strangeness`, summed over the calls, beside the log of the
            metric. Without it (0) errors of several steps may be traded against each other by way of states at which no
            network was ever trained; a closed form does not mind, a network does.
        by: another sampler, of as many times and the same end, whose error decides; the design is for ``sampler`` all
            the same. Multistep methods can make their errors on Gaussian data cancel, and on no other: they do better
            at the levels that are best for ``Exponential(order=1)``, which say where the prediction changes.
        starts: grids to begin from; None for log sigma and rho = 7 over the whole range, log sigma and rho = 3 over a
            part of it, and quadratic.
        iterations: of L-BFGS, for each of the two best starts, and for the way by an optimum without trust.
        say: called with a line of progress.

    Returns:
        The design: its objective (that of ``by``) is never worse than that of any of ``starts``, ends moved inside the
        range. The same arguments give the same design.

    Raises:
        ValueError: if there is nothing to optimise, the sampler does not apply to the process, one of ``starts`` gives
            no times for it, or no start has a finite error.
    """
    fixed = process.frozen() if isinstance(process, LearnedProcess) else process
    end = sampler.final != "none" if free_end is None else free_end
    high = float(fixed.sigma(fixed.horizon).detach()) if sigma_max is None else sigma_max
    deciding = sampler if by is None else by
    if (deciding.nodes, deciding.final) != (sampler.nodes, sampler.final):
        raise ValueError(
            f"optimise: by must take as many times as the sampler, {sampler.nodes}, and end with final="
            f"{sampler.final!r}, got {deciding.nodes} and {deciding.final!r}."
        )
    measure = _resolution(resolution, metric, sampler, sigma_min)
    objective = Objective(deciding, spectra, metric, error, trust, measure)
    times = Times.of(fixed, sampler.nodes, high, sigma_min, free_start, end, changes=False)
    descent = Descent(objective, fixed, times)
    begun = list(_begin(descent, starts))
    best_value, best, _ = min(begun, key=lambda start: start[0])
    followed = sorted(begun, key=lambda start: start[0])[:2]
    if trust:  # far from any optimum strangeness outweighs all else, and may lead where nothing is left to gain
        free = Descent(Objective(deciding, spectra, metric, error, 0.0, measure), fixed, times)
        closest = min(begun, key=lambda start: _geometric_mean(start[2]))
        _, at, _ = free.run(closest[1], iterations)
        followed.append((descent.value(at)[0], at, closest[2]))
        descent.evaluations += free.evaluations
    for value, numbers, _ in followed:
        found, at, taken = descent.run(numbers, iterations)
        if say is not None:
            say(f"objective {value:.4f} -> {found:.4f}  ({taken} iterations)")
        if found < best_value:
            best_value, best = found, at
    first = min((start[2] for start in begun), key=_geometric_mean)
    if by is not None:
        objective = Objective(sampler, spectra, metric, error, trust, measure)
        reports = [objective.report(fixed, descent.place(at))[0] for at in (best, *(start[1] for start in begun))]
        first = min((values for values in reports if all(map(math.isfinite, values))), key=_geometric_mean)
    return _design(objective, fixed, descent.place(best), first, descent.evaluations)


def _resolution(given: float | None, metric: Metric, sampler: TableSampler, sigma_min: float) -> float:
    if given is not None:
        return given
    return sigma_min if metric == "kl" and sampler.final == "predict" else 0.0


def _begin(descent: Descent, starts: Sequence[Grid] | None) -> list[tuple[float, Numbers, tuple[float, ...]]]:
    """Objective, numbers and metrics of each grid; those of the library that do not suit the process left out.

    Raises:
        ValueError: if the sampler does not apply, a grid of the caller's gives no times, or none a finite error.
    """
    process, objective, range_ = descent.process, descent.objective, descent.times
    nodes, begun = objective.sampler.nodes, []
    with torch.no_grad():  # at times that suit any sampler, so that what it says is about the process
        objective.sampler.table(process, range_(process, torch.zeros(range_.size, dtype=torch.float64)))
    for grid in _default_starts(process, range_) if starts is None else starts:
        try:
            with torch.no_grad():
                numbers = descent.numbers(grid.times(process, nodes))
        except ValueError:
            if starts is None:
                continue
            raise
        start = _start(descent, numbers)
        if start is not None:
            begun.append(start)
    if not begun:
        raise ValueError(
            f"design: no start gives {type(objective.sampler).__name__} a finite error on {type(process).__name__}; "
            "give starts, grids for which its walk stays finite."
        )
    return begun


def _start(descent: Descent, numbers: Numbers) -> tuple[float, Numbers, tuple[float, ...]] | None:
    value, _ = descent.value(numbers)
    values, _ = descent.objective.report(descent.process, descent.place(numbers))
    return (value, numbers, values) if all(map(math.isfinite, values)) else None


def _default_starts(process: LinearProcess, times: Times) -> list[Grid]:
    low = times.sigma_min
    high = min(times.sigma_max, float(process.sigma(process.horizon).detach()))
    later = min(low * 5, 0.5 * high)
    return [
        LogSigma(low, high),
        Rho(7.0, low, high),
        LogSigma(later, max(high / 5, 2 * later)),
        Rho(3.0, later, max(high / 2, 2 * later)),
        Quadratic(),
    ]


def _design(
    objective: Objective, process: LinearProcess, times: Tensor, start_values: tuple[float, ...], evaluations: int
) -> Design:
    with torch.no_grad():
        sigma = process.sigma(times)
        value = float(objective(process, times))
    values, strange = objective.report(process, times)
    sampler = dataclasses.replace(objective.sampler, grid=Given(sigma.tolist(), sigma=True))
    return Design(process, sampler, sigma, objective.metric, values, start_values, strange, value, evaluations)

r"""Schedules, and processes, that minimise the exact error of a sampler at a given number of calls.

The law of a plan on a spectrum is exact and differentiable in its times and in the process, so the error itself is the
objective: no trajectories, no network, no bound. Over a family of spectra :math:`\Lambda_j` it is

.. math:: \min_{t_0 > \dots > t_N,\ \theta}\ \frac1J \sum_j \ln W_2\bigl(\text{data}_j,\ \text{plan}(t, \theta)\bigr)

(or the same of the KL divergence), by L-BFGS in log times. A family keeps a schedule from being fitted to one spectrum
(multistep methods can cancel their errors on a one-parameter spectrum almost entirely, and on no other); it also makes
up for what a spectrum does not say about data that is not Gaussian.

The process is searched in the same way: (D, Q), and on request S, the auxiliaries' start and the clock, of a
:class:`~undrift.process.LearnedProcess`, together with the times. The denoiser plays no part, so the process found
serves any denoiser that was trained before.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from undrift.design.gaussian import Law, propagate, strangeness
from undrift.design.score_error import ScoreError
from undrift.design.spectrum import Spectrum
from undrift.process.learned import LearnedProcess
from undrift.process.linear import LinearProcess
from undrift.sample.grid import Given, Grid, LogSigma, Quadratic, Rho
from undrift.sample.plan import Plan, TableSampler

__all__ = ["Design", "Metric", "family", "optimise", "search"]

Metric = Literal["w2", "kl"]

_GROUPS = 40  # eigenvalues a spectrum is reduced to while it is optimised for
_WALL = 1e6  # value of a plan that does not stay finite


@dataclass(frozen=True, eq=False)
class Design:
    """A plan that was optimised, with what it is expected to achieve.

    Attributes:
        process: the process, found or given.
        sampler: the sampler, its steps and its noise levels set.
        sigma: noise levels of its times, (N,), decreasing.
        metric: "w2" or "kl".
        values: the metric on each spectrum of the family, in their order.
        start_values: those of the best grid that the search began with, its ends moved to those the search holds.
        evaluations: evaluations of the objective with its gradient.
    """

    process: LinearProcess
    sampler: TableSampler
    sigma: Tensor
    metric: Metric
    values: tuple[float, ...]
    start_values: tuple[float, ...]
    evaluations: int

    def plan(self) -> Plan:
        """The table of the sampler on the process."""
        return self.sampler.plan(self.process)

    def law(self, spectrum: Spectrum, error: ScoreError | None = None) -> Law:
        """The exact law of the plan's samples for data of another spectrum."""
        return propagate(self.plan(), spectrum, error)

    @property
    def gain(self) -> float:
        """Geometric mean, over the family, of how many times smaller the metric is than with the best first grid."""
        pairs = zip(self.start_values, self.values, strict=True)
        return math.exp(sum(math.log(a / b) for a, b in pairs) / len(self.values))


def family(spectrum: Spectrum, tilts: Sequence[float] = (-0.3, 0.0, 0.3)) -> list[Spectrum]:
    r"""Spectra around one: :math:`\lambda_i^{1 + \tau}`, each scaled to the same trace.

    Args:
        spectrum: the middle of the family.
        tilts: the exponents tau; negative ones are flatter.

    Raises:
        ValueError: if a tilt is -1 or below, or none is given.
    """
    if not tilts or min(tilts) <= -1:
        raise ValueError(f"family: tilts must be above -1, and at least one, got {list(tilts)}.")
    count = spectrum._count
    trace = (count * spectrum.variance).sum()
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
    error: ScoreError | None = None,
    trust: float = 3.0,
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
        sigma_max: highest noise level; None for what the process reaches, but not more than 80.
        sigma_min: lowest noise level.
        free_start: let the first time be earlier than that of ``sigma_max``: the walk then starts from the prior at a
            lower level, which costs accuracy at the start, counted exactly, and saves calls.
        free_end: let the last time be later than that of ``sigma_min``; None for so if the sampler ends with a final
            call, which removes the noise left, and not if it ends with noise.
        error: of the denoiser; None for an exact one.
        trust: weight of :func:`~undrift.design.gaussian.strangeness`, summed over the calls, beside the log of the
            metric. Without it (0) errors of several steps may be traded against each other by way of states at which no
            network was ever trained; a closed form does not mind, a network does.
        starts: grids to begin from; None for log sigma, rho = 7, quadratic, and log sigma from a fifth of the level.
        iterations: of L-BFGS, for each of the two best starts.
        say: called with a line of progress.

    Returns:
        The design: its objective is never worse than that of any of ``starts``.

    Raises:
        ValueError: if there is nothing to optimise, or no start gives a finite error.
    """
    times = _Times(process, sampler, sigma_max, sigma_min, free_start, free_end)
    return _run(process, sampler, _listed(spectra), metric, error, trust, times, starts, [], iterations, say)


def search(
    process: LearnedProcess | int,
    sampler: TableSampler,
    spectra: Spectrum | Sequence[Spectrum],
    *,
    metric: Metric = "w2",
    sigma_max: float = 80.0,
    sigma_min: float = 0.002,
    error: ScoreError | None = None,
    trust: float = 3.0,
    starts: Sequence[Grid] | None = None,
    iterations: int = 300,
    say: Callable[[str], None] | None = None,
) -> Design:
    """The process, with its times, at which a sampler makes the smallest error; the denoiser is not touched.

    Args:
        process: a learned process to begin from, whose ``learn`` says what is free; or a number of channels, for one
            that begins near VP or CLD with everything free but the clock, which the times make redundant.
        sampler, spectra, metric, error, trust, starts, iterations, say: see :func:`optimise`.
        sigma_max: the highest noise level that the denoiser knows: the walk starts no higher.
        sigma_min: lowest noise level.

    Returns:
        The design; its process is a plain :class:`~undrift.process.Recipe`, to be saved and used like any other.
    """
    begun = _near_catalog(process) if isinstance(process, int) else process
    kept = {name: value.detach().clone() for name, value in begun.state_dict().items()}
    parameters = [p for p in begun.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("search: the process has nothing to learn; name its parts in learn, or use optimise.")
    times = _Times(begun, sampler, sigma_max, sigma_min, True, None, fixed=False)
    try:
        found = _run(begun, sampler, _listed(spectra), metric, error, trust, times, starts, parameters, iterations, say)
        return dataclasses.replace(found, process=begun.frozen())
    finally:
        begun.load_state_dict(kept)


def _near_catalog(channels: int) -> LearnedProcess:
    """VP for one channel; otherwise a chain like CLD's or HOLD's, a little noise on every channel."""
    if channels < 1:
        raise ValueError(f"search: a process needs at least one channel, got {channels}.")
    q = torch.zeros(channels, channels, dtype=torch.float64)
    for i in range(channels - 1):
        q[i, i + 1], q[i + 1, i] = -1.0, 1.0
    d = torch.full((channels,), 0.05, dtype=torch.float64)
    d[-1] = 1.0 if channels > 1 else 0.5
    from undrift.process.clock import ConstantClock

    learn = ("Q", "D", "start") if channels > 1 else ("D", "S")
    return LearnedProcess(
        channels, q, torch.diag(d), start_cov=0.04, clock=ConstantClock(10.0), learn=learn, floor=1e-4
    )


def _listed(spectra: Spectrum | Sequence[Spectrum]) -> list[Spectrum]:
    found = [spectra] if isinstance(spectra, Spectrum) else list(spectra)
    if not found:
        raise ValueError("optimise: give at least one spectrum.")
    return [s.grouped(_GROUPS) for s in found]


class _Times:
    """Decreasing log times from unconstrained numbers, and back: a start, an end, and shares of what lies between."""

    def __init__(
        self,
        process: LinearProcess,
        sampler: TableSampler,
        sigma_max: float | None,
        sigma_min: float,
        free_start: bool,
        free_end: bool | None,
        fixed: bool = True,
    ) -> None:
        self.process, self.nodes, self.levels = process, sampler.nodes, None
        with torch.no_grad():
            top = float(process.sigma(process.horizon))
        high = min(top, 80.0) if sigma_max is None else sigma_max
        if not 0 < sigma_min < high:
            raise ValueError(f"optimise: needs 0 < sigma_min < sigma_max, got {sigma_min:g} and {high:g}.")
        self.free_start = free_start
        self.free_end = sampler.final != "none" if free_end is None else free_end
        self.sigma_max, self.sigma_min = min(high, top) if fixed else high, sigma_min
        if fixed:
            with torch.no_grad():
                low, up = process.time(torch.tensor([sigma_min, self.sigma_max], dtype=torch.float64)).log().tolist()
        else:  # the process changes: any time may come to stand for any level, and a wall keeps to the levels
            low, up = math.log(1e-6 * process.horizon), math.log(process.horizon)
        self.fixed, self.low, self.high = fixed, low, up
        self.size = max(0, self.nodes - 1) + int(self.free_start) + int(self.free_end)
        if self.nodes < 2 and not (self.free_start or self.free_end):
            raise ValueError("optimise: one call at a fixed time leaves nothing to optimise.")

    def __call__(self, v: Tensor) -> Tensor:
        """Times (N,) of the numbers (size,)."""
        span = self.high - self.low
        start = torch.as_tensor(self.high, dtype=torch.float64)
        end = torch.as_tensor(self.low, dtype=torch.float64)
        if self.free_start:
            v, raw = v[:-1], v[-1]
            start = self.high - span * torch.sigmoid(raw)
        if self.nodes == 1:
            return (end if not self.free_start else start).exp().reshape(1)
        if self.free_end:
            v, raw = v[:-1], v[-1]
            end = self.low + (start - self.low) * torch.sigmoid(raw)
        # A floor under the shares keeps steps from vanishing, where tables have no limit.
        share = 1e-4 + (1 - 1e-4 * (self.nodes - 1)) * v.softmax(0)
        inner = start - (start - end) * share.cumsum(0)
        return torch.cat([start.reshape(1), inner]).exp()

    def back(self, times: Tensor) -> Tensor:
        """The numbers that give these times, ends moved inside the range."""
        log_t = times.log().clamp(self.low, self.high)
        span, tiny = self.high - self.low, 1e-3
        parts = []

        def logit(u: float) -> Tensor:
            u = min(max(u, tiny), 1 - tiny)
            return torch.tensor([math.log(u / (1 - u))], dtype=torch.float64)

        start = float(log_t[0]) if self.free_start else self.high
        if self.nodes > 1:
            end = float(log_t[-1]) if self.free_end else self.low
            share = (-log_t.diff() / max(start - end, 1e-12)).clamp(min=2e-4)
            share = ((share / share.sum() - 1e-4) / (1 - 1e-4 * (self.nodes - 1))).clamp(min=1e-6)
            parts.append(share.log())
            if self.free_end:
                parts.append(logit((end - self.low) / max(start - self.low, 1e-12)))
        if self.free_start:
            parts.append(logit((self.high - start) / span))
        return torch.cat(parts)

    def wall(self, times: Tensor) -> Tensor:
        """Penalty on levels outside [sigma_min, sigma_max], for a process that changes."""
        if self.fixed:
            return torch.zeros((), dtype=torch.float64)
        ends = self.process.sigma(times[[0, -1]]).log()
        over = (ends[0] - math.log(self.sigma_max)).clamp(min=0)
        under = (math.log(self.sigma_min) - ends[1]).clamp(min=0)
        return 10 * (over.square() + under.square())


def _default_starts(process: LinearProcess, sigma_min: float, sigma_max: float) -> list[Grid]:
    low = min(sigma_min * 5, 0.5 * sigma_max)
    return [
        LogSigma(sigma_min, sigma_max),
        Rho(7.0, sigma_min, sigma_max),
        LogSigma(low, max(sigma_max / 5, 2 * low)),
        Rho(3.0, low, max(sigma_max / 2, 2 * low)),
        Quadratic(),
    ]


def _logs(plan: Plan, spectra: list[Spectrum], joined: Spectrum, metric: Metric, error: ScoreError | None) -> Tensor:
    """Log of the metric on each spectrum, (J,)."""
    if error is None:
        law = propagate(plan, joined)
        each = joined._count * (law.w2_modes if metric == "w2" else law.kl_modes)
        sums = torch.stack([part.sum() for part in each.split([len(s.variance) for s in spectra])])
    else:
        laws = [propagate(plan, s, error) for s in spectra]
        sums = torch.stack([law.w2.square() if metric == "w2" else law.kl for law in laws])
    return sums.clamp(min=1e-300).log() * (0.5 if metric == "w2" else 1.0)


def _run(
    process: LinearProcess,
    sampler: TableSampler,
    spectra: list[Spectrum],
    metric: Metric,
    error: ScoreError | None,
    trust: float,
    times: _Times,
    starts: Sequence[Grid] | None,
    parameters: list[torch.nn.Parameter],
    iterations: int,
    say: Callable[[str], None] | None,
) -> Design:
    if metric not in ("w2", "kl"):
        raise ValueError(f"optimise: metric must be 'w2' or 'kl', got {metric!r}.")
    joined = Spectrum(
        torch.cat([s.variance for s in spectra]),
        torch.cat([s._mean for s in spectra]),
        torch.cat([s._count for s in spectra]),
    )
    sizes = [p.numel() for p in parameters]
    count = 0

    def place(v: Tensor) -> None:
        for p, part in zip(parameters, v.split(sizes), strict=True) if parameters else ():
            p.data.copy_(part.reshape(p.shape))

    def logs(at: Tensor) -> Tensor:
        return _logs(sampler.table(process, at), spectra, joined, metric, error)

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal count
        count += 1
        v = torch.from_numpy(flat.copy())
        place(v[times.size :])
        raw = v[: times.size].requires_grad_(True)
        try:
            at = times(raw)
            plan = sampler.table(process, at)
            value = _logs(plan, spectra, joined, metric, error).mean() + times.wall(at)
            if trust:
                value = value + trust * strangeness(plan, joined, error).sum()
            gradients = torch.autograd.grad(value, [raw, *parameters], allow_unused=True)
        except (ValueError, torch.linalg.LinAlgError):  # times that coincide, or a process on the brink
            return _WALL, np.zeros_like(flat)
        flat_gradient = torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).flatten()
                for g, p in zip(gradients, [raw, *parameters], strict=True)
            ]
        )
        if not (bool(value.isfinite()) and bool(flat_gradient.isfinite().all())):
            return _WALL, np.zeros_like(flat)
        return float(value.detach()), flat_gradient.numpy()

    begun = torch.cat([p.detach().flatten() for p in parameters]) if parameters else torch.zeros(0, dtype=torch.float64)
    found: list[tuple[float, np.ndarray]] = []
    first: list[tuple[float, Tensor]] = []
    for grid in starts or _default_starts(process, times.sigma_min, times.sigma_max):
        try:
            with torch.no_grad():
                raw = times.back(grid.times(process, sampler.nodes))
                exact = logs(times(raw))
            flat = torch.cat([raw, begun]).numpy()
        except ValueError:
            continue
        if bool(exact.isfinite().all()):
            first.append((float(exact.mean()), exact))
            found.append((objective(flat)[0], flat))
    if not found:
        raise ValueError("optimise: no starting grid gives this sampler a finite error on this process; give starts.")
    best_value, best = min(found, key=lambda pair: pair[0])
    for value, flat in sorted(found, key=lambda pair: pair[0])[:2]:
        result = minimize(objective, flat, jac=True, method="L-BFGS-B", options={"maxiter": iterations, "maxcor": 20})
        if say is not None:
            say(f"{metric} objective {value:.4f} -> {min(result.fun, value):.4f}  ({result.nit} iterations)")
        if result.fun < best_value:
            best_value, best = float(result.fun), result.x
    _, start_logs = min(first, key=lambda pair: pair[0])
    v = torch.from_numpy(best.copy())
    place(v[times.size :])
    with torch.no_grad():
        at = times(v[: times.size])
        sigma = process.sigma(at)
        ends = logs(at)
    return Design(
        process=process,
        sampler=dataclasses.replace(sampler, grid=Given(sigma.tolist(), sigma=True)),
        sigma=sigma,
        metric=metric,
        values=tuple(ends.exp().tolist()),
        start_values=tuple(start_logs.exp().tolist()),
        evaluations=count,
    )

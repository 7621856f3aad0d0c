r"""Langevin on paths of densities: coverage, weights and evidence on Gaussian mixtures, beside earlier values.

What a path through dilated densities is good for, and what it is not. Every cell of table 2.2 spends K = 1000 gradients
a draw, of 2.3 ten times that; 2.4 is in ten dimensions; 2.5 weighs particles and estimates log Z. Earlier values, of
another implementation with three replicates, stand beside ours, with their difference in standard errors of both.

    TV      half the sum of |share of draws nearest to each mode - its true share|, by largest responsibility
    modes   those with more than a fifth of their share
    ED      unbiased energy distance, 1000 draws against 1500 exact ones; its floor is 0 within 0.03
    Delta   log of Z^ / Z; log Z is 3, and known to no method

Each replicate has 1000 draws (2.5: 2000). s is the root mean square of the target about the origin, which only the rows
that name it are told; L is that of the narrowest mode. Finished cells are kept in --out and not run again.

    python bench/density_tables.py                                # everything: an hour or more on one core
    python bench/density_tables.py --only 2.2 --targets T2 T16w   # minutes
    python bench/density_tables.py --print                        # the tables from what has been run
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from undrift.density import (
    AIS,
    MALA,
    MCMC,
    SMC,
    ULA,
    Affine,
    AnnealedLangevin,
    Annealing,
    Cycle,
    Dilation,
    DilationLangevin,
    Direct,
    Draws,
    FixedLevels,
    FixedStep,
    Geometric,
    ImportanceSampling,
    Independence,
    Langevin,
    Normal,
    ScoreNorm,
    SignalToNoise,
    Smoothness,
    TemperedDilation,
    Tilt,
)
from undrift.density import Path as DensityPath
from undrift.density.coordinates import spread
from undrift.density.move import State
from undrift.density.step import StepRule
from undrift.density.targets import Grid16, Mixture40, TwoModes
from undrift.density.tempering import ParallelTempering
from undrift.measure import energy_distance
from undrift.measure.evidence import mode_weights, total_variation

PARTICLES, LOG_Z, FLOOR = 1000, 3.0, 0.051


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A target with the facts that some rows are told."""

    target: Any

    @cached_property
    def exact(self) -> Tensor:
        return self.target.sample(400_000, 12345)

    @cached_property
    def truth(self) -> Tensor:
        """Share of exact draws nearest to each mode, which differs from the weights where modes overlap."""
        return mode_weights(self.target.assign(self.exact), len(self.target.mode_weights))

    @cached_property
    def smoothness(self) -> float:
        return 1 / float(self.target._mixture.covs.min())

    @property
    def tail(self) -> float:
        return float(self.target._mixture.covs.max()) ** 0.5

    def rms(self, reduce: str = "mean") -> float:
        axes = self.exact.square().mean(0)
        return float(axes.mean() if reduce == "mean" else axes.max()) ** 0.5


CASES = {
    "T2": Case(TwoModes(log_z=LOG_Z)),
    "T16w": Case(Grid16(log_z=LOG_Z)),
    "T40": Case(Mixture40(log_z=LOG_Z)),
    "T40u": Case(Mixture40(unequal=True, log_z=LOG_Z)),
    "T40s": Case(Mixture40(shift=-50.0, log_z=LOG_Z)),
    "T16d10": Case(Grid16(dim=10, log_z=LOG_Z)),
}


@dataclasses.dataclass
class Outcome:
    """x (replicates, n, d), log weights (replicates, n) or None, evaluations a draw, what the run says of itself."""

    x: Tensor
    log_weights: Tensor | None
    evaluations: float
    log_z: list[float] | None = None
    levels: int = 0


Row = Callable[[Case, int, int, int], Outcome]  # case, K, replicates, seed


def outcome(draws: Draws, evaluations: float | None = None) -> Outcome:
    replicates, walkers = draws.states.shape[:2]
    spent = draws.evaluations.total / (replicates * walkers) if evaluations is None else evaluations
    log_z = None if draws.repeat_log_z is None else draws.repeat_log_z.tolist()
    return Outcome(draws.states[:, :, -1], draws.walker_log_weights, spent, log_z, len(draws.levels))


def method(build: Callable[[Case, int], Annealing]) -> Row:
    """A row that is one run of the library."""

    def run(case: Case, k: int, replicates: int, seed: int) -> Outcome:
        made = build(case, k)
        if made.coordinates is None:
            made = dataclasses.replace(made, smoothness=case.smoothness)
        return outcome(made.run(case.target, replicates * PARTICLES, seed, repeats=replicates))

    return run


def draws_of(sample: Callable[[Case, int, torch.Generator], Tensor]) -> Row:
    """A row without dynamics."""

    def run(case: Case, k: int, replicates: int, seed: int) -> Outcome:
        x = sample(case, replicates * PARTICLES, torch.Generator().manual_seed(seed))
        return Outcome(x.reshape(replicates, PARTICLES, -1), None, 0.0)

    return run


def normal(std: float) -> Row:
    return draws_of(lambda c, n, g: Normal(std).sample(n, c.target.dim, g, torch.float64))


def dilation(k: int, floor: float = 0.0) -> Dilation:
    """lambda = (i + 1) / K, clipped from below; the start is N(0, lambda_0) in x."""
    return Dilation(first=1 / k, floor=floor)


def dilated(step: StepRule, floor: float = 0.0) -> Row:
    return method(lambda c, k: DilationLangevin(path=dilation(k, floor), levels=FixedLevels(k), step=step))


def unadjusted(path: Callable[[Case, int], DensityPath], relative: float = 0.1) -> Row:
    """One ULA step of a given relative size on each of K levels."""
    return method(
        lambda c, k: Annealing(path(c, k), ULA(), FixedLevels(k), moves=1, step=Smoothness(relative), resampling=None)
    )


def geometric(std: Callable[[Case], float]) -> Row:
    return method(  # K + 1 levels: nothing moves at the first, which is the base law itself
        lambda c, k: AnnealedLangevin(
            path=Geometric(Normal(std(c))), levels=FixedLevels(k + 1), step=Smoothness(0.1), resampling=None
        )
    )


def langevin(std: Callable[[Case], float]) -> Row:
    return method(lambda c, k: Langevin(path=Direct(Normal(std(c))), moves=k, step=Smoothness(0.1)))


def mala(std: Callable[[Case], float]) -> Row:
    return method(lambda c, k: MCMC(path=Direct(Normal(std(c))), move=MALA(), moves=k, keep=1))


def corrected_dilation(jumps: bool) -> Row:
    def build(c: Case, k: int) -> Annealing:
        move = Cycle((MALA(),) * 4 + (Independence(Normal(c.rms())),)) if jumps else MALA()
        return DilationLangevin(path=dilation(k), move=move, levels=FixedLevels(k), step=Smoothness(1.0), weights=False)

    return method(build)


def steps(case: Case, y: Tensor, sizes: list[float], generator: torch.Generator) -> Tensor:
    """ULA on the target itself, with given steps."""
    density, state = Direct().density(case.target, 1.0), State(y)
    for size in sizes:
        state, _ = ULA().step(density, state, lambda _, size=size: torch.tensor(size, dtype=y.dtype), generator)
    return state.y


def annealed_steps(case: Case, k: int, replicates: int, seed: int) -> Outcome:
    """No dilation: only its steps, h = 0.1 / (L lambda)."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [0.1 / case.smoothness / max((i + 1) / k, FLOOR) for i in range(k)]
    y = Normal().sample(replicates * PARTICLES, case.target.dim, generator, torch.float64)
    return Outcome(steps(case, y, sizes, generator).reshape(replicates, PARTICLES, -1), None, k)


def polished(case: Case, k: int, replicates: int, seed: int) -> Outcome:
    """The last twentieth of the budget cools the walkers."""
    last = k // 20
    first = dilated(ScoreNorm())(case, k - last, replicates, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    x = steps(case, first.x.flatten(0, 1), [0.1 / case.smoothness] * last, generator)
    return Outcome(x.reshape(first.x.shape), None, k)


def explored(case: Case, k: int, replicates: int, seed: int) -> Outcome:
    """A twentieth of the draws explore; their mean and covariance are the coordinates of a geometric SMC.

    No width is told to it. Half of the budget goes to the explorer at most.
    """
    explorer = DilationLangevin(path=dilation(k // 2), levels=FixedLevels(k // 2), smoothness=case.smoothness)
    found = explorer.run(case.target, max(200, replicates * PARTICLES // 20), seed, repeats=1)
    loc, scale = spread(found.x)
    draws = SMC(coordinates=Affine(loc, scale)).run(case.target, replicates * PARTICLES, seed, repeats=replicates)
    total = found.evaluations.total + draws.evaluations.total
    return outcome(draws, total / (replicates * PARTICLES))


def tempering(std: Callable[[Case], float], whitened: bool = False) -> Row:
    """As many ladders of ten levels as draws, K / 10 exchanges, the last state of each ladder."""

    def run(case: Case, k: int, replicates: int, seed: int) -> Outcome:
        loc, scale = spread(case.exact)
        made = ParallelTempering(
            path=Geometric(Normal(1.0 if whitened else std(case))),
            levels=10,
            moves=1,
            iterations=k // 10,
            thin=k // 20,
            coordinates=Affine(loc, scale) if whitened else None,
        )
        return outcome(made.run(case.target, replicates * PARTICLES, seed, repeats=replicates))

    return run


def smc(path: Callable[[Case], DensityPath]) -> Row:
    return method(lambda c, k: SMC(path=path(c)))


def ais(path: Callable[[Case], DensityPath]) -> Row:
    return method(lambda c, k: AIS(path=path(c), levels=FixedLevels(k)))


ROWS: dict[str, Row] = {
    "exact draws": draws_of(lambda c, n, g: c.target.sample(n, g)),
    "N(0, s²), no dynamics": draws_of(lambda c, n, g: Normal(c.rms()).sample(n, c.target.dim, g, torch.float64)),
    "ULA from N(0, 1)": langevin(lambda c: 1.0),
    "ULA from N(0, s²)": langevin(Case.rms),
    "MALA from N(0, 1)": mala(lambda c: 1.0),
    "MALA from N(0, s²)": mala(Case.rms),
    "geometric ULA, N(0, 1)": geometric(lambda c: 1.0),
    "geometric ULA, N(0, s²)": geometric(Case.rms),
    "geometric ULA, s largest": geometric(lambda c: c.rms("max")),
    "dilation, fixed step, λ ≥ .051": dilated(FixedStep(0.1), FLOOR),
    "dilation, fixed step, λ ≥ .2": dilated(FixedStep(0.1), 0.2),
    "dilation, fixed step, no clip": dilated(FixedStep(0.1)),
    "dilation, smoothness .1": dilated(Smoothness(0.1)),
    "dilation, smoothness 1": dilated(Smoothness(1.0)),
    "dilation, smoothness 1.9": dilated(Smoothness(1.9)),
    "dilation, smoothness .1, log": unadjusted(lambda c, k: Dilation(first=1e-6, spacing="log")),
    "dilation, score norm .1": dilated(ScoreNorm(0.1)),
    "dilation, score norm 1": dilated(ScoreNorm(1.0)),
    "dilation, score norm 1, cooled": polished,
    "dilation, signal to noise .16": dilated(SignalToNoise(0.16)),
    "dilation, MALA, smoothness 1": corrected_dilation(jumps=False),
    "dilation, MALA and jumps": corrected_dilation(jumps=True),
    "tilt, κ from 100 L to 1e-4 L": unadjusted(lambda c, k: Tilt(100 * c.smoothness, 1e-4 * c.smoothness)),
    "ULA with the steps of dilation": annealed_steps,
    "tempered dilation, linear": unadjusted(lambda c, k: TemperedDilation(first=1 / k, tail=k**-0.5)),
    "tempered dilation, quadratic": unadjusted(
        lambda c, k: TemperedDilation(first=1 / k**2, spacing="quadratic", tail=k**-0.5)
    ),
    "parallel tempering, N(0, s²)": tempering(Case.rms),
    "parallel tempering, s largest": tempering(lambda c: c.rms("max")),
    "parallel tempering, whitened": tempering(Case.rms, whitened=True),
    "AIS geometric, N(0, s²)": ais(lambda c: Geometric(Normal(c.rms()))),
    "AIS tempered dilation": ais(lambda c: TemperedDilation(first=1e-3, tail=c.tail)),
    "SMC geometric, N(0, s²)": smc(lambda c: Geometric(Normal(c.rms()))),
    "SMC tempered dilation": smc(lambda c: TemperedDilation(first=1e-3, tail=c.tail)),
    "dilation explores, then SMC": explored,
}


def weighed(build: Callable[[Case], Annealing]) -> Row:
    """A row of table 2.5: every replicate is a run of its own, which adapts on its way."""

    def run(case: Case, n: int, replicates: int, seed: int) -> Outcome:
        made = dataclasses.replace(build(case), smoothness=case.smoothness, pilot=False)
        runs = [outcome(made.run(case.target, n, seed + i, repeats=1)) for i in range(replicates)]
        assert all(r.log_weights is not None and r.log_z is not None for r in runs)
        return Outcome(
            torch.cat([r.x for r in runs]),
            torch.cat([r.log_weights for r in runs if r.log_weights is not None]),
            statistics.mean(r.evaluations for r in runs),
            [r.log_z[0] for r in runs if r.log_z is not None],
            round(statistics.mean(r.levels for r in runs)),
        )

    return run


def covering(case: Case) -> float:
    """s; in ten dimensions, where axes differ, the largest of them."""
    return case.rms("max" if case.target.dim > 2 else "mean")


WEIGHED: dict[str, Row] = {
    "importance sampling, N(0, s²)": weighed(lambda c: ImportanceSampling(path=Direct(Normal(covering(c))))),
    "SMC geometric, N(0, s²)": weighed(lambda c: SMC(path=Geometric(Normal(covering(c))))),
    "SMC geometric, N(0, 1)": weighed(lambda c: SMC()),
    "SMC dilation, N(0, s²)": weighed(lambda c: SMC(path=Dilation(first=0.01, base=Normal(covering(c))))),
    "SMC tilt, κ from 100 L": weighed(lambda c: SMC(path=Tilt(100 * c.smoothness, 1e-4 * c.smoothness))),
    "SMC tempered dilation": weighed(lambda c: SMC(path=TemperedDilation(first=1e-3, tail=c.tail))),
}

# -- earlier values ----------------------------------------------------------------------------------------------------

_N = None
# TV, modes covered, energy distance on T2 (TV only), T16w, T40, T40u, T40s at K = 1000
EARLIER: dict[str, list[tuple[Any, ...]]] = {
    "exact draws": [(0.007,), (0.049, 16, -0.01), (0.081, 40, -0.03), (0.063, 40, -0.03), (0.081, 40, -0.03)],
    "N(0, s²), no dynamics": [(0.385,), (0.303, 16, 2.29), (0.280, 37, 1.05), (0.484, 34, 2.43), (0.622, 23, 36.9)],
    "ULA from N(0, 1)": [(0.306,), (0.750, 4, 4.65), (0.899, 5, 14.5), (0.925, 7, 16.9), (0.971, 1, 34.6)],
    "ULA from N(0, s²)": [(0.384,), (0.303, 16, 2.27), (0.242, 39, 0.80), (0.332, 39, 2.40), (0.579, 26, 16.3)],
    "MALA from N(0, 1)": [(0.307,), (0.751, 4, 4.67), (0.919, 3, 15.0), (0.689, 19, 13.3), (0.975, 1, 34.8)],
    "MALA from N(0, s²)": [(0.384,), (0.304, 16, 2.26), (0.234, 40, 0.79), (0.256, 39, 2.46), (0.579, 27, 16.4)],
    "geometric ULA, N(0, 1)": [(0.160,), (0.751, 4, 4.32), (0.924, 3, 16.1), (0.952, 3, 17.1), (0.975, 1, 35.2)],
    "geometric ULA, N(0, s²)": [(0.285,), (0.271, 16, 1.63), (0.227, 40, 0.72), (0.338, 39, 2.35), (0.392, 34, 8.27)],
    "dilation, fixed step, λ ≥ .051": [
        (0.336,), (0.249, 16, 1.42), (0.468, 25, 5.30), (0.902, 8, 16.4), (0.419, 29, 3.67)],
    "dilation, fixed step, λ ≥ .2": [
        (0.289,), (0.745, 4, 4.60), (0.844, 8, 13.8), (0.913, 7, 16.7), (0.964, 2, 34.6)],
    "dilation, fixed step, no clip": [
        (0.493,), (0.541, 12, 3.12), (0.770, 12, 24.4), (0.710, 14, 9.89), (0.892, 4, 55.3)],
    "dilation, smoothness .1": [(0.272,), (0.750, 4, 4.61), (0.908, 4, 14.6), (0.944, 4, 17.1), (0.972, 1, 34.8)],
    "dilation, smoothness 1": [(0.222,), (0.475, 13, 2.58), (0.626, 19, 7.87), (0.812, 13, 14.6), (0.807, 9, 23.2)],
    "dilation, smoothness 1.9": [(), (0.234, 16, _N), (), (), ()],
    "dilation, smoothness .1, log": [
        (0.304,), (0.751, 4, 4.92), (0.920, 3, 14.9), (0.962, 3, 18.1), (0.975, 1, 36.5)],
    "dilation, score norm .1": [(0.308,), (0.642, 8, 3.89), (0.770, 10, 11.3), (0.917, 6, 16.9), (0.947, 2, 33.9)],
    "dilation, score norm 1": [(0.216,), (0.166, 16, 0.86), (0.131, 40, 0.26), (0.345, 31, 4.42), (0.219, 40, 2.41)],
    "dilation, score norm 1, cooled": [(), (0.175, _N, 0.92), (0.146, _N, _N), (), ()],
    "dilation, signal to noise .16": [
        (0.132,), (0.751, 4, 4.40), (0.916, 4, 15.1), (0.833, 14, 14.9), (0.975, 1, 68.7)],
    "dilation, MALA, smoothness 1": [
        (0.289,), (0.751, 4, 4.65), (0.916, 3, 15.0), (0.845, 13, 15.2), (0.975, 1, 34.7)],
    "dilation, MALA and jumps": [(), (0.046, _N, _N), (), (0.077, _N, _N), ()],
    "tilt, κ from 100 L to 1e-4 L": [(0.014,), (0.751, 4, 3.97), (0.909, 5, 14.7), (0.946, 4, 16.7), (0.973, 1, 34.7)],
    "ULA with the steps of dilation": [(), (0.235, _N, _N), (), (0.868, _N, _N), ()],
    "tempered dilation, linear": [(0.290,), (0.255, 16, 1.62), (0.353, 34, 1.78), (0.760, 11, 10.9), (0.647, 18, 16.9)],
    "tempered dilation, quadratic": [
        (0.280,), (0.236, 16, 1.53), (0.337, 35, 1.52), (0.679, 15, 8.63), (0.533, 23, 11.7)],
    "parallel tempering, N(0, s²)": [
        (0.007,), (0.043, 16, -0.01), (0.081, 40, -0.04), (0.062, 39, -0.03), (0.071, 40, -0.04)],
}  # fmt: skip
# TV on T2, T16w, T40, T40u at K = 10 000
EARLIER_LONG: dict[str, list[float]] = {
    "exact draws": [0.007, 0.049, 0.081, 0.063],
    "ULA from N(0, 1)": [0.304, 0.744, 0.782, 0.736],
    "geometric ULA, N(0, 1)": [0.099, 0.751, 0.917, 0.943],
    "geometric ULA, N(0, s²)": [0.179, 0.215, 0.183, 0.234],
    "dilation, fixed step, λ ≥ .051": [0.177, 0.163, 0.233, 0.557],
    "dilation, smoothness .1": [0.271, 0.744, 0.786, 0.797],
    "dilation, score norm 1": [0.136, 0.124, 0.127, 0.191],
    "tempered dilation, linear": [0.190, 0.163, 0.119, 0.259],
    "parallel tempering, N(0, s²)": [0.005, 0.040, 0.077, 0.081],
}
# TV on T16d10 at K = 1000; None: no earlier value
EARLIER_TEN: dict[str, float | None] = {
    "exact draws": 0.049,
    "ULA from N(0, 1)": 0.75,
    "geometric ULA, N(0, s²)": 0.608,
    "geometric ULA, s largest": 0.278,
    "dilation, smoothness .1": 0.751,
    "dilation, fixed step, λ ≥ .051": 0.248,
    "ULA with the steps of dilation": 0.233,
    "dilation, score norm 1": 0.178,
    "tempered dilation, quadratic": 0.242,
    "dilation, MALA and jumps": 0.749,
    "parallel tempering, N(0, s²)": 0.346,
    "parallel tempering, s largest": 0.094,
    "parallel tempering, whitened": 0.041,
    "SMC tempered dilation": None,
    "dilation explores, then SMC": None,
}
# TV, and rms Delta, or its mean where modes were missed; levels. T2, T16w, T40u, T16d10, T40s
EARLIER_WEIGHED: dict[str, list[tuple[Any, ...]]] = {
    "importance sampling, N(0, s²)": [
        (0.005, 0.046), (0.132, 0.055), (0.205, 0.162), (0.943, -31.9), (0.401, 0.226)],
    "SMC geometric, N(0, s²)": [
        (0.001, 0.026, 9), (0.050, 0.034, 12), (0.072, 0.031, 12), (0.053, 0.031, 43), (0.078, 0.047)],
    "SMC geometric, N(0, 1)": [
        (0.006, 0.030, 21), (0.751, -1.397, 29), (0.690, -1.52, 36), (0.751, -1.398, 29), (0.975, -3.73)],
    "SMC dilation, N(0, s²)": [(0.020, 0.083, 57), (0.183, 0.106, 165), (0.206, 0.203, 251), (0.940, -26.4, 118), ()],
    "SMC tilt, κ from 100 L": [
        (0.007, 0.052, 47), (0.751, -1.436, 64), (0.646, 1.84, 64), (0.751, -1.402, 79), ()],
    "SMC tempered dilation": [
        (0.005, 0.031, 21), (0.074, 0.100, 64), (0.157, 0.174, 71), (0.070, 0.043, 65), ()],
}  # fmt: skip
EXTRA = ["AIS geometric, N(0, s²)", "AIS tempered dilation", "SMC geometric, N(0, s²)", "SMC tempered dilation"]
EXTRA += ["dilation explores, then SMC"]


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows by name, targets, the budget (gradients, or particles), replicates, and what was found before."""

    rows: dict[str, Row]
    names: list[str]
    targets: list[str]
    budget: int
    replicates: int
    earlier: Callable[[str, str], tuple[Any, ...]]


def _column(values: dict[str, list[Any]], targets: list[str]) -> Callable[[str, str], tuple[Any, ...]]:
    def find(row: str, target: str) -> tuple[Any, ...]:
        found = dict(zip(targets, values.get(row, []), strict=False)).get(target, ())
        return found if isinstance(found, tuple) else (found,)

    return find


_FIVE, _FOUR = ["T2", "T16w", "T40", "T40u", "T40s"], ["T2", "T16w", "T40", "T40u"]
_HEAVY = ["T2", "T16w", "T40u", "T16d10", "T40s"]
TABLES = {
    "2.2": Table(ROWS, [*EARLIER, *EXTRA], _FIVE, 1000, 8, _column(EARLIER, _FIVE)),
    "2.5": Table(WEIGHED, list(WEIGHED), _HEAVY, 2000, 8, _column(EARLIER_WEIGHED, _HEAVY)),
    "2.4": Table(
        ROWS, list(EARLIER_TEN), ["T16d10"], 1000, 8, _column({k: [v] for k, v in EARLIER_TEN.items()}, ["T16d10"])
    ),
    "2.3": Table(ROWS, list(EARLIER_LONG), _FOUR, 10_000, 3, _column(EARLIER_LONG, _FOUR)),
}


# -- running and printing ----------------------------------------------------------------------------------------------


def judge(case: Case, found: Outcome) -> dict[str, list[float]]:
    """The three figures of every replicate."""
    scores: dict[str, list[float]] = {"tv": [], "modes": [], "ed": []}
    count = len(case.truth)
    for i, x in enumerate(found.x):
        log_w = None if found.log_weights is None else found.log_weights[i]
        share = mode_weights(case.target.assign(x), count, log_w)
        if log_w is not None:
            generator = torch.Generator().manual_seed(i)
            x = x[torch.multinomial(log_w.double().softmax(0), len(x), replacement=True, generator=generator)]
        exact = case.exact[1500 * i : 1500 * (i + 1)]
        scores["tv"].append(total_variation(share, case.truth))
        scores["modes"].append(int((share > 0.2 * case.truth).sum()))
        scores["ed"].append(energy_distance(x[:PARTICLES].contiguous(), exact))
    return scores


def cell(table: str, row: str, target: str, seed: int) -> dict[str, Any]:
    what, case = TABLES[table], CASES[target]
    case.truth  # noqa: B018 - before the clock starts
    begin = time.perf_counter()
    found = what.rows[row](case, what.budget, what.replicates, seed)
    seconds = time.perf_counter() - begin
    delta = None if found.log_z is None else [v - LOG_Z for v in found.log_z]
    return {"table": table, "row": row, "target": target, "budget": what.budget, "replicates": what.replicates,
            "seed": seed, **judge(case, found), "delta": delta, "levels": found.levels,
            "evaluations": found.evaluations, "seconds": seconds}  # fmt: skip


def against(values: list[float], earlier: float, replicates: int) -> str:
    """Difference of the means, in standard errors of both where ours has replicates enough to tell.

    The spread of theirs is taken as ours, and their three decimals into account.
    """
    difference = statistics.mean(values) - earlier
    if len(values) < 5:
        return f"{difference:+.3f}".replace("0.", ".", 1)
    error = math.hypot(statistics.stdev(values) * math.sqrt(1 / len(values) + 1 / replicates), 0.0005)
    return f"{difference / error:+.1f}σ"


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.{digits}f}"


def entry(cell: dict[str, Any], earlier: tuple[Any, ...], table: str) -> str:
    """Ours; in brackets what was found before, and the difference in TV."""
    mean = statistics.mean
    if table == "2.5":
        missed = len(earlier) > 1 and (abs(earlier[1]) > 0.5)
        delta = cell["delta"]
        size = mean(delta) if missed else math.sqrt(mean(v * v for v in delta))
        ours = [_number(mean(cell["tv"]), 3), _number(size, 3), f"{cell['levels']}"]
        theirs = [_number(v, 3) for v in earlier[:2]] + [f"{v}" for v in earlier[2:]]
        before = 5
    else:
        ours = [_number(mean(cell["tv"]), 3), f"{mean(cell['modes']):.0f}", _number(mean(cell["ed"]), 2)]
        theirs = [
            "–" if v is None else _number(v, 3) if i == 0 else f"{v}" if i == 1 else _number(v, 2)
            for i, v in enumerate(earlier)
        ]
        before = 3
    text = " · ".join(ours if table != "2.3" else [*ours[:2]])
    if theirs and earlier[0] is not None:
        text += f" ({' · '.join(theirs)}; {against(cell['tv'], earlier[0], before)})"
    return text


def show(cells: list[dict[str, Any]], names: list[str], targets: list[str]) -> None:
    heads = {
        "2.2": "K = 1000 gradients a draw: TV · modes covered · energy distance (earlier; difference in TV)",
        "2.3": "K = 10 000: TV · modes covered (earlier TV; difference)",
        "2.4": "T16d10, K = 1000: TV · modes covered · energy distance (earlier TV; difference)",
        "2.5": "2000 weighted particles: TV · rms of log Z^ - log Z, or its mean beyond .5 · levels (earlier; TV)",
    }
    for name in sorted(names):
        table = TABLES[name]
        mine = {(c["row"], c["target"]): c for c in cells if c["table"] == name}
        shown = [t for t in table.targets if t in targets and any(key[1] == t for key in mine)]
        if not shown:
            continue
        print(f"\n### {name}  {heads[name]}\n")
        print("| | " + " | ".join(shown) + " | evaluations a draw |\n|---" + "|---" * (len(shown) + 1) + "|")
        for row in table.names:
            found = [mine.get((row, t)) for t in shown]
            if not any(found):
                continue
            spent = [c["evaluations"] for c in found if c]
            cost = f"{min(spent):.0f}" + (f"–{max(spent):.0f}" if max(spent) > 1.05 * min(spent) + 1 else "")
            text = [entry(c, table.earlier(row, t), name) if c else "" for c, t in zip(found, shown, strict=True)]
            print(f"| {row} | " + " | ".join(text) + f" | {cost} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(TABLES), default=list(TABLES), help="tables")
    parser.add_argument("--targets", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rows", nargs="+", help="rows whose names contain one of these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--print", action="store_true", help="run nothing")
    parser.add_argument("--out", type=Path, default=Path("bench/results/density_tables.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = args.out.read_text(encoding="utf-8").splitlines() if args.out.exists() else []
    cells = [json.loads(line) for line in lines]
    key = ("table", "row", "target", "budget", "seed")
    done = {tuple(c[k] for k in key) for c in cells if c["replicates"] >= TABLES[c["table"]].replicates}
    for name in args.only if not args.print else []:
        table = TABLES[name]
        for target in [t for t in table.targets if t in args.targets]:
            for row in [r for r in table.names if not args.rows or any(part in r for part in args.rows)]:
                weighed_alone = name == "2.5" and not table.earlier(row, target)  # long, and nothing to compare with
                if weighed_alone or (name, row, target, table.budget, args.seed) in done:
                    continue
                new = cell(name, row, target, args.seed)
                cells.append(new)
                args.out.parent.mkdir(parents=True, exist_ok=True)
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(new) + "\n")
                text = entry(new, table.earlier(row, target), name)
                print(f"{name} {target:7s} {row:32s} {text}  [{new['seconds']:.1f} s]", flush=True)
    show([c for c in cells if c["seed"] == args.seed], args.only, args.targets)


if __name__ == "__main__":
    main()

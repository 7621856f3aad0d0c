r"""One loop for all that walks a path: path x move x levels, with or without weights and resampling.

Walkers at level u hold y. To enter level u' they keep x, so :math:`y' = a y` with :math:`a = s(u) / s(u')`, and gain

.. math:: \log G = \log \pi_{u'}(a y) - \log \pi_u(y) + d \log a,

then they are resampled where the weights have become uneven, and moved. ULA, annealed Langevin, importance sampling,
AIS, SMC and MCMC are settings of this loop (the classes below the engine). With weights and exact moves the mean weight
is an estimate of Z: unbiased if levels and step sizes were fixed before the run. What is to be adapted is therefore
found in a pilot run, and frozen.

References:
    Neal, Annealed Importance Sampling, 2001.
    Del Moral, Doucet & Jasra, Sequential Monte Carlo Samplers, 2006.
    Zhou, Johansen & Aston, Toward Automatic Model Comparison, 2016 (conditional ESS).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from undrift.density.coordinates import Coordinates
from undrift.density.draws import Draws
from undrift.density.engine import Engine, largest_relative_step, unpack_frozen
from undrift.density.frame import Metric
from undrift.density.method import Method
from undrift.density.move import HMC, MALA, ULA, Move
from undrift.density.path import Dilation, Direct, Geometric, Path
from undrift.density.schedule import AdaptiveLevels, FixedLevels, Levels, Resampling
from undrift.density.session import Session
from undrift.density.step import Adapted, ScoreNorm, Smoothness, StepRule, smoothness
from undrift.density.target import Target
from undrift.measure.evidence import log_mean_exp

__all__ = [
    "AIS",
    "MCMC",
    "SMC",
    "AnnealedLangevin",
    "Annealing",
    "DilationLangevin",
    "ImportanceSampling",
    "Langevin",
    "anneal",
]

_PILOT = 512  # walkers that find levels and step sizes, unless the run itself has fewer


@dataclass(frozen=True, eq=False)
class Annealing(Method):
    """Walkers that follow a path from its start to the target.

    Args:
        path: of densities.
        move: what a walker does at a level.
        levels: which levels are visited.
        moves: moves at each level.
        moves_at_target: moves at the last level, the target; null for ``moves``.
        step: rule of the step size; null adapts it to the move's acceptance, or a tenth of 1 / L without Metropolis.
        weights: carry importance weights, and with them an estimate of Z; null if the moves are exact.
        resampling: when and how walkers are resampled by their weights; null never.
        keep: states of each walker that are kept at the target.
        thin: moves between kept states.
        metric: what adapted moves take the walkers' spread to be: "unit", or fitted to the walkers at each level along
            the axes ("diagonal") or with correlations ("dense", where there are at least five walkers a coordinate).
        pilot: adapt levels and step sizes in a run of their own, so that the run proper is unbiased.
        coordinates: centre and scale; null for the target's own.
        smoothness: L, the largest curvature of -log density, in these coordinates; null measures it at the start.
    """

    path: Path = field(default_factory=Geometric)
    move: Move = field(default_factory=MALA)
    levels: Levels = field(default_factory=AdaptiveLevels)
    moves: int = 10
    moves_at_target: int | None = None
    step: StepRule | None = None
    weights: bool | None = None
    resampling: Resampling | None = field(default_factory=Resampling)
    keep: int = 1
    thin: int = 1
    metric: Metric = "unit"
    pilot: bool = True
    coordinates: Coordinates | None = None
    smoothness: float | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        for key, least in (("moves", 0), ("moves_at_target", 0), ("keep", 1), ("thin", 1)):
            if getattr(self, key) is not None and getattr(self, key) < least:
                raise ValueError(f"{name}: {key} must be at least {least}, got {getattr(self, key)}.")
        if self.weights and not self.move.exact and self.moves > 0:
            raise ValueError(
                f"{name}: weights need moves that leave each level invariant, and {type(self.move).__name__} does not; "
                "take MALA or HMC, or weights=False."
            )
        if self.levels.adaptive and not self.weighted:
            raise ValueError(f"{name}: levels adapt to the weights' conditional ESS; without weights give FixedLevels.")
        rule = self.rule
        if rule.by_batch and self.move.exact:
            raise ValueError(
                f"{name}: {type(rule).__name__} looks at all walkers, which breaks the invariance of "
                f"{type(self.move).__name__}; use it with ULA."
            )
        if rule.by_walker and not self.move.state_dependent:
            raise ValueError(
                f"{name}: {type(rule).__name__} depends on the walker, which {type(self.move).__name__} cannot "
                "correct; use it with ULA or MALA."
            )
        if isinstance(rule, Adapted) and not self.move.exact:
            raise ValueError(
                f"{name}: without Metropolis there is no acceptance to adapt to; choose another step rule."
            )
        if self.metric not in ("unit", "diagonal", "dense"):
            raise ValueError(f"{name}: metric must be unit, diagonal or dense, got {self.metric!r}.")
        if self.metric != "unit" and not isinstance(rule, Adapted):
            raise ValueError(
                f"{name}: {type(rule).__name__} measures steps by the target's curvature, in a metric fitted to the "
                "walkers that is unknown; leave step to be adapted, or give coordinates instead of a metric."
            )

    @property
    def last_moves(self) -> int:
        """Moves at the target, before states are kept."""
        return self.moves if self.moves_at_target is None else self.moves_at_target

    @property
    def weighted(self) -> bool:
        """Whether walkers carry weights."""
        return (self.move.exact or self.moves == 0) if self.weights is None else self.weights

    @property
    def rule(self) -> StepRule:
        """The rule of the step size, chosen if none was given."""
        return self.step or (Adapted() if self.move.exact else Smoothness(0.1))

    @property
    def adapts(self) -> bool:
        """Whether the run finds levels or step sizes on its way."""
        return self.levels.adaptive or (isinstance(self.rule, Adapted) and self.moves > 0)

    def draw(self, session: Session) -> Draws:
        walkers = -(-session.n // (session.repeats * self.keep))
        resumed, seen = session.resumed, session.see(self.coordinates)
        if resumed is None:
            probe = self.path.start.sample(64, seen.dim, session.generator, session.dtype)
            seen.check(probe)
            curved = self.smoothness or self._curvature(seen, probe)
        else:
            curved = resumed[1]["smoothness"]
        engine = Engine(self, session, curved)
        frozen = None
        if self.pilot and self.adapts and self.weighted and (resumed is None or resumed[1]["phase"] == "pilot"):
            size = min(walkers * session.repeats, max(walkers, _PILOT))
            frozen = engine.sweep("pilot", 1, size, None, resumed).settings
            resumed = None
        elif resumed is not None:
            frozen = unpack_frozen(*resumed)
        result = engine.sweep("run", session.repeats, walkers, frozen, resumed)
        session.journal.close()
        relative = None
        if not self.move.exact:
            relative = largest_relative_step(result.rows, seen, result.state.y, curved, self.smoothness is not None)
        weights = result.log_z.unsqueeze(-1) + result.log_w if self.weighted else None
        promise = None if weights is None else "consistent" if self.adapts and frozen is None else "unbiased"
        states = torch.stack(result.kept, 1).reshape(session.repeats, walkers, self.keep, seen.dim)
        return Draws(
            target=session.target,
            states=session.own(states),
            walker_log_weights=weights,
            corrected=self.move.exact or self.weighted,
            repeat_log_z=None if weights is None else log_mean_exp(weights),
            promise=promise,  # type: ignore[arg-type]
            method=self.in_words(),
            acceptance=result.rows[-1]["acceptance"],
            relative_step=relative,
            levels=tuple(result.rows),
        )

    def _curvature(self, target: Target, probe: Tensor) -> float:
        """L, found at the start; where a step is adapted it is a first guess only, and flat pieces do no harm."""
        try:
            return smoothness(target, probe)
        except ValueError:
            if not isinstance(self.rule, Adapted):
                raise
            return self.path.start.std**-2

    def in_words(self) -> str:
        """One line for reports."""
        kind = type(self).__name__ if type(self) is not Annealing else "annealing"
        return f"{kind} ({type(self.path).__name__} path, {type(self.move).__name__})"


# -- settings with names of their own ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SMC(Annealing):
    """Sequential Monte Carlo: levels by conditional ESS, resampling, exact moves, unbiased Z."""


@dataclass(frozen=True, eq=False)
class AIS(Annealing):
    """Annealed importance sampling: fixed levels, no resampling, unbiased Z."""

    levels: Levels = field(default_factory=lambda: FixedLevels(200))
    moves: int = 1
    resampling: Resampling | None = None


@dataclass(frozen=True, eq=False)
class ImportanceSampling(Annealing):
    """Plain importance sampling from the base law."""

    path: Path = field(default_factory=Direct)
    levels: Levels = field(default_factory=lambda: FixedLevels(1))
    moves: int = 0
    resampling: Resampling | None = None


@dataclass(frozen=True, eq=False)
class MCMC(Annealing):
    """Many chains of an exact move on the target itself: ``moves`` to warm up, then ``keep`` states of each chain."""

    path: Path = field(default_factory=Direct)
    move: Move = field(default_factory=HMC)
    levels: Levels = field(default_factory=lambda: FixedLevels(1))
    moves: int = 300
    weights: bool | None = False
    keep: int = 50
    pilot: bool = False


@dataclass(frozen=True, eq=False)
class Langevin(Annealing):
    """Unadjusted Langevin dynamics on the target."""

    path: Path = field(default_factory=Direct)
    move: Move = field(default_factory=ULA)
    levels: Levels = field(default_factory=lambda: FixedLevels(1))
    moves: int = 1000


@dataclass(frozen=True, eq=False)
class AnnealedLangevin(Annealing):
    """Unadjusted Langevin dynamics along the geometric path, one step a level."""

    move: Move = field(default_factory=ULA)
    levels: Levels = field(default_factory=lambda: FixedLevels(1000))
    moves: int = 1


@dataclass(frozen=True, eq=False)
class DilationLangevin(Annealing):
    """Unadjusted Langevin dynamics along the dilation path, steps cut by the score's norm: a cheap explorer."""

    path: Path = field(default_factory=Dilation)
    move: Move = field(default_factory=ULA)
    levels: Levels = field(default_factory=lambda: FixedLevels(1000))
    moves: int = 1
    step: StepRule | None = field(default_factory=ScoreNorm)


def anneal(
    target: Target,
    path: Path | None = None,
    move: Move | None = None,
    *,
    n: int = 4096,
    seed: int = 0,
    repeats: int = 8,
    checkpoint: str | File | None = None,
    progress: bool = False,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    **settings: Any,
) -> Draws:
    """Walk a path to the target: :class:`Annealing` as one call.

    Args:
        target: what to sample.
        path: geometric if not given.
        move: MALA if not given.
        n, seed, repeats, checkpoint, progress, dtype, device: of the run; see :meth:`Method.run`.
        settings: the other settings of :class:`Annealing`: levels, moves, step, weights, resampling, ...
    """
    if path is not None:
        settings["path"] = path
    if move is not None:
        settings["move"] = move
    return Annealing(**settings).run(
        target, n, seed, repeats=repeats, checkpoint=checkpoint, progress=progress, dtype=dtype, device=device
    )

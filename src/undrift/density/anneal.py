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

import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from undrift.density.coordinates import Coordinates
from undrift.density.draws import Draws
from undrift.density.journal import Journal, fingerprint
from undrift.density.method import Method, check_run
from undrift.density.move import HMC, MALA, ULA, Move, State
from undrift.density.path import Dilation, Direct, Geometric, LevelDensity, Path
from undrift.density.schedule import AdaptiveLevels, FixedLevels, Levels, Resampling, conditional_ess
from undrift.density.step import Adapted, ScoreNorm, Smoothness, StepRule, smoothness
from undrift.density.target import AffineTarget, Evaluations, Point, Target
from undrift.measure.evidence import effective_sample_size, log_mean_exp

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
        step: rule of the step size; null adapts it to the move's acceptance, or a tenth of 1 / L without Metropolis.
        weights: carry importance weights, and with them an estimate of Z; null if the moves are exact.
        resampling: when and how walkers are resampled by their weights; null never.
        keep: states of each walker that are kept at the target.
        thin: moves between kept states.
        pilot: adapt levels and step sizes in a run of their own, so that the run proper is unbiased.
        coordinates: centre and scale; null for the target's own.
        smoothness: L, the largest curvature of -log density, in these coordinates; null measures it at the start.
    """

    path: Path = field(default_factory=Geometric)
    move: Move = field(default_factory=MALA)
    levels: Levels = field(default_factory=AdaptiveLevels)
    moves: int = 10
    step: StepRule | None = None
    weights: bool | None = None
    resampling: Resampling | None = field(default_factory=Resampling)
    keep: int = 1
    thin: int = 1
    pilot: bool = True
    coordinates: Coordinates | None = None
    smoothness: float | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        for key, least in (("moves", 0), ("keep", 1), ("thin", 1)):
            if getattr(self, key) < least:
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

    def run(
        self,
        target: Target,
        n: int = 4096,
        seed: int = 0,
        *,
        repeats: int = 8,
        checkpoint: str | File | None = None,
        progress: bool = False,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> Draws:
        check_run(n, repeats)
        began, before = time.perf_counter(), target.evaluations.copy()
        generator = torch.Generator(device).manual_seed(seed)
        identity = "" if checkpoint is None else fingerprint(target, method=self, n=n, seed=seed, repeats=repeats)
        journal = Journal(checkpoint, identity)
        resumed = journal.read()
        walkers = -(-n // (repeats * self.keep))
        if resumed is None:
            seen = target if self.coordinates is None else self.coordinates.choose(target, generator, dtype)
            probe = self.path.start.sample(64, target.dim, generator, dtype)
            seen.check(probe)
            curved = self.smoothness or smoothness(seen, probe)
        else:
            tensors, plain = resumed
            seen = target.affine(tensors["loc"], tensors["scale"]) if "loc" in tensors else target
            curved = plain["smoothness"]
            before = before - Evaluations(*plain["evaluations"])
            began -= plain["seconds"]
            generator.set_state(tensors["generator"])

        def about() -> dict[str, Any]:
            spent = target.evaluations - before
            return {
                "smoothness": curved,
                "evaluations": [spent.values, spent.gradients],
                "seconds": time.perf_counter() - began,
            }

        fixed = {"loc": seen.loc, "scale": seen.scale} if isinstance(seen, AffineTarget) else {}
        engine = _Engine(self, seen, curved, generator, dtype, journal, fixed, about, progress)
        frozen = None
        if self.pilot and self.adapts and self.weighted and (resumed is None or resumed[1]["phase"] == "pilot"):
            size = min(walkers * repeats, max(walkers, _PILOT))
            frozen = engine.sweep("pilot", 1, size, None, resumed).frozen
            resumed = None
        elif resumed is not None and resumed[1]["frozen"] is not None:
            frozen = [tuple(row) for row in resumed[1]["frozen"]]
        result = engine.sweep("run", repeats, walkers, frozen, resumed)
        journal.close()
        kept = torch.stack(result.kept, 1)  # (repeats * walkers, keep, d)
        states = (seen.to_x(kept.flatten(0, 1)) if isinstance(seen, AffineTarget) else kept.flatten(0, 1)).reshape(
            repeats, walkers, self.keep, target.dim
        )
        relative = result.relative_step(seen, self.smoothness)
        weights = result.log_z.unsqueeze(-1) + result.log_w if self.weighted else None
        promise = None if weights is None else "consistent" if self.adapts and frozen is None else "unbiased"
        return Draws(
            target=target,
            states=states,
            walker_log_weights=weights,
            corrected=self.move.exact or self.weighted,
            repeat_log_z=None if weights is None else log_mean_exp(weights),
            promise=promise,  # type: ignore[arg-type]
            method=self.in_words(),
            evaluations=target.evaluations - before,
            acceptance=result.rows[-1]["acceptance"],
            relative_step=relative,
            levels=tuple(result.rows),
            notes=tuple(result.notes),
            seconds=time.perf_counter() - began,
        )

    def in_words(self) -> str:
        """One line for reports."""
        kind = type(self).__name__ if type(self) is not Annealing else "annealing"
        return f"{kind} ({type(self.path).__name__} path, {type(self.move).__name__})"


@dataclass
class _Result:
    """What a sweep ends with; the walkers of a repeat are neighbours."""

    state: State
    kept: list[Tensor]
    log_w: Tensor
    log_z: Tensor
    rows: list[dict[str, Any]]
    frozen: list[tuple[float, float]]
    notes: list[str]

    def relative_step(self, target: Target, given: float | None) -> float | None:
        """Largest eps L over levels; L as given, or the largest found at the ends of the walk as well."""
        steps = [(row["step"], row["exponent"], row["base_curvature"], row["smoothness"]) for row in self.rows]
        steps = [s for s in steps if s[0] is not None]
        if not steps:
            return None
        found = steps[0][3]
        if given is None:
            with contextlib.suppress(ValueError):
                found = max(found, smoothness(target, self.state.y[:: max(1, len(self.state.y) // 32)][:32]))
        return max(step * (exponent * found + base) for step, exponent, base, _ in steps)


class _Engine:
    """The loop. A sweep's state is a handful of tensors, written to the journal between moves."""

    def __init__(
        self,
        method: Annealing,
        target: Target,
        curved: float,
        generator: torch.Generator,
        dtype: torch.dtype,
        journal: Journal,
        fixed: Mapping[str, Tensor],
        about: Any,
        progress: bool,
    ) -> None:
        self.m, self.target, self.curved, self.generator = method, target, curved, generator
        self.dtype, self.journal, self.fixed, self.about, self.progress = dtype, journal, fixed, about, progress

    def sweep(
        self,
        phase: str,
        repeats: int,
        walkers: int,
        frozen: list[tuple[float, float]] | None,
        resumed: tuple[dict[str, Tensor], dict[str, Any]] | None,
    ) -> _Result:
        """From the start law to the target.

        Args:
            phase: for the journal and the bar.
            repeats, walkers: independent groups, and walkers in each.
            frozen: (u, relative step) of each level, if they are fixed; None adapts what the method adapts.
            resumed: what the journal holds of this sweep.
        """
        m, n = self.m, repeats * walkers
        if resumed is None:
            self.k, self.j, self.u, self.relative = 0, 0, 0.0, self._first_relative()
            state = State(m.path.start.sample(n, self.target.dim, self.generator, self.dtype))
            log_w = torch.zeros(repeats, walkers, dtype=torch.float64, device=state.y.device)
            log_z = torch.zeros(repeats, dtype=torch.float64, device=state.y.device)
            self.out = _Result(state, [], log_w, log_z, [], [], [])
            self._enter_first(frozen)
        else:
            self._restore(*resumed)
        out = self.out
        with tqdm(total=1.0, initial=self.u, disable=not self.progress, desc=phase, bar_format=_BAR) as bar:
            try:
                while True:
                    density, last = m.path.density(self.target, self.u), self.u >= 1.0
                    count = self._moves_here(last)
                    while self.j < count:
                        self._move(density, frozen, last)
                        self.j += 1
                        if last and self.j >= m.moves and (self.j - m.moves) % m.thin == 0:
                            out.kept.append(out.state.y)
                        self._note(phase, frozen)
                    self._close_level(density)
                    if last:
                        break
                    self._enter_next(frozen)
                    bar.update(self.u - bar.n)
                    bar.set_postfix_str(self._postfix(), refresh=False)
            except KeyboardInterrupt:
                self._note(phase, frozen, force=True)
                raise
        if not out.kept:
            out.kept.append(out.state.y)
        if not bool(torch.isfinite(out.state.y).all()):
            self._diverged(out.state.y)
        return out

    # -- levels --------------------------------------------------------------------------------------------------------

    def _enter_first(self, frozen: list[tuple[float, float]] | None) -> None:
        m, out = self.m, self.out
        if isinstance(m.levels, FixedLevels) and m.levels.count == 1:
            self.u = 1.0
        density = m.path.density(self.target, self.u)
        if m.weighted:
            point = density.at(out.state.y)
            start = m.path.start.log_prob(point.x)
            self._gain((density.log_prob(point) - start).reshape(out.log_w.shape))
            out.state = out.state._replace(point=point)
        self._open_level(density, cess=None)

    def _enter_next(self, frozen: list[tuple[float, float]] | None) -> None:
        m, out = self.m, self.out
        old, row = m.path.density(self.target, self.u), m.path.level(self.u)
        flat_w = out.log_w.reshape(-1)
        current = old.log_prob(out.state.known(old)) if m.weighted else None

        def increments(v: float, point: Point | None = None) -> tuple[Tensor, float]:
            assert current is not None
            density, to = m.path.density(self.target, v), m.path.level(v)
            log_a = row.log_scale - to.log_scale
            if point is None and log_a == 0.0:
                point = out.state.known(old)
            if point is None:
                y = out.state.y * math.exp(log_a)
                point = Point(y, self.target.log_prob(y), y)  # no gradient: the score is not looked at
            gain = density.log_prob(point) - current + self.target.dim * log_a
            return torch.nan_to_num(gain, nan=-math.inf), conditional_ess(flat_w, gain)

        if frozen is not None:
            v = frozen[self.k + 1][0]
        else:
            v = m.levels.following(self.k, self.u, lambda v: increments(v)[1])
        log_a = row.log_scale - m.path.level(v).log_scale
        density = m.path.density(self.target, v)
        state = out.state
        if log_a != 0.0:
            y = state.y * math.exp(log_a)
            state = state._replace(y=y, point=density.at(y) if m.weighted else None)
        cess = None
        if m.weighted:
            gain, cess = increments(v, state.known(density))
            self._gain(gain.reshape(out.log_w.shape))
        out.state = state
        self.k, self.j, self.u = self.k + 1, 0, v
        if m.weighted and m.resampling is not None:
            self._resample()
        self._open_level(density, cess)

    def _gain(self, gain: Tensor) -> None:
        out = self.out
        out.log_w = out.log_w + torch.nan_to_num(gain.double(), nan=-math.inf)
        if bool((out.log_w.logsumexp(-1) == -math.inf).any()):
            raise FloatingPointError(
                f"{self.target.name}: all walkers of a repeat lost their weight at u = {self.u:.4g}: the start law "
                "lies outside the support. Give coordinates (loc, scale) or a wider base."
            )

    def _resample(self) -> None:
        out, rule = self.out, self.m.resampling
        assert rule is not None
        due = rule.due(out.log_w)
        if not bool(due.any()):
            return
        repeats, walkers = out.log_w.shape
        own = torch.arange(walkers, device=due.device).expand(repeats, -1)
        index = torch.where(due.unsqueeze(-1), rule.ancestors(out.log_w, self.generator), own)
        offset = walkers * torch.arange(repeats, device=due.device).unsqueeze(-1)
        out.state = out.state.take((index + offset).reshape(-1))
        out.log_z = torch.where(due, out.log_z + log_mean_exp(out.log_w), out.log_z)
        out.log_w = torch.where(due.unsqueeze(-1), torch.zeros_like(out.log_w), out.log_w)

    # -- moves ---------------------------------------------------------------------------------------------------------

    def _moves_here(self, last: bool) -> int:
        m, level = self.m, self.m.path.level(self.u)
        if level.exponent == 0 and not last:
            return 0  # the start law itself
        return m.moves + (m.keep - 1) * m.thin if last else m.moves

    def _first_relative(self) -> float:
        rule = self.m.rule
        return rule.relative if isinstance(rule, Adapted) else math.nan

    def _move(self, density: LevelDensity, frozen: list[tuple[float, float]] | None, last: bool) -> None:
        m, out, rule = self.m, self.out, self.m.rule
        if isinstance(rule, Adapted):
            relative = self.relative if frozen is None else frozen[self.k][1]
            eps = torch.as_tensor(
                relative / density.smoothness(self.curved), dtype=self.dtype, device=out.state.y.device
            )
            size = lambda score: eps  # noqa: E731
            self._mean_step = float(eps)
        else:
            level = m.path.level(self.u)

            def size(score: Tensor) -> Tensor:
                value = torch.as_tensor(rule.size(density, level, score, self.curved), dtype=self.dtype)
                self._mean_step = float(value.mean())
                return value.to(score.device)

        out.state, info = m.move.step(density, out.state, size, self.generator)
        if info.acceptance is not None:
            mean = float(info.acceptance.mean())
            self._accepted.append(mean)
            warm = frozen is None and info.sized and not (last and self.j >= m.moves)
            if warm and isinstance(rule, Adapted):
                goal = rule.acceptance or m.move.acceptance
                self.relative *= math.exp(2.0 * (mean - goal) / math.sqrt(1.0 + self.j))
        elif self.j % 64 == 63:
            self._finite(out.state.y)

    def _finite(self, y: Tensor) -> None:
        if not bool(torch.isfinite(y).all()):
            self._diverged(y)

    def _diverged(self, y: Tensor) -> None:
        bad = int((~torch.isfinite(y).all(-1)).sum())
        raise FloatingPointError(
            f"{self.target.name}: {bad} of {len(y)} walkers left the numbers at u = {self.u:.4g}: unadjusted steps of "
            f"about {self._mean_step:.3g} are unstable there. Take a shorter step (relative), give smoothness, or an "
            "exact move (MALA, HMC)."
        )

    # -- the record ----------------------------------------------------------------------------------------------------

    def _open_level(self, density: LevelDensity, cess: float | None) -> None:
        self._accepted: list[float] = []
        self._mean_step = math.nan
        self._cess = cess

    def _close_level(self, density: LevelDensity) -> None:
        out, level = self.out, self.m.path.level(self.u)
        ess = float(effective_sample_size(out.log_w).mean()) / out.log_w.shape[-1] if self.m.weighted else None
        tail = self._accepted[len(self._accepted) // 2 :]
        out.rows.append(
            {
                "u": self.u,
                "exponent": level.exponent,
                "scale": math.exp(level.log_scale) if level.log_scale > -700 else 0.0,
                "base_curvature": level.base * density.law.smoothness(self.target.dim),
                "smoothness": self.curved,
                "step": None if math.isnan(self._mean_step) else self._mean_step,
                "acceptance": sum(tail) / len(tail) if tail else None,
                "cess": self._cess,
                "ess": ess,
                "log_z": float(log_mean_exp(out.log_z + log_mean_exp(out.log_w))) if self.m.weighted else None,
                "gradients": self.target.evaluations.gradients,
            }
        )
        out.frozen.append((self.u, self.relative))

    def _postfix(self) -> str:
        row = self.out.rows[-1]
        parts = [f"level {self.k}"]
        if row["acceptance"] is not None:
            parts.append(f"acceptance {row['acceptance']:.2f}")
        if row["ess"] is not None:
            parts.append(f"ESS {row['ess']:.2f}")
        return ", ".join(parts)

    def _note(self, phase: str, frozen: list[tuple[float, float]] | None, force: bool = False) -> None:
        if self.journal.active:
            if not force:
                self._mark = self.generator.get_state()
            self.journal.write(lambda: self._state(phase, frozen), force)

    def _state(self, phase: str, frozen: list[tuple[float, float]] | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        out = self.out
        tensors = {**self.fixed, "y": out.state.y, "log_w": out.log_w, "log_z": out.log_z, "generator": self._mark}
        if out.state.point is not None:
            tensors |= {"value": out.state.point.log_prob, "score": out.state.point.score}
        if out.state.velocity is not None:
            tensors["velocity"] = out.state.velocity
        if out.kept:
            tensors["kept"] = torch.stack(out.kept)
        plain = {
            **self.about(),
            "phase": phase,
            "frozen": frozen,
            "k": self.k,
            "j": self.j,
            "u": self.u,
            "relative": None if math.isnan(self.relative) else self.relative,
            "moved": out.state.moved,
            "accepted": self._accepted,
            "cess": self._cess,
            "step": None if math.isnan(self._mean_step) else self._mean_step,
            "rows": out.rows,
            "levels": [[u, None if math.isnan(r) else r] for u, r in out.frozen],
        }
        return tensors, plain

    def _restore(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        place = self.generator.device
        y = tensors["y"].to(place)
        point = Point(y, tensors["value"].to(place), tensors["score"].to(place)) if "value" in tensors else None
        velocity = tensors["velocity"].to(place) if "velocity" in tensors else None
        kept = list(tensors["kept"].to(place)) if "kept" in tensors else []
        not_a_number = lambda v: math.nan if v is None else v  # noqa: E731
        self.k, self.j, self.u, self.relative = plain["k"], plain["j"], plain["u"], not_a_number(plain["relative"])
        self._accepted, self._cess, self._mean_step = plain["accepted"], plain["cess"], not_a_number(plain["step"])
        self.out = _Result(
            State(y, point, velocity, plain["moved"]),
            kept,
            tensors["log_w"].to(place),
            tensors["log_z"].to(place),
            plain["rows"],
            [(u, not_a_number(r)) for u, r in plain["levels"]],
            [],
        )


_BAR = "{desc}: {percentage:3.0f}%|{bar}| u = {n:.4f} [{elapsed}, {postfix}]"


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

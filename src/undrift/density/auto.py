"""The method for who does not want to choose: looks at the target first, picks by what it sees, and says why.

1. Ascents from the origin's neighbourhood find peaks, and the curvature there.
2. Walkers on the dilation path, hot by their long steps, look for more: the cheap coverage that this path is good for.
3. Ascents from where those ended tell peaks apart; Laplace's approximation weighs them.

Then sequential Monte Carlo, because its weights decide between peaks and its evidence is unbiased: for one peak from
the peak, for several from a law that spans them. Where no peak holds still (funnels) walkers must come back to the neck
again and again: parallel tempering from a heavy-tailed law, with steps of several scales. Short runs fit the
coordinates first, until the start law covers what they find.
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from undrift.density.anneal import SMC, DilationLangevin
from undrift.density.coordinates import Affine, Coordinates, Modes, ascend, curvature, factor_of, spread
from undrift.density.draws import Draws
from undrift.density.law import Base, Normal, StudentT
from undrift.density.method import Method
from undrift.density.move import HMC, MALA
from undrift.density.path import Dilation, Geometric
from undrift.density.schedule import AdaptiveLevels, FixedLevels
from undrift.density.session import Session
from undrift.density.step import smoothness
from undrift.density.target import Target
from undrift.density.tempering import ParallelTempering

__all__ = ["Auto", "Survey", "survey"]

_DENSE = 2000  # coordinates up to which a Hessian is afforded
_NEGLIGIBLE = 1e-4  # share of the Laplace mass below which a peak does not count
_FITTED = 200  # coordinates up to which short runs fit a covariance


@dataclass(frozen=True, eq=False)
class Survey:
    """What a first look found.

    Attributes:
        found: ends of all ascents.
        peaks: distinct local maxima that hold still, (M, d), the heaviest first; M may be 0.
        shares: Laplace's estimate of their mass, (M,), summing to 1.
        factor: A with A A' the inverse curvature at the heaviest peak, (d, d); None without a peak, or where a
            Hessian costs too much (then shares compare heights only).
        explored: where the explorer's walkers ended, (n, d); None if they left the numbers.
        restless: share of ascents that did not come to rest.
    """

    found: Modes
    peaks: Tensor
    shares: Tensor
    factor: Tensor | None
    explored: Tensor | None
    restless: float

    @property
    def unsettled(self) -> bool:
        """Whether most ascents ran away, or none ended on a peak."""
        return self.restless > 0.5 or self.relevant == 0

    @property
    def relevant(self) -> int:
        """Peaks whose mass counts."""
        return int((self.shares > _NEGLIGIBLE).sum())


def survey(
    target: Target, generator: torch.Generator, *, walkers: int = 128, levels: int = 300, ascents: int = 24
) -> Survey:
    """Look for peaks of a target about the origin, first by ascents, then from the ends of a run on the dilation path.

    Args:
        target: what to look at.
        generator: all randomness.
        walkers, levels: of the explorer; it costs their product in gradients.
        ascents: from the origin's neighbourhood, a third of them, and from the explorer's ends.
    """
    near = torch.empty(max(2, ascents // 3), target.dim, dtype=torch.float64, device=generator.device)
    found = ascend(target, near.normal_(generator=generator))
    sample = torch.cat([found.x[found.flat], near])
    explored = None
    # A wild density may throw the explorer out, or show it no curvature: the survey goes on without it.
    with contextlib.suppress(FloatingPointError, ValueError):
        curved = smoothness(target, sample)
        run = DilationLangevin(path=Dilation(first=1 / levels), levels=FixedLevels(levels), smoothness=curved)
        ends = run.run(target, walkers, _seed(generator), repeats=1, device=generator.device).x
        explored = ends[torch.isfinite(ends).all(-1)]
        pick = torch.randperm(len(explored), generator=generator)[: ascents - len(near)]
        more = ascend(target, explored[pick])
        found = _together(found, more)
    return _weighed(target, found, explored)


def _together(some: Modes, more: Modes) -> Modes:
    return Modes(
        torch.cat([some.x, more.x]), torch.cat([some.log_prob, more.log_prob]), torch.cat([some.flat, more.flat])
    )


def _weighed(target: Target, found: Modes, explored: Tensor | None) -> Survey:
    """Distinct peaks among the ends of ascents, with Laplace's approximation of their masses."""
    order = found.log_prob.argsort(descending=True)
    order = order[found.flat[order]]
    peaks: list[Tensor] = []
    for x in found.x[order]:
        if not any(_same(target, x, other) for other in peaks):
            peaks.append(x)
    restless = float((~found.flat).double().mean())
    masses, factors, kept = [], [], []
    for x in peaks:
        if target.dim > _DENSE:
            masses.append(float(target.log_prob(x.unsqueeze(0))))
            kept.append(x)
            continue
        precision = curvature(target, x)
        if bool((torch.linalg.eigvalsh(precision) > 0).all()):  # a saddle or a ridge is no peak
            factor = factor_of(precision)
            masses.append(float(target.log_prob(x.unsqueeze(0))) + float(torch.linalg.slogdet(factor).logabsdet))
            factors.append(factor)
            kept.append(x)
    if not kept:
        return Survey(found, found.x[:0], found.log_prob[:0], None, explored, restless)
    mass = torch.tensor(masses, dtype=torch.float64)
    order = mass.argsort(descending=True)
    where = torch.stack(kept)[order.to(found.x.device)]
    heaviest = factors[int(order[0])] if factors else None
    return Survey(found, where, mass.softmax(0)[order], heaviest, explored, restless)


def _same(target: Target, x: Tensor, y: Tensor) -> bool:
    """Whether no valley of half a nat lies between two peaks."""
    if float((x - y).norm()) < 1e-3 * (1 + float(x.norm())):
        return True
    share = torch.linspace(0, 1, 17, dtype=x.dtype, device=x.device).unsqueeze(-1)
    value = target.log_prob(x + share * (y - x))
    return float(value[1:-1].min()) > float(torch.minimum(value[0], value[-1])) - 0.5


@dataclass(frozen=True, eq=False)
class Auto(Method):
    """Looks at the target first, picks a method by what it sees, and says why.

    Args:
        walkers, levels: of the explorer.
        ascents: of the survey.
        scouts: most runs that fit the coordinates; each is a few percent of the run proper.
        coordinates: where to look: centre and unit of the survey; null for the origin, and 1.
    """

    walkers: int = 128
    levels: int = 300
    ascents: int = 24
    scouts: int = 4
    coordinates: Coordinates | None = None

    def __post_init__(self) -> None:
        for name, least in (("walkers", 1), ("levels", 2), ("ascents", 3), ("scouts", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"Auto: {name} must be at least {least}, got {getattr(self, name)}.")

    def draw(self, session: Session) -> Draws:
        target, generator = session.target, session.generator
        view = (
            target.affine() if self.coordinates is None else self.coordinates.choose(target, generator, session.dtype)
        )
        probe = torch.empty(16, target.dim, dtype=torch.float64, device=generator.device)
        view.check(probe.normal_(generator=generator))
        seen = survey(view, generator, walkers=self.walkers, levels=self.levels, ascents=self.ascents)
        for attempt in ("", ".again"):
            scout, why, fitted = self.fit(view, seen, generator)
            method: Method = scout
            if seen.unsettled:
                method = ParallelTempering(
                    path=scout.path, move=scout.move, levels=12, iterations=1500, coordinates=scout.coordinates
                )
            started, asked = time.perf_counter(), target.evaluations.copy()
            draws = method.run(
                view,
                session.n,
                _seed(generator),  # not the numbers that told where to look
                repeats=session.repeats,
                checkpoint=None if session.checkpoint is None else f"{session.checkpoint}{attempt}",
                progress=session.progress,
                dtype=session.dtype,
                device=generator.device,
            )
            # What the run had spent before an interruption counts as well.
            now = target.evaluations - asked
            session.charge(draws.evaluations - now, draws.seconds - (time.perf_counter() - started))
            if seen.unsettled or seen.relevant > 1 or attempt or view.dim > _FITTED:
                break
            more = self.look_again(view, seen, draws, generator)
            if more.relevant == 1:
                break
            seen = more
        return replace(
            draws,
            target=target,
            states=view.to_x(draws.states.flatten(0, 2)).reshape(draws.states.shape),
            method=f"auto, {draws.method}",
            reason=why,
            notes=(*draws.notes, *fitted),
        )

    def choose(self, target: Target, seen: Survey) -> tuple[SMC, str]:
        """The method for what was seen, with first coordinates, and the reason in words."""
        d = target.dim
        if seen.relevant == 1 and not seen.unsettled:
            factor = 1.0 if seen.factor is None else seen.factor
            # Wider than the peak, so that tails are covered; by less in many dimensions, where width costs levels.
            base: Base = StudentT(1.3, 3.0) if d <= 100 else Normal(1.0 + 2.0 / math.sqrt(d))
            method = SMC(
                path=Geometric(base),
                move=HMC(8),
                moves=5,
                levels=AdaptiveLevels(0.9),
                metric="dense",
                coordinates=Affine(seen.peaks[0], factor),
            )
            return method, f"One peak was found, so walkers start around it, in coordinates fitted to it (d = {d})."
        if seen.relevant > 1 and not seen.unsettled:
            points = seen.peaks if seen.explored is None else torch.cat([seen.peaks, seen.explored])
            method = SMC(
                path=Geometric(Normal(1.5)),
                move=MALA() if d <= 3 else HMC(8),
                moves=10 if d <= 3 else 5,
                metric="unit" if d <= 3 else "dense",
                coordinates=Affine(*spread(points)),
            )
            return method, (
                f"{seen.relevant} peaks were found (the heaviest with about {float(seen.shares[0]):.0%} of the mass, "
                "by Laplace's approximation), so walkers start from a law that spans them, and weights decide."
            )
        method = SMC(
            path=Geometric(StudentT(1.5, 3.0)),
            move=HMC(8, decades=2.0),
            moves=5,
            levels=AdaptiveLevels(0.9),
            coordinates=Affine(0.0, 2.0),
        )
        return method, (
            f"{seen.restless:.0%} of the ascents found no peak to rest on, as in a funnel: parallel tempering from a "
            "heavy-tailed law, with steps of several scales, in coordinates fitted to the walkers. Other parameters (a "
            "non-centred form) would be far cheaper."
        )

    def look_again(self, target: Target, seen: Survey, draws: Draws, generator: torch.Generator) -> Survey:
        """The survey with ascents from draws of a run, which stand for what was explored if they lead to more peaks."""
        some = draws.resample(self.ascents, generator).double()
        more = _weighed(target, _together(seen.found, ascend(target, some)), seen.explored)
        return replace(more, explored=draws.resample(self.walkers, generator)) if more.relevant > 1 else more

    def fit(self, target: Target, seen: Survey, generator: torch.Generator) -> tuple[SMC, str, tuple[str, ...]]:
        """The method chosen, its reason, and a note if it would not settle, after short runs of it have corrected both.

        A base law narrower than the target loses mass without a trace. Each scout's walkers give mean and covariance,
        the coordinates of the next; they have settled when a scout finds no more than the one before. Where only one
        peak was known, ascents from the scout's walkers look for others.
        """
        method, why = self.choose(target, seen)
        # Where nothing bends, as in |x|, the unit of the coordinates is as good a first step as a curvature.
        unit = (
            {} if _bends(target, seen.found.x if seen.explored is None else seen.explored[:16]) else {"smoothness": 1.0}
        )
        method = replace(method, **unit)  # type: ignore[arg-type]
        if target.dim > _FITTED:
            return method, why, ()
        walkers, growth = max(512, 12 * target.dim), 1.0
        for _ in range(self.scouts):
            assert isinstance(method.coordinates, Affine)
            quick = replace(method, levels=AdaptiveLevels(0.8), moves=min(3, method.moves), pilot=False)
            draws = quick.run(target, walkers, _seed(generator), repeats=1, device=generator.device)
            view = target.affine(method.coordinates.loc, method.coordinates.scale)
            loc, factor = spread(view.to_z(draws.x), draws.weights)
            growth = max(float(torch.linalg.svdvals(factor)[0]), 1.5 * float(loc.abs().max()))
            noise = math.sqrt(target.dim * float(draws.weights.square().sum()))
            coordinates = Affine(*spread(draws.x, draws.weights))
            if seen.relevant == 1 and not seen.unsettled:
                seen = self.look_again(target, seen, draws, generator)
                if seen.relevant > 1:
                    method, why = self.choose(target, seen)
                    growth = math.inf
            method = replace(method, coordinates=coordinates, **unit)  # type: ignore[arg-type]
            if growth < 1.25 + noise:
                return method, why, ()
        if growth < 2.0 or self.scouts == 0:
            return method, why, ()
        note = (
            f"After {self.scouts} fits of the coordinates the walkers still spread {growth:.2g} times wider than the "
            "fit before: the target may have tails, or peaks, beyond what was searched. Give coordinates (loc, scale)."
        )
        return method, why, (note,)


def _bends(target: Target, x: Tensor) -> bool:
    with contextlib.suppress(ValueError):
        return smoothness(target, x) > 0
    return False


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (), generator=generator, device=generator.device))

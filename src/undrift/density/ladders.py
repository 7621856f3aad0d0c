"""The loop of parallel tempering: ladders of chains as one batch, their exchanges, and what is counted on the way."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from undrift.density.draws import Draws
from undrift.density.level import LevelDensity, times
from undrift.density.move import State
from undrift.density.session import Session
from undrift.density.target import Point, Target, TargetError

if TYPE_CHECKING:
    from undrift.density.tempering import ParallelTempering

__all__ = ["LadderState", "Ladders", "Tally", "equal_rejections", "exchange"]


class Tally(NamedTuple):
    """Sums over iterations, float64. N levels, L = R repeats x walkers ladders.

    Attributes:
        iterations: how many were summed.
        accepted: acceptance of the local moves, (N,).
        swapped: acceptance of exchanges with the next level, (N - 1,).
        up, down: log of the summed e^W under the lower level, and e^-W under the upper one, (N - 1,).
        forward, backward: summed sigma(W - c) under the lower level, sigma(c - W) under the upper one, (R, N - 1).
        trips: round trips completed from the first level to each and back, (N,).
    """

    iterations: int
    accepted: Tensor
    swapped: Tensor
    up: Tensor
    down: Tensor
    forward: Tensor
    backward: Tensor
    trips: Tensor

    @staticmethod
    def zero(repeats: int, levels: int, device: torch.device) -> Tally:
        new = lambda *shape: torch.zeros(*shape, dtype=torch.float64, device=device)  # noqa: E731
        empty = torch.full((levels - 1,), -math.inf, dtype=torch.float64, device=device)
        pairs = new(repeats, levels - 1)
        return Tally(0, new(levels), new(levels - 1), empty, empty, pairs, pairs, new(levels))

    @property
    def rejections(self) -> Tensor:
        """Mean rejection of exchanges between neighbours, (N - 1,)."""
        return 1 - self.swapped / self.iterations


class LadderState(NamedTuple):
    """All there is of a run, between two iterations; never changed in place.

    Attributes:
        k: iterations made.
        u: the ladder, (N,), float64.
        log_step: log eps of each level, (N,), float64.
        centre: c of the bridges, (N - 1,), float64.
        point: states, level by level, (N L, d).
        velocity: of moves that keep one; it belongs to the level, not to the state that travels.
        moved: local moves made.
        reached: highest level that each state has seen since it last was at the first, (N, L); -1 if it never was.
        tally: sums since the last change of the ladder, or since warm-up.
        kept: states of the target's level, each (L, d).
    """

    k: int
    u: Tensor
    log_step: Tensor
    centre: Tensor
    point: Point
    velocity: Tensor | None
    moved: int
    reached: Tensor
    tally: Tally
    kept: tuple[Tensor, ...]

    def written(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {
            "u": self.u,
            "log_step": self.log_step,
            "centre": self.centre,
            "y": self.point.x,
            "value": self.point.log_prob,
            "score": self.point.score,
            "reached": self.reached,
            **{f"tally.{key}": value for key, value in self.tally._asdict().items() if key != "iterations"},
        }
        if self.velocity is not None:
            tensors["velocity"] = self.velocity
        if self.kept:
            tensors["kept"] = torch.stack(self.kept)
        return tensors, {"k": self.k, "moved": self.moved, "summed": self.tally.iterations}


def exchange(log_ratio: Tensor, parity: int, generator: torch.Generator) -> Tensor:
    """Which level each state comes from after neighbours have exchanged, a permutation of levels: (N, L) integers.

    Args:
        log_ratio: W(p) - W(q) of each pair of neighbours, (N - 1, L).
        parity: 0 for the pairs (0, 1), (2, 3), ..., 1 for (1, 2), (3, 4), ...
        generator: of the coins.
    """
    pairs, ladders = log_ratio.shape
    coin = torch.empty_like(log_ratio).uniform_(generator=generator)
    accepted = coin.log() < torch.nan_to_num(log_ratio, nan=-math.inf)
    accepted[1 - parity :: 2] = False
    swap = accepted.long()
    level = torch.arange(pairs + 1, device=log_ratio.device).unsqueeze(-1).expand(-1, ladders)
    none = swap.new_zeros(1, ladders)
    return level + torch.cat([swap, none]) - torch.cat([none, swap])


def equal_rejections(u: Tensor, rejections: Tensor) -> Tensor:
    """The ladder (N,) on which each pair has an equal share of the barrier found on u (N,), by monotone cubics."""
    from scipy.interpolate import PchipInterpolator  # slow to import

    steps = rejections.double().cpu().clamp(min=1e-3 / len(rejections))
    barrier = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
    goal = torch.linspace(0, 1, len(u), dtype=torch.float64) * barrier[-1]
    new = torch.from_numpy(PchipInterpolator(barrier.numpy(), u.cpu().numpy())(goal.numpy()))
    new[0], new[-1] = 0.0, 1.0
    return new.to(u.device) if bool((new.diff() > 0).all()) else u


class Ladders:
    """N levels x L ladders; the batch runs through the ladders of a level first."""

    def __init__(
        self, method: ParallelTempering, target: Target, repeats: int, walkers: int, generator: torch.Generator
    ) -> None:
        self.m, self.target, self.repeats, self.walkers, self.generator = method, target, repeats, walkers, generator
        self.N, self.L = method.levels, repeats * walkers
        self.device = generator.device
        self.law = method.path.law
        self.still = self.L if method.refreshed else 0  # points that exact draws replace
        # The ladder changes at an eighth, a quarter, half of the warm-up; the last half steers steps and finds c.
        self.changes = {method.warm >> j for j in range(1, 40) if method.warm >> j >= 2}

    def begin(self, dtype: torch.dtype) -> LadderState:
        """Every level starts from the path's first law."""
        start = self.m.path.start
        y = start.sample(self.N * self.L, self.target.dim, self.generator, dtype)
        point = LevelDensity(self.target, self.law).at(y)
        u = torch.linspace(0, 1, self.N, dtype=torch.float64, device=self.device)
        return LadderState(
            k=0,
            u=u,
            log_step=torch.full_like(u, math.log(0.5 * start.std**2)),
            centre=torch.zeros_like(u[1:]),
            point=point,
            velocity=None,
            moved=0,
            reached=torch.full((self.N, self.L), -1, dtype=torch.long, device=self.device),
            tally=Tally.zero(self.repeats, self.N, self.device),
            kept=(),
        )

    def restore(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> LadderState:
        placed = {key: value.to(self.device) for key, value in tensors.items() if key != "generator"}
        tally = Tally(plain["summed"], **{f: placed[f"tally.{f}"] for f in Tally._fields if f != "iterations"})
        return LadderState(
            k=plain["k"],
            u=placed["u"],
            log_step=placed["log_step"],
            centre=placed["centre"],
            point=Point(placed["y"], placed["value"], placed["score"]),
            velocity=placed.get("velocity"),
            moved=plain["moved"],
            reached=placed["reached"],
            tally=tally,
            kept=tuple(placed["kept"]) if "kept" in placed else (),
        )

    # -- one iteration -------------------------------------------------------------------------------------------------

    def iterate(self, s: LadderState) -> LadderState:
        """Local moves, the first level anew, one exchange, and what is learned from it."""
        if s.k in self.changes or s.k == self.m.warm:
            s = self._steer(s)
        s = self._local(s)
        gain = self._gain(s)
        forward, backward = gain
        tally = s.tally._replace(
            iterations=s.tally.iterations + 1,
            swapped=s.tally.swapped + _acceptance(forward - backward).mean(-1),
            up=torch.logaddexp(s.tally.up, forward.logsumexp(-1)),
            down=torch.logaddexp(s.tally.down, (-backward).logsumexp(-1)),
            forward=s.tally.forward + self._by_repeat(torch.sigmoid(forward - s.centre.unsqueeze(-1))),
            backward=s.tally.backward + self._by_repeat(torch.sigmoid(s.centre.unsqueeze(-1) - backward)),
        )
        source = exchange(forward - backward, s.k % 2, self.generator)
        point = s.point.take((source * self.L + torch.arange(self.L, device=self.device)).reshape(-1))
        reached, trips = self._travel(s.reached.gather(0, source))
        s = s._replace(k=s.k + 1, point=point, reached=reached, tally=tally._replace(trips=tally.trips + trips))
        if s.k > self.m.warm and (s.k - self.m.warm) % self.m.thin == 0:
            s = s._replace(kept=(*s.kept, point.x[-self.L :]))
        return s

    def _levels(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Exponents t and b of the ladder, each (N,)."""
        rows = [self.m.path.level(v) for v in u.tolist()]
        return torch.tensor([[r.exponent, r.base] for r in rows], dtype=torch.float64, device=self.device).unbind(-1)  # type: ignore[return-value]

    def _local(self, s: LadderState) -> LadderState:
        points, still = s.point, self.still
        exponent, base = (v.to(points.x.dtype).repeat_interleave(self.L)[still:] for v in self._levels(s.u))
        density = LevelDensity(self.target, self.law, exponent, base if bool(base.any()) else 0.0)
        moving = points.take(slice(still, None))
        state = State(moving.x, moving, s.velocity, s.moved)
        log_step, accepted = s.log_step, torch.zeros_like(s.tally.accepted)
        first = still // self.L
        for _ in range(self.m.moves):
            eps = log_step.exp().to(points.x.dtype).repeat_interleave(self.L)[still:]
            state, info = self.m.move.step(density, state, lambda score, eps=eps: eps, self.generator)  # type: ignore[misc]
            if info.acceptance is None:
                continue
            rate = info.acceptance.double().reshape(-1, self.L).mean(-1)
            rate = torch.cat([rate.new_zeros(first), rate])
            accepted = accepted + rate / self.m.moves
            if info.sized and s.k < self.m.warm:
                gain = 2 / math.sqrt(state.moved)
                log_step = log_step + gain * (rate - self.m.move.acceptance)
        moved = state.known(density)
        if still:
            fresh = density.at(self.m.path.start.sample(self.L, self.target.dim, self.generator, points.x.dtype))
            moved = Point(*(torch.cat(pair) for pair in zip(fresh, moved, strict=True)))
        return s._replace(
            point=moved,
            velocity=state.velocity,
            moved=state.moved,
            log_step=log_step,
            tally=s.tally._replace(accepted=s.tally.accepted + accepted),
        )

    def _gain(self, s: LadderState) -> tuple[Tensor, Tensor]:
        """W of each pair at the lower level's state, and at the upper one's, each (N - 1, L)."""
        value = s.point.log_prob.double().reshape(self.N, self.L)
        law = self.law.log_prob(s.point.x).double().reshape(self.N, self.L)
        steps = [v.diff().unsqueeze(-1) for v in self._levels(s.u)]

        def gain(rows: slice) -> Tensor:
            w = times(steps[0], value[rows]) + times(steps[1], law[rows])
            return torch.nan_to_num(w, nan=-math.inf, posinf=math.inf, neginf=-math.inf)

        return gain(slice(None, -1)), gain(slice(1, None))

    def _by_repeat(self, v: Tensor) -> Tensor:
        """Sum over the ladders of each repeat, (R, N - 1), of (N - 1, L)."""
        return v.reshape(-1, self.repeats, self.walkers).sum(-1).T

    def _travel(self, reached: Tensor) -> tuple[Tensor, Tensor]:
        """``reached`` (N, L) after the exchange, and the trips (N,) that ended with it."""
        level = torch.arange(self.N, device=self.device)
        reached = torch.where(reached >= 0, torch.maximum(reached, level.unsqueeze(-1)), reached)
        home = reached[0]
        trips = (home >= level.unsqueeze(-1)).sum(-1).double()
        trips[0] = 0.0
        return torch.cat([torch.zeros_like(reached[:1]), reached[1:]]), trips

    def _steer(self, s: LadderState) -> LadderState:
        """Change the ladder during warm-up, or end the warm-up: c from what was found, and new sums."""
        tally = Tally.zero(self.repeats, self.N, self.device)
        if s.tally.iterations == 0:
            return s
        if s.k == self.m.warm:
            middle = 0.5 * (s.tally.up - s.tally.down)
            return s._replace(tally=tally, centre=torch.nan_to_num(middle, nan=0.0, posinf=0.0, neginf=0.0))
        u = equal_rejections(s.u, s.tally.rejections)
        place = torch.searchsorted(s.u, u).clamp(1, self.N - 1)
        share = (u - s.u[place - 1]) / (s.u[place] - s.u[place - 1])
        return s._replace(tally=tally, u=u, log_step=torch.lerp(s.log_step[place - 1], s.log_step[place], share))

    # -- what comes out ------------------------------------------------------------------------------------------------

    def draws(self, s: LadderState, session: Session) -> Draws:
        m, tally = self.m, s.tally
        cold = s.point.take(slice(-self.L, None))
        lost = int((~torch.isfinite(cold.log_prob)).sum())
        if lost:
            raise TargetError(
                f"{self.target.name}: {lost} of {self.L} chains never entered the support. Give coordinates (loc, "
                "scale) that put the start inside, constrained parameters, or more iterations."
            )
        kept = torch.stack(s.kept, 1)  # (L, length, d)
        log_z = None
        if m.refreshed:
            ratios = s.centre + tally.forward.log() - tally.backward.log()
            log_z = ratios.sum(-1)
        return Draws(
            target=session.target,
            states=session.own(kept).reshape(self.repeats, self.walkers, m.length, self.target.dim),
            walker_log_weights=None,
            corrected=True,
            repeat_log_z=log_z,
            promise=None if log_z is None else "consistent",
            method=m.in_words(),
            acceptance=float(tally.accepted[-1] / tally.iterations),
            levels=self._rows(s),
            notes=self._notes(tally),
        )

    def _rows(self, s: LadderState) -> tuple[dict[str, Any], ...]:
        tally = s.tally
        exponent, base = self._levels(s.u)
        barrier = torch.cat([tally.rejections.new_zeros(1), tally.rejections.cumsum(0)])
        rows = []
        for i in range(self.N):
            moving = i * self.L >= self.still
            rows.append(
                {
                    "u": float(s.u[i]),
                    "exponent": float(exponent[i]),
                    "base": float(base[i]),
                    "step": float(s.log_step[i].exp()) if moving else None,
                    "acceptance": float(tally.accepted[i] / tally.iterations) if moving else None,
                    "rejection": float(tally.rejections[i]) if i + 1 < self.N else None,
                    "barrier": float(barrier[i]),
                    "round_trips": int(tally.trips[i]),
                }
            )
        return tuple(rows)

    def _notes(self, tally: Tally) -> tuple[str, ...]:
        if int(tally.trips[-1]) > 0:
            return ()
        rejections = tally.rejections
        worst = int(rejections.argmax())
        return (
            f"no state made a round trip between the first level and the target in {tally.iterations} iterations of "
            f"{self.L} ladders: weights of modes are those of the start. The barrier is {float(rejections.sum()):.2f}, "
            f"the worst exchange (levels {worst} and {worst + 1}) is refused {float(rejections[worst]):.0%} of the "
            "time; take more iterations or levels, or better coordinates.",
        )


def _acceptance(log_ratio: Tensor) -> Tensor:
    return torch.nan_to_num(log_ratio, nan=-math.inf).clamp(max=0).exp()

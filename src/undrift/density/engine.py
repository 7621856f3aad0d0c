r"""The annealing loop itself: walkers, weights and a record, level by level, resumable between any two moves."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from undrift._journal import Entry
from undrift.density.frame import Frame, FramedDensity, fit_frame
from undrift.density.level import LevelDensity
from undrift.density.move import Size, State
from undrift.density.schedule import FixedLevels, conditional_ess
from undrift.density.session import Session
from undrift.density.step import Adapted, smoothness
from undrift.density.target import Point, Target
from undrift.measure.evidence import effective_sample_size, log_mean_exp

if TYPE_CHECKING:
    from undrift.density.anneal import Annealing

__all__ = ["Engine", "Result", "Setting", "largest_relative_step", "unpack_frozen"]


@dataclass(frozen=True, eq=False)
class Setting:
    """What was found for a level, and is frozen for the run proper: its u, the relative step, and the moves' frame."""

    u: float
    relative: float
    frame: Frame | None = None


@dataclass
class Result:
    """What a sweep ends with; the walkers of a repeat are neighbours."""

    state: State
    kept: list[Tensor]
    log_w: Tensor
    log_z: Tensor
    rows: list[dict[str, Any]]
    settings: list[Setting]


class Engine:
    """The loop.

    Args:
        method: its settings.
        session: target, randomness and journal.
        curved: L of the target.
    """

    def __init__(self, method: Annealing, session: Session, curved: float) -> None:
        self.m, self.session, self.target, self.curved = method, session, session.seen, curved
        self.generator, self.dtype, self.journal = session.generator, session.dtype, session.journal
        self._safe: Entry | None = None

    def sweep(
        self,
        phase: str,
        repeats: int,
        walkers: int,
        frozen: list[Setting] | None,
        resumed: tuple[dict[str, Tensor], dict[str, Any]] | None,
    ) -> Result:
        """From the start law to the target.

        Args:
            phase: for the journal and the bar.
            repeats, walkers: independent groups, and walkers in each.
            frozen: the levels, if they are fixed; None adapts what the method adapts.
            resumed: what the journal holds of this sweep.
        """
        m = self.m
        self.phase, self.frozen = phase, frozen
        self.side: bool | None
        if resumed is None:
            self.k, self.j, self.u = 0, 0, 0.0
            self.relative = m.rule.relative if isinstance(m.rule, Adapted) else math.nan
            self.frame: Frame | None = None
            self.searching, self.side = True, None
            y = m.path.start.sample(repeats * walkers, self.target.dim, self.generator, self.dtype)
            log_w = torch.zeros(repeats, walkers, dtype=torch.float64, device=y.device)
            self.out = Result(State(y), [], log_w, log_w[:, 0].clone(), [], [])
            self._enter_first()
        else:
            self._restore(*resumed)
        out, self.undefined = self.out, self.target.evaluations.undefined
        with tqdm(total=1.0, initial=self.u, disable=not self.session.progress, desc=phase, bar_format=_BAR) as bar:
            try:
                while True:
                    last = self.u >= 1.0
                    count = self._moves_here(last)
                    while self.j < count or self._lost(count, last):
                        self._move(last)
                        self.j += 1
                        if last and self.j >= m.last_moves and (self.j - m.last_moves) % m.thin == 0:
                            out.kept.append(self._y())
                        self._note()
                    self._close_level()
                    if last:
                        break
                    self._enter_next()
                    bar.update(self.u - bar.n)
                    bar.set_postfix_str(self._postfix(), refresh=False)
            except KeyboardInterrupt:
                self._note(force=True)
                raise
        if not out.kept:
            out.kept.append(out.state.y)
        self._finite(out.state.y)
        return out

    # -- levels --------------------------------------------------------------------------------------------------------

    def _enter_first(self) -> None:
        m, out = self.m, self.out
        if isinstance(m.levels, FixedLevels) and m.levels.count == 1:
            self.u = 1.0
        if m.weighted:
            density = m.path.density(self.target, self.u)
            point = density.at(out.state.y)
            self._gain(density.log_prob(point) - m.path.start.log_prob(point.x))
            out.state = out.state._replace(point=point)
            if m.resampling is not None and self.u < 1.0:
                self._resample()  # the next level is chosen by walkers that count
        self._open_level(None)

    def _enter_next(self) -> None:
        m, out = self.m, self.out
        old, row = m.path.density(self.target, self.u), m.path.level(self.u)
        state, flat_w = out.state, out.log_w.reshape(-1)
        current = old.log_prob(state.known(old)) if m.weighted else None
        shrink = self.target.dim

        def gain(v: float, point: Point) -> Tensor:
            assert current is not None
            log_a = row.log_scale - m.path.level(v).log_scale
            return m.path.density(self.target, v).log_prob(point) - current + shrink * log_a

        def cess(v: float) -> float:
            log_a = row.log_scale - m.path.level(v).log_scale
            if log_a == 0.0:
                point = state.known(old)
            else:  # values alone: the score of this point is not looked at
                y = state.y * math.exp(log_a)
                point = Point(y, self.target.log_prob(y), y)
            return conditional_ess(flat_w, torch.nan_to_num(gain(v, point), nan=-math.inf, neginf=-math.inf))

        v = m.levels.following(self.k, self.u, cess) if self.frozen is None else self.frozen[self.k + 1].u
        log_a = row.log_scale - m.path.level(v).log_scale
        if log_a != 0.0:
            y = state.y * math.exp(log_a)
            state = state._replace(y=y, point=m.path.density(self.target, v).at(y) if m.weighted else None)
        share = None
        if m.weighted:
            increment = torch.nan_to_num(gain(v, state.known(old)), nan=-math.inf, neginf=-math.inf)
            share = conditional_ess(flat_w, increment)
            self._gain(increment)
        out.state = state
        self.k, self.j, self.u = self.k + 1, 0, v
        if m.weighted and m.resampling is not None:
            self._resample()
        self._open_level(share)

    def _gain(self, gain: Tensor) -> None:
        out = self.out
        gain = torch.nan_to_num(gain.double(), nan=-math.inf, neginf=-math.inf)
        out.log_w = out.log_w + gain.reshape(out.log_w.shape)
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
        m = self.m
        if m.path.level(self.u).exponent == 0 and not last:
            return 0  # the start law itself
        return m.last_moves + (m.keep - 1) * m.thin if last else m.moves

    def _lost(self, count: int, last: bool) -> bool:
        """Whether the first level needs more moves, because no step size was yet too long and none too short."""
        adapting = isinstance(self.m.rule, Adapted) and self.frozen is None
        return adapting and self.searching and not last and 0 < count <= self.j < count + 40

    def _density(self) -> LevelDensity:
        density = self.m.path.density(self.target, self.u)
        if self.frame is None:
            return density
        return FramedDensity(density.target, density.law, density.exponent, density.base, self.frame)

    def _y(self) -> Tensor:
        y = self.out.state.y
        return y if self.frame is None else self.frame.to_y(y)

    def _look_through(self, frame: Frame | None) -> None:
        """Change the frame that the moves look through."""
        if self.frame is not None:
            self.out.state = self.frame.leave(self.out.state)
        self.frame = frame
        if frame is not None:
            self.out.state = frame.enter(self.out.state)

    def _size(self, density: LevelDensity) -> Size:
        rule = self.m.rule
        if isinstance(rule, Adapted):
            relative = self.relative if self.frozen is None else self.frozen[self.k].relative
            curved = 1.0 if self.frame is not None else density.smoothness(self.curved)
            self._mean_step = relative / curved
            eps = torch.tensor(self._mean_step, dtype=self.dtype, device=self.out.state.y.device)
            return lambda score: eps
        level = self.m.path.level(self.u)

        def size(score: Tensor) -> Tensor:
            value = torch.as_tensor(rule.size(density, level, score, self.curved), dtype=self.dtype)
            self._mean_step = float(value.mean())
            return value.to(score.device)

        return size

    def _move(self, last: bool) -> None:
        m, out, rule = self.m, self.out, self.m.rule
        warm = self.frozen is None and not (last and self.j >= m.last_moves)
        if warm and not m.weighted and self.j in {m.last_moves * part // 8 for part in (1, 2, 4, 6)}:
            self._look_through(None)
            self._look_through(fit_frame(out.state.y, out.log_w.reshape(-1), m.metric))
        density = self._density()
        out.state, info = m.move.step(density, out.state, self._size(density), self.generator)
        if info.acceptance is not None:
            mean = float(info.acceptance.mean())
            self._accepted.append(mean)
            if warm and info.sized and isinstance(rule, Adapted):
                self._adapt(mean - (rule.acceptance or m.move.acceptance))
        elif self.j % 64 == 63:
            self._finite(out.state.y)

    def _adapt(self, excess: float) -> None:
        """Steer the step: by factors until it was once too long and once too short, then by Robbins-Monro."""
        if self.searching and self.side in (None, excess > 0):
            self.side = excess > 0
            self.relative *= 3.0 if self.side else 1 / 3.0
            return
        self.searching = False
        self.relative *= math.exp(2.0 * excess / math.sqrt(1.0 + self.j))

    def _finite(self, y: Tensor) -> None:
        far = torch.finfo(y.dtype).max ** 0.45  # squares overflow beyond: densities are 0 there, and walkers stay
        bad = int((~(y.abs() < far).all(-1)).sum())
        # No Metropolis step refuses the points where the target had no number to give.
        unseen = 0 if self.m.move.exact else self.target.evaluations.undefined - self.undefined
        if bad or unseen:
            raise FloatingPointError(
                f"{self.target.name}: {bad or min(unseen, len(y))} of {len(y)} walkers left the numbers at "
                f"u = {self.u:.4g}: unadjusted steps of about {self._mean_step:.3g} are unstable "
                "there. Take a shorter step (relative), give smoothness, or an exact move (MALA, HMC)."
            )

    # -- the record ----------------------------------------------------------------------------------------------------

    def _open_level(self, cess: float | None) -> None:
        self._accepted: list[float] = []
        self._mean_step = math.nan
        self._cess = cess
        if self.m.metric != "unit":
            frame = (
                fit_frame(self.out.state.y, self.out.log_w.reshape(-1), self.m.metric)
                if self.frozen is None
                else self.frozen[self.k].frame
            )
            self._look_through(frame)

    def _close_level(self) -> None:
        out, level, m = self.out, self.m.path.level(self.u), self.m
        if not m.move.exact:
            self._finite(out.state.y)
        out.settings.append(Setting(self.u, self.relative, self.frame))
        self._look_through(None)
        ess = float(effective_sample_size(out.log_w).mean()) / out.log_w.shape[-1] if m.weighted else None
        tail = self._accepted[len(self._accepted) // 2 :]
        out.rows.append(
            {
                "u": self.u,
                "exponent": level.exponent,
                "scale": math.exp(level.log_scale) if level.log_scale > -700 else 0.0,
                "base_curvature": level.base * m.path.law.smoothness(self.target.dim),
                "step": None if math.isnan(self._mean_step) else self._mean_step,
                "acceptance": sum(tail) / len(tail) if tail else None,
                "cess": self._cess,
                "ess": ess,
                "log_z": float(log_mean_exp(out.log_z + log_mean_exp(out.log_w))) if m.weighted else None,
                "gradients": self.target.evaluations.gradients,
            }
        )

    def _postfix(self) -> str:
        row = self.out.rows[-1]
        parts = [f"level {self.k}"]
        if row["acceptance"] is not None:
            parts.append(f"acceptance {row['acceptance']:.2f}")
        if row["ess"] is not None:
            parts.append(f"ESS {row['ess']:.2f}")
        return ", ".join(parts)

    # -- the journal ---------------------------------------------------------------------------------------------------

    def _note(self, force: bool = False) -> None:
        """Remember where the run can go on from, and write it if it is time; what is cut short is forgotten."""
        if self.journal.active:
            if not force:
                self._safe = self._snapshot()
            if self._safe is not None:
                self.journal.write(self._safe, force)

    def _snapshot(self) -> Entry:
        """The state as it is now, to be written later: lists grow in place and are copied, tensors never change."""
        out, state, kept = self.out, self.out.state, list(self.out.kept)
        tensors = {**self.session.kept, "y": state.y, "log_w": out.log_w, "log_z": out.log_z}
        tensors["generator"] = self.generator.get_state()
        if state.point is not None:
            tensors |= {"value": state.point.log_prob, "score": state.point.score}
        if state.velocity is not None:
            tensors["velocity"] = state.velocity
        plain = {
            "phase": self.phase,
            "k": self.k,
            "j": self.j,
            "u": self.u,
            "relative": _plain(self.relative),
            "moved": state.moved,
            "accepted": list(self._accepted),
            "searching": [self.searching, self.side],
            "cess": self._cess,
            "step": _plain(self._mean_step),
            "rows": list(out.rows),
        }
        settings, now, frozen = list(out.settings), [Setting(self.u, 0.0, self.frame)], self.frozen

        def entry() -> tuple[dict[str, Tensor], dict[str, Any]]:
            full = tensors | ({"kept": torch.stack(kept)} if kept else {})
            _pack(now, "now", full)
            own = _pack(settings, "own", full)
            fixed = None if frozen is None else _pack(frozen, "frozen", full)
            return full, {**self.session.costs(), "smoothness": self.curved, **plain, "settings": own, "frozen": fixed}

        return entry

    def _restore(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        place = self.generator.device
        tensors = {key: value if key == "generator" else value.to(place) for key, value in tensors.items()}
        y = tensors["y"]
        point = Point(y, tensors["value"], tensors["score"]) if "value" in tensors else None
        self.k, self.j, self.u, self.relative = plain["k"], plain["j"], plain["u"], _number(plain["relative"])
        self._accepted, self._cess, self._mean_step = plain["accepted"], plain["cess"], _number(plain["step"])
        self.searching, self.side = plain["searching"]
        (now,) = _unpack([[self.u, None]], "now", tensors)
        self.frame = now.frame
        kept = list(tensors["kept"]) if "kept" in tensors else []
        state = State(y, point, tensors.get("velocity"), plain["moved"])
        own = _unpack(plain["settings"], "own", tensors)
        self.out = Result(state, kept, tensors["log_w"], tensors["log_z"], plain["rows"], own)


def largest_relative_step(
    rows: list[dict[str, Any]], target: Target, ends: Tensor, curved: float, given: bool
) -> float | None:
    """Largest eps L_u over the levels; L is ``curved``, or the largest found at the ends of the walk (n, d) as well."""
    steps = [row for row in rows if row["step"] is not None]
    if not steps:
        return None
    if not given:
        with contextlib.suppress(ValueError):
            curved = max(curved, smoothness(target, ends[:: max(1, len(ends) // 32)][:32]))
    return max(row["step"] * (row["exponent"] * curved + row["base_curvature"]) for row in steps)


def unpack_frozen(tensors: dict[str, Tensor], plain: dict[str, Any]) -> list[Setting] | None:
    """The frozen levels that a journal holds, if any."""
    return None if plain["frozen"] is None else _unpack(plain["frozen"], "frozen", tensors)


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _pack(settings: list[Setting], name: str, tensors: dict[str, Tensor]) -> list[list[float | None]]:
    for k, setting in enumerate(settings):
        if setting.frame is not None:
            for part in ("mean", "factor", "inverse"):
                tensors[f"{name}.{k}.{part}"] = getattr(setting.frame, part).clone()  # no two names for one tensor
    return [[s.u, _plain(s.relative)] for s in settings]


def _unpack(rows: list[list[float | None]], name: str, tensors: dict[str, Tensor]) -> list[Setting]:
    settings = []
    for k, (u, relative) in enumerate(rows):
        parts = [tensors.get(f"{name}.{k}.{part}") for part in ("mean", "factor", "inverse")]
        assert u is not None
        frame = Frame(*parts) if parts[0] is not None else None  # type: ignore[arg-type]
        settings.append(Setting(u, _number(relative), frame))
    return settings


_BAR = "{desc}: {percentage:3.0f}%|{bar}| u = {n:.4f} [{elapsed}, {postfix}]"

r"""What a controlled diffusion is trained for: divergences between its path measure and the target's.

Write :math:`R = -\log w = \log F(z_{0:K}) - \log(\gamma B)(z_{0:K})` for a path; at its best R = -log Z for all paths.

    KL             E_F[R], the gradient taken through the whole walk (pathwise)
    LogDerivative  E_F[R] again, by :math:`E_F[(R - \bar R) \nabla \log F] - E_F[\nabla \log B]`
    LogVariance    Var[R], over the batch or over paths that share a start (VarGrad, trajectory balance without Z)
    TrajectoryBalance  E[(R + log Z_theta)^2], log Z learned
    TrustRegion    LogVariance towards :math:`F_{old}^{1-\eta} (\gamma B)^{\eta}`, eta as large as a divergence allows

For all but the first, paths are data: a walk without a graph, then one pass over all states of all paths at once, in
which the loss is :math:`\sum_b c_b \log F_b - c'_b \log B_b` with coefficients known from R. That pass may be cut into
chunks of steps; memory does not grow with K. Paths may also come from elsewhere: from a walk with more noise, or back
from points of a replay buffer.

With B and the prior fixed, LogVariance has twice the gradient of KL in expectation, on the diffusion's own paths, and
none at all, path by path, at the optimum. Where kernels are learned too (noise, process, levels, both directions) the
two differ, and LogVariance no longer bounds anything: LogDerivative is the divergence for them.

References:
    Richter & Berner, Improved Sampling via Learned Diffusions, 2024, section 3 (log-variance).
    Nüsken & Richter, Solving High-Dimensional Hamilton-Jacobi-Bellman PDEs, 2021.
    Sanokowski et al., Rethinking Losses for Diffusion Bridge Samplers, 2025 (log-derivative KL).
    Malkin et al., Trajectory Balance, 2022. Blessing et al., Trust Region Constrained Measure Transport, 2025.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from undrift.density.controlled.diffusion import ControlledDiffusion, Paths, Tables
from undrift.density.target import Target
from undrift.measure.evidence import effective_sample_size, log_mean_exp

__all__ = [
    "KL",
    "LogDerivative",
    "LogVariance",
    "Objective",
    "Replay",
    "Runner",
    "TrajectoryBalance",
    "TrustRegion",
    "Work",
]


@dataclass(eq=False)
class Work:
    """What an objective works on.

    Args:
        diffusion: what is trained, in place.
        target: in its coordinates.
        generator: all randomness.
        batch: paths a step.
        dtype: of the states.
        chunk: steps of a path whose graph is kept at a time; None for all.
        teacher: the diffusion with averaged weights, for objectives that draw with it.
    """

    diffusion: ControlledDiffusion
    target: Target
    generator: torch.Generator
    batch: int
    dtype: torch.dtype
    chunk: int | None = None
    teacher: ControlledDiffusion | None = None

    def tables(self) -> Tables:
        """The diffusion's tables, with their graph."""
        return self.diffusion.tables(torch.zeros((), dtype=self.dtype, device=self.generator.device))

    def walk(self, tables: Tables, n: int, spread: float = 1.0, end_score: bool = False) -> Paths:
        """n paths of the diffusion's own, without a graph."""
        with torch.no_grad():
            z = self.diffusion.start(tables, n, self.generator)
        return self.diffusion.walk(self.target, tables, z, self.generator, spread=spread, end_score=end_score)


class Runner(ABC):
    """An objective at work: it may keep a state, which an interrupted training takes up again."""

    @abstractmethod
    def step(self) -> dict[str, float]:
        """Add the gradient of one step to the parameters, and say how it went: "loss" and what else is known."""

    def state(self) -> Mapping[str, Tensor]:
        """Tensors to go on from."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:  # noqa: B027  most have no state
        """Go on from a state."""


class Objective(ABC):
    """What is minimised."""

    learns_kernels: ClassVar[bool] = False
    """Whether it may train more than controls: noise, prior, levels, a learned process."""

    @abstractmethod
    def runner(self, work: Work) -> Runner:
        """The objective at work."""


# -- through the walk --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class KL(Objective):
    """E_F[R], differentiated through the walk: needs the whole graph, and targets that differentiate twice.

    Seeks modes: what the diffusion does not visit costs nothing.
    """

    learns_kernels: ClassVar[bool] = True

    def runner(self, work: Work) -> Runner:
        return _Pathwise(work)


class _Pathwise(Runner):
    def __init__(self, work: Work) -> None:
        self.work = work

    def step(self) -> dict[str, float]:
        work, tables = self.work, self.work.tables()
        z = work.diffusion.start(tables, work.batch, work.generator).requires_grad_()
        paths = work.diffusion.walk(work.target, tables, z, work.generator, graph=True)
        log_w = work.diffusion.log_weights(tables, paths)
        good = torch.isfinite(log_w)
        if not bool(good.any()):
            return lost(log_w)
        loss = -log_w[good].mean()
        loss.backward()
        return facts(float(loss.detach()), log_w.detach())


def lost(log_w: Tensor) -> dict[str, float]:
    """A step without a single usable path: nothing is learned from it."""
    return {"loss": math.nan, "dropped": float(len(log_w))}


def facts(loss: float, log_w: Tensor) -> dict[str, float]:
    """What the weights of a batch say."""
    finite = log_w[torch.isfinite(log_w)]
    return {
        "loss": loss,
        "elbo": float(finite.mean()),
        "log_z": float(log_mean_exp(log_w)),
        "ess": float(effective_sample_size(log_w)) / len(log_w),
        "dropped": float(len(log_w) - len(finite)),
    }


# -- paths as data -----------------------------------------------------------------------------------------------------


class Coefficients(NamedTuple):
    """A loss, and its derivatives in log F and (with the sign turned) in log B and log gamma of each path."""

    loss: float
    forward: Tensor
    backward: Tensor


def backpropagate(
    work: Work, tables: Tables, paths: Paths, known: Tensor | None, coefficients: object, ends: bool
) -> tuple[Tensor, Coefficients]:
    """Add the gradient of a loss of R to the parameters: (log w, coefficients).

    Args:
        work, tables, paths: what is differentiated.
        known: log w where it is known already; else it is found on the way, and costs a pass of its own only if the
            graph is cut into chunks.
        coefficients: maps R (batch,) to :class:`Coefficients`.
        ends: whether the ends of the paths have parameters.
    """
    d, steps = work.diffusion, tables.chain.steps
    chunk = min(work.chunk or steps, steps)
    with torch.set_grad_enabled(ends):
        total = d.log_ends(tables, paths)
    if chunk == steps:
        forth, home = d.log_kernels(tables, slice(0, steps), paths)
        forth, home = forth.sum(0), home.sum(0)
        log_w = known if known is not None else (total.detach().double() + home.detach() - forth.detach())
        c: Coefficients = coefficients(-log_w)  # type: ignore[operator]
        surrogate = (c.forward.to(forth) * forth - c.backward.to(home) * home).sum()
        if ends:
            surrogate = surrogate + _ends(d, tables, paths, c)
        surrogate.backward()
        return log_w, c
    if known is None:
        with torch.no_grad():
            known = d.log_weights(tables, paths, chunk)
    c = coefficients(-known)  # type: ignore[operator]
    if ends:
        _ends(d, tables, paths, c).backward(retain_graph=True)
    for first in range(0, steps, chunk):
        at = slice(first, min(first + chunk, steps))
        forth, home = d.log_kernels(tables, at, paths)
        surrogate = (c.forward.to(forth) * forth.sum(0) - c.backward.to(home) * home.sum(0)).sum()
        surrogate.backward(retain_graph=at.stop < steps)  # the tables are shared by all chunks
    return known, c


def _ends(d: ControlledDiffusion, tables: Tables, paths: Paths, c: Coefficients) -> Tensor:
    start, finish = d.log_start(tables, paths.z[0]), d.log_finish(tables, paths.z[-1])
    return (c.forward.to(start) * start - c.backward.to(finish) * finish).sum()


def centred(r: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """R less its mean over groups of paths, 0 where it is not finite, and how many of each path's group count."""
    grouped = r.reshape(groups, -1)
    good = torch.isfinite(grouped)
    count = good.sum(-1, keepdim=True)
    filled = grouped.masked_fill(~good, 0.0)
    mean = filled.sum(-1, keepdim=True) / count.clamp(min=1)
    return ((filled - mean) * good).reshape(-1), count.expand_as(grouped).reshape(-1)


@dataclass(frozen=True, eq=False)
class Replay:
    """Paths walked back from points found earlier, by the backward kernels.

    Args:
        capacity: points that are kept, the latest.
        fraction: of each batch that comes from them.
        power: points are chosen in proportion to their weights to this power: 0 uniformly, 1 as the target would.
    """

    capacity: int = 16384
    fraction: float = 0.5
    power: float = 0.5

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ValueError(f"Replay: capacity must be at least 1, got {self.capacity}.")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"Replay: fraction must lie in (0, 1], got {self.fraction}.")
        if not 0 <= self.power <= 1:
            raise ValueError(f"Replay: power must lie in [0, 1], got {self.power}.")


class _Buffer:
    """The latest points with their log weights."""

    def __init__(self, rule: Replay) -> None:
        self.rule = rule
        self.x: Tensor | None = None
        self.log_w = torch.zeros(0, dtype=torch.float64)

    def add(self, x: Tensor, log_w: Tensor) -> None:
        good = torch.isfinite(log_w)
        x, log_w = x[good], log_w[good]
        self.x = (x if self.x is None else torch.cat([self.x, x]))[-self.rule.capacity :]
        self.log_w = torch.cat([self.log_w.to(log_w.device), log_w])[-self.rule.capacity :]

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        assert self.x is not None
        p = (self.rule.power * self.log_w).softmax(0)
        return self.x[torch.multinomial(p, n, replacement=True, generator=generator)]


class _PathRunner(Runner):
    """Steps of an objective that takes paths as data."""

    def __init__(self, objective: _PathObjective, work: Work) -> None:
        self.objective, self.work = objective, work
        self.buffer = None if objective.replay is None else _Buffer(objective.replay)
        self.ends = work.diffusion.learns_kernels

    def step(self) -> dict[str, float]:
        work, o, tables = self.work, self.objective, self.work.tables()
        replayed = 0
        if self.buffer is not None and self.buffer.x is not None:
            replayed = round(self.buffer.rule.fraction * work.batch)
        walked = None
        if work.batch > replayed:
            walked = self._walk(tables, work.batch - replayed)
        paths = walked
        if replayed and self.buffer is not None:
            x = self.buffer.draw(replayed, work.generator)
            back = work.diffusion.walk_back(work.target, tables, x, work.generator)
            paths = back if walked is None else _join(walked, back)
        assert paths is not None
        log_w, c = backpropagate(work, tables, paths, None, lambda r: o.coefficients(r, work), self.ends)
        if not math.isfinite(c.loss):
            return lost(log_w)
        own = log_w[: work.batch - replayed] if walked is not None else log_w
        if self.buffer is not None and walked is not None:
            self.buffer.add(walked.x, own)
        return facts(c.loss, own)

    def _walk(self, tables: Tables, n: int) -> Paths:
        work, o = self.work, self.objective
        if o.paths_per_start == 1:
            return work.walk(tables, n, o.spread)
        with torch.no_grad():
            z = work.diffusion.start(tables, n // o.paths_per_start, work.generator)
            z = z.repeat_interleave(o.paths_per_start, 1)
        return work.diffusion.walk(work.target, tables, z, work.generator, spread=o.spread)

    def state(self) -> Mapping[str, Tensor]:
        if self.buffer is None or self.buffer.x is None:
            return {}
        return {"replay.x": self.buffer.x, "replay.log_w": self.buffer.log_w}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        if self.buffer is not None and "replay.x" in tensors:
            self.buffer.x, self.buffer.log_w = tensors["replay.x"], tensors["replay.log_w"]


def _join(a: Paths, b: Paths) -> Paths:
    return Paths(
        torch.cat([a.z, b.z], 2),
        None if a.value is None or b.value is None else torch.cat([a.value, b.value], 1),
        None if a.score is None or b.score is None else torch.cat([a.score, b.score], 1),
        torch.cat([a.log_target, b.log_target]),
    )


@dataclass(frozen=True, eq=False)
class _PathObjective(Objective):
    spread: float = 1.0
    replay: Replay | None = None
    paths_per_start: int = 1

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not self.spread > 0:
            raise ValueError(f"{name}: spread must be positive, got {self.spread}.")
        if self.paths_per_start < 1:
            raise ValueError(f"{name}: paths_per_start must be at least 1, got {self.paths_per_start}.")
        if self.paths_per_start > 1 and self.replay is not None:
            raise ValueError(f"{name}: paths that share a start cannot come from a replay buffer; give one of them.")

    def runner(self, work: Work) -> Runner:
        if work.batch % self.paths_per_start:
            raise ValueError(
                f"{type(self).__name__}: batch = {work.batch} is no multiple of paths_per_start = "
                f"{self.paths_per_start}."
            )
        return _PathRunner(self, work)

    @abstractmethod
    def coefficients(self, r: Tensor, work: Work) -> Coefficients:
        """Loss and derivatives for R (batch,)."""


@dataclass(frozen=True, eq=False)
class LogVariance(_PathObjective):
    """Var[R] on paths of any origin, without the derivative of what drove them.

    Args:
        spread: factor of the noise of the walks: above 1 they explore.
        replay: paths from points found earlier; null for none.
        paths_per_start: above 1, the variance is taken over so many paths from each start, and averaged over starts.
    """

    def coefficients(self, r: Tensor, work: Work) -> Coefficients:
        groups = 1 if self.paths_per_start == 1 else len(r) // self.paths_per_start
        miss, count = centred(r, groups)
        c = 2 * miss / ((count - 1).clamp(min=1) * groups)
        loss = float((0.5 * c * miss).sum()) if bool((count > 1).any()) else math.nan
        return Coefficients(loss, c, c)


@dataclass(frozen=True, eq=False)
class LogDerivative(_PathObjective):
    """E_F[R] by the derivative of log F, with the mean of the others as baseline: kernels may be learned.

    Paths must be the diffusion's own.
    """

    learns_kernels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spread != 1.0 or self.replay is not None or self.paths_per_start != 1:
            raise ValueError(
                "LogDerivative: it is an average over the diffusion's own paths; leave spread = 1, replay and "
                "paths_per_start alone, or take LogVariance."
            )

    def coefficients(self, r: Tensor, work: Work) -> Coefficients:
        miss, count = centred(r, 1)
        good = torch.isfinite(r)
        n = int(count[0])
        if n < 2:
            return Coefficients(math.nan, torch.zeros_like(r), torch.zeros_like(r))
        return Coefficients(float(r[good].mean()), miss / (n - 1), good.to(r) / n)


@dataclass(frozen=True, eq=False)
class TrajectoryBalance(_PathObjective):
    """E[(R + log Z_theta)^2] with log Z learned beside the control.

    Args:
        spread, replay: as in :class:`LogVariance`.
        rate: step of log Z towards the mean of -R, a share of the difference.
    """

    rate: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rate <= 1:
            raise ValueError(f"TrajectoryBalance: rate must lie in (0, 1], got {self.rate}.")

    def coefficients(self, r: Tensor, work: Work) -> Coefficients:
        log_z, good = work.diffusion.log_z, torch.isfinite(r)
        n = int(good.sum())
        if n == 0:
            return Coefficients(math.nan, torch.zeros_like(r), torch.zeros_like(r))
        mean = -r[good].mean()
        if bool(log_z.isnan()):  # not begun
            log_z.copy_(mean)
        miss = (r + log_z).masked_fill(~good, 0.0)
        log_z.lerp_(mean.to(log_z), self.rate)
        return Coefficients(float(miss.square().sum() / n), 2 * miss / n, 2 * miss / n)


# -- trust region ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TrustRegion(Objective):
    r"""LogVariance towards :math:`F_{old}^{1-\eta} (\gamma B)^\eta`, on a buffer of paths of F_old.

    The next path density is as near to the target's as a divergence of ``bound`` from the present one allows; eta comes
    from the weights of the buffer by bisection. Between two refreshments the target is not asked at all.

    Args:
        bound: largest divergence of the next path measure from the present one, in nats.
        buffer: paths that are kept.
        refresh: steps between two refreshments.
    """

    bound: float = 0.1
    buffer: int = 4096
    refresh: int = 100

    def __post_init__(self) -> None:
        if not self.bound > 0:
            raise ValueError(f"TrustRegion: bound must be positive, got {self.bound}.")
        for key in ("buffer", "refresh"):
            if getattr(self, key) < 1:
                raise ValueError(f"TrustRegion: {key} must be at least 1, got {getattr(self, key)}.")

    def runner(self, work: Work) -> Runner:
        return _TrustRunner(self, work)


def tempering(log_w: Tensor, bound: float) -> float:
    """Largest eta in [0, 1] for which the weights w^eta diverge from equal ones by no more than ``bound`` nats."""
    log_w = log_w[torch.isfinite(log_w)]

    def divergence(eta: float) -> float:
        p = (eta * log_w).log_softmax(0)
        return float((p.exp() * p).sum()) + math.log(len(log_w))

    if divergence(1.0) <= bound:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if divergence(middle) <= bound else (low, middle)
    return low


class _TrustRunner(Runner):
    def __init__(self, objective: TrustRegion, work: Work) -> None:
        self.objective, self.work = objective, work
        self.paths: Paths | None = None
        self.old = self.log_w = torch.zeros(0)
        self.eta, self.age, self.facts = 0.0, 0, {"loss": math.nan}

    def step(self) -> dict[str, float]:
        work, tables = self.work, self.work.tables()
        if self.paths is None or self.age >= self.objective.refresh:
            self._refresh(tables)
        assert self.paths is not None
        generator = work.generator
        index = torch.randint(len(self.old), (work.batch,), generator=generator, device=generator.device)
        paths, old, log_w = self.paths.take(index), self.old[index], self.log_w[index]
        d, steps = work.diffusion, tables.chain.steps
        chunk = min(work.chunk or steps, steps)
        pieces = [slice(i, min(i + chunk, steps)) for i in range(0, steps, chunk)]
        start = d.log_start(tables, paths.z[0])
        if len(pieces) == 1:
            forward = start + self._forward(tables, pieces[0], paths)
            c = self._coefficients(forward.detach(), old, log_w)
            (c.forward.to(forward) * forward).sum().backward()
        else:
            with torch.no_grad():
                forward = start + sum(self._forward(tables, at, paths) for at in pieces)
            c = self._coefficients(forward, old, log_w)
            for at in pieces:
                (c.forward.to(start) * self._forward(tables, at, paths)).sum().backward(retain_graph=True)
        self.age += 1
        return {**self.facts, "loss": c.loss, "eta": self.eta}

    def _coefficients(self, forward: Tensor, old: Tensor, log_w: Tensor) -> Coefficients:
        miss, count = centred(forward.double() - old - self.eta * log_w, 1)
        c = 2 * miss / (count - 1).clamp(min=1)
        return Coefficients(float((0.5 * c * miss).sum()), c, c)

    def _forward(self, tables: Tables, at: slice, paths: Paths) -> Tensor:
        """log F of the steps ``at``, (batch,)."""
        d, z = self.work.diffusion, paths.z[at.start : at.stop + 1]
        value = None if paths.value is None else paths.value[at]
        score = None if paths.score is None else paths.score[at]
        control = d.forward_control(tables, at, z[:-1], value, score)
        return d.log_steps(tables, at, z, control, None)[0].sum(0)

    def _refresh(self, tables: Tables) -> None:
        work = self.work
        parts, walked = [], 0
        while walked < self.objective.buffer:
            n = min(max(work.batch, 1024), self.objective.buffer - walked)
            parts.append(work.walk(tables, n))
            walked += n
        paths = parts[0]
        for part in parts[1:]:
            paths = _join(paths, part)
        with torch.no_grad():
            log_w = work.diffusion.log_weights(tables, paths, work.chunk)
            good = torch.isfinite(log_w).nonzero().squeeze(-1)
            paths, kept = paths.take(good), log_w[good]
            forward = work.diffusion.log_start(tables, paths.z[0]).double()
            steps = tables.chain.steps
            chunk = min(work.chunk or steps, steps)
            for first in range(0, steps, chunk):
                forward = forward + self._forward(tables, slice(first, min(first + chunk, steps)), paths)
        self.paths, self.old, self.log_w, self.age = paths, forward, kept, 0
        self.eta = tempering(kept, self.objective.bound)
        self.facts = facts(math.nan, log_w)

    def state(self) -> Mapping[str, Tensor]:
        if self.paths is None:
            return {}
        found = {name: part for name, part in self.paths._asdict().items() if part is not None}
        more = {"old": self.old, "log_w": self.log_w, "eta": torch.tensor([self.eta, self.age], dtype=torch.float64)}
        numbers = torch.tensor([self.facts.get(key, math.nan) for key in _FACTS], dtype=torch.float64)
        return {f"trust.{name}": part for name, part in {**found, **more, "facts": numbers}.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        found = {name.removeprefix("trust."): part for name, part in tensors.items() if name.startswith("trust.")}
        if not found:
            return
        self.paths = Paths(**{name: found.get(name) for name in Paths._fields})  # type: ignore[arg-type]
        self.old, self.log_w = found["old"], found["log_w"]
        self.eta, age = found["eta"].tolist()
        self.age = int(age)
        self.facts = dict(zip(_FACTS, found["facts"].tolist(), strict=True))


_FACTS = ("loss", "elbo", "log_z", "ess", "dropped")

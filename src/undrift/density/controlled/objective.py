r"""What a controlled diffusion is trained for: divergences between its path measure and the target's.

Write :math:`R = -\log w = \log F(z_{0:K}) - \log(\gamma B)(z_{0:K})` for a path; at its best R = -log Z for all paths.

    KL             E_F[R], the gradient taken through the whole walk (pathwise)
    LogDerivative  E_F[R] again, by :math:`E_F[(R - \bar R) \nabla \log F] - E_F[\nabla \log B]`
    LogVariance    Var[R], over the batch or over paths that share a start (VarGrad, trajectory balance without Z)
    TrajectoryBalance  E[(R + log Z_theta)^2], log Z learned

and, in files of their own, TrustRegion (LogVariance towards a target that moves), the regressions of matching.py, and
Stages of them.

Here F and B are the path measures of diffusion and noising, with their ends: F starts from the prior, :math:`\gamma B`
from the unnormalised target gamma (chain.py); Z is its normalisation, :math:`\bar R` the mean of R over a batch, and a
path z_{0:K} runs from the prior to the target. All objectives share :class:`Work`, what they are given, and
:class:`Runner`, what takes their steps; a network's parameters are changed by train.py alone.

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
    Malkin et al., Trajectory Balance, 2022.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from undrift.density.controlled.diffusion import ControlledDiffusion, Paths, Scheme, Tables, clean
from undrift.density.target import Target
from undrift.measure.evidence import effective_sample_size, log_mean_exp
from undrift.process.learned import LearnedProcess

__all__ = [
    "KL",
    "LogDerivative",
    "LogVariance",
    "Objective",
    "Replay",
    "Runner",
    "TrajectoryBalance",
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

    def pieces(self, tables: Tables) -> list[slice]:
        """Steps whose graphs are kept at a time."""
        steps = tables.chain.steps
        chunk = self.chunk or steps
        return [slice(first, min(first + chunk, steps)) for first in range(0, steps, chunk)]

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

    def validate(self, scheme: Scheme, batch: int) -> None:
        """Raise a ValueError for a scheme, or a number of paths a step, that it cannot be trained with."""
        kernels = [*scheme.learn, *(["process"] if isinstance(scheme.process, LearnedProcess) else [])]
        if kernels and not self.learns_kernels:
            raise ValueError(
                f"{', '.join(kernels)} cannot be learned with {type(self).__name__}, which is for controls alone: it "
                "bounds nothing once the backward kernels move too; take objective: LogDerivative (or KL)."
            )

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
    """What the weights of a batch say; paths that left the numbers have the weight 0, and no part in the ELBO."""
    good = torch.isfinite(log_w)
    finite, log_w = log_w[good], log_w.masked_fill(~good, -math.inf)
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
    work: Work, tables: Tables, paths: Paths, coefficients: Callable[[Tensor], Coefficients], ends: bool
) -> tuple[Tensor, Coefficients]:
    """Add the gradient of a loss of R to the parameters: (log w, coefficients).

    log w is found on the way, and costs a pass of its own only if the graph is cut into chunks, or if paths have to be
    dropped: where log w is no number, nothing is learned.

    Args:
        work, tables, paths: what is differentiated.
        coefficients: maps R (batch,) to :class:`Coefficients`.
        ends: whether the ends of the paths have parameters.
    """
    d, pieces = work.diffusion, work.pieces(tables)
    kernels = None
    if len(pieces) == 1:
        kernels = forth, home = d.log_kernels(tables, pieces[0], paths, _control(work, tables, pieces[0], paths))
        with torch.no_grad():
            log_w = d.log_ends(tables, paths).double() + (home.double() - forth.double()).sum(0)
    else:
        with torch.no_grad():
            log_w = d.log_weights(tables, paths, work.chunk)
    c, good = coefficients(-log_w), torch.isfinite(log_w)
    forward, backward = c.forward, c.backward
    if not bool(good.all()):  # a coefficient of 0 would not do: 0 times what is no number is none either
        index = good.nonzero().squeeze(-1)
        paths, forward, backward, kernels = paths.take(index), forward[index], backward[index], None
        if len(index) == 0:
            return log_w, c
    for at in pieces:
        forth, home = kernels or d.log_kernels(tables, at, paths, _control(work, tables, at, paths))
        surrogate = (forward.to(forth) * forth.sum(0) - backward.to(home) * home.sum(0)).sum()
        last = at.stop == tables.chain.steps
        if ends and last:
            start, finish = d.log_start(tables, paths.z[0]), d.log_finish(tables, paths.z[-1])
            surrogate = surrogate + (forward.to(start) * start - backward.to(finish) * finish).sum()
        surrogate.backward(retain_graph=not last)  # the tables are shared by all chunks
    return log_w, c


def _control(work: Work, tables: Tables, at: slice, paths: Paths) -> Tensor | None:
    """The forward control where what is learned moves the points at which the target is asked; else None.

    A process that is learned decides where on a state the control looks: the answers that were kept are right, but
    their derivative is the target's Hessian, and has to be asked for.
    """
    if paths.score is None or work.diffusion.scheme.annealed or not tables.chain.look.requires_grad:
        return None
    z = paths.z[at]
    y = work.diffusion.look(tables, at, z)
    value, score = clean(work.target, y.flatten(0, 1), True)
    return work.diffusion.forward_control(tables, at, z, value.unflatten(0, y.shape[:2]), score.view_as(y))


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
        fraction: of each batch that comes from them; at least one path of each batch is walked.
        power: points are chosen in proportion to their weights to this power: 0 uniformly, 1 as the target would.
    """

    capacity: int = 16384
    fraction: float = 0.5
    power: float = 0.5

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ValueError(f"Replay: capacity must be at least 1, got {self.capacity}.")
        if not 0 < self.fraction < 1:
            raise ValueError(
                f"Replay: fraction must lie in (0, 1), got {self.fraction}: points have to come from walks."
            )
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
            replayed = min(round(self.buffer.rule.fraction * work.batch), work.batch - 1)
        walked = paths = self._walk(tables, work.batch - replayed)
        if replayed and self.buffer is not None:
            x = self.buffer.draw(replayed, work.generator)
            paths = join_paths(walked, work.diffusion.walk_back(work.target, tables, x, work.generator))
        log_w, c = backpropagate(work, tables, paths, lambda r: o.coefficients(r, work), self.ends)
        if not math.isfinite(c.loss):
            return lost(log_w)
        own = log_w[: work.batch - replayed]
        if self.buffer is not None:
            self.buffer.add(walked.x, own)
        found = facts(c.loss, own)
        if o.spread != 1.0:  # weights of paths that are not the diffusion's own: their mean is no bound
            return {key: found[key] for key in ("loss", "dropped")}
        return found

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
            device = self.work.generator.device
            self.buffer.x, self.buffer.log_w = (tensors[f"replay.{key}"].to(device) for key in ("x", "log_w"))


def join_paths(a: Paths, b: Paths) -> Paths:
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
        if self.spread != 1.0 and self.replay is not None:
            raise ValueError(
                f"{name}: a replay buffer weighs points as ends of the diffusion's own paths, and those of spread = "
                f"{self.spread} are none; leave spread = 1, or replay null."
            )
        if self.paths_per_start > 1 and self.replay is not None:
            raise ValueError(f"{name}: paths that share a start cannot come from a replay buffer; give one of them.")

    def validate(self, scheme: Scheme, batch: int) -> None:
        super().validate(scheme, batch)
        if batch % self.paths_per_start:
            raise ValueError(
                f"{type(self).__name__}: batch = {batch} is no multiple of paths_per_start = {self.paths_per_start}."
            )

    def runner(self, work: Work) -> Runner:
        return _PathRunner(self, work)

    @abstractmethod
    def coefficients(self, r: Tensor, work: Work) -> Coefficients:
        """Loss and derivatives for R (batch,)."""


@dataclass(frozen=True, eq=False)
class LogVariance(_PathObjective):
    """Var[R] on paths of any origin, without the derivative of what drove them.

    Args:
        spread: factor of the noise of the walks: above 1 they explore. Not with a replay.
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
        if self.paths_per_start != 1:
            raise ValueError(
                "TrajectoryBalance: log Z is one number, whatever the start; leave paths_per_start = 1, or take "
                "LogVariance."
            )
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

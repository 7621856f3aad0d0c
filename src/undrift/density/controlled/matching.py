r"""Matching: the control is regressed on what its mean should be, one state at a time; no path is ever differentiated.

    AdjointMatching   states of the diffusion's own draws, targets grad log g_0 at their ends. With points "bridge" the
                      states are drawn anew between the prior and the end (Adjoint Sampling): many steps use each
                      gradient. With points "path" they are those of the walk, along which a lean adjoint is carried
                      back, in the unit of the control unchanged.
    ScoreMatching     states noised from weighted particles, which a frozen copy of the diffusion draws: a particle
                      denoising diffusion sampler where they are resampled under way.

Both regress on :math:`N + \kappa r`, see regression.py. For ScoreMatching that is a control variate. The draws of
AdjointMatching have no weights, and their law q is the target's at the fixed point only. With
:math:`E_q[r | y] = V (a_q - E_q[N | y])`, a_q the control whose draws have the law q,

.. math:: E_q[N + \kappa r \,|\, y] = (1 - \kappa V)\, E_q[N | y] + \kappa V a_q :

a damped step to the same fixed point. It is needed: undamped steps overshoot by the curvature of the target in units of
the reference, and end in one mode, or diverge. For Gaussian targets one damped step is exact.

The bridge's states have the law of the walk's if the start says nothing about the end: exactly from a Dirac start
(PIS), else as far as the process has forgotten by T. ScoreMatching is a regression on the target's own law, as far as
the particles have it: it sees the modes that they see.

The target's gradient is taken at the draws, once a draw, and, for controls that are guided, at each example too, once
whatever the number of steps that use it; along a "path" those are known from the walk.

References:
    Havens et al., Adjoint Sampling, 2025. Domingo-Enrich et al., Adjoint Matching, 2025.
    Phillips et al., Particle Denoising Diffusion Sampler, 2024.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from undrift.density.controlled.chain import Chain
from undrift.density.controlled.diffusion import ControlledDiffusion, Paths, Scheme, clean
from undrift.density.controlled.objective import Objective, Runner, Work, facts
from undrift.density.controlled.regression import (
    Curvature,
    Examples,
    TimeLaw,
    Times,
    control_at,
    noised,
    stein,
    steps_spread,
    unknown_of,
)
from undrift.density.controlled.trust_region import tempering
from undrift.density.controlled.walk import walk
from undrift.density.move import Move
from undrift.density.schedule import Resampling
from undrift.density.target import Target
from undrift.measure.evidence import effective_sample_size, log_mean_exp

__all__ = ["AdjointMatching", "ScoreMatching"]

_CHUNK = 8192
Mix = Literal["best", "novel", "denoising"]


@dataclass(frozen=True, eq=False)
class _Matching(Objective):
    mixes: ClassVar[tuple[str, ...]] = ("best", "novel", "denoising")
    draws: int = 1024
    examples: int = 16384
    refresh: int = 100
    times: TimeLaw = "divergence"
    clip: float = 1e4
    mix: Mix = "best"

    def __post_init__(self) -> None:
        name = type(self).__name__
        for key, least in (("draws", 2), ("examples", 1), ("refresh", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"{name}: {key} must be at least {least}, got {getattr(self, key)}.")
        if self.times not in ("divergence", "angle"):
            raise ValueError(f"{name}: times must be divergence or angle, got {self.times!r}.")
        if self.mix not in self.mixes:
            raise ValueError(f"{name}: mix must be one of {', '.join(self.mixes)}, got {self.mix!r}.")
        if not self.clip > 0:
            raise ValueError(f"{name}: clip must be positive, got {self.clip}.")

    def validate(self, scheme: Scheme, batch: int) -> None:
        super().validate(scheme, batch)
        name = type(self).__name__
        if scheme.annealed:
            raise ValueError(
                f"{name}: an annealed diffusion has no reference to match; take LogVariance or LogDerivative, or the "
                "reversal of a process."
            )
        if scheme.backward is not None:
            raise ValueError(f"{name}: noise leads back, no learned control; leave backward null, or take LogVariance.")


@dataclass(frozen=True, eq=False)
class AdjointMatching(_Matching):
    """Regression on grad log g_0 at the ends of the diffusion's own paths.

    Args:
        draws: walked at each refreshment; a gradient each, and for guided controls one a step of the walk.
        examples: states with their targets, made at each refreshment; steps use batches of them.
        refresh: steps between two refreshments.
        times: how states are spread over time; see :meth:`undrift.density.controlled.regression.Times.spread`.
        clip: largest entry of grad log g_0, in 1 / (unit of the reference); larger ones are cut, and counted as
            "clipped".
        mix: "best": damped steps. "novel": grad log g_0 as it is, as in the papers.
        points: "bridge" or "path", see the module.
        buffer: draws that bridges end in, the latest.
    """

    points: Literal["bridge", "path"] = "bridge"
    buffer: int = 4096
    mixes: ClassVar[tuple[str, ...]] = ("best", "novel")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.points not in ("bridge", "path"):
            raise ValueError(f"AdjointMatching: points must be bridge or path, got {self.points!r}.")
        if self.buffer < self.draws:
            raise ValueError(f"AdjointMatching: buffer = {self.buffer} must hold the {self.draws} draws.")

    def runner(self, work: Work) -> Runner:
        return _AdjointRunner(self, work)


@dataclass(frozen=True, eq=False)
class ScoreMatching(_Matching):
    """Regression of the score on weighted particles.

    Args:
        draws: particles of each refreshment.
        examples, refresh, times, clip: as in :class:`AdjointMatching`.
        mix: "best": the mixture of novel and denoising targets of least variance. "novel": grad log g_0 alone, as in
            the paper. "denoising": no gradient of the target at the particles at all.
        replace: steps between two replacements of the diffusion that draws the particles, by the averaged one.
        bound: largest divergence of the particles' law, as it is learned from, from that of the walkers, in nats: their
            weights are tempered till then. Null for no tempering.
        resampling: of the particles under way; null for none, the only choice for controls that are not guided.
        move: an exact move, made after each resampling; null for none.
        size: its step size; see :func:`undrift.density.controlled.walk.walk`.
    """

    replace: int = 100
    bound: float | None = 3.0
    resampling: Resampling | None = None
    move: Move | None = None
    size: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.replace < 1:
            raise ValueError(f"ScoreMatching: replace must be at least 1, got {self.replace}.")
        if self.bound is not None and not self.bound > 0:
            raise ValueError(f"ScoreMatching: bound must be positive or null, got {self.bound}.")
        if not self.size > 0:
            raise ValueError(f"ScoreMatching: size must be positive, got {self.size}.")
        if self.move is not None and self.resampling is None:
            raise ValueError("ScoreMatching: moves are made after a resampling; give resampling too.")

    def validate(self, scheme: Scheme, batch: int) -> None:
        super().validate(scheme, batch)
        if self.resampling is not None and not ControlledDiffusion(scheme, 1).guided:
            raise ValueError(
                "ScoreMatching: particles are resampled by what the target says on the way, and this control never "
                "asks it; give an informed control or a potential, or resampling: null."
            )

    def runner(self, work: Work) -> Runner:
        return _ScoreRunner(self, work)


# -- at work -----------------------------------------------------------------------------------------------------------


class _Draws:
    """Draws x with grad log g_0 there."""

    def __init__(self, x: Tensor, novel: Tensor) -> None:
        self.x, self.novel = x, novel

    @staticmethod
    def of(x: Tensor, score: Tensor, clip: float) -> tuple[_Draws, float]:
        """Draws with the target's gradient, and the share of them at which it was cut."""
        novel = score + x
        share = float((novel.abs() > clip).any(-1).double().mean())
        return _Draws(x, novel.clamp(-clip, clip)), share


class _Matcher(Runner):
    """Steps on a pool of examples that is made anew from time to time."""

    damped = False
    """Whether draws have another law than the target's, so that kappa damps, rather than leaving the mean as it is."""

    def __init__(self, objective: _Matching, work: Work) -> None:
        self.objective, self.work = objective, work
        self.examples: Examples | None = None
        self.age = 0
        self.facts: dict[str, float] = {}
        with torch.no_grad():
            self.chain: Chain = work.tables().chain
        self.top = float(self.chain.unknown[0])

    @abstractmethod
    def renew(self) -> tuple[Examples, dict[str, float]]:
        """New examples, and what was seen on the way; without a graph."""

    def step(self) -> dict[str, float]:
        work = self.work
        if self.examples is None or self.age >= self.objective.refresh:
            with torch.no_grad():
                self.chain = work.tables().chain
                self.examples, self.facts = self.renew()
            self.age = 0
        e = self.examples.batch(work.batch, work.generator)
        a = control_at(work.diffusion, self.chain, e.label, e.y, e.value, e.score)
        loss = (e.weight.to(a) * (a - e.target).square().sum(-1)).mean()
        loss.backward()
        self.age += 1
        return {**self.facts, "loss": float(loss.detach())}

    def between(self, draws: _Draws) -> Examples:
        """Examples noised from draws."""
        o, work = self.objective, self.work
        generator = work.generator
        times = Times.spread(o.examples, self.top, o.times, generator)
        each = torch.randperm(o.examples, generator=generator, device=generator.device) % len(draws.x)
        y = noised(draws.x[each], times.unknown, generator)
        value, score = _answers(work.target, y) if work.diffusion.guided else (None, None)
        return Examples(times.label, times.weight, y, self.mixed(draws, each, y, times.label), value, score)

    def mixed(self, draws: _Draws, each: Tensor, y: Tensor, label: Tensor) -> Tensor:
        """What the control is regressed on at states y (n, d), noised from the draws at an index ``each``."""
        x, novel, unknown = draws.x[each], draws.novel[each], unknown_of(label)
        if self.objective.mix == "denoising":
            return (x - y) / unknown.to(x).unsqueeze(-1)
        if self.objective.mix == "novel":
            return novel
        curvature = Curvature.fit(draws.x, draws.novel, self.top, self.work.generator, damped=self.damped)
        return novel + curvature.at(label) * stein(x, novel, y, unknown)

    # -- interruptions -------------------------------------------------------------------------------------------------

    def state(self) -> Mapping[str, Tensor]:
        if self.examples is None:
            return {}
        found = {f"examples.{name}": part for name, part in self.examples._asdict().items() if part is not None}
        seen = {f"seen.{name}": torch.tensor(value, dtype=torch.float64) for name, value in self.facts.items()}
        return {**found, **seen, "age": torch.tensor(self.age)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        if "age" not in tensors:
            return
        device, prefix = self.work.generator.device, "examples."
        found = {k.removeprefix(prefix): part.to(device) for k, part in tensors.items() if k.startswith(prefix)}
        self.examples = Examples(**found)
        self.facts = {
            name.removeprefix("seen."): float(part) for name, part in tensors.items() if name.startswith("seen.")
        }
        self.age = int(tensors["age"])


def _answers(target: Target, y: Tensor) -> tuple[Tensor, Tensor]:
    parts = [clean(target, part) for part in y.split(_CHUNK)]
    return torch.cat([value for value, _ in parts]), torch.cat([score for _, score in parts])


class _AdjointRunner(_Matcher):
    objective: AdjointMatching
    damped = True

    def __init__(self, objective: AdjointMatching, work: Work) -> None:
        super().__init__(objective, work)
        self.kept: _Draws | None = None

    def renew(self) -> tuple[Examples, dict[str, float]]:
        o, work = self.objective, self.work
        tables = work.tables()
        paths = work.walk(tables, o.draws, end_score=True)
        log_w = work.diffusion.log_weights(tables, paths, work.chunk)
        good = torch.isfinite(log_w).nonzero().squeeze(-1)
        if len(good) == 0:
            raise FloatingPointError(
                f"{work.target.name}: no path of {o.draws} ended inside the support. Give coordinates (loc, scale)."
            )
        paths = paths.take(good)
        assert paths.end_score is not None
        draws, clipped = _Draws.of(paths.x, paths.end_score, o.clip)
        known = {**facts(math.nan, log_w), "clipped": clipped}
        if o.points == "path":
            return self._along(paths, draws), known
        if self.kept is not None:
            draws = _Draws(torch.cat([self.kept.x, draws.x]), torch.cat([self.kept.novel, draws.novel]))
        self.kept = _Draws(draws.x[-o.buffer :].clone(), draws.novel[-o.buffer :].clone())
        return self.between(self.kept), known

    def _along(self, paths: Paths, draws: _Draws) -> Examples:
        """Examples on the walk itself."""
        o, work, chain = self.objective, self.work, self.chain
        k, weight = steps_spread(o.examples, chain, o.times, work.generator)
        each = torch.randperm(o.examples, generator=work.generator, device=k.device) % len(draws.x)
        y = (chain.look[k].unsqueeze(-1) * paths.z[k, :, each]).sum(1)
        value = None if paths.value is None else paths.value[k, each]
        score = None if paths.score is None else paths.score[k, each]
        label = chain.label.double()[k]
        return Examples(label, weight, y, self.mixed(draws, each, y, label), value, score)

    def state(self) -> Mapping[str, Tensor]:
        kept = {} if self.kept is None else {"kept.x": self.kept.x, "kept.novel": self.kept.novel}
        return {**super().state(), **kept}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        super().load(tensors)
        if "kept.x" in tensors:
            device = self.work.generator.device
            self.kept = _Draws(tensors["kept.x"].to(device), tensors["kept.novel"].to(device))


class _ScoreRunner(_Matcher):
    objective: ScoreMatching

    def __init__(self, objective: ScoreMatching, work: Work) -> None:
        super().__init__(objective, work)
        self.sampler = copy.deepcopy(work.diffusion).requires_grad_(False)
        self.driven = 0  # steps since the sampler was replaced

    def step(self) -> dict[str, float]:
        if self.driven >= self.objective.replace:
            better = self.work.diffusion if self.work.teacher is None else self.work.teacher
            self.sampler.load_state_dict(better.state_dict())
            self.driven = 0
        self.driven += 1
        return super().step()

    def renew(self) -> tuple[Examples, dict[str, float]]:
        o, work = self.objective, self.work
        found = walk(
            self.sampler,
            work.target,
            1,
            o.draws,
            work.generator,
            work.dtype,
            resampling=o.resampling,
            move=o.move,
            size=o.size,
        )
        log_w = found.log_weights[0]
        eta = 1.0 if o.bound is None else max(tempering(log_w, o.bound), 1e-12)
        index = Resampling().ancestors(eta * log_w.unsqueeze(0), work.generator)[0]
        distinct, back = index.unique(return_inverse=True)
        x = found.x[0][distinct]
        if o.mix == "denoising":
            draws, clipped = _Draws(x[back], torch.zeros_like(x)[back]), 0.0
        else:
            apart, clipped = _Draws.of(x, _answers(work.target, x)[1], o.clip)
            draws = _Draws(apart.x[back], apart.novel[back])
        known = {
            "log_z": float(log_mean_exp(log_w)),
            "ess": float(effective_sample_size(log_w)) / o.draws,
            "distinct": len(distinct) / o.draws,
            "eta": eta,
            "clipped": clipped,
        }
        return self.between(draws), known

    def state(self) -> Mapping[str, Tensor]:
        frozen = {f"sampler.{name}": part.clone() for name, part in self.sampler.state_dict().items()}
        return {**super().state(), **frozen, "driven": torch.tensor(self.driven)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        super().load(tensors)
        frozen = {name.removeprefix("sampler."): part for name, part in tensors.items() if name.startswith("sampler.")}
        if frozen:
            self.sampler.load_state_dict(frozen)
            self.driven = int(tensors["driven"])

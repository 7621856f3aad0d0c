r"""Learned samplers as methods: train a controlled diffusion for a target, then draw with exact weights.

One class, :class:`Controlled`, and the literature's samplers as settings of it:

======  ==========================  ========  ===========  =========================================================
        noising process             backward  annealed     paper
======  ==========================  ========  ===========  =========================================================
PIS     bridge to the origin        --        no           Zhang & Chen 2022
DIS     VP, or any linear process   --        no           Berner, Richter & Ullrich 2024; Richter & Berner 2024
DDS     VP, gain "score"            --        no           Vargas, Grathwohl & Doucet 2023
Bridge  VP, or any linear process   learned   no           Richter & Berner 2024; Blessing et al. 2025 (underdamped)
CMCD    geometry of a recipe        its own   yes          Vargas et al. 2024; with resampling, Chen et al. 2025
PDDS    VP, cosine clock            --        no           Phillips et al. 2024: a potential, matched, and particles
======  ==========================  ========  ===========  =========================================================

A control is a function of continuous time: it may be trained with few steps and draw with many (``train_steps``).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from undrift.density.controlled.control import Control, Informed, Plain, Potential
from undrift.density.controlled.diffusion import ControlledDiffusion, Learnable, Scheme
from undrift.density.controlled.grid import EqualAngles, EqualTimes, TimeGrid
from undrift.density.controlled.matching import ScoreMatching
from undrift.density.controlled.objective import LogDerivative, LogVariance, Objective
from undrift.density.controlled.sampler import TrainedSampler
from undrift.density.controlled.train import Training, train
from undrift.density.coordinates import Coordinates
from undrift.density.draws import Draws
from undrift.density.method import Method
from undrift.density.move import Move
from undrift.density.schedule import Resampling
from undrift.density.session import Session
from undrift.density.variational import MeanField
from undrift.process.catalog import VP, BrownianBridge
from undrift.process.clock import ConstantClock, CosineClock, LinearClock
from undrift.process.linear import LinearProcess

__all__ = ["CMCD", "DDS", "DIS", "PDDS", "PIS", "Bridge", "Controlled"]


def _vp() -> LinearProcess:
    return VP(clock=LinearClock(0.1, 10.0))


@dataclass(frozen=True, eq=False)
class Controlled(Method):
    """A controlled diffusion, trained for the target and drawn from.

    Args:
        process: any linear process; with auxiliaries, the diffusion is underdamped. For an annealed one, its geometry.
        grid: where it steps.
        steps: K, of the draws.
        train_steps: K in training; null for the same.
        control: how the forward control is parametrised.
        backward: of the backward direction; null for the noising process as it is.
        annealed: Langevin dynamics along the geometric path, not the reversal of noise.
        integrator: of a reversal: "exponential", exact kernels of the reference, or "euler"; see :func:`reversal`.
        gain: of a reversal: how a control enters the exponential kernels; see there.
        learn: what is learned beside controls: "noise"; for annealed ones "prior" and "levels" too.
        objective: what is minimised.
        training: how.
        resampling: of the draws, on the way; null for plain importance weights.
        caution: how little the resampling of a reversal without a potential trusts :math:`g_0(y)` far from the target:
            it counts to the power :math:`(1 - V)^{caution}`. At 0 walkers are selected too early, and modes are lost.
        move: an exact move after each resampling; null for none.
        moves: how many.
        move_size: their step size, in units of the reference's smallest variance.
        coordinates: centre and scale, in which the prior is N(0, I); null for the target's own. The prior must cover
            the target: modes outside it are never found.
    """

    process: LinearProcess = field(default_factory=_vp)
    grid: TimeGrid = field(default_factory=EqualAngles)
    steps: int = 100
    train_steps: int | None = None
    control: Control = field(default_factory=Informed)
    backward: Control | None = None
    annealed: bool = False
    integrator: Literal["exponential", "euler"] = "exponential"
    gain: Literal["posterior", "score"] = "posterior"
    learn: tuple[Learnable, ...] = ()
    objective: Objective = field(default_factory=LogVariance)
    training: Training = field(default_factory=Training)
    resampling: Resampling | None = None
    caution: float = 4.0
    move: Move | None = None
    moves: int = 1
    move_size: float = 0.1
    coordinates: Coordinates | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        for key in ("steps", "moves", *(["train_steps"] if self.train_steps is not None else [])):
            if getattr(self, key) < 1:
                raise ValueError(f"{name}: {key} must be at least 1, got {getattr(self, key)}.")
        for key, known in (("integrator", ("exponential", "euler")), ("gain", ("posterior", "score"))):
            if getattr(self, key) not in known:
                raise ValueError(f"{name}: {key} must be {' or '.join(known)}, got {getattr(self, key)!r}.")
        if len({*self.learn} & {*get_args(Learnable)}) < len(self.learn):
            raise ValueError(
                f"{name}: learn holds some of {', '.join(get_args(Learnable))}, each once, got {', '.join(self.learn)}."
            )
        if not self.caution >= 0:
            raise ValueError(f"{name}: caution must not be negative, got {self.caution}.")
        if not self.move_size > 0:
            raise ValueError(f"{name}: move_size must be positive, got {self.move_size}.")
        if self.move is not None and self.resampling is None:
            raise ValueError(f"{name}: moves follow a resampling; give resampling as well, or no move.")
        if self.move is not None and not self.move.exact:
            raise ValueError(
                f"{name}: {type(self.move).__name__} does not leave its level invariant; take MALA or HMC."
            )
        for steps in (self.steps, self.train_steps or self.steps):
            self.grid.validate(self.process, steps)
        diffusion = ControlledDiffusion(replace(self.scheme(2), grid=EqualTimes()), 1)
        with torch.no_grad():
            diffusion.base_chain()  # a process that makes no chain of many steps makes none of two
        self.objective.validate(self.scheme(), self.training.batch)
        if self.resampling is not None and not diffusion.guided:
            raise ValueError(
                f"{name}: resampling weighs walkers by the target on the way, which {type(self.control).__name__} "
                "never asks; take Informed or Potential."
            )

    def scheme(self, steps: int | None = None) -> Scheme:
        """What is controlled, with the given number of steps."""
        return Scheme(
            self.process,
            self.grid,
            steps or self.steps,
            self.control,
            self.backward,
            self.annealed,
            self.integrator,
            self.gain,
            self.learn,
            self.caution,
        )

    def draw(self, session: Session) -> Draws:
        generator = session.generator
        diffusion = ControlledDiffusion(self.scheme(self.train_steps), session.target.dim, session.seed)
        diffusion.to(generator.device)
        resumed, seen = session.resumed, session.see(self.coordinates)
        if resumed is None:  # the target is tried where walkers come
            z = torch.randn(64, seen.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            seen.check(z.to(generator.device, session.dtype))

        def save(entry: Any, force: bool) -> None:
            def full() -> tuple[dict[str, Tensor], dict[str, Any]]:
                tensors, facts = entry()
                kept = {**session.kept, **tensors, "generator": generator.get_state()}
                return kept, {**session.costs(), "training": facts}

            session.journal.write(full, force)

        record = train(
            diffusion,
            seen,
            self.objective,
            self.training,
            generator,
            resumed=None if resumed is None else (resumed[0], resumed[1]["training"]),
            save=save if session.journal.active else None,
            progress=session.progress,
        )
        loc, scale = (session.kept.get(key) for key in ("loc", "scale"))
        sampler = TrainedSampler(self, diffusion, session.target, loc, scale, tuple(record))
        draws = sampler.draws_of(seen, session.n, session.repeats, generator, session.dtype, progress=session.progress)
        session.journal.close()
        return draws

    def in_words(self) -> str:
        """One line for reports."""
        kind = type(self).__name__ if type(self) is not Controlled else "controlled diffusion"
        more = f", {type(self.objective).__name__}, {self.steps} steps"
        return f"{kind} ({type(self.process).__name__}{more}{', resampled' if self.resampling else ''})"


# -- settings with names of their own ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PIS(Controlled):
    """Path integral sampler: a Brownian motion from the origin, controlled so that it ends in the target."""

    process: LinearProcess = field(default_factory=BrownianBridge)
    grid: TimeGrid = field(default_factory=EqualTimes)
    control: Control = field(default_factory=lambda: Informed(interpolate=False, initial=0.01))


@dataclass(frozen=True, eq=False)
class DIS(Controlled):
    """Time-reversed diffusion sampler: the reversal of a noising process, VP or any other."""


@dataclass(frozen=True, eq=False)
class DDS(Controlled):
    """Denoising diffusion sampler: as DIS, with the control entering as a score, guided by the target's own."""

    gain: Literal["posterior", "score"] = "score"
    control: Control = field(default_factory=lambda: Informed(interpolate=False, initial=0.01))


@dataclass(frozen=True, eq=False)
class Bridge(Controlled):
    """General diffusion bridge: both directions are learned."""

    backward: Control | None = field(default_factory=Plain)
    objective: Objective = field(default_factory=LogVariance)


@dataclass(frozen=True, eq=False)
class CMCD(Controlled):
    """Controlled Monte Carlo diffusion: annealed Langevin dynamics with a learned correction of its force.

    With ``resampling`` it is sequential controlled Langevin dynamics.
    """

    process: LinearProcess = field(default_factory=lambda: VP(clock=ConstantClock(2.0)))
    grid: TimeGrid = field(default_factory=EqualTimes)
    control: Control = field(default_factory=Plain)
    annealed: bool = True
    learn: tuple[Learnable, ...] = ("noise", "prior", "levels")
    objective: Objective = field(default_factory=LogDerivative)


@dataclass(frozen=True, eq=False)
class PDDS(Controlled):
    """Particle denoising diffusion sampler: a learned potential guides and weighs particles, which are resampled.

    The coordinates are those of the best Gaussian with independent coordinates, as in the paper; unlike there, the
    scales stay positive by construction, and the walk ends at t = 0, at the target itself. Training draws particles
    without resampling, from the averaged potential, and mixes both kinds of score matching; the paper's own setting is
    ``objective: {type: ScoreMatching, draws: 30000, examples: 30000, mix: novel, times: angle, replace: 10000, bound:
    null, resampling: {threshold: 0.3}}``.
    """

    process: LinearProcess = field(default_factory=lambda: VP(clock=CosineClock()))
    grid: TimeGrid = field(default_factory=EqualTimes)
    gain: Literal["posterior", "score"] = "score"
    control: Control = field(default_factory=Potential)
    objective: Objective = field(default_factory=lambda: ScoreMatching(draws=2048, examples=8192))
    training: Training = field(default_factory=lambda: Training(batch=300))
    resampling: Resampling | None = field(default_factory=lambda: Resampling(threshold=0.3))
    coordinates: Coordinates | None = field(default_factory=MeanField)

r"""Moves: one step of every walker at a level. Exact moves leave the level's density invariant; ULA does not.

All sizes are Langevin's eps, a step of which diffuses by :math:`\sqrt{2 \varepsilon}`; a leapfrog step of Hamiltonian
dynamics is :math:`\sqrt{2\varepsilon}` long, so HMC with one leapfrog step *is* MALA.

    ULA          y + eps s + sqrt(2 eps) xi
    MALA         the same as a proposal, accepted by Metropolis-Hastings
    HMC          leapfrog steps of H = -log pi + |v|^2 / 2 from v ~ N(0, I), then Metropolis
    Underdamped  OBABO steps with a velocity that persists; with metropolis, generalised HMC
    Independence proposals from a fixed law, Metropolis-Hastings

References:
    Roberts & Tweedie 1996 (ULA, MALA); Neal 2011 (HMC); Horowitz 1991 (generalised HMC); Monmarché 2021 (OBABO).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from undrift.density.law import Base, Normal
from undrift.density.level import LevelDensity
from undrift.density.target import Point

__all__ = ["HMC", "MALA", "ULA", "Cycle", "Independence", "Info", "Move", "Size", "State", "Underdamped"]

Size = Callable[[Tensor], Tensor]
"""``size(score)`` -> eps, () or (n,), for the level's score (n, d) at the walkers."""


class State(NamedTuple):
    """Walkers.

    Attributes:
        y: (n, d).
        point: what is known of the target at y; None if the last move did not look.
        velocity: (n, d) for moves that keep one.
        moved: moves made.
    """

    y: Tensor
    point: Point | None = None
    velocity: Tensor | None = None
    moved: int = 0

    def known(self, density: LevelDensity) -> Point:
        return density.at(self.y) if self.point is None else self.point

    def take(self, index: Tensor) -> State:
        """The walkers at an index."""
        return State(
            self.y[index],
            None if self.point is None else self.point.take(index),
            None if self.velocity is None else self.velocity[index],
            self.moved,
        )


class Info(NamedTuple):
    """What a move did.

    Attributes:
        acceptance: probability with which each walker's proposal was accepted, (n,); None without Metropolis.
        sized: whether the step size had a say, so that acceptance steers it.
    """

    acceptance: Tensor | None = None
    sized: bool = True


class Move(ABC):
    """A Markov kernel for a batch of walkers."""

    @property
    def exact(self) -> bool:
        """Whether it leaves the level invariant."""
        return True

    @property
    def acceptance(self) -> float:
        """What the step size is steered to, where it is adapted."""
        return 0.574

    @property
    def state_dependent(self) -> bool:
        """Whether a step size that depends on the walker is allowed."""
        return False

    @abstractmethod
    def step(self, density: LevelDensity, state: State, size: Size, generator: torch.Generator) -> tuple[State, Info]:
        """Move every walker once."""


def _normal_like(y: Tensor, generator: torch.Generator) -> Tensor:
    return torch.empty_like(y).normal_(generator=generator)


def _column(eps: Tensor) -> Tensor:
    return eps.unsqueeze(-1) if eps.ndim else eps


def _metropolis(log_ratio: Tensor, old: Point, new: Point, generator: torch.Generator) -> tuple[Tensor, Tensor, Point]:
    """Acceptance probability (n,), who accepted (n,), and the points; what is not a number is refused."""
    log_ratio = torch.nan_to_num(log_ratio, nan=-math.inf)
    coin = torch.empty_like(log_ratio).uniform_(generator=generator)
    accepted = coin.log() < log_ratio
    return log_ratio.clamp(max=0).exp(), accepted, Point.where(accepted, new, old)


@dataclass(frozen=True, eq=False)
class ULA(Move):
    """Unadjusted Langevin: one gradient a step, and an error of the order of the step."""

    @property
    def exact(self) -> bool:
        return False

    @property
    def state_dependent(self) -> bool:
        return True

    def step(self, density: LevelDensity, state: State, size: Size, generator: torch.Generator) -> tuple[State, Info]:
        score = density.score(state.known(density))
        eps = _column(size(score))
        y = state.y + eps * score + (2 * eps).sqrt() * _normal_like(score, generator)
        return State(y, None, state.velocity, state.moved + 1), Info()


@dataclass(frozen=True, eq=False)
class MALA(Move):
    """Metropolis-adjusted Langevin: one gradient a step. The step size may depend on the walker."""

    @property
    def state_dependent(self) -> bool:
        return True

    def step(self, density: LevelDensity, state: State, size: Size, generator: torch.Generator) -> tuple[State, Info]:
        old = state.known(density)
        score = density.score(old)
        eps = size(score)
        noise = _normal_like(score, generator)
        new = density.at(old.x + _column(eps) * score + (2 * _column(eps)).sqrt() * noise)
        back = density.score(new)
        eps_back = size(back)
        # log q(y | y') - log q(y' | y), q = N(y + eps s(y), 2 eps)
        miss = old.x - new.x - _column(eps_back) * back
        log_q = noise.square().sum(-1) / 2 - miss.square().sum(-1) / (4 * eps_back)
        log_q = log_q + 0.5 * score.shape[-1] * (eps / eps_back).log()
        ratio = density.log_prob(new) - density.log_prob(old) + log_q
        probability, _, point = _metropolis(ratio, old, new, generator)
        return State(point.x, point, state.velocity, state.moved + 1), Info(probability)


def _leapfrog(density: LevelDensity, point: Point, velocity: Tensor, step: Tensor, count: int) -> tuple[Point, Tensor]:
    """``count`` leapfrog steps of length ``step``, () or (n, 1): as many gradients."""
    score = density.score(point)
    for _ in range(count):
        velocity = velocity + 0.5 * step * score
        point = density.at(point.x + step * velocity)
        score = density.score(point)
        velocity = velocity + 0.5 * step * score
    return point, velocity


def _energy(density: LevelDensity, point: Point, velocity: Tensor) -> Tensor:
    return 0.5 * velocity.square().sum(-1) - density.log_prob(point)


@dataclass(frozen=True, eq=False)
class HMC(Move):
    """Hamiltonian Monte Carlo: leapfrog steps, uniform on 1 ... ``leapfrogs``, one number for the batch.

    Args:
        leapfrogs: most leapfrog steps, one gradient each; the random number of them avoids periodic orbits.
        decades: the leapfrog step of each walker is divided by 10^(decades U), U uniform: for targets of many scales.
    """

    leapfrogs: int = 8
    decades: float = 0.0

    def __post_init__(self) -> None:
        if not self.decades >= 0:
            raise ValueError(f"HMC: decades must be 0 or more, got {self.decades}.")
        if self.leapfrogs < 1:
            raise ValueError(f"HMC: leapfrogs must be at least 1, got {self.leapfrogs}.")

    @property
    def acceptance(self) -> float:
        return 0.8

    def step(self, density: LevelDensity, state: State, size: Size, generator: torch.Generator) -> tuple[State, Info]:
        old = state.known(density)
        step = (2 * _column(size(old.score))).sqrt()
        velocity = _normal_like(old.x, generator)
        if self.decades > 0:
            spread = torch.empty_like(old.log_prob).uniform_(0.0, self.decades, generator=generator)
            step = step * torch.pow(10.0, -spread).unsqueeze(-1)
        count = int(torch.randint(1, self.leapfrogs + 1, (), generator=generator, device=generator.device))
        new, turned = _leapfrog(density, old, velocity, step, count)
        ratio = _energy(density, old, velocity) - _energy(density, new, turned)
        probability, _, point = _metropolis(ratio, old, new, generator)
        return State(point.x, point, None, state.moved + 1), Info(probability)


@dataclass(frozen=True, eq=False)
class Underdamped(Move):
    r"""Underdamped Langevin by OBABO: half a refreshment of the velocity, a leapfrog step, half a refreshment.

    Args:
        friction: of the velocity, in units of 1 / leapfrog step: it keeps :math:`e^{-\text{friction}}` of itself.
        metropolis: accept each leapfrog step by Metropolis and turn the velocity on refusal (generalised HMC); the
            move is exact then.
    """

    friction: float = 0.5
    metropolis: bool = False

    def __post_init__(self) -> None:
        if not self.friction > 0:
            raise ValueError(f"Underdamped: friction must be positive, got {self.friction}.")

    @property
    def exact(self) -> bool:
        return self.metropolis

    @property
    def acceptance(self) -> float:
        return 0.9

    def _refresh(self, velocity: Tensor, generator: torch.Generator) -> Tensor:
        keep = math.exp(-0.5 * self.friction)
        return keep * velocity + math.sqrt(1 - keep**2) * _normal_like(velocity, generator)

    def step(self, density: LevelDensity, state: State, size: Size, generator: torch.Generator) -> tuple[State, Info]:
        old = state.known(density)
        velocity = _normal_like(old.x, generator) if state.velocity is None else state.velocity
        velocity = self._refresh(velocity, generator)
        step = (2 * _column(size(old.score))).sqrt()
        new, turned = _leapfrog(density, old, velocity, step, 1)
        info = Info()
        if self.metropolis:
            ratio = _energy(density, old, velocity) - _energy(density, new, turned)
            probability, accepted, new = _metropolis(ratio, old, new, generator)
            turned, info = torch.where(accepted.unsqueeze(-1), turned, -velocity), Info(probability)
        return State(new.x, new, self._refresh(turned, generator), state.moved + 1), info


@dataclass(frozen=True, eq=False)
class Independence(Move):
    """Proposals from a law that does not look at the walker: jumps between modes, where the law covers them.

    Args:
        law: of the proposals, in y.
    """

    law: Base = field(default_factory=Normal)

    def step(self, density: LevelDensity, state: State, size: Size, generator: torch.Generator) -> tuple[State, Info]:
        old = state.known(density)
        new = density.at(self.law.sample(old.x.shape[0], old.x.shape[1], generator, old.x.dtype))
        ratio = density.log_prob(new) - density.log_prob(old) + self.law.log_prob(old.x) - self.law.log_prob(new.x)
        probability, _, point = _metropolis(ratio, old, new, generator)
        return State(point.x, point, state.velocity, state.moved + 1), Info(probability, sized=False)


@dataclass(frozen=True, eq=False)
class Cycle(Move):
    """Moves in turn, one each time.

    Args:
        moves: name a move several times to use it more often.
    """

    moves: tuple[Move, ...] = field(default_factory=lambda: (MALA(), Independence()))

    def __post_init__(self) -> None:
        if not self.moves:
            raise ValueError("Cycle: give at least one move.")

    @property
    def exact(self) -> bool:
        return all(m.exact for m in self.moves)

    @property
    def acceptance(self) -> float:
        return next((m.acceptance for m in self.moves if not isinstance(m, Independence)), 0.5)

    @property
    def state_dependent(self) -> bool:
        return all(m.state_dependent or isinstance(m, Independence) for m in self.moves)

    def step(self, density: LevelDensity, state: State, size: Size, generator: torch.Generator) -> tuple[State, Info]:
        return self.moves[state.moved % len(self.moves)].step(density, state, size, generator)

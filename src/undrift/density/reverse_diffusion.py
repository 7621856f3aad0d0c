r"""Reverse diffusion from a density: the noising process run back, its denoiser estimated from the density alone.

Process x denoiser x sampler, as with data; only the denoiser is new (:class:`MonteCarloDenoiser`). With VP and many
small steps this is reverse-diffusion Monte Carlo; with noise levels spaced in log sigma from a finite level, stochastic
localisation. Draws are not corrected: errors of the denoiser and of the steps stay in them.

A walk starts from a Gaussian at time T. The law that the process has there is that of :math:`z_T` for the data, with
:math:`\tilde x \sim x_0 + \sigma(T)\, n`, and the usual N(0, S_T) is too narrow by the data's spread s: an error of
order :math:`(s / \sigma(T))^2`, negligible for the default clocks (sigma(T) of 80 and more) unless s is large. Three
remedies, in the order of their cost: a clock of longer horizon; a start as wide as data N(0, s^2 I) would be
(:func:`matched_prior`, always on here); and, where sigma(T) is of the order of s, starts weighted by the density of
:math:`\tilde x`, which the denoiser estimates without bias, and resampled (``oversample``).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from undrift._linalg import sqrt_sum
from undrift.density.coordinates import Coordinates
from undrift.density.draws import Draws
from undrift.density.law import Normal
from undrift.density.method import Method
from undrift.density.monte_carlo import MonteCarloDenoiser, check_settings
from undrift.density.session import Session
from undrift.density.target import Target
from undrift.diffusion import Diffusion
from undrift.process.catalog import VP
from undrift.process.linear import LinearProcess, mix
from undrift.sample.exponential import Exponential
from undrift.sample.plan import Plan, Sampler, TableSampler
from undrift.sample.run import run_plan

__all__ = ["ReverseDiffusion", "matched_prior"]


def matched_prior(process: LinearProcess, spread: float) -> LinearProcess:
    """The same process, whose walks start from the law of z for data N(0, spread^2 I) instead of data at 0.

    Args:
        process: any linear process; it is not changed.
        spread: deviation of the data about the origin, between modes included.

    Returns:
        A copy, for :func:`undrift.sample.sample` and for plans.
    """
    if not (spread >= 0 and math.isfinite(spread)):
        raise ValueError(f"matched_prior: spread must not be negative, got {spread}.")

    def prior(t: object | None = None) -> Tensor:
        mean, root = process.kernel(process.horizon if t is None else t)
        return sqrt_sum(root, spread * mean.unsqueeze(-1))

    twin = copy.copy(process)
    object.__setattr__(twin, "prior", prior)
    return twin


@dataclass(frozen=True, eq=False)
class ReverseDiffusion(Method):
    """A diffusion run back from noise, with a denoiser estimated from the density.

    Args:
        process: any linear process.
        sampler: any sampler with fixed steps.
        particles, levels, moves, control: of the denoiser; see :class:`MonteCarloDenoiser`.
        scale: deviation of the target about the origin, modes included, in its coordinates: of the denoiser's reference
            and of the start.
        oversample: candidates for each start; above 1 they are weighted and resampled, which a process that ends at a
            noise level of the order of ``scale`` needs.
        batch: walkers at a time; a run that is interrupted goes on with the next of them.
        coordinates: centre and scale; null for the target's own.

    Each walker costs steps x particles x (1 + levels x moves) gradients.
    """

    process: LinearProcess = field(default_factory=VP)
    sampler: Sampler = field(default_factory=lambda: Exponential(steps=30))
    particles: int = 64
    levels: int = 8
    moves: int = 1
    control: bool = True
    scale: float = 1.0
    oversample: int = 1
    batch: int = 1024
    coordinates: Coordinates | None = None

    def __post_init__(self) -> None:
        check_settings("ReverseDiffusion", self.particles, self.levels, self.moves, self.scale)
        for key in ("oversample", "batch"):
            if getattr(self, key) < 1:
                raise ValueError(f"ReverseDiffusion: {key} must be at least 1, got {getattr(self, key)}.")
        if not isinstance(self.sampler, TableSampler):
            raise ValueError(
                f"ReverseDiffusion: {type(self.sampler).__name__} chooses its steps by differences between calls, "
                "which the noise of a Monte Carlo denoiser drowns; take fixed steps, such as Exponential's."
            )

    def in_words(self) -> str:
        """One line for reports."""
        return f"reverse diffusion ({type(self.process).__name__}, {type(self.sampler).__name__})"

    def draw(self, session: Session) -> Draws:
        process = matched_prior(self.process, self.scale)
        assert isinstance(self.sampler, TableSampler)
        plan = self.sampler.plan(process)
        repeats, walkers, generator = session.repeats, -(-session.n // session.repeats), session.generator
        resumed, seen = session.resumed, session.see(self.coordinates)
        done: list[Tensor] = []
        worst = math.inf
        if resumed is None:
            seen.check(Normal(self.scale).sample(64, seen.dim, generator, session.dtype))
            noise = self._starts(plan, seen, repeats, walkers, generator, session.dtype)
        else:
            tensors, plain = resumed
            noise = tensors["noise"].to(generator.device)
            worst = math.inf if plain["ess"] is None else plain["ess"]
            done = [tensors["x"].to(generator.device)]

        def entry() -> tuple[dict[str, Tensor], dict[str, Any]]:
            x = torch.cat(done) if done else noise[:0, 0]
            tensors = {**session.kept, "noise": noise, "x": x, "generator": mark}
            return tensors, {**session.costs(), "ess": worst if math.isfinite(worst) else None}

        first, mark = sum(map(len, done)), generator.get_state()
        batches = -(-len(noise) // self.batch)
        with tqdm(
            total=plan.calls * batches,
            initial=plan.calls * (first // self.batch),
            disable=not session.progress,
            desc="reverse diffusion",
            unit="call",
        ) as bar:
            try:
                for i in range(first, len(noise), self.batch):
                    mark = generator.get_state()
                    session.journal.write(entry)
                    denoiser = _Watched(self._denoiser(seen, generator))
                    part = noise[i : i + self.batch]
                    done.append(run_plan(Diffusion(process, denoiser), plan, part, generator, False, bar).x)
                    worst = min(worst, denoiser.worst)
            except KeyboardInterrupt:
                session.journal.write(entry, force=True)
                raise
        session.journal.close()
        return Draws(
            target=session.target,
            states=session.own(torch.cat(done)).reshape(repeats, walkers, 1, seen.dim),
            walker_log_weights=None,
            corrected=False,
            method=self.in_words(),
            notes=self._notes(worst, plan),
        )

    def _denoiser(self, target: Target, generator: torch.Generator) -> MonteCarloDenoiser:
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        return MonteCarloDenoiser(
            target, self.particles, self.levels, self.moves, self.scale, control=self.control, seed=seed
        )

    def _starts(
        self, plan: Plan, target: Target, repeats: int, walkers: int, generator: torch.Generator, dtype: torch.dtype
    ) -> Tensor:
        """Standard normal numbers (repeats * walkers, K, d) that the plan's prior turns into starts."""
        count = repeats * walkers * self.oversample
        noise = torch.empty(count, self.process.channels, target.dim, dtype=dtype, device=generator.device).normal_(
            generator=generator
        )
        if self.oversample == 1:
            return noise
        x, sigma = self.process.statistic(mix(plan.prior, noise), plan.times[0])
        law = Normal(math.hypot(self.scale, float(sigma[0])))
        log_w = self._denoiser(target, generator).log_prob(x, sigma[:1].to(x)) - law.log_prob(x).double()
        edges = log_w.reshape(repeats, -1).softmax(-1).cumsum(-1)
        start = torch.empty(repeats, 1, dtype=edges.dtype, device=edges.device).uniform_(generator=generator)
        places = (torch.arange(walkers, device=edges.device) + start) / walkers
        chosen = torch.searchsorted(edges / edges[:, -1:], places, right=True).clamp(max=edges.shape[1] - 1)
        chosen = chosen + edges.shape[1] * torch.arange(repeats, device=edges.device).unsqueeze(-1)
        return noise[chosen.reshape(-1)]

    def _notes(self, worst: float, plan: Plan) -> tuple[str, ...]:
        notes = []
        if worst < 4 / self.particles:
            notes.append(
                f"the denoiser's effective sample size fell to {worst * self.particles:.1f} of {self.particles} "
                "particles on average over a call; take more levels or particles, or a better scale."
            )
        sigma = float(self.process.sigma(plan.times[0]))
        if self.oversample == 1 and sigma < 3 * self.scale:
            notes.append(
                f"walks start at noise level {sigma:.3g}, not far above the target's scale {self.scale:.3g}, from a "
                "Gaussian; set oversample to 4 or more, or start at a higher level."
            )
        return tuple(notes)


class _Watched:
    """A Monte Carlo denoiser that remembers the least mean effective sample size of its calls."""

    def __init__(self, denoiser: MonteCarloDenoiser) -> None:
        self.denoiser, self.worst = denoiser, math.inf

    def __call__(self, x: Tensor, sigma: Tensor, **condition: Any) -> Tensor:
        mean = self.denoiser(x, sigma, **condition)
        assert self.denoiser.ess is not None
        self.worst = min(self.worst, self.denoiser.ess.mean)
        return mean

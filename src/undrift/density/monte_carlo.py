r"""A denoiser without data: the posterior mean :math:`D(x, \sigma) = E[x_0 \mid x_0 + \sigma n = x]` by Monte Carlo.

For data of density :math:`\gamma / Z` the posterior of a noisy point is :math:`\propto \gamma(x_0)\, N(x; x_0,
\sigma^2)` (all covariances here are multiples of the identity). Particles start from the posterior q that data
N(0, s^2) would have,

.. math:: q = N\Bigl(\frac{s^2}{s^2 + \sigma^2} x,\; \frac{s^2 \sigma^2}{s^2 + \sigma^2}\Bigr),

and follow the geometric path from it with weights, resampling and Metropolis steps: sequential Monte Carlo for each
noisy point, all of them in one batch. The mean weight is an unbiased estimate of :math:`Z p_\sigma(x)`, the density of
the noisy point; D is the weighted mean, with an error of order 1 / sqrt(particles) and a bias of order 1 / particles.

Its variance is reduced by the posterior's score :math:`h = \nabla \log \gamma(x_0) + (x - x_0) / \sigma^2`, whose mean
is zero: :math:`D = E[x_0 - a h]` for every a. With a = 0 this is the posterior mean, good at large noise; with
:math:`a = -\sigma^2` it is :math:`x + \sigma^2 E \nabla \log \gamma(x_0)`, good at small noise; regression of x0 on h
finds the best a, coordinate by coordinate, and makes the estimate exact where gamma is Gaussian.

References:
    Huang et al., Reverse Diffusion Monte Carlo, 2023 (arXiv 2307.02037).
    Grenioux et al., Stochastic Localization via Iterative Posterior Sampling, 2024 (arXiv 2402.10758).
    De Bortoli et al., Target Score Matching, 2024 (the two identities); Del Moral et al. 2006 (SMC).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from undrift.denoise.base import Denoiser, per_sample
from undrift.density.law import Base, Normal
from undrift.density.level import LevelDensity, times
from undrift.density.move import MALA, State
from undrift.density.schedule import Resampling
from undrift.density.step import smoothness as largest_curvature
from undrift.density.target import Evaluations, Point, Target
from undrift.measure.evidence import effective_sample_size, log_mean_exp

__all__ = ["MonteCarloDenoiser", "Posterior", "PosteriorTarget"]


class PosteriorTarget(Target):
    """log gamma(x0) + log N(x; x0, sigma^2 I): one density for each noisy point. Shares the target's counter.

    Args:
        inner: gamma.
        x: noisy points (n, d); the i-th point asked for is judged by the i-th of them.
        sigma: noise levels (n, 1).
    """

    def __init__(self, inner: Target, x: Tensor, sigma: Tensor) -> None:
        self.inner, self.dim, self.x, self.sigma = inner, inner.dim, x, sigma
        self.log_z, self.parameters, self._name = None, None, f"posterior of {inner.name}"

    @cached_property
    def evaluations(self) -> Evaluations:
        return self.inner.evaluations

    def _likelihood(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        residual = (self.x - x0) / self.sigma
        constant = self.dim * (self.sigma.squeeze(-1).log() + 0.5 * math.log(2 * math.pi))
        return -0.5 * residual.square().sum(-1) - constant, residual / self.sigma

    def log_prob(self, x: Tensor) -> Tensor:
        return self.inner.log_prob(x) + self._likelihood(x)[0]

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        value, score = self.inner.log_prob_and_score(x)
        likelihood, pull = self._likelihood(x)
        return value + likelihood, score + pull


@dataclass(frozen=True, eq=False)
class _Reference(Base):
    """A Gaussian for each point: centres (n, d), deviations (n, 1)."""

    centre: Tensor
    deviation: Tensor

    def log_prob(self, y: Tensor) -> Tensor:
        return Normal().log_prob((y - self.centre) / self.deviation) - y.shape[-1] * self.deviation.squeeze(-1).log()

    def score(self, y: Tensor) -> Tensor:
        return (self.centre - y) / self.deviation.square()

    def sample(self, n: int, dim: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        return self.centre + self.deviation * torch.empty_like(self.centre).normal_(generator=generator)

    def smoothness(self, dim: int) -> float:
        return float(self.deviation.min()) ** -2


class Posterior(NamedTuple):
    """What the particles say about noisy points.

    Attributes:
        mean: estimate of E[x0 | x], (n, d).
        log_prob: log of an unbiased estimate of Z p_sigma(x), the density of the noisy point, (n,).
        ess: least effective sample size on the way, as a share of the particles, (n,).
    """

    mean: Tensor
    log_prob: Tensor
    ess: Tensor


class Effective(NamedTuple):
    """Effective sample sizes, as shares of the particles: of the worst point, and on average."""

    smallest: float
    mean: float


class MonteCarloDenoiser(Denoiser):
    """E[x0 | x0 + sigma n = x] of a density that can only be evaluated: every process and sampler runs from it.

    A denoiser is called without a generator, so this one carries its own, made from ``seed``: the same calls in the
    same order give the same answers, but two equal calls do not. Step sizes are steered from call to call and fixed
    within one, so the weights of a call are unbiased.

    Args:
        target: the density, centred near the origin; see :meth:`Target.affine`.
        particles: for each noisy point.
        levels: tempered levels between the reference posterior and the posterior, quadratically spaced; 0 is plain
            importance sampling.
        moves: Metropolis-adjusted Langevin steps at each level.
        scale: s, deviation of the reference; as wide as the target, modes included.
        resampling: of particles by their weights; null never.
        control: use the score of the posterior as a control variate. Its mean is zero only for densities without jumps:
            turn it off for a support with edges where the density does not vanish.
        smoothness: largest curvature of -log gamma, for the first step sizes; null measures it at the first call.
        chunk: particles evaluated at a time, which bounds memory.
        seed: of the particles.

    Each call costs batch x particles x (1 + levels x moves) gradients.
    """

    def __init__(
        self,
        target: Target,
        particles: int = 64,
        levels: int = 8,
        moves: int = 1,
        scale: float = 1.0,
        resampling: Resampling | None = Resampling(),  # noqa: B008
        control: bool = True,
        smoothness: float | None = None,
        chunk: int = 2**18,
        seed: int = 0,
    ) -> None:
        check_settings(type(self).__name__, particles, levels, moves, scale)
        if chunk < particles:
            raise ValueError(f"MonteCarloDenoiser: chunk must hold at least one point's particles, got {chunk}.")
        self.target, self.particles, self.levels, self.moves, self.scale = target, particles, levels, moves, scale
        self.resampling, self.control, self.smoothness, self.chunk = resampling, control, smoothness, chunk
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}
        self._relative = [0.5 * target.dim ** (-1 / 3)] * levels  # eps times the curvature, at each level
        self._curvature = smoothness
        self._ess: Effective | None = None

    @property
    def config(self) -> Mapping[str, Any]:
        """Constructor arguments."""
        return {
            "target": self.target,
            "particles": self.particles,
            "levels": self.levels,
            "moves": self.moves,
            "scale": self.scale,
            "resampling": self.resampling,
            "control": self.control,
            "smoothness": self.smoothness,
            "chunk": self.chunk,
            "seed": self.seed,
        }

    @property
    def ess(self) -> Effective | None:
        """Effective sample sizes of the last call; None before the first. Near 1 / particles nothing can be trusted."""
        return self._ess

    # -- what it offers ------------------------------------------------------------------------------------------------

    def __call__(self, x: Tensor, sigma: Tensor | float, **condition: Any) -> Tensor:
        """Estimate of E[x0 | x0 + sigma n = x].

        Args:
            x: noisy points (batch, *event), with as many coordinates an event as the target.
            sigma: one noise level, or one per sample (batch,); at 0 the answer is x.

        Returns:
            Posterior mean, same shape and dtype as ``x``.
        """
        if condition:
            raise ValueError(f"MonteCarloDenoiser takes no condition, got {', '.join(condition)}.")
        return self.posterior(x, sigma).mean.reshape(x.shape)

    def score(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Estimate of the score of x0 + sigma n at x, (D - x) / sigma^2, by Tweedie; sigma > 0."""
        return (self(x, sigma) - x) / per_sample(sigma, x).square()

    def log_prob(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """log of an unbiased estimate of the density of x0 + sigma n at x, times Z: (batch,)."""
        return self.posterior(x, sigma).log_prob

    @torch.no_grad()
    def posterior(self, x: Tensor, sigma: Tensor | float) -> Posterior:
        """All estimates at noisy points x (batch, *event), for noise levels as in a call."""
        flat = x.detach().reshape(x.shape[0], -1)
        if flat.shape[1] != self.target.dim:
            raise ValueError(
                f"MonteCarloDenoiser: {self.target.name} has {self.target.dim} coordinates, "
                f"got points of shape {tuple(x.shape)}."
            )
        level = per_sample(sigma, flat)
        if not bool((level >= 0).all()):
            raise ValueError(f"MonteCarloDenoiser: sigma must not be negative, got {float(level.min()):.4g}.")
        clean = level == 0
        level = torch.where(clean, torch.ones_like(level), level)
        generator = self._generators.get(x.device)
        if generator is None:
            generator = self._generators[x.device] = torch.Generator(x.device).manual_seed(self.seed)
        if self._curvature is None and self.levels:
            self._curvature = self._measure(flat, generator)
        size = max(1, self.chunk // self.particles)
        accepted = torch.zeros(self.levels, dtype=torch.float64)
        parts = []
        for points, levels in zip(flat.split(size), level.split(size), strict=True):
            parts.append(self._particles(points, levels, generator, accepted))
        mean, log_prob, ess = (torch.cat(v) for v in zip(*parts, strict=True))
        if self.moves:
            rates = accepted / max(1, flat.shape[0])
            self._relative = [
                c * math.exp(float(rate) - MALA().acceptance) for c, rate in zip(self._relative, rates, strict=True)
            ]
        self._ess = Effective(float(ess.min()), float(ess.mean())) if len(ess) else None
        return Posterior(torch.where(clean, flat, mean), log_prob, ess)

    # -- how -----------------------------------------------------------------------------------------------------------

    def _measure(self, like: Tensor, generator: torch.Generator) -> float:
        """Curvature of -log gamma at draws of the reference; that of the reference where none is found."""
        probe = Normal(self.scale).sample(64, self.target.dim, generator, like.dtype)
        try:
            return largest_curvature(self.target, probe)
        except ValueError:
            return self.scale**-2

    def _particles(self, x: Tensor, sigma: Tensor, generator: torch.Generator, accepted: Tensor) -> Posterior:
        """Estimates for points x (n, d) at levels (n, 1); adds each level's acceptance, times n, to ``accepted``."""
        n, d, p = x.shape[0], x.shape[1], self.particles
        s2 = self.scale**2
        shrink = s2 / (s2 + sigma.square())
        noisy, noise = x.repeat_interleave(p, 0), sigma.repeat_interleave(p, 0)
        law = _Reference((shrink * x).repeat_interleave(p, 0), (shrink.sqrt() * sigma).repeat_interleave(p, 0))
        posterior = PosteriorTarget(self.target, noisy, noise)
        point = LevelDensity(posterior, law).at(law.sample(n * p, d, generator, x.dtype))
        log_w = torch.zeros(n, p, dtype=torch.float64, device=x.device)
        log_z, ess = log_w.new_zeros(n), log_w.new_ones(n)
        previous, moved = 0.0, MALA()
        for k in range(max(1, self.levels)):
            beta = ((k + 1) / max(1, self.levels)) ** 2
            gain = times(beta - previous, point.log_prob - law.log_prob(point.x))
            log_w = log_w + torch.nan_to_num(gain.double(), nan=-math.inf, posinf=math.inf).reshape(n, p)
            ess = torch.minimum(ess, effective_sample_size(log_w) / p)
            previous = beta
            if not (self.levels and self.moves):
                continue
            if self.resampling is not None:
                point, log_w, log_z = self._resample(point, log_w, log_z, generator)
            density = LevelDensity(posterior, law, beta, 1 - beta)
            curved = noise.squeeze(-1) ** -2 + beta * (self._curvature or 0.0) + (1 - beta) / s2
            eps = self._relative[k] / curved
            state = State(point.x, point)
            for _ in range(self.moves):
                state, info = moved.step(density, state, lambda score, eps=eps: eps, generator)  # type: ignore[misc]
                assert info.acceptance is not None
                accepted[k] += float(info.acceptance.mean()) * n / self.moves
            point = state.known(density)
        return Posterior(self._mean(point, log_w), log_z + log_mean_exp(log_w), ess)

    def _resample(
        self, point: Point, log_w: Tensor, log_z: Tensor, generator: torch.Generator
    ) -> tuple[Point, Tensor, Tensor]:
        assert self.resampling is not None
        due = self.resampling.due(log_w) & torch.isfinite(log_w).any(-1)
        if not bool(due.any()):
            return point, log_w, log_z
        n, p = log_w.shape
        source = torch.arange(p, device=log_w.device).expand(n, p).clone()
        source[due] = self.resampling.ancestors(log_w[due], generator)
        index = (source + p * torch.arange(n, device=log_w.device).unsqueeze(-1)).reshape(-1)
        log_z = torch.where(due, log_z + log_mean_exp(log_w), log_z)
        return point.take(index), log_w.masked_fill(due.unsqueeze(-1), 0.0), log_z

    def _mean(self, point: Point, log_w: Tensor) -> Tensor:
        """Weighted mean of x0 (n, d), with its regression on the score taken out."""
        n, p = log_w.shape
        w = torch.nan_to_num(log_w.softmax(-1), nan=1 / p).unsqueeze(-1).to(point.x.dtype)
        x0 = point.x.reshape(n, p, -1)
        mean = (w * x0).sum(1)
        if not self.control:
            return mean
        h = point.score.reshape(n, p, -1)
        centre = (w * h).sum(1)
        off = h - centre.unsqueeze(1)
        slope = (w * off * x0).sum(1) / (w * off.square()).sum(1).clamp(min=torch.finfo(w.dtype).tiny)
        return mean - slope * centre


def check_settings(owner: str, particles: int, levels: int, moves: int, scale: float) -> None:
    """Raise ValueError unless these make a denoiser."""
    if particles < 2:
        raise ValueError(f"{owner}: particles must be at least 2, got {particles}.")
    if levels < 0 or moves < 0:
        raise ValueError(f"{owner}: levels and moves must not be negative, got {levels} and {moves}.")
    if levels and not moves:
        raise ValueError(
            f"{owner}: {levels} levels without moves are plain importance sampling; set levels=0, or moves=1."
        )
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"{owner}: scale must be positive, got {scale}.")

r"""A diffusion whose process is not linear: a score by a network, the way back, and the bound.

The state z (batch, dim) has no channels: the process :class:`~undrift.process.NonlinearRecipe` mixes coordinates as it
likes, there is no kernel given the data, and no denoiser to share. What is left is the score

.. math::
    s_\theta(z, t) = -\nabla H(z) + \frac{F_\theta(z / \text{scale},\, c_t)}{\varsigma_t}, \qquad
    \varsigma_t^2 = \delta^2 + r t, \quad c_t = \tfrac14 \log \varsigma_t

* :math:`-\nabla H` is the score of the stationary law, which :math:`p_t` approaches: F learns the departure, vanishes
  as the process forgets, and at the start, when F = 0, the model is the stationary law itself.
* :math:`1/\varsigma_t` is the size of the departure. With the kernel from a point, the usual choice is
  :math:`\Sigma_t^{-1/2}`, infinite at t = 0; here data have a density, the score is finite at t = 0, and its size is
  one over the width of the law's finest features: :math:`\delta` in the data, smeared by noise of rate
  :math:`r = \operatorname{tr} 2D/\text{dim}` since. The target's own scale, one over the square root of the local step,
  is a fact of the estimator and must not enter the model.
* Both the label and the density of the times are uniform in :math:`\log \varsigma_t`.

**The way back.** Reversed, the process has drift :math:`-f + 2 \nabla \cdot D + 2 D s`. By the recipe that is the drift
of the same recipe with curl -Q, which is the stationary process reversed, plus the kick :math:`2 D F/\varsigma`. So the
splitting of SSCS carries over: half a step without the network, by local linearisation; a kick; half a step.

References:
    Anderson, Reverse-time diffusion equation models, 1982 (the drift of the reversed process).
    Dockhorn, Vahdat & Kreis, Score-based generative modeling with critically-damped Langevin diffusion, 2022 (SSCS).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.func import grad

from undrift.process.local import local_gaussian, local_pairs
from undrift.process.nonlinear import NonlinearRecipe, _apply

__all__ = ["NonlinearDiffusion"]


@dataclass(frozen=True, eq=False)
class NonlinearDiffusion:
    r"""Process x score network, for a process without a kernel.

    Args:
        process: the process; its stationary law is the law that sampling starts from.
        network: maps (batch, dim) and labels (batch,) to (batch, dim).
        horizon: T; the process should have forgotten its start by then.
        resolution: :math:`\delta`, the width of the data's finest features.
        scale: by which the network's inputs are divided; the larger deviation of the data and the stationary law.
    """

    process: NonlinearRecipe
    network: Callable[..., Tensor]
    horizon: float
    resolution: float = 0.1
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("horizon", "resolution", "scale"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"NonlinearDiffusion: {name} must be positive and finite, got {value}.")
        if not self.rate > 0:
            raise ValueError("NonlinearDiffusion: the process has no noise at its probe points, so nothing to reverse.")

    @cached_property
    def rate(self) -> float:
        """r, the rate of the process at its probe points."""
        return self.process.rate

    @cached_property
    def _reverse(self) -> NonlinearRecipe:
        return self.process.reverse

    def level(self, t: Tensor) -> Tensor:
        r""":math:`\varsigma_t` at times of any shape."""
        return (self.resolution**2 + self.rate * t).sqrt()

    def times(self, u: Tensor) -> Tensor:
        r"""Times at which :math:`\log \varsigma_t` has gone the fraction u in [0, 1] of its way, same shape."""
        return self.resolution**2 * torch.expm1(u * self._octaves) / self.rate

    @property
    def _octaves(self) -> float:
        return math.log1p(self.rate * self.horizon / self.resolution**2)

    def spacing(self, t: Tensor) -> Tensor:
        """dt/du of :meth:`times`: one over the density of times drawn uniformly in u, same shape."""
        return self._octaves * self.level(t).square() / self.rate

    def departure(self, z: Tensor, t: Tensor | float, **condition: Any) -> Tensor:
        r""":math:`F/\varsigma_t`, the score less the stationary law's; z (batch, dim), one time or (batch,)."""
        level = self.level(torch.as_tensor(t, dtype=torch.float64, device=z.device)).expand(z.shape[0])
        return self.network(z / self.scale, (0.25 * level.log()).to(z), **condition) / level.to(z).unsqueeze(-1)

    def score(self, z: Tensor, t: Tensor | float, **condition: Any) -> Tensor:
        """Estimated grad log p_t(z): z (batch, dim), one time or one per sample (batch,); same shape as z."""
        return self._slope(z) + self.departure(z, t, **condition)

    def _slope(self, z: Tensor) -> Tensor:
        return -grad(lambda points: self.process.energy(points).sum())(z).detach()

    @torch.no_grad()
    def sample(
        self,
        n: int,
        steps: int,
        generator: torch.Generator,
        start: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        **condition: Any,
    ) -> Tensor:
        r"""Samples (n, dim), by the splitting above: one network call and one local step for each of ``steps``.

        The grid is uniform in :math:`\varsigma_t`, so that steps shrink towards the data.

        Args:
            n: number of samples.
            steps: number of steps, at least 1.
            generator: source of all randomness, on the network's device.
            start: draws (n, dim) from the stationary law. If not given, standard normal points are run for 4 T by
                local steps of T/25; give draws where that is too short, or does not reach every mode.
            dtype: of the state, where no start is given.
            condition: passed to the network.

        Raises:
            ValueError: for unusable arguments.
            FloatingPointError: if a state is no longer finite.
        """
        if n < 1 or steps < 1:
            raise ValueError(f"NonlinearDiffusion.sample: n and steps must be at least 1, got {n} and {steps}.")
        shape = (n, self.process.dim)
        if start is not None and (start.shape != shape or not start.is_floating_point()):
            raise ValueError(
                f"NonlinearDiffusion.sample: start must be floating-point, {shape}; got {start.dtype}, "
                f"{tuple(start.shape)}."
            )

        def walk(process: NonlinearRecipe, z: Tensor, h: float) -> Tensor:
            noise = torch.empty_like(z).normal_(generator=generator)
            return local_gaussian(process.drift, process.diffusion, z, h).draw(noise)

        z = start
        if z is None:
            z = torch.empty(shape, dtype=dtype, device=generator.device).normal_(generator=generator)
            for _ in range(100):
                z = walk(self.process, z, 0.04 * self.horizon)
        ends = self.level(torch.tensor([self.horizon, 0.0], dtype=torch.float64))
        levels = torch.linspace(float(ends[0]), float(ends[1]), steps + 1, dtype=torch.float64)
        times = ((levels.square() - self.resolution**2) / self.rate).clamp(min=0).tolist()
        halves = [0.5 * (a - b) for a, b in pairwise(times)]
        z = walk(self._reverse, z, halves[0])
        for i, (t, half) in enumerate(zip(times[:-1], halves, strict=True)):
            d = 2 * half * self.process.matrices(z)[0]
            z = z + 2 * _apply(d, self.departure(z, t - half, **condition))
            z = walk(self._reverse, z, half + (halves[i + 1] if i + 1 < steps else 0.0))
            if not bool(torch.isfinite(z).all()):
                raise FloatingPointError(
                    f"NonlinearDiffusion.sample: {int((~torch.isfinite(z)).any(1).sum())} of {n} states are not finite "
                    f"after step {i + 1} of {steps}, at t = {times[i + 1]:.4g}; take more steps, or train longer."
                )
        return z

    @torch.no_grad()
    def elbo(
        self,
        x: Tensor,
        log_z: float,
        generator: torch.Generator,
        visits: int = 16,
        step: float = 0.02,
        lag: float = 0.02,
        **condition: Any,
    ) -> Tensor:
        r"""One-sample estimates of a lower bound of log p(x), in nats, (batch,).

        With :math:`\pi = e^{-H}/Z`, :math:`r_\theta = s_\theta + \nabla H` the departure, and g the local Gaussian's
        gradient, which stands for :math:`\nabla \log p_t`,

        .. math::
            \text{ELBO}(x) = \log \pi(x) - \int_0^T E\big[ r_\theta^\top D\, r_\theta
                - 2\, r_\theta^\top D\, (g + \nabla H) \,\big|\, x \big]\, dt

        By Girsanov, :math:`-\text{ELBO} = -E \log \pi(y_T) + \int E[s^\top D s - 2 s^\top D g - \nabla \cdot f +
        \nabla \cdot \nabla \cdot D]\,dt` for any score s; at :math:`s = -\nabla H` the model is the stationary process
        reversed, and the bound equals :math:`\log \pi(x)` at every x. The difference of the two has neither a terminal
        term nor a divergence, and no variance where the network says nothing. In expectation over data,
        -ELBO exceeds their entropy by :math:`KL(p_T \| \pi) + \int E\|s_\theta - \nabla \log p_t\|_D^2\, dt`.

        Exact up to the weak error of the local steps. The integral starts at 0, since pairs :math:`\mu \pm L\xi`
        cancel what diverges in g; data must have a density.

        Args:
            x: data (batch, dim).
            log_z: log Z, the logarithm of the integral of exp(-H).
            generator: source of all randomness, on x's device.
            visits: times at which the integrand is evaluated along each path.
            step, lag: longest step of the simulation, and the step that is matched.
            condition: passed to the network; as many copies of each tensor of size batch as there are evaluations.
        """
        u = torch.rand(x.shape[0], generator=generator, dtype=torch.float64, device=x.device)
        gain = self.matching(x, u, generator, visits, step, lag, **condition)[0]
        return -(log_z + self.process.energy(x)) - gain.mean(0)

    def matching(
        self,
        x: Tensor,
        u: Tensor,
        generator: torch.Generator,
        visits: int,
        step: float,
        lag: float,
        growth: float = 0.0,
        pairs: bool = True,
        ito: bool = True,
        likelihood: bool = True,
        **condition: Any,
    ) -> tuple[Tensor, Tensor]:
        r"""The integrand of :meth:`elbo` at times along paths from x: what local score matching minimises.

        With ``likelihood``, :math:`\big(r^\top D r - 2 r^\top D (g + \nabla H)\big)\, dt/du`, summed over coordinates;
        without, :math:`\varsigma_t^2 \big(\frac12 \|r\|^2 - r \cdot (g + \nabla H)\big)`.

        Args:
            x: data (batch, dim).
            u: where in its slice a path's times stand, in [0, 1), (batch,), float64.
            generator: source of the noise, on x's device.
            visits, step, lag, growth, pairs, ito: see :class:`undrift.train.LocalScoreMatching`.
            condition: passed to the network; tensors of size batch go along with their path.

        Returns:
            values and levels, (visits, batch).
        """
        batch, dim = x.shape[0], self.process.dim
        if x.shape != (batch, dim):
            raise ValueError(f"NonlinearDiffusion: data must be (batch, {dim}), got {tuple(x.shape)}.")
        with torch.no_grad():
            cells = torch.arange(visits, dtype=torch.float64, device=x.device).unsqueeze(-1)
            times = self.times((cells + u) / visits)
            local = local_pairs(
                self.process, x, times, torch.minimum(lag + growth * times, times), step, generator, ito
            )
            noise = torch.empty_like(local.mean).normal_(generator=generator)
            other = -noise if pairs else torch.empty_like(noise).normal_(generator=generator)
            z = torch.cat([local.draw(noise), local.draw(other)])
            target = torch.cat([local.target(noise), local.target(other)]) - self._slope(z)
            t = times.flatten().repeat(2)
            weight = (self.spacing(t) if likelihood else self.level(t).square()).to(x)
        many = {
            k: v.repeat(2 * visits, *[1] * (v.ndim - 1)) if isinstance(v, Tensor) and v.ndim and len(v) == batch else v
            for k, v in condition.items()
        }
        r = self.departure(z, t, **many)
        dual = 2 * _apply(self.process.matrices(z)[0], r) if likelihood else r
        value = weight * (dual * (0.5 * r - target)).sum(-1)
        return value.reshape(2, visits, batch).mean(0), self.level(times).to(x)

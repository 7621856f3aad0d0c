r"""What a plan makes of a mixture: its output is no mixture, and has no closed recursion.

On the line, for a process of one channel, it is computed all the same, by quadrature and to rounding:

* a plan without noise maps its start :math:`\xi \sim N(0, 1)`, by the sampler's real code;
* a plan with noise and without memory is a Markov chain, and its density is carried from call to call by the
  Chapman-Kolmogorov equation :math:`q'(y) = \int q(x) N(y; f(x), L^2)\, dx`; calls without noise, such as a last
  prediction, are maps again.

:mod:`undrift.design.line` does both. A mixture whose coordinates are independent is as many lines: squared W2 and KL
add up. Everywhere else particles are drawn. The result says which.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from undrift.denoise.closed_form import MixtureDenoiser
from undrift.design.curves import _diagonal, _factors
from undrift.design.line import Line, TooFine, compare, smoothed
from undrift.diffusion import Diffusion
from undrift.measure.distance import jackknife, sliced_wasserstein
from undrift.sample.plan import Plan
from undrift.sample.run import run_plan, sample

__all__ = ["Outcome", "outcome"]

Method = Literal["quadrature", "particles"]

# Deviations that densities are followed for: 2e-17 of a normal law lies beyond the first. The others serve samples so
# much narrower than the data that the data's mass lies where theirs is less than that.
_REACHES = (8.5, 17.0, 34.0)


@dataclass(frozen=True, eq=False)
class Outcome:
    """How far the samples of a plan are from a mixture.

    Attributes:
        method: "quadrature" or "particles".
        measure: "W2", or "sliced W2" for particles in more than one dimension.
        w2: the distance, in units of the state at the noise level that the plan ends with, to the data at that level.
            Between particles it is too large by what two samples of one law are apart.
        w2_std_error: of particles; 0 for a quadrature, which is good to eight digits or more.
        kl: KL(data || samples) in nats; None for particles, and where the samples all but miss a part of the data.
        sigma: the noise level that the plan ends with; 0 after a final call.
    """

    method: Method
    measure: str
    w2: float
    w2_std_error: float
    kl: float | None
    sigma: float

    def __str__(self) -> str:
        error = f" ± {self.w2_std_error:.2g}" if self.w2_std_error else ""
        kl = "" if self.kl is None else f", KL {self.kl:.4g}"
        return f"{self.measure} {self.w2:.4g}{error}{kl} (by {self.method})"


def outcome(
    plan: Plan,
    data: MixtureDenoiser,
    *,
    method: Method | None = None,
    particles: int = 100_000,
    seed: int = 0,
) -> Outcome:
    """The error of a plan's output on a mixture, with the exact denoiser.

    Args:
        plan: of any sampler.
        data: the mixture.
        method: None for a quadrature where there is one.
        particles: how many to draw otherwise, at least 20.
        seed: of the particles.

    Raises:
        ValueError: if a quadrature is asked for where there is none; before any work, but where noise turns out too
            small for the law that it is added to.
        FloatingPointError: if the walk does not stay finite.
    """
    if method not in (None, "quadrature", "particles"):
        raise ValueError(f"outcome: method must be 'quadrature', 'particles' or None, got {method!r}.")
    if particles < 20:
        raise ValueError(f"outcome: particles must be at least 20, got {particles}.")
    time = float(plan.after[-1].detach())
    scale, noise = 1.0, 0.0  # the state is scale x0 + noise, if all is well
    if time > 0:
        mean, root = plan.process.kernel(plan.after[-1].detach())
        scale, noise = float(mean[0].detach()), float(root[0].detach().norm())
    sigma = noise / abs(scale)
    if method != "particles":
        lines, why = _lines(plan, data, noise)
        try:
            if lines:
                return Outcome("quadrature", "W2", *_quadrature(plan, lines, scale, noise), sigma)
        except TooFine:
            why = "noise that is not very small beside the width of the law that it is added to"
        if method == "quadrature":
            raise ValueError(f"outcome: a quadrature needs {why}; leave the method open for particles.")
    return _particles(plan, data, particles, seed, scale, noise, sigma)


def _lines(plan: Plan, data: MixtureDenoiser, noise: float) -> tuple[list[tuple[MixtureDenoiser, float]], str]:
    """The data's coordinates as mixtures on the line, with counts, and what a quadrature needs if there are none."""
    if plan.process.channels > 1:
        return [], "a process of one channel"
    if bool((plan.L != 0).any()) and max(plan.A.shape[1], plan.B.shape[1]) > 1:
        return [], "a plan that has no noise or no memory"
    log_weights, means, *_ = data._on(torch.device("cpu"))
    factors = _factors(log_weights.exp(), means, _diagonal(data), centred=False)
    if factors is None:
        return [], "a mixture on the line, or one whose coordinates are independent"
    if noise == 0 and any(float(variances.min()) == 0 for (_, _, variances), _ in factors):
        return [], "data with a density at the last noise level"
    return [(MixtureDenoiser(w, m.unsqueeze(-1), v), count) for (w, m, v), count in factors], ""


class _Calls:
    """Calls ``first`` ... ``last`` - 1 of a plan without memory, less their noise, as a map of the state."""

    def __init__(self, plan: Plan, data: MixtureDenoiser, first: int, last: int) -> None:
        self.predict = Diffusion(plan.process, data).predictor(plan.times.detach())
        self.calls = range(first, last)
        self.A, self.B = plan.A[:, 0, 0, 0].tolist(), plan.B[:, 0, 0, 0].tolist()

    def __call__(self, x: Tensor) -> Tensor:
        for i in self.calls:
            x = self.A[i] * x + self.B[i] * self.predict(x.reshape(-1, 1, 1), i).reshape(-1)
        return x


def _whole(plan: Plan, data: MixtureDenoiser) -> Callable[[Tensor], Tensor]:
    """A plan without noise as a map of its standard normal start."""
    diffusion = Diffusion(plan.process, data)
    return lambda xi: run_plan(diffusion, plan, xi.reshape(-1, 1, 1), torch.Generator()).x.reshape(-1)


def _walk(plan: Plan, data: MixtureDenoiser, reach: float) -> tuple[Line, Callable[[Tensor], Tensor] | None]:
    """A law and a map: the last state of a plan is the map of a point of the law."""
    one = torch.ones(1, dtype=torch.float64)
    widths = plan.L[:, 0].detach().norm(dim=-1).tolist()
    if not any(widths):
        return Line(one, 0 * one, one, reach), _whole(plan, data)
    law, first = Line(one, 0 * one, plan.prior[0].detach().norm() * one, reach), 0
    for i, width in enumerate(widths):
        if width > 0:
            law, first = smoothed(law, _Calls(plan, data, first, i + 1), width), i + 1
    return law, _Calls(plan, data, first, plan.calls) if first < plan.calls else None


def _exact(data: MixtureDenoiser, scale: float, noise: float) -> Line:
    """The law of scale x0 + noise."""
    variance = data.covs.reshape(-1).expand(len(data.weights))
    deviations = (scale**2 * variance + noise**2).sqrt()
    return Line.of(data.weights / data.weights.sum(), scale * data.means.flatten(), deviations, 40.0)


def _quadrature(
    plan: Plan, lines: list[tuple[MixtureDenoiser, float]], scale: float, noise: float
) -> tuple[float, float, float | None]:
    """W2, its standard error 0, and KL."""
    square, kl, seen = 0.0, 0.0, True
    for data, count in lines:
        exact = _exact(data, scale, noise)
        for reach in _REACHES:
            w2, part, missed = compare(*_walk(plan, data, reach), exact)
            if missed < 1e-10:
                break
        square, kl, seen = square + count * w2**2, kl + count * part, seen and missed < 1e-10
    return math.sqrt(square), 0.0, kl if seen else None


def _particles(
    plan: Plan, data: MixtureDenoiser, particles: int, seed: int, scale: float, noise: float, sigma: float
) -> Outcome:
    shape = data.means.shape[1:]
    x = sample(Diffusion(plan.process, data), particles, shape, plan, seed, dtype=torch.float64, batch=20_000)
    assert isinstance(x, Tensor)
    generator = torch.Generator().manual_seed(seed + 1)
    exact = data.sample(particles, generator) * scale
    exact = exact + noise * torch.empty_like(exact).normal_(generator=generator)
    line = x[0].numel() == 1
    estimate = jackknife(sliced_wasserstein, x, exact, projections=1 if line else 64)
    measure = "W2" if line else "sliced W2"
    return Outcome("particles", measure, estimate.value, estimate.std_error, None, sigma)

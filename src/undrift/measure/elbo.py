r"""The evidence lower bound of data under a diffusion, with its standard error.

The terms are those of :mod:`undrift.bound`. Here they are estimated: the prior is closed, the start takes one call of
the model per point, the path ``samples`` calls at random times. What keeps the variance down, each without bias:

* times drawn by a density shaped like the integrand (:mod:`undrift.process.times`);
* stratified over the whole set of points, so that the time's share of the variance all but vanishes;
* a control variate, the same term with the raw noise in place of the mismatch, its factor fitted per bin of time on
  the other half of the draws.

References:
    Singhal, Goldstein & Ranganath, Where to Diffuse, How to Diffuse, and How to Get Back, 2023 (bound, importance).
    Kingma et al., Variational Diffusion Models, 2021, appendix I (stratified times).
    Owen, Monte Carlo Theory, Methods and Examples, 2013, chapter 8 (control variates), 10 (stratification).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from undrift.bound import Bound, Decoder, Form
from undrift.diffusion import Diffusion, NoiseDiffusion
from undrift.guided_noise import GuidedNoise
from undrift.measure.likelihood import bits_per_dim
from undrift.process.times import InformationTimes, LogSnrTimes, TimeDensity

__all__ = ["Evidence", "elbo"]

_PER_BIN = 64  # draws that fit one factor of the control variate


@dataclass(frozen=True, eq=False)
class Evidence:
    """An estimate of the evidence lower bound, point by point, in nats; each unbiased, none exact.

    Attributes:
        elbo: (batch,), float64, the sum of the three terms below.
        prior: minus the divergence of q(z_T|x) from the prior.
        path: the path term.
        start: the term that closes [0, t_min].
        dim: coordinates of a point, d.
        calls: calls of the model, each on one point.
        t_min: earliest time.
        order: places of the points among the strata, or None if the times were not stratified.
    """

    elbo: Tensor
    prior: Tensor
    path: Tensor
    start: Tensor
    dim: int
    calls: int
    t_min: float
    order: Tensor | None

    def mean(self, offset: Tensor | float = 0.0) -> tuple[float, float]:
        """Mean over points of the bound plus ``offset`` (batch,), and its standard error.

        The error counts the choice of the points as well as that of times and noise. With stratified times it comes
        from differences of neighbouring strata (never too small in expectation).
        """
        value = self.elbo + offset
        n = value.numel()
        if n < 2:
            return float(value.mean()), math.nan
        if self.order is None:
            return float(value.mean()), float(value.std()) / math.sqrt(n)
        steps = value[self.order.argsort()].diff()
        return float(value.mean()), math.sqrt(float(steps.square().mean()) / (2 * n))

    def bits_per_dim(self, log_det: Tensor | float = 0.0, bins: int = 256) -> tuple[float, float]:
        """Mean bits per dimension over points, an upper bound, and its standard error.

        See :func:`undrift.measure.bits_per_dim` for the arguments.
        """
        mean, error = self.mean(log_det)
        bits = bits_per_dim(torch.tensor([mean], dtype=torch.float64), self.dim, 0.0, bins)
        return float(bits), error / (self.dim * math.log(2))

    def __str__(self) -> str:
        mean, error = self.mean()
        parts = ", ".join(f"{name} {float(getattr(self, name).mean()):.4f}" for name in ("prior", "path", "start"))
        return f"log p(x) >= {mean:.4f} ± {error:.4f} nats (mean of {self.elbo.numel()} points; {parts})"


def elbo(
    diffusion: Diffusion | NoiseDiffusion | GuidedNoise,
    x: Tensor,
    *,
    form: Form | None = None,
    decoder: Decoder = "data",
    sigma_min: float = 1e-3,
    t_min: float | None = None,
    terminal: tuple[Tensor, Tensor] | None = None,
    times: TimeDensity | None = None,
    samples: int = 1,
    stratify: bool = True,
    control: bool = True,
    batch: int = 256,
    seed: int | torch.Generator = 0,
    progress: bool = False,
    **condition: Any,
) -> Evidence:
    """Evidence lower bound of the points x under a diffusion, for any linear process.

    Args:
        diffusion: a process with a denoiser or a noise network.
        x: data (batch, *event), floating point, on the model's device.
        form, decoder, terminal: see :class:`undrift.bound.Bound`; the defaults are the tightest and cheapest.
        sigma_min: noise level, in data units, at which the decoder takes over: well below the data's finest structure,
            such as the width 2/256 of a dequantised pixel on [-1, 1].
        t_min: the time at which it does, instead.
        times: density of the times; None for uniform ln sigma with a denoiser, else in proportion to tr(GG' S^-1).
        samples: times per point.
        stratify: stratify the times over all points and samples.
        control: use the control variate.
        batch: points per call of the model.
        seed: an integer, or a generator on x's device.
        progress: show a bar.
        condition: handed to the model; tensors with one row per point are cut like x.

    Raises:
        ValueError: for a bad argument, before any work.
        FloatingPointError: if the model's answer is not finite; the message says at which noise level.
    """
    if not x.is_floating_point() or x.ndim < 2 or len(x) == 0:
        raise ValueError(f"elbo: x must be floating point (batch, *event), got {x.dtype} {tuple(x.shape)}.")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("elbo: x must be finite.")
    for name, value in (("samples", samples), ("batch", batch)):
        if value < 1:
            raise ValueError(f"elbo: {name} must be at least 1, got {value}.")
    process, n = diffusion.process, len(x)
    with torch.no_grad():
        first = float(process.time(sigma_min)) if t_min is None else t_min
        bound = Bound(diffusion, form, decoder, first, terminal)
        implicit = form == "ism"
        times = times or (
            LogSnrTimes() if bound.noises == 1 and isinstance(diffusion, Diffusion) else InformationTimes()
        )
        # Salted: points that were drawn with the same seed would be correlated with the times.
        generator = torch.Generator(x.device).manual_seed(seed ^ 0xE1B0) if isinstance(seed, int) else seed

        def uniform(*shape: int) -> Tensor:
            u = torch.empty(*shape, dtype=torch.float64, device=x.device)
            return u.uniform_(generator=generator).cpu()

        order = torch.randperm(n, generator=generator, device=x.device).cpu() if stratify else None
        u = uniform(n, samples)
        if order is not None:
            u = (torch.arange(samples) + (order.unsqueeze(1) + u) / n) / samples
        t, density = times.draw(process, first, u.clamp(1e-12, 1 - 1e-12))
        rank = int(torch.linalg.matrix_rank(process.diffusion(torch.tensor(0.5 * process.horizon))))

        def normal(count: int) -> Tensor:
            z = torch.empty(count, bound.noises, *x.shape[1:], dtype=x.dtype, device=x.device)
            return z.normal_(generator=generator)

        path, raw = (torch.zeros(n, samples, dtype=torch.float64) for _ in range(2))
        start, start_raw = (torch.zeros(n, dtype=torch.float64) for _ in range(2))
        for rows in tqdm(torch.arange(n).split(batch), desc="elbo", disable=not progress):
            some = {k: v[rows.to(v.device)] if _per_point(v, n) else v for k, v in condition.items()}
            points = x[rows.to(x.device)]
            noise = normal(len(rows))
            start[rows] = bound.start(points, noise, **some).cpu()
            start_raw[rows] = bound.start_control(noise).cpu()
            for m in range(samples):
                noise, probe = normal(len(rows)), None
                if implicit:
                    probe = 2.0 * (uniform(len(rows), rank, *x.shape[1:]) < 0.5).to(x) - 1.0
                integrand = bound.path(points, t[rows, m], noise, probe, **some)
                path[rows, m] = integrand.cpu() / density[rows, m]
                if control and not implicit:
                    raw[rows, m] = bound.path_control(t[rows, m], noise).cpu() / density[rows, m]
            if not bool(torch.isfinite(path[rows]).all() and torch.isfinite(start[rows]).all()):
                bad = t[rows][~torch.isfinite(path[rows])]
                level = float(process.sigma(bad.min())) if bad.numel() else float(process.sigma(first))
                raise FloatingPointError(f"elbo: the model's answer is not finite at noise level sigma = {level:.4g}.")
        prior = bound.prior(x).cpu()
        if control:
            fold = (torch.arange(n) if order is None else order) % 2
            if not implicit:
                path = path - _fitted(path, raw, u, fold.unsqueeze(1).expand(n, samples)) * raw
            start = start - _fitted(start, start_raw, torch.zeros(n, dtype=torch.float64), fold) * start_raw
    path = path.mean(1)
    return Evidence(
        prior + path + start, prior, path, start, x[0].numel(), n * (samples + (decoder != "none")), first, order
    )


def _per_point(value: Any, n: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == n


def _fitted(value: Tensor, raw: Tensor, u: Tensor, fold: Tensor) -> Tensor:
    """Factors of the control variate: regression of ``value`` on ``raw`` per bin of u, on the other fold's draws."""
    bins = max(1, min(32, value.numel() // (2 * _PER_BIN)))
    cell = (u * bins).long().clamp(0, bins - 1)
    factor = torch.zeros_like(value)
    for b in range(bins):
        for f in (0, 1):
            others, mine = (cell == b) & (fold != f), (cell == b) & (fold == f)
            if int(others.sum()) < 8:
                continue
            y, c = value[others], raw[others]
            spread = (c - c.mean()).square().sum()
            if float(spread) > 0:
                factor[mine] = ((y - y.mean()) * (c - c.mean())).sum() / spread
    return factor

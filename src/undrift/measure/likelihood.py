r"""Exact likelihoods by the augmented probability-flow ODE.

The flow that carries the law of z_t from the data to the prior, for any number of channels K, is

.. math:: \frac{dz}{dt} = F z - \tfrac12 GG^\top \nabla \log p_t(z), \qquad
          \log p_0(z_0) = \log p_T(z_T) + \int_0^T \nabla\cdot\frac{dz}{dt}\,dt.

With a denoiser the score is :math:`-S^{-1}(z - m \otimes D(\tilde x))`, so :math:`dz/dt = X z - \frac12 GG^\top S^{-1}
m \otimes D(\tilde x)` with :math:`X = F + \frac12 GG^\top S^{-1}`. Since :math:`\tilde x = m^\top S^{-1} z / snr`,
the last term has Jacobian :math:`(GG^\top S^{-1} m)(m^\top S^{-1} / snr) \otimes J_D`, of trace
:math:`(-snr'/snr)\,tr J_D`:

.. math:: \nabla\cdot\frac{dz}{dt} = d\,tr X + \tfrac12 \frac{snr'}{snr}\, tr J_D(\tilde x).

In the code :math:`S^{-1} = P + S^{-1} m m^\top S^{-1} / snr` is split into the part that reads :math:`\tilde x` and the
rest, :math:`P m = 0`. P is bounded as t -> 0, and the other part multiplies :math:`D(\tilde x) - \tilde x`: nothing
cancels.

The trace to compute is that of a d x d matrix, whatever K. A network on all K channels has no such structure, and its
trace runs over K d coordinates.

The ODE is solved in log t, in which its coefficients are bounded near the data (they grow like 1/t). The stretch from 0
to ``t_min`` is one midpoint step, so that for data with a smooth density the bias is :math:`O(t_{min}^3)`.

For K > 1, with auxiliaries started from :math:`q(v_0)`, independent of the data,

.. math:: \log p(x) \ge E_{v_0 \sim q}[\log p(x, v_0) - \log q(v_0)],

and the log-mean-exp of S such terms is a tighter bound that tends to log p(x).

References:
    Song et al., Score-Based Generative Modeling through Stochastic Differential Equations, 2021, section 4.3.
    Singhal, Goldstein & Ranganath, Where to Diffuse, How to Diffuse, and How to Get Back, 2023 (auxiliaries).
    Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders, 2016 (the tighter bound).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torchdiffeq import odeint
from tqdm import tqdm

from undrift._linalg import Interpolant, psd_sqrt, sqrt_sum
from undrift.diffusion import Diffusion, NoiseDiffusion
from undrift.process.linear import mix

__all__ = ["Likelihood", "Transport", "bits_per_dim", "dequantise", "log_likelihood", "transport"]

Trace = Literal["exact", "hutchinson", "auto"]

_EXACT_UP_TO = 64  # coordinates: "auto" takes the exact trace, one backward pass each, up to here


@dataclass(frozen=True, eq=False)
class Transport:
    """Points carried along the probability flow.

    Attributes:
        state: where they arrive, (batch, K, *event), float64.
        divergence: integral of the divergence on the way, (batch, probes); one column if the trace is exact.
        calls: network calls.
    """

    state: Tensor
    divergence: Tensor
    calls: int


@dataclass(frozen=True, eq=False)
class Likelihood:
    """Log likelihoods of a batch of points, in nats.

    Attributes:
        log_likelihood: (batch,), float64; for K > 1 a lower bound, see :func:`log_likelihood`.
        std_error: (batch,) standard error of each over probes or auxiliary starts, None if there was one of both.
        dim: coordinates of a point, d.
        calls: network calls, each on batch x samples points.
    """

    log_likelihood: Tensor
    std_error: Tensor | None
    dim: int
    calls: int

    def bits_per_dim(self, log_det: Tensor | float = 0.0, bins: int = 256) -> Tensor:
        """See :func:`bits_per_dim`."""
        return bits_per_dim(self.log_likelihood, self.dim, log_det, bins)

    def __str__(self) -> str:
        mean, spread = float(self.log_likelihood.mean()), float(self.log_likelihood.std(correction=0))
        n = self.log_likelihood.numel()
        return f"log likelihood {mean:.4f} ± {spread / math.sqrt(n):.4f} nats (mean of {n} points, {self.calls} calls)"


def _trace(output: Tensor, x: Tensor, direction: Callable[[Tensor], Tensor], probes: Tensor | None) -> Tensor:
    """tr(A J), J = d output / d x per sample, A = ``direction`` (symmetric): (batch, 1), or v' A J v for each probe."""
    batch, n = x.shape[0], x[0].numel()
    columns = []
    if probes is None:
        for i in range(n):
            unit = torch.zeros(n, dtype=x.dtype, device=x.device)
            unit[i] = 1.0
            v = unit.reshape(x.shape[1:]).expand_as(x)
            (row,) = torch.autograd.grad(output, x, direction(v), retain_graph=i + 1 < n)
            columns.append(row.reshape(batch, n)[:, i].double())
        return torch.stack(columns).sum(0).unsqueeze(-1)
    for i, v in enumerate(probes):
        (row,) = torch.autograd.grad(output, x, direction(v.to(x)), retain_graph=i + 1 < len(probes))
        columns.append((row * v).flatten(1).double().sum(-1))
    return torch.stack(columns, -1)


class _Field:
    """Velocity of the flow in log t, and its divergence; the state is float64, the model sees ``dtype``.

    What depends on time alone is tabulated once, from ``low`` to ``high``.
    """

    def __init__(
        self,
        diffusion: Diffusion | NoiseDiffusion,
        dtype: torch.dtype,
        probes: Tensor | None,
        condition: dict[str, Any],
        low: float,
        high: float,
    ) -> None:
        self.diffusion, self.dtype, self.probes, self.condition = diffusion, dtype, probes, condition
        self.calls = 0
        table = self._of_denoiser if isinstance(diffusion, Diffusion) else self._of_network
        with torch.no_grad():
            self._table = Interpolant(lambda log_t: table(log_t.exp()), math.log(low), math.log(high))

    def __call__(self, z: Tensor, log_t: float) -> tuple[Tensor, Tensor]:
        self.calls += 1
        row = self._table(log_t).to(z.device)
        if isinstance(self.diffusion, Diffusion):
            return self._denoiser(self.diffusion, z, row)
        return self._network(self.diffusion, z, row, log_t)

    def _of_denoiser(self, t: Tensor) -> Tensor:
        process = self.diffusion.process
        k, d = process.channels, process.diffusion(t)
        mean, root = process.kernel(t)
        snr, read = process._weights(t)
        free = process.drift(t)
        if k > 1:  # P = M (M'SM)^-1 M' with M'm = 0: bounded as t -> 0, where S^-1 is not
            eye = torch.eye(k - 1, dtype=t.dtype, device=t.device).expand(*t.shape, k - 1, k - 1)
            m = torch.cat([-mean[..., None, 1:] / mean[..., :1, None], eye], -2)
            w = torch.linalg.solve_triangular(sqrt_sum(m.mT @ root), m.mT, upper=False)
            free = free + 0.5 * d @ w.mT @ w
        pull = (d @ read.unsqueeze(-1)).squeeze(-1)
        rate = snr * (read * pull).sum(-1)
        columns = [(t[:, None, None] * free).flatten(1), -0.5 * (t * snr.sqrt()).unsqueeze(-1) * pull, read]
        return torch.cat([*columns, torch.stack([-0.5 * snr.log(), 0.5 * t * rate], -1)], -1)

    def _denoiser(self, diffusion: Diffusion, z: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        k, n = z.shape[1], z[0, 0].numel()
        free, pull, read, log_sigma, half_rate = row.split([k * k, k, k, 1, 1])
        shown = mix(read.reshape(1, 1, k), z).squeeze(1).to(self.dtype)
        sigma = log_sigma.exp()
        with torch.enable_grad():
            shown.requires_grad_()
            x0 = diffusion.denoiser(shown, sigma.to(shown).expand(z.shape[0]), **self.condition)
            trace = _trace(x0, shown, lambda v: v, self.probes)
        gap = (x0 - shown).detach().to(z) / sigma
        free = free.reshape(k, k)
        velocity = mix(torch.cat([free, pull.unsqueeze(-1)], -1), torch.cat([z, gap.unsqueeze(1)], 1))
        return velocity, n * free.diagonal().sum() - half_rate * (trace - n)

    def _of_network(self, t: Tensor) -> Tensor:
        process = self.diffusion.process
        both = torch.stack([process.drift(t), process.diffusion(t)], 1)
        return (t[:, None, None, None] * both).flatten(1)

    def _network(self, diffusion: NoiseDiffusion, z: Tensor, row: Tensor, log_t: float) -> tuple[Tensor, Tensor]:
        drift, noise = row.reshape(2, z.shape[1], z.shape[1])
        t = min(math.exp(log_t), diffusion.process.horizon)
        with torch.enable_grad():
            state = z.to(self.dtype).requires_grad_()
            score = diffusion.score(state, t, **self.condition)
            trace = _trace(score, state, lambda v: mix(noise, v), self.probes)
        velocity = mix(drift, z) - 0.5 * mix(noise, score.detach().to(z))
        return velocity, z[0, 0].numel() * drift.diagonal().sum() - 0.5 * trace


def _probes(
    diffusion: Diffusion | NoiseDiffusion, z: Tensor, trace: str, count: int, generator: torch.Generator
) -> Tensor | None:
    if trace not in ("exact", "hutchinson", "auto"):
        raise ValueError(f"trace must be 'exact', 'hutchinson' or 'auto', got {trace!r}.")
    if count < 1:
        raise ValueError(f"probes must be at least 1, got {count}.")
    shape = z.shape if isinstance(diffusion, NoiseDiffusion) else (z.shape[0], *z.shape[2:])
    if trace == "exact" or (trace == "auto" and math.prod(shape[1:]) <= _EXACT_UP_TO):
        return None
    signs = torch.randint(0, 2, (count, *shape), generator=generator, device=generator.device)
    return (2.0 * signs - 1.0).to(z)


def transport(
    diffusion: Diffusion | NoiseDiffusion,
    z: Tensor,
    start: float,
    end: float,
    *,
    t_min: float = 1e-5,
    trace: Trace = "auto",
    probes: int = 1,
    rtol: float = 1e-6,
    atol: float = 1e-6,
    seed: int | torch.Generator = 0,
    progress: bool = False,
    **condition: Any,
) -> Transport:
    """Carry points along the probability flow from one time to another, in either direction, and gather its divergence.

    log p_start(z) = log p_end(state) + divergence.

    Args:
        diffusion: a process with a denoiser or a noise network.
        z: states (batch, K, *event) at time ``start``, float32 or float64; the model is called in this dtype.
        start, end: times; ``start`` in [0, T], ``end`` in (0, T].
        t_min: where one midpoint step from ``start = 0`` leads, for the adaptive solver to take over.
        trace: "exact" (one backward pass a coordinate), "hutchinson" (unbiased, with Rademacher probes that stay fixed
            along the way), or "auto": exact up to 64 coordinates.
        probes: probes of the Hutchinson estimate, one column of ``divergence`` each.
        rtol, atol: tolerances of the adaptive solver (Dormand-Prince 5).
        seed: an integer or a generator, for the probes.
        progress: show a bar in log t.
        condition: handed to the model.

    Raises:
        ValueError: for a bad argument, before any work.
        RuntimeError: if the solver's step underflows or the state is no longer finite; the message says at which time.
    """
    horizon = diffusion.process.horizon
    if not (0 <= start <= horizon and 0 < end <= horizon):
        raise ValueError(
            f"transport: start must lie in [0, {horizon:g}], end in (0, {horizon:g}]; got {start:g}, {end:g}."
        )
    if start == 0 and not 0 < t_min < end:
        raise ValueError(f"transport: t_min must lie in (0, {end:g}), got {t_min:g}.")
    if not (rtol > 0 and atol > 0):
        raise ValueError(f"transport: rtol and atol must be positive, got {rtol:g} and {atol:g}.")
    diffusion.process._per_sample(z, end)
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator(z.device).manual_seed(seed)
    directions = _probes(diffusion, z, trace, probes, generator)
    low = 0.5 * t_min if start == 0 else min(start, end)
    field = _Field(diffusion, z.dtype, directions, condition, low, max(start, end))
    state: Tensor = z.double()
    divergence: Tensor | float = 0.0
    with torch.no_grad():
        if start == 0:
            middle = math.log(0.5 * t_min)  # where dt = (t_min / 2) d log t
            velocity, rate = field(state + field(state, middle)[0], middle)
            state, divergence, start = state + 2 * velocity, 2 * rate, t_min
        state, rest = _solve(field, state, start, end, rtol, atol, progress)
    return Transport(state, divergence + rest, field.calls)


def _solve(
    field: _Field, z: Tensor, start: float, end: float, rtol: float, atol: float, progress: bool
) -> tuple[Tensor, Tensor]:
    columns = 1 if field.probes is None else len(field.probes)
    gathered = torch.zeros(z.shape[0], columns, dtype=z.dtype, device=z.device)
    span = torch.tensor([start, end], dtype=torch.float64, device=z.device).log()
    reached, low, high = start, float(span.min()), float(span.max())
    with tqdm(total=1.0, disable=not progress, desc="likelihood", bar_format="{l_bar}{bar}| {elapsed}") as bar:

        def velocity(log_t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            nonlocal reached
            at = min(max(float(log_t), low), high)  # the solver's first guess of a step may reach beyond the end
            reached = math.exp(at)
            bar.update(max(0.0, (at - float(span[0])) / float(span[1] - span[0]) - bar.n))
            return field(state[0], at)

        try:
            # step_t makes the solver step onto the end, not past it, where the table has nothing.
            options = {"step_t": span[1:]}
            states, integrals = odeint(
                velocity, (z, gathered), span, rtol=rtol, atol=atol, method="dopri5", options=options
            )
        except AssertionError as error:  # how torchdiffeq reports underflow of dt and non-finite states
            raise RuntimeError(
                f"the probability-flow ODE could not be solved past t = {reached:.3g} with rtol = {rtol:g} and "
                f"atol = {atol:g}: {error}. The solver shares one step size among the {z.shape[0]} points of a batch, "
                "so one hard point is enough: check that the model is finite there, raise the tolerances or t_min, "
                "or use smaller batches."
            ) from error
    return states[-1], integrals[-1]


def log_likelihood(
    diffusion: Diffusion | NoiseDiffusion,
    x: Tensor,
    *,
    t_min: float = 1e-5,
    trace: Trace = "auto",
    probes: int = 1,
    samples: int = 1,
    terminal: Callable[[Tensor], Tensor] | None = None,
    rtol: float = 1e-6,
    atol: float = 1e-6,
    seed: int | torch.Generator = 0,
    progress: bool = False,
    **condition: Any,
) -> Likelihood:
    """Log density of x under the model that the probability flow defines, from its prior at T.

    For K = 1 it is exact up to the solver's tolerance (and unbiased with Hutchinson's trace). For K > 1 it is a lower
    bound in expectation over the auxiliary starts: the mean bound with ``samples = 1``, the importance-weighted one,
    which tends to log p(x), with more. Noise of Hutchinson's trace enters the weights of the latter too; prefer the
    exact trace there.

    Args:
        diffusion: a process with a denoiser or a noise network.
        x: data (batch, *event), float32 or float64; the model is called in this dtype, the ODE is solved in float64.
        t_min: time at which the adaptive solver takes over, in (0, T); smaller is not always better, since the model
            must tell D from x at the noise level sigma(t_min).
        trace, probes, rtol, atol, seed, progress, condition: see :func:`transport`.
        samples: auxiliary starts per point.
        terminal: log density of z_T, maps (n, K, *event) to (n,); default the process's prior N(0, S).

    Raises:
        ValueError: for a bad argument, before any work.
        RuntimeError: see :func:`transport`.
    """
    process = diffusion.process
    if not x.is_floating_point() or x.ndim < 2:
        raise ValueError(f"log_likelihood: x must be floating point (batch, *event), got {x.dtype} {tuple(x.shape)}.")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("log_likelihood: x must be finite.")
    if samples < 1:
        raise ValueError(f"log_likelihood: samples must be at least 1, got {samples}.")
    if samples > 1 and process.channels == 1:
        raise ValueError(
            f"log_likelihood: samples = {samples} is for auxiliaries, and {type(process).__name__} has none."
        )
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator(x.device).manual_seed(seed)
    z, log_q = _augment(diffusion, x, samples, generator)
    options = {"rtol": rtol, "atol": atol, "seed": generator, "progress": progress, **condition}
    joint = transport(
        diffusion, z.to(x.dtype), 0.0, process.horizon, t_min=t_min, trace=trace, probes=probes, **options
    )
    last = _gaussian_log_prob(joint.state, process.prior()) if terminal is None else terminal(joint.state).double()
    log_w = (last.unsqueeze(-1) + joint.divergence - log_q.unsqueeze(-1)).unflatten(0, (samples, x.shape[0]))
    per_start = log_w.mean(-1)
    value = per_start.logsumexp(0) - math.log(samples)
    error = None
    if samples > 1:  # of the log of a mean; the spread over starts includes the probes'
        error = (per_start - value).exp().std(0) / math.sqrt(samples)
    elif log_w.shape[-1] > 1:
        error = log_w[0].std(-1) / math.sqrt(log_w.shape[-1])
    return Likelihood(value, error, x[0].numel(), joint.calls)


def _augment(
    diffusion: Diffusion | NoiseDiffusion, x: Tensor, samples: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """States z_0 (samples * batch, K, *event) in float64 and log q(v_0) (samples * batch,)."""
    process = diffusion.process
    data = x.double().repeat(samples, *[1] * (x.ndim - 1)).unsqueeze(1)
    if process.channels == 1:
        return data, torch.zeros(data.shape[0], dtype=torch.float64, device=x.device)
    root = psd_sqrt(process.start()[1:, 1:]).detach()
    if bool((root.diagonal() <= 0).any()):
        raise ValueError(
            f"log_likelihood: the auxiliaries of {type(process).__name__} start without spread, so (x, v) has no "
            "density; give them a positive start covariance (aux_scale)."
        )
    noise = torch.empty(data.shape[0], process.channels - 1, *x.shape[1:], dtype=torch.float64, device=x.device)
    noise.normal_(generator=generator)
    auxiliary = mix(root, noise)
    return torch.cat([data, auxiliary], 1), _gaussian_log_prob(auxiliary, root)


def _gaussian_log_prob(z: Tensor, root: Tensor) -> Tensor:
    """log N(z; 0, (L L') (x) I), (n,), for z (n, J, *event) and L = ``root`` (J, J)."""
    root = root.detach().to(z)
    white = torch.linalg.solve_triangular(root, z.flatten(2).movedim(1, 0).flatten(1), upper=False)
    squares = white.square().unflatten(1, (z.shape[0], -1)).sum((0, 2))
    d = z[0, 0].numel()
    return -0.5 * squares - d * root.diagonal().log().sum() - 0.5 * z.shape[1] * d * math.log(2 * math.pi)


def bits_per_dim(log_likelihood: Tensor, dim: int, log_det: Tensor | float = 0.0, bins: int = 256) -> Tensor:
    r"""Bits per dimension of integer data that was dequantised, scaled to [0, 1) and transformed.

    .. math:: bpd = -\frac{\log p(y) + \log|\det dy/dx|}{d \log 2} + \log_2 bins

    Args:
        log_likelihood: of the transformed data y, in nats, (batch,).
        dim: coordinates, d.
        log_det: log Jacobian of the transform from [0, 1), (batch,); see :func:`dequantise`.
        bins: values that a coordinate could take.
    """
    if bins < 1 or dim < 1:
        raise ValueError(f"bits_per_dim: dim and bins must be at least 1, got {dim} and {bins}.")
    return -(log_likelihood + log_det) / (dim * math.log(2)) + math.log2(bins)


def dequantise(
    pixels: Tensor,
    transform: Literal["logit", "center"] = "center",
    *,
    bins: int = 256,
    alpha: float = 0.05,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Integer data as continuous data: x = (pixel + U) / bins with U uniform on [0, 1), then a transform.

    Args:
        pixels: integers in 0 ... bins - 1, (batch, *event).
        transform: "center", y = 2 x - 1; or "logit", y = log s - log(1 - s) with s = alpha + (1 - 2 alpha) x.
        bins: values that a pixel can take.
        alpha: margin of the logit transform.
        noise: U, same shape as ``pixels``, if it is not to be drawn from ``generator``.

    Returns:
        y (batch, *event) and log |det dy/dx| (batch,), both float64.
    """
    if transform not in ("logit", "center"):
        raise ValueError(f"dequantise: transform must be 'logit' or 'center', got {transform!r}.")
    low, high = float(pixels.min()), float(pixels.max())
    if low < 0 or high > bins - 1 or not torch.equal(pixels, pixels.round() if pixels.is_floating_point() else pixels):
        raise ValueError(f"dequantise: pixels must be whole numbers in 0 ... {bins - 1}, got {low:g} ... {high:g}.")
    if noise is None:
        noise = torch.rand(pixels.shape, generator=generator, dtype=torch.float64, device=pixels.device)
    x = (pixels.double() + noise) / bins
    if transform == "center":
        return 2 * x - 1, torch.full_like(x.flatten(1)[:, 0], x[0].numel() * math.log(2))
    s = alpha + (1 - 2 * alpha) * x
    log_det = math.log(1 - 2 * alpha) - s.log() - (1 - s).log()
    return s.log() - (1 - s).log(), log_det.flatten(1).sum(-1)

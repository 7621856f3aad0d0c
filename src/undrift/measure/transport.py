r"""The augmented probability-flow ODE with its divergence: points carried from one time to another.

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

The trace to compute is that of a d x d matrix, whatever K. A network on all K channels has no such structure. Its score
:math:`s_\theta` enters through :math:`tr(GG^\top J) = tr(g^\top J g)` with :math:`J = \partial s_\theta/\partial z` and
:math:`GG^\top = g g^\top`, g of K rows and r columns: r d coordinates, where r counts the sources of noise and not the
channels, and probes that disagree less than those of :math:`GG^\top J`.

The ODE is solved in log t, in which its coefficients are bounded near the data (they grow like 1/t). The stretch from 0
to ``t_min`` is one midpoint step, so that for data with a smooth density the bias is :math:`O(t_{min}^3)`.

References:
    Song et al., Score-Based Generative Modeling through Stochastic Differential Equations, 2021, section 4.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from undrift._interpolant import Interpolant
from undrift._linalg import psd_sqrt, sqrt_sum
from undrift._trace import carried_trace
from undrift.diffusion import Diffusion, NoiseDiffusion, require_white
from undrift.guided_noise import GuidedNoise
from undrift.process.linear import LinearProcess, mix

__all__ = ["Trace", "Transport", "transport"]

Trace = Literal["exact", "hutchinson", "auto"]

_EXACT_UP_TO = 64  # coordinates of the trace: "auto" takes it exactly, one backward pass each, up to here


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


def _noisy(process: LinearProcess, low: float, high: float) -> Tensor:
    """Which columns of the root of GG' carry noise at some time from ``low`` to ``high``, (K,)."""
    times = torch.linspace(math.log(low), math.log(high), 257, dtype=torch.float64).exp().clamp(max=process.horizon)
    with torch.no_grad():
        used = (psd_sqrt(process.diffusion(times)) != 0).any(0).any(0)
    used[0] |= ~used.any()  # one column of zeros stands for no noise
    return used


class _Field:
    """Velocity of the flow in log t, and its divergence; the state is float64, the model sees the dtype of ``z``.

    What depends on time alone is tabulated once, from ``low`` to ``high``.
    """

    def __init__(
        self,
        diffusion: Diffusion | NoiseDiffusion | GuidedNoise,
        z: Tensor,
        low: float,
        high: float,
        trace: str,
        probes: int,
        generator: torch.Generator,
        condition: dict[str, Any],
    ) -> None:
        self.diffusion, self.dtype, self.condition = diffusion, z.dtype, condition
        self.calls = 0
        if isinstance(diffusion, Diffusion):
            table, self.shape = self._of_denoiser, torch.Size((z.shape[0], *z.shape[2:]))
        else:
            self.noisy = _noisy(diffusion.process, low, high)
            table, self.shape = self._of_network, torch.Size((z.shape[0], int(self.noisy.sum()), *z.shape[2:]))
        self.probes: Tensor | None = None
        if trace == "hutchinson" or (trace == "auto" and self.shape[1:].numel() > _EXACT_UP_TO):
            signs = torch.randint(0, 2, (probes, *self.shape), generator=generator, device=generator.device)
            self.probes = (2.0 * signs - 1.0).to(z)
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
            trace = carried_trace(x0, shown, self.shape, lambda v: v, self.probes)
        gap = (x0 - shown).detach().to(z) / sigma
        free = free.reshape(k, k)
        velocity = mix(torch.cat([free, pull.unsqueeze(-1)], -1), torch.cat([z, gap.unsqueeze(1)], 1))
        return velocity, n * free.diagonal().sum() - half_rate * (trace - n)

    def _of_network(self, t: Tensor) -> Tensor:
        process = self.diffusion.process
        d = process.diffusion(t)
        both = t[:, None, None, None] * torch.stack([process.drift(t), d], 1)
        root = t.sqrt()[:, None, None] * psd_sqrt(d)[..., self.noisy]
        return torch.cat([both.flatten(1), root.flatten(1)], -1)

    def _network(
        self, diffusion: NoiseDiffusion | GuidedNoise, z: Tensor, row: Tensor, log_t: float
    ) -> tuple[Tensor, Tensor]:
        k = z.shape[1]
        drift, noise = row[: 2 * k * k].reshape(2, k, k)
        root = row[2 * k * k :].reshape(k, -1)
        t = min(math.exp(log_t), diffusion.process.horizon)
        with torch.enable_grad():
            state = z.to(self.dtype).requires_grad_()
            score = diffusion.score(state, t, **self.condition)
            trace = carried_trace(score, state, self.shape, lambda v: mix(root, v), self.probes)
        velocity = mix(drift, z) - 0.5 * mix(noise, score.detach().to(z))
        return velocity, z[0, 0].numel() * drift.diagonal().sum() - 0.5 * trace


def transport(
    diffusion: Diffusion | NoiseDiffusion | GuidedNoise,
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
            along the way), or "auto": exact up to 64 coordinates. With a denoiser there are d of them; with a noise
            network r d, where r is the rank of GG'.
        probes: probes of the Hutchinson estimate, one column of ``divergence`` each.
        rtol, atol: tolerances of the adaptive solver (Dormand-Prince 5).
        seed: an integer or a generator, for the probes.
        progress: show a bar in log t.
        condition: handed to the model.

    Raises:
        ValueError: for a bad argument, before any work.
        RuntimeError: if the solver's step underflows or the state is no longer finite; the message says at which time.
    """
    require_white(diffusion, "transport")
    horizon = diffusion.process.horizon
    if not (0 <= start <= horizon and 0 < end <= horizon):
        raise ValueError(
            f"transport: start must lie in [0, {horizon:g}], end in (0, {horizon:g}]; got {start:g}, {end:g}."
        )
    if start == 0 and not 0 < t_min < end:
        raise ValueError(f"transport: t_min must lie in (0, {end:g}), got {t_min:g}.")
    if not (rtol > 0 and atol > 0):
        raise ValueError(f"transport: rtol and atol must be positive, got {rtol:g} and {atol:g}.")
    if trace not in ("exact", "hutchinson", "auto"):
        raise ValueError(f"trace must be 'exact', 'hutchinson' or 'auto', got {trace!r}.")
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}.")
    diffusion.process._per_sample(z, end)
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator(z.device).manual_seed(seed)
    low = 0.5 * t_min if start == 0 else min(start, end)
    field = _Field(diffusion, z, low, max(start, end), trace, probes, generator, condition)
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
    from torchdiffeq import odeint  # late: with SciPy's integrators it takes longer than the rest of this library

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

r"""A controlled diffusion as a table: two Markov chains of Gaussian kernels, one from the prior, one from the target.

Notation (kept through the package; time is counted by k = 0 (prior, t = T) ... K (target, t = 0))::

    z_k         state, (C, batch, d): C channels lead, so that a step is one small matrix times one wide one
    F_k, B_k    forward kernel z_k -> z_{k+1} and backward kernel z_{k+1} -> z_k, Gaussian:
                F_k = N(A_k z_k + b_k a_k, L_k L_k'),   B_k = N(A'_k z_{k+1} + b'_k v_k, L'_k L'_k')
    a, v        controls (batch, d): one number a coordinate, whatever the channels
    nu          law of z_0, N(0, P_K);  the auxiliaries of z_K have the law N(0, E), independent of x = z_K[0]

.. math::
    \log w = \log\gamma(x) + \log N(\mathrm{aux}; 0, E) - \log\nu(z_0)
        + \sum_k \bigl[\log B_k(z_k | z_{k+1}) - \log F_k(z_{k+1} | z_k)\bigr]

is a ratio of two densities of one path, so :math:`E_F[w] = Z` for every number of steps and every control: nothing is
discretised in it, unlike in sums of Girsanov terms.

**The reversal of any linear process.** Let the data be N(0, I) in the coordinates in use, the *reference*. Then the
noising process and its reversal are both Gaussian chains, known exactly: with :math:`P = m m^\top + S` at the two ends
of a step and :math:`W W^\top = P_{k+1}`,

.. math::
    B = N(\Phi z_{k+1}, \Sigma), \quad \mathrm{Cov}(z_{k+1} | z_k) = W (I + G^\top G)^{-1} W^\top, \quad
    G = \Sigma^{-1/2} \Phi W,

and for data of density :math:`\gamma = g_0 N(0, I)` what changes in the mean of :math:`z_{k+1}` given :math:`z_k` is

.. math:: \mathrm{Cov}(z_{k+1}, x_0 | z_k) \otimes E[\nabla \log g_0(x_0) | z_k]
    = \mathrm{Cov}(z_{k+1} | z_k) P_{k+1}^{-1} m_{k+1} \otimes a_k,

by Stein's identity. So one control of d numbers serves every linear process, with any number of auxiliaries, and
depends on z through :math:`y = E[x_0 | z]` under the reference alone. Brownian motion (PIS), the Ornstein-Uhlenbeck
process (DIS, DDS), critically damped and phase-space Langevin are arguments.

References:
    Zhang & Chen, Path Integral Sampler, 2022. Vargas, Grathwohl & Doucet, Denoising Diffusion Samplers, 2023.
    Berner, Richter & Ullrich, An Optimal Control Perspective on Diffusion-Based Generative Modeling, 2024.
    Richter & Berner, Improved Sampling via Learned Diffusions, 2024.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from undrift._linalg import as_f64, expm, ou_transition, psd_sqrt, sqrt_sum
from undrift.density.controlled.grid import TimeGrid, angle
from undrift.process.families import noise_root
from undrift.process.linear import LinearProcess
from undrift.process.recipe import RecipeProcess

__all__ = ["Chain", "Rows", "contract", "langevin", "reversal"]

Gain = Literal["posterior", "score"]


def contract(m: Tensor, z: Tensor) -> Tensor:
    """m (..., J, C) times z (..., C, batch, d): (..., J, batch, d)."""
    if m.shape[-2:] == (1, 1):
        return m.unsqueeze(-1) * z
    return (m @ z.flatten(-2)).unflatten(-1, z.shape[-2:])


def _solve(lower: Tensor, rhs: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(lower, rhs, upper=False)


class Rows(NamedTuple):
    """One direction of a chain: N(mean z + gain a, root root'), a row a step.

    Attributes:
        mean: (K, C, C).
        gain: (K, C).
        root: lower, (K, C, C).
    """

    mean: Tensor
    gain: Tensor
    root: Tensor

    def residual(self, at: slice, z: Tensor, control: Tensor | None, to: Tensor) -> Tensor:
        """The standard normal noise behind steps z -> to, (steps, C, batch, d)."""
        miss = to - contract(self.mean[at], z)
        if control is not None:
            miss = miss - self.gain[at][..., None, None] * control.unsqueeze(-3)
        return contract(_solve(self.root[at].double(), _eye(self.root)).to(miss), miss)

    def log_prob(self, at: slice, z: Tensor, control: Tensor | None, to: Tensor) -> Tensor:
        """log density of steps z -> to (steps, C, batch, d): (steps, batch)."""
        noise = self.residual(at, z, control, to)
        return _standard_normal(noise) - noise.shape[-1] * _log_det(self.root[at]).unsqueeze(-1).to(noise)


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=torch.float64, device=like.device)


def _log_det(root: Tensor) -> Tensor:
    return root.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _standard_normal(noise: Tensor) -> Tensor:
    """log density of (..., C, batch, d) under N(0, I): (..., batch)."""
    size = noise.shape[-3] * noise.shape[-1]
    return -0.5 * noise.square().sum((-3, -1)) - 0.5 * size * math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class Chain:
    """The table.

    Attributes:
        times: t_k, (K + 1,), from T to 0.
        label: what networks are told of the time, in [0, 1] from target to prior, (K + 1,).
        forward, backward: the kernels.
        law: roots of the reference's covariance P_k, (K + 1, C, C); the first is that of the prior, and zero if walkers
            start at the origin.
        end: root of E, (C - 1, C - 1).
        look: the row M with y = E[x0 | z] = M z under the reference, (K + 1, C).
        unknown: V = Var(x0 | z) under the reference, (K + 1,), from 0 at the target to 1 where nothing is known.
        information: |L_k^-1 b_k|^2, (K,): twice the divergence that an error of 1 in the control makes in a step.
    """

    times: Tensor
    label: Tensor
    forward: Rows
    backward: Rows
    law: Tensor
    end: Tensor
    look: Tensor
    unknown: Tensor

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    @property
    def channels(self) -> int:
        return self.law.shape[-1]

    @property
    def prior(self) -> Tensor:
        """Root of the covariance of z_0, (C, C)."""
        return self.law[0]

    @property
    def pinned(self) -> bool:
        """Whether all walkers start at the origin: z_0 then has no density, nor has the way back to it."""
        return not bool(self.law[0].detach().any())

    @property
    def information(self) -> Tensor:
        return _solve(self.forward.root, self.forward.gain.unsqueeze(-1)).square().sum((-2, -1))

    def to(self, dtype: torch.dtype, device: torch.device | str) -> Chain:
        """The same chain for states of a dtype on a device; gradients are kept."""
        rows = [Rows(*(part.to(device, dtype) for part in side)) for side in (self.forward, self.backward)]
        rest = {name: getattr(self, name).to(device, dtype) for name in ("label", "law", "end", "look", "unknown")}
        return replace(self, forward=rows[0], backward=rows[1], **rest)

    def start(self, noise: Tensor) -> Tensor:
        """z_0 from standard normal noise (C, batch, d)."""
        return contract(self.prior, noise)

    def finish(self, x: Tensor, noise: Tensor) -> Tensor:
        """z_K from data x (batch, d) and noise (C - 1, batch, d) for the auxiliaries."""
        return torch.cat([x.unsqueeze(0), contract(self.end, noise)]) if self.channels > 1 else x.unsqueeze(0)

    def log_law(self, k: int, z: Tensor) -> Tensor:
        """log density of z (C, batch, d) under the reference at time k, (batch,); 0 where that is a point."""
        if k == 0 and self.pinned:
            return torch.zeros(z.shape[-2], dtype=z.dtype, device=z.device)
        return _gaussian(self.law[k], z)

    def log_start(self, z: Tensor) -> Tensor:
        """log nu(z_0), (batch,); 0 where the start is a point."""
        return self.log_law(0, z)

    def log_finish(self, z: Tensor) -> Tensor:
        """log N(aux; 0, E) at z_K, (batch,)."""
        if self.channels == 1:
            return torch.zeros(z.shape[-2], dtype=z.dtype, device=z.device)
        return _gaussian(self.end, z[1:])

    def log_forward(self, at: slice, z: Tensor, control: Tensor | None) -> Tensor:
        """log F_k for the steps ``at`` of paths z (steps + 1, C, batch, d): (steps, batch)."""
        return self.forward.log_prob(at, z[:-1], control, z[1:])

    def log_backward(self, at: slice, z: Tensor, control: Tensor | None) -> Tensor:
        """log B_k, likewise; 0 for a first step back to a point."""
        if self.pinned and (at.start or 0) == 0:
            rest = None if control is None else control[1:]
            first = torch.zeros(1, z.shape[-2], dtype=z.dtype, device=z.device)
            later = slice(1, at.stop)
            return torch.cat([first, self.backward.log_prob(later, z[2:], rest, z[1:-1])]) if len(z) > 2 else first
        return self.backward.log_prob(at, z[1:], control, z[:-1])


def _gaussian(root: Tensor, z: Tensor) -> Tensor:
    noise = contract(_solve(root.double(), _eye(root)).to(z), z)
    return _standard_normal(noise) - z.shape[-1] * _log_det(root).to(z)


# -- the noising process and its reversal ------------------------------------------------------------------------------


def reversal(
    process: LinearProcess,
    grid: TimeGrid,
    steps: int,
    integrator: Literal["exponential", "euler"] = "exponential",
    gain: Gain = "posterior",
) -> Chain:
    """The chain of a linear process, run back from noise under a control, and forth from the target.

    Args:
        process: any linear process whose auxiliaries start with noise.
        grid: where it steps.
        steps: K.
        integrator: "exponential": exact kernels of the reference in both directions. "euler": Euler-Maruyama's in both,
            with the same noise, for processes with one channel.
        gain: how a control enters the exponential kernels: "posterior", the mean of the exact reversal; "score", the
            covariance times the score at the beginning of the step, as in denoising diffusion samplers. Euler's kernels
            have one gain, that of the score, whatever is given here.

    Raises:
        ValueError: for a process without density where one is needed.
    """
    times = grid.times(process, steps)
    start = process.start()
    if len(start) > 1 and float(torch.linalg.eigvalsh(start.detach()[1:, 1:])[0]) <= 0:
        raise ValueError(
            f"{type(process).__name__}: auxiliaries that start without noise have no density at the target, and paths "
            "no weights; give them a start (aux_scale or start_cov above 0)."
        )
    # At t = 0 z shows x0 itself: known without a computation, whose derivatives there would be infinite.
    data = torch.eye(len(start), dtype=torch.float64)[:1]
    snr, row = process._weights(times[:-1])
    unknown = torch.cat([1 / (1 + snr), torch.zeros(1, dtype=torch.float64)])
    look = torch.where(snr.unsqueeze(-1) > 0, row * (snr / (1 + snr)).unsqueeze(-1), torch.zeros_like(row))
    look = torch.cat([look, data])
    mean, noise = process.kernel(times[:-1])
    mean, noise = torch.cat([mean, data]), torch.cat([noise, psd_sqrt(start).unsqueeze(0)])
    whole = sqrt_sum(mean.unsqueeze(-1), noise)
    pinned = not bool(whole[0].detach().any())
    phi, root = process.transition(times[1:], times[:-1])
    begin = 1 if pinned else 0  # a step from a point has no backward kernel to invert
    if integrator == "euler":
        rows = _euler(process, times, whole, look)
    elif integrator == "exponential":
        w, p, s = whole[1 + begin :], phi[begin:], root[begin:]
        g = _solve(s, p @ w)
        inner = sqrt_sum(g.mT, _eye(g))  # C C' = I + G'G
        half = torch.linalg.solve_triangular(inner.mT, w, upper=True, left=False)  # W C'^-1
        forth = sqrt_sum(half)
        u = _solve(whole[begin:-1], p @ w)  # a contraction: of noise that hardly moves it, nothing has to be inverted
        a = torch.linalg.solve_triangular(whole[begin:-1], w @ u.mT, upper=False, left=False)  # P Phi' P_k^-1
        if gain == "posterior":
            b = (half @ _solve(inner, _solve(w, mean[1 + begin :].unsqueeze(-1)))).squeeze(-1)
        else:
            b = (half @ (half.mT @ look[begin:-1].unsqueeze(-1))).squeeze(-1)
        if pinned:
            a = torch.cat([torch.zeros_like(whole[:1]), a])
            b = torch.cat([mean[1:2] if gain == "posterior" else whole[1:2, :, 0].square(), b])
            forth = torch.cat([whole[1:2], forth])
        push = (root @ (root.mT @ look[:-1].unsqueeze(-1))).squeeze(-1)
        rows = Rows(a, b, forth), Rows(phi, push, root)
    else:
        raise ValueError(f"reversal: integrator must be exponential or euler, got {integrator!r}.")
    label = torch.cat([angle(process, times[:-1]), torch.zeros(1, dtype=torch.float64)]) / (0.5 * math.pi)
    end = psd_sqrt(start[1:, 1:])
    return Chain(times, label, *rows, whole, end, look, unknown)


def _euler(process: LinearProcess, times: Tensor, whole: Tensor, look: Tensor) -> tuple[Rows, Rows]:
    """Euler-Maruyama with the coefficients at the noisier end of each step, in both directions."""
    if process.channels > 1:
        raise ValueError(
            f"{type(process).__name__}: Euler's kernels of a process with auxiliaries have no noise on some channels, "
            "and no density; take the exponential integrator."
        )
    if not bool(whole[0].detach().any()):
        raise ValueError(
            f"{type(process).__name__}: its drift is infinite at T; take the exponential integrator, which is exact."
        )
    h = (times[:-1] - times[1:])[:, None, None]
    f, gg, p = process.drift(times[:-1]), process.diffusion(times[:-1]), whole[:-1].square()
    root = (gg * h).sqrt()
    forward = Rows(1 - h * (f + gg / p), (gg * h).squeeze(-1) * look[:-1], root)
    return forward, Rows(1 + h * f, (gg * h).squeeze(-1), root)


# -- Langevin dynamics along a path ------------------------------------------------------------------------------------


def langevin(process: LinearProcess, grid: TimeGrid, steps: int) -> Chain:
    r"""Langevin dynamics in the geometry (D, Q) of a recipe process, with the force as its control.

    :math:`dz = -(D + Q) \nabla H\,dB + \sqrt{2D}\,dw` with :math:`\nabla H = -a` on the data channel and
    :math:`S_{aux}^{-1}` times the auxiliaries on the others; a is held over a step, in which all else is exact. The
    backward kernels are those of (D, -Q). For :class:`VP` that is Langevin's step,
    :math:`x + \tfrac h2 a + \sqrt h\,\xi`, h the increment of the clock; for :class:`CLD` an underdamped one.

    Raises:
        ValueError: for a process that no recipe makes, or whose stationary law couples the data to the auxiliaries.
    """
    if not isinstance(process, RecipeProcess):
        raise ValueError(
            f"annealed Langevin dynamics need the (D, Q, S) of a recipe process such as VP, CLD or PSLD, got "
            f"{type(process).__name__}."
        )
    d, q, s = process.terms()
    if bool(s[0, 1:].detach().any()):
        raise ValueError(f"{type(process).__name__}: S must not couple the data to the auxiliaries.")
    times = grid.times(process, steps)
    clock = process.clock.integral(times)
    h = clock[:-1] - clock[1:]
    inverse = torch.zeros_like(s)
    inverse[1:, 1:] = torch.linalg.inv(s[1:, 1:])
    rows = []
    for sign in (1.0, -1.0):
        a = -(d + sign * q) @ inverse
        mean, root = ou_transition(a, noise_root(d), h)
        moved = torch.cat([torch.cat([a, (d + sign * q)[:, :1]], 1), torch.zeros(1, len(a) + 1, dtype=a.dtype)])
        rows.append(Rows(mean, expm(moved, h)[:, :-1, -1], root))
    prior = psd_sqrt(torch.cat([torch.cat([torch.ones_like(s[:1, :1]), s[:1, 1:]], 1), s[1:]]))
    look = torch.zeros(steps + 1, len(s), dtype=torch.float64)
    look[:, 0] = 1.0
    label = as_f64(range(steps, -1, -1)) / steps
    return Chain(
        times,
        label,
        rows[0],
        rows[1],
        prior.expand(steps + 1, *prior.shape),
        psd_sqrt(s[1:, 1:]),
        look,
        torch.zeros_like(label),
    )

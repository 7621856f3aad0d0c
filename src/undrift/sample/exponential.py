r"""Exponential integrators (generalised DDIM) for any linear process, and ancestral sampling.

With the predicted start frozen at :math:`\hat z_0`, the reverse diffusion of stochasticity :math:`\lambda` is
linear, and its solution from t to t' is exact:

.. math:: z' = \Psi (z - \Phi_t \hat z_0) + \Phi_{t'} \hat z_0 + \text{noise},
    \qquad \partial_{t'} \Psi = \bigl(F + \tfrac{1 + \lambda^2}{2} GG^\top S^{-1}\bigr) \Psi

so a step is exact when the data is one point. Higher orders add the integral of Psi against the change of the
prediction, interpolated through earlier calls in log sigma.

How Psi is found for any process. In the frame of the Cholesky root, :math:`\Psi(t', t) = L_{t'} O(t', t) L_t^{-1}`,
the growth of fifteen orders of magnitude near t = 0 sits in L, which is known to full accuracy, and O solves the mild
equation

.. math:: \dot O = \bigl(U - U^\top + \tfrac{\lambda^2}{2} N\bigr) O, \quad
    N = L^{-1} GG^\top L^{-\top}, \quad U = \text{strict upper part of } L^{-1} F L + \tfrac12 N.

At :math:`\lambda = 0` O is a rotation, and R = L O is the paper's root with
:math:`\dot R = (F + \tfrac12 GG^\top S^{-1}) R`. Derivation: the lower part of :math:`L^{-1} \dot L` is fixed by
:math:`\dot S = F S + S F^\top + GG^\top`, and what remains of the drift is skew.

References:
    Zhang, Tao & Chen, gDDIM: Generalized Denoising Diffusion Implicit Models, 2022, eq. 9-19.
    Lu et al., DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models, 2022.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from undrift._linalg import Flow, linear_flow, psd_sqrt, sqrt_sum
from undrift.process.linear import LinearProcess
from undrift.sample.plan import Nodes, Row, TableSampler

__all__ = ["Ancestral", "DPMSolver2M", "Exponential", "ReverseFlow", "reverse_flow"]

_PANEL = 0.25  # width of a collocation panel in log t


@dataclass(frozen=True)
class ReverseFlow:
    """The reverse flow over the N - 1 intervals between consecutive times, with the process at all points it passed.

    Attributes:
        flow: propagators; its nodes and weights are in time, so that integrals along it are sums over its nodes.
        ends: the process at the N times.
        inner: the process at the flow's nodes, (N - 1, M).
    """

    flow: Flow
    ends: Nodes
    inner: Nodes


def reverse_flow(process: LinearProcess, times: Tensor, stochasticity: float = 0.0) -> ReverseFlow:
    r"""Flow of :math:`\dot z = (F + \frac{1 + \lambda^2}{2} GG^\top S^{-1}) z` from each time to the next.

    Args:
        process: any linear process.
        times: (N,), positive, in either direction.
        stochasticity: lambda.
    """
    passed: list[Nodes] = []

    def generator(log_t: Tensor) -> Tensor:
        at = Nodes.at(process, log_t.exp())
        passed.append(at)
        spread = torch.linalg.solve_triangular(at.root, at.GG, upper=False)
        n = torch.linalg.solve_triangular(at.root, spread.mT, upper=False)
        upper = torch.triu(torch.linalg.solve_triangular(at.root, at.F @ at.root, upper=False) + 0.5 * n, 1)
        return at.t[..., None, None] * (upper - upper.mT + 0.5 * stochasticity**2 * n)

    log_times = times.log()
    panels = max(1, math.ceil(float(log_times.detach().diff().abs().max()) / _PANEL))
    flow = linear_flow(generator, log_times[:-1], log_times[1:], panels)
    inner, ends = passed[0].flatten(), Nodes.at(process, times)
    eye = torch.eye(process.channels, dtype=torch.float64)
    from_start = torch.linalg.solve_triangular(ends.root[:-1], eye.expand_as(flow.phi), upper=False)
    from_nodes = torch.linalg.solve_triangular(inner.root, eye.expand_as(flow.to_end), upper=False)
    end_root = ends.root[1:]
    in_time = Flow(
        phi=end_root @ flow.phi @ from_start,
        nodes=inner.t,
        weights=flow.weights * inner.t,
        to_end=end_root.unsqueeze(-3) @ flow.to_end @ from_nodes,
    )
    return ReverseFlow(in_time, ends, inner)


@dataclass(frozen=True)
class Exponential(TableSampler):
    r"""Exponential integrator of order 1 to 3 for any linear process; order 1 on a scalar process is DDIM.

    Args:
        steps, grid, final: see :class:`TableSampler`.
        order: predictions interpolated per step. The first steps run at the order that their history allows.
        stochasticity: lambda; 0 is deterministic, 1 at order 1 is ancestral sampling.
        guard: long steps in log sigma make extrapolated predictions worse than held ones on multimodal data; with the
            guard higher orders fade out there, and only there: full weight up to steps of 0.5, none from 1 on.
    """

    order: int = 2
    stochasticity: float = 0.0
    guard: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in (1, 2, 3):
            raise ValueError(f"Exponential: order must be 1, 2 or 3, got {self.order}.")
        if not self.stochasticity >= 0:
            raise ValueError(f"Exponential: stochasticity must not be negative, got {self.stochasticity}.")

    def rows(self, process: LinearProcess, times: Tensor) -> list[Row]:
        lam = self.stochasticity
        walk = reverse_flow(process, times, lam)
        flow, phi = walk.flow, walk.ends.Phi
        fixed = phi[1:] - flow.phi @ phi[:-1]
        level = walk.ends.log_sigma
        noise = flow.noise_root(lam * psd_sqrt(walk.inner.GG)) if lam else None
        if self.order > 1:
            # d z' / d (prediction at u), a density in u: the integrand of every order.
            density = (
                -0.5 * (1 + lam**2) * flow.weights[..., None, None] * (flow.to_end @ walk.inner.pull @ walk.inner.Phi)
            )
            place = walk.inner.log_sigma
        rows = []
        for i in range(len(times) - 1):
            history = min(self.order, i + 1)
            b = [fixed[i]]
            if history > 1:
                knots = level[i - history + 1 : i + 1].flip(0)
                corrections = self._corrections(place[i], density[i], knots, level[i + 1])
                b = [fixed[i] - sum(corrections), *corrections]
            rows.append(Row(times[i], [flow.phi[i]], b, None if noise is None else noise[i], times[i + 1]))
        return rows

    def _corrections(self, place: Tensor, density: Tensor, knots: Tensor, end: Tensor) -> list[Tensor]:
        """Coefficients of (z0_{i-j} - z0_i), j >= 1: Lagrange polynomials in log sigma, integrated against Psi."""
        out = torch.zeros(len(knots) - 1, *density.shape[-2:], dtype=density.dtype)
        # Orders are added one at a time, each trusted by its own steps.
        below = torch.zeros_like(out)
        for order in range(2, len(knots) + 1):
            this = torch.zeros_like(out)
            for j in range(1, order):
                others = [m for m in range(order) if m != j]
                lagrange = torch.ones_like(place)
                for m in others:
                    lagrange = lagrange * (place - knots[m]) / (knots[j] - knots[m])
                this[j - 1] = (lagrange[:, None, None] * density).sum(0)
            trust = _trust(torch.cat([end.reshape(1), knots[:order]])) if self.guard else torch.ones_like(end)
            out = out + trust * (this - below)
            below = this
            if not bool(trust):
                break
        return list(out)


def _trust(levels: Tensor) -> Tensor:
    """Weight of an order by the longest step in log sigma of its stencil: 1 to 0.5, 0 from 1 on, linear between."""
    return ((1.0 - levels.diff().abs().max()) / 0.5).clamp(0, 1)


@dataclass(frozen=True)
class DPMSolver2M(TableSampler):
    r"""DPM-Solver++(2M): the exponential integrator with the prediction extrapolated to the middle of the step.

    .. math::
        \bar D = (1 + \tfrac{h}{2 h_-}) D_i - \tfrac{h}{2 h_-} D_{i-1}, \qquad
        z' = \Psi (z - \Phi \bar D) + \Phi' \bar D

    with steps h in log sigma. Published for scalar processes; the formula holds as it stands for any linear one.

    Args:
        steps, grid, final: see :class:`TableSampler`.

    References:
        Lu et al., DPM-Solver++, 2022, algorithm 2.
    """

    def rows(self, process: LinearProcess, times: Tensor) -> list[Row]:
        walk = reverse_flow(process, times)
        flow, phi = walk.flow, walk.ends.Phi
        fixed = phi[1:] - flow.phi @ phi[:-1]
        h = -walk.ends.log_sigma.diff()
        rows = []
        for i in range(len(h)):
            r = torch.zeros_like(h[0]) if i == 0 else h[i] / (2 * h[i - 1])
            b = [fixed[i]] if i == 0 else [(1 + r) * fixed[i], -r * fixed[i]]
            rows.append(Row(times[i], [flow.phi[i]], b, None, times[i + 1]))
        return rows


@dataclass(frozen=True)
class Ancestral(TableSampler):
    r"""Draws from the exact posterior :math:`q(z_s \mid z_t, \hat z_0)`, for any process: DDPM's sampler.

    Gain :math:`S_s \Phi(s,t)^\top S_t^{-1}` and posterior root come from one QR of roots; nothing is subtracted.

    Its mean is the exact :math:`E[z_s \mid z_t]` whatever the data; its covariance is too small by what x0 itself
    varies given z_t. With the forward transition's, :math:`\Phi^{-1} \Sigma \Phi^{-\top}`, it is too large instead:
    that is the reverse SDE with the *score* held over the step, in the frame in which the score is a martingale, where
    the posterior's is that with the *prediction* held.

    Args:
        steps, grid, final: see :class:`TableSampler`.
        variance: "posterior" or "forward".

    References:
        Ho, Jain & Abbeel, Denoising Diffusion Probabilistic Models, 2020, eq. 6-7.
        Wang, He & Tao, Evaluating the Design Space of Diffusion-Based Generative Models, 2024 (the held score, for VE).
    """

    variance: Literal["posterior", "forward"] = "posterior"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variance not in ("posterior", "forward"):
            raise ValueError(f"Ancestral: variance must be 'posterior' or 'forward', got {self.variance!r}.")

    def rows(self, process: LinearProcess, times: Tensor) -> list[Row]:
        k = process.channels
        step, noise = process.transition(times[1:], times[:-1])
        phi, root = process.marginal(times)
        # Root of the joint law of (z_t, z_s), made lower triangular: its blocks hold S_t, the gain and the posterior.
        joint = sqrt_sum(
            torch.cat([torch.cat([step @ root[1:], noise], -1), torch.cat([root[1:], torch.zeros_like(noise)], -1)], -2)
        )
        gain = torch.linalg.solve_triangular(joint[:, :k, :k], joint[:, k:, :k], upper=False, left=False)
        spread = joint[:, k:, k:] if self.variance == "posterior" else torch.linalg.solve(step, noise)
        b = phi[1:] - gain @ phi[:-1]
        return [Row(times[i], [gain[i]], [b[i]], spread[i], times[i + 1]) for i in range(len(times) - 1)]

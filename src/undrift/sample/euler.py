r"""Euler-Maruyama, and Heun's method on the probability-flow ODE, in the process's own time.

The reverse diffusions with the right marginals form a family in the stochasticity :math:`\lambda`:

.. math:: dz = [F z - \tfrac{1 + \lambda^2}{2} GG^\top \nabla \log p_t]\,dt + \lambda G\,d\bar w

with the reverse SDE at :math:`\lambda = 1` and the probability-flow ODE at :math:`\lambda = 0`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from undrift._linalg import psd_sqrt
from undrift.process.linear import LinearProcess
from undrift.sample.grid import Grid, Rho
from undrift.sample.plan import Nodes, Row, TableSampler

__all__ = ["EulerMaruyama", "Heun"]


def _euler(nodes: Nodes, h: Tensor, stochasticity: float) -> tuple[Tensor, Tensor]:
    """(A, B) of an Euler step back by h (N,) from each node."""
    h = h[..., None, None]
    pull = 0.5 * (1 + stochasticity**2) * h * nodes.pull
    eye = torch.eye(nodes.F.shape[-1], dtype=torch.float64)
    return eye - h * nodes.F - pull, pull @ nodes.Phi


@dataclass(frozen=True)
class EulerMaruyama(TableSampler):
    """Euler-Maruyama on the reverse SDE; with ``stochasticity=0`` Euler on the probability-flow ODE. Weak order 1.

    Args:
        steps, grid, final: see :class:`TableSampler`.
        stochasticity: lambda.
        noise_last: draw noise on the last step before the final one, too.

    References:
        Song et al., Score-Based Generative Modeling through Stochastic Differential Equations, 2021, section 4.1.
    """

    stochasticity: float = 1.0
    noise_last: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stochasticity >= 0:
            raise ValueError(f"EulerMaruyama: stochasticity must not be negative, got {self.stochasticity}.")

    def rows(self, process: LinearProcess, times: Tensor) -> list[Row]:
        h = -times.diff()
        nodes = Nodes.at(process, times[:-1])
        a, b = _euler(nodes, h, self.stochasticity)
        noise = self.stochasticity * h.sqrt()[:, None, None] * psd_sqrt(nodes.GG)
        last = len(h) - 1
        return [
            Row(
                times[i],
                [a[i]],
                [b[i]],
                noise[i] if self.stochasticity and (i < last or self.noise_last) else None,
                times[i + 1],
            )
            for i in range(last + 1)
        ]


@dataclass(frozen=True)
class Heun(TableSampler):
    r"""Heun's method on the probability-flow ODE, with EDM's optional churn. Order 2, two calls a step.

    On VE with sigma(t) = t this is EDM's sampler; on other scalar processes it is its algorithm for any sigma(t) and
    scale, and for K > 1 the same in all channels. Before a step, churn moves the state forward, exactly, to the time
    where sigma is (1 + gamma) as large, :math:`\gamma = \min(\text{churn}/\text{steps}, \sqrt 2 - 1)`.

    It is explicit in the process's time: with auxiliaries, which are fast near t = 0, few steps are unstable; there use
    :class:`Exponential`.

    Args:
        steps, grid, final: see :class:`TableSampler`; calls = 2 steps - 1 with a final call.
        churn: S_churn.
        churn_min, churn_max: sigma range in which to churn.
        churn_noise: S_noise, factor on the deviation of the noise that churn adds.

    References:
        Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, 2022, algorithms 1 and 2.
    """

    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = math.inf
    churn_noise: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.churn >= 0:
            raise ValueError(f"Heun: churn must not be negative, got {self.churn}.")

    def default_grid(self, process: LinearProcess) -> Grid:
        return Rho()

    def _raise(self, process: LinearProcess, times: Tensor) -> Tensor:
        """Times to churn up to before each step, (N - 1,): equal to ``times[:-1]`` where there is no churn."""
        sigma = process.sigma(times[:-1])
        gain = 1 + min(self.churn / self.steps, math.sqrt(2) - 1)
        active = (
            (sigma >= self.churn_min) & (sigma <= self.churn_max) & (sigma * gain <= process.sigma(process.horizon))
        )
        if gain == 1 or not bool(active.any()):
            return times[:-1]
        raised = times[:-1].clone()
        raised[active] = process.time(sigma[active] * gain)
        raised[0] = times[0]  # the walk starts from fresh noise
        return raised

    def rows(self, process: LinearProcess, times: Tensor) -> list[Row]:
        start = self._raise(process, times)
        h = start - times[1:]
        a, b = _euler(Nodes.at(process, start), h, 0.0)
        a_end, b_end = _euler(Nodes.at(process, times[1:]), h, 0.0)
        eye, nan = torch.eye(process.channels, dtype=torch.float64), math.nan
        rows = []
        for i in range(len(h)):
            rows.append(Row(start[i], [a[i]], [b[i]], None, nan))
            # z + (h/2)(f + f~), with h f = z~ - z known from the first row.
            first, before, predicted, noise = 0.5 * a_end[i], 0.5 * eye, 0.5 * b_end[i], None
            if i + 1 < len(h) and start[i + 1] > times[i + 1]:
                phi, root = process.transition(times[i + 1], start[i + 1])
                first, before, predicted, noise = phi @ first, phi @ before, phi @ predicted, self.churn_noise * root
            rows.append(Row(times[i + 1], [first, before], [predicted], noise, times[i + 1]))
        return rows

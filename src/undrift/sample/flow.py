r"""The probability-flow ODE with an adaptive solver: the one sampler that is not a table.

.. math:: \dot z = F z - \tfrac12 GG^\top \nabla \log p_t(z)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from undrift._interpolant import Interpolant
from undrift.diffusion import Diffusion, NoiseDiffusion
from undrift.guided_noise import GuidedNoise
from undrift.process.linear import mix
from undrift.sample.plan import Nodes, Sampler

__all__ = ["ProbabilityFlow", "flow_velocity"]


@dataclass(frozen=True)
class ProbabilityFlow(Sampler):
    """Adaptive Runge-Kutta on the probability-flow ODE (torchdiffeq), one step size for the whole batch.

    Args:
        rtol, atol: tolerances of the solver, per step.
        sigma_min: effective noise level at which the walk stops, in data units.
        final: "predict" replaces z by the predicted x0 at the end; "none" leaves the noise of ``sigma_min`` in.
        method: a torchdiffeq solver with step-size control.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    sigma_min: float = 0.002
    final: Literal["predict", "none"] = "predict"
    method: Literal["dopri5", "dopri8", "bosh3", "adaptive_heun"] = "dopri5"

    def __post_init__(self) -> None:
        for name in ("rtol", "atol", "sigma_min"):
            if not getattr(self, name) > 0:
                raise ValueError(f"ProbabilityFlow: {name} must be positive, got {getattr(self, name)}.")
        if self.final not in ("predict", "none"):
            raise ValueError(f"ProbabilityFlow: final must be 'predict' or 'none', got {self.final!r}.")

    def solve(
        self,
        diffusion: Diffusion | NoiseDiffusion | GuidedNoise,
        z: Tensor,
        on_call: Callable[[], object] = lambda: None,
        **condition: Any,
    ) -> tuple[Tensor, Tensor, int]:
        """Walk ``z`` (batch, K, *event) from T to the end; ``on_call`` is called at each model call.

        Returns:
            times (S,) and states (S, batch, K, *event) at the start, the end of the ODE and after the final call; and
            the number of model calls.

        Raises:
            RuntimeError: if the step size underflows.
        """
        from torchdiffeq import odeint

        process, calls = diffusion.process, 0
        end = process.time(self.sigma_min)
        velocity_at = flow_velocity(diffusion, float(end))

        def velocity(log_t: Tensor, state: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            on_call()
            return velocity_at(float(log_t), state, **condition)

        span = torch.stack([torch.tensor(process.horizon, dtype=torch.float64), end]).log().to(z.device)
        try:
            # step_t makes the solver step onto the end instead of past it, where the coefficients are not defined
            options = {"step_t": span[-1:]}
            states = odeint(velocity, z, span, rtol=self.rtol, atol=self.atol, method=self.method, options=options)
        except AssertionError as error:
            raise RuntimeError(
                f"ProbabilityFlow: the solver's step size underflowed ({error}). One step size serves the "
                "whole batch, so one stiff sample is enough: loosen rtol and atol, raise sigma_min, use float64, or "
                "walk in smaller batches."
            ) from error
        times = torch.stack([torch.tensor(process.horizon, dtype=torch.float64), end])
        if self.final == "predict":
            x0 = diffusion.predict(states[-1], end, **condition)
            last = torch.zeros_like(states[-1])
            last[:, 0] = x0
            calls += 1
            on_call()
            states, times = torch.cat([states, last.unsqueeze(0)]), torch.cat([times, times.new_zeros(1)])
        return times, states, calls


def flow_velocity(diffusion: Diffusion | NoiseDiffusion | GuidedNoise, t_min: float) -> Callable[..., Tensor]:
    """``velocity(log_t, z, **condition)``: dz / d log t of the probability-flow ODE, from log t_min to log T.

    Its coefficients are tabulated once, so that a call costs the model and little else.
    """
    process, k = diffusion.process, diffusion.process.channels

    def coefficients(log_t: Tensor) -> Tensor:
        t = log_t.exp().clamp(max=process.horizon)
        at = Nodes.at(process, t)
        pull = 0.5 * at.pull
        matrix = torch.cat([at.F + pull, -pull @ at.Phi[..., : diffusion.predictions]], -1)
        return torch.cat([(t[:, None, None] * matrix).flatten(1), diffusion.reading(t)], -1)

    table = Interpolant(coefficients, math.log(t_min), math.log(process.horizon))
    size = k * (k + diffusion.predictions)

    def velocity(log_t: float, z: Tensor, **condition: Any) -> Tensor:
        row = table(log_t)
        start = diffusion.read(z, row[size:], **condition)
        return mix(row[:size].reshape(k, -1), torch.cat([z, start], 1))

    return velocity

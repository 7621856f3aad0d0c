r"""A trained control is a denoiser: :math:`D(\tilde x, \sigma) = y + V a` with y and V those of the reference at sigma.

With data N(0, I) as the reference, :math:`y = \tilde x / (1 + \sigma^2)`, :math:`V = \sigma^2 / (1 + \sigma^2)`. What
was learned from a density without a single datum then serves every process and every sampler of the library.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from undrift.denoise.base import Denoiser
from undrift.density.controlled.chain import Chain
from undrift.density.controlled.diffusion import ControlledDiffusion, clean
from undrift.density.controlled.regression import control_at
from undrift.density.target import Target

__all__ = ["ControlDenoiser"]


class ControlDenoiser(Denoiser):
    """E[x0 | x0 + sigma n] as a control knows it, in the coordinates it was trained in.

    Args:
        diffusion: a reversal without a backward control or learned noise.
        target: in the same coordinates; asked once a call if the control is guided.

    Raises:
        ValueError: for diffusions of another kind, whose control is no posterior mean.
    """

    def __init__(self, diffusion: ControlledDiffusion, target: Target) -> None:
        scheme = diffusion.scheme
        if scheme.annealed or scheme.backward is not None or scheme.learn:
            raise ValueError(
                "only the control of a plain reversal (PIS, DIS, DDS, PDDS) is a denoiser: annealed diffusions, those "
                "with a learned way back, and those with learned noise keep no E[x0 | z]."
            )
        self.diffusion, self.target = diffusion, target
        self._chain: Chain = diffusion.base_chain(1)

    def __call__(self, x: Tensor, sigma: Tensor, **condition: Any) -> Tensor:
        """x (batch, d), sigma (batch,) or one level: the posterior mean, (batch, d)."""
        level = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).expand(len(x))
        variance = 1 + level.square().unsqueeze(-1)
        y = (x / variance).to(x)
        unknown = ((variance - 1) / variance).to(x)
        value = score = None
        with torch.no_grad():
            if self.diffusion.guided:
                value, score = clean(self.target, y)
            chain = self._chain.to(x.dtype, x.device)
            a = control_at(self.diffusion, chain, level.atan() / (0.5 * math.pi), y, value, score)
        return y + unknown * a

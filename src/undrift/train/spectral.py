r"""What training on functions minimises where the denoiser is preconditioned mode by mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from undrift.denoise.spectral import SpectralDenoiser
from undrift.diffusion import Diffusion
from undrift.train.levels import LogUniform, NoiseLevels, stratified
from undrift.train.objectives import Objective

__all__ = ["SpectralDenoising"]


@dataclass(frozen=True, eq=False)
class SpectralDenoising(Objective):
    """Error of the network's own output, for a :class:`~undrift.denoise.SpectralDenoiser`, with or without a clock.

    A mode counts by the data's variance in it, so that the loss is of order 1 at every level and on every grid.

    Args:
        noise: density of the levels that are visited; None for LogUniform of the clock's levels, or without one of .01
            to 30.
    """

    noise: NoiseLevels | None = None

    def loss(self, model: Any, x: Tensor, generator: torch.Generator, **condition: Any) -> tuple[Tensor, Tensor]:
        model = model.denoiser if isinstance(model, Diffusion) else model
        if not isinstance(model, SpectralDenoiser):
            raise TypeError(
                f"SpectralDenoising: trains a SpectralDenoiser, got a {type(model).__name__}; Denoising trains others."
            )
        noise = self.noise
        if noise is None:
            noise = LogUniform(0.01, 30.0) if model.clock is None else LogUniform(model.sigma_min, model.sigma_max)
        sigma = noise.draw(stratified(x.shape[0], generator)).to(x)
        if model.clock is not None and not bool(
            ((sigma >= model.sigma_min * (1 - 1e-6)) & (sigma <= model.sigma_max * (1 + 1e-6))).all()
        ):
            raise ValueError(
                f"SpectralDenoising: the clock has levels from {model.sigma_min:g} to {model.sigma_max:g}, and noise "
                f"draws others, from {float(sigma.min()):.4g} to {float(sigma.max()):.4g}; leave noise out."
            )
        xi = torch.empty_like(x).normal_(generator=generator)
        return model.misfit(x, sigma, xi, **condition), sigma

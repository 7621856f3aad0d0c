"""Log densities of one number, elementwise and normalised, whose settings may be tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["log_beta", "log_gamma", "log_half_cauchy", "log_half_normal", "log_lognormal", "log_normal"]

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def log_normal(x: Tensor, mean: Tensor | float, sd: Tensor | float) -> Tensor:
    """N(mean, sd^2)."""
    log_sd = sd.log() if isinstance(sd, Tensor) else math.log(sd)
    return -0.5 * ((x - mean) / sd).square() - log_sd - _HALF_LOG_2PI


def log_lognormal(x: Tensor, mean: Tensor | float, sd: Tensor | float) -> Tensor:
    """The law of e^n with n ~ N(mean, sd^2)."""
    logarithm = x.log()
    return log_normal(logarithm, mean, sd) - logarithm


def log_half_normal(x: Tensor, sd: float) -> Tensor:
    """The positive half of N(0, sd^2)."""
    return log_normal(x, 0.0, sd) + math.log(2)


def log_half_cauchy(x: Tensor, scale: float) -> Tensor:
    """The positive half of the Cauchy law."""
    return math.log(2 / (math.pi * scale)) - torch.log1p((x / scale).square())


def log_gamma(x: Tensor, shape: float, rate: float) -> Tensor:
    """Gamma(shape, rate)."""
    return shape * math.log(rate) - math.lgamma(shape) + (shape - 1) * x.log() - rate * x


def log_beta(x: Tensor, a: float, b: float) -> Tensor:
    """Beta(a, b)."""
    constant = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return constant + (a - 1) * x.log() + (b - 1) * torch.log1p(-x)

r"""Integers as continuous data, and back: what a density on pixels means.

.. math:: x = \frac{\text{pixel} + U}{\text{bins}}, \quad U \sim U[0, 1); \qquad
    y = 2 x - 1 \quad\text{or}\quad y = \operatorname{logit}(\alpha + (1 - 2 \alpha) x)

A bound on the log density of y, plus :math:`\log|\det dy/dx|`, bounds the log probability of the pixels up to
:math:`d \log \text{bins}` (Theis, van den Oord & Bethge, A Note on the Evaluation of Generative Models, 2016).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

__all__ = ["PixelTransform", "dequantise", "quantise"]

PixelTransform = Literal["center", "logit"]


def _check(owner: str, transform: str, bins: int, alpha: float) -> None:
    if transform not in ("center", "logit"):
        raise ValueError(f"{owner}: transform must be 'logit' or 'center', got {transform!r}.")
    if bins < 1:
        raise ValueError(f"{owner}: bins must be at least 1, got {bins}.")
    if not 0 < alpha < 0.5:
        raise ValueError(f"{owner}: alpha must lie in (0, 0.5), got {alpha}.")


def dequantise(
    pixels: Tensor,
    transform: PixelTransform = "center",
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

    Raises:
        ValueError: for an unknown transform, or pixels that are no whole numbers in range.
    """
    _check("dequantise", transform, bins, alpha)
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


def quantise(y: Tensor, transform: PixelTransform = "center", *, bins: int = 256, alpha: float = 0.05) -> Tensor:
    """The pixels that y stands for, the inverse of :func:`dequantise` whatever its noise; values outside are clipped.

    Args:
        y: continuous data, any shape.
        transform, bins, alpha: as given to :func:`dequantise`.

    Returns:
        Whole numbers in 0 ... bins - 1, int64, same shape.
    """
    _check("quantise", transform, bins, alpha)
    x = (y.double() + 1) / 2 if transform == "center" else (torch.sigmoid(y.double()) - alpha) / (1 - 2 * alpha)
    return (x * bins).floor().clamp(0, bins - 1).long()

r"""Guidance without a classifier: the difference between two denoisers, pushed further.

.. math:: D_g + w\,(D_c - D_g)

With :math:`D_c` conditioned on the class and :math:`D_g` not, this is :math:`D_c` guided by the classifier that the two
imply, :math:`\sigma^2 C \nabla \log p_\sigma(c \mid \tilde x) = D_c - D_g`. With :math:`D_g` a weaker version of
:math:`D_c`, it is autoguidance. w = 1 is the conditional model as it is.

References:
    Ho & Salimans, Classifier-Free Diffusion Guidance, 2022, arXiv 2207.12598 (its w is ours less 1).
    Kynkäänniemi et al., Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion
    Models, 2024, arXiv 2404.07724.
    Karras et al., Guiding a Diffusion Model with a Bad Version of Itself, 2024, arXiv 2406.02507.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from undrift.denoise.base import Denoiser, per_sample
from undrift.space import Space, space_of
from undrift.space.clock import ModalClock

__all__ = ["ClassifierFree"]


@dataclass(frozen=True, eq=False)
class ClassifierFree(Denoiser):
    r"""Guidance by the difference of two predictions.

    The class travels as the condition ``y`` (batch,) of the networks here, in which -1 is no class: without a ``guide``
    both predictions come from one call of the model on twice the batch, so it must have been trained with classes
    dropped now and then.

    Args:
        denoiser: the conditional model.
        strength: w; 0 is the guide, 1 the conditional model, above 1 it is pushed away from the guide.
        interval: noise levels (low, high] at which to guide; elsewhere the conditional model answers.
        guide: another denoiser for :math:`D_g`.
        guide_classes: whether the guide is told the class too: autoguidance by a weaker conditional model.

    Raises:
        ValueError: if the strength is not finite, the interval is empty, or a guide with classes is missing.
    """

    denoiser: Denoiser
    strength: float = 2.0
    interval: tuple[float, float] = (0.0, math.inf)
    guide: Denoiser | None = None
    guide_classes: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise ValueError(f"ClassifierFree: strength must be finite, got {self.strength}.")
        if len(self.interval) != 2 or not 0 <= self.interval[0] < self.interval[1]:
            raise ValueError(f"ClassifierFree: interval must be (low, high) with 0 <= low < high, got {self.interval}.")
        if self.guide_classes and self.guide is None:
            raise ValueError("ClassifierFree: guide_classes needs a guide; the model itself would guide nowhere.")

    @property
    def space(self) -> Space:
        """Where the points live: the denoiser's space."""
        return space_of(self.denoiser)

    @property
    def clock(self) -> ModalClock | None:
        """The denoiser's clock of modes, if it has one."""
        return getattr(self.denoiser, "clock", None)

    def __call__(self, x: Tensor, sigma: Tensor | float, y: Tensor | int | None = None, **condition: Any) -> Tensor:
        """
        Args:
            x: noisy points (batch, *event).
            sigma: noise levels (batch,), or one level.
            y: classes (batch,), or one class.
            condition: passed on to both models.

        Returns:
            Same shape and dtype as ``x``.
        """
        if y is None:
            raise ValueError("ClassifierFree: needs the class to guide to; give it as y=.")
        level = per_sample(sigma, x).flatten()
        classes = torch.as_tensor(y, device=x.device).expand(x.shape[0])
        low, high = self.interval
        inside = (level > low) & (level <= high)
        if self.strength == 1 or not bool(inside.any()):
            return self.denoiser(x, level, y=classes, **condition)
        if self.guide is not None:
            to_guide = {"y": classes} if self.guide_classes else {}
            pulled = self.denoiser(x, level, y=classes, **condition)
            base = self.guide(x, level, **to_guide, **condition)
        else:
            twice = {
                k: torch.cat([v, v]) if isinstance(v, Tensor) and v.ndim and v.shape[0] == x.shape[0] else v
                for k, v in condition.items()
            }
            both = torch.cat([classes, torch.full_like(classes, -1)])
            pulled, base = self.denoiser(torch.cat([x, x]), torch.cat([level, level]), y=both, **twice).chunk(2)
        guided = base + self.strength * (pulled - base)
        return torch.where(inside.reshape(-1, *[1] * (x.ndim - 1)), guided, pulled)

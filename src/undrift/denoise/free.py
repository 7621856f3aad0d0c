r"""Guidance without a classifier: the difference between two denoisers, pushed further.

.. math:: D_g + w\,(D_c - D_g)

With :math:`D_c` conditioned on a class or on data y, and :math:`D_g` not, this is :math:`D_c` guided by the classifier,
or the likelihood, that the two imply, :math:`\sigma^2 C \nabla \log p_\sigma(y \mid \tilde x) = D_c - D_g`. With
:math:`D_g` a weaker version of :math:`D_c`, it is autoguidance. w = 0 is the prior, w = 1 the conditional model as it
is, and beyond 1 the condition counts for more than it should.

References:
    Ho & Salimans, Classifier-Free Diffusion Guidance, 2022, arXiv 2207.12598 (its w is ours less 1).
    Kynkäänniemi et al., Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion
    Models, 2024, arXiv 2404.07724.
    Karras et al., Guiding a Diffusion Model with a Bad Version of Itself, 2024, arXiv 2406.02507.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from undrift.denoise.base import Denoiser, per_sample
from undrift.space import Space, space_of
from undrift.space.clock import ModalClock

__all__ = ["ClassifierFree"]

_HIDDEN = ("y", "observed")


@dataclass(frozen=True, eq=False)
class ClassifierFree(Denoiser):
    r"""Guidance by the difference of two predictions.

    Of the conditions of a call some are hidden from :math:`D_g`: the class ``y`` (batch,), of which -1 is no class for
    the networks here, or what was ``observed``, which is left out. Without a ``guide`` the model itself is asked so,
    and it must have been trained with that condition dropped now and then.

    Args:
        denoiser: the conditional model.
        strength: w; 0 is the guide, 1 the conditional model, above 1 it is pushed away from the guide.
        interval: noise levels (low, high] at which to guide; elsewhere the conditional model answers.
        guide: another denoiser for :math:`D_g`.
        guide_told: whether the guide is told everything too: autoguidance by a weaker conditional model.
        hides: the conditions to guide to: ("y",), ("observed",) or both; None for the class where a call gives one,
            or else what was observed.

    Raises:
        ValueError: if the strength is not finite, the interval is empty, a guide that is told is missing, or ``hides``
            names something else.
    """

    denoiser: Denoiser
    strength: float = 2.0
    interval: tuple[float, float] = (0.0, math.inf)
    guide: Denoiser | None = None
    guide_told: bool = False
    hides: tuple[Literal["y", "observed"], ...] | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise ValueError(f"ClassifierFree: strength must be finite, got {self.strength}.")
        if len(self.interval) != 2 or not 0 <= self.interval[0] < self.interval[1]:
            raise ValueError(f"ClassifierFree: interval must be (low, high) with 0 <= low < high, got {self.interval}.")
        if self.guide_told and self.guide is None:
            raise ValueError("ClassifierFree: guide_told needs a guide; the model itself would guide nowhere.")
        if self.hides is not None and (not self.hides or not set(self.hides) <= set(_HIDDEN)):
            raise ValueError(f"ClassifierFree: hides must name y, observed or both, got {self.hides}.")

    @property
    def space(self) -> Space:
        """Where the points live: the denoiser's space."""
        return space_of(self.denoiser)

    @property
    def clock(self) -> ModalClock | None:
        """The denoiser's clock of modes, if it has one."""
        return getattr(self.denoiser, "clock", None)

    def _hidden(self, condition: dict[str, Any]) -> tuple[str, ...]:
        """The conditions of a call that the guide is not told."""
        names = self.hides or tuple(k for k in _HIDDEN if k in condition)[:1]
        missing = [k for k in names or ("y",) if k not in condition]
        if missing:
            what = "what was observed, observed=" if missing == ["observed"] else "the class to guide to, y="
            other = "" if self.hides else ", or what was observed, observed="
            raise ValueError(f"ClassifierFree: needs {what}{other}.")
        return names

    def __call__(self, x: Tensor, sigma: Tensor | float, **condition: Any) -> Tensor:
        """
        Args:
            x: noisy points (batch, *event).
            sigma: noise levels (batch,), or one level.
            condition: passed on to the model, and what is not hidden to the guide; ``y`` classes (batch,), or one
                class. What is None is not given.

        Returns:
            Same shape and dtype as ``x``.

        Raises:
            ValueError: if what to guide to is not given.
        """
        level = per_sample(sigma, x).flatten()
        told = {k: v for k, v in condition.items() if v is not None}
        if "y" in told:
            told["y"] = torch.as_tensor(told["y"], device=x.device).expand(x.shape[0])
        hidden = self._hidden(told)
        low, high = self.interval
        inside = (level > low) & (level <= high)
        if self.strength == 1 or not bool(inside.any()):
            return self.denoiser(x, level, **told)
        rest = {k: v for k, v in told.items() if k not in hidden}
        if self.guide is not None:
            pulled = self.denoiser(x, level, **told)
            base = self.guide(x, level, **(told if self.guide_told else rest))
        elif set(told) == {"y"}:  # one call on twice the batch
            both = torch.cat([told["y"], torch.full_like(told["y"], -1)])
            pulled, base = self.denoiser(torch.cat([x, x]), torch.cat([level, level]), y=both).chunk(2)
        else:  # data may be one for all or one for each, which only the network can tell
            if "y" in hidden:
                rest["y"] = torch.full_like(told["y"], -1)
            pulled, base = self.denoiser(x, level, **told), self.denoiser(x, level, **rest)
        guided = base + self.strength * (pulled - base)
        return torch.where(inside.reshape(-1, *[1] * (x.ndim - 1)), guided, pulled)

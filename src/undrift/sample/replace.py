r"""Inpainting by replacement: the known part of a walk is drawn anew at every step, at the time the walk has come to.

Given the known part of x0, that of :math:`z_t` has the kernel's law :math:`N(m_t \otimes x_0, S_t \otimes C)`, in all
channels. The walk starts from a draw of it, and after every step, from t to s, its known part is replaced by a fresh
draw at **s**: the time that the model is asked at next. (Public code draws it at t, so that the model sees a known part
noisier than it is told.) At time 0 the known part is its mean, the known data themselves.

What the model says of the unknown part comes from a noisy draw of the known one, not from the known data: samples are
right at the known places and plausible elsewhere, but not draws of the posterior, however many the steps. For those see
:func:`~undrift.sample.twisted`. On a space of functions noise is correlated across the edge of the mask, and a fresh
draw of one side knows nothing of the other: there, guidance is the better choice.

References:
    Song et al., Score-Based Generative Modeling through Stochastic Differential Equations, 2021, appendix I.2.
    Pandey & Mandt, A Complete Recipe for Diffusion Generative Models, 2023, appendix D.4 (all channels).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from undrift.process.linear import mix
from undrift.sample.plan import Plan
from undrift.space import Space

__all__ = ["Hook", "Replace", "Steer"]

Hook = Callable[[Tensor, int, int], Tensor]
"""``hook(z, i, first)`` -> states in place of z (batch, K, *event), those of samples ``first`` and on, that the model
would see at call i; at i = N, one past the last call, those that the walk ends with."""


class Steer(Protocol):
    """What changes states between steps."""

    def along(self, space: Space, plan: Plan, n: int, shape: Sequence[int], generator: torch.Generator) -> Hook:
        """The hook for n samples of an event shape, walked by a plan in a space; ValueError where that cannot be."""
        ...


@dataclass(frozen=True, eq=False)
class Replace:
    """Replacement by draws of the kernel; for any process, either kind of diffusion, and samplers that are tables.

    Args:
        mask: where the data are known, true or 1, (*event) or what broadcasts to it; of the space's coordinates.
        values: the known data, (*event), or one per sample (n, *event); what stands elsewhere is ignored.

    Raises:
        ValueError: if the mask has values other than 0 and 1, or known values are not finite.
    """

    mask: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        mask, values = torch.as_tensor(self.mask), torch.as_tensor(self.values)
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("Replace: mask must hold 0 (unknown) and 1 (known) only.")
        if not bool(torch.where(mask.bool().to(values.device), values, 0.0).isfinite().all()):
            raise ValueError("Replace: the known values must be finite; mark what is missing in the mask.")
        object.__setattr__(self, "mask", mask.bool())
        object.__setattr__(self, "values", values)

    def along(self, space: Space, plan: Plan, n: int, shape: Sequence[int], generator: torch.Generator) -> Hook:
        """See :class:`Steer`."""
        if plan.L.ndim > 3:
            raise ValueError("Replace: modes that have clocks of their own have no common kernel; guide them instead.")
        event = torch.Size(shape)
        each = self.values.ndim == len(event) + 1
        try:
            mask = self.mask.expand(event)
            values = self.values.expand(n, *event) if each else self.values.expand(event)
        except RuntimeError:
            raise ValueError(
                f"Replace: mask {tuple(self.mask.shape)} and values {tuple(self.values.shape)} must broadcast to the "
                f"event {tuple(event)}, values also to one per sample, {(n, *event)}."
            ) from None
        means, roots = _kernels(plan)

        def hook(z: Tensor, i: int, first: int) -> Tensor:
            if i and not bool(torch.isfinite(plan.after[i - 1])):
                return z  # a stage inside a step
            known = values[first : first + len(z)] if each else values.expand(len(z), *event)
            known = torch.where(mask.to(known.device), known, 0.0).to(z).unsqueeze(1)
            noise = space.colour(torch.empty_like(z).normal_(generator=generator))
            drawn = mix(torch.cat([means[i].unsqueeze(-1), roots[i]], -1), torch.cat([known, noise], 1))
            return torch.where(mask.to(z.device), drawn, z)

        return hook


def _kernels(plan: Plan) -> tuple[Tensor, Tensor]:
    """Means (N + 1, K) and roots (N + 1, K, K) of z given x0 at every call, and where the walk ends; at 0 the data."""
    times = torch.cat([plan.times, plan.after[-1:]])
    means, roots = plan.process.kernel(times)
    ended = (times == 0).unsqueeze(-1)
    data = torch.eye(plan.process.channels, dtype=torch.float64)[0]
    return torch.where(ended, data, means), torch.where(ended.unsqueeze(-1), 0.0, roots)

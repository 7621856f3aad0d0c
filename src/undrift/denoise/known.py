r"""Inpainting and imputation: a denoiser that is told a part of the data.

The prediction's known part is the known data. A sampler that draws from the bridge :math:`q(z_s \mid z_t, x_0)`, such
as :class:`~undrift.sample.Ancestral`, then walks the known part of every channel down its own exact path, to the time
it arrives at: there is no replacing afterwards, and no time to get wrong.

What it does not know: the unknown part is predicted from the *noisy* known part, as in every replacement method, where
the data themselves are at hand. It is exact where known and unknown are independent. Where they are not it stays biased
however fine the steps: for two coordinates of variance 1 and correlation 0.9, the first known to be 1.5, the second has
mean 1.35 and variance 0.19, and 400 ancestral steps of VP give 0.93 and 0.35. For the posterior use a potential, or
twisted sampling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from undrift.denoise.base import Denoiser, per_sample
from undrift.space import Space, space_of
from undrift.space.clock import ModalClock

__all__ = ["Known"]


@dataclass(frozen=True, eq=False)
class Known(Denoiser):
    """A denoiser whose prediction is replaced where the data are known.

    Args:
        denoiser: the model.
        mask: where the data are known, true or 1, (*event) or what broadcasts to it; of the space's coordinates.
        values: the known data, (*event) or one per sample (batch, *event); what stands elsewhere is ignored. A call may
            bring its own as ``known``, which :func:`~undrift.sample.sample` splits along with its batches.

    Raises:
        ValueError: if the mask has values other than 0 and 1, or known values are not finite.
    """

    denoiser: Denoiser
    mask: Tensor
    values: Tensor | None = None

    def __post_init__(self) -> None:
        mask = torch.as_tensor(self.mask)
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("Known: mask must hold 0 (unknown) and 1 (known) only.")
        object.__setattr__(self, "mask", mask.bool())
        if self.values is not None:
            self._check(torch.as_tensor(self.values))

    @property
    def space(self) -> Space:
        """Where the points live: the denoiser's space."""
        return space_of(self.denoiser)

    @property
    def clock(self) -> ModalClock | None:
        """The denoiser's clock of modes, if it has one."""
        return getattr(self.denoiser, "clock", None)

    def _check(self, values: Tensor) -> None:
        known = torch.where(self.mask.to(values.device), values, 0.0)
        if not bool(known.isfinite().all()):
            raise ValueError("Known: the known values must be finite; mark what is missing in the mask.")

    def __call__(self, x: Tensor, sigma: Tensor | float, known: Tensor | None = None, **condition: Any) -> Tensor:
        """The prediction with its known part in place; same shape and dtype as x (batch, *event)."""
        values = self.values if known is None else known
        if values is None:
            raise ValueError("Known: no values; give them to Known, or as known= with the call.")
        mask, values = self.mask.to(x.device), torch.as_tensor(values).to(x)
        try:
            torch.broadcast_to(torch.where(mask, values, 0.0), x.shape)
        except RuntimeError:
            raise ValueError(
                f"Known: mask {tuple(mask.shape)} and values {tuple(values.shape)} must broadcast to the points, "
                f"{tuple(x.shape)}; values one per sample go by known= where sample() walks in batches."
            ) from None
        if known is not None:
            self._check(values)
        return torch.where(mask, values, self.denoiser(x, per_sample(sigma, x).flatten(), **condition))

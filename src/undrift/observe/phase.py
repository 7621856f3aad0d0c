r"""Phase retrieval: only the amplitudes of a Fourier transform are seen.

.. math:: A(x) = |\mathcal{F} P x|, \qquad \mathcal{F} \text{ unitary}, \quad P \text{ pads with zeros}

Amplitudes do not change when x is shifted (if the shift stays within the padding), reflected through a point, or
multiplied by -1: the posterior has several modes by construction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from undrift.observe.base import Operator

__all__ = ["PhaseRetrieval"]


@dataclass(frozen=True, eq=False)
class PhaseRetrieval(Operator):
    """Amplitudes of the zero-padded unitary Fourier transform: (batch, *channels, *grid) -> (..., *padded grid).

    The sum of the squared data is that of the squared values. An amplitude of 0 has a kink; the derivative there is
    taken to be 0, so that gradients are finite everywhere. The frequencies seen depend on the grid: this operator is
    one of arrays, not of functions.

    Args:
        oversample: ratio of the padded size to the size of each axis, rounded up; 2 or more determines an image up to
            the ambiguities above (for almost all images in two dimensions and more).
        dims: how many axes are transformed, the last ones: 1, 2 or 3.
    """

    oversample: float = 2.0
    dims: int = 2

    def __post_init__(self) -> None:
        if not (math.isfinite(self.oversample) and self.oversample >= 1) or self.dims not in (1, 2, 3):
            raise ValueError(
                "PhaseRetrieval: needs a finite oversample of at least 1 and dims 1, 2 or 3, got "
                f"{self.oversample} and {self.dims}."
            )

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim <= self.dims:
            raise ValueError(f"PhaseRetrieval: an event needs {self.dims} axes, got {tuple(x.shape[1:])}.")
        padded = [math.ceil(self.oversample * n) for n in x.shape[-self.dims :]]
        return torch.fft.fftn(x, padded, tuple(range(-self.dims, 0)), norm="ortho").abs()

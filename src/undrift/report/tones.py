"""From the values of data to shades of grey, and the same as plain data beside a model or its samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from undrift.pixels import quantise
from undrift.train import Dataset

__all__ = ["Tones"]


@dataclass(frozen=True, eq=False)
class Tones:
    """How the values of images show.

    Args:
        low, high: values that stand for black and white.
        pixels: the keys transform, bins and alpha of :func:`undrift.pixels.dequantise`, for data made of whole numbers:
            they then show as those numbers, of which 0 is black and bins - 1 is white. None for a linear scale.
    """

    low: float = -1.0
    high: float = 1.0
    pixels: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, data: Dataset) -> Tones:
        """Those of a data set."""
        p = data.pixels
        keys = None if p is None else {"transform": p.transform, "bins": p.bins, "alpha": p.alpha}
        return cls(data.low, data.high, keys)

    @classmethod
    def read(cls, notes: Mapping[str, Any]) -> Tones:
        """Those that were noted; what is not noted is as in [-1, 1]."""
        return cls(float(notes.get("low", -1.0)), float(notes.get("high", 1.0)), notes.get("pixels"))

    @property
    def notes(self) -> dict[str, Any]:
        """Plain data that :meth:`read` reads back."""
        noted = {} if self.pixels is None else {"pixels": dict(self.pixels)}
        return {"low": self.low, "high": self.high, **noted}

    def __call__(self, x: Tensor) -> Tensor:
        """Shades in [0, 1], 0 for black, same shape as x."""
        if self.pixels is None:
            return ((x.float() - self.low) / (self.high - self.low)).clamp(0, 1)
        return quantise(x, **self.pixels).float() / (self.pixels["bins"] - 1)

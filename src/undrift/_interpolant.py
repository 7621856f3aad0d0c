"""Tables of smooth functions of one variable."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

__all__ = ["Interpolant"]


class Interpolant:
    """A smooth function of one variable, tabulated once: Chebyshev points on equal panels, barycentric evaluation.

    An adaptive solver asks for coefficients at one time after another; tabulated, an answer costs microseconds. With 16
    points on panels of 0.25 in log t most processes are met to 1e-12. A singularity close to the end of the range (flow
    matching's at t = 1) needs narrower panels, so the table is checked at their centres, where the error is largest,
    and made four times finer until it holds or rounding in the function itself is what is left.

    Args:
        function: maps points (N,) to values (N, M), float64.
        low, high: the range.
        width: widest panel to begin with.
        points: points a panel, even.
        tol: error allowed, relative to the value, or to 1e-6 of the largest in its column.
    """

    panels: int
    width: float
    values: np.ndarray

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        low: float,
        high: float,
        width: float = 0.25,
        points: int = 16,
        tol: float = 1e-10,
    ) -> None:
        self.low, self.high = low, high
        angle = np.pi * (2 * np.arange(points) - points + 1) / (2 * points)
        self.nodes = np.sin(angle)  # Chebyshev points of the first kind
        self.signs = (-1.0) ** np.arange(points) * np.cos(angle)
        self.panels = max(1, math.ceil((high - low) / width))
        error = self._tabulate(function)
        while error > tol and self.panels < 1024:
            coarse, self.panels = (self.panels, self.width, self.values), 4 * self.panels
            finer = self._tabulate(function)
            if finer > 0.1 * error:
                self.panels, self.width, self.values = coarse
                break
            error = finer

    def _tabulate(self, function: Callable[[Tensor], Tensor]) -> float:
        """Fill the table; the largest relative error at the centres of the panels."""
        self.width = (self.high - self.low) / self.panels
        edges = self.low + self.width * np.arange(self.panels)
        at = np.concatenate([(edges[:, None] + self.width * (self.nodes + 1) / 2).reshape(-1), edges + self.width / 2])
        values, centres = np.split(function(torch.from_numpy(at)).detach().cpu().numpy(), [-self.panels])
        self.values = values.reshape(self.panels, len(self.nodes), -1)
        weight = self.signs / -self.nodes
        miss = np.abs(np.einsum("n,pnm->pm", weight / weight.sum(), self.values) - centres)
        scale = np.abs(centres) + 1e-6 * np.abs(centres).max(0)
        return float((miss / np.where(scale > 0, scale, 1.0)).max())

    def __call__(self, x: float) -> Tensor:
        """Values (M,) at one point; slightly outside the range it extrapolates."""
        panel = min(max(int((x - self.low) / self.width), 0), self.panels - 1)
        gap = 2 * (x - self.low - panel * self.width) / self.width - 1 - self.nodes
        hit = np.abs(gap) < 1e-15
        weight = hit.astype(float) if hit.any() else self.signs / gap
        return torch.from_numpy(weight @ self.values[panel] / weight.sum())

r"""Exact laws of one-dimensional processes: finite volumes, and the exponential of a symmetric matrix.

For :math:`dz = f\,dt + \sqrt{2D}\,dw` with stationary law :math:`\propto e^{-H}` the Fokker-Planck equation is
:math:`\partial_t p = \partial_x \big(D e^{-H} \partial_x (p e^{H})\big)`: neither drift, correction nor simulation
appears. Fluxes between cells keep mass and the stationary law exactly, and
:math:`e^{H/2} A e^{-H/2}` is symmetric and tridiagonal.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import eigh_tridiagonal


class FokkerPlanck:
    """
    Args:
        energy, diffusion: H and D, functions of arrays.
        low, high, cells: the grid, with walls at its ends.
    """

    def __init__(self, energy, diffusion, low: float, high: float, cells: int = 600) -> None:
        edges = np.linspace(low, high, cells + 1)
        self.dx = edges[1] - edges[0]
        self.x = 0.5 * (edges[1:] + edges[:-1])
        h, inner = energy(self.x), edges[1:-1]
        rate = diffusion(inner) / self.dx**2
        side = energy(inner)
        diagonal = np.zeros(cells)
        diagonal[:-1] -= rate * np.exp(h[:-1] - side)
        diagonal[1:] -= rate * np.exp(h[1:] - side)
        self._values, self._vectors = eigh_tridiagonal(diagonal, rate * np.exp(0.5 * (h[:-1] + h[1:]) - side))
        self._root = np.exp(0.5 * (h - h.min()))
        p = np.exp(-(h - h.min()))
        self.stationary = p / (p.sum() * self.dx)

    def density(self, start: np.ndarray, t: float) -> np.ndarray:
        """p_t at the cells' centres, from a density there at time 0."""
        modes = self._vectors.T @ (self._root * start)
        return (self._vectors @ (np.exp(self._values * t) * modes)) / self._root

    def score(self, start: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
        """Centres where p_t exceeds 1e-8 of its maximum, as a mask, and d log p_t / dx everywhere."""
        p = self.density(start, t)
        seen = p > 1e-8 * p.max()
        return seen, np.gradient(np.log(np.maximum(p, 1e-300)), self.dx)

r"""Clocks of modes: noise that reaches the fine scales of a function first.

Everything that a diffusion knows of a mode sits in one noise level. A modal clock gives each mode its own,

.. math:: \tilde c_j = c_j + \sigma_j n_j, \quad n_j \sim N(0, \lambda_j), \qquad
    \sigma_j = \sigma / d_j(\sigma), \quad d_j = (1 - f)\, e^{-\mu_j \tau(\sigma)} + f,

increasing in one number sigma, the level of a mode that is not blurred. That is the same information as a view
:math:`d_j c_j + \sigma n_j` of the function after it has followed the heat equation for a time tau: blurring diffusion
and heat dissipation are such clocks, for every linear process and on any number of channels, since each mode of the
process then runs to the time at which its own level is :math:`\sigma_j`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Blurring", "HeatDissipation", "ModalClock"]


@dataclass(frozen=True)
class ModalClock(ABC):
    """Base of the clocks that blur.

    Args:
        sigma_min, sigma_max: range of the levels sigma.
        width: deviation of the Gaussian that the function is blurred with at sigma_max, in units of the domain.
        floor: f, what blurring leaves of the finest modes: their level is at most sigma / floor.
    """

    sigma_min: float = 0.002
    sigma_max: float = 10.0
    width: float = 0.3
    floor: float = 0.1

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"{name}: needs 0 < sigma_min < sigma_max < inf, got {self.sigma_min} and {self.sigma_max}."
            )
        if not 0 < self.width < math.inf:
            raise ValueError(f"{name}: width must be positive and finite, got {self.width}.")
        if not 0 < self.floor < 1:
            raise ValueError(f"{name}: floor must lie in (0, 1), got {self.floor}; without one a level is unbounded.")

    @abstractmethod
    def _width(self, progress: Tensor) -> Tensor:
        """Width of the blur where progress = log(sigma / sigma_min) / log(sigma_max / sigma_min) in [0, 1]."""

    def levels(self, sigma: Tensor, mu: Tensor) -> Tensor:
        """Levels of modes with eigenvalues mu at level sigma; shapes are broadcast."""
        progress = (sigma / self.sigma_min).log() / math.log(self.sigma_max / self.sigma_min)
        tau = 0.5 * self._width(progress.clamp(0, 1)).square()
        return sigma / ((1 - self.floor) * torch.exp(-mu * tau) + self.floor)

    @property
    def highest(self) -> float:
        """Greatest level of any mode."""
        return self.sigma_max / self.floor


@dataclass(frozen=True)
class Blurring(ModalClock):
    """Blurring diffusion: the width rises as a squared sine.

    References:
        Hoogeboom & Salimans 2023 (arXiv 2209.05557).
    """

    def _width(self, progress: Tensor) -> Tensor:
        return self.width * torch.sin(0.5 * math.pi * progress).square()


@dataclass(frozen=True)
class HeatDissipation(ModalClock):
    """Inverse heat dissipation: widths in geometric progression.

    There the noise is as good as constant and the mean of the image is never forgotten, so a walk starts from blurred
    data. Here sigma rises to sigma_max, and a walk starts from noise.

    Args:
        first: width of the blur at sigma_min.

    References:
        Rissanen et al. 2023 (arXiv 2206.13397).
    """

    first: float = 0.002

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.first < self.width:
            raise ValueError(f"HeatDissipation: first must lie between 0 and width = {self.width:g}, got {self.first}.")

    def _width(self, progress: Tensor) -> Tensor:
        return self.first * (self.width / self.first) ** progress

r"""How wrong a denoiser is, level by level: what the laws and budgets of this package take for a model's error.

In the eigenbasis of Gaussian data, with the exact denoiser D,

.. math:: \hat D_i = D_i + r(\sigma) (D_i - \tilde x_i) + b_i(\sigma) + \epsilon_i(\sigma)\, \xi_i

where r scales the score by 1 + r, b is a bias, and xi fresh standard normal noise at each call: an error as irregular
as a network's, that no other step repeats. The first two keep a plan's law Gaussian because they are affine, the third
because it is Gaussian.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from undrift._linalg import as_f64
from undrift.design.spectrum import Spectrum

__all__ = ["Bias", "ErrorTerms", "Noise", "Relative", "ScoreError"]

Profile = Callable[[Tensor], Tensor] | float
"""A function of noise levels (N,), or one number for all levels."""


def _at(profile: Profile, sigma: Tensor) -> Tensor:
    value = as_f64(profile(sigma) if callable(profile) else profile)
    return value.expand(sigma.shape)


class ErrorTerms(NamedTuple):
    """The error of a denoiser at levels (N,) on eigenvalues (n,): r, b and the variance of the noise, each (N, n)."""

    relative: Tensor
    bias: Tensor
    noise: Tensor


class ScoreError(ABC):
    """Base of all models of a denoiser's error."""

    @abstractmethod
    def terms(self, spectrum: Spectrum, sigma: Tensor) -> ErrorTerms:
        """The error at levels (N,), float64."""

    def excess(self, spectrum: Spectrum, sigma: Tensor) -> Tensor:
        """E|D^ - D|^2 along the exact marginals, summed over coordinates; (N,)."""
        r, b, e = self.terms(spectrum, sigma)
        noise = sigma.square().unsqueeze(-1)
        missed = noise * noise / (spectrum.variance + noise)  # E (D - x~)^2
        return (spectrum._count * (r.square() * missed + b.square() + e)).sum(-1)


def _zeros(spectrum: Spectrum, sigma: Tensor) -> Tensor:
    return torch.zeros(len(sigma), len(spectrum.variance), dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Relative(ScoreError):
    """The score times 1 + r.

    Args:
        r: of sigma, or one number.
    """

    r: Profile

    def terms(self, spectrum: Spectrum, sigma: Tensor) -> ErrorTerms:
        zero = _zeros(spectrum, sigma)
        return ErrorTerms(_at(self.r, sigma).unsqueeze(-1) + zero, zero, zero)


@dataclass(frozen=True, eq=False)
class Bias(ScoreError):
    """A constant added to every coordinate of the prediction.

    Args:
        b: of sigma, or one number, in data units.
    """

    b: Profile

    def terms(self, spectrum: Spectrum, sigma: Tensor) -> ErrorTerms:
        zero = _zeros(spectrum, sigma)
        return ErrorTerms(zero, _at(self.b, sigma).unsqueeze(-1) + zero, zero)


@dataclass(frozen=True, eq=False)
class Noise(ScoreError):
    """Independent noise of a given total square at every call.

    Args:
        e2: E|D^ - D|^2 summed over coordinates, of sigma, or one number: a measured excess loss.
        share: how it falls on the coordinates: "mmse", in proportion to what is uncertain there, or "equal".
    """

    e2: Profile
    share: str = "mmse"

    def __post_init__(self) -> None:
        if self.share not in ("mmse", "equal"):
            raise ValueError(f"Noise: share must be 'mmse' or 'equal', got {self.share!r}.")

    def terms(self, spectrum: Spectrum, sigma: Tensor) -> ErrorTerms:
        zero = _zeros(spectrum, sigma)
        total = _at(self.e2, sigma).clamp(min=0).unsqueeze(-1)
        if self.share == "equal":
            return ErrorTerms(zero, zero, total / spectrum.dim + zero)
        noise = sigma.square().unsqueeze(-1)
        part = spectrum.variance * noise / (spectrum.variance + noise)
        return ErrorTerms(zero, zero, total * part / (spectrum._count * part).sum(-1, keepdim=True))

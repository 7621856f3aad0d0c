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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from undrift._linalg import as_f64
from undrift.denoise.base import Denoiser
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

    def denoiser(self, spectrum: Spectrum, seed: int | torch.Generator = 0) -> Denoiser:
        """The denoiser with this error, for points (batch, *event) of n coordinates in the eigenbasis.

        Args:
            spectrum: the data.
            seed: of the noise, or a generator on the points' device.
        """
        return _Wrong(self, spectrum, seed)


class _Wrong:
    """A denoiser with an error; float64 inside."""

    def __init__(self, error: ScoreError, spectrum: Spectrum, seed: int | torch.Generator) -> None:
        self._error, self._spectrum, self._seed = error, spectrum, seed
        self._exact = spectrum.denoiser()

    def _generator(self, device: torch.device) -> torch.Generator:
        if not isinstance(self._seed, torch.Generator):
            self._seed = torch.Generator(device).manual_seed(self._seed)
        return self._seed

    def __call__(self, x: Tensor, sigma: Tensor, **condition: Any) -> Tensor:
        points = x.double()
        exact = self._exact(points, sigma, **condition)
        level = as_f64(sigma).reshape(-1)
        if len(level) > 1 and bool((level == level[0]).all()):
            level = level[:1]
        terms = self._error.terms(self._spectrum, level)
        r, b, e = (term.to(x.device).reshape(-1, *x.shape[1:]) for term in terms)
        out = exact + r * (exact - points) + b
        if bool((e != 0).any()):
            out = out + e.sqrt() * torch.empty_like(points).normal_(generator=self._generator(x.device))
        return out.to(x.dtype)


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

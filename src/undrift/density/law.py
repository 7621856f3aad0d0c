"""Laws that walkers start from: exact draws and a normalised density on R^d, for any d."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Base", "Normal", "StudentT", "positive"]


class Base(ABC):
    """A law on R^d, for any d, with exact draws and a normalised density; isotropic about the origin."""

    std: float

    @abstractmethod
    def log_prob(self, y: Tensor) -> Tensor:
        """Log density at y (n, d): (n,)."""

    @abstractmethod
    def score(self, y: Tensor) -> Tensor:
        """Its gradient, (n, d)."""

    @abstractmethod
    def sample(self, n: int, dim: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """n draws, (n, dim), on the generator's device."""

    @abstractmethod
    def smoothness(self, dim: int) -> float:
        """Largest curvature of -log density."""


def positive(owner: object, **values: float) -> None:
    """Raise ValueError unless all are positive and finite."""
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{type(owner).__name__}: {name} must be positive, got {value}.")


def _noise(n: int, dim: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.empty(n, dim, dtype=dtype, device=generator.device).normal_(generator=generator)


@dataclass(frozen=True, eq=False)
class Normal(Base):
    """N(0, std^2 I)."""

    std: float = 1.0

    def __post_init__(self) -> None:
        positive(self, std=self.std)

    def log_prob(self, y: Tensor) -> Tensor:
        constant = y.shape[-1] * (math.log(self.std) + 0.5 * math.log(2 * math.pi))
        return y.square().sum(-1) * (-0.5 / self.std**2) - constant

    def score(self, y: Tensor) -> Tensor:
        return y * (-1 / self.std**2)

    def sample(self, n: int, dim: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        return self.std * _noise(n, dim, generator, dtype)

    def smoothness(self, dim: int) -> float:
        return self.std**-2


@dataclass(frozen=True, eq=False)
class StudentT(Base):
    """Multivariate Student t about 0 with scale ``std`` and ``df`` degrees of freedom: for targets of heavy tails."""

    std: float = 1.0
    df: float = 4.0

    def __post_init__(self) -> None:
        positive(self, std=self.std, df=self.df)

    def log_prob(self, y: Tensor) -> Tensor:
        d, nu = y.shape[-1], self.df
        constant = math.lgamma(0.5 * (nu + d)) - math.lgamma(0.5 * nu) - 0.5 * d * math.log(nu * math.pi * self.std**2)
        return constant - 0.5 * (nu + d) * (y.square().sum(-1) / (nu * self.std**2)).log1p()

    def score(self, y: Tensor) -> Tensor:
        d, nu = y.shape[-1], self.df
        return y * (-(nu + d) / (nu * self.std**2 + y.square().sum(-1, keepdim=True)))

    def sample(self, n: int, dim: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        noise = _noise(n, dim, generator, dtype)
        shape = torch.full((n, 1), 0.5 * self.df, dtype=dtype, device=generator.device)
        chi = 2 * torch._standard_gamma(shape, generator=generator)
        return self.std * noise * (self.df / chi).sqrt()

    def smoothness(self, dim: int) -> float:
        return (self.df + dim) / (self.df * self.std**2)

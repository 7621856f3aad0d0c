r"""Which levels of a path are visited, and when walkers are resampled.

Levels are chosen by the conditional effective sample size of the next incremental weights G (Zhou, Johansen & Aston
2016), :math:`n (\sum_i W_i G_i)^2 / \sum_i W_i G_i^2`, a share of n that does not depend on resampling.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from undrift._weights import Scheme, ancestors, effective_sample_size

__all__ = ["AdaptiveLevels", "FixedLevels", "Levels", "Resampling", "conditional_ess"]


def conditional_ess(log_weights: Tensor, increments: Tensor) -> float:
    """CESS as a share in [0, 1], of increments log G (n,) for walkers of log weights (n,)."""
    log_w = log_weights - log_weights.logsumexp(-1)
    first = (log_w + increments).logsumexp(-1)
    second = (log_w + 2 * increments).logsumexp(-1)
    return math.exp(min(0.0, float(2 * first - second))) if math.isfinite(float(second)) else 0.0


class Levels(ABC):
    """How a run gets from u = 0 to u = 1."""

    adaptive: bool

    @abstractmethod
    def following(self, k: int, u: float, cess: Callable[[float], float]) -> float:
        """The level after the k-th, which is u; ``cess(v)`` is that of a jump to v."""


@dataclass(frozen=True, eq=False)
class FixedLevels(Levels):
    """Levels evenly spaced in u, 0 and 1 among them; the path's own spacing says what that means.

    Args:
        count: number of levels; 1 is the target alone.
    """

    count: int = 100

    adaptive = False

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"FixedLevels: count must be at least 1, got {self.count}.")

    def following(self, k: int, u: float, cess: Callable[[float], float]) -> float:
        return 1.0 if k + 2 >= self.count else (k + 1) / (self.count - 1)


@dataclass(frozen=True, eq=False)
class AdaptiveLevels(Levels):
    """Each jump is as long as a given conditional ESS allows.

    Args:
        cess: share of n, in (0, 1); nearer to 1 means more levels.
        most: levels after which the run gives up, with an error.
    """

    cess: float = 0.95
    most: int = 5000

    adaptive = True

    def __post_init__(self) -> None:
        if not 0 < self.cess < 1:
            raise ValueError(f"AdaptiveLevels: cess must lie in (0, 1), got {self.cess}.")
        if self.most < 2:
            raise ValueError(f"AdaptiveLevels: most must be at least 2, got {self.most}.")

    def following(self, k: int, u: float, cess: Callable[[float], float]) -> float:
        if k >= self.most:
            raise FloatingPointError(
                f"{self.most} levels were not enough to get past u = {u:.6g} of 1 at a conditional ESS of {self.cess}: "
                "the base law does not cover the target, or the density is wild; give coordinates (loc, scale), a "
                "wider base, or a lower cess."
            )
        if cess(1.0) >= self.cess:
            return 1.0
        low, high = u, 1.0  # Illinois on 1 - CESS, which grows like the square of the jump
        gap = lambda v: math.sqrt(max(0.0, 1 - cess(v))) - math.sqrt(1 - self.cess)  # noqa: E731
        f_low, f_high = -math.sqrt(1 - self.cess), gap(1.0)
        for _ in range(60):
            v = (low * f_high - high * f_low) / (f_high - f_low)
            if not low < v < high:
                v = 0.5 * (low + high)
            f = gap(v)
            if abs(f) < 0.05 * math.sqrt(1 - self.cess):
                return v
            if f < 0:
                if low == u and f_low < 0:
                    f_high *= 0.5
                low, f_low = v, f
            else:
                high, f_high = v, f
                f_low *= 0.5
            if high - low < 1e-14:
                break
        return max(low, math.nextafter(u, 2.0)) if low > u else high


@dataclass(frozen=True, eq=False)
class Resampling:
    """Resample a repeat's walkers when their effective sample size falls below a share of them.

    Args:
        scheme: "systematic": one uniform number a repeat; "multinomial": independent draws.
        threshold: share in (0, 1]; 1 resamples at every level.
    """

    scheme: Scheme = "systematic"
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.scheme not in ("systematic", "multinomial"):
            raise ValueError(f"Resampling: scheme must be systematic or multinomial, got {self.scheme!r}.")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"Resampling: threshold must lie in (0, 1], got {self.threshold}.")

    def due(self, log_weights: Tensor) -> Tensor:
        """Which repeats (R,) are to be resampled, for log weights (R, m)."""
        return effective_sample_size(log_weights) < self.threshold * log_weights.shape[-1] * (1 - 1e-12)

    def ancestors(self, log_weights: Tensor, generator: torch.Generator) -> Tensor:
        """Index (R, m) of each walker's ancestor within its repeat, of mean count m W."""
        return ancestors(log_weights, generator, self.scheme)

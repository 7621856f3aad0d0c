r"""Distances between two samples: sliced and exact Wasserstein, maximum mean discrepancy, energy distance.

Points are rows; events of any shape are flattened. Everything is computed in float64, every distance is a plain float,
and :func:`jackknife` gives any of them a standard error.

    W2       :math:`\inf_\pi (E_\pi \|x - y\|^2)^{1/2}`
    sliced   :math:`(E_u W_2^2(u \cdot x, u \cdot y))^{1/2}`, u uniform on the sphere
    MMD^2    :math:`E k(x, x') + E k(y, y') - 2 E k(x, y)`, with :math:`k = e^{-\|x - y\|^2 / 2 h^2}`
    energy   :math:`2 E\|x - y\| - E\|x - x'\| - E\|y - y'\|`

References:
    Bonneel et al., Sliced and Radon Wasserstein Barycenters of Measures, 2015.
    Gretton et al., A Kernel Two-Sample Test, 2012, lemma 6.
    Székely & Rizzo, Energy Statistics: A Class of Statistics Based on Distances, 2013.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Estimate", "energy_distance", "jackknife", "mmd", "sliced_wasserstein", "wasserstein"]

_CHUNK = 2048  # rows of a block of pairwise distances
_MEDIAN_POINTS = 2000  # points whose pairs give the median bandwidth
_ASSIGNMENT_LIMIT = 5000  # points an exact assignment accepts: 200 MB and about a minute


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error."""

    value: float
    std_error: float

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.value:.5g} ± {self.std_error:.2g}"


def _pair(name: str, x: Tensor, y: Tensor, least: int = 1) -> tuple[Tensor, Tensor]:
    for label, points in (("x", x), ("y", y)):
        if points.ndim < 2 or points.shape[0] < least:
            raise ValueError(
                f"{name}: {label} must have shape (n, *event) with n >= {least}, got {tuple(points.shape)}; "
                "a sample of numbers is (n, 1)."
            )
        if not bool(torch.isfinite(points).all()):
            rows = int((~torch.isfinite(points.flatten(1)).all(1)).sum())
            raise ValueError(f"{name}: {label} has {rows} points of {points.shape[0]} that are not finite.")
    x, y = x.detach().flatten(1).double(), y.detach().flatten(1).double()
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{name}: points must have as many coordinates, got {x.shape[1]} in x and {y.shape[1]} in y.")
    return x, y


def _euclidean(x: Tensor, y: Tensor) -> Tensor:
    # Differences, not |x|^2 - 2 x.y + |y|^2: near points must not be lost to cancellation.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = 256, seed: int | torch.Generator = 0) -> float:
    """Sliced W2 between two samples, of any two sizes.

    Args:
        x, y: (n, *event) and (m, *event).
        projections: random directions; more lower the spread over seeds.
        seed: an integer or a generator, for the directions.
    """
    x, y = _pair("sliced_wasserstein", x, y)
    if projections < 1:
        raise ValueError(f"sliced_wasserstein: projections must be at least 1, got {projections}.")
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator(x.device).manual_seed(seed)
    directions = torch.empty(x.shape[1], projections, dtype=x.dtype, device=x.device).normal_(generator=generator)
    directions = directions / directions.norm(dim=0)
    a, b = (x @ directions).sort(0).values, (y @ directions).sort(0).values
    n, m = len(a), len(b)
    if n == m:
        return float((a - b).square().mean().sqrt())
    # Quantile functions are steps: between the levels i/n and j/m, merged, both are constant.
    whole = math.lcm(n, m)
    levels = torch.cat([torch.arange(n + 1) * (whole // n), torch.arange(m + 1) * (whole // m)]).unique()
    widths, left = levels.diff(), levels[:-1]
    gap = (a[left * n // whole] - b[left * m // whole]).square().mean(1)
    return math.sqrt(float(gap @ widths.to(gap)) / whole)


def wasserstein(x: Tensor, y: Tensor) -> float:
    """Exact W2 between two samples of one size, by optimal assignment.

    Args:
        x, y: (n, *event), n at most 5000: the time grows like n^3.
    """
    x, y = _pair("wasserstein", x, y)
    if len(x) != len(y):
        raise ValueError(
            f"wasserstein: an assignment needs samples of one size, got {len(x)} and {len(y)}; draw equally many, "
            "or use sliced_wasserstein."
        )
    if len(x) > _ASSIGNMENT_LIMIT:
        raise ValueError(
            f"wasserstein: {len(x)} points are too many for an exact assignment (at most {_ASSIGNMENT_LIMIT}); "
            "take a part of them, or use sliced_wasserstein."
        )
    cost = _euclidean(x, y).square().cpu().numpy()
    from scipy.optimize import linear_sum_assignment  # a second to import, for one function

    rows, columns = linear_sum_assignment(cost)
    return math.sqrt(cost[rows, columns].mean())


def _mean_over_pairs(f: Callable[[Tensor], Tensor], x: Tensor, y: Tensor | None, unbiased: bool) -> float:
    """Mean of f(distance) over pairs from x and y; if y is None within x, without a point and itself if unbiased."""
    other = x if y is None else y
    total = sum(float(f(_euclidean(part, other)).sum()) for part in x.split(_CHUNK))
    n = len(x)
    if y is None and unbiased:
        return (total - n * float(f(x.new_zeros(1)))) / (n * (n - 1))
    return total / (n * len(other))


def mmd(x: Tensor, y: Tensor, bandwidth: float | Literal["median"] = "median", unbiased: bool = True) -> float:
    """Squared maximum mean discrepancy with a Gaussian kernel.

    Args:
        x, y: (n, *event) and (m, *event).
        bandwidth: h, in the units of the data; "median" is the median distance within the pooled sample (of 2000 points
            spread evenly over it). To compare several models, take the number from one of them.
        unbiased: the U-statistic, of mean 0 between samples of one law, so at times negative; else the V-statistic,
            never negative.
    """
    x, y = _pair("mmd", x, y, least=2)
    if bandwidth == "median":
        pool = torch.cat([x, y])
        few = pool[torch.linspace(0, len(pool) - 1, min(len(pool), _MEDIAN_POINTS), device=x.device).long()]
        distances = _euclidean(few, few)
        h = float(distances[torch.ones_like(distances).triu(1).bool()].median())
        if h == 0:
            raise ValueError(
                "mmd: more than half of the pairs coincide, so the median distance is 0; give a bandwidth."
            )
    elif isinstance(bandwidth, str) or not (math.isfinite(bandwidth) and bandwidth > 0):
        raise ValueError(f"mmd: bandwidth must be 'median' or a positive number, got {bandwidth!r}.")
    else:
        h = float(bandwidth)

    def kernel(distance: Tensor) -> Tensor:
        return torch.exp(-0.5 * (distance / h).square())

    within = _mean_over_pairs(kernel, x, None, unbiased) + _mean_over_pairs(kernel, y, None, unbiased)
    return within - 2 * _mean_over_pairs(kernel, x, y, unbiased)


def energy_distance(x: Tensor, y: Tensor, unbiased: bool = True) -> float:
    """Energy distance (the squared one): 0 exactly if the laws agree, with no bandwidth to choose.

    Args:
        x, y: (n, *event) and (m, *event).
        unbiased: the U-statistic, at times negative; else the V-statistic, that of the two empirical laws.
    """
    x, y = _pair("energy_distance", x, y, least=2)

    def distance(d: Tensor) -> Tensor:
        return d

    within = _mean_over_pairs(distance, x, None, unbiased) + _mean_over_pairs(distance, y, None, unbiased)
    return 2 * _mean_over_pairs(distance, x, y, unbiased) - within


def jackknife(
    distance: Callable[..., float],
    x: Tensor,
    y: Tensor,
    groups: int = 10,
    seed: int | torch.Generator = 0,
    **options: Any,
) -> Estimate:
    r"""A distance with the standard error that its two samples give it, by the delete-a-group jackknife.

    The points are shuffled and cut into g groups, and the distance computed g times without one group of each sample:
    :math:`SE^2 = \frac{g - 1}{g} \sum_i (d_i - \bar d)^2`.

    Args:
        distance: any function (x, y, **options) -> float.
        x, y: (n, *event) and (m, *event), each with at least two points a group.
        groups: g, at least 2.
        seed: an integer or a generator, for the shuffle.
        options: handed to ``distance``.
    """
    if groups < 2:
        raise ValueError(f"jackknife: groups must be at least 2, got {groups}.")
    if min(len(x), len(y)) < 2 * groups:
        raise ValueError(f"jackknife: {groups} groups need {2 * groups} points, got {len(x)} and {len(y)}.")
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(s), generator=generator, device=generator.device).to(s.device) for s in (x, y)]
    values = []
    for i in range(groups):
        kept = [
            s[order[torch.arange(len(order), device=s.device) % groups != i]]
            for s, order in zip((x, y), orders, strict=True)
        ]
        values.append(float(distance(*kept, **options)))
    spread = torch.tensor(values, dtype=torch.float64).var(correction=0)
    return Estimate(float(distance(x, y, **options)), math.sqrt((groups - 1) * float(spread)))

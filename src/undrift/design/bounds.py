r"""Bounds on the three terms of the path KL that need less than the data's whole mmse curve.

Wang, He & Tao (2024) bound the error of the held score on the variance-exploding process by a sum of three terms, of
the start, the discretisation and the score. The bounds here are on the same three terms, and their forms, constants,
extension to held predictions and to any linear process, and proofs are our own. Notation of :mod:`undrift.design.path`.

**Start.** Information is not negative, so :math:`E_I \le E_{x_0} KL(p(z_T|x_0) \| prior)`, on the variance-exploding
process :math:`m_2^2 / 2 \sigma_T^2`.

**Discretisation.** mmse does not decrease in sigma, so the integral over a step is at least
:math:`(snr_{k+1} - snr_k)\,mmse_{k+1}`, and from the identity

.. math:: E_{D,k} \le \tfrac12 \bigl[d\,(h_k - n_k) + a_k\,mmse_k - (snr_{k+1} - snr_k)\,mmse_{k+1}\bigr].

Further :math:`a_k \le snr_{k+1} - snr_k`: both are :math:`b^\top C^{-1} b` with the same b, what the step makes of an
error of the prediction, and C the step's noise, the posterior's in the one case and the larger one of the forward
transition in the other. With :math:`A_k = \max_{j \le k} a_j` and :math:`A_{-1} = 0`, summation by parts over
:math:`a_k (mmse_k - mmse_{k+1})`, and :math:`mmse_k \le M_k = \min(d \sigma_k^2, m_2^2)`,

.. math:: E_D \le \tfrac12 \Bigl[d \sum_k (h_k - n_k) + \sum_k (A_k - A_{k-1}) M_k\Bigr].

For the held score on the variance-exploding process, with :math:`r_k = \sigma_k^2 / \sigma_{k+1}^2`, the first sum is
:math:`\sum \ln r_k - 1 + 1/r_k` and :math:`a_k = (1 - 1/r_k) / \sigma_k^2`.

**Score.** By Hölder's inequality, for any positive training weights w at the sampler's levels,

.. math:: E_S = \tfrac12 \sum_k a_k e_k^2 \le \max_k \frac{a_k}{w_k} \cdot \tfrac12 \sum_k w_k e_k^2 .

**Worst case.** Where the data's variance is negligible, :math:`J = d/v` and a held score costs
:math:`\frac d2 \sum (\ln r_k - 1 + 1/r_k)`. The summand is convex in :math:`\ln r_k`, so equal ratios are optimal, and
as it is at most :math:`\frac12 \ln^2 r_k` they cost at most :math:`d \ln^2 R / N` over N steps with
:math:`R = \sigma_{max} / \sigma_{min}`. A smooth grid of many steps costs :math:`\frac{d}{N} \int_0^1 (d \ln\sigma /
du)^2 du`, which for :math:`\sigma^{1/\rho}` linear in u is :math:`(\sinh x / x)^2` times as much, :math:`x = \ln R /
2 \rho`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from undrift.design.curves import DataModel
from undrift.design.path import PathSteps, start_kl
from undrift.process.linear import LinearProcess

__all__ = [
    "PathBounds",
    "exponential_worst_case",
    "mmse_bound",
    "moment_bound",
    "path_bounds",
    "rho_factor",
    "score_bound",
]


def mmse_bound(steps: PathSteps, data: DataModel) -> Tensor:
    """Bound on E_D of each step from mmse at the grid's levels alone, (M,), nats."""
    mmse, snr = data.mmse(steps.sigma), steps.sigma.square().reciprocal()
    known = steps.weight * mmse[:-1] - snr.diff() * mmse[1:]
    return 0.5 * (data.dim * (steps.gathered - steps.spent) + known)


def moment_bound(steps: PathSteps, dim: float, second_moment: float) -> Tensor:
    """Bound on the sum of E_D for all data of so many coordinates and that E|x0|^2, nats."""
    growth = torch.cummax(steps.weight, 0).values.diff(prepend=torch.zeros(1, dtype=torch.float64))
    most = (dim * steps.sigma[:-1].square()).clamp(max=second_moment)
    return 0.5 * (dim * (steps.gathered - steps.spent).sum() + (growth * most).sum())


def score_bound(steps: PathSteps, training_weight: Tensor, excess: Tensor) -> Tensor:
    """Bound on the sum of E_S by the weighted excess loss that training sees, nats.

    Args:
        steps: of the sampler.
        training_weight: w of the squared error of x0, at the start of each step, (M,), positive.
        excess: E|D^ - D|^2 there, (M,).

    Raises:
        ValueError: if a weight is not positive.
    """
    if training_weight.shape != steps.weight.shape or not bool((training_weight > 0).all()):
        raise ValueError(
            f"score_bound: needs a positive weight for each of {len(steps.weight)} steps, got "
            f"{training_weight.tolist()}."
        )
    return (steps.weight / training_weight).max() * 0.5 * (training_weight * excess).sum()


def exponential_worst_case(dim: float, ratio: float, steps: int) -> float:
    """d ln^2 R / N: what the best grid costs a held score on data of negligible variance, for many steps; a bound."""
    return dim * math.log(ratio) ** 2 / steps


def rho_factor(rho: float, ratio: float) -> float:
    """How much more a grid with sigma^(1/rho) linear costs there than the best one, at many steps.

    Args:
        rho: exponent of the grid (Karras et al. 2022, eq. 5).
        ratio: sigma_max / sigma_min.
    """
    x = math.log(ratio) / (2 * rho)
    return (math.sinh(x) / x) ** 2


@dataclass(frozen=True)
class PathBounds:
    """Bounds beside a path KL, nats.

    Attributes:
        start: on E_I, from the second moment.
        mmse: on E_D, from mmse at the grid's levels.
        moments: on E_D, from d and the second moment.
    """

    start: float
    mmse: float
    moments: float


def path_bounds(process: LinearProcess, steps: PathSteps, data: DataModel) -> PathBounds:
    """The bounds of a sampler's path on any data."""
    return PathBounds(
        float(start_kl(process, steps.times[0], data, known=False)),
        float(mmse_bound(steps, data).sum()),
        float(moment_bound(steps, data.dim, data.second_moment)),
    )

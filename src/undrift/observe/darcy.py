r"""Stationary flow through a porous medium: the pressure as a function of the log-permeability u.

.. math:: -\nabla \cdot (e^u \nabla p) = f

In one dimension, with :math:`f = 0, p(0) = 0, p(1) = 1`, the flux :math:`e^u p'` is constant and the solution closed:
:math:`p(x) = \int_0^x e^{-u} / \int_0^1 e^{-u}`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from undrift.observe.base import Operator
from undrift.observe.points import places

__all__ = ["Darcy1d"]


@dataclass(frozen=True, eq=False)
class Darcy1d(Operator):
    r"""Pressure in one dimension, :math:`-(e^u p')' = 0, p(0) = 0, p(1) = 1`: (batch, *channels, n) -> (..., places).

    The value :math:`u_l` holds on cell l, from l/n to (l + 1)/n. For such a field the solution is exactly

    .. math:: p\big(\tfrac{i + 1}{n}\big) = \sum_{l \le i} w_l, \qquad w = \operatorname{softmax}(-u),

    and linear between these interfaces, which is where it is read: p at one place is the same functional of u on every
    grid, up to the second-order error of the midpoint rule. The derivative is closed as well,

    .. math:: \frac{\partial}{\partial u_m} \sum_i r_i p_i = -w_m \Big(\sum_{i \ge m} r_i - \sum_i r_i p_i\Big).

    Args:
        locations: where the pressure is observed, in [0, 1]; None for all n interfaces, of which the last reads 1.
    """

    locations: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.locations is not None:
            table = places(self.locations, "Darcy1d")
            if len(table[0]) != 1:
                raise ValueError(f"Darcy1d: locations are single numbers in [0, 1], got {self.locations}.")
            object.__setattr__(self, "locations", tuple(s[0] for s in table))

    @property
    def data_shape(self) -> tuple[int, ...] | None:
        return None if self.locations is None else (len(self.locations),)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(-x, -1)
        if self.locations is None:
            return weights.cumsum(-1)
        return weights @ _covered(self.locations, x.shape[-1]).to(x).T

    def vjp(self, x: Tensor, cotangent: Tensor) -> Tensor:
        with torch.no_grad():
            weights = torch.softmax(-x, -1)
            if self.locations is None:
                above = cotangent.flip(-1).cumsum(-1).flip(-1)
            else:
                above = cotangent @ _covered(self.locations, x.shape[-1]).to(x)
            return -weights * (above - (weights * above).sum(-1, keepdim=True))


@functools.lru_cache(maxsize=64)
def _covered(locations: Sequence[float], n: int) -> Tensor:
    """The fraction of each of n cells that lies to the left of a location, (places, n), float64."""
    s = torch.tensor(locations, dtype=torch.float64)
    return (s[:, None] * n - torch.arange(n, dtype=torch.float64)).clamp(0, 1)

r"""Stationary flow through a porous medium: the pressure as a function of the log-permeability u.

.. math:: -\nabla \cdot (e^u \nabla p) = f

In one dimension, with :math:`f = 0, p(0) = 0, p(1) = 1`, the flux :math:`e^u p'` is constant and the solution closed:
:math:`p(x) = \int_0^x e^{-u} / \int_0^1 e^{-u}`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from undrift.observe import _elliptic
from undrift.observe.base import Operator
from undrift.observe.points import Points, places
from undrift.space.basis import Cosine

__all__ = ["Darcy1d", "Darcy2d"]

_LOST = 1e-3  # share of what is produced that may be missing from what flows out: about the solution's relative error


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
        _check_axes(x, 1, "Darcy1d")
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


def _check_axes(x: Tensor, dims: int, owner: str) -> None:
    if x.ndim <= dims:
        raise ValueError(f"{owner}: an event needs {dims} {'axis' if dims == 1 else 'axes'}, got {tuple(x.shape[1:])}.")


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept may serve training later
def _covered(locations: Sequence[float], n: int) -> Tensor:
    """The fraction of each of n cells that lies to the left of a location, (places, n), float64."""
    s = torch.tensor(locations, dtype=torch.float64)
    return (s[:, None] * n - torch.arange(n, dtype=torch.float64)).clamp(0, 1)


@dataclass(frozen=True, eq=False)
class Darcy2d(Operator):
    r"""Pressure on the unit square, p = 0 on the boundary: (batch, *channels, n1, n2) -> (..., places).

    Finite volumes on the cells of the field's own grid, with harmonic means of :math:`e^u` on the faces and half a cell
    to the boundary; second order for smooth u. Solved directly in float64 on the CPU, one sparse factorisation a field,
    which serves derivatives as well: a gradient costs one more pair of triangular solves.

    Args:
        locations: where the pressure is observed, pairs of coordinates in [0, 1], by linear interpolation as in
            :class:`~undrift.observe.Points`; None for the pressure of all cells, (..., n1, n2).
        forcing: f, one number, or a function of places (n1, n2, 2), float64, to values (n1, n2).
    """

    locations: tuple[tuple[float, float], ...] | None = None
    forcing: float | Callable[[Tensor], Tensor] = 1.0

    def __post_init__(self) -> None:
        if self.locations is not None:
            table = places(self.locations, "Darcy2d")
            if len(table[0]) != 2:
                raise ValueError(f"Darcy2d: locations are pairs of coordinates in [0, 1], got {self.locations}.")
            object.__setattr__(self, "locations", table)

    @property
    def data_shape(self) -> tuple[int, ...] | None:
        return None if self.locations is None else (len(self.locations),)

    def forward(self, x: Tensor) -> Tensor:
        _check_axes(x, 2, "Darcy2d")
        p = self.pressure(x)
        return p if self.locations is None else Points(self.locations)(p)

    def pressure(self, u: Tensor) -> Tensor:
        """The pressure in all cells, same shape and dtype as u (..., n1, n2), differentiable in u.

        Raises:
            ValueError: if the permeability of a face is 0 or infinite in float64, or u is not a number, or contrasts
                are such that the flow's balance is off by a thousandth.
        """
        grid = u.shape[-2:]
        fields = u.double().reshape(-1, *grid)
        t1, t2 = _elliptic.harmonic(fields)
        for t in (t1, t2):
            bad = ~(torch.isfinite(t) & (t > 0)).flatten(1).all(1)
            if bool(bad.any()):
                k = int(bad.nonzero()[0])
                worst = fields[k].detach()
                raise ValueError(
                    f"Darcy2d: permeabilities must be positive and finite, but field {k} of {len(fields)} has u from "
                    f"{float(worst.min()):.4g} to {float(worst.max()):.4g}; take smaller steps, "
                    "or a prior of smaller variance."
                )
        points = Cosine(2).points(grid)
        f = self.forcing(points) if callable(self.forcing) else torch.full(grid, self.forcing, dtype=torch.float64)
        rates = (f.to(fields) / (grid[0] * grid[1])).expand(fields.shape)
        p = _elliptic.solve(t1, t2, rates)
        self._check_balance(fields.detach(), t1.detach(), t2.detach(), p.detach(), rates)
        return p.to(u.dtype).reshape(u.shape)

    @staticmethod
    def _check_balance(fields: Tensor, t1: Tensor, t2: Tensor, p: Tensor, rates: Tensor) -> None:
        """What is produced must flow out; what is walled in by many orders of magnitude gets lost in rounding."""
        sides = (t1[:, 0] * p[:, 0], t1[:, -1] * p[:, -1], t2[..., 0] * p[..., 0], t2[..., -1] * p[..., -1])
        lost = (rates.flatten(1).sum(1) - sum(side.sum(1) for side in sides)).abs()
        bad = ~(lost <= _LOST * rates.abs().flatten(1).sum(1))
        if bool(bad.any()):
            k = int(bad.nonzero()[0])
            raise ValueError(
                f"Darcy2d: field {k} of {len(fields)}, with u from {float(fields[k].min()):.4g} to "
                f"{float(fields[k].max()):.4g}, walls cells in so tightly that float64 cannot solve for their "
                "pressure; take smaller steps, or a prior of smaller variance."
            )

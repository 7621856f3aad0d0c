r"""Parallel-beam tomography of a function on the unit square.

.. math:: (A u)(\theta, s) = \int u\big(c + s\, n_\theta + t\, n_\theta^\perp\big)\, dt, \qquad
    n_\theta = (\cos\theta, \sin\theta), \quad n_\theta^\perp = (-\sin\theta, \cos\theta), \quad c = (1/2, 1/2)

The first coordinate runs along the first of the two axes. A beam is integrated over its chord of the square by the
midpoint rule, with u interpolated linearly along each axis as in :class:`~undrift.observe.Points`; both errors are
second order in the cell size for smooth u, so the integrals are those of the function whatever the grid.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from undrift.observe.base import LinearOperator

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

__all__ = ["Radon"]


@dataclass(frozen=True, eq=False)
class Radon(LinearOperator):
    """Line integrals of functions on the unit square: (batch, *channels, n1, n2) -> (..., angles, detectors).

    The sparse matrix of a grid is made when a function on it is first seen, and kept.

    Args:
        angles: directions theta of the beams' normals in radians, or how many to spread evenly over [0, pi).
        detectors: how many offsets s, the midpoints of equal parts of [-sqrt(1/2), sqrt(1/2)]: they cover the square
            from every side.
    """

    angles: int | tuple[float, ...]
    detectors: int

    def __post_init__(self) -> None:
        if not isinstance(self.angles, int):
            object.__setattr__(self, "angles", tuple(float(a) for a in self.angles))
        if len(self._theta) == 0 or not all(map(math.isfinite, self._theta)) or self.detectors < 1:
            raise ValueError(
                f"Radon: needs at least one finite angle and one detector, got angles {self.angles} and "
                f"{self.detectors} detectors."
            )

    @property
    def _theta(self) -> tuple[float, ...]:
        if isinstance(self.angles, int):
            return tuple(math.pi * k / self.angles for k in range(self.angles))
        return self.angles

    @property
    def data_shape(self) -> tuple[int, ...]:
        return (len(self._theta), self.detectors)

    @property
    def offsets(self) -> Tensor:
        """Offsets s of the beams from the centre, (detectors,), float64."""
        return math.sqrt(2) * ((torch.arange(self.detectors, dtype=torch.float64) + 0.5) / self.detectors - 0.5)

    def _matrix(self, event: Sequence[int], like: Tensor, transposed: bool) -> Tensor:
        if len(event) < 2:
            raise ValueError(f"Radon: an event ends in the two axes of its grid, got {tuple(event)}.")
        return _torch_beams(self._theta, self.detectors, event[-2], event[-1], transposed, like.dtype, like.device)

    def forward(self, x: Tensor) -> Tensor:
        matrix = self._matrix(x.shape[1:], x, False)
        return torch.sparse.mm(matrix, x.reshape(-1, matrix.shape[1]).T).T.reshape(*x.shape[:-2], *self.data_shape)

    def adjoint(self, y: Tensor, event: Sequence[int]) -> Tensor:
        columns = y.reshape(-1, math.prod(self.data_shape)).T
        return torch.sparse.mm(self._matrix(event, y, True), columns).T.reshape(-1, *event)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept may serve training later
def _torch_beams(
    theta: tuple[float, ...],
    detectors: int,
    n1: int,
    n2: int,
    transposed: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    matrix = _beams(theta, detectors, n1, n2)
    coo = (matrix.T.tocsr() if transposed else matrix).tocoo()  # by way of csr: rows in order
    index = torch.from_numpy(np.stack([coo.row, coo.col]).astype(np.int64))
    # In order and without repetition by construction: marked so, that no product has to sort again.
    return torch.sparse_coo_tensor(
        index, torch.from_numpy(coo.data).to(dtype), coo.shape, check_invariants=True, is_coalesced=True
    ).to(device)


@functools.lru_cache(maxsize=4)
def _beams(theta: tuple[float, ...], detectors: int, n1: int, n2: int) -> csr_matrix:
    """The matrix (angles * detectors, n1 * n2), made an angle at a time to bound the memory."""
    s = math.sqrt(2) * ((np.arange(detectors) + 0.5) / detectors - 0.5)
    parts = 2 * max(n1, n2)  # of a chord; each at most 0.71 cells long
    from scipy.sparse import vstack

    return vstack([_one_angle(angle, s, parts, n1, n2) for angle in theta], format="csr")


def _one_angle(angle: float, s: np.ndarray, parts: int, n1: int, n2: int) -> csr_matrix:
    normal = np.array([math.cos(angle), math.sin(angle)])
    along = np.array([-normal[1], normal[0]])
    foot = 0.5 + s[:, None] * normal  # (detectors, 2)
    start, stop = np.full(len(s), -np.inf), np.full(len(s), np.inf)
    for axis in (0, 1):
        if abs(along[axis]) < 1e-12:
            outside = (foot[:, axis] < 0) | (foot[:, axis] > 1)
            start[outside], stop[outside] = 0.0, 0.0
        else:
            ends = np.stack([-foot[:, axis] / along[axis], (1 - foot[:, axis]) / along[axis]])
            start, stop = np.maximum(start, ends.min(0)), np.minimum(stop, ends.max(0))
    length = np.maximum(stop - start, 0.0)
    t = start[:, None] + length[:, None] * (np.arange(parts) + 0.5) / parts
    rows, columns, weights = [], [], []
    corners = []
    for axis, n in enumerate((n1, n2)):
        place = (foot[:, axis, None] + t * along[axis]) * n - 0.5
        left = np.clip(np.floor(place), 0, max(n - 2, 0)).astype(np.int64)
        right = place - left if n > 1 else np.zeros_like(place)
        corners.append(((left, 1 - right), (np.minimum(left + 1, n - 1), right)))
    row = np.broadcast_to(np.arange(len(s))[:, None], t.shape)
    for i, w1 in corners[0]:
        for j, w2 in corners[1]:
            rows.append(row.ravel())
            columns.append((i * n2 + j).ravel())
            weights.append((w1 * w2 * (length[:, None] / parts)).ravel())
    from scipy.sparse import csr_matrix

    triple = (np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns)))
    matrix = csr_matrix(triple, shape=(len(s), n1 * n2))
    matrix.eliminate_zeros()
    return matrix

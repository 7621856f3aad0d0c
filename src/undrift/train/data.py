r"""Data sets: points in memory, and how to turn them back into pixels.

A :class:`DataSource` is a description (it can stand in a configuration file); :meth:`DataSource.load` reads it into a
:class:`Dataset`, a tensor in memory. The sources stand in :mod:`undrift.train.sources`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from undrift.observe import Noise, Operator
from undrift.pixels import PixelTransform, dequantise
from undrift.space import Basis

__all__ = ["DataSource", "Dataset", "Grids", "Measured", "Pixels"]


@dataclass(frozen=True, eq=False)
class Pixels:
    """Whole numbers behind a continuous data set.

    Args:
        values: (N, *event), in 0 ... bins - 1.
        transform, bins, alpha: see :func:`undrift.pixels.dequantise`.
    """

    values: Tensor
    transform: PixelTransform = "center"
    bins: int = 256
    alpha: float = 0.05

    def draw(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Dequantised points (len(index), *event) and the log Jacobian of their transform, in float64."""
        values = self.values[index]
        noise = torch.empty(values.shape, dtype=torch.float64, device=values.device).uniform_(generator=generator)
        return dequantise(values, self.transform, bins=self.bins, alpha=self.alpha, noise=noise)


@dataclass(frozen=True, eq=False)
class Measured:
    """Observations that are made afresh whenever a point is drawn: with new noise at every step of training.

    Args:
        operator: what an experiment sees of a point.
        noise: law of the data around that.
    """

    operator: Operator
    noise: Noise

    def draw(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Data (batch, *data) of points x (batch, *event)."""
        with torch.no_grad():
            return self.noise.sample(self.operator(x), generator)


@dataclass(frozen=True, eq=False)
class Grids:
    """Fields that are drawn on one of several grids, another for each batch.

    Args:
        basis: in which they are resampled; modes that a coarser grid has not are left out, a finer one adds none.
        grids: the grids, equally often; one number a grid in one dimension.

    Raises:
        ValueError: if there are none, or they are not of the basis's dimension.
    """

    basis: Basis
    grids: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        grids = tuple(tuple(int(n) for n in ([g] if isinstance(g, int) else g)) for g in self.grids)
        if not grids or any(len(g) != self.basis.dims or min(g) < 1 for g in grids):
            raise ValueError(f"Grids: needs grids of {self.basis.dims} positive sizes each, got {self.grids}.")
        object.__setattr__(self, "grids", grids)

    def draw(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The fields x (batch, *channels, *grid) on a grid of this batch."""
        place = torch.randint(len(self.grids), (), generator=generator, device=generator.device)
        return self.basis.resample(x, self.grids[int(place)])


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training points in memory.

    Args:
        name: what it is called in reports and checkpoints.
        x: points (N, *event), floating.
        labels: class of each point (N,), whole numbers from 0, or None.
        low, high: values that stand for black and white; used by :meth:`to_uint8` only.
        pixels: whole numbers (N, *event) that the points are dequantised from, afresh whenever they are drawn; ``x``
            then shows the centres of their bins.
        observed: what is seen of each point, for models of x given data: (N, *data), or :class:`Measured` for data that
            are simulated at every draw; None without.
        grids: the grids on which fields are drawn, if not their own.

    Raises:
        ValueError: for an empty set, for values that are not finite, or for labels or observations that do not fit.
    """

    name: str
    x: Tensor
    labels: Tensor | None = None
    low: float = -1.0
    high: float = 1.0
    pixels: Pixels | None = None
    observed: Tensor | Measured | None = None
    grids: Grids | None = None

    def __post_init__(self) -> None:
        if self.x.ndim < 1 or self.x.shape[0] == 0 or not self.x.is_floating_point():
            raise ValueError(
                f"{self.name}: x must be floating (N, *event), N > 0, got {self.x.dtype} {tuple(self.x.shape)}."
            )
        finite = self.x.reshape(self.x.shape[0], -1).isfinite().all(1)
        if not bool(finite.all()):
            bad = (~finite).nonzero().flatten()
            raise ValueError(
                f"{self.name}: {len(bad)} of {len(finite)} points hold NaN or Inf, the first at index {int(bad[0])}; "
                "clean the data before training."
            )
        if self.labels is not None:
            if self.labels.shape != self.x.shape[:1] or self.labels.is_floating_point():
                raise ValueError(
                    f"{self.name}: labels must be whole numbers ({self.x.shape[0]},), "
                    f"got {self.labels.dtype} {tuple(self.labels.shape)}."
                )
            if int(self.labels.min()) < 0:
                raise ValueError(f"{self.name}: labels must not be negative, got {int(self.labels.min())}.")
        if isinstance(self.observed, Tensor):
            if self.observed.shape[:1] != self.x.shape[:1] or not self.observed.is_floating_point():
                raise ValueError(
                    f"{self.name}: observed must be floating ({self.x.shape[0]}, *data), one for each point, got "
                    f"{self.observed.dtype} {tuple(self.observed.shape)}."
                )
            if not bool(self.observed.isfinite().all()):
                raise ValueError(f"{self.name}: observed must be finite; leave out points whose data are missing.")

    def __len__(self) -> int:
        return self.x.shape[0]

    @property
    def event(self) -> tuple[int, ...]:
        """Shape of one point."""
        return tuple(self.x.shape[1:])

    @property
    def classes(self) -> int | None:
        """Number of classes, or None without labels."""
        return None if self.labels is None else int(self.labels.max()) + 1

    @property
    def std(self) -> float:
        """Root mean square deviation of a coordinate from the mean point: EDM's sigma_data."""
        return float((self.x.double() - self.x.double().mean(0)).square().mean().sqrt())

    def to(self, device: torch.device) -> Dataset:
        """The same data on a device."""
        pixels = self.pixels and dataclasses.replace(self.pixels, values=self.pixels.values.to(device))
        labels = None if self.labels is None else self.labels.to(device)
        observed = self.observed.to(device) if isinstance(self.observed, Tensor) else self.observed
        return dataclasses.replace(self, x=self.x.to(device), labels=labels, pixels=pixels, observed=observed)

    def draw(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """Points (len(index), *event) as training sees them: with fresh dequantisation noise if they are pixels, and
        on a grid of the batch's own if there are several."""
        x = self.x[index] if self.pixels is None else self.pixels.draw(index, generator)[0].to(self.x)
        return x if self.grids is None else self.grids.draw(x, generator)

    def observe(self, index: Tensor, x: Tensor, generator: torch.Generator) -> Tensor | None:
        """What is seen of the points x that :meth:`draw` gave for these indices, (len(index), *data), or None."""
        if isinstance(self.observed, Measured):
            return self.observed.draw(x, generator)
        return None if self.observed is None else self.observed[index]

    def to_uint8(self, x: Tensor) -> Tensor:
        """Points of this set's range as bytes, 0 for ``low`` and 255 for ``high``; values outside are clipped."""
        return ((x - self.low) * (255 / (self.high - self.low))).round().clamp(0, 255).to(torch.uint8)


class DataSource(ABC):
    """Base of all data sources."""

    @abstractmethod
    def load(self) -> Dataset:
        """Read the data.

        Raises:
            FileNotFoundError, ValueError: naming the file and what is wrong with it.
        """

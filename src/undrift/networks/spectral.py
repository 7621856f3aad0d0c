r"""A network of functions: it reads values on a grid, and its weights belong to none.

.. math:: h_{l+1} = h_l + V_l\, \mathrm{gelu}\bigl((1 + s_l)(K_l h_l + W_l h_l) + b_l\bigr), \qquad
    K h = \sum_{j \le m} (R_j \langle h, \phi_j\rangle)\, \phi_j ,

with matrices :math:`R_j, V, W` over channels, and :math:`s, b` from the embedded noise label. The modes :math:`\phi_j`
are functions of the unit cube and their inner products are normalised in :math:`L^2`, so the m kept frequencies are
the same physical ones on every grid. All else acts point by point, without statistics over the domain.

What does change with the grid is the error of the inner products: a midpoint rule, exact for the modes of the grid, of
functions that the non-linearity has given modes beyond. It falls exponentially in the number of points for smooth
functions that continue smoothly across the boundary as the basis does, and ``dealias`` runs the network on a grid so
many times finer. The coordinates are given as the basis's own lowest functions, which continue so: x itself does not.

References:
    Li et al., Fourier Neural Operator for Parametric Partial Differential Equations, 2021, arXiv 2010.08895.
    Bartolucci et al., Representation Equivalent Neural Operators, 2023, arXiv 2305.19913 (aliasing).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from undrift.networks.base import FourierFeatures, Network, absence, told
from undrift.space.basis import Basis, Cosine, Fourier

__all__ = ["SpectralNet"]


class _Transform:
    """The first m modes of each axis, to and from values on any grid, by small matrices."""

    def __init__(self, basis: Basis, modes: int) -> None:
        self.axis, self.dims, self.modes = type(basis)(1), basis.dims, modes
        self._kept: dict[object, tuple[Tensor, Tensor]] = {}

    def _matrices(self, n: int, like: Tensor) -> tuple[Tensor, Tensor]:
        key = (n, like.dtype, like.device)
        if key not in self._kept:
            with torch.inference_mode(False):  # what is kept may serve training later
                m, eye = min(n, self.modes), torch.eye(n, dtype=torch.float64)
                analysis = self.axis.analyse(eye)[:, :m]  # row i: coefficients of the i-th point's unit vector
                self._kept[key] = analysis.to(like), self.axis.synthesise(eye)[:m].to(like)
        return self._kept[key]

    def analyse(self, h: Tensor) -> Tensor:
        for axis in range(-self.dims, 0):
            h = (h.movedim(axis, -1) @ self._matrices(h.shape[axis], h)[0]).movedim(-1, axis)
        return h

    def synthesise(self, c: Tensor, grid: tuple[int, ...]) -> Tensor:
        for axis, n in zip(range(-self.dims, 0), grid, strict=True):
            c = (c.movedim(axis, -1) @ self._matrices(n, c)[1]).movedim(-1, axis)
        return c


class _SpectralConvolution(nn.Module):
    """One matrix over channels for each kept mode; on Fourier modes sines and cosines of one frequency mix."""

    def __init__(self, transform: _Transform, width: int, pairs: bool) -> None:
        super().__init__()
        self.transform, self.pairs = transform, pairs
        copies = 2**transform.dims if pairs else 1
        shape = (copies * width, width, *[transform.modes] * transform.dims)
        self.weight = nn.Parameter(torch.randn(shape) / (copies * width) ** 0.5)

    def forward(self, h: Tensor) -> Tensor:
        grid = h.shape[2:]
        c = self.transform.analyse(h)
        if self.pairs:
            for axis in range(2, c.ndim):
                c = torch.cat([c, c.index_select(axis, _partners(c.shape[axis], c.device))], 1)
        weight: Tensor = self.weight
        for axis, kept in enumerate(c.shape[2:]):
            weight = weight.narrow(axis + 2, 0, kept)
        # one product of matrices a mode: (modes, batch, in) @ (modes, in, out)
        out = torch.bmm(c.flatten(2).permute(2, 0, 1), weight.flatten(2).permute(2, 0, 1)).permute(1, 2, 0)
        return self.transform.synthesise(out.unflatten(2, c.shape[2:]), grid)


def _partners(modes: int, device: torch.device) -> Tensor:
    """Sine for cosine of the same frequency, and back; the constant, and a last sine alone, for itself."""
    j = torch.arange(modes, device=device)
    other = torch.where(j % 2 == 1, j + 1, j - 1)
    return torch.where((j == 0) | (other >= modes), j, other)


class _Block(nn.Module):
    def __init__(self, transform: _Transform, width: int, embedding: int, pairs: bool) -> None:
        super().__init__()
        self.spectral = _SpectralConvolution(transform, width, pairs)
        self.pointwise = nn.Linear(width, width)
        self.modulation = nn.Linear(embedding, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        scale, shift = self.modulation(e).reshape(*e.shape[:1], -1, *[1] * (h.ndim - 2)).chunk(2, 1)
        u = torch.addcmul(shift, self.spectral(h) + _pointwise(self.pointwise, h), 1 + scale)
        return h + _pointwise(self.out, F.gelu(u))


def _pointwise(layer: nn.Linear, h: Tensor) -> Tensor:
    """A linear layer over channels (batch, channels, *grid)."""
    out = torch.matmul(layer.weight, h.flatten(2)).add_(layer.bias.unsqueeze(-1))
    return out.unflatten(2, h.shape[2:])


class SpectralNet(Network):
    """Spectral convolutions of fixed physical modes: one network for every grid, in one dimension or more.

    Leading axes of an event are merged: (batch, *grid), (batch, C, *grid) and (batch, K, C, *grid) are read as
    functions of 1, C and K C components.

    Args:
        basis: Cosine, Sine or Fourier, of the domain's dimension.
        channels: components that come in and go out.
        width: hidden channels.
        modes: modes kept along each axis; a coarser grid uses those that it has.
        depth: blocks.
        coordinates: give the network the place, as the lowest modes of every axis: cos(pi x), and on Fourier
            sin(2 pi x) and cos(2 pi x).
        dealias: run on a grid so many times finer, from which the output is projected back.
        frequencies: Fourier features of the noise label, even.
        classes: number of classes for conditioning by ``y`` (batch,), or None; -1, or no ``y``, is "no class".
        condition_channels: components of a field ``observed`` (batch, condition_channels, *its grid) given to the
            network as further channels; on another grid than x it is resampled.
        condition_features: numbers of a vector ``observed`` (batch, condition_features) given beside the label.
        condition_optional: whether it does without, where ``observed`` is None or all NaN: the field or vector is then
            zero, and a learned vector joins the embedded label.
    """

    def __init__(
        self,
        basis: Basis | None = None,
        channels: int = 1,
        width: int = 32,
        modes: int = 16,
        depth: int = 4,
        coordinates: bool = True,
        dealias: int = 1,
        frequencies: int = 32,
        classes: int | None = None,
        condition_channels: int = 0,
        condition_features: int = 0,
        condition_optional: bool = False,
    ) -> None:
        super().__init__()
        basis = Cosine() if basis is None else basis
        sizes = {"channels": channels, "width": width, "modes": modes, "depth": depth, "dealias": dealias}
        for name, value in (*sizes.items(), ("classes", classes or 1)):
            if value < 1:
                raise ValueError(f"SpectralNet: {name} must be at least 1, got {value}.")
        if min(condition_channels, condition_features) < 0 or (condition_channels and condition_features):
            raise ValueError(
                "SpectralNet: observed is a field of condition_channels components or a vector of condition_features "
                f"numbers, not both; got {condition_channels} and {condition_features}."
            )
        self.config = {
            "basis": basis,
            **{k: v for k, v in sizes.items() if k != "dealias"},
            "coordinates": coordinates,
            "dealias": dealias,
            "frequencies": frequencies,
            "classes": classes,
            "condition_channels": condition_channels,
            "condition_features": condition_features,
            "condition_optional": condition_optional,
        }
        self.basis, self.channels, self.coordinates, self.dealias = basis, channels, coordinates, dealias
        self.classes, self.condition_channels, self.condition_features = classes, condition_channels, condition_features
        self.condition_optional = condition_optional
        pairs, embedding = isinstance(basis, Fourier), 2 * width
        self.embed = nn.Sequential(FourierFeatures(frequencies), nn.Linear(frequencies, embedding), nn.SiLU())
        self.mix = nn.Sequential(nn.Linear(embedding, embedding), nn.SiLU())
        self.class_embed = None if classes is None else nn.Embedding(classes + 1, embedding)
        self.feature_embed = nn.Linear(condition_features, embedding) if condition_features else None
        places = basis.dims * (2 if pairs else 1) if coordinates else 0
        self.inward = nn.Linear(channels + condition_channels + places, width)
        transform = _Transform(basis, modes)
        self.blocks = nn.ModuleList(_Block(transform, width, embedding, pairs) for _ in range(depth))
        self.last, self.outward = nn.Linear(width, 2 * width), nn.Linear(2 * width, channels)
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(self.outward.bias)
        conditions = condition_channels + condition_features
        self.absent = absence(condition_optional, conditions, embedding, "SpectralNet")

    def _places(self, grid: tuple[int, ...], like: Tensor) -> Tensor:
        x = self.basis.points(grid).movedim(-1, 0)
        if isinstance(self.basis, Fourier):
            return torch.cat([(2 * torch.pi * x).sin(), (2 * torch.pi * x).cos()]).to(like)
        return (torch.pi * x).cos().to(like)

    def forward(
        self, x: Tensor, label: Tensor, y: Tensor | None = None, observed: Tensor | None = None, **condition: Any
    ) -> Tensor:
        """x (batch, *leading, *grid), label (batch,), classes y (batch,), and what was observed; returns x's shape."""
        if condition:
            raise TypeError(f"SpectralNet takes y and observed as conditions, got {', '.join(condition)}.")
        dims = self.basis.dims
        grid = self.basis.grid(x.shape[1:])
        u = x.reshape(x.shape[0], -1, *grid)
        if u.shape[1] != self.channels:
            raise ValueError(
                f"SpectralNet: built for {self.channels} component{'s' * (self.channels > 1)} on a grid of {dims} "
                f"dimension{'s' * (dims > 1)}, got x of shape {tuple(x.shape)}."
            )
        fine = tuple(self.dealias * n for n in grid)
        parts = [u if fine == grid else self.basis.resample(u, fine)]
        e = self.embed(label)
        absent = None
        if self.condition_channels:
            sizes = (self.condition_channels, *(fine if observed is None else [None] * dims))
            field, absent = told(observed, u, sizes, "SpectralNet", self.condition_optional)
            parts.append(field if field.shape[2:] == fine else self.basis.resample(field, fine))
        elif self.feature_embed is not None:
            data, absent = told(observed, e, (self.condition_features,), "SpectralNet", self.condition_optional)
            e = e + self.feature_embed(data)
        elif observed is not None:
            raise TypeError("SpectralNet: got observed, but it was built without condition_channels and _features.")
        if absent is not None and self.absent is not None:
            e = e + absent.unsqueeze(1) * self.absent
        if self.classes is not None and self.class_embed is not None:
            y = torch.full((x.shape[0],), -1, device=x.device) if y is None else y
            e = e + self.class_embed(torch.where(y < 0, self.classes, y))
        elif y is not None:
            raise TypeError("SpectralNet: got classes y, but it was built with classes=None.")
        if self.coordinates:
            parts.append(self._places(fine, u).expand(x.shape[0], *[-1] * (dims + 1)))
        e = self.mix(e)
        h = _pointwise(self.inward, torch.cat(parts, 1))
        for block in self.blocks:
            h = block(h, e)
        out = _pointwise(self.outward, F.gelu(_pointwise(self.last, h)))
        return (out if fine == grid else self.basis.resample(out, grid)).reshape(x.shape)

r"""A residual MLP for vectors.

.. math:: h_0 = W x, \quad h_{i+1} = h_i + B_i\,\mathrm{silu}(A_i\,\mathrm{norm}(h_i) + C_i e), \quad
    y = V\,\mathrm{norm}(h_n)

with :math:`e` the embedded noise label. :math:`V = 0` at the start, so that a fresh network says nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from undrift.networks.base import FourierFeatures, Network, absence, told

__all__ = ["MLP"]


class _Residual(nn.Module):
    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, width)
        self.shift = nn.Linear(embedding, width, bias=False)
        self.outer = nn.Linear(width, width)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        return h + self.outer(F.silu(self.inner(self.norm(h)) + self.shift(e)))


class MLP(Network):
    """Residual MLP; flattens the event (channels and all) to ``features`` numbers and gives the shape back.

    Args:
        features: numbers in one event: K times the size of a data point for a network that sees all K channels.
        width: hidden width.
        depth: residual blocks.
        frequencies: Fourier features of the noise label, even.
        condition_features: numbers of a vector ``observed`` (batch, condition_features) that the network is told; or 0.
        condition_optional: whether it does without, where ``observed`` is None or all NaN: the vector is then zero, and
            a learned one joins the embedded label.
    """

    def __init__(
        self,
        features: int,
        width: int = 256,
        depth: int = 4,
        frequencies: int = 32,
        condition_features: int = 0,
        condition_optional: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("features", features), ("width", width), ("depth", depth)):
            if value < 1:
                raise ValueError(f"MLP: {name} must be at least 1, got {value}.")
        if condition_features < 0:
            raise ValueError(f"MLP: condition_features must be 0 or more, got {condition_features}.")
        self.config = {
            "features": features,
            "width": width,
            "depth": depth,
            "frequencies": frequencies,
            "condition_features": condition_features,
            "condition_optional": condition_optional,
        }
        self.features, self.condition_features = features, condition_features
        self.condition_optional = condition_optional
        self.embed = nn.Sequential(FourierFeatures(frequencies), nn.Linear(frequencies, width), nn.SiLU())
        self.inward = nn.Linear(features + condition_features, width)
        self.blocks = nn.ModuleList(_Residual(width, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.outward = nn.Linear(width, features)
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(self.outward.bias)
        self.absent = absence(condition_optional, condition_features, width, "MLP")

    def forward(self, x: Tensor, label: Tensor, observed: Tensor | None = None, **condition: Any) -> Tensor:
        """x (batch, *event) with ``features`` numbers in an event, label (batch,), observed; returns x's shape."""
        if condition:
            raise TypeError(f"MLP takes observed as its only condition, got {', '.join(condition)}.")
        flat = x.reshape(x.shape[0], -1)
        if flat.shape[1] != self.features:
            raise ValueError(
                f"MLP: an event must hold {self.features} numbers, got x of shape {tuple(x.shape)} with "
                f"{flat.shape[1]}; build the network with features = K times the size of a data point."
            )
        e = self.embed(label)
        if self.condition_features:
            data, absent = told(observed, flat, (self.condition_features,), "MLP", self.condition_optional)
            flat = torch.cat([flat, data], 1)
            if absent is not None and self.absent is not None:
                e = e + absent.unsqueeze(1) * self.absent
        elif observed is not None:
            raise TypeError("MLP: got observed, but it was built without condition_features.")
        h = self.inward(flat)
        for block in self.blocks:
            h = block(h, e)
        return self.outward(self.norm(h)).reshape(x.shape)

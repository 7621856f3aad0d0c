r"""What a network is: a map of a point and a scalar noise label to something of the point's shape.

A network knows nothing of processes, noise levels or losses. ``label`` (batch,) is whatever scalar tells the noise
level; throughout the library a quarter of its logarithm, which stays within [-2, 2] for every level in use.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FourierFeatures", "Network", "batched"]


class Network(nn.Module, ABC):
    """Base of all networks.

    A subclass keeps ``config``, the mapping of its constructor's arguments, so that a file can describe it. A network
    of your own need not derive from this class to be trained; it must to be saved and loaded by name.
    """

    config: Mapping[str, Any] = MappingProxyType({})

    @abstractmethod
    def forward(self, x: Tensor, label: Tensor, **condition: Any) -> Tensor:
        """
        Args:
            x: points (batch, *event), or states (batch, K, *event).
            label: noise labels (batch,).
            condition: what the network is conditioned on, if anything.

        Returns:
            Same shape and dtype as ``x``.
        """


class FourierFeatures(nn.Module):
    r"""Cosines and sines :math:`\cos \omega_i c, \sin \omega_i c` of a scalar, with log-spaced frequencies.

    The lowest frequency is monotone over the labels in use, the highest tells noise levels apart that differ by a few
    per cent.

    Args:
        features: number of outputs, even.
        low, high: first and last angular frequency.
    """

    frequencies: Tensor

    def __init__(self, features: int, low: float = 0.5, high: float = 32.0) -> None:
        super().__init__()
        if features < 4 or features % 2:
            raise ValueError(f"FourierFeatures: features must be even and at least 4, got {features}.")
        exponents = torch.linspace(math.log(low), math.log(high), features // 2)
        self.register_buffer("frequencies", exponents.exp(), persistent=False)

    def forward(self, label: Tensor) -> Tensor:
        """Scalars (batch,) to features (batch, features)."""
        angle = label.unsqueeze(-1) * self.frequencies.to(label)
        return torch.cat([angle.cos(), angle.sin()], -1)


def batched(observed: Tensor, batch: int, expected: Sequence[int | None], owner: str) -> Tensor:
    """What was observed, one for each of the batch: (batch, *expected) from that or from one for all.

    Args:
        observed: (*expected), (1, *expected) or (batch, *expected).
        expected: sizes, None where any will do.

    Raises:
        ValueError: for other shapes.
    """
    shape = tuple(observed.shape)
    lead, tail = shape[: len(shape) - len(expected)], shape[len(shape) - len(expected) :]
    fits = len(shape) >= len(expected) and all(e in (None, n) for e, n in zip(expected, tail, strict=True))
    if not fits or lead not in ((), (1,), (batch,)):
        wanted = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(
            f"{owner}: observed must have the shape ({batch}, {wanted}), one for each sample, or ({wanted}) for all, "
            f"got {shape}."
        )
    return observed.expand(batch, *tail)

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

__all__ = ["FourierFeatures", "Network", "absence", "batched", "takes_observed", "told"]


class Network(nn.Module, ABC):
    """Base of all networks.

    A subclass keeps ``config``, the mapping of its constructor's arguments, so that a file can describe it. A network
    of your own need not derive from this class to be trained; it must to be saved and loaded by name.

    Attributes:
        condition_optional: whether the network does without ``observed``. It then reads None, and of a batch the
            samples whose observation is all NaN, as "no observation", and training drops some.
    """

    config: Mapping[str, Any] = MappingProxyType({})
    condition_optional: bool = False

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


def takes_observed(network: object) -> bool:
    """Whether a network takes what was ``observed`` of a point."""
    return any(getattr(network, f"condition_{kind}", 0) for kind in ("channels", "features"))


def told(
    observed: Tensor | None, like: Tensor, expected: Sequence[int | None], owner: str, optional: bool
) -> tuple[Tensor, Tensor | None]:
    """What each of a batch was told, and who was told nothing.

    Args:
        observed: see :func:`batched`; None, or all NaN for one of the batch, is no observation.
        like: of the batch, (batch, ...), with the dtype and device that the network computes in.
        expected: sizes, None where any will do.
        owner: for errors.
        optional: whether the network does without.

    Returns:
        Data (batch, *expected), zero where there are none (of size 1 where any will do), and where that is (batch,),
        or None unless ``optional``.

    Raises:
        TypeError: if nothing was observed and the network does not do without.
        ValueError: for shapes that do not fit.
    """
    batch = like.shape[0]
    if observed is None:
        if not optional:
            raise TypeError(
                f"{owner}: is told what was observed, so give observed=. A network that does without is built with "
                "condition_optional=True and trained with observed_dropout above 0."
            )
        sizes = [1 if n is None else n for n in expected]
        return like.new_zeros(batch, *sizes), torch.ones(batch, dtype=torch.bool, device=like.device)
    data = batched(observed, batch, expected, owner).to(like)
    if not optional:
        return data, None
    absent = data.flatten(1).isnan().all(1)
    return data.masked_fill(absent.reshape(-1, *[1] * (data.ndim - 1)), 0.0), absent


def absence(optional: bool, conditions: int, features: int, owner: str) -> nn.Parameter | None:
    """What is added to the embedding (batch, features) of a sample that is told nothing; None unless ``optional``.

    Raises:
        ValueError: if there is nothing, ``conditions`` = 0, that could be absent.
    """
    if not optional:
        return None
    if not conditions:
        raise ValueError(f"{owner}: condition_optional is of what was observed, and the network is told nothing.")
    return nn.Parameter(torch.randn(features))

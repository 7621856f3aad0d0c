r"""Networks that tell classes: the way down of a small U-Net for images, and a residual MLP for vectors.

Like the others they are told the noise by a scalar label and know nothing of what it means. The last layer is zero at
the start, so that a fresh network holds all classes equally likely.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from undrift.networks.base import FourierFeatures
from undrift.networks.mlp import _Residual
from undrift.networks.unet import _Attention, _Block, _norm

__all__ = ["ClassifierNetwork", "ConvClassifier", "MLPClassifier"]


class ClassifierNetwork(nn.Module, ABC):
    """Base of all classifier networks. A subclass keeps ``config``, the mapping of its constructor's arguments."""

    config: Mapping[str, Any] = MappingProxyType({})
    classes: int

    @abstractmethod
    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        """Logits (batch, classes) of points (batch, *event) with noise labels (batch,)."""


def _check(owner: str, **sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{owner}: {name} must be at least 1, got {value}.")


def _silent(inward: int, classes: int) -> nn.Linear:
    layer = nn.Linear(inward, classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ConvClassifier(ClassifierNetwork):
    """Classifier of images of any size that halves as often as there are levels less one, odd sizes included.

    Per level one or more residual blocks, modulated by the noise label, and average pooling between levels; attention
    at the coarsest; then the mean over the pixels and a linear head.

    Args:
        channels: image channels.
        classes: how many classes.
        width: channels of the first level, a multiple of 8.
        multipliers: channels of each level as multiples of ``width``.
        blocks: residual blocks per level.
        attention: self-attention at the coarsest level.
        dropout: dropout inside the blocks.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        width: int = 32,
        multipliers: tuple[int, ...] = (1, 2),
        blocks: int = 1,
        attention: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check("ConvClassifier", channels=channels, classes=classes, blocks=blocks)
        if width < 8 or width % 8:
            raise ValueError(f"ConvClassifier: width must be a multiple of 8, got {width}.")
        if not multipliers or min(multipliers) < 1:
            raise ValueError(
                f"ConvClassifier: multipliers must be numbers of at least 1, one per level, got {multipliers}."
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"ConvClassifier: dropout must lie in [0, 1), got {dropout}.")
        self.config = {
            "channels": channels,
            "classes": classes,
            "width": width,
            "multipliers": list(multipliers),
            "blocks": blocks,
            "attention": attention,
            "dropout": dropout,
        }
        self.channels, self.classes, self.blocks, self.levels = channels, classes, blocks, len(multipliers)
        embedding = 4 * width
        self.embed = nn.Sequential(
            FourierFeatures(width), nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU()
        )
        self.inward = nn.Conv2d(channels, width, 3, padding=1)
        self.down, c = nn.ModuleList(), width
        for level in [width * m for m in multipliers for _ in range(blocks)]:
            self.down.append(_Block(c, level, embedding, dropout))
            c = level
        self.attention = _Attention(c, max(1, c // 32)) if attention else nn.Identity()
        self.norm = _norm(c)
        self.head = _silent(c, classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster on a CPU

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        """x (batch, C, H, W), label (batch,); returns logits (batch, classes)."""
        least = 2 ** (self.levels - 1)
        if x.ndim != 4 or x.shape[1] != self.channels or min(x.shape[-2:]) < least:
            raise ValueError(
                f"ConvClassifier: built for images (batch, {self.channels}, H, W) of at least {least} x {least}, got x "
                f"of shape {tuple(x.shape)}."
            )
        e = self.embed(label)
        h = self.inward(x.contiguous(memory_format=torch.channels_last))
        for i, block in enumerate(self.down):
            h = block(F.avg_pool2d(h, 2) if i and i % self.blocks == 0 else h, e)
        h = F.silu(self.norm(self.attention(h)))
        return self.head(h.mean((-2, -1)))


class MLPClassifier(ClassifierNetwork):
    """Classifier of vectors: a residual MLP; flattens the event to ``features`` numbers.

    Args:
        features: numbers in one event.
        classes: how many classes.
        width: hidden width.
        depth: residual blocks.
        frequencies: Fourier features of the noise label, even.
    """

    def __init__(self, features: int, classes: int, width: int = 128, depth: int = 2, frequencies: int = 32) -> None:
        super().__init__()
        _check("MLPClassifier", features=features, classes=classes, width=width, depth=depth)
        self.config = {
            "features": features,
            "classes": classes,
            "width": width,
            "depth": depth,
            "frequencies": frequencies,
        }
        self.features, self.classes = features, classes
        self.embed = nn.Sequential(FourierFeatures(frequencies), nn.Linear(frequencies, width), nn.SiLU())
        self.inward = nn.Linear(features, width)
        self.blocks = nn.ModuleList(_Residual(width, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = _silent(width, classes)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        """x (batch, *event) with ``features`` numbers in an event, label (batch,); returns logits (batch, classes)."""
        flat = x.reshape(x.shape[0], -1)
        if flat.shape[1] != self.features:
            raise ValueError(
                f"MLPClassifier: an event must hold {self.features} numbers, got x of shape {tuple(x.shape)} with "
                f"{flat.shape[1]}."
            )
        e, h = self.embed(label), self.inward(flat)
        for block in self.blocks:
            h = block(h, e)
        return self.head(self.norm(h))

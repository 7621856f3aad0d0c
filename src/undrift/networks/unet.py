r"""A small U-Net for images, sized to train on a few CPU cores.

Per level: residual blocks of two 3 x 3 convolutions, modulated by the embedded noise label (scale and shift after the
second normalisation), average pooling down and nearest-neighbour up; skips are concatenated and merged by a 1 x 1
convolution; one self-attention at the coarsest level.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from undrift.networks.base import FourierFeatures, Network, absence, told

__all__ = ["UNet"]


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(g for g in range(1, 9) if channels % g == 0), channels)


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class _Block(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))) modulated)), the last convolution zero at the start."""

    def __init__(self, inward: int, outward: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(inward), _norm(outward)
        self.conv1 = nn.Conv2d(inward, outward, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * outward)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _zero(nn.Conv2d(outward, outward, 3, padding=1))
        self.skip = nn.Conv2d(inward, outward, 1) if inward != outward else nn.Identity()

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(e)[..., None, None].chunk(2, 1)
        h = F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale))
        return self.skip(x) + self.conv2(self.dropout(h))


class _Attention(nn.Module):
    """Self-attention over the pixels, added to its input; zero at the start."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, height * width)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.transpose(-1, -2).reshape(b, c, height, width))


class UNet(Network):
    """Small U-Net; merges any leading channels, so (batch, K, C, H, W) is read as K C image channels.

    Args:
        channels: image channels that come in and go out: C for a denoiser, K C for a network that sees all K channels.
        size: height and width of the images; divisible by 2 to the number of levels less one.
        width: channels of the first level.
        multipliers: channels of each level as multiples of ``width``.
        blocks: residual blocks per level on the way down.
        attention: self-attention at the coarsest level.
        dropout: dropout inside the blocks.
        classes: number of classes for conditioning by ``y`` (batch,), or None. Class -1, or no ``y``, is "no class":
            train it by dropping labels, and classifier-free guidance works.
        condition_channels: channels of an image ``observed`` (batch, condition_channels, H, W) given beside x; or 0.
        condition_optional: whether it does without, where ``observed`` is None or all NaN: the image is then zero, and
            a learned vector joins the embedded label.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        width: int = 32,
        multipliers: tuple[int, ...] = (1, 2),
        blocks: int = 1,
        attention: bool = True,
        dropout: float = 0.0,
        classes: int | None = None,
        condition_channels: int = 0,
        condition_optional: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("size", size), ("blocks", blocks), ("classes", classes or 1)):
            if value < 1:
                raise ValueError(f"UNet: {name} must be at least 1, got {value}.")
        if width < 8 or width % 8:
            raise ValueError(f"UNet: width must be a multiple of 8, got {width}.")
        if not multipliers or min(multipliers) < 1:
            raise ValueError(f"UNet: multipliers must be numbers of at least 1, one per level, got {multipliers}.")
        factor = 2 ** (len(multipliers) - 1)
        if size % factor:
            raise ValueError(
                f"UNet: {len(multipliers)} levels halve the image {len(multipliers) - 1} times, so size must be "
                f"divisible by {factor}, got {size}; pad the images or give fewer multipliers."
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"UNet: dropout must lie in [0, 1), got {dropout}.")
        if condition_channels < 0:
            raise ValueError(f"UNet: condition_channels must be 0 or more, got {condition_channels}.")
        self.config = {
            "channels": channels,
            "size": size,
            "width": width,
            "multipliers": list(multipliers),
            "blocks": blocks,
            "attention": attention,
            "dropout": dropout,
            "classes": classes,
            "condition_channels": condition_channels,
            "condition_optional": condition_optional,
        }
        self.condition_channels, self.condition_optional = condition_channels, condition_optional
        self.channels, self.size, self.classes, self.blocks = channels, size, classes, blocks
        embedding = 4 * width
        self.embed = nn.Sequential(FourierFeatures(width), nn.Linear(width, embedding), nn.SiLU())
        self.mix = nn.Sequential(nn.Linear(embedding, embedding), nn.SiLU())
        self.class_embed = None if classes is None else nn.Embedding(classes + 1, embedding)

        widths = [width * m for m in multipliers]
        self.inward = nn.Conv2d(channels + condition_channels, widths[0], 3, padding=1)
        self.down, self.up, self.merge = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        skips, c = [widths[0]], widths[0]
        for level in [w for w in widths for _ in range(blocks)]:
            self.down.append(_Block(c, level, embedding, dropout))
            c = level
            skips.append(c)
        self.attention = _Attention(c, max(1, c // 32)) if attention else nn.Identity()
        self.middle = _Block(c, c, embedding, dropout)
        for level in [w for w in reversed(widths) for _ in range(blocks)]:
            self.merge.append(nn.Conv2d(c + skips.pop(), level, 1))
            self.up.append(_Block(level, level, embedding, dropout))
            c = level
        self.norm = _norm(c)
        self.outward = _zero(nn.Conv2d(c, channels, 3, padding=1))
        self.absent = absence(condition_optional, condition_channels, embedding, "UNet")
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a fifth faster on a CPU, or more

    def forward(
        self, x: Tensor, label: Tensor, y: Tensor | None = None, observed: Tensor | None = None, **condition: Any
    ) -> Tensor:
        """x (batch, *leading, H, W), label (batch,), classes y (batch,), an image observed; returns x's shape."""
        if condition:
            raise TypeError(f"UNet takes y and observed as conditions, got {', '.join(condition)}.")
        image = x.flatten(1, -3) if x.ndim > 3 else x
        if image.ndim != 4 or image.shape[1] != self.channels or image.shape[-2:] != (self.size, self.size):
            raise ValueError(
                f"UNet: built for {self.channels} channels of {self.size} x {self.size}, got x of shape "
                f"{tuple(x.shape)}; x must be (batch, C, H, W), or (batch, K, C, H, W) with channels = K C."
            )
        e = self.embed(label)
        if self.classes is not None and self.class_embed is not None:
            y = torch.full((x.shape[0],), -1, device=x.device) if y is None else y
            e = e + self.class_embed(torch.where(y < 0, self.classes, y))
        elif y is not None:
            raise TypeError("UNet: got classes y, but it was built with classes=None.")
        if self.condition_channels:
            expected = (self.condition_channels, self.size, self.size)
            data, absent = told(observed, image, expected, "UNet", self.condition_optional)
            image = torch.cat([image, data], 1)
            if absent is not None and self.absent is not None:
                e = e + absent.unsqueeze(1) * self.absent
        elif observed is not None:
            raise TypeError("UNet: got observed, but it was built without condition_channels.")
        e = self.mix(e)
        h = self.inward(image.contiguous(memory_format=torch.channels_last))
        skips = [h]
        for i, block in enumerate(self.down):
            h = block(F.avg_pool2d(h, 2) if i and i % self.blocks == 0 else h, e)
            skips.append(h)
        h = self.middle(self.attention(h), e)
        for i, (merge, block) in enumerate(zip(self.merge, self.up, strict=True)):
            h = F.interpolate(h, scale_factor=2.0, mode="nearest") if i and i % self.blocks == 0 else h
            h = block(merge(torch.cat([h, skips.pop()], 1)), e)
        return self.outward(F.silu(self.norm(h))).reshape(x.shape)

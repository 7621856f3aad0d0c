r"""An adapter for the U-Net of the ``diffusers`` library, for images where the small one is too small.

diffusers embeds a "timestep", a number in [0, 1000], by sinusoids. A noise label :math:`c = \frac14 \log \sigma`
becomes the timestep :math:`250\,(c + 2)`, so that all levels from 3.4e-4 to 2980 lie inside. It enters as scale
and shift after the group normalisation: added before it, the default, a group of one channel removes it again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from undrift.networks.base import Network

__all__ = ["DiffusersUNet"]


class DiffusersUNet(Network):
    """``diffusers.UNet2DModel``; merges any leading channels, so (batch, K, C, H, W) is read as K C image channels.

    Args:
        channels: image channels that come in and go out: C for a denoiser, K C for a network that sees all K channels.
        size: height and width of the images.
        widths: channels of each level, multiples of 32.
        layers: residual blocks per level.
        attention: for each level, whether it has self-attention; None puts it at all levels but the first.
        dropout: dropout inside the blocks.
        classes: number of classes for conditioning by ``y`` (batch,), or None; class -1 or no ``y`` is "no class".

    Raises:
        ImportError: if diffusers is not installed.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        widths: tuple[int, ...] = (64, 128),
        layers: int = 2,
        attention: tuple[bool, ...] | None = None,
        dropout: float = 0.0,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        try:
            from diffusers import UNet2DModel
        except ImportError as error:
            raise ImportError('DiffusersUNet needs the diffusers library: pip install "undrift[unet]".') from error
        if not widths or any(w < 32 or w % 32 for w in widths):
            raise ValueError(f"DiffusersUNet: widths must be multiples of 32, one per level, got {widths}.")
        factor = 2 ** (len(widths) - 1)
        if size % factor:
            raise ValueError(f"DiffusersUNet: size must be divisible by {factor} for {len(widths)} levels, got {size}.")
        attends = [i > 0 for i in range(len(widths))] if attention is None else list(attention)
        if len(attends) != len(widths):
            raise ValueError(
                f"DiffusersUNet: attention must name each of the {len(widths)} levels, got {len(attends)} values."
            )
        self.config = {
            "channels": channels,
            "size": size,
            "widths": list(widths),
            "layers": layers,
            "attention": attends,
            "dropout": dropout,
            "classes": classes,
        }
        self.channels, self.size, self.classes = channels, size, classes
        self.unet: Any = UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=tuple(widths),
            layers_per_block=layers,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
            attention_head_dim=32,
            dropout=dropout,
            resnet_time_scale_shift="scale_shift",
            num_class_embeds=None if classes is None else classes + 1,
        )

    def forward(self, x: Tensor, label: Tensor, y: Tensor | None = None, **condition: Any) -> Tensor:
        """x (batch, *leading, H, W), label (batch,), classes y (batch,) or None; returns x's shape."""
        if condition:
            raise TypeError(f"DiffusersUNet takes y as its only condition, got {', '.join(condition)}.")
        image = x.flatten(1, -3) if x.ndim > 3 else x
        if image.ndim != 4 or image.shape[1] != self.channels or image.shape[-2:] != (self.size, self.size):
            raise ValueError(
                f"DiffusersUNet: built for {self.channels} channels of {self.size} x {self.size}, got x of shape "
                f"{tuple(x.shape)}; x must be (batch, C, H, W), or (batch, K, C, H, W) with channels = K C."
            )
        if self.classes is not None:
            y = torch.full((x.shape[0],), -1, device=x.device) if y is None else y
            y = torch.where(y < 0, self.classes, y)
        elif y is not None:
            raise TypeError("DiffusersUNet: got classes y, but it was built with classes=None.")
        return self.unet(image, 250.0 * (label + 2.0), class_labels=y).sample.reshape(x.shape)

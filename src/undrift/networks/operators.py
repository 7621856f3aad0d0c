r"""An adapter for neural operators of other libraries: any module of fields, (batch, channels, *grid) to the same.

The noise label c, and with ``coordinates`` the place, enter as further channels, constant and linear over the grid,
which is how such operators are told parameters; a field that was observed likewise. The module decides for itself what
it does on another grid: it serves many resolutions as far as its own transforms do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from undrift.networks.base import Network, batched

__all__ = ["NeuralOperator"]


class NeuralOperator(Network):
    """Another library's operator as a network.

    It can be trained and sampled. Saved by name it cannot be: a file would have to describe the other library's module.

    Args:
        module: takes (batch, ``inputs``, *grid) and returns (batch, channels, *grid), by position.
        channels: components of the data.
        dims: dimension of the domain.
        coordinates: append the d coordinates of the midpoints, in [0, 1].
        condition_channels: components of a field ``observed``, on the grid of x.
    """

    def __init__(
        self,
        module: nn.Module,
        channels: int = 1,
        dims: int = 1,
        coordinates: bool = False,
        condition_channels: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"NeuralOperator: module must be a torch.nn.Module, got a {type(module).__name__}.")
        if channels < 1 or dims not in (1, 2, 3) or condition_channels < 0:
            raise ValueError(
                "NeuralOperator: needs channels >= 1, dims 1, 2 or 3 and condition_channels >= 0, got "
                f"{channels}, {dims} and {condition_channels}."
            )
        self.module, self.channels, self.dims, self.coordinates = module, channels, dims, coordinates
        self.condition_channels = condition_channels

    @property
    def config(self) -> dict[str, Any]:  # type: ignore[override]
        """
        Raises:
            TypeError: always; see above.
        """
        raise TypeError(
            f"a NeuralOperator of a {type(self.module).__name__} has no description to save it by; keep its "
            "state_dict(), and make it anew around the same module."
        )

    @property
    def inputs(self) -> int:
        """Channels that the module must take: data, what was observed, the label, coordinates."""
        return self.channels + self.condition_channels + 1 + (self.dims if self.coordinates else 0)

    def forward(self, x: Tensor, label: Tensor, observed: Tensor | None = None, **condition: Any) -> Tensor:
        """x (batch, *leading, *grid), label (batch,), and a field observed; returns x's shape."""
        if condition:
            raise TypeError(f"NeuralOperator takes observed as its only condition, got {', '.join(condition)}.")
        grid = tuple(x.shape[x.ndim - self.dims :])
        field = x.reshape(x.shape[0], -1, *grid)
        if field.shape[1] != self.channels:
            raise ValueError(
                f"NeuralOperator: built for {self.channels} components on {self.dims} axes, got x of shape "
                f"{tuple(x.shape)}."
            )
        parts = [field]
        if (observed is None) != (self.condition_channels == 0):
            raise TypeError(
                "NeuralOperator: observed must be given exactly where condition_channels is not 0; it is "
                f"{self.condition_channels}."
            )
        if observed is not None:
            parts.append(batched(observed, x.shape[0], (self.condition_channels, *grid), "NeuralOperator").to(x))
        parts.append(label.reshape(-1, *[1] * (self.dims + 1)).to(x).expand(-1, 1, *grid))
        if self.coordinates:
            axes = [(torch.arange(n, dtype=x.dtype, device=x.device) + 0.5) / n for n in grid]
            places = torch.stack(torch.meshgrid(*axes, indexing="ij"))
            parts.append(places.expand(x.shape[0], *places.shape))
        out = self.module(torch.cat(parts, 1))
        if out.shape != field.shape:
            raise ValueError(
                f"NeuralOperator: the module must return {tuple(field.shape)} for {self.inputs} channels on that grid, "
                f"got {tuple(out.shape)}."
            )
        return out.reshape(x.shape)

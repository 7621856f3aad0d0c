r"""An adapter for neural operators of other libraries: any module of fields, (batch, channels, *grid) to the same.

The noise label c, and with ``coordinates`` the place, enter as further channels, constant and linear over the grid,
which is how such operators are told parameters; a field that was observed likewise. The module decides for itself what
it does on another grid: it serves many resolutions as far as its own transforms do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from undrift.networks.base import Network, told

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
        condition_optional: whether it does without, where ``observed`` is None or all NaN: the field is then zero, and
            one more constant channel is 1 rather than 0.
    """

    def __init__(
        self,
        module: nn.Module,
        channels: int = 1,
        dims: int = 1,
        coordinates: bool = False,
        condition_channels: int = 0,
        condition_optional: bool = False,
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
        if condition_optional and not condition_channels:
            raise ValueError(
                "NeuralOperator: condition_optional is of what was observed, and the network is told nothing."
            )
        self.condition_channels, self.condition_optional = condition_channels, condition_optional

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
        """Channels that the module must take: data, what was observed and whether it was, the label, coordinates."""
        places = self.dims if self.coordinates else 0
        return self.channels + self.condition_channels + int(self.condition_optional) + 1 + places

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
        constant = (-1, *[1] * (self.dims + 1))
        if self.condition_channels:
            sizes = (self.condition_channels, *grid)
            data, absent = told(observed, x, sizes, "NeuralOperator", self.condition_optional)
            parts.append(data)
            if absent is not None:
                parts.append(absent.reshape(constant).to(x).expand(-1, 1, *grid))
        elif observed is not None:
            raise TypeError("NeuralOperator: got observed, but it was built without condition_channels.")
        parts.append(label.reshape(constant).to(x).expand(-1, 1, *grid))
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

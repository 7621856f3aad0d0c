r"""A network as a denoiser, with the preconditioning of EDM.

.. math:: D(x, \sigma) = c_{skip}\, x + c_{out}\, F(c_{in}\, x;\ c_{noise}), \qquad
    c_{skip} = \frac{\sigma_d^2}{\sigma^2 + \sigma_d^2},\quad
    c_{out} = \frac{\sigma \sigma_d}{\sqrt{\sigma^2 + \sigma_d^2}},\quad
    c_{in} = \frac{1}{\sqrt{\sigma^2 + \sigma_d^2}},\quad
    c_{noise} = \tfrac14 \ln \sigma

For data of deviation :math:`\sigma_d` the network's input and its target have unit variance at every level, and
:math:`F = 0` is the best linear denoiser. (Karras et al. 2022, table 1 and appendix B.6.)
"""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from undrift.denoise.base import per_sample
from undrift.space import Space, White

__all__ = ["NetworkDenoiser", "NoiseAware"]


class NoiseAware(nn.Module):
    """A network with the input scaling and the label of EDM, on a space.

    Args:
        network: takes points and labels (batch,).
        sigma_data: deviation of one data coordinate.
        sigma_min, sigma_max: range of noise levels the network is trained at.
        space: where the points live.
    """

    def __init__(
        self,
        network: nn.Module,
        sigma_data: float = 0.5,
        sigma_min: float = 0.002,
        sigma_max: float = 300.0,
        space: Space | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not isinstance(network, nn.Module):
            raise TypeError(f"{name}: network must be a torch.nn.Module, got a {type(network).__name__}.")
        if not (sigma_data > 0 and math.isfinite(sigma_data)):
            raise ValueError(f"{name}: sigma_data must be positive and finite, got {sigma_data}.")
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(f"{name}: needs 0 < sigma_min < sigma_max < inf, got {sigma_min} and {sigma_max}.")
        self.network = network
        self.sigma_data, self.sigma_min, self.sigma_max = float(sigma_data), float(sigma_min), float(sigma_max)
        if space is not None and not isinstance(space, Space):
            raise TypeError(f"{name}: space must be a Space, got a {type(space).__name__}.")
        self.space = White() if space is None else space

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments; the weights are the checkpoint's."""
        return {
            "network": self.network,
            "sigma_data": self.sigma_data,
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max,
            "space": self.space,
        }

    def with_network(self, network: nn.Module) -> Self:
        """The same around another network."""
        return type(self)(**{**self.config, "network": network})

    def _ask(self, x: Tensor, sigma: Tensor | float, **condition: Any) -> tuple[Tensor, Tensor, Tensor]:
        """sigma and c_in, shaped to broadcast against x, and the network's answer in x's dtype."""
        level = per_sample(sigma, x)
        dtype = next((p.dtype for p in self.network.parameters()), x.dtype)
        label = 0.25 * level.clamp(self.sigma_min, self.sigma_max).log().flatten()
        c_in = (level.square() + self.sigma_data**2).rsqrt()
        return level, c_in, self.network((c_in * x).to(dtype), label.to(dtype), **condition).to(x.dtype)


class NetworkDenoiser(NoiseAware):
    """Denoiser made of a network by EDM's preconditioning.

    The label is that of the nearest level in [sigma_min, sigma_max], the levels the network was trained at: processes
    end at different sigma(T), some near 250 and some beyond any bound, and a label never seen in training has an
    arbitrary answer. The coefficients are not clamped. So below sigma_min D tends to x, and beyond sigma_max it keeps
    answering as at sigma_max, where the posterior mean is the data's mean up to 1/sigma^2; both limits are right.

    Args:
        network: maps (batch, *event) and labels (batch,) to (batch, *event).
        sigma_data: deviation of one data coordinate.
        sigma_min, sigma_max: range of noise levels the network is trained at.
        space: where the points live: the noise n it is trained to remove is that of the space. On a FunctionSpace
            sigma_data is the data's deviation relative to the noise's, 1 if they share their spectrum.
    """

    def forward(self, x: Tensor, sigma: Tensor | float, **condition: Any) -> Tensor:
        """Estimated E[x0 | x0 + sigma n = x].

        The coefficients are computed in x's dtype and the network in its own.

        Args:
            x: noisy points (batch, *event).
            sigma: noise levels (batch,), or one level.
            condition: passed on to the network.

        Returns:
            Same shape and dtype as ``x``.
        """
        level, c_in, f = self._ask(x, sigma, **condition)
        scaled = self.sigma_data * c_in
        return torch.addcmul(scaled.square() * x, level * scaled, f)

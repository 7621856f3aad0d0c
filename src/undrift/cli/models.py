"""The models that undrift train begins with where nothing else is said: networks that fit the data."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from undrift.config import ConfigError
from undrift.networks import MLP, ClassifierNetwork, ConvClassifier, MLPClassifier, Network, SpectralNet, UNet
from undrift.space import FunctionSpace, Space
from undrift.train import Dataset

__all__ = ["data_scale", "default_classifier", "default_network", "observed_of"]


def data_scale(data: Dataset, space: Space) -> float:
    """Deviation of the data relative to that of the noise."""
    if not isinstance(space, FunctionSpace):
        return data.std
    x = data.x.double()
    grid = space.basis.grid(data.event)
    spread = space.norm2(x - x.mean(0)).mean() / (math.prod(data.event) / math.prod(grid))
    return float((spread / space.variances(grid).sum()).sqrt())


def observed_of(data: Dataset, n: int) -> dict[str, Tensor]:
    """What was observed of n points of the data, for networks that are told."""
    index = torch.arange(n) % len(data)
    generator = torch.Generator().manual_seed(0)
    observed = data.observe(index, data.draw(index, generator), generator)
    return {} if observed is None else {"observed": observed}


def default_network(data: Dataset, channels: int = 1, space: Space | None = None, optional: bool = False) -> Network:
    """A SpectralNet for functions, a UNet for square images of even size, an MLP for anything else.

    ``channels`` is K where the network sees all channels. What was observed, where the data say that, is told;
    ``optional`` makes a network that does without.
    """
    event, told = data.event, observed_of(data, 1).get("observed")
    optional = optional and told is not None
    if isinstance(space, FunctionSpace):
        grid = space.basis.grid(event)
        field_ = told is not None and told.ndim > space.basis.dims and told.ndim > 2
        return SpectralNet(
            space.basis,
            math.prod(event) // math.prod(grid) * channels,
            modes=max(1, min(16, *(n // 2 for n in grid))),  # with all of a grid's modes a network writes beyond them
            condition_channels=told[0].numel() // math.prod(told.shape[-space.basis.dims :])
            if field_ and told is not None
            else 0,
            condition_features=told.numel() if told is not None and not field_ else 0,
            condition_optional=optional,
        )
    square = len(event) == 3 and event[1] == event[2] and event[1] % 2 == 0
    if square and (told is None or tuple(told.shape[2:]) == event[1:]):
        levels = (1, 2, 2) if event[1] % 4 == 0 and event[1] >= 16 else (1, 2)
        seen = 0 if told is None else told.shape[1]
        return UNet(
            event[0] * channels,
            event[1],
            multipliers=levels,
            condition_channels=seen,
            condition_optional=optional,
        )
    if told is not None and told.ndim != 2:
        raise ConfigError(
            f"network: none by default is told data of shape {tuple(told.shape[1:])} about points of shape {event}; "
            "name one, or give operators that see vectors, or images of the points' own size."
        )
    features = 0 if told is None else told.shape[1]
    return MLP(math.prod(event) * channels, condition_features=features, condition_optional=optional)


def default_classifier(data: Dataset) -> ClassifierNetwork:
    """A ConvClassifier for images (C, H, W), an MLPClassifier for anything else."""
    assert data.classes is not None
    if len(data.event) == 3 and min(data.event[1:]) >= 2:
        return ConvClassifier(data.event[0], data.classes)
    return MLPClassifier(math.prod(data.event), data.classes)

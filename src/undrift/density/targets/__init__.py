"""Benchmark targets: exact definitions, with the evidence and exact draws where they are known.

Each is a dataclass of its settings; importing this package makes them known by name to configuration files and the
command line. ``docs/targets.md`` lists them.
"""

from __future__ import annotations

from undrift.density.targets.mixtures import (
    Difficult2d,
    Gaussian,
    GaussianMixture,
    Grid16,
    Mixture9,
    Mixture40,
    MixtureHighDim,
    StudentMixture,
    TwoModes,
)
from undrift.density.targets.shapes import Banana, Funnel, Rings, Rosenbrock
from undrift.density.targets.wells import DoubleWell, ManyWell

__all__ = [
    "Banana",
    "Difficult2d",
    "DoubleWell",
    "Funnel",
    "Gaussian",
    "GaussianMixture",
    "Grid16",
    "ManyWell",
    "Mixture9",
    "Mixture40",
    "MixtureHighDim",
    "Rings",
    "Rosenbrock",
    "StudentMixture",
    "TwoModes",
]

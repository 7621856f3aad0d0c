"""Benchmark targets: exact definitions, with the evidence and exact draws where they are known.

Each is a dataclass of its settings; importing this package makes them known by name to configuration files and the
command line. ``docs/targets.md`` lists them.
"""

from __future__ import annotations

from undrift.density.targets._data import Reference
from undrift.density.targets._posterior import Posterior
from undrift.density.targets.compartment import OneCompartment
from undrift.density.targets.fields import BrownianMotion, LogGaussianCox, Seeds
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
from undrift.density.targets.posteriors import (
    AutoRegression,
    EightSchools,
    GPRegression,
    KidScore,
    LowDimGaussMix,
    Mesquite,
    Nes1980,
    SblrcBlr,
)
from undrift.density.targets.regression import LogisticRegression
from undrift.density.targets.shapes import Banana, Funnel, Rings, Rosenbrock
from undrift.density.targets.wells import DoubleWell, ManyWell

__all__ = [
    "AutoRegression",
    "Banana",
    "BrownianMotion",
    "Difficult2d",
    "DoubleWell",
    "EightSchools",
    "Funnel",
    "GPRegression",
    "Gaussian",
    "GaussianMixture",
    "Grid16",
    "KidScore",
    "LogGaussianCox",
    "LogisticRegression",
    "LowDimGaussMix",
    "ManyWell",
    "Mesquite",
    "Mixture9",
    "Mixture40",
    "MixtureHighDim",
    "Nes1980",
    "OneCompartment",
    "Posterior",
    "Reference",
    "Rings",
    "Rosenbrock",
    "SblrcBlr",
    "Seeds",
    "StudentMixture",
    "TwoModes",
]

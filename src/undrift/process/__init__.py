"""How to diffuse: linear processes on K channels, their clocks, the recipe that builds them, and the named ones."""

from undrift.process.catalog import ALDA, CLD, HOLD, MALDA, PSLD, VE, VP, BrownianBridge, FlowMatching, SubVP
from undrift.process.clock import (
    CallableClock,
    Clock,
    ConstantClock,
    CosineClock,
    GeometricClock,
    LinearClock,
    PowerClock,
)
from undrift.process.families import ClockedProcess, PanelProcess, ScalarProcess
from undrift.process.learned import LearnedClock, LearnedProcess
from undrift.process.linear import LinearProcess
from undrift.process.local import LocalGaussian, local_gaussian, local_pairs
from undrift.process.nonlinear import NonlinearRecipe, fokker_planck_residual
from undrift.process.recipe import Recipe, RecipeProcess, time_varying_recipe, validate_recipe
from undrift.process.times import InformationTimes, LogSnrTimes, TimeDensity, UniformTimes

__all__ = [
    "ALDA",
    "CLD",
    "HOLD",
    "MALDA",
    "PSLD",
    "VE",
    "VP",
    "BrownianBridge",
    "CallableClock",
    "Clock",
    "ClockedProcess",
    "ConstantClock",
    "CosineClock",
    "FlowMatching",
    "GeometricClock",
    "InformationTimes",
    "LearnedClock",
    "LearnedProcess",
    "LinearClock",
    "LinearProcess",
    "LocalGaussian",
    "LogSnrTimes",
    "NonlinearRecipe",
    "PanelProcess",
    "PowerClock",
    "Recipe",
    "RecipeProcess",
    "ScalarProcess",
    "SubVP",
    "TimeDensity",
    "UniformTimes",
    "fokker_planck_residual",
    "local_gaussian",
    "local_pairs",
    "time_varying_recipe",
    "validate_recipe",
]

"""How to diffuse: linear processes on K channels, their clocks, the recipe that builds them, and the named ones."""

from undrift.process.catalog import ALDA, CLD, HOLD, MALDA, PSLD, VE, VP, FlowMatching, SubVP
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
from undrift.process.linear import LinearProcess
from undrift.process.nonlinear import NonlinearRecipe, fokker_planck_residual
from undrift.process.recipe import Recipe, RecipeProcess, time_varying_recipe, validate_recipe

__all__ = [
    "ALDA",
    "CLD",
    "HOLD",
    "MALDA",
    "PSLD",
    "VE",
    "VP",
    "CallableClock",
    "Clock",
    "ClockedProcess",
    "ConstantClock",
    "CosineClock",
    "FlowMatching",
    "GeometricClock",
    "LinearClock",
    "LinearProcess",
    "NonlinearRecipe",
    "PanelProcess",
    "PowerClock",
    "Recipe",
    "RecipeProcess",
    "ScalarProcess",
    "SubVP",
    "fokker_planck_residual",
    "time_varying_recipe",
    "validate_recipe",
]

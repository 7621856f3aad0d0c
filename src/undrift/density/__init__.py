"""Sampling a density that can only be evaluated: targets, paths, moves, one annealing loop, and honest draws."""

from undrift.density.anneal import (
    AIS,
    MCMC,
    SMC,
    AnnealedLangevin,
    Annealing,
    DilationLangevin,
    ImportanceSampling,
    Langevin,
    anneal,
)
from undrift.density.coordinates import Affine, Coordinates, Laplace
from undrift.density.draws import Draws
from undrift.density.method import Method
from undrift.density.move import HMC, MALA, ULA, Cycle, Independence, Move, Underdamped
from undrift.density.parameters import Parameters, ordered
from undrift.density.path import Dilation, Direct, Geometric, Normal, Path, StudentT, TemperedDilation, Tilt
from undrift.density.schedule import AdaptiveLevels, FixedLevels, Levels, Resampling
from undrift.density.step import Adapted, FixedStep, ScoreNorm, SignalToNoise, Smoothness, StepRule
from undrift.density.target import AffineTarget, Evaluations, Point, Target, TargetError

__all__ = [
    "AIS",
    "HMC",
    "MALA",
    "MCMC",
    "SMC",
    "ULA",
    "Adapted",
    "AdaptiveLevels",
    "Affine",
    "AffineTarget",
    "AnnealedLangevin",
    "Annealing",
    "Coordinates",
    "Cycle",
    "Dilation",
    "DilationLangevin",
    "Direct",
    "Draws",
    "Evaluations",
    "FixedLevels",
    "FixedStep",
    "Geometric",
    "ImportanceSampling",
    "Independence",
    "Langevin",
    "Laplace",
    "Levels",
    "Method",
    "Move",
    "Normal",
    "Parameters",
    "Path",
    "Point",
    "Resampling",
    "ScoreNorm",
    "SignalToNoise",
    "Smoothness",
    "StepRule",
    "StudentT",
    "Target",
    "TargetError",
    "TemperedDilation",
    "Tilt",
    "Underdamped",
    "anneal",
    "ordered",
]

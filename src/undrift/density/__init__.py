"""Sampling a density that can only be evaluated: targets, paths, moves, one annealing loop, and honest draws."""

from undrift.density.affine import AffineTarget
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
from undrift.density.auto import Auto, Survey, survey
from undrift.density.bounds import Bounds, bounds
from undrift.density.controlled import CMCD, DDS, DIS, PDDS, PIS, Bridge, Controlled, Trained, TrainedSampler
from undrift.density.coordinates import Affine, Coordinates, Laplace
from undrift.density.draws import Draws
from undrift.density.law import Normal, StudentT
from undrift.density.method import Method
from undrift.density.monte_carlo import MonteCarloDenoiser
from undrift.density.move import HMC, MALA, ULA, Cycle, Independence, Move, Underdamped
from undrift.density.parameters import Parameters, ordered
from undrift.density.path import Dilation, Direct, Geometric, Path, TemperedDilation, Tilt
from undrift.density.reverse_diffusion import ReverseDiffusion, matched_prior
from undrift.density.schedule import AdaptiveLevels, FixedLevels, Levels, Resampling
from undrift.density.step import Adapted, FixedStep, ScoreNorm, SignalToNoise, Smoothness, StepRule
from undrift.density.target import Evaluations, Point, Target, TargetError
from undrift.density.tempering import ParallelTempering
from undrift.density.trust import verdict, warnings
from undrift.density.variational import MeanField

__all__ = [
    "AIS",
    "CMCD",
    "DDS",
    "DIS",
    "HMC",
    "MALA",
    "MCMC",
    "PDDS",
    "PIS",
    "SMC",
    "ULA",
    "Adapted",
    "AdaptiveLevels",
    "Affine",
    "AffineTarget",
    "AnnealedLangevin",
    "Annealing",
    "Auto",
    "Bounds",
    "Bridge",
    "Controlled",
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
    "MeanField",
    "Method",
    "MonteCarloDenoiser",
    "Move",
    "Normal",
    "ParallelTempering",
    "Parameters",
    "Path",
    "Point",
    "Resampling",
    "ReverseDiffusion",
    "ScoreNorm",
    "SignalToNoise",
    "Smoothness",
    "StepRule",
    "StudentT",
    "Survey",
    "Target",
    "TargetError",
    "TemperedDilation",
    "Tilt",
    "Trained",
    "TrainedSampler",
    "Underdamped",
    "anneal",
    "bounds",
    "matched_prior",
    "ordered",
    "survey",
    "verdict",
    "warnings",
]

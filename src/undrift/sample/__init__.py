"""How to get back: samplers as tables, the grids they step on, and the loop that runs them."""

from undrift.sample.euler import EulerMaruyama, Heun
from undrift.sample.exponential import Ancestral, DPMSolver2M, Exponential
from undrift.sample.flow import ProbabilityFlow
from undrift.sample.grid import (
    Cosine,
    Given,
    Grid,
    Interpolated,
    LogSigma,
    Published,
    Quadratic,
    Rho,
    Tangent,
    Uniform,
)
from undrift.sample.particles import Particles
from undrift.sample.plan import Plan, Sampler, TableSampler
from undrift.sample.replace import Replace
from undrift.sample.run import Trajectory, sample
from undrift.sample.splitting import SSCS
from undrift.sample.twisted import twisted

__all__ = [
    "SSCS",
    "Ancestral",
    "Cosine",
    "DPMSolver2M",
    "EulerMaruyama",
    "Exponential",
    "Given",
    "Grid",
    "Heun",
    "Interpolated",
    "LogSigma",
    "Particles",
    "Plan",
    "ProbabilityFlow",
    "Published",
    "Quadratic",
    "Replace",
    "Rho",
    "Sampler",
    "TableSampler",
    "Tangent",
    "Trajectory",
    "Uniform",
    "sample",
    "twisted",
]

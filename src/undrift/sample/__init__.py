"""How to get back: samplers as tables, the grids they step on, and the loop that runs them."""

from undrift.sample.euler import EulerMaruyama, Heun
from undrift.sample.exponential import Ancestral, DPMSolver2M, Exponential
from undrift.sample.flow import ProbabilityFlow
from undrift.sample.grid import Given, Grid, LogSigma, Quadratic, Rho, Uniform
from undrift.sample.plan import Plan, Sampler, TableSampler
from undrift.sample.run import Trajectory, sample
from undrift.sample.splitting import SSCS

__all__ = [
    "SSCS",
    "Ancestral",
    "DPMSolver2M",
    "EulerMaruyama",
    "Exponential",
    "Given",
    "Grid",
    "Heun",
    "LogSigma",
    "Plan",
    "ProbabilityFlow",
    "Quadratic",
    "Rho",
    "Sampler",
    "TableSampler",
    "Trajectory",
    "Uniform",
    "sample",
]

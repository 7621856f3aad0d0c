"""Know a sampler's error before running it, and optimise schedules and processes for few steps."""

from undrift.design.bounds import exponential_worst_case, moment_bound, path_bounds, rho_factor, score_bound
from undrift.design.budget import Budget, budget
from undrift.design.curves import DataModel, MixtureCurve
from undrift.design.gaussian import Law, inputs, propagate, reference, strangeness, trajectory
from undrift.design.loss import LossCurve
from undrift.design.mixture import Outcome, outcome
from undrift.design.optimise import Design, family, optimise
from undrift.design.path import chain_kl, path_steps, start_kl
from undrift.design.probe import Probe, probe, probe_sampler
from undrift.design.schedule import (
    Schedule,
    every_budget,
    from_density,
    from_loss_curve,
    path_kl,
    step_density,
)
from undrift.design.score_error import Bias, Noise, Relative, ScoreError
from undrift.design.search import search
from undrift.design.spectrum import Spectrum
from undrift.design.training import (
    gradient_variance,
    max_ratio,
    measure_levels,
    noise_levels,
    residual_balance,
    sampling_weight,
)

__all__ = [
    "Bias",
    "Budget",
    "DataModel",
    "Design",
    "Law",
    "LossCurve",
    "MixtureCurve",
    "Noise",
    "Outcome",
    "Probe",
    "Relative",
    "Schedule",
    "ScoreError",
    "Spectrum",
    "budget",
    "chain_kl",
    "every_budget",
    "exponential_worst_case",
    "family",
    "from_density",
    "from_loss_curve",
    "gradient_variance",
    "inputs",
    "max_ratio",
    "measure_levels",
    "moment_bound",
    "noise_levels",
    "optimise",
    "outcome",
    "path_bounds",
    "path_kl",
    "path_steps",
    "probe",
    "probe_sampler",
    "propagate",
    "reference",
    "residual_balance",
    "rho_factor",
    "sampling_weight",
    "score_bound",
    "search",
    "start_kl",
    "step_density",
    "strangeness",
    "trajectory",
]

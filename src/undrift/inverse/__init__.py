"""Posteriors of inverse problems on function spaces: Langevin, pCN and tempering with diffusion priors, and how far to
trust them.

    posterior = Posterior(DenoiserPrior(denoiser, space), Observation(operator, noise, y))
    chains = langevin(posterior, start, steps=5000, step=0.01)      # refuses a step that would be biased
    chains = pcn(posterior, start, steps=5000)                      # exact, where the prior's ratio is known
    particles = tempered(posterior, prior_draws)                    # right weights of several modes
"""

from undrift.inverse.calibration import Calibration, Coverage, calibrate
from undrift.inverse.chains import Chains
from undrift.inverse.gaussian import LinearGaussian, Scheme, Stationary, gaussian_kl, gaussian_w2
from undrift.inverse.langevin import TRUSTED, Annealing, langevin
from undrift.inverse.pcn import Proposal, pcn
from undrift.inverse.posterior import Likelihood, Posterior
from undrift.inverse.preconditioner import PosteriorInformed, Preconditioner, PriorCovariance, find_mode
from undrift.inverse.prior import DenoiserPrior, FieldMixture, Prior, RatioPrior
from undrift.inverse.step import StepReport, StepTooLarge, check_step, extremes
from undrift.inverse.tempered import LangevinMoves, PCNMoves, tempered

__all__ = [
    "TRUSTED",
    "Annealing",
    "Calibration",
    "Chains",
    "Coverage",
    "DenoiserPrior",
    "FieldMixture",
    "LangevinMoves",
    "Likelihood",
    "LinearGaussian",
    "PCNMoves",
    "Posterior",
    "PosteriorInformed",
    "Preconditioner",
    "Prior",
    "PriorCovariance",
    "Proposal",
    "RatioPrior",
    "Scheme",
    "Stationary",
    "StepReport",
    "StepTooLarge",
    "calibrate",
    "check_step",
    "extremes",
    "find_mode",
    "gaussian_kl",
    "gaussian_w2",
    "langevin",
    "pcn",
    "tempered",
]

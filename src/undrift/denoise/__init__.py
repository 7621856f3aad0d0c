"""What is out there: the posterior mean of the data given a noisy view of it, known in closed form or learned."""

from undrift.denoise.base import Denoiser
from undrift.denoise.closed_form import GaussianDenoiser, MixtureDenoiser
from undrift.denoise.empirical import EmpiricalDenoiser
from undrift.denoise.network import NetworkDenoiser

__all__ = ["Denoiser", "EmpiricalDenoiser", "GaussianDenoiser", "MixtureDenoiser", "NetworkDenoiser"]

"""Where diffusions live: arrays with white noise, and functions on a grid with noise that is a function."""

from undrift.space.basis import Basis, Cosine, Fourier, Sine
from undrift.space.clock import Blurring, HeatDissipation, ModalClock
from undrift.space.covariance import Covariance, EmpiricalSpectrum, HeatKernel, Matern, PowerLaw
from undrift.space.space import Coordinates, FunctionSpace, Space, White, space_of

__all__ = [
    "Basis",
    "Blurring",
    "Coordinates",
    "Cosine",
    "Covariance",
    "EmpiricalSpectrum",
    "Fourier",
    "FunctionSpace",
    "HeatDissipation",
    "HeatKernel",
    "Matern",
    "ModalClock",
    "PowerLaw",
    "Sine",
    "Space",
    "White",
    "space_of",
]

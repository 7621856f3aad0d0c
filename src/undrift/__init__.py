"""undrift: design a diffusion, learn it, and get back."""

from undrift.diffusion import Diffusion, NoiseDiffusion
from undrift.sample import sample

__version__ = "0.1.0"

__all__ = ["Diffusion", "NoiseDiffusion", "__version__", "sample"]

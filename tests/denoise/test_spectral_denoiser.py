"""Denoisers preconditioned mode by mode: in single precision, and inside what conditions them."""

import pytest
import torch

from undrift import Diffusion, sample
from undrift.denoise import ClassifierFree, FieldGaussian, Guided, Known, SpectralDenoiser
from undrift.modal_diffusion import ModalDiffusion
from undrift.networks.base import Network
from undrift.process import VP
from undrift.sample import Ancestral
from undrift.space import Cosine, FunctionSpace, Matern
from undrift.space.clock import Blurring


class Echo(Network):
    """Says back what it is shown, or a class of it."""

    def forward(self, x, label, y=None):
        return 0.1 * x if y is None else (1 + y.to(x)).reshape(-1, 1) * x


def test_smooth_data_are_learned_in_single_precision():
    """mu_j sigma^2 lambda_j of the highest modes is 1e-47, no number in float32; c_out and the target still are.

    Rounding: some units of 6e-8 in each mode, and of the transform.
    """
    space, data = FunctionSpace(Cosine(), Matern(3.0)), Matern(6.0)
    d, g = SpectralDenoiser(Echo(), space, data), torch.Generator().manual_seed(0)
    x = FieldGaussian(space, data).draw(4, (512,), g)
    xi = torch.empty(4, 512, dtype=torch.float64).normal_(generator=g)
    sigma = torch.tensor([0.002, 0.1, 1.0, 30.0], dtype=torch.float64)
    single = d.misfit(x.float(), sigma.float(), xi.float())
    torch.testing.assert_close(single.double(), d.misfit(x, sigma, xi), rtol=2e-6, atol=0)


def test_the_misfit_is_the_error_of_the_prediction_in_units_of_c_out():
    space, data = FunctionSpace(Cosine(), Matern(2.0)), Matern(3.0)
    d, g = SpectralDenoiser(Echo(), space, data), torch.Generator().manual_seed(1)
    x = FieldGaussian(space, data).draw(3, (16,), g)
    xi, sigma = torch.empty_like(x).normal_(generator=g), torch.tensor([0.05, 1.0, 20.0], dtype=torch.float64)
    noisy = d.scatter(x, sigma, xi)
    mu, noise = d.variances(x, sigma)
    miss = space.coefficients(d(noisy, sigma) - x)
    want = (mu * miss.square() * (mu + noise) / (mu * noise)).sum(1) / mu.sum()
    torch.testing.assert_close(d.misfit(x, sigma, xi), want, rtol=1e-8, atol=0)


def test_a_clock_of_modes_is_not_lost_in_what_goes_round_a_denoiser():
    space = FunctionSpace(Cosine(), Matern(2.0))
    d = SpectralDenoiser(Echo(), space, clock=Blurring())
    mask, values = torch.arange(8) < 3, torch.linspace(-1, 1, 8)
    for wrapped in (Known(d, mask, values), ClassifierFree(d)):
        with pytest.raises(ValueError, match="give it to a ModalDiffusion"):
            Diffusion(VP(), wrapped)
    with pytest.raises(ValueError, match="guidance is by one level"):
        Guided(d, lambda x, sigma, x0: -x0.square().sum(1))
    x = sample(ModalDiffusion(VP(), Known(d, mask, values)), 2, (8,), Ancestral(4), 0)
    torch.testing.assert_close(x[:, :3], values[:3].expand(2, 3), rtol=0, atol=1e-5)
    y = torch.tensor([0, 1])
    free, alone = (sample(ModalDiffusion(VP(), m), 2, (8,), Ancestral(4), 0, y=y) for m in (ClassifierFree(d, 1.0), d))
    torch.testing.assert_close(free, alone, rtol=0, atol=0)

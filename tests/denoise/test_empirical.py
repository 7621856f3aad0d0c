"""The denoiser of a finite data set: against the formula written out, and where that formula is hard to compute."""

import math
import subprocess
import sys

import pytest
import torch

from undrift.denoise import EmpiricalDenoiser, MixtureDenoiser


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(seed))


def written_out(data, x, sigma):
    distance = (x.flatten(1)[:, None] - data.flatten(1)[None]).square().sum(-1)
    weights = (-0.5 * distance / torch.as_tensor(sigma).reshape(-1, 1) ** 2).softmax(-1)
    return (weights @ data.flatten(1)).reshape(x.shape)


@pytest.mark.parametrize("chunk", [1, 7, 100, 1000])
@pytest.mark.parametrize("sigma", [1e-3, 0.1, 1.0, 1e3])
def test_equals_the_formula_whatever_the_chunk(chunk, sigma):
    data, x = normal(100, 2, 3, seed=1), normal(11, 2, 3, seed=2)
    got = EmpiricalDenoiser(data, chunk)(x, sigma)
    atol = 1e-12 + 2e-14 / sigma**2  # rounding of logits of size |y|^2 / sigma^2, with |y|^2 up to 20
    torch.testing.assert_close(got, written_out(data, x, sigma), rtol=0, atol=atol)


def test_equals_the_mixture_of_points_with_one_sigma_per_sample():
    data, x = normal(50, 3, seed=3), normal(9, 3, seed=4)
    sigma = torch.logspace(-1, 1, 9, dtype=torch.float64)
    mixture, empirical = MixtureDenoiser(torch.ones(50), data, 0.0), EmpiricalDenoiser(data, 16)
    torch.testing.assert_close(empirical(x, sigma), mixture(x, sigma), rtol=0, atol=1e-11)
    torch.testing.assert_close(empirical.log_prob(x, sigma), mixture.log_prob(x, sigma), rtol=0, atol=1e-11)
    torch.testing.assert_close(empirical.score(x, sigma), mixture.score(x, sigma), rtol=0, atol=1e-9)


def test_jacobian_passes_through_the_chunks():
    """The Jacobian of a posterior mean is the posterior covariance / sigma^2; the score is the gradient of log_prob."""
    data, sigma = normal(40, 3, seed=5), 0.8
    denoiser, x = EmpiricalDenoiser(data, 9), normal(1, 3, seed=6)
    jacobian = torch.autograd.functional.jacobian(lambda v: denoiser(v, sigma), x)[0, :, 0]
    w = (-0.5 * (x - data).square().sum(-1) / sigma**2).softmax(0)
    centred = data - w @ data
    torch.testing.assert_close(jacobian, (centred.T * w) @ centred / sigma**2, rtol=0, atol=1e-12)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(denoiser.log_prob(x, sigma).sum(), x)
    torch.testing.assert_close(gradient, denoiser.score(x, sigma), rtol=0, atol=1e-12)


def test_small_sigma_needs_float64_and_has_it():
    """Two neighbours among float32 images: the weights follow a distance that float32 cannot see in the norms."""
    base = 1 + 0.1 * normal(1, 28, 28, seed=7).float()
    other = base.clone()
    other[0, 3, 3] += 0.02
    data, sigma = torch.stack([base, other]), 1e-2
    x = (base + 0.25 * (other - base)).unsqueeze(0)
    weight = (EmpiricalDenoiser(data)(x.double(), sigma) - base).flatten().max() / (other - base).max()
    gap = (other - base).double().square().sum() / sigma**2
    assert float(weight) == pytest.approx(float(torch.sigmoid(-0.25 * gap)), abs=1e-4)
    half_norms, products = 0.5 * data.flatten(1).square().sum(-1), data.flatten(1) @ x.flatten()
    in_float32 = ((products - half_norms) / sigma**2).softmax(0)[1]
    assert abs(float(in_float32) - float(weight)) > 1e-2


def test_at_zero_noise_it_is_the_nearest_point():
    data, x = normal(30, 4, seed=8), normal(10, 4, seed=9)
    nearest = data[torch.cdist(x, data).argmin(1)]
    torch.testing.assert_close(EmpiricalDenoiser(data, 7)(x, 0.0), nearest, rtol=0, atol=1e-15)


def test_samples_are_data():
    data = normal(30, 4, seed=8)
    drawn = EmpiricalDenoiser(data).sample(200, torch.Generator().manual_seed(0))
    assert drawn.shape == (200, 4)
    assert bool((drawn[:, None] == data).all(-1).any(-1).all())
    assert len(drawn.unique(dim=0)) > 25


MEMORY = """
import resource, torch
from undrift.denoise import EmpiricalDenoiser
data = torch.empty(60_000, 1, 28, 28).normal_(generator=torch.Generator().manual_seed(0))
denoiser = EmpiricalDenoiser(data)
denoiser(data[:2].double(), 0.3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = denoiser(data[:256] + 0.5, 0.3)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, float((out - data[:256]).abs().max()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
def test_sixty_thousand_images_fit_in_memory():
    """All pairwise distances would take 123 MB and a float64 copy of the data 376 MB; a chunk takes a few."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    grown_kb, error = done.stdout.split()
    assert int(grown_kb) < 60_000
    assert float(error) < 1e-6


BAD = [
    (lambda: EmpiricalDenoiser(torch.zeros(0, 3)), r"shape \(N, \*event\), N >= 1, got \(0, 3\)"),
    (lambda: EmpiricalDenoiser(torch.zeros(3, dtype=torch.float64)), r"shape \(N, \*event\)"),
    (lambda: EmpiricalDenoiser(torch.zeros(3, 2, dtype=torch.uint8)), r"must be floating point.*got torch.uint8"),
    (lambda: EmpiricalDenoiser(torch.zeros(3, 2), chunk=0), r"chunk must be at least 1, got 0"),
    (lambda: EmpiricalDenoiser(torch.tensor([[0.0], [math.inf]])), r"data must be finite; point 1 is not"),
    (
        lambda: EmpiricalDenoiser(torch.zeros(3, 2))(torch.zeros(2, 3), 1.0),
        r"with 2 coordinates an event.*got \(2, 3\)",
    ),
    (lambda: EmpiricalDenoiser(torch.zeros(3, 2)).log_prob(torch.zeros(2, 2), 0.0), r"a density only for sigma > 0"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()

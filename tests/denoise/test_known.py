"""A known part walks its exact path; what is predicted from it is exact where it should be, and biased where it must.

With Gaussian data a step of a plan is affine in the state, so its map is found by asking the denoiser at the unit
vectors, and laws are carried to the end without a sample drawn.
"""

import pytest
import torch

from undrift.denoise import GaussianDenoiser, Known
from undrift.diffusion import Diffusion
from undrift.process import CLD, PSLD, VP
from undrift.sample import Ancestral, sample

PROCESSES = pytest.mark.parametrize("process", [VP(), CLD(), PSLD()], ids=lambda p: type(p).__name__)
MASK = torch.tensor([True, False])


def walk(process, denoiser, mean, cov, steps=12):
    """Mean (K, 2) and covariance (2 K, 2 K) of the state after every row, from those at the start."""
    plan, diffusion = Ancestral(steps).plan(process), Diffusion(process, denoiser)
    k, readings = process.channels, diffusion.reading(plan.times)
    mean, eye, out = mean.flatten(), torch.eye(2 * k, dtype=torch.float64), []
    for i in range(plan.calls):

        def step(z, i=i):
            z = z.reshape(-1, k, 2)
            said = diffusion.read(z, readings[i])  # (n, 1, 2)
            kept = torch.einsum("kl,nle->nke", plan.A[i, 0], z)
            return (kept + plan.B[i, 0][:, :1] * said).flatten(1)

        offset = step(torch.zeros_like(eye[:1]))
        matrix = (step(eye) - offset).T
        noise = torch.kron(plan.L[i], torch.eye(2).double())
        mean, cov = matrix @ mean + offset[0], matrix @ cov @ matrix.T + noise @ noise.T
        out.append((plan.after[i], mean.reshape(k, 2), cov))
    return out


def start(process, value):
    """The known part by its kernel, the unknown by the prior, independent."""
    mean, root = process.kernel(torch.tensor(process.horizon, dtype=torch.float64))
    first, prior = root @ root.T, process.prior()
    cov = torch.kron(first, torch.diag(torch.tensor([1.0, 0.0]).double()))
    cov += torch.kron(prior @ prior.T, torch.diag(torch.tensor([0.0, 1.0]).double()))
    return torch.stack([mean * value, torch.zeros_like(mean)], -1), cov


@PROCESSES
def test_the_known_part_has_the_kernels_law_at_every_time(process):
    """Of all channels, at the time after the step; whatever the data, here strongly correlated."""
    data = GaussianDenoiser(torch.tensor([0.4, -0.2]), torch.tensor([[1.0, 0.9], [0.9, 1.0]]).double())
    for t, mean, cov in walk(process, Known(data, MASK, torch.tensor([1.5, torch.nan])), *start(process, 1.5)):
        m, root = process.kernel(t) if t > 0 else (torch.eye(process.channels).double()[0], None)
        if t == 0:  # what the last row leaves is the prediction: the known data themselves
            assert float(mean[0, 0]) == 1.5
            assert float(cov[0, 0]) == 0.0
            continue
        torch.testing.assert_close(mean[:, 0], 1.5 * m, rtol=0, atol=1e-10)
        want = root @ root.T
        torch.testing.assert_close(cov[::2, ::2], want, rtol=0, atol=1e-10 * float(want.abs().max()))


@PROCESSES
def test_independent_coordinates_are_exact(process):
    """The unknown coordinate walks as it would alone, unmoved by the known one."""
    data = GaussianDenoiser(torch.tensor([0.4, -0.2]), torch.tensor([0.5, 1.3]))
    given = walk(process, Known(data, MASK, torch.tensor([1.5, 0.0])), *start(process, 1.5))
    alone = walk(process, data, *start(process, 1.5))
    for (_, mean, cov), (_, want_mean, want_cov) in zip(given, alone, strict=True):
        scale = float(want_cov.abs().max())
        torch.testing.assert_close(mean[:, 1], want_mean[:, 1], rtol=0, atol=1e-12)
        torch.testing.assert_close(cov[1::2, 1::2], want_cov[1::2, 1::2], rtol=0, atol=1e-12 * scale)
        torch.testing.assert_close(cov[::2, 1::2], torch.zeros_like(cov[::2, 1::2]), rtol=0, atol=1e-12 * scale)


def test_dependent_coordinates_are_biased_however_fine_the_steps():
    """Correlation 0.9, x_1 = 1.5: the mean of x_2 should be 1.35 and its variance 0.19."""
    data = GaussianDenoiser(torch.zeros(2), torch.tensor([[1.0, 0.9], [0.9, 1.0]]).double())
    found = [
        walk(VP(), Known(data, MASK, torch.tensor([1.5, 0.0])), *start(VP(), 1.5), steps)[-1] for steps in (50, 200)
    ]
    (_, coarse, wide), (_, fine, wider) = found
    assert 0.85 < float(coarse[0, 1]) < float(fine[0, 1]) < 0.95  # settles near 0.94
    assert 0.3 < float(wide[1, 1]) < float(wider[1, 1]) < 0.36


def test_values_travel_with_the_samples():
    values = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    data = GaussianDenoiser(torch.zeros(2), 1.0)
    x = sample(Diffusion(CLD(), Known(data, MASK)), 3, (2,), Ancestral(5), seed=0, batch=2, known=values)
    torch.testing.assert_close(x[:, 0], values[:, 0].float(), rtol=0, atol=0)


def test_what_cannot_be_used_is_refused():
    data, x = GaussianDenoiser(torch.zeros(2), 1.0), torch.zeros(3, 2)
    with pytest.raises(ValueError, match="0 \\(unknown\\) and 1 \\(known\\)"):
        Known(data, torch.tensor([0.5, 1.0]), torch.zeros(2))
    with pytest.raises(ValueError, match="must be finite"):
        Known(data, MASK, torch.tensor([torch.nan, 0.0]))
    with pytest.raises(ValueError, match="must be finite"):
        Known(data, MASK)(x, 1.0, known=torch.tensor([torch.nan, 0.0]))
    with pytest.raises(ValueError, match="no values"):
        Known(data, MASK)(x, 1.0)
    with pytest.raises(ValueError, match="must broadcast"):
        Known(data, MASK, torch.zeros(4, 2))(x, 1.0)

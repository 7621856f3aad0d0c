"""Spectra: read off data, joined, and what their data's noisy points know, against quadrature."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.integrate import quad
from tests.process.cases import normal

from undrift.denoise import GaussianDenoiser
from undrift.design.gaussian import propagate
from undrift.design.spectrum import Spectrum
from undrift.process import PSLD, VE
from undrift.sample import Ancestral, DPMSolver2M, Exponential, Rho


def _points(n: int, d: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return normal(g, n, d) @ normal(g, d, d) + normal(g, d)


@pytest.mark.parametrize("n", [40, 5, 6, 2])
def test_pca_is_the_covariance_in_its_own_eigenvectors(n):
    """Also with fewer points than coordinates: the same eigenvalues, the rest zero, and the mean keeps its length."""
    d = 6
    x = _points(n, d)
    spectrum = Spectrum.of(x)
    values, vectors = torch.linalg.eigh(x.T.cov())
    values = values.flip(0).clamp(min=0)
    assert torch.allclose(spectrum.variance, values, atol=1e-12 * float(values[0]))
    assert int((spectrum.variance > 1e-12 * values[0]).sum()) == min(n - 1, d)
    assert spectrum.dim == d
    assert float(spectrum.mean.square().sum()) == pytest.approx(float(x.mean(0).square().sum()), rel=1e-12)
    known = spectrum.variance > 1e-12 * values[0]
    along = (vectors.T @ x.mean(0)).flip(0).abs()
    assert torch.allclose(spectrum.mean.abs()[known], along[known], atol=1e-12)


@pytest.mark.parametrize("shape", [(12,), (4, 6), (2, 4, 4)])
def test_fft_is_exact_for_stationary_data(shape):
    """All cyclic shifts of one picture: a circulant covariance, whose eigenvectors are the plane waves."""
    g = torch.Generator().manual_seed(1)
    axes = tuple(range(max(0, len(shape) - 2), len(shape)))
    x = normal(g, *shape) + 0.3
    shifts = [x]
    for axis in axes:
        shifts = [s.roll(k, axis) for s in shifts for k in range(shape[axis])]
    x = torch.stack(shifts)
    fft, pca = Spectrum.of(x, "fft"), Spectrum.of(x)
    if len(shape) < 3:  # channels are not shifted: between them the covariance is not diagonal
        assert torch.allclose(fft.variance, pca.variance, atol=1e-12 * float(pca.variance[0]))
    assert float(fft.variance.sum()) == pytest.approx(float(pca.variance.sum()), rel=1e-12)
    assert fft.second_moment == pytest.approx(pca.second_moment, rel=1e-12)
    whole = x.flatten(1)
    n = len(whole)
    squares = (whole - whole.mean(0)).square().sum() / (n - 1) + whole.mean(0).square().sum()
    assert fft.second_moment == pytest.approx(float(squares), rel=1e-12)


def test_fft_of_any_data_is_the_diagonal_of_the_covariance_among_plane_waves():
    x = _points(30, 8)
    waves = torch.fft.fft(torch.eye(8, dtype=torch.float64), norm="ortho")
    diagonal = (waves @ x.T.cov().to(waves) @ waves.conj().T).diagonal().real
    assert torch.allclose(Spectrum.of(x, "fft").variance, diagonal.sort(descending=True).values, rtol=1e-12)


def test_grouped_keeps_trace_and_moments_and_nearly_the_law():
    """Joining eigenvalues within a factor exp(ln(1024^2) / 63) = 1.25 moves KL and W2 by second-order terms of it."""
    g = torch.Generator().manual_seed(0)
    whole = Spectrum.power_law(1024)
    whole = Spectrum(whole.variance, 0.1 * normal(g, 1024))
    few = whole.grouped(64)
    assert len(few.variance) <= 64
    assert few.dim == whole.dim
    assert few.second_moment == pytest.approx(whole.second_moment, rel=1e-12)
    assert float((few.count * few.variance).sum()) == pytest.approx(float(whole.variance.sum()), rel=1e-12)
    assert bool((few.variance.diff() < 0).all())
    for process, sampler in [(VE(), Exponential(10, Rho(), order=1)), (PSLD(), Ancestral(10, final="none"))]:
        plan = sampler.plan(process)
        one, other = propagate(plan, whole), propagate(plan, few)
        assert float(other.w2) == pytest.approx(float(one.w2), rel=2e-3)
        assert float(other.kl) == pytest.approx(float(one.kl), rel=5e-2)
    assert whole.grouped(1024) is whole


def test_grouped_counts_repeated_eigenvalues_exactly():
    """Eigenvalues that are equal are one problem: the law of the groups is that of the whole."""
    values = torch.tensor([4.0, 0.01, 4.0, 0.01, 0.01, 0.5])
    whole = Spectrum(values, torch.tensor([0.3, -0.2, 0.3, 0.2, -0.2, 0.1]))
    few = whole.grouped(5)
    assert few.variance.tolist() == pytest.approx([4.0, 0.5, 0.01], rel=1e-6)
    assert few.count.tolist() == [2, 1, 3]
    plan = DPMSolver2M(6).plan(VE())
    assert float(propagate(plan, few).kl) == pytest.approx(float(propagate(plan, whole).kl), rel=1e-9)
    assert float(propagate(plan, few).w2) == pytest.approx(float(propagate(plan, whole).w2), rel=1e-9)
    zero = Spectrum(torch.tensor([1.0, 0.0, 0.0, 1e-16])).grouped(2)
    assert zero.count.tolist() == [1, 3]
    assert Spectrum(torch.zeros(3)).grouped(2).variance.tolist() == [0.0]


@pytest.mark.parametrize("size", [1, 4, 9])
def test_images_are_the_full_grid_of_wave_vectors_joined(size):
    spectrum = Spectrum.images(size, exponent=2.6, mean_variance=0.3)
    k = [(i if i <= (size - 1) // 2 else i - size) for i in range(size)]
    power = torch.tensor([(a * a + b * b + 0.5) ** -1.3 for a in k for b in k], dtype=torch.float64)
    power = (power * (0.3 / power.mean())).sort(descending=True).values
    joined = spectrum.variance.repeat_interleave(spectrum.count.long())
    assert spectrum.dim == size**2
    assert torch.allclose(joined, power, rtol=1e-13)


def test_mmse_is_the_error_of_the_best_denoiser():
    """By Gauss-Hermite quadrature of x0 and of the noise, exact for squares of linear functions."""
    spectrum = Spectrum(torch.tensor([4.0, 0.3, 0.0]), torch.tensor([0.5, -0.7, 0.2]), torch.tensor([1.0, 3.0, 2.0]))
    nodes = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    x0, noise = torch.cartesian_prod(nodes, nodes).T
    sigma = torch.tensor([0.05, 0.8, 20.0], dtype=torch.float64)
    expected = []
    for s in sigma:
        clean = spectrum.mean + spectrum.variance.sqrt() * x0.unsqueeze(-1)
        guess = spectrum.denoiser()(clean + s * noise.unsqueeze(-1), s.expand(4))
        expected.append((spectrum.count * (guess - clean).square().mean(0)).sum())
    assert torch.allclose(spectrum.mmse(sigma), torch.stack(expected), rtol=1e-12)
    ends = spectrum.mmse(torch.tensor([0.0, math.inf]))
    assert ends.tolist() == [0.0, pytest.approx(4.0 + 0.9)]


def test_information_is_the_integral_of_mmse_over_snr():
    spectrum = Spectrum.power_law(16)
    for low, high in [(0.002, 80.0), (0.1, 0.5), (3.0, math.inf)]:
        # d snr = 2 / sigma^2 d(-ln sigma)
        integral = quad(
            lambda s: float(spectrum.mmse(torch.tensor(s, dtype=torch.float64).exp())) * 2 * math.exp(-2 * s),
            math.log(low),
            math.log(min(high, 1e6)),
            limit=200,
        )[0]
        got = spectrum.information(*torch.tensor([low, high], dtype=torch.float64))
        # Above 1e6 there are left d mean_variance / 1e12 nats.
        assert float(got) == pytest.approx(integral, rel=1e-9)


def test_denoiser_of_the_data_and_of_its_spectrum_agree():
    """PCA turns the full covariance into one coordinate per eigenvalue: rotated, the denoisers are the same."""
    x = _points(50, 5)
    spectrum = Spectrum.of(x)
    vectors = torch.linalg.eigh((x - x.mean(0)).T @ (x - x.mean(0)) / 49)[1].flip(-1)
    noisy, sigma = x[:7] + 0.3, torch.full((7,), 0.6, dtype=torch.float64)
    full = GaussianDenoiser(x.mean(0), x.T.cov())(noisy, sigma)
    assert torch.allclose(spectrum.denoiser()(noisy @ vectors, sigma) @ vectors.T, full, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Spectrum(torch.eye(2)), "list of eigenvalues"),
        (lambda: Spectrum(torch.zeros(0)), "list of eigenvalues"),
        (lambda: Spectrum(torch.tensor([1.0, -1e-3])), "not negative"),
        (lambda: Spectrum(torch.tensor([1.0, math.inf])), "finite"),
        (lambda: Spectrum(torch.ones(2), torch.ones(3)), "mean must be"),
        (lambda: Spectrum(torch.ones(2), 0.0, torch.tensor([1.0, 0.0])), "counts must be positive"),
        (lambda: Spectrum(torch.ones(2), math.nan), "mean must be finite"),
        (lambda: Spectrum.power_law(0), "dim >= 1"),
        (lambda: Spectrum.images(0), "size >= 1"),
        (lambda: Spectrum.of(torch.ones(1, 3)), "n >= 2"),
        (lambda: Spectrum.of(torch.tensor([[1.0, math.nan], [0.0, 1.0]])), "finite"),
        (lambda: Spectrum.of(torch.ones(3, 2), "dct"), "'pca' or 'fft'"),
        (lambda: Spectrum.power_law(4).grouped(1), "at least 2"),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()

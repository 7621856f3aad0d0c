"""Posteriors of Gaussians and mixtures under linear observations: by quadrature, by Bayes' formula, and degenerate."""

from __future__ import annotations

import math

import pytest
import torch

from undrift._linalg import gauss_legendre
from undrift.denoise import GaussianDenoiser, MixtureDenoiser

F64 = torch.float64


def grid(low, high, panels, order=16):
    """Gauss-Legendre points and weights on [low, high]."""
    u, w = gauss_legendre(order)
    edges = torch.linspace(low, high, panels + 1, dtype=F64)
    width = edges.diff().unsqueeze(-1)
    return (edges[:-1].unsqueeze(-1) + width * u).flatten(), (width * w).flatten()


def mixture():
    covs = torch.tensor([[[0.5, 0.3], [0.3, 0.4]], [[0.2, -0.1], [-0.1, 0.6]], [[0.1, 0.0], [0.0, 0.1]]], dtype=F64)
    means = torch.tensor([[0.5, -0.4], [-1.0, 0.8], [1.0, 1.0]], dtype=F64)
    return MixtureDenoiser(torch.tensor([1.0, 2.0, 0.5], dtype=F64), means, covs)


def test_a_mixture_in_the_plane_by_quadrature():
    """p(x) p(y | x) on 160 000 points: evidence, density of the posterior, and its mean, to 1e-10."""
    prior = mixture()
    a = torch.tensor([[1.0, 0.5], [-0.3, 2.0]], dtype=F64)
    noise = torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=F64)
    y = torch.tensor([0.7, -0.2], dtype=F64)
    u, w = grid(-7, 7, 25)
    x = torch.cartesian_prod(u, u)
    weight = (w.unsqueeze(-1) * w).flatten()
    root = torch.linalg.cholesky(noise)
    white = torch.linalg.solve_triangular(root, (y - x @ a.T).T, upper=False)
    log_p = -0.5 * white.square().sum(0) - math.log(2 * math.pi) - root.diagonal().log().sum()
    log_joint = prior.log_prob(x) + log_p
    evidence = float((weight * log_joint.exp()).sum())
    assert prior.log_evidence(a, noise, y) == pytest.approx(math.log(evidence), abs=1e-10)
    posterior = prior.posterior(a, noise, y)
    assert float((posterior.log_prob(x).exp() - log_joint.exp() / evidence).abs().max()) < 1e-10
    exact = (weight.unsqueeze(-1) * log_joint.exp().unsqueeze(-1) * x).sum(0) / evidence
    assert torch.allclose(posterior.weights @ posterior.means / posterior.weights.sum(), exact, atol=1e-10)


@pytest.mark.parametrize("kind", ["number", "diagonal", "full"])
def test_a_gaussian_by_the_textbook(kind):
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, generator=generator, dtype=F64)
    mean, a = torch.randn(2, 2, generator=generator, dtype=F64), torch.randn(3, 4, generator=generator, dtype=F64)
    y = torch.randn(3, generator=generator, dtype=F64)
    noise = {"number": torch.tensor(0.3), "diagonal": torch.tensor([0.1, 0.4, 0.2]), "full": None}[kind]
    if noise is None:
        r = torch.randn(3, 3, generator=generator, dtype=F64)
        noise = full = r @ r.T
    else:
        full = torch.diag(noise.double().expand(3))
    cov = {"number": torch.tensor(0.7), "diagonal": torch.tensor([[0.1, 0.4], [0.2, 0.0]])}.get(kind, root @ root.T)
    c = cov if cov.shape == (4, 4) else torch.diag(cov.double().flatten().expand(4))
    prior = GaussianDenoiser(mean, cov)
    g = a @ c @ a.T + full
    gain = c @ a.T @ torch.linalg.inv(g)
    residual = y - a @ mean.flatten()
    posterior = prior.posterior(a, noise, y)
    assert posterior.mean.shape == mean.shape
    assert torch.allclose(posterior.mean.flatten(), mean.flatten() + gain @ residual, atol=1e-7)
    assert torch.allclose(posterior.cov, c - gain @ a @ c, atol=1e-7)
    log_p = torch.distributions.MultivariateNormal(torch.zeros(3, dtype=F64), g).log_prob(residual)
    assert prior.log_evidence(a, noise, y) == pytest.approx(float(log_p), rel=1e-7)


def test_data_on_a_line_stay_on_it():
    """One factor: x = mu + f s, s ~ N(0, 1), is a problem of one number, and a covariance of rank 1."""
    f, mu = torch.tensor([1.0, -2.0, 0.5], dtype=F64), torch.tensor([0.1, 0.2, 0.3], dtype=F64)
    a, noise, y = torch.tensor([[1.0, 1.0, 0.0]], dtype=F64), 1e-8, torch.tensor([0.9], dtype=F64)
    posterior = GaussianDenoiser(mu, torch.outer(f, f)).posterior(a, noise, y)
    slope = float(a @ f)
    precision = 1 + slope**2 / noise
    s = slope / noise * (0.9 - float(a @ mu)) / precision
    assert torch.allclose(posterior.mean, mu + f * s, atol=1e-12)
    # eigh leaves f f' to 1e-16 of its size, a standard deviation of 1e-8 that no observation shrinks
    assert torch.allclose(posterior.cov, torch.outer(f, f) / precision, atol=1e-14)


def test_exact_observations_and_ruled_out_modes():
    """Without noise the observed direction is known; modes of no weight keep their places."""
    means = torch.tensor([[0.0, 0.0], [100.0, 100.0]], dtype=F64)
    prior = MixtureDenoiser(torch.ones(2), means, torch.tensor([0.5, 0.5]))
    posterior = prior.posterior(torch.tensor([[1.0, 0.0]]), 0.0, torch.tensor([0.25]))
    assert torch.allclose(posterior.means[0], torch.tensor([0.25, 0.0], dtype=F64))
    assert torch.allclose(posterior.covs[0], torch.diag(torch.tensor([0.0, 0.5], dtype=F64)), atol=1e-15)
    assert posterior.weights[1] < 1e-300
    two = prior.posterior(torch.eye(2)[:1], 0.1, torch.tensor([0.25])).posterior(
        torch.eye(2)[1:], 0.2, torch.tensor([1.0])
    )
    at_once = prior.posterior(torch.eye(2), torch.tensor([0.1, 0.2]), torch.tensor([0.25, 1.0]))
    assert torch.allclose(two.means, at_once.means, atol=1e-12)
    assert torch.allclose(two.covs, at_once.covs, atol=1e-12)


BAD = [
    (lambda: mixture().posterior(torch.ones(1, 3), 0.1, torch.ones(1)), r"A must have shape \(m, 2\)"),
    (lambda: mixture().posterior(torch.ones(1, 2), 0.1, torch.ones(2)), r"got \(1, 2\) and \(2,\)"),
    (lambda: mixture().posterior(torch.ones(1, 2), torch.ones(3), torch.ones(1)), "noise_cov must be a number"),
    (lambda: mixture().posterior(torch.ones(1, 2), -0.1, torch.ones(1)), "positive semi-definite"),
    (lambda: mixture().posterior(torch.ones(2, 2), 0.0, torch.ones(2)), "y has no density"),
    (lambda: mixture().posterior(torch.ones(1, 2), 0.1, torch.tensor([math.nan])), "must be finite"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_observations_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""Potentials of observations: exact on Gaussian data and every space, dense or not; at no noise the likelihood."""

import dataclasses

import pytest
import torch

from undrift.denoise import (
    GaussianDenoiser,
    Guided,
    Linearised,
    MixtureDenoiser,
    PointEstimate,
    PseudoInverse,
    TweedieMoments,
)
from undrift.denoise import potentials as module
from undrift.diffusion import Diffusion
from undrift.observe import CorrelatedNoise, Darcy1d, GaussianNoise, LaplaceNoise, Matrix, Observation, PhaseRetrieval
from undrift.process import CLD, PSLD, VP
from undrift.sample import Ancestral, sample
from undrift.space import Cosine, FunctionSpace, Matern

SIGMAS = torch.logspace(-2, 2, 9, dtype=torch.float64)
GAUSSIAN = GaussianNoise(torch.tensor([0.5, 0.8, 0.3], dtype=torch.float64))
CORRELATED = CorrelatedNoise(torch.tensor([[0.3, 0.1, 0.0], [0.1, 0.2, 0.05], [0.0, 0.05, 0.4]]).double())


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(seed))


A, Y, MU, ROOT = normal(3, 5, seed=1), normal(3, seed=2), normal(5, seed=3), normal(5, 5, seed=4)
COV = ROOT @ ROOT.T


class OnSpace:
    """E[x0 | x0 + sigma n] of data N(mu, cov) with noise of covariance K, by dense solves."""

    def __init__(self, mu, cov, k):
        self.mu, self.cov, self.k = mu, cov, k

    def __call__(self, x, sigma):
        noisy = self.cov + sigma.reshape(-1, 1, 1).square() * self.k
        return self.mu + (self.cov @ torch.linalg.solve(noisy, (x - self.mu).unsqueeze(-1))).squeeze(-1)


def conditioned(mu, cov, a, noise, y):
    gain = torch.linalg.solve(a @ cov @ a.T + noise, a @ cov).T
    return mu + gain @ (y - a @ mu), cov - gain @ a @ cov


def log_evidence(mu, cov, a, noise, y, x, sigma, k):
    """log p(y | x~) for Gaussian data, (batch,)."""
    gain = cov @ torch.linalg.inv(cov + sigma.reshape(-1, 1, 1).square() * k)
    mean = mu + (gain @ (x - mu).unsqueeze(-1)).squeeze(-1)
    seen = a @ (cov - gain @ cov) @ a.T + noise
    return torch.distributions.MultivariateNormal(mean @ a.T, 0.5 * (seen + seen.mT)).log_prob(y)


@pytest.mark.parametrize("noise", [GAUSSIAN, CORRELATED], ids=["independent", "correlated"])
@pytest.mark.parametrize("kind", ["tweedie", "tweedie cg", "pseudo-inverse", "pseudo-inverse cg"])
def test_exact_on_gaussian_data(kind, noise, monkeypatch):
    if kind.endswith("cg"):
        monkeypatch.setattr(module, "_DENSE", 0)
    observation = Observation(Matrix(A), noise, Y)
    if kind.startswith("tweedie"):
        cov, potential = COV, TweedieMoments(observation, dense=0 if kind.endswith("cg") else 64)
    else:
        cov, potential = 1.7 * torch.eye(5).double(), PseudoInverse(observation, prior_variance=1.7)
    prior, eye, s = GaussianDenoiser(MU, cov), torch.eye(5).double(), noise.covariance((3,))
    posterior = GaussianDenoiser(*conditioned(MU, cov, A, s, Y))
    x = 2 * normal(9, 5, seed=5)
    parts = Guided(prior, potential).parts(x, SIGMAS)
    torch.testing.assert_close(parts.guided, posterior(x, SIGMAS), rtol=0, atol=1e-10)
    if not kind.endswith("cg"):
        want = log_evidence(MU, cov, A, s, Y, x, SIGMAS, eye)
        torch.testing.assert_close(parts.log_potential, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("process", [VP(), CLD(), PSLD()], ids=lambda p: type(p).__name__)
def test_exact_scores_of_every_process(process):
    observation = Observation(Matrix(A), CORRELATED, Y)
    posterior = GaussianDenoiser(*conditioned(MU, COV, A, CORRELATED.cov, Y))
    guided = Guided(GaussianDenoiser(MU, COV), TweedieMoments(observation))
    t = torch.linspace(0.05, 1, 5, dtype=torch.float64) * process.horizon
    z = normal(5, process.channels, 5, seed=6)
    want = Diffusion(process, posterior).score(z, t)
    torch.testing.assert_close(Diffusion(process, guided).score(z, t), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("coordinates", ["physical", "coefficients", "whitened"])
def test_exact_in_function_space(coordinates):
    """Coloured noise: the gradient is spread by the noise's covariance, in whatever coordinates."""
    space, eye = FunctionSpace(Cosine(1), Matern(alpha=1.0, kappa=2.0), coordinates), torch.eye(5).double()
    half = space.colour(eye).T
    k, decode = half @ half.T, space.decode(eye).T
    a, s = A @ decode, CORRELATED.cov
    observation = Observation(Matrix(A), CORRELATED, Y)
    x = 2 * normal(9, 5, seed=5)
    for cov, potential in (
        (COV, TweedieMoments(observation)),
        (COV, TweedieMoments(observation, dense=0)),
        (0.6 * k, PseudoInverse(observation, prior_variance=0.6)),
    ):
        posterior = OnSpace(*conditioned(MU, cov, a, s, Y), k)
        got = Guided(OnSpace(MU, cov, k), potential, space=space).parts(x, SIGMAS)
        torch.testing.assert_close(got.guided, posterior(x, SIGMAS), rtol=0, atol=1e-9)
        if getattr(potential, "dense", 1):
            want = log_evidence(MU, cov, a, s, Y, x, SIGMAS, k)
            torch.testing.assert_close(got.log_potential, want, rtol=1e-9, atol=1e-9)
    x0 = normal(2, 5, seed=7)
    point = PointEstimate(observation, space=space)(x0, SIGMAS[:2], x0)
    torch.testing.assert_close(point, observation.log_likelihood(space.decode(x0)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("coordinates", ["physical", "coefficients", "whitened"])
def test_linearised_is_the_pseudo_inverse_of_the_operator_at_the_prediction(coordinates):
    space = FunctionSpace(Cosine(), Matern(1.5, 4.0), coordinates)
    x = space.encode(normal(4, 6, seed=12))
    sigma = torch.tensor([0.05, 0.4, 1.0, 30.0], dtype=torch.float64)
    flow, noise = Darcy1d((0.25, 0.5, 0.75)), GaussianNoise(0.1)
    y = torch.tensor([0.2, 0.6, 0.7], dtype=torch.float64)

    def prior(x, sigma):  # of data as the noise is
        return x / (1 + sigma.reshape(-1, 1).square())

    found = Guided(prior, Linearised(Observation(flow, noise, y), 1.0), space=space).parts(x, sigma)
    for i in range(4):
        field = space.decode(found.unguided[i : i + 1])
        slope = flow.jacobian(field)[0]
        lines = Observation(Matrix(slope), noise, y - flow(field)[0] + slope @ field[0])
        want = Guided(prior, PseudoInverse(lines, 1.0), space=space).parts(x[i : i + 1], sigma[i : i + 1])
        torch.testing.assert_close(found.guided[i : i + 1], want.guided, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.log_potential[i : i + 1], want.log_potential, rtol=1e-10, atol=1e-10)


def test_a_potential_of_another_space_is_refused():
    space, observation = FunctionSpace(), Observation(Matrix(A), GAUSSIAN, Y)
    with pytest.raises(ValueError, match="leave the potential's space out"):
        Guided(GaussianDenoiser(MU, COV), PseudoInverse(observation, space=space))
    assert Guided(GaussianDenoiser(MU, COV), PseudoInverse(observation), space=space).potential.space is space


@pytest.mark.parametrize("kind", [PointEstimate, PseudoInverse, TweedieMoments, Linearised])
def test_all_become_the_likelihood_as_the_noise_goes(kind):
    """Their errors are of order sigma^2 times the curvature of the likelihood, here below 1e-6."""
    prior = MixtureDenoiser(torch.tensor([1.0, 2.0]), normal(2, 5, seed=8), 0.5)
    observation = Observation(Matrix(A), GAUSSIAN, Y)
    x = normal(4, 5, seed=9)
    got = Guided(prior, kind(observation)).parts(x, 1e-5).log_potential
    torch.testing.assert_close(got, observation.log_likelihood(x), rtol=0, atol=1e-6)


def test_point_estimates_overshoot_where_moments_do_not():
    """At large sigma the point is sure of what nobody knows: its guided prediction leaves the data it was told of."""
    observation = Observation(Matrix(torch.eye(5).double()[:1]), GaussianNoise(0.1), torch.ones(1).double())
    prior, x = GaussianDenoiser(torch.zeros(5), 1.0), torch.zeros(1, 5).double()
    told, point = (Guided(prior, kind(observation))(x, 10.0)[0, 0] for kind in (TweedieMoments, PointEstimate))
    assert float(told) == pytest.approx(1 / (1.01 + 1e-4), abs=1e-12)
    assert float(point) == pytest.approx(100 / 101 / 0.01, abs=1e-9)  # sigma^2 J (y - A D) / std^2


def test_the_normalised_step_is_the_gradient_of_the_norm():
    observation, prior = Observation(Matrix(A), GAUSSIAN, Y), GaussianDenoiser(MU, COV)
    x = normal(9, 5, seed=5)
    plain = Observation(Matrix(A), GaussianNoise(1.0), Y)
    x0 = prior(x, SIGMAS)
    full = Guided(prior, PointEstimate(plain)).parts(x, SIGMAS)
    got = Guided(prior, PointEstimate(observation, normalised=True)).parts(x, SIGMAS)
    norm = torch.linalg.vector_norm(Y - x0 @ A.T, dim=1)
    torch.testing.assert_close(got.log_potential, -norm, rtol=0, atol=1e-12)
    torch.testing.assert_close((got.guided - x0) * norm.unsqueeze(1), full.guided - x0, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", [PointEstimate, PseudoInverse, TweedieMoments, Linearised])
def test_observations_travel_with_the_samples(kind):
    ys = normal(5, 3, seed=11)
    prior, observation = GaussianDenoiser(MU, 0.3 * COV), Observation(Matrix(A), GAUSSIAN, Y)
    strength = 0.05 if kind is PointEstimate else 1.0  # of the point estimate's steps, what is stable
    x, sigma = normal(5, 5, seed=12), 0.3
    got = Guided(prior, kind(observation), strength)(x, sigma, observed=ys)
    for i, y in enumerate(ys):
        alone = Guided(prior, kind(dataclasses.replace(observation, y=y)), strength)(x[i : i + 1], sigma)
        torch.testing.assert_close(got[i : i + 1], alone, rtol=0, atol=1e-10)
    walked = sample(
        Diffusion(VP(), Guided(prior, kind(observation), strength)), 5, (5,), Ancestral(4), seed=0, batch=2, observed=ys
    )
    assert bool(walked.isfinite().all())


def test_gaussian_potentials_say_what_they_need():
    with pytest.raises(
        ValueError, match="needs a linear operator, got a PhaseRetrieval; Linearised and PointEstimate take any"
    ):
        PseudoInverse(Observation(PhaseRetrieval(), GaussianNoise(1.0), torch.ones(8)))
    for kind in (PseudoInverse, TweedieMoments):
        with pytest.raises(ValueError, match="needs Gaussian noise, got LaplaceNoise"):
            kind(Observation(Matrix(A), LaplaceNoise(1.0), Y))
    with pytest.raises(ValueError, match="prior_variance must be positive"):
        PseudoInverse(Observation(Matrix(A), GAUSSIAN, Y), prior_variance=0.0)
    with pytest.raises(ValueError, match="iterations be at least 1"):
        TweedieMoments(Observation(Matrix(A), GAUSSIAN, Y), iterations=0)
    with pytest.raises(ValueError, match="observed="):
        Guided(GaussianDenoiser(MU, COV), TweedieMoments(Observation(Matrix(A), GAUSSIAN, Y)))(
            normal(4, 5), 1.0, observed=normal(3, 3)
        )


def test_an_indefinite_jacobian_leaves_a_proper_density():
    """A model need not be a posterior mean: negative eigenvalues of its Jacobian are dropped, not believed."""
    potential = TweedieMoments(Observation(Matrix(A), GAUSSIAN, Y))
    x = normal(3, 5, seed=1)
    got = Guided(lambda v, sigma: -v, potential).parts(x, 2.0).log_potential
    flat = torch.distributions.MultivariateNormal(-x @ A.T, GAUSSIAN.covariance((3,))).log_prob(Y)
    torch.testing.assert_close(got, flat, rtol=0, atol=1e-10)

"""Closed-form denoisers against dense linear algebra, autograd and quadrature, and the laws a posterior mean obeys."""

import math

import pytest
import torch

from undrift.config import build, describe
from undrift.denoise import Denoiser, GaussianDenoiser, MixtureDenoiser


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.float64).normal_(generator=rng(seed))


def full_mixture(modes: int = 4, d: int = 3, seed: int = 0) -> MixtureDenoiser:
    roots = 0.6 * normal(modes, d, d, seed=seed)
    weights = torch.rand(modes, generator=rng(seed), dtype=torch.float64) + 0.1
    return MixtureDenoiser(weights, 1.5 * normal(modes, d, seed=seed + 1), roots @ roots.mT)


def dense_posterior_mean(weights, means, covs, x, sigma):
    """Bayes by a solve per sample and mode: slow, and independent of the eigendecomposition."""
    out = torch.empty_like(x)
    for i in range(x.shape[0]):
        logs, posts = [], []
        for w, m, c in zip(weights / weights.sum(), means, covs, strict=True):
            noisy = c + sigma[i] ** 2 * torch.eye(c.shape[0], dtype=c.dtype)
            logs.append(w.log() + torch.distributions.MultivariateNormal(m, noisy).log_prob(x[i]))
            posts.append(m + c @ torch.linalg.solve(noisy, x[i] - m))
        out[i] = torch.stack(logs).softmax(0) @ torch.stack(posts)
    return out


def as_full(covs: torch.Tensor, modes: int, d: int) -> torch.Tensor:
    if covs.ndim == 3:
        return covs
    eye = torch.eye(d, dtype=torch.float64)
    if covs.ndim == 0:
        return (covs * eye).expand(modes, d, d)
    return covs[:, None, None] * eye if covs.ndim == 1 else torch.diag_embed(covs)


ROOTS = 0.5 * normal(4, 3, 3, seed=7)
COVARIANCES = {
    "one variance": torch.tensor(0.2, dtype=torch.float64),
    "per mode": torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64),
    "per coordinate": normal(4, 3, seed=5).square(),
    "full": ROOTS @ ROOTS.mT,
    "rank one": ROOTS[:, :, :1] @ ROOTS[:, :, :1].mT,
    "zero": torch.tensor(0.0, dtype=torch.float64),
}


@pytest.mark.parametrize("kind", COVARIANCES)
@pytest.mark.parametrize("shared", [True, False], ids=["one sigma", "sigma per sample"])
def test_equals_dense_bayes(kind, shared):
    covs, means, weights = (
        COVARIANCES[kind],
        normal(4, 3, seed=1),
        torch.tensor([1.0, 2.0, 0.5, 1.5], dtype=torch.float64),
    )
    x = 1.5 * normal(20, 3, seed=2)
    sigma = torch.full((20,), 0.4, dtype=torch.float64) if shared else torch.logspace(-1, 2, 20, dtype=torch.float64)
    denoiser = MixtureDenoiser(weights, means, covs)
    want = dense_posterior_mean(weights, means, as_full(covs, 4, 3), x, sigma)
    given = sigma[0] if shared else sigma
    torch.testing.assert_close(denoiser(x, given), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(denoiser(x, sigma), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.0, 1e-6, 0.3, 20.0])
def test_score_is_the_gradient_of_the_log_density_and_tweedie_holds(sigma):
    denoiser = full_mixture()
    x = (2 * normal(50, 3, seed=3)).requires_grad_()
    (gradient,) = torch.autograd.grad(denoiser.log_prob(x, sigma).sum(), x)
    score = denoiser.score(x, sigma)
    torch.testing.assert_close(score, gradient, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(denoiser(x, sigma), x + sigma**2 * score, rtol=1e-12, atol=1e-12)


def test_density_integrates_to_one_and_is_the_noised_one():
    denoiser = MixtureDenoiser.ring(modes=3, radius=1.0, std=0.3)
    grid = torch.linspace(-7, 7, 561, dtype=torch.float64)
    points = torch.cartesian_prod(grid, grid)
    for sigma in (0.0, 0.5):
        mass = denoiser.log_prob(points, sigma).exp() * (grid[1] - grid[0]) ** 2
        assert abs(float(mass.sum()) - 1) < 1e-12  # the trapezium rule is spectrally accurate for a Gaussian
        second = float((mass * points.square().sum(-1)).sum())
        assert second == pytest.approx(1.0 + 2 * 0.3**2 + 2 * sigma**2, abs=1e-10)


def test_denoiser_is_the_regression_of_clean_on_noisy():
    """E[(x0 - D) h(x)] = 0 for any h; each of the d means must lie within 5 of its own standard errors."""
    denoiser, n, sigma = full_mixture(), 40_000, 0.7
    clean = denoiser.sample(n, rng(1))
    noisy = clean + sigma * normal(n, 3, seed=2)
    for h in (torch.ones(n, 1), noisy, torch.tanh(3 * noisy)):
        product = (clean - denoiser(noisy, sigma)) * h
        assert bool((product.mean(0).abs() < 5 * product.std(0) / math.sqrt(n)).all())


def test_samples_have_the_moments_of_the_mixture():
    denoiser, n = full_mixture(), 40_000
    x = denoiser.sample(n, rng(4))
    w = denoiser.weights / denoiser.weights.sum()
    mean = w @ denoiser.means
    second = torch.einsum("k,kij->ij", w, denoiser.covs + denoiser.means[:, :, None] * denoiser.means[:, None, :])
    assert bool(((x.mean(0) - mean).abs() < 5 * x.std(0) / math.sqrt(n)).all())
    products = x[:, :, None] * x[:, None, :]
    assert bool(((products.mean(0) - second).abs() < 5 * products.std(0) / math.sqrt(n)).all())
    assert torch.equal(x, denoiser.sample(n, rng(4)))


def test_gaussian_is_the_mixture_of_one_and_takes_events_of_any_shape():
    root = normal(4, 4, seed=1)
    mean, cov, x = normal(2, 2, seed=2), root @ root.T, normal(6, 2, 2, seed=3)
    gauss, mixture = GaussianDenoiser(mean, cov), MixtureDenoiser(torch.ones(1), mean.reshape(1, 4), cov.unsqueeze(0))
    sigma = torch.rand(6, generator=rng(), dtype=torch.float64)
    torch.testing.assert_close(gauss(x, sigma), mixture(x.flatten(1), sigma).unflatten(1, (2, 2)), rtol=0, atol=1e-14)
    torch.testing.assert_close(gauss.log_prob(x, sigma), mixture.log_prob(x.flatten(1), sigma), rtol=0, atol=1e-13)
    assert gauss.sample(3, rng()).shape == (3, 2, 2)
    diagonal = GaussianDenoiser(mean, mean.square())
    torch.testing.assert_close(diagonal(x, 0.3), mean + mean**2 / (mean**2 + 0.09) * (x - mean), rtol=0, atol=1e-14)
    scalar = GaussianDenoiser(0.3, 0.25)
    y = torch.tensor([1.0, -2.0], dtype=torch.float64)
    torch.testing.assert_close(scalar(y, 0.5), 0.3 + 0.5 * (y - 0.3), rtol=0, atol=1e-15)


def test_limits_of_the_noise_level():
    denoiser, x = full_mixture(), normal(10, 3, seed=6)
    assert torch.equal(denoiser(x, 0.0), x)
    mean = (denoiser.weights / denoiser.weights.sum()) @ denoiser.means
    torch.testing.assert_close(denoiser(x, 1e8), mean.expand(10, 3), rtol=0, atol=1e-6)
    some = torch.tensor([0.0, 0.5] * 5, dtype=torch.float64)
    torch.testing.assert_close(denoiser(x, some)[1::2], denoiser(x[1::2], 0.5), rtol=0, atol=1e-14)
    assert torch.equal(denoiser(x, some)[::2], x[::2])


def test_computes_in_float64_and_returns_the_dtype_of_the_point():
    denoiser, x = MixtureDenoiser.ring(), normal(64, 2, seed=8).float()
    sigma = torch.full((64,), 1e-3)
    out = denoiser(x, sigma)
    assert out.dtype == torch.float32
    assert torch.equal(out, denoiser(x.double(), sigma.double()).float())


def test_ring():
    ring = MixtureDenoiser.ring()
    torch.testing.assert_close(ring.means.norm(dim=-1), torch.full((8,), 1.3, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(ring.means.sum(0), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-14)
    assert float(ring.covs) == pytest.approx(0.0064)


@pytest.mark.parametrize("denoiser", [full_mixture(), MixtureDenoiser.ring(), GaussianDenoiser([0.5, 1.0], 0.3)])
def test_is_a_denoiser_and_survives_its_description(denoiser):
    assert isinstance(denoiser, Denoiser)
    again, x = build(describe(denoiser), Denoiser), normal(5, denoiser.sample(1).shape[1], seed=9)
    assert torch.equal(again(x, 0.4), denoiser(x, 0.4))


BAD = [
    (
        lambda: MixtureDenoiser([1.0, -1.0], [[0.0], [1.0]], 1.0),
        r"weights must be positive and finite, got \[1.0, -1.0\]",
    ),
    (lambda: MixtureDenoiser([1.0], [[0.0], [1.0]], 1.0), r"weights must have shape \(2,\), one per mean, got \(1,\)"),
    (lambda: MixtureDenoiser([1.0], [0.0], 1.0), r"means must have shape \(modes, \*event\)"),
    (lambda: MixtureDenoiser([1.0], [[math.nan]], 1.0), r"means must be finite"),
    (lambda: MixtureDenoiser([1.0, 1.0], torch.zeros(2, 3), torch.zeros(3)), r"covs must be a number.*got \(3,\)"),
    (
        lambda: MixtureDenoiser([1, 1], torch.zeros(2, 2), [[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.5], [0.0, 1.0]]]),
        r"covariance 1 must be symmetric; C - C' has an entry of size 0.5",
    ),
    (
        lambda: GaussianDenoiser([0.0, 0.0], [[1.0, 2.0], [2.0, 1.0]]),
        r"positive semi-definite; its smallest eigenvalue is -1",
    ),
    (lambda: GaussianDenoiser(0.0, -0.1), r"GaussianDenoiser: covariance 0 must be positive semi-definite"),
    (lambda: GaussianDenoiser([0.0, 0.0], torch.ones(3)), r"cov must be a number.*got \(3,\)"),
    (lambda: MixtureDenoiser.ring(modes=0), r"modes must be at least 1, got 0"),
    (lambda: MixtureDenoiser.ring(std=0.0), r"std must be positive and finite, got 0"),
    (lambda: MixtureDenoiser.ring()(torch.zeros(3, 4), 1.0), r"with 2 coordinates an event.*got \(3, 4\)"),
    (lambda: MixtureDenoiser.ring()(torch.zeros(3, 2), torch.ones(2)), r"one level or one per sample \(3,\)"),
    (lambda: MixtureDenoiser.ring()(torch.zeros(3, 2), 1.0, label=3), r"takes no condition, got label"),
    (lambda: GaussianDenoiser(0.0, 0.0).log_prob(torch.zeros(1)), r"a density only for sigma > 0"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()

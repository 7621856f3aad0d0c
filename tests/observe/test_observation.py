"""An observation is a likelihood: normalised, differentiable, for shared and for individual data."""

import math

import pytest
import torch

from undrift.config import build, describe
from undrift.observe import (
    CorrelatedNoise,
    Darcy1d,
    GaussianNoise,
    Identity,
    Mask,
    Matrix,
    Observation,
    PhaseRetrieval,
    PoissonNoise,
    Radon,
    StudentTNoise,
)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_linear_gaussian_in_closed_form():
    a, x, y = draw(3, 4), draw(5, 4, seed=1), draw(3, seed=2)
    cov = draw(3, 3, seed=3)
    cov = cov @ cov.T + torch.eye(3, dtype=torch.float64)
    exact = torch.distributions.MultivariateNormal(x @ a.T, cov)
    seen = Observation(Matrix(a), CorrelatedNoise(cov), y)
    assert seen.linear
    torch.testing.assert_close(seen.log_likelihood(x), exact.log_prob(y), rtol=1e-12, atol=0)
    residual = torch.linalg.solve(cov, (y - x @ a.T).T)
    torch.testing.assert_close(seen.gradient(x), residual.T @ a, rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(seen.gradient(x), residual.T @ a, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("operator", "noise"),
    [(Darcy1d((0.2, 0.6)), GaussianNoise(0.05)), (PhaseRetrieval(dims=1), StudentTNoise(3.0, 0.1))],
    ids=["darcy", "phase"],
)
def test_gradients_of_a_nonlinear_likelihood(operator, noise):
    x, way, h = draw(4, 6), draw(4, 6, seed=1), 1e-6
    seen = Observation.simulate(operator, noise, draw(1, 6, seed=2), torch.Generator().manual_seed(0))
    assert not seen.linear
    change = (seen.log_likelihood(x + h * way) - seen.log_likelihood(x - h * way)) / (2 * h)
    torch.testing.assert_close((seen.gradient(x) * way).sum(1), change, rtol=1e-6, atol=1e-6)


def test_one_truth_is_shared_and_many_have_their_own_data():
    x, noise = draw(3, 2, 4), GaussianNoise(0.3)
    one = Observation.simulate(Identity(), noise, x[:1], torch.Generator().manual_seed(0))
    many = Observation.simulate(Identity(), noise, x, torch.Generator().manual_seed(0))
    assert one.y.shape == (2, 4)
    assert many.y.shape == x.shape
    torch.testing.assert_close(one.predict(x), x, rtol=0, atol=0)
    each = [Observation(Identity(), noise, y).log_likelihood(x[i : i + 1]) for i, y in enumerate(many.y)]
    torch.testing.assert_close(many.log_likelihood(x), torch.cat(each), rtol=1e-14, atol=0)
    assert one.log_likelihood(x).shape == (3,)
    with pytest.raises(ValueError, match=r"data of shape \(3, 2, 4\) for predictions \(5, 2, 4\)"):
        many.log_likelihood(draw(5, 2, 4))


def test_simulated_data_are_as_likely_as_they_should_be():
    """-2 log p of Gaussian data, less its constant, is chi-square: mean d, standard error sqrt(2 d / trials)."""
    d, trials = 5, 2000
    operator, x = Matrix(draw(d, 3)), draw(trials, 3, seed=1)
    seen = Observation.simulate(operator, GaussianNoise(0.4), x, torch.Generator().manual_seed(2))
    chi2 = -2 * seen.log_likelihood(x) - d * math.log(2 * math.pi * 0.16)
    assert abs(float(chi2.mean()) - d) < 4 * math.sqrt(2 * d / trials)


def test_descriptions():
    seen = Observation(Mask([1, 0, 1]), GaussianNoise(0.1), torch.tensor([0.5, 0.7], dtype=torch.float64))
    again = build(describe(seen), Observation)
    assert torch.equal(again.log_likelihood(draw(2, 3)), seen.log_likelihood(draw(2, 3)))


@pytest.mark.parametrize(
    ("operator", "noise", "y", "message"),
    [
        (Radon(3, 4), GaussianNoise(0.1), torch.zeros(4, 3), r"ends in \(3, 4\), y has shape \(4, 3\)"),
        (Matrix(torch.ones(2, 3)), GaussianNoise(0.1), torch.zeros(3), r"ends in \(2,\)"),
        (Radon(3, 4), GaussianNoise(0.1), torch.zeros(4), r"y has shape \(4,\)"),
        (Identity(), GaussianNoise(0.1), torch.tensor([0.0, math.inf]), "1 of 2 data are not finite"),
        (Identity(), PoissonNoise(5.0), torch.tensor([0.5]), "counts"),
    ],
)
def test_data_that_do_not_belong_are_refused_at_once(operator, noise, y, message):
    with pytest.raises(ValueError, match=message):
        Observation(operator, noise, y)

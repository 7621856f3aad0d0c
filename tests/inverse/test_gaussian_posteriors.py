"""Closed forms of linear Gaussian problems: against dense algebra, and against numbers computed independently.

The two tables were computed elsewhere for 16 point observations whose places and data are not known; PLACES and the
seed of the data were searched until some of the numbers agreed. Everything else in them then has to follow.
"""

import math

import pytest
import torch

from undrift.inverse import LinearGaussian, gaussian_kl, gaussian_w2
from undrift.observe import CorrelatedNoise, GaussianNoise, Heat, Identity, LaplaceNoise, Mask, Observation, Points
from undrift.space import Cosine, FunctionSpace, Matern, Sine

PLACES = (0.01, 0.03, 0.14, 0.33, 0.37, 0.48, 0.53, 0.56, 0.65, 0.66, 0.66, 0.68, 0.71, 0.72, 0.87, 0.94)
SPACE = FunctionSpace(Cosine(), Matern(2.0, 3.0, 1.0))


def problem(n, std=0.3, y=None):
    y = torch.zeros(16, dtype=torch.float64) if y is None else y
    return LinearGaussian.of(Observation(Points(PLACES, Cosine()), GaussianNoise(std), y), SPACE, (n,))


# plain: limit, condition, KL; preconditioned by the prior: KL of Euler
STEPS = {
    32: (1.41e-6, 1.1e4, 0.0492, 0.01387),
    64: (8.27e-8, 1.9e5, 0.0925, 0.01388),
    128: (5.01e-9, 3.2e6, 0.1794, 0.01391),
    256: (3.08e-10, 5.2e7, 0.3533, 0.01398),
    512: (1.91e-11, 8.4e8, 0.7011, 0.01411),
}


@pytest.mark.parametrize("n", STEPS)
def test_step_limits_and_divergences_on_five_grids(n):
    p = problem(n)
    plain, euler = p.langevin(None, "identity", "euler"), p.langevin(None, "prior", "euler")
    split, best = p.langevin(0.2 * euler.limit, "prior"), p.langevin(0.2, "posterior", "euler")
    limit, condition, kl, kl_euler = STEPS[n]
    assert plain.limit == pytest.approx(limit, rel=4e-3)  # printed with three digits
    assert plain.condition == pytest.approx(condition, rel=0.05)  # with two
    assert round(plain.kl, 4) == kl
    assert euler.limit == pytest.approx(1.413e-2, abs=5e-6)
    assert euler.condition == pytest.approx(141.55, abs=0.05)
    assert (round(euler.kl, 5), round(split.kl, 5)) == (kl_euler, 0.0136)
    assert (round(euler.relative_w2, 4), round(split.relative_w2, 4)) == (0.0527, 0.0522)
    assert (best.limit, best.condition) == pytest.approx((2.0, 1.0), abs=1e-3)
    assert problem(n, 0.05).langevin(None, "prior", "euler").limit == pytest.approx(3.952e-4, abs=5e-8)


def test_euler_by_the_posterior_covariance_loses_something_in_every_mode():
    p = problem(64)
    loss = [p.langevin(step, "posterior", "euler").kl / 64 for step in (0.1, 0.2, 0.5, 1.0)]
    assert [round(v, 5) for v in loss] == [0.00067, 0.00288, 0.02283, 0.15343]
    assert p.langevin(1.0, "posterior").kl < 1e-12


# smoothness of the noise: W2 over the posterior's deviation, and the step limit, at tau = .1, .01, .001, 1e-4
POSITIVE = {
    1.0: ((0.446, 0.090, 0.0154, 0.0023), (0.021, 0.020, 0.0020, 2.4e-4)),
    1.5: ((0.095, 0.0113, 0.0012, 0.0001), (0.016, 0.016, 0.011, 0.0088)),
    2.0: ((0.0, 0.0, 0.0, 0.0), (0.014,) * 4),
    3.0: ((0.036, 0.0037, 0.0004, 0.0), (0.012,) * 4),
}


@pytest.mark.parametrize("alpha", POSITIVE)
def test_bias_of_a_prior_at_positive_tau_and_the_noise_it_depends_on(alpha):
    n, g = 256, torch.Generator().manual_seed(17177)
    p = problem(n)
    truth = torch.randn(n, generator=g, dtype=torch.float64) * p.variances.sqrt()
    p = problem(n, y=p.matrix @ truth + 0.3 * torch.randn(16, generator=g, dtype=torch.float64))
    exact, noise = p.covariance(), Matern(alpha, 3.0, 1.0).variances(Cosine(), (n,))
    sd = math.sqrt(float(exact.trace()))
    for tau, w2, limit in zip((0.1, 0.01, 0.001, 1e-4), *POSITIVE[alpha], strict=True):
        q = p.at(tau, noise)
        found = gaussian_w2(q.covariance(), exact, q.posterior_mean() - p.posterior_mean()) / sd
        assert found == pytest.approx(w2, rel=0.04, abs=1.2e-4)  # 1e-4: a root of rounding, and the last digit
        at = q.langevin(None, noise, "euler")
        # two digits are printed
        assert at.limit == pytest.approx(limit, rel=0.05)
        assert alpha != 3.0 or 8.5e6 < at.condition < 1.5e7


@pytest.mark.parametrize(
    ("operator", "noise", "space"),
    [
        (Points((0.2, 0.5, 0.9)), GaussianNoise(0.1), FunctionSpace(Sine(), Matern(1.0, 2.0))),
        (Identity(), GaussianNoise(0.5), SPACE),
        (Heat(0.01), GaussianNoise(0.2), SPACE),
        (Mask(torch.arange(12) % 3 == 0), CorrelatedNoise(0.1 * torch.eye(4) + 0.05), SPACE),
    ],
    ids=["points", "all", "heat", "correlated"],
)
def test_posterior_and_evidence_by_dense_algebra(operator, noise, space):
    n, g = 12, torch.Generator().manual_seed(1)
    mean = torch.randn(n, generator=g, dtype=torch.float64)
    shape = operator(torch.zeros(1, n, dtype=torch.float64)).shape[1:]
    y = torch.randn(shape, generator=g, dtype=torch.float64)
    p = LinearGaussian.of(Observation(operator, noise, y), space, (n,), mean=mean)
    prior, s = torch.diag(space.variances((n,))), noise.covariance(shape)
    joint = p.matrix @ prior @ p.matrix.T + s
    precision = torch.linalg.inv(prior) + p.matrix.T @ torch.linalg.inv(s) @ p.matrix
    torch.testing.assert_close(p.covariance(), torch.linalg.inv(precision), rtol=1e-9, atol=1e-14)
    natural = torch.linalg.solve(prior, mean) + p.matrix.T @ torch.linalg.solve(s, y)
    torch.testing.assert_close(p.posterior_mean(), torch.linalg.solve(precision, natural), rtol=1e-9, atol=1e-12)
    law = torch.distributions.MultivariateNormal(p.matrix @ mean, joint)
    assert p.log_evidence() == pytest.approx(float(law.log_prob(y)), rel=1e-10)
    b = torch.linalg.eigvalsh(p.hessian()).flip(0)
    torch.testing.assert_close(p.eigenvalues(), b, rtol=1e-10, atol=1e-10 * float(b[0]))


def test_divergence_and_distance_of_gaussians():
    g = torch.Generator().manual_seed(2)
    a, b = (m @ m.T + torch.eye(4) for m in torch.randn(2, 4, 4, generator=g, dtype=torch.float64))
    shift = torch.randn(4, generator=g, dtype=torch.float64)
    laws = [torch.distributions.MultivariateNormal(m, c) for m, c in ((shift, a), (torch.zeros(4).double(), b))]
    assert gaussian_kl(a, b, shift) == pytest.approx(float(torch.distributions.kl_divergence(*laws)))
    d = torch.tensor([1.0, 4.0]).double()
    assert gaussian_w2(torch.diag(d), torch.eye(2).double(), d) == pytest.approx(math.sqrt(1 + 17))


def test_what_is_not_linear_and_gaussian_is_refused():
    bad = Observation(Points((0.5,)), LaplaceNoise(0.1), torch.zeros(1))
    with pytest.raises(ValueError, match="Gaussian noise"):
        LinearGaussian.of(bad, SPACE, (8,))
    with pytest.raises(ValueError, match="not stable"):
        problem(32).langevin(0.02, "prior", "euler")

"""Langevin schemes as the linear maps they are on Gaussian problems: their laws by algebra, without a single draw."""

import math

import pytest
import torch

from undrift.denoise import SpectralDenoiser
from undrift.inverse import (
    Annealing,
    DenoiserPrior,
    FieldMixture,
    LinearGaussian,
    Posterior,
    PosteriorInformed,
    PriorCovariance,
    StepTooLarge,
    check_step,
    extremes,
    find_mode,
    langevin,
)
from undrift.inverse.langevin import advance
from undrift.inverse.posterior import pull_back, whiten
from undrift.networks import SpectralNet
from undrift.observe import (
    CorrelatedNoise,
    Darcy1d,
    Darcy2d,
    GaussianNoise,
    Identity,
    LaplaceNoise,
    Observation,
    Points,
    PoissonNoise,
)
from undrift.space import Blurring, Cosine, Fourier, FunctionSpace, Matern

PLACES = (0.1, 0.33, 0.5, 0.52, 0.9)
Y = torch.tensor([0.3, -0.5, 0.2, 0.4, 1.0], dtype=torch.float64)
OBSERVED = Observation(Points(PLACES, Cosine()), GaussianNoise(0.3), Y)
COORDINATES = ("physical", "coefficients", "whitened")


def space(coordinates="coefficients", alpha=2.0):
    return FunctionSpace(Cosine(), Matern(alpha, 3.0), coordinates)


def stationary(posterior, n, step, scheme, preconditioner, tau=0.0):
    """Mean and covariance (in coefficients) of the law that ``advance`` leaves invariant, from its linear map."""
    s, eye, zero = posterior.space, torch.eye(n, dtype=torch.float64), torch.zeros(1, n, dtype=torch.float64)

    def move(x, xi):
        return advance(posterior, x, step, xi, tau, preconditioner, scheme)[0]

    shift = move(zero, zero)
    turn = (move(eye, 0 * eye) - shift).T
    noise = (move(zero.expand(n, n), eye) - shift).T
    mean = torch.linalg.solve(eye - turn, shift[0])
    values, vectors = torch.linalg.eig(turn)
    inside = torch.linalg.solve(vectors, (noise @ noise.T).to(vectors))
    inside = torch.linalg.solve(vectors, inside.mT).mT
    inside = inside / (1 - values.unsqueeze(1) * values)
    covariance = (vectors @ inside @ vectors.mT).real
    to = s.coefficients(eye).T
    return s.coefficients(mean), to @ covariance @ to.T


@pytest.mark.parametrize("n", [8, 16, 32, 64])
@pytest.mark.parametrize("scheme", ["euler", "crank-nicolson"])
def test_stationary_laws_are_the_closed_forms(n, scheme):
    posterior = Posterior(FieldMixture(space()), OBSERVED)
    exact = LinearGaussian.of(OBSERVED, posterior.space, (n,))
    step = 0.3 / float(exact.eigenvalues()[0])
    mean, covariance = stationary(posterior, n, step, scheme, PriorCovariance(posterior.space))
    expected = exact.langevin(step, "prior", scheme)
    scale = float(expected.covariance.abs().max())
    torch.testing.assert_close(covariance, expected.covariance, rtol=0, atol=1e-9 * scale)
    torch.testing.assert_close(mean, exact.posterior_mean(), rtol=0, atol=1e-9)
    ratios = 1 / (1 - step * (exact.eigenvalues().flip(0) + (scheme == "euler")) / 2)
    torch.testing.assert_close(expected.ratios, ratios, rtol=1e-7, atol=0)


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_without_data_crank_nicolson_keeps_the_prior_at_any_step(coordinates):
    s = space(coordinates)
    posterior = Posterior(FieldMixture(s), lambda x: 0 * x.flatten(1).sum(1))
    for step in (0.01, 1.0, 7.0):
        mean, covariance = stationary(posterior, 16, step, "crank-nicolson", PriorCovariance(s))
        torch.testing.assert_close(covariance, torch.diag(s.variances((16,))), rtol=0, atol=1e-12)
        assert float(mean.abs().max()) < 1e-12


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_informed_crank_nicolson_is_exact_on_linear_problems_at_any_step(coordinates):
    s = space(coordinates)
    posterior = Posterior(FieldMixture(s), OBSERVED)
    exact = LinearGaussian.of(OBSERVED, s, (16,))
    zero = torch.zeros(1, 16, dtype=torch.float64)
    informed = PosteriorInformed.at(posterior, zero, smallest=0.0)
    for step in (0.05, 1.5):
        mean, covariance = stationary(posterior, 16, step, "crank-nicolson", informed)
        torch.testing.assert_close(covariance, exact.covariance(), rtol=0, atol=1e-11)
        torch.testing.assert_close(mean, exact.posterior_mean(), rtol=0, atol=1e-10)
    torch.testing.assert_close(s.coefficients(find_mode(posterior, zero))[0], exact.posterior_mean())


def test_a_score_at_positive_tau_samples_the_posterior_of_the_prior_at_tau():
    s, tau, n = space(alpha=1.0), 0.05, 24
    prior = FieldMixture(s, spectrum=Matern(2.0, 3.0))
    exact = LinearGaussian.of(OBSERVED, s, (n,), spectrum=prior.spectrum).at(tau, s.variances((n,)))
    expected = exact.langevin(0.01, s.variances((n,)), "euler")
    for which in (prior, DenoiserPrior(prior)):
        got = stationary(Posterior(which, OBSERVED), n, 0.01, "euler", PriorCovariance(s), tau)
        torch.testing.assert_close(got[1], expected.covariance, rtol=0, atol=1e-9)
        torch.testing.assert_close(got[0], exact.posterior_mean(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_slopes_of_mixtures_are_gradients_of_their_log_density(coordinates):
    s, tau = space(coordinates), 0.3
    means = torch.tensor([[1.0, 0.5], [-1.0, 0.2]])
    prior = FieldMixture(s, means, [0.3, 0.7], Matern(3.0, 2.0))
    g = torch.Generator().manual_seed(0)
    x = prior.sample(4, (12,), g)
    c = s.coefficients(x).requires_grad_()
    centre = math.exp(-tau / 2) * torch.nn.functional.pad(means.double(), (0, 10))
    total = math.exp(-tau) * prior.variances((12,)) + (1 - math.exp(-tau)) * s.variances((12,))
    parts = -0.5 * ((c.unsqueeze(1) - centre).square() / total).sum(-1) + torch.tensor([0.3, 0.7]).double().log()
    (grad,) = torch.autograd.grad(parts.logsumexp(1).sum(), c)
    for which in (prior, DenoiserPrior(prior)):
        torch.testing.assert_close(
            s.coefficients(which.slope(x, tau)), s.variances((12,)) * grad, rtol=1e-9, atol=1e-12
        )
    same = FieldMixture(s, means, [0.3, 0.7])
    c = s.coefficients(x)
    lam = s.variances((12,))
    log = [(-0.5 * ((c - m).square() / lam).sum(-1)) for m in torch.nn.functional.pad(means.double(), (0, 10))]
    ratio = torch.logsumexp(torch.stack(log, 1) + torch.tensor([0.3, 0.7]).double().log(), 1)
    torch.testing.assert_close(same.log_ratio(x), ratio + 0.5 * (c.square() / lam).sum(-1))
    with pytest.raises(ValueError, match="no density"):
        prior.log_ratio(x)


@pytest.mark.parametrize("hessian", ["gauss-newton", "full"])
@pytest.mark.parametrize("basis", [Cosine(), Fourier()])
def test_informed_preconditioner_is_the_inverse_of_prior_precision_plus_hessian(hessian, basis):
    n, s = 20, FunctionSpace(basis, Matern(1.5, 3.0))
    posterior = Posterior(FieldMixture(s), OBSERVED)
    g = torch.Generator().manual_seed(3)
    x = s.colour(torch.randn(1, n, generator=g, dtype=torch.float64))
    k = PosteriorInformed.at(posterior, x, 6, hessian, smallest=1e-8)
    eye = torch.eye(n, dtype=torch.float64)
    c = s.colour(s.colour(eye).T)
    a = OBSERVED.operator(eye).T
    dense = torch.linalg.inv(torch.linalg.inv(c) + a.T @ a / 0.09)
    scale = float(dense.abs().max())
    torch.testing.assert_close(k.of_slope(eye), dense, rtol=0, atol=1e-8 * scale)
    torch.testing.assert_close(k.of_score(c), dense, rtol=0, atol=1e-8 * scale)
    torch.testing.assert_close(k.noise(eye).T @ k.noise(eye), dense, rtol=0, atol=1e-8 * scale)
    quadratic = 0.5 * ((x @ (torch.linalg.inv(dense) - torch.linalg.inv(c))) * x).sum()
    assert float(k.energy(x)) == pytest.approx(float(quadratic), rel=1e-6)


def test_gauss_newton_of_other_noises():
    n, s = 8, space("physical")
    x = torch.zeros(1, n, dtype=torch.float64)
    jacobian = Darcy1d((0.3, 0.7)).jacobian(x)[0]
    predicted = Darcy1d((0.3, 0.7))(x)[0]
    root = s.colour(torch.eye(n, dtype=torch.float64))
    cov = torch.tensor([[0.02, 0.01], [0.01, 0.03]])
    counts = torch.tensor([4.0, 9.0])
    cases = [
        (CorrelatedNoise(cov), torch.tensor([0.5, 0.5]), torch.linalg.inv(cov.double())),
        (PoissonNoise(10.0), counts, torch.diag(counts.double() / predicted.square())),
    ]
    for noise, y, weight in cases:
        posterior = Posterior(FieldMixture(s), Observation(Darcy1d((0.3, 0.7)), noise, y))
        b = torch.linalg.eigvalsh(root @ jacobian.T @ weight @ jacobian @ root.T).flip(0)[:2]
        torch.testing.assert_close(PosteriorInformed.at(posterior, x, smallest=0.0).values, b, rtol=1e-8, atol=1e-10)
    flat = Posterior(FieldMixture(s), Observation(Darcy1d((0.3,)), LaplaceNoise(0.1), torch.tensor([0.2])))
    with pytest.raises(ValueError, match="no curvature"):
        PosteriorInformed.at(flat, x)


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_stiffness_is_the_largest_eigenvalue(coordinates):
    s = space(coordinates)
    posterior = Posterior(FieldMixture(s), OBSERVED)
    x = torch.zeros(2, 16, dtype=torch.float64)
    b = float(LinearGaussian.of(OBSERVED, s, (16,)).eigenvalues()[0])
    got = extremes(posterior, x, 1e-3, PriorCovariance(s), iterations=12)[1]
    torch.testing.assert_close(got, torch.full((2,), 1 + b, dtype=torch.float64), rtol=1e-6, atol=0)
    informed = PosteriorInformed.at(posterior, x[:1], smallest=0.0)
    torch.testing.assert_close(extremes(posterior, x, 1e-3, informed)[1], torch.ones(2).double(), rtol=1e-8, atol=0)
    # noise rougher than the data makes the prior itself stiff, whatever the data say: 1 / tau in the end
    rough = FunctionSpace(Cosine(), Matern(1.0, 3.0), coordinates)
    posterior = Posterior(FieldMixture(rough, spectrum=Matern(2.0, 3.0)), lambda x: 0 * x.sum(1))
    lam, mu = rough.variances((16,)), s.variances((16,))
    h = (lam / (math.exp(-0.1) * mu - math.expm1(-0.1) * lam)).max()
    got = extremes(posterior, x, 0.1, PriorCovariance(rough), iterations=60)[1]
    torch.testing.assert_close(got, h.expand(2), rtol=2e-2, atol=0)


def test_stiffness_is_the_largest_eigenvalue_also_where_the_hessian_has_more_negative_ones():
    """And the smallest, from within a spectrum of which power iteration would see the negative end alone."""
    s = space("whitened")
    x = torch.zeros(3, 24, dtype=torch.float64)
    for curved in ((-50.0, 30.0), (-50.0,), (-30.0, -29.0, 30.0), ()):
        d = torch.tensor([*curved, *[0.0] * (24 - len(curved))], dtype=torch.float64)
        posterior = Posterior(FieldMixture(s), lambda x, d=d: -0.5 * (x.square() * d).sum(1))
        low, high = extremes(posterior, x, 0.0, PriorCovariance(s))
        for got, want in ((low, 1 + d.min()), (high, 1 + d.max())):
            torch.testing.assert_close(got, want.expand(3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("wide", "below"), [(4.0, 0.75), (1.0, 0.0)])
def test_a_step_that_would_make_the_posterior_too_narrow_is_refused(wide, below):
    """A prior of four times the noise's variance, no data: b = -3/4 in every direction, the variance divided by 1 + 3/8
    gamma, which is confirmed by the exact stationary law."""
    s = space()
    posterior = Posterior(FieldMixture(s, spectrum=Matern(2.0, 3.0, wide)), lambda x: 0 * x.sum(1))
    x = torch.zeros(3, 16, dtype=torch.float64)
    report = check_step(posterior, x, 0.0, PriorCovariance(s), 1.0, "crank-nicolson")
    assert report.product == pytest.approx(below, abs=1e-10)
    cov = stationary(posterior, 16, 1.0, "crank-nicolson", PriorCovariance(s))[1]
    ratio = cov.diagonal() / (wide * s.variances((16,)))
    torch.testing.assert_close(ratio, torch.full_like(ratio, report.variance_ratio), rtol=1e-9, atol=0)
    if below:
        assert report.limit == math.inf
        with pytest.raises(StepTooLarge, match="times too small") as caught:
            langevin(posterior, x, 20, 1.0, annealing=Annealing(tau_min=0.0))
        assert caught.value.advised == pytest.approx(0.4 / 0.75)
    else:
        langevin(posterior, x, 20, 1.0, annealing=Annealing(tau_min=0.0))


def test_many_chains_with_data_of_their_own():
    """More chains than the step diagnostic looks at: it takes their data along."""
    s = space("physical")
    x = FieldMixture(s).sample(20, (16,), torch.Generator().manual_seed(0))
    seen = Observation.simulate(Points((0.2, 0.7)), GaussianNoise(1.0), x, torch.Generator().manual_seed(1))
    chains = langevin(Posterior(FieldMixture(s), seen), x, 5, 0.1)
    assert chains.states.shape == (20, 4, 16)
    assert len(chains.reports) == 4


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("hessian", ["gauss-newton", "full"])
def test_a_preconditioner_that_has_not_converged_is_one_covariance_nevertheless(hessian, coordinates):
    """Its density and its draws are of the same Gaussian: L' times the covectors is V, and V is orthonormal."""
    s = FunctionSpace(Cosine(2), Matern(2.0, 3.0), coordinates)
    x = torch.zeros(1, 32, 34, dtype=torch.float64)
    seen = Observation(Identity(), GaussianNoise(0.1), torch.zeros(32, 34, dtype=torch.float64))
    informed = PosteriorInformed.at(Posterior(FieldMixture(s), seen), x, 6, hessian, sweeps=1)
    vectors = informed.vectors.flatten(1)
    assert len(vectors) == 6
    torch.testing.assert_close(pull_back(s, informed.covectors).flatten(1), vectors, rtol=0, atol=1e-12)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(6).double(), rtol=0, atol=1e-12)
    full = PosteriorInformed.at(Posterior(FieldMixture(s), seen), x, None, hessian, sweeps=0)
    assert len(full.values) == 64


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_data_that_inform_nothing_leave_the_prior_s_covariance(coordinates):
    s = space(coordinates)
    seen = Observation(Darcy1d((1.0,)), GaussianNoise(0.1), torch.ones(1, dtype=torch.float64))  # p(1) = 1 whatever u
    posterior = Posterior(FieldMixture(s), seen)
    x = FieldMixture(s).sample(3, (16,), torch.Generator().manual_seed(0))
    informed, prior = PosteriorInformed.at(posterior, x[:1]), PriorCovariance(s)
    assert informed.values.shape == (0,)
    for name in ("of_score", "of_slope", "root", "energy", "noise"):
        torch.testing.assert_close(getattr(informed, name)(x), getattr(prior, name)(x), rtol=0, atol=0)
    assert float(s.norm2(find_mode(posterior, x[:1]), 1.0)) < 1e-20


def test_the_mode_is_found_past_steps_that_no_operator_takes():
    """From 0 the first full step of Gauss and Newton goes to fields of e^-17000, which Darcy2d refuses."""
    s = FunctionSpace(Cosine(2), Matern(2.0, 4.0, 25.0))
    truth = FieldMixture(s).sample(1, (12, 10), torch.Generator().manual_seed(1))
    wells = Darcy2d(tuple((i / 5, j / 5) for i in range(1, 5) for j in range(1, 5)))
    seen = Observation.simulate(wells, GaussianNoise(1e-3), truth, torch.Generator().manual_seed(1))
    posterior = Posterior(FieldMixture(s), seen)
    mode = find_mode(posterior, torch.zeros(1, 12, 10, dtype=torch.float64), iterations=60)
    slope = whiten(s, s.covariance(s.gradient(posterior.with_slope(mode)[1])) - mode)
    start = whiten(s, s.covariance(s.gradient(posterior.with_slope(torch.zeros_like(mode))[1])))
    assert float(slope.norm()) < 1e-3 * float(start.norm())
    assert float(posterior.log_likelihood(mode)) > float(posterior.log_likelihood(truth)) - 8.0


def test_a_denoiser_on_a_clock_of_modes_is_no_prior_at_one_time():
    s = FunctionSpace(Cosine(), Matern(2.0, 3.0))
    clocked = SpectralDenoiser(SpectralNet(Cosine(), width=4, modes=4, depth=1), s, None, Blurring())
    with pytest.raises(ValueError, match="modal clock"):
        DenoiserPrior(clocked)


def test_a_step_that_would_be_biased_is_refused_with_the_one_that_would_do():
    s = space()
    posterior = Posterior(FieldMixture(s), OBSERVED)
    b = float(LinearGaussian.of(OBSERVED, s, (16,)).eigenvalues()[0])
    x = torch.zeros(3, 16, dtype=torch.float64)
    with pytest.raises(StepTooLarge) as caught:
        langevin(posterior, x, 20, 0.5 / b)
    assert caught.value.advised == pytest.approx(0.4 / b, rel=1e-3)
    assert caught.value.report.variance_ratio == pytest.approx(1 / (1 - 0.25), rel=1e-3)
    chains = langevin(posterior, x, 20, 0.39 / b)
    assert [r.iteration for r in chains.reports] == [0, 6, 13, 19]
    assert langevin(posterior, x, 20, 0.5 / b, trust=math.inf).reports[0].product == pytest.approx(0.5, rel=1e-3)
    # along the way: at 0 this likelihood is flat, where the chains go it is not
    walls = Posterior(FieldMixture(s), lambda x: 40 * x[:, 0] - 2.0 * x[:, 0].clamp(min=0) ** 4)
    with pytest.raises(StepTooLarge) as caught:
        langevin(walls, x, 100, 0.05)
    assert caught.value.report.iteration > 0


def test_annealing_follows_its_schedule():
    a = Annealing(1e-3, 6.0, 0.5, 3.0, 0.25)
    assert a.at(0, 100) == pytest.approx((6.0, 3.0))
    assert a.at(25, 100) == pytest.approx((math.sqrt(6.0 * 1e-3), 1.0))
    assert a.at(12, 100)[1] == pytest.approx(3.0 ** (1 - 12 / 25))
    assert a.at(50, 100) == (1e-3, 1.0)
    assert a.length(100) == 50
    assert Annealing().length(100) == 0


def test_draws_are_those_of_the_schemes_map_and_of_the_seed():
    s = space()
    posterior = Posterior(FieldMixture(s), OBSERVED)
    x = torch.zeros(2, 8, dtype=torch.float64)
    chains = langevin(posterior, x, 12, 0.005, seed=5, warmup=4, thin=4)
    g = torch.Generator().manual_seed(5)
    for k in range(12):
        xi = torch.empty_like(x).normal_(generator=g)
        x = advance(posterior, x, 0.005, xi, 1e-3, PriorCovariance(s), "crank-nicolson")[0]
        if k in (7, 11):
            torch.testing.assert_close(chains.states[:, (k - 7) // 4], x, rtol=0, atol=0)
    torch.testing.assert_close(chains.log_likelihood[:, -1], posterior.log_likelihood(x))

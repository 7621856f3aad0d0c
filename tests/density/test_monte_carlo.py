"""The denoiser that is estimated from a density, and reverse diffusion with it, against closed forms."""

import math

import pytest
import torch

from undrift.config import build, describe
from undrift.denoise import Denoiser, GaussianDenoiser, MixtureDenoiser
from undrift.density.coordinates import Affine
from undrift.density.method import Method
from undrift.density.monte_carlo import MonteCarloDenoiser, PosteriorTarget
from undrift.density.reverse_diffusion import ReverseDiffusion, matched_prior
from undrift.density.target import Target
from undrift.density.targets.mixtures import Gaussian, GaussianMixture, TwoModes
from undrift.diffusion import Diffusion
from undrift.measure.distance import wasserstein
from undrift.process import CLD, PSLD, VE, VP
from undrift.process.clock import PowerClock
from undrift.sample import Ancestral, Exponential, LogSigma, ProbabilityFlow, sample

MEANS = torch.tensor([[-2.0, 0.0], [2.0, 1.0]], dtype=torch.float64)
TARGET = GaussianMixture(MEANS, torch.tensor([0.1, 0.3]), torch.tensor([0.3, 0.7]), log_z=1.5)
EXACT = MixtureDenoiser([0.3, 0.7], MEANS, torch.tensor([0.1, 0.3], dtype=torch.float32).double())


def noisy(sigma: float, n: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = TARGET.sample(n, g)
    return x + sigma * torch.empty_like(x).normal_(generator=g)


def many(denoiser: MonteCarloDenoiser, x: torch.Tensor, sigma: float, copies: int) -> torch.Tensor:
    """Independent estimates, (copies, n, d)."""
    return denoiser(x.repeat(copies, 1), sigma).reshape(copies, *x.shape)


def z_scores(estimates: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    return (estimates.mean(0) - exact) / (estimates.std(0) / len(estimates) ** 0.5)


@pytest.mark.parametrize("sigma", [0.05, 1.0, 30.0])
def test_gaussian_is_exact_with_the_control_variate(sigma):
    target = Gaussian(3, loc=0.7, scale=0.5, condition=16.0)
    variances = 0.25 * 16.0 ** torch.linspace(0, 1, 3, dtype=torch.float64)
    x = target.sample(50, 0) * (1 + sigma)
    exact = GaussianDenoiser(torch.full((3,), 0.7, dtype=torch.float64), variances)(x, sigma)
    for levels in (0, 4):
        found = MonteCarloDenoiser(target, particles=32, levels=levels, scale=2.0)(x, sigma)
        torch.testing.assert_close(found, exact, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("sigma", [0.05, 1.0, 30.0])
def test_gaussian_without_it(sigma):
    target = Gaussian(2, loc=0.7, scale=0.5)
    x = target.sample(8, 0) * (1 + sigma)
    exact = GaussianDenoiser(torch.full((2,), 0.7, dtype=torch.float64), 0.25)(x, sigma)
    denoiser = MonteCarloDenoiser(target, particles=512, levels=2, scale=1.0, control=False)
    # 16 scores; the bias, of order 1 / 512 of a deviation, is a twentieth of the standard error.
    assert float(z_scores(many(denoiser, x, sigma, 100), exact).abs().max()) < 4


@pytest.mark.parametrize("sigma", [0.1, 1.0, 3.0, 100.0])
def test_mixture(sigma):
    x = noisy(sigma, 8)
    denoiser = MonteCarloDenoiser(TARGET, particles=512, levels=4, scale=2.0)
    estimates = many(denoiser, x, sigma, 60)
    exact = EXACT(x, torch.tensor(sigma))
    # Where the posterior has one mode the error is down at rounding, and scores say nothing.
    z = z_scores(estimates, exact)[(estimates - exact).abs().amax(0) > 1e-3]
    assert bool((z.abs() < 4.5).all())
    assert float((estimates.mean(0) - exact).abs().max()) < 0.1


def test_bias_falls_like_one_over_particles():
    x, sigma = noisy(3.0, 4, seed=1), 3.0
    exact = EXACT(x, torch.tensor(sigma))
    bias, error = {}, {}
    for particles in (8, 64):
        estimates = many(MonteCarloDenoiser(TARGET, particles, levels=0, scale=2.0), x, sigma, 4000)
        bias[particles] = float((estimates.mean(0) - exact).norm())
        error[particles] = float((estimates.std(0) / 4000**0.5).norm())
    assert bias[8] > 5 * error[8]
    assert bias[64] < bias[8] / 4 + 3 * error[64]


def test_score_is_that_of_the_noisy_density():
    x = noisy(0.3, 200)
    found = MonteCarloDenoiser(TARGET, particles=128, levels=4, scale=2.0).score(x, 0.3)
    torch.testing.assert_close(found, EXACT.score(x, 0.3), atol=0.2, rtol=0)  # scores are of size 10
    level = torch.tensor([0.3] * 200, dtype=torch.float64)
    torch.testing.assert_close(EXACT.score(x, level), EXACT.score(x, 0.3))


@pytest.mark.parametrize(("levels", "sigma"), [(0, 1.0), (4, 1.0), (4, 50.0)])
def test_density_of_noisy_points_is_unbiased(levels, sigma):
    x = noisy(sigma, 4)
    denoiser = MonteCarloDenoiser(TARGET, particles=32, levels=levels, scale=2.0)
    for _ in range(3):  # step sizes find their place
        denoiser(x, sigma)
    ratio = (denoiser.log_prob(x.repeat(2000, 1), sigma).reshape(2000, 4) - EXACT.log_prob(x, sigma) - 1.5).exp()
    assert float(z_scores(ratio, torch.ones(4, dtype=torch.float64)).abs().max()) < 4


def test_control_variate_pays_at_small_noise():
    x = noisy(0.05, 200)
    exact = EXACT(x, torch.tensor(0.05))
    errors = [
        float((MonteCarloDenoiser(TARGET, 32, 2, scale=2.0, control=control)(x, 0.05) - exact).square().mean().sqrt())
        for control in (True, False)
    ]
    assert errors[0] < 1e-3 * errors[1]


def test_tempered_levels_pay_at_large_noise():
    """As many evaluations: 320 particles without levels, 64 through 4 of them, on modes far apart for the reference."""
    target = GaussianMixture(3 * MEANS, torch.tensor([0.1, 0.3]), torch.tensor([0.3, 0.7]))
    exact = MixtureDenoiser([0.3, 0.7], 3 * MEANS, torch.tensor([0.1, 0.3], dtype=torch.float32).double())
    x = 3 * noisy(20.0, 400)
    errors = []
    for denoiser in (MonteCarloDenoiser(target, 320, 0, scale=6.0), MonteCarloDenoiser(target, 64, 4, scale=6.0)):
        for _ in range(3):
            found = denoiser(x, 60.0)
        errors.append(float((found - exact(x, torch.tensor(60.0))).square().mean()))
        assert denoiser.ess is not None
    assert errors[1] < 0.8 * errors[0]


def test_posterior_target():
    x, sigma = noisy(0.5, 6), torch.full((6, 1), 0.5, dtype=torch.float64)
    posterior = PosteriorTarget(TARGET, x, sigma)
    at = x + 0.1
    normal = torch.distributions.Normal(at, 0.5).log_prob(x).sum(-1)
    torch.testing.assert_close(posterior.log_prob(at), TARGET.log_prob(at) + normal)
    leaf = at.clone().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad((TARGET._log_density(leaf) + posterior._likelihood(leaf)[0]).sum(), leaf)
    torch.testing.assert_close(posterior.score(at), slope)
    assert posterior.evaluations is TARGET.evaluations


def test_what_a_denoiser_promises():
    seen = []

    def density(x):
        seen.append(len(x))
        return -0.5 * x.square().sum(-1)

    target = Target(density, dim=6)
    denoiser = MonteCarloDenoiser(target, particles=16, levels=3, moves=2, chunk=100, smoothness=1.0)
    assert isinstance(denoiser, Denoiser)
    assert denoiser.ess is None
    x = torch.randn(10, 2, 3, generator=torch.Generator().manual_seed(0))
    out = denoiser(x, torch.linspace(0, 2, 10))
    assert out.shape == x.shape
    assert out.dtype == torch.float32
    assert torch.equal(out[0], x[0])  # no noise
    assert target.evaluations.gradients == 10 * 16 * (1 + 3 * 2)
    assert target.evaluations.values == 0
    assert max(seen) <= 100
    assert 0 < denoiser.ess.smallest <= denoiser.ess.mean <= 1
    same, again = MonteCarloDenoiser(target, 16, 3, 2, chunk=100, smoothness=1.0), denoiser(x, torch.linspace(0, 2, 10))
    assert torch.equal(same(x, torch.linspace(0, 2, 10)), out)
    assert not torch.equal(again, out)
    with pytest.raises(ValueError, match="6 coordinates"):
        denoiser(x[:, 0], 1.0)
    with pytest.raises(ValueError, match="condition"):
        denoiser(x, 1.0, label=1)
    with pytest.raises(ValueError, match="negative"):
        denoiser(x, -1.0)
    for settings in ({"particles": 1}, {"levels": -1}, {"moves": 0}, {"scale": 0.0}, {"chunk": 8}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            MonteCarloDenoiser(target, **settings)


def test_support_with_an_edge():
    """x0 > 0 exponential: E[x0 | x] is the mean of a truncated Gaussian. The density jumps: no control variate."""
    target = Target(lambda x: torch.where(x[:, 0] > 0, -x[:, 0], -math.inf), dim=1)
    x = torch.tensor([[-3.0], [0.5], [3.0]], dtype=torch.float64)
    denoiser = MonteCarloDenoiser(target, particles=512, levels=4, scale=2.0, control=False)
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    centre = x - 1.0
    exact = centre + normal.log_prob(centre).exp() / normal.cdf(centre)
    estimates = many(denoiser, x, 1.0, 100)
    torch.testing.assert_close(estimates.mean(0), exact, atol=0.01, rtol=0.02)
    outside = denoiser(torch.tensor([[-50.0]], dtype=torch.float64), 0.1)
    assert bool(torch.isfinite(outside).all())
    assert denoiser.ess.smallest == 0


# -- walks -------------------------------------------------------------------------------------------------------------

LOCALISATION = VE(clock=PowerClock(sigma_max=8.0, horizon=8.0))
WALKS = {
    "VP": (VP(), Exponential(steps=18)),
    "VP ancestral": (VP(), Ancestral(steps=25)),
    "CLD": (CLD(), Exponential(steps=18)),
    "PSLD": (PSLD(), Exponential(steps=18)),
    "localisation": (LOCALISATION, Exponential(steps=14, grid=LogSigma(sigma_min=0.05))),
}


@pytest.mark.parametrize("walk", WALKS)
def test_every_process_runs_from_a_density(walk):
    process, sampler = WALKS[walk]
    n = 400
    method = ReverseDiffusion(process, sampler, particles=64, levels=2, scale=2.0)
    draws = method.run(TARGET, n, seed=0, repeats=4)
    assert draws.states.shape == (4, 100, 1, 2)
    assert not draws.corrected
    assert draws.log_z is None
    assert draws.log_weights is None
    assert draws.notes == ()
    error = math.sqrt(0.3 * 0.7 / n)
    assert abs(float(draws.mode_weights()[0]) - 0.3) < 3.5 * error
    for k, variance in enumerate((0.1, 0.3)):
        mode = draws.x[TARGET.assign(draws.x) == k]
        assert float(((mode.mean(0) - MEANS[k]) / (variance / len(mode)) ** 0.5).abs().max()) < 4
        assert float((mode.var(0) / variance - 1).abs().max()) < 4 * math.sqrt(2 / len(mode))
    exact = sample(Diffusion(process, EXACT), n, (2,), sampler, seed=1, dtype=torch.float64)
    reference = TARGET.sample(n, 9)
    floor = [wasserstein(TARGET.sample(n, 10 + i), reference) for i in range(10)]
    spread = max(max(floor), wasserstein(exact, reference))
    assert wasserstein(draws.x, reference) < 1.3 * spread
    # A check of the target costs a few evaluations; the walk costs what the denoiser says.
    calls = sampler.plan(process).calls
    expected = calls * n * 64 * (1 + 2)
    assert expected <= draws.evaluations.gradients <= expected + 64 * 20


def test_starts_as_wide_as_the_data():
    """VE that ends at sigma = 2 = s: the plain start has half of the variance that it should have."""
    process = VE(clock=PowerClock(sigma_max=2.0, horizon=2.0))
    gaussian = GaussianDenoiser(torch.zeros(1, dtype=torch.float64), 4.0)
    sampler = Exponential(steps=40)
    widths = [
        float(sample(Diffusion(p, gaussian), 20000, (1,), sampler, seed=0, dtype=torch.float64).var())
        for p in (process, matched_prior(process, 2.0))
    ]
    assert widths[0] == pytest.approx(2.0, rel=0.05)
    assert widths[1] == pytest.approx(4.0, rel=4 * math.sqrt(2 / 20000) + 0.01)
    for other in (VP(), CLD(), PSLD()):  # where sigma(T) is large nothing changes
        torch.testing.assert_close(matched_prior(other, 1.0).prior(), other.prior(), atol=1e-2, rtol=0)
    with pytest.raises(ValueError, match="spread"):
        matched_prior(process, -1.0)


def test_weighted_starts_mend_a_low_level():
    process = VE(clock=PowerClock(sigma_max=2.0, horizon=2.0))
    target = TwoModes(weight=0.2, distance=2.0)
    sampler = Exponential(steps=10)
    found = {}
    for oversample in (1, 8):
        method = ReverseDiffusion(process, sampler, levels=2, particles=32, scale=2.2, oversample=oversample)
        draws = method.run(target, 1000, seed=0, repeats=4)
        found[oversample] = float((draws.x < 0).double().mean())
        assert ("oversample" in " ".join(draws.notes)) == (oversample == 1)
    share = 0.2 * 0.9772499 + 0.8 * 0.0227501
    error = math.sqrt(share * (1 - share) / 1000)
    assert abs(found[1] - share) > 5 * error
    assert abs(found[8] - share) < 4 * error


def test_coordinates_and_seeds():
    target = Target(lambda x: -0.5 * ((x - 100) / 0.1).square().sum(-1), dim=2)
    method = ReverseDiffusion(
        sampler=Exponential(steps=40), particles=8, levels=1, batch=30, coordinates=Affine(100.0, 0.1)
    )
    one, two, other = (method.run(target, 100, seed, repeats=2) for seed in (0, 0, 1))
    assert torch.equal(one.states, two.states)
    assert not torch.equal(one.states, other.states)
    assert float(((one.x.mean(0) - 100) / 0.01).abs().max()) < 4
    assert float((one.x.var(0) / 0.01 - 1).abs().max()) < 4 * math.sqrt(2 / 100)


@pytest.mark.parametrize("stop", [1, 3])
def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, stop):
    from undrift.density import reverse_diffusion

    method = ReverseDiffusion(sampler=Exponential(steps=5), particles=8, levels=1, batch=20)
    whole = method.run(TARGET, 60, seed=2, repeats=2)
    real, file, walks = reverse_diffusion.run_plan, tmp_path / "run.undrift", []

    def interrupted(*arguments):
        walks.append(arguments)
        if len(walks) == stop:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(reverse_diffusion, "run_plan", interrupted)
    with pytest.raises(KeyboardInterrupt):
        method.run(TARGET, 60, seed=2, repeats=2, checkpoint=file)
    monkeypatch.setattr(reverse_diffusion, "run_plan", real)
    with pytest.raises(ValueError, match="belongs to a run"):
        method.run(TARGET, 60, seed=3, repeats=2, checkpoint=file)
    resumed = method.run(TARGET, 60, seed=2, repeats=2, checkpoint=file)
    assert torch.equal(resumed.states, whole.states)
    assert not file.exists()


def test_unusable_settings_and_plain_data():
    with pytest.raises(ValueError, match="fixed steps"):
        ReverseDiffusion(sampler=ProbabilityFlow())
    with pytest.raises(ValueError, match="oversample"):
        ReverseDiffusion(oversample=0)
    with pytest.raises(ValueError, match="particles"):
        ReverseDiffusion(particles=1)
    method = ReverseDiffusion(PSLD(), Exponential(steps=7), particles=16)
    assert describe(build(describe(method), Method)) == describe(method)

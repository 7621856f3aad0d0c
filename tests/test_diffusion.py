"""Diffusion = process x denoiser: its score is the analytic one in augmented space, for every linear process."""

import math

import pytest
import torch

from undrift.denoise import GaussianDenoiser, MixtureDenoiser
from undrift.diffusion import Diffusion, NoiseDiffusion
from undrift.process import (
    ALDA,
    CLD,
    HOLD,
    MALDA,
    PSLD,
    VE,
    VP,
    CosineClock,
    FlowMatching,
    GeometricClock,
    LinearClock,
    LinearProcess,
    Recipe,
    SubVP,
    time_varying_recipe,
)

CATALOG: dict[str, LinearProcess] = {
    "VP": VP(),
    "VP cosine": VP(clock=CosineClock()),
    "SubVP": SubVP(),
    "VE": VE(),
    "VE geometric": VE(clock=GeometricClock()),
    "FlowMatching": FlowMatching(),
    "CLD": CLD(),
    "CLD of MDM": CLD(mass=1.0, aux_scale=0.01, clock=LinearClock(0.1, 10.0)),
    "PSLD": PSLD(),
    "PSLD .02": PSLD(gamma=0.02, nu=4.02),
    "ALDA": ALDA(),
    "HOLD": HOLD(),
    "MALDA 1": MALDA(auxiliaries=1),
    "MALDA 2": MALDA(auxiliaries=2),
    "MALDA 3": MALDA(auxiliaries=3),
}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(seed))


def random_recipe(k: int, seed: int) -> Recipe:
    """Noise of rank 1 for k > 2, every channel coupled; the stationary covariance is full."""
    d, q, s = normal(k, max(1, k - 2), seed=seed), normal(k, k, seed=seed + 1), normal(k, k, seed=seed + 2)
    s = s @ s.T + 0.5 * torch.eye(k, dtype=torch.float64)
    return Recipe(D=d @ d.T, Q=q - q.T, S=s, clock=LinearClock(0.2, 6.0), start_cov=0.03)


RECIPES = {f"recipe K={k} #{seed}": random_recipe(k, seed) for k in range(1, 6) for seed in (10, 20)}


def oscillating() -> LinearProcess:
    """D and Q on schedules of their own: no clock is shared."""

    def d(t: torch.Tensor) -> torch.Tensor:
        one, zero = 1 + t, torch.zeros_like(t)
        return torch.stack([torch.stack([0.2 * one, zero], -1), torch.stack([zero, 2 * one], -1)], -2)

    def q(t: torch.Tensor) -> torch.Tensor:
        w, zero = 2 * torch.sin(3 * t), torch.zeros_like(t)
        return torch.stack([torch.stack([zero, -w], -1), torch.stack([w, zero], -1)], -2)

    return time_varying_recipe(d, q, torch.eye(2, dtype=torch.float64))


PROCESSES = CATALOG | RECIPES | {"time-varying": oscillating()}


def times_of(process: LinearProcess, *sigmas: float) -> torch.Tensor:
    """Times at which z shows x0 through noise of about these levels, or the nearest that the process reaches."""
    grid = process.horizon * torch.logspace(-6, 0, 121, dtype=torch.float64)
    levels = torch.tensor(sigmas, dtype=torch.float64).clamp(max=1e6).log()
    return grid[(process.sigma(grid).log() - levels.unsqueeze(-1)).abs().argmin(-1)]


def mixture(d: int, modes: int = 4) -> MixtureDenoiser:
    roots = 0.4 * normal(modes, d, d, seed=1) + 0.2 * torch.eye(d, dtype=torch.float64)
    weights = torch.arange(1, modes + 1, dtype=torch.float64)
    return MixtureDenoiser(weights, 1.2 * normal(modes, d, seed=2), roots @ roots.mT)


def augmented(process: LinearProcess, data: MixtureDenoiser, t: float) -> torch.distributions.Distribution:
    """Law of z_t flattened (K d): sum_k w_k N(m (x) mu_k, m m' (x) C_k + S (x) I), by dense linear algebra."""
    mean, root = process.kernel(t)
    cov, d = root @ root.mT, data.means.shape[1]
    centres = torch.kron(mean.unsqueeze(0), data.means)
    eye = torch.eye(d, dtype=torch.float64)
    covs = torch.stack([torch.kron(torch.outer(mean, mean), c) + torch.kron(cov, eye) for c in data.covs])
    return torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(data.weights), torch.distributions.MultivariateNormal(centres, covs)
    )


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("d", [2, 3])
def test_score_is_the_analytic_score_of_a_mixture(name, d):
    process, data = PROCESSES[name], mixture(d)
    diffusion = Diffusion(process, data)
    x0 = data.sample(8, torch.Generator().manual_seed(3))
    # Below sigma = 1e-3 no denoiser could do it in float64: the score is (D - x~) / sigma^2 times a vector, so the
    # rounding of D alone, 1e-16, is an error of 1e-16 / sigma^2.
    for t in times_of(process, 1e-3, 0.03, 0.3, 2.0, math.inf):
        z, _ = process.perturb(x0, t, torch.Generator().manual_seed(4))
        flat = z.flatten(1).requires_grad_()
        (want,) = torch.autograd.grad(augmented(process, data, t).log_prob(flat).sum(), flat)
        got = diffusion.score(z, t).flatten(1)
        assert float((got - want).abs().max()) <= 1e-8 * max(1.0, float(want.abs().max())), f"t = {t}"


@pytest.mark.parametrize("name", PROCESSES)
def test_one_time_per_sample_and_predictor_agree_with_predict(name):
    process, data = PROCESSES[name], mixture(2)
    diffusion = Diffusion(process, data)
    times = times_of(process, 0.03, 0.3, 2.0, math.inf)
    z, _ = process.perturb(data.sample(4, torch.Generator().manual_seed(3)), times, torch.Generator().manual_seed(4))
    batched, scores = diffusion.predict(z, times), diffusion.score(z, times)
    predictor = diffusion.predictor(times)
    for i, t in enumerate(times):
        torch.testing.assert_close(diffusion.predict(z, t)[i], batched[i], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(diffusion.score(z, t)[i], scores[i], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(predictor(z, i)[i, 0], batched[i], rtol=1e-12, atol=1e-12)


def test_score_of_gaussian_data_has_the_computed_values():
    """PSLD, Gamma = .01, x0 ~ N(.3, .25): marginals and scores computed in 40 digits."""
    diffusion = Diffusion(PSLD(), GaussianDenoiser(0.3, 0.25))
    z = torch.tensor([[0.7, -0.2]], dtype=torch.float64)
    for t, mean, cov, score in (
        (
            0.1,
            (0.241669028576, -0.053704228573),
            (0.390243854118, 0.092773304025, 0.224042702501),
            (-1.474899256391, 1.263719127586),
        ),
        (
            0.5,
            (0.026929447409, -0.010771778964),
            (0.989006041711, 0.004273816679, 0.248336885817),
            (-0.683896150928, 0.773751620425),
        ),
    ):
        m, root = diffusion.process.kernel(t)
        p = root @ root.mT + 0.25 * torch.outer(m, m)
        assert (0.3 * m).tolist() == pytest.approx(mean, abs=1e-12)
        assert [float(p[0, 0]), float(p[0, 1]), float(p[1, 1])] == pytest.approx(cov, abs=1e-12)
        assert diffusion.score(z, t)[0].tolist() == pytest.approx(score, abs=1e-11)


def test_two_class_score_splits_into_prior_and_likelihood():
    """N(+-1, .25) with equal weights under PSLD: the mixture's score and the gradient of log p(y = +1 | z)."""
    process = PSLD()
    both = Diffusion(process, MixtureDenoiser([1.0, 1.0], [[-1.0], [1.0]], 0.25))
    one = Diffusion(process, GaussianDenoiser([1.0], 0.25))
    z = torch.tensor([[[0.4], [-0.1]]], dtype=torch.float64)
    for t, guide, total in (
        (0.05, (0.28236207, -0.11279775), (1.77532092, -0.49908647)),
        (0.3, (0.29442049, -0.41114065), (-0.40128994, 0.39619304)),
    ):
        unconditional = both.score(z, t)
        assert unconditional.flatten().tolist() == pytest.approx(total, abs=1e-8)
        assert (one.score(z, t) - unconditional).flatten().tolist() == pytest.approx(guide, abs=1e-8)


def test_predict_is_the_regression_of_x0_on_z():
    """E[(x0 - predict(z)) z] = 0 channel by channel, each within 5 of its own standard errors."""
    process, data, n = MALDA(), mixture(2), 40_000
    x0 = data.sample(n, torch.Generator().manual_seed(5))
    z, _ = process.perturb(x0, 0.6, torch.Generator().manual_seed(6))
    product = (x0 - Diffusion(process, data).predict(z, 0.6)).unsqueeze(1) * z
    assert bool((product.mean(0).abs() < 5 * product.std(0) / math.sqrt(n)).all())


# -- the papers' way: a network that predicts noise --------------------------------------------------------------------


class ExactNoise:
    """The best noise network for Gaussian data N(mu, s^2): -R' (score - baseline), told the times as a condition."""

    def __init__(self, mu: float, std: float) -> None:
        self.mu, self.std = mu, std
        self.owner: NoiseDiffusion

    def __call__(self, z: torch.Tensor, label: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        times = times.expand(z.shape[0])
        torch.testing.assert_close(label, 0.25 * self.owner.process.sigma(times).log().expand_as(label))
        root, baseline, scale, *_ = self.owner.coefficients(times)
        mean, kernel = self.owner.process.kernel(times)
        p = kernel @ kernel.mT + self.std**2 * mean.unsqueeze(-1) * mean.unsqueeze(-2)
        state = z.flatten(2) * scale.unsqueeze(-1)
        score = -torch.linalg.solve(p, state - self.mu * mean.unsqueeze(-1))
        return (-root.mT @ (score - baseline @ state)).reshape(z.shape)


def noise_diffusion(process: LinearProcess, data_std: float = 1.0, **options: object) -> NoiseDiffusion:
    network = ExactNoise(0.3, 0.5)
    network.owner = NoiseDiffusion(process, network, data_std=data_std, **options)
    return network.owner


@pytest.mark.parametrize("kernel", ["hsm", "dsm"])
@pytest.mark.parametrize("factor", ["lower", "upper"])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", ["VP", "PSLD", "CLD", "MALDA 2", "HOLD", "recipe K=4 #10"])
def test_noise_network_gives_the_same_score_and_prediction(name, kernel, factor, mixed):
    process = PROCESSES[name]
    times = times_of(process, 0.03, 0.3, 2.0)
    noise = noise_diffusion(process, data_std=0.7, kernel=kernel, factor=factor, mixed=mixed)
    exact = Diffusion(process, GaussianDenoiser([0.3, 0.3], 0.25))
    z, _ = process.perturb(0.3 + 0.5 * normal(3, 2, seed=7), times, torch.Generator().manual_seed(8))
    want = exact.score(z, times)
    torch.testing.assert_close(noise.score(z, times, times=times), want, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(noise.predict(z, times, times=times), exact.predict(z, times), rtol=0, atol=1e-8)
    predictor = noise.predictor(times)
    phi, root = process.marginal(times)
    for i, t in enumerate(times):
        start = predictor(z, i, times=t)
        tweedie = torch.linalg.solve(phi[i], z + root[i] @ root[i].mT @ exact.score(z, t))
        torch.testing.assert_close(start, tweedie, rtol=0, atol=1e-7)
        torch.testing.assert_close(start[:, 0], noise.predict(z, t, times=t), rtol=0, atol=1e-7)


@pytest.mark.parametrize("mixed", [False, True])
def test_mixed_score_of_matching_gaussian_leaves_the_mean_to_learn(mixed):
    """With ``data_std`` the data's own, what the network must predict is the constant R' P^-1 m mu: no z in it."""
    process = PSLD()
    noise = noise_diffusion(process, data_std=0.5, mixed=mixed)
    t = torch.tensor(0.4, dtype=torch.float64)
    spread = noise.noise(normal(6, 2, 1, seed=9), t, times=t).std(0).max()
    assert (float(spread) < 1e-10) == mixed


def test_upper_and_lower_factors_have_the_computed_values():
    """PSLD, Gamma = .01, t = .5, hybrid kernel."""
    process, t = PSLD(), torch.tensor(0.5, dtype=torch.float64)

    def root(**options: object) -> torch.Tensor:
        return NoiseDiffusion(process, lambda z, c: z, **options).coefficients(t).root

    lower, upper, conditioned = root(), root(factor="upper"), root(kernel="dsm")
    for matrix, want in (
        (lower, ((0.993474514405, 0), (0.00511295355867, 0.497984371816))),
        (upper, ((0.993422153799, 0.0101997605226), (0, 0.498010619231))),
        (conditioned, ((0.993370692665, 0), (0.00519135831164, 0.497954434523))),
        (torch.linalg.inv(lower).mT, ((1.00656834725, -0.0103347363981), (0, 2.00809514635))),
        (torch.linalg.inv(upper).mT, ((1.00662140076, 0), (-0.0206166230762, 2.00798931064))),
        (torch.linalg.inv(conditioned).mT, ((1.00667354834, -0.0104949423681), (0, 2.00821587413))),
    ):
        torch.testing.assert_close(matrix, torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-11)


def test_score_of_a_noise_prediction_has_the_computed_value():
    """PSLD, Gamma = .01, t = .5, hybrid kernel, noise (.1, .2): the score; and x0 = .7 found back from its noise."""
    process = PSLD()
    fixed = torch.tensor([0.1, 0.2], dtype=torch.float64)
    diffusion = NoiseDiffusion(process, lambda z, c: fixed.expand_as(z))
    score = diffusion.score(torch.tensor([[0.5, -0.2]], dtype=torch.float64), 0.5)
    assert score[0].tolist() == pytest.approx((-0.0985898874454, -0.401619029269), abs=1e-12)
    z = torch.tensor([[0.162182828729, 0.0749740188038]], dtype=torch.float64)
    start = diffusion.predictor(torch.tensor([0.5]))(z, 0)
    assert start[0].tolist() == pytest.approx((0.7, 0.0), abs=2e-9)  # z has 12 digits, and Phi^-1 costs 3 of them


BAD = [
    (lambda: NoiseDiffusion(VP(), lambda z, c: z, kernel="exact"), r"kernel must be 'hsm' or 'dsm', got 'exact'"),
    (lambda: NoiseDiffusion(VP(), lambda z, c: z, factor="left"), r"factor must be 'lower' or 'upper', got 'left'"),
    (lambda: NoiseDiffusion(VP(), lambda z, c: z, data_std=0.0), r"data_std must be positive, got 0"),
    (
        lambda: Diffusion(PSLD(), GaussianDenoiser()).score(torch.zeros(3, 4), 0.5),
        r"PSLD: z must have shape \(batch, 2",
    ),
    (lambda: Diffusion(VP(), GaussianDenoiser()).score(torch.zeros(3, 1), 1.5), r"VP: t must lie in \[0, 1\], got 1.5"),
    (
        lambda: Diffusion(VP(), GaussianDenoiser()).predict(torch.zeros(3, 1), torch.ones(2)),
        r"one time or one per sample \(3,\), got shape \(2,\)",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()

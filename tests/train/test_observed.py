"""Models of points given data: pairs travel from the data set to the network, and what is learned is the posterior."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from undrift.denoise import FieldGaussian, GaussianDenoiser, Guided, NetworkDenoiser, TweedieMoments
from undrift.diffusion import Diffusion
from undrift.networks import MLP, SpectralNet, UNet
from undrift.observe import GaussianNoise, Matrix, Observation, Operator
from undrift.process import VP, ConstantClock
from undrift.sample import Exponential, sample
from undrift.space import Cosine, EmpiricalSpectrum, FunctionSpace, Matern
from undrift.train import (
    Dataset,
    DataSource,
    Denoising,
    LogUniform,
    Measured,
    Npz,
    Resampled,
    Ring,
    Simulated,
    TrainConfig,
    Trainer,
    load,
)


@dataclass(frozen=True, eq=False)
class Normal(DataSource):
    """Standard normal points in the plane."""

    n: int = 2000

    def load(self):
        return Dataset("normal", torch.randn(self.n, 2, generator=torch.Generator().manual_seed(0)))


A, STD = torch.tensor([[1.0, 0.5]]), 0.4


def posterior():
    """Gain of the mean in y (2, 1), and the covariance (2, 2), of a standard normal point given y = A x + STD e."""
    cov = torch.linalg.inv(torch.eye(2) + A.T @ A / STD**2)
    return cov @ A.T / STD**2, cov


def test_an_amortised_denoiser_learns_the_posterior_of_a_linear_problem(tmp_path):
    torch.manual_seed(0)
    model = NetworkDenoiser(MLP(2, width=48, depth=1, condition_features=1), sigma_data=1.0)
    levels = LogUniform(0.2, 5.0)
    config = TrainConfig(steps=300, batch=128, lr=5e-3, warmup=20, ema=5_000.0)
    source = Simulated(Normal(), Matrix(A), GaussianNoise(STD))
    Trainer(model, Denoising(noise=levels), source, config, tmp_path).fit(progress=False)
    model = load(tmp_path / "model.safetensors")
    gain, cov = posterior()
    g = torch.Generator().manual_seed(1)
    x = torch.randn(4000, 2, generator=g)
    y = x @ A.T + STD * torch.randn(4000, 1, generator=g)
    with torch.no_grad():
        for sigma in (0.5, 1.0, 3.0):
            noisy = x + sigma * torch.randn(4000, 2, generator=g)
            # the exact posterior mean given both, by shifting to the law given y
            centre = y @ gain.T
            exact = centre + GaussianDenoiser([0.0, 0.0], cov)(noisy - centre, sigma)
            found = model(noisy, sigma, observed=y)
            blind = GaussianDenoiser([0.0, 0.0], 1.0)(noisy, sigma)
            # errors of the exact denoisers with and without data are apart by |exact - blind|^2 on average; the network
            # must have made up all but 5 % of that
            left = float((found - exact).square().sum(1).mean() / (exact - blind).square().sum(1).mean())
            assert left < 0.05, (sigma, left)
    # one observation for all samples, and one for each: the same model
    diffusion = Diffusion(VP(), model)
    one = sample(diffusion, 400, (2,), Exponential(12, order=2), seed=0, observed=torch.tensor([1.5]))
    each = sample(diffusion, 400, (2,), Exponential(12, order=2), seed=0, observed=torch.full((400, 1), 1.5), batch=400)
    torch.testing.assert_close(one, each)
    mean = gain @ torch.tensor([1.5])
    # four standard errors of the mean of 400, and a tenth of the prior's deviation for the network
    assert float((one.mean(0) - mean).abs().max()) < 4 * float(cov.diagonal().sqrt().max()) / 20 + 0.1
    deviation = (torch.cov(one.T).diagonal() / cov.diagonal()).sqrt()
    assert float((deviation - 1).abs().max()) < 4 / math.sqrt(800) + 0.1


def conditional(a, std, y, coordinates="coefficients"):
    """Prior, data given as modes a_j c_j + std e, and the exact denoiser given them."""
    n, space = len(a), FunctionSpace(Cosine(), Matern(1.0, 3.0), coordinates)
    prior = Matern(2.0, 3.0)
    mu = prior.variances(Cosine(), (n,))
    p = 1 / (1 / mu + a.square() / std**2)
    given = EmpiricalSpectrum(tuple(p.tolist()), (n,), prior)
    centre = Cosine().synthesise(p * a * y / std**2)
    return space, FieldGaussian(space, prior), FieldGaussian(space, given, centre), mu, p


@pytest.mark.parametrize("std", [0.5, 0.01])
def test_the_conditional_score_pulls_a_mode_at_the_rate_of_its_closed_form(std):
    # Ornstein-Uhlenbeck, dX = -X/2 dt + C^(1/2) dW: mode j is pulled with lambda / (e^-t p + (1 - e^-t) lambda)
    n = 12
    g = torch.Generator().manual_seed(0)
    a, y = torch.rand(n, generator=g, dtype=torch.float64), torch.randn(n, generator=g, dtype=torch.float64)
    space, prior, exact, mu, p = conditional(a, std, y)
    lam = space.variances((n,))
    diffusion = Diffusion(VP(ConstantClock(1.0, 3.0)), exact)
    modes = Cosine().analyse(torch.eye(n, dtype=torch.float64)).T  # operators see values of functions
    seen = Observation(Matrix(a.unsqueeze(1) * modes), GaussianNoise(std), y)
    guided = Diffusion(VP(ConstantClock(1.0, 3.0)), Guided(prior, TweedieMoments(seen)))
    z = torch.randn(2, 1, n, generator=g, dtype=torch.float64)
    for t in (0.01, 0.3, 2.0):
        slope = diffusion.preconditioned_score(z, t) - diffusion.preconditioned_score(z + 1.0, t)
        rate = lam / (math.exp(-t) * p + (1 - math.exp(-t)) * lam)
        torch.testing.assert_close(slope[0, 0], rate, rtol=1e-8, atol=0)
        score = diffusion.preconditioned_score(z, t)
        torch.testing.assert_close(guided.preconditioned_score(z, t), score, rtol=1e-6, atol=1e-6)
    # at t = 0 that is lambda/mu + lambda a^2/std^2: it has no bound as the data get sharp, the prior's alone has one
    t = 1e-7
    slope = diffusion.preconditioned_score(z, t) - diffusion.preconditioned_score(z + 1.0, t)
    limit = lam / mu + lam * a.square() / std**2
    # to first order in t the rate is limit (1 - t (limit - 1)); the difference of predictions keeps 1e-16/t of digits
    torch.testing.assert_close(slope[0, 0], limit, rtol=2 * t * float(limit.max()) + 1e-7, atol=0)


def test_fresh_observations_come_with_every_draw_and_stored_ones_stay_with_their_points(tmp_path):
    fresh = Simulated(Normal(200), Matrix(A), GaussianNoise(STD)).load()
    index, g = torch.arange(50), torch.Generator().manual_seed(0)
    first, second = (fresh.observe(index, fresh.draw(index, g), g) for _ in range(2))
    assert first.shape == (50, 1)
    assert not torch.equal(first, second)
    # the difference of two observations of one point has variance 2 STD^2, which 50 of them give to 20 per cent
    assert float((first - second).var() / (2 * STD**2)) == pytest.approx(1.0, abs=4 * 0.2)
    x, y = np.arange(6.0).reshape(3, 2), np.arange(3.0).reshape(3, 1)
    np.savez(tmp_path / "pairs.npz", x=x, y=y, text=np.array(["a", "b", "c"]))
    stored = Npz(str(tmp_path / "pairs.npz"), observed="y").load()
    assert stored.observe(torch.tensor([2, 0]), stored.x, g).tolist() == [[2.0], [0.0]]
    assert stored.to(torch.device("cpu")).observed.dtype == torch.float32
    assert Ring(n=10).load().observe(index, x, g) is None
    with pytest.raises(ValueError, match="has no array 'z'"):
        Npz(str(tmp_path / "pairs.npz"), observed="z").load()
    with pytest.raises(ValueError, match=r"array 'text' of .* must hold numbers"):
        Npz(str(tmp_path / "pairs.npz"), observed="text").load()


def test_a_resumed_run_with_fresh_observations_equals_one_in_a_piece(tmp_path):
    def run(folder, steps):
        torch.manual_seed(0)
        model = NetworkDenoiser(MLP(2, width=8, depth=1, condition_features=1))
        config = TrainConfig(steps=steps, batch=16, warmup=2)
        source = Simulated(Normal(64), Matrix(A), GaussianNoise(STD))
        return Trainer(model, Denoising(), source, config, folder).fit(progress=False).model

    run(tmp_path / "two", 5)
    one, two = run(tmp_path / "one", 12), run(tmp_path / "two", 12)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_images_and_classes_are_conditions_together():
    torch.manual_seed(0)
    network = UNet(1, 8, width=8, classes=3, condition_channels=2)
    torch.nn.init.normal_(network.outward.weight, std=0.1)
    x, label = torch.randn(4, 1, 8, 8), torch.zeros(4)
    seen = torch.randn(4, 2, 8, 8)
    out = network(x, label, observed=seen, y=torch.tensor([0, 1, 2, -1]))
    torch.testing.assert_close(network(x, label, observed=seen[1], y=torch.tensor([1, 1, 1, 1]))[1], out[1])
    assert (
        float((network(x, label, observed=seen + 1, y=torch.tensor([0, 1, 2, -1])) - out).detach().abs().max()) > 1e-3
    )
    data = Dataset("pairs", x, labels=torch.tensor([0, 1, 2, 0]), observed=seen)
    config = TrainConfig(steps=2, batch=4)
    assert Trainer(NetworkDenoiser(network), Denoising(), data, config).fit(progress=False).step == 2


def test_fields_on_several_grids_are_the_same_functions():
    class Fields(DataSource):
        def load(self):
            c = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
            return Dataset("fields", Cosine().synthesise(c))

    class Mean(Operator):
        def forward(self, x):
            return x.mean(-1, keepdim=True)

    data = Resampled(Simulated(Fields(), Mean(), GaussianNoise(1e-3)), ((8,), (12,), (16,))).load()
    g, index, seen = torch.Generator().manual_seed(0), torch.arange(20), set()
    for _ in range(12):
        x = data.draw(index, g)
        seen.add(x.shape[1])
        torch.testing.assert_close(Cosine().resample(x, (8,)), data.x, rtol=0, atol=1e-5)
        # observed on the grid that was drawn: the constant mode, to five deviations of the noise
        torch.testing.assert_close(data.observe(index, x, g)[:, 0], data.x.mean(1), rtol=0, atol=5e-3)
    assert seen == {8, 12, 16}
    assert Resampled(Fields(), ((5,),)).load().event == (5,)


def test_a_network_of_functions_is_told_data_of_any_kind():
    fields = Cosine().synthesise(torch.randn(32, 8, generator=torch.Generator().manual_seed(0)))
    config = TrainConfig(steps=2, batch=8)
    for options, observed in (
        ({"condition_features": 3}, fields[:, :3]),
        ({"condition_channels": 1}, fields.unsqueeze(1)),
    ):
        network = SpectralNet(width=8, modes=4, depth=1, **options)
        model = NetworkDenoiser(network, sigma_data=1.0, space=FunctionSpace.of(fields))
        Trainer(model, Denoising(), Dataset("pairs", fields, observed=observed), config).fit(progress=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: Dataset("d", torch.zeros(3, 2), observed=torch.zeros(2, 1)),
            r"observed must be floating \(3, \*data\)",
        ),
        (lambda: Dataset("d", torch.zeros(2, 2), observed=torch.full((2, 1), math.nan)), "observed must be finite"),
        (lambda: Resampled(Ring(n=10), ((3, 3),)).load(), "grids of 1 positive sizes"),
        (lambda: Simulated(Ring(n=10), Matrix(torch.zeros(1, 3)), GaussianNoise(1.0)).load(), "rows hold 3 numbers"),
        (
            lambda: Trainer(NetworkDenoiser(MLP(2, condition_features=1)), Denoising(), Ring(n=200)),
            "has no observations; give its Dataset observed=",
        ),
        (
            lambda: Trainer(
                NetworkDenoiser(MLP(2)),
                Denoising(),
                Dataset("d", torch.zeros(9, 2), observed=Measured(Matrix(A), GaussianNoise(1.0))),
                TrainConfig(steps=1, batch=4),
            ).fit(progress=False),
            "got observed, but it was built without condition_features",
        ),
        (lambda: MLP(2, condition_features=-1), "condition_features must be 0 or more"),
        (lambda: UNet(1, 8, condition_channels=-1), "condition_channels must be 0 or more"),
        (lambda: UNet(1, 8, condition_channels=1)(torch.zeros(1, 1, 8, 8), torch.zeros(1)), "give observed="),
    ],
)
def test_misuse_is_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()

"""The way back and the bound of a non-linear process, with scores that are exact: nothing here is trained."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.interpolate import RegularGridInterpolator
from torch import Tensor

from tests.process.cases import normal, random_recipe
from tests.process.test_nonlinear import POINTS, SYSTEMS
from tests.reference.fokker_planck import FokkerPlanck
from undrift import NonlinearDiffusion
from undrift._linalg import ou_transition
from undrift.process import ConstantClock, NonlinearRecipe

HORIZON = 2.5
RESOLUTION = 0.2


def bent() -> NonlinearRecipe:
    """A quartic law, reached with noise that depends on the state."""
    return NonlinearRecipe(
        lambda z: 0.25 * (z**4).sum(1), lambda z: ((1 + z**2) / (1 + 0.5 * z**2))[..., None], torch.zeros(1, 1), 1
    )


EXACT = FokkerPlanck(lambda x: 0.25 * x**4, lambda x: (1 + x**2) / (1 + 0.5 * x**2), -4.5, 4.5)


def bumps(x: np.ndarray) -> np.ndarray:
    def normal(mean: float, std: float) -> np.ndarray:
        return np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))

    return 0.7 * normal(1.2, 0.3) + 0.3 * normal(-0.6, 0.2)


def quantiles(density: np.ndarray, u: np.ndarray) -> np.ndarray:
    return np.interp(u, np.cumsum(density) * EXACT.dx, EXACT.x + 0.5 * EXACT.dx)


def with_departure(process: NonlinearRecipe, horizon: float, departure: Callable[[Tensor, Tensor], Tensor]):
    """A diffusion whose score is the stationary law's plus ``departure(z, t)``: t is read off the network's label."""
    probe = NonlinearDiffusion(process, lambda z, label: z, horizon, RESOLUTION)

    def network(z: Tensor, label: Tensor) -> Tensor:
        level = (4 * label).exp()
        return departure(z, (level.square() - RESOLUTION**2) / probe.rate) * level.unsqueeze(1)

    return NonlinearDiffusion(process, network, horizon, RESOLUTION)


def exact_model() -> NonlinearDiffusion:
    """The exact score of the bumps under the bent process, tabulated."""
    probe = NonlinearDiffusion(bent(), lambda z, label: z, HORIZON, RESOLUTION)
    times = probe.times(torch.linspace(0, 1, 80, dtype=torch.float64)).numpy()
    start, table = bumps(EXACT.x), []
    for t in times:
        seen, score = EXACT.score(start, t)
        departure = score + EXACT.x**3
        inside = np.flatnonzero(seen)[[1, -2]]  # one-sided differences at the ends are worse
        table.append(np.interp(EXACT.x, EXACT.x[inside[0] : inside[1]], departure[inside[0] : inside[1]]))
    look = RegularGridInterpolator((times, EXACT.x), np.stack(table), bounds_error=False, fill_value=None)

    def departure(z: Tensor, t: Tensor) -> Tensor:
        at = torch.stack([t.clamp(0, HORIZON), z[:, 0].clamp(-4.5, 4.5)], 1)
        return torch.from_numpy(look(at.numpy())).to(z).unsqueeze(1)

    return with_departure(bent(), HORIZON, departure)


def test_samples_of_the_exact_score_have_the_law_of_the_data():
    """W1 below 3 std / sqrt(n): the W1 of n exact draws has mean below 1 std / sqrt(n), and so does its deviation."""
    n, std = 2000, 0.87
    start = torch.from_numpy(quantiles(EXACT.stationary, np.random.default_rng(0).random(n))).unsqueeze(1)
    x = exact_model().sample(n, 40, torch.Generator().manual_seed(0), start)[:, 0].sort().values.numpy()
    assert np.abs(x - quantiles(bumps(EXACT.x), (np.arange(n) + 0.5) / n)).mean() < 3 * std / math.sqrt(n)


def test_bound_of_the_exact_score_is_entropy_plus_the_prior_mismatch():
    start = bumps(EXACT.x) + 1e-300
    last = np.abs(EXACT.density(start, HORIZON))
    entropy = -float((start * np.log(start))[start > 1e-12].sum() * EXACT.dx)
    mismatch = float((last * np.log(last / EXACT.stationary))[last > 1e-12].sum() * EXACT.dx)
    g = torch.Generator().manual_seed(0)
    n = 4000
    x = torch.from_numpy(quantiles(start, np.random.default_rng(1).random(n))).unsqueeze(1)
    log_z = math.log(np.exp(-0.25 * EXACT.x**4).sum() * EXACT.dx)
    bound = -exact_model().elbo(x, log_z, g, visits=12, step=0.05)
    error = float(bound.std()) / math.sqrt(n)
    assert error < 0.03
    assert abs(float(bound.mean()) - entropy - mismatch) < 4 * error, (float(bound.mean()), entropy, mismatch, error)


def gaussian() -> tuple[NonlinearDiffusion, NonlinearDiffusion, Tensor, Tensor]:
    """Linear with a curl that is not small, Gaussian data N(m, 0.3): exact, the same with -Q, m, root of the law."""
    d, q, s = random_recipe(22, 2, 2, ConstantClock(1.0)).terms()
    inverse = torch.linalg.inv(s)
    drift = -(d + q) @ inverse
    mean = torch.tensor([1.0, -0.5], dtype=torch.float64)

    def departure(z: Tensor, t: Tensor) -> Tensor:
        phi, root = ou_transition(drift, torch.linalg.cholesky(2 * d), t.clamp(min=0))
        cov = 0.3 * phi @ phi.mT + root @ root.mT
        away = z - (phi @ mean)
        return z @ inverse - torch.linalg.solve(cov, away.unsqueeze(-1)).squeeze(-1)

    horizon = 8 / float(-torch.linalg.eigvals(drift).real.max())
    right, wrong = (
        with_departure(NonlinearRecipe(lambda z: 0.5 * ((z @ inverse) * z).sum(1), d, sign * q, 2), horizon, departure)
        for sign in (1, -1)
    )
    return right, wrong, mean, torch.linalg.cholesky(s)


def test_reversal_of_a_linear_process_with_curl():
    """Mean and covariance within 5 standard errors; with the wrong sign of the curl, off by more than 20."""
    right, wrong, mean, root = gaussian()
    n, g = 2000, torch.Generator().manual_seed(0)
    prior = normal(g, n, 2) @ root.T
    white = (right.sample(n, 60, g, prior) - mean) / 0.3**0.5
    assert float(white.mean(0).abs().max()) < 5 / n**0.5
    assert float((white.T @ white / n - torch.eye(2)).abs().max()) < 5 * (2 / n) ** 0.5
    assert float((wrong.sample(n, 30, g, prior) - mean).mean(0).abs().max()) > 20 * (0.3 / n) ** 0.5


def test_bound_is_tight_at_every_point():
    """Gaussian data, exact score, a process that forgets: the bound is the log density, wherever x is."""
    model, _, mean, root = gaussian()
    log_z = math.log(2 * math.pi) + float(root.diagonal().log().sum())
    n, g = 1000, torch.Generator().manual_seed(0)
    for x in (mean, mean + torch.tensor([0.9, -0.6]), 0 * mean):
        bound = model.elbo(x.expand(n, 2), log_z, g, visits=8, step=0.5)
        exact = -math.log(2 * math.pi * 0.3) - float((x - mean).square().sum()) / 0.6
        error = float(bound.std()) / math.sqrt(n)
        assert error < 0.1
        assert abs(float(bound.mean()) - exact) < 4 * error, (float(bound.mean()), exact, error)


@pytest.mark.parametrize("name", ["SGRLD", "SGHMC", "SGRHMC", "rotating"])
def test_bound_of_the_stationary_law_is_its_log_density(name):
    recipe = SYSTEMS[name]()
    model = with_departure(recipe, 0.5, lambda z, t: torch.zeros_like(z))
    x = POINTS[:8, : recipe.dim]
    found = model.elbo(x, 0.3, torch.Generator().manual_seed(0), visits=2, step=0.3, lag=0.1)
    torch.testing.assert_close(found, -recipe.energy(x) - 0.3)


def test_without_a_network_the_stationary_law_stays():
    """Started anywhere, run to the law, and back: E z^2 within 5 standard errors of the quartic's."""
    model = with_departure(bent(), 1.0, lambda z, t: torch.zeros_like(z))
    x = model.sample(2000, 10, torch.Generator().manual_seed(0), dtype=torch.float64)
    again = model.sample(20, 4, torch.Generator().manual_seed(0))
    exact = float((EXACT.stationary * EXACT.x**2).sum() * EXACT.dx)
    assert abs(float(x.square().mean()) - exact) < 5 * float(x.square().std()) / math.sqrt(2000)
    assert torch.equal(again, model.sample(20, 4, torch.Generator().manual_seed(0)))
    assert not torch.equal(again, model.sample(20, 4, torch.Generator().manual_seed(1)))


def test_times_and_levels_agree():
    model = with_departure(bent(), HORIZON, lambda z, t: z)
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    t = model.times(u)
    assert float(t[0]) == 0
    assert abs(float(t[-1]) - HORIZON) < 1e-12
    level = model.level(t).log()
    torch.testing.assert_close(level, torch.lerp(level[0], level[-1], u))
    slope = (model.times(u + 1e-6) - model.times(u - 1e-6)) / 2e-6
    torch.testing.assert_close(model.spacing(t), slope, rtol=1e-8, atol=1e-8)
    z = POINTS[:4, :1]
    torch.testing.assert_close(model.score(z, 0.3), z - z**3)
    torch.testing.assert_close(model.score(z, torch.tensor([0.3, 0.1, 2.0, 0.0])), z - z**3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NonlinearDiffusion(bent(), lambda z, c: z, -1.0), "horizon must be positive and finite, got -1.0"),
        (lambda: NonlinearDiffusion(bent(), lambda z, c: z, 1.0, 0.0), "resolution must be positive"),
        (
            lambda: NonlinearDiffusion(
                NonlinearRecipe(lambda z: z[:, 0] ** 2, torch.zeros(1, 1), torch.zeros(1, 1), 1), lambda z, c: z, 1.0
            ),
            "no noise at its probe points",
        ),
        (lambda: exact_model().sample(0, 5, torch.Generator()), "at least 1, got 0 and 5"),
        (lambda: exact_model().sample(4, 5, torch.Generator(), torch.zeros(3, 1)), r"start must be .*\(4, 1\)"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()

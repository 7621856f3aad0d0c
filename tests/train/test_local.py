"""Local score matching: its mean is that of score matching, pairs lower its variance, and what it learns is right."""

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from tests.reference.fokker_planck import FokkerPlanck
from torch import Tensor

from undrift import NonlinearDiffusion
from undrift.process import NonlinearRecipe
from undrift.train import LocalScoreMatching

NO_CURL = torch.zeros(1, 1)
QUARTIC = (lambda z: 0.25 * z**4, lambda z: 1 + 0 * z, 2.5)
BENT = (lambda z: 0.25 * z**4, lambda z: (1 + z**2) / (1 + 0.5 * z**2), 2.5)


def recipe(energy, diffusion, constant: bool) -> NonlinearRecipe:
    d = torch.ones(1, 1) if constant else lambda z: diffusion(z)[..., None]
    return NonlinearRecipe(lambda z: energy(z).sum(1), d, NO_CURL, 1)


def bumps(n: int, g: torch.Generator) -> Tensor:
    """0.7 N(1.2, 0.3^2) + 0.3 N(-0.6, 0.2^2)."""
    right = torch.rand(n, 1, generator=g) < 0.7
    return torch.where(right, 1.2, -0.6) + torch.where(right, 0.3, 0.2) * torch.randn(n, 1, generator=g)


def bumps_density(x: np.ndarray) -> np.ndarray:
    def normal(mean: float, std: float) -> np.ndarray:
        return np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))

    return 0.7 * normal(1.2, 0.3) + 0.3 * normal(-0.6, 0.2)


class Bumps(torch.nn.Module):
    """A network linear in its weights, on Gaussian bumps in z and label: what it learns best has a closed form."""

    def __init__(self, model: NonlinearDiffusion, centres: int, reach: float, labels: int) -> None:
        super().__init__()
        line = torch.linspace(-reach, reach, centres)
        self.centres = torch.cartesian_prod(*[line] * model.process.dim).reshape(-1, model.process.dim)
        ends = 0.25 * model.level(torch.tensor([0.0, model.horizon], dtype=torch.float64)).log()
        self.labels = torch.linspace(*ends.tolist(), labels)
        self.widths = 1.5 * (line[1] - line[0]), 1.5 * (self.labels[1] - self.labels[0])
        self.weight = torch.nn.Parameter(torch.zeros(len(self.centres) * labels, model.process.dim))

    def features(self, z: Tensor, label: Tensor) -> Tensor:
        near = (-0.5 * ((z.unsqueeze(1) - self.centres) / self.widths[0]).square().sum(-1)).exp()
        when = (-0.5 * ((label.unsqueeze(1) - self.labels) / self.widths[1]).square()).exp()
        return (near.unsqueeze(2) * when.unsqueeze(1)).flatten(1)

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        self.seen = self.features(z, label)
        self.out = self.seen @ self.weight
        return self.out


def fit(model: NonlinearDiffusion, data, paths: int, rounds: int, ridge: float = 1e-5) -> None:
    """Minimise the objective: with unit weight on F it is |F|^2/2 + slope . F, its slope the gradient at F = 0."""
    objective, network, gram, right = LocalScoreMatching(visits=6, step=0.125), model.network, 0, 0
    for k in range(rounds):
        g = torch.Generator().manual_seed(k)
        loss = objective.loss(model, data(paths, g), g)[0].mean()
        slope = torch.autograd.grad(loss, network.out)[0] * model.process.dim
        gram = gram + (network.seen.T @ network.seen).double() / (rounds * len(slope))
        right = right - (network.seen.T @ slope).double() / rounds
    eye = torch.eye(len(gram), dtype=torch.float64)
    with torch.no_grad():
        network.weight.copy_(torch.linalg.solve(gram + ridge * eye, right))


@functools.cache
def trained(name: str) -> tuple[NonlinearDiffusion, FokkerPlanck]:
    energy, diffusion, horizon = {"quartic": QUARTIC, "bent": BENT}[name]
    process = recipe(energy, diffusion, constant=name == "quartic")
    silent = NonlinearDiffusion(process, torch.nn.Identity(), horizon, resolution=0.2)
    model = dataclasses.replace(silent, network=Bumps(silent, 28, 3.4, 8))
    fit(model, bumps, 4000, 6)
    return model, FokkerPlanck(energy, diffusion, -4.5, 4.5)


@pytest.mark.parametrize("name", ["quartic", "bent"])
def test_learned_score_is_the_exact_one(name):
    """Relative squared L2(p_t) error of the score against Fokker-Planck: below 3 % at t = 0, 1.5 % later."""
    model, exact = trained(name)
    x = torch.from_numpy(exact.x).float().unsqueeze(1)
    start, found = bumps_density(exact.x), {}
    for t in (0.0, 0.05, 0.2, 0.5, 1.0, model.horizon):
        p, (seen, score) = exact.density(start, t), exact.score(start, t)
        with torch.no_grad():
            error = model.score(x, t).double().numpy()[:, 0] - score
        found[t] = float((p * error**2)[seen].sum() / (p * score**2)[seen].sum())
    assert found[0.0] < 0.03, found
    assert max(list(found.values())[1:]) < 0.015, found


@pytest.mark.parametrize("name", ["quartic", "bent"])
def test_samples_of_a_learned_score(name):
    """W1 to the data below 5 std / sqrt(n), 0.1; exact draws give 1 on average, and the stationary law is 0.67 away."""
    model, exact = trained(name)
    n = 2000
    found = model.sample(n, 40, torch.Generator().manual_seed(1))[:, 0].double().sort().values.numpy()
    start = bumps_density(exact.x)
    quantiles = np.interp((np.arange(n) + 0.5) / n, np.cumsum(start) * exact.dx, exact.x + 0.5 * exact.dx)
    std = float(np.std(quantiles))
    assert np.abs(found - quantiles).mean() < 5 * std / math.sqrt(n)
    far = np.interp((np.arange(n) + 0.5) / n, np.cumsum(exact.stationary) * exact.dx, exact.x)
    assert np.abs(far - quantiles).mean() > 0.5


def test_curl_and_a_quartic_well_in_two_dimensions():
    """Mixing that grows with the state: the first and second moments of the data come back within 5 standard errors.

    The data's own are computed from 200 000 points; the stationary law is more than 10 standard errors away.
    """

    def curl(z: Tensor) -> Tensor:
        c = 0.5 + 0.25 * z[:, 0] ** 2
        return torch.stack([torch.stack([0 * c, -c], -1), torch.stack([c, 0 * c], -1)], -2)

    def data(n: int, g: torch.Generator) -> Tensor:
        side = torch.where(torch.rand(n, 1, generator=g) < 0.6, 1.0, -0.7) * torch.tensor([1.0, 0.5])
        return side + torch.randn(n, 2, generator=g) @ torch.tensor([[0.5, 0.3], [0.0, 0.4]])

    def moments(z: Tensor) -> Tensor:
        return torch.cat([z, z.square(), z[:, :1] * z[:, 1:]], 1)

    process = NonlinearRecipe(lambda z: 0.25 * z[:, 0] ** 4 + 0.5 * z[:, 1] ** 2, torch.eye(2), curl, 2)
    silent = NonlinearDiffusion(process, torch.nn.Identity(), 2.5, resolution=0.4)
    model = dataclasses.replace(silent, network=Bumps(silent, 9, 3.0, 5))
    fit(model, data, 3000, 3)
    found = moments(model.sample(1000, 40, torch.Generator().manual_seed(1)))
    exact = moments(data(200_000, torch.Generator().manual_seed(2))).mean(0)
    away = (found.mean(0) - exact) / (found.std(0) / 1000**0.5)
    assert float(away.abs().max()) < 5, away
    law = moments(process.simulate(torch.zeros(1000, 2), 5.0, 100, torch.Generator().manual_seed(3)))
    assert float(((law.mean(0) - exact) / (law.std(0) / 1000**0.5)).abs().max()) > 10


# -- the law of the objective ------------------------------------------------------------------------------------------

OU = NonlinearRecipe(lambda z: 0.5 * z.square().sum(1), torch.ones(1, 1, dtype=torch.float64), NO_CURL, 1)


def linear_model(slope: float) -> NonlinearDiffusion:
    """Ornstein-Uhlenbeck with departure slope * z / level."""
    return NonlinearDiffusion(OU, lambda z, label: slope * z, 1.0, resolution=0.3)


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("weighting", ["uniform", "likelihood"])
@pytest.mark.parametrize(("lag", "growth"), [(0.02, 0.0), (0.1, 0.5), (0.1, 1.0)])
def test_mean_is_that_of_score_matching(pairs, weighting, lag, growth):
    """Gaussian data N(0, 0.25), departure c z: the mean is w (c^2 v/2 + c - c v), whatever the lag.

    Within 4 standard errors; the lag is no approximation here, since the local Gaussian of a linear process is exact.
    """
    model, n = linear_model(-0.8), 6000
    objective = LocalScoreMatching(weighting, visits=4, step=1.0, lag=lag, growth=growth, pairs=pairs)
    x = 0.5 * torch.randn(n, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    value, level = objective.loss(model, x, torch.Generator().manual_seed(0))
    t = model.times((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)
    v, c = 0.25 * (-2 * t).exp() - torch.expm1(-2 * t), -0.8 / model.level(t)
    weight = 2 * model.spacing(t) if weighting == "likelihood" else model.level(t).square()
    exact = float((weight * (0.5 * c**2 * v + c - c * v)).mean())
    error = float(value.std()) / math.sqrt(n)
    assert error < 0.2 * abs(exact)
    assert abs(float(value.mean()) - exact) < 4 * error, (float(value.mean()), exact, error)
    assert float(level.min()) >= 0.3
    assert float(level.max()) <= float(model.level(torch.tensor(1.0)))


def test_pairs_take_the_lag_out_of_the_variance():
    """Deviation of the loss at h = 0.2 and 0.0005: without pairs it grows like h^-1/2, with them it has a limit."""
    x = 0.5 * torch.randn(4000, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    stds = {}
    for pairs in (True, False):
        for lag in (0.2, 0.0005):
            objective = LocalScoreMatching(visits=4, step=1.0, lag=lag, pairs=pairs)
            stds[pairs, lag] = float(objective.loss(linear_model(-0.8), x, torch.Generator().manual_seed(0))[0].std())
    assert stds[True, 0.0005] < 2.5 * stds[True, 0.2], stds
    assert stds[False, 0.0005] > 5 * stds[False, 0.2], stds
    assert stds[False, 0.0005] > 5 * stds[True, 0.0005], stds


def test_a_silent_network_costs_nothing():
    value, _ = LocalScoreMatching(visits=2).loss(linear_model(0.0), torch.ones(4, 1), torch.Generator().manual_seed(0))
    assert not value.any()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LocalScoreMatching("edm"), ValueError, "weighting must be 'uniform' or 'likelihood', got 'edm'"),
        (lambda: LocalScoreMatching(visits=0), ValueError, "visits must be at least 1"),
        (lambda: LocalScoreMatching(lag=0.0), ValueError, "lag must be positive, got 0.0"),
        (lambda: LocalScoreMatching(step=math.inf), ValueError, "step must be positive, got inf"),
        (lambda: LocalScoreMatching(growth=1.5), ValueError, r"growth must lie in \[0, 1\], got 1.5"),
        (
            lambda: LocalScoreMatching().loss(torch.nn.Identity(), torch.zeros(2, 1), torch.Generator()),
            TypeError,
            "trains a NonlinearDiffusion, got a Identity",
        ),
        (
            lambda: LocalScoreMatching().loss(linear_model(0.0), torch.zeros(2, 3), torch.Generator()),
            ValueError,
            r"data must be \(batch, 1\), got \(2, 3\)",
        ),
    ],
)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()

"""The recipe with state-dependent noise and mixing: stationarity point by point, and in simulation."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.process.cases import normal, random_recipe
from undrift.process import ConstantClock, NonlinearRecipe, fokker_planck_residual

EYE = torch.eye(2, dtype=torch.float64)
SKEW = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
POINTS = normal(torch.Generator().manual_seed(1), 64, 5)


def quartic(x: Tensor) -> Tensor:
    return 0.25 * x**4 - 0.7 * x**2 + 0.2 * x


def metric(x: Tensor) -> Tensor:
    return 0.5 + 1 / (1 + x**2)


def rows(*entries: list[Tensor]) -> Tensor:
    return torch.stack([torch.stack(list(row), -1) for row in entries], -2)


def sgrld() -> NonlinearRecipe:
    """Riemannian Langevin in one dimension: D = g(x), tau = g'."""
    return NonlinearRecipe(lambda z: quartic(z[:, 0]), lambda z: metric(z)[..., None], torch.zeros(1, 1), 1)


def sghmc() -> NonlinearRecipe:
    noise = torch.diag(torch.tensor([0.0, 1.5], dtype=torch.float64))
    return NonlinearRecipe(lambda z: quartic(z[:, 0]) + z[:, 1] ** 2 / (2 * 0.8), noise, SKEW, 2)


def sgrhmc() -> NonlinearRecipe:
    def d(z: Tensor) -> Tensor:
        g = metric(z[:, 0])
        return rows([0 * g, 0 * g], [0 * g, g**2])

    def q(z: Tensor) -> Tensor:
        g = metric(z[:, 0])
        return rows([0 * g, -g], [g, 0 * g])

    return NonlinearRecipe(lambda z: quartic(z[:, 0]) + 0.5 * z[:, 1] ** 2, d, q, 2)


def sgnht(friction: float = 1.3) -> NonlinearRecipe:
    """Nose-Hoover thermostat, two coordinates: z = (x, m, xi), dim 5; only the mixing depends on the state."""

    def energy(z: Tensor) -> Tensor:
        return quartic(z[:, :2]).sum(1) + 0.5 * z[:, 2:4].square().sum(1) + (z[:, 4] - friction) ** 2

    def q(z: Tensor) -> Tensor:
        out = torch.zeros(z.shape[0], 5, 5, dtype=z.dtype)
        constant = torch.zeros(5, 5, dtype=z.dtype)
        constant[0, 2] = constant[1, 3] = -1.0
        constant[2, 0] = constant[3, 1] = 1.0
        m = torch.nn.functional.pad(z[:, 2:4], (2, 1)) / 2  # (batch, 5)
        last = torch.eye(5, dtype=z.dtype)[4]
        return out + constant + m.unsqueeze(-1) * last - last.unsqueeze(-1) * m.unsqueeze(-2)

    return NonlinearRecipe(energy, torch.diag(torch.tensor([0, 0, friction, friction, 0], dtype=torch.float64)), q, 5)


def rotating(beta: float = 2.0) -> NonlinearRecipe:
    """PSLD whose mixing grows with x: stationary, but without a Gaussian kernel."""

    def q(z: Tensor) -> Tensor:
        c = 0.5 * beta * (1 + z[:, 0] ** 2)
        return rows([0 * c, -c], [c, 0 * c])

    noise = 0.5 * beta * torch.diag(torch.tensor([0.01, 1.0025], dtype=torch.float64))
    return NonlinearRecipe(lambda z: 0.5 * z[:, 0] ** 2 + 2 * z[:, 1] ** 2, noise, q, 2)


SYSTEMS = {"SGRLD": sgrld, "SGHMC": sghmc, "SGRHMC": sgrhmc, "SGNHT": sgnht, "rotating": rotating}


def slope(z: Tensor) -> Tensor:
    return z**3 - 1.4 * z + 0.2


def metric_slope(x: Tensor) -> Tensor:
    return -2 * x / (1 + x**2) ** 2


# Drifts written by hand.
BY_HAND = {
    "SGRLD": lambda z: -metric(z) * slope(z) + metric_slope(z),
    "SGHMC": lambda z: torch.stack([z[:, 1] / 0.8, -slope(z[:, 0]) - 1.5 * z[:, 1] / 0.8], 1),
    "SGRHMC": lambda z: torch.stack(
        [
            metric(z[:, 0]) * z[:, 1],
            -metric(z[:, 0]) * slope(z[:, 0]) - metric(z[:, 0]) ** 2 * z[:, 1] + metric_slope(z[:, 0]),
        ],
        1,
    ),
    "SGNHT": lambda z: torch.cat(
        [z[:, 2:4], -slope(z[:, :2]) - z[:, 4:] * z[:, 2:4], z[:, 2:4].square().sum(1, keepdim=True) / 2 - 1], 1
    ),
    "rotating": lambda z: torch.stack(
        [
            -0.01 * z[:, 0] + (1 + z[:, 0] ** 2) * 4 * z[:, 1],
            -(1 + z[:, 0] ** 2) * z[:, 0] - 1.0025 * 4 * z[:, 1] + 2 * z[:, 0],
        ],
        1,
    ),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_drift_is_the_published_one(name):
    recipe = SYSTEMS[name]()
    z = POINTS[:, : recipe.dim]
    torch.testing.assert_close(recipe.drift(z), BY_HAND[name](z), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SYSTEMS)
def test_law_is_stationary_point_by_point(name):
    recipe = SYSTEMS[name]()
    z = POINTS[:, : recipe.dim]
    assert float(recipe.stationarity_residual(z).abs().max()) < 1e-10


@pytest.mark.parametrize("name", ["SGRLD", "SGRHMC", "SGNHT", "rotating"])
def test_without_the_correction_the_law_is_lost(name):
    recipe = SYSTEMS[name]()
    z = POINTS[:, : recipe.dim]
    bare = fokker_planck_residual(lambda z: recipe.drift(z) - recipe.correction(z), recipe.diffusion, recipe.energy, z)
    # The residual that is left is tau . grad H - div tau, by linearity.
    assert float(bare.abs().max()) > 0.1


def test_thermostat_correction_is_minus_one_on_xi():
    tau = sgnht().correction(POINTS)
    torch.testing.assert_close(tau, torch.tensor([0.0, 0.0, 0.0, 0.0, -1.0], dtype=torch.float64).expand_as(tau))


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_linear_recipe_is_a_special_case(channels):
    linear = random_recipe(17 + channels, channels, max(1, channels - 1), ConstantClock(1.0))
    d, q, s = linear.terms()
    inverse = torch.linalg.inv(s)
    recipe = NonlinearRecipe(lambda z: 0.5 * ((z @ inverse.to(z)) * z).sum(1), d, q, channels)
    z = POINTS[:, :channels]
    torch.testing.assert_close(recipe.drift(z), z @ linear.matrices()[0].T, rtol=1e-11, atol=1e-11)
    assert float(recipe.stationarity_residual(z).abs().max()) < 1e-10 * float(inverse.abs().max())
    assert recipe.drift(z.float()).dtype == torch.float32


def test_random_polynomial_mixing_keeps_the_law():
    g = torch.Generator().manual_seed(5)
    low, flat, bent = normal(g, 3, 2), normal(g, 3, 3), normal(g, 3, 3, 3)

    def q(z: Tensor) -> Tensor:
        full = flat + torch.einsum("ijk,bk->bij", bent, z**2)
        return full - full.mT

    def d(z: Tensor) -> Tensor:
        root = low * (1 + z[:, :1, None] ** 2)
        return root @ root.mT

    recipe = NonlinearRecipe(lambda z: (z**4).sum(1) + 0.5 * (z[:, 0] - z[:, 1]) ** 2, d, q, 3)
    z = 0.7 * POINTS[:, :3]
    size = float(recipe.drift(z).abs().max())
    assert float(recipe.stationarity_residual(z).abs().max()) < 1e-11 * size
    wrong = fokker_planck_residual(recipe.drift, lambda z: 1.01 * d(z), recipe.energy, z)
    assert float(wrong.abs().max()) > 1e-3 * size


def _linear_step(recipe: NonlinearRecipe, size: float, scheme: str) -> tuple[np.ndarray, np.ndarray]:
    """The affine map of one step of a linear process: z -> P z + N noise."""
    eye, zero = torch.eye(recipe.dim, dtype=torch.float64), torch.zeros(recipe.dim, recipe.dim, dtype=torch.float64)
    return recipe.step(eye, size, zero, scheme).T.numpy(), recipe.step(zero, size, eye, scheme).T.numpy()


@pytest.mark.parametrize(("scheme", "order"), [("euler", 1), ("heun", 2)])
def test_weak_order_is_measured(scheme, order):
    """Exact second moments after t = 1 on a linear process, against the exact kernel."""
    linear = random_recipe(3, 3, 2, ConstantClock(1.0))
    d, q, s = linear.terms()
    inverse = torch.linalg.inv(s)
    recipe = NonlinearRecipe(lambda z: 0.5 * ((z @ inverse) * z).sum(1), d, q, 3)
    phi, root = linear.transition(0.0, 1.0)
    exact = np.concatenate([phi.numpy(), (root @ root.T).numpy()])
    errors = []
    for steps in (64, 128, 256):
        p, n = _linear_step(recipe, 1.0 / steps, scheme)
        power, cov = np.eye(3), np.zeros((3, 3))
        for _ in range(steps):
            power, cov = p @ power, p @ cov @ p.T + n @ n.T
        errors.append(np.abs(np.concatenate([power, cov]) - exact).max())
    slopes = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert np.abs(slopes - order).max() < 0.25, slopes


def _moments(energy, low: float, high: float) -> tuple[float, float]:
    x = torch.linspace(low, high, 20001, dtype=torch.float64)
    p = torch.exp(-energy(x))
    return float((p * x).sum() / p.sum()), float((p * x**2).sum() / p.sum())


@pytest.mark.parametrize(("name", "size", "burn"), [("SGRLD", 0.04, 8.0), ("SGHMC", 0.1, 15.0)])
def test_simulation_settles_in_the_law(name, size, burn):
    """Chains in a tilted double well: within 4 standard errors of the exact moments, plus the bias of a step.

    With 100 000 chains the bias of either moment measured below 0.02 at these step sizes.
    """
    recipe, batch = SYSTEMS[name](), 5_000
    g = torch.Generator().manual_seed(0)
    x = recipe.simulate(normal(g, batch, recipe.dim), burn, round(burn / size), g)[:, 0]
    for power, target in zip((1, 2), _moments(quartic, -6.0, 6.0), strict=True):
        values = x**power
        error = float(values.std()) / math.sqrt(batch)
        assert abs(float(values.mean()) - target) < 4 * error + 0.02, (power, float(values.mean()), target)


def test_dropping_the_correction_is_seen_in_simulation():
    recipe = sgrld()
    g = torch.Generator().manual_seed(2)
    z = normal(g, 5_000, 1)
    for _ in range(200):
        d = metric(z)
        z = z - 0.04 * d * slope(z) + (2 * 0.04 * d).sqrt() * torch.empty_like(z).normal_(generator=g)
    right = recipe.simulate(normal(g, 5_000, 1), 8.0, 200, g).square()
    target = _moments(quartic, -6.0, 6.0)[1]
    allowed = 4 * float(right.std()) / math.sqrt(5_000) + 0.02
    assert abs(float(right.mean()) - target) < allowed
    assert abs(float(z.square().mean()) - target) > 2 * allowed


def test_simulation_is_reproducible_and_returns_its_path():
    recipe = sghmc()
    z0 = POINTS[:8, :2]
    path = recipe.simulate(z0, 1.0, 20, torch.Generator().manual_seed(3), trajectory=True)
    last = recipe.simulate(z0, 1.0, 20, torch.Generator().manual_seed(3))
    assert path.shape == (21, 8, 2)
    assert torch.equal(path[-1], last)
    assert torch.equal(path[0], z0)
    assert not torch.equal(last, recipe.simulate(z0, 1.0, 20, torch.Generator().manual_seed(4)))


def test_blow_up_names_the_step():
    with pytest.raises(FloatingPointError, match=r"not finite after step \d+ of 10 \(step size 0\.5\)"):
        sgrld().simulate(10.0 * POINTS[:8, :1], 5.0, 10, torch.Generator().manual_seed(0))


def _energy(z: Tensor) -> Tensor:
    return 0.5 * z.square().sum(1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NonlinearRecipe(_energy, EYE, EYE, 2), r"curl must be skew-symmetric; Q \+ Q' has .* of size 2 at"),
        (lambda: NonlinearRecipe(_energy, -EYE, SKEW, 2), r"positive semi-definite; an eigenvalue is minus 1 at"),
        (lambda: NonlinearRecipe(_energy, EYE + 0.5 * SKEW, SKEW, 2), r"diffusion must be symmetric; .* size 1 at"),
        (lambda: NonlinearRecipe(_energy, lambda z: z[:, :1, None] * EYE, SKEW, 2), "positive semi-definite"),
        (lambda: NonlinearRecipe(_energy, EYE, torch.zeros(3, 3), 2), r"curl must be \(2, 2\), got \(3, 3\)"),
        (lambda: NonlinearRecipe(_energy, lambda z: EYE, SKEW, 2), r"diffusion must map \(16, 2\) to \(16, 2, 2\)"),
        (lambda: NonlinearRecipe(lambda z: z, EYE, SKEW, 2), r"energy must map \(16, 2\) to \(16,\), got \(16, 2\)"),
        (lambda: NonlinearRecipe(lambda z: z[:, 0].log(), EYE, SKEW, 2), "energy is not finite at z ="),
        (lambda: NonlinearRecipe(_energy, EYE, SKEW, 0), "dim must be at least 1, got 0"),
        (lambda: NonlinearRecipe(_energy, EYE, SKEW, 2, torch.zeros(4, 3)), r"probe must have shape \(N, 2\)"),
        (lambda: sghmc().simulate(torch.zeros(4, 3), 1.0, 5), r"z0 must be floating-point, \(batch, 2\)"),
        (lambda: sghmc().simulate(torch.zeros(4, 2, dtype=torch.int64), 1.0, 5), "got torch.int64"),
        (lambda: sghmc().simulate(torch.zeros(4, 2), -1.0, 5), "needs t_end > 0"),
        (lambda: sghmc().simulate(torch.zeros(4, 2), 1.0, 0), "steps >= 1"),
        (lambda: sgrld().simulate(torch.zeros(4, 1), 1.0, 5, scheme="heun"), "needs a constant diffusion"),
        (lambda: sgrld().simulate(torch.zeros(4, 1), 1.0, 5, scheme="rk4"), "scheme must be"),
    ],
)  # fmt: skip
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_probe_serves_an_energy_on_part_of_the_space():
    positive = torch.rand(8, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    recipe = NonlinearRecipe(lambda z: (z - 2 * z.log()).sum(1), lambda z: z[..., None], torch.zeros(1, 1), 1, positive)
    assert float(recipe.stationarity_residual(positive).abs().max()) < 1e-12

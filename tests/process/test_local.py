"""The local Gaussian: published values, the exact kernel of linear processes, weak orders, and the score it offers."""

import math

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor
from torch.func import hessian, jacrev, vmap

from tests.process.cases import normal, random_recipe
from tests.process.test_nonlinear import POINTS, SYSTEMS
from tests.reference.fokker_planck import FokkerPlanck
from undrift._linalg import ou_transition, psd_sqrt
from undrift.process import ConstantClock, LocalGaussian, NonlinearRecipe, local_gaussian, local_pairs

NO_CURL = torch.zeros(1, 1, dtype=torch.float64)
HALF = torch.full((1, 1), 0.5, dtype=torch.float64)
ONE = torch.ones(1, 1, dtype=torch.float64)


def linear(seed: int, dim: int, rank: int) -> tuple[NonlinearRecipe, Tensor, Tensor]:
    """A linear process as a recipe, with its drift matrix and a root of its noise."""
    d, q, s = random_recipe(seed, dim, rank, ConstantClock(1.0)).terms()
    inverse = torch.linalg.inv(s)
    recipe = NonlinearRecipe(lambda z: 0.5 * ((z @ inverse.to(z)) * z).sum(1), d, q, dim)
    return recipe, -(d + q) @ inverse, psd_sqrt(2 * d)


def student() -> NonlinearRecipe:
    """D = (1 + z^2)/2 and H = 3 ln(1 + z^2): drift -2 z, a Student law, and moments that close."""
    return NonlinearRecipe(lambda z: 3 * torch.log1p(z**2).sum(1), lambda z: 0.5 * (1 + z[..., None] ** 2), NO_CURL, 1)


# dy = (y - y^3) dt + dW from 1/2: exact moments by a Fokker-Planck solver, and the affine scheme's by Van Loan.
EXACT = {0.02: (0.507214101223, 0.020078678192), 0.01: (0.503679082398, 0.010022311798)}


def test_published_values():
    y = torch.full((1, 1), 0.5, dtype=torch.float64)
    for ito, mean in ((False, 0.507518781289), (True, 0.507218280663)):
        law = local_gaussian(lambda z: z - z**3, HALF, y, 0.02, ito)
        assert abs(float(law.mean) - mean) < 1e-12
        assert abs(float(law.root) ** 2 - 0.020100334168) < 1e-12


@pytest.mark.parametrize(("ito", "order"), [(True, 3), (False, 2)])
def test_local_order_in_constant_noise(ito, order):
    """Halving h divides the error of the mean by 2^order, and that of the variance by 8 either way."""
    y = torch.full((1, 1), 0.5, dtype=torch.float64)
    errors = []
    for h, (mean, var) in EXACT.items():
        law = local_gaussian(lambda z: z - z**3, HALF, y, h, ito)
        errors.append([abs(float(law.mean) - mean), abs(float(law.root) ** 2 - var)])
    slopes = np.log2(np.array(errors[0]) / np.array(errors[1]))
    assert np.abs(slopes - [order, 3]).max() < 0.1, slopes


def test_local_order_in_state_dependent_noise():
    """Against closed moments m' = -2 m, M' = 1 - 3 M of z and z^2: mean exact, variance wrong by O(h^2)."""
    y = torch.tensor([[0.8]], dtype=torch.float64)
    errors = []
    for h in (0.02, 0.01):
        law = local_gaussian(student().drift, student().diffusion, y, h)
        assert abs(float(law.mean) - 0.8 * math.exp(-2 * h)) < 1e-14
        second = 1 / 3 + (0.64 - 1 / 3) * math.exp(-3 * h)
        errors.append(abs(float(law.root) ** 2 + float(law.mean) ** 2 - second))
    assert abs(math.log2(errors[0] / errors[1]) - 2) < 0.1, errors


@pytest.mark.parametrize(("dim", "rank"), [(1, 1), (2, 1), (3, 1), (3, 2), (5, 3)])
def test_linear_processes_are_exact(dim, rank):
    """Steps from 1e-6 to 10, one per sample, which the doublings of the longest one must not spoil."""
    recipe, a, g = linear(7 + dim, dim, rank)
    h = torch.logspace(-6, 1, 64, dtype=torch.float64)
    law = local_gaussian(recipe.drift, recipe.diffusion, POINTS[:, :dim], h)
    phi, root = ou_transition(a, g, h)
    torch.testing.assert_close(law.mean, (phi @ POINTS[:, :dim, None]).squeeze(-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(law.root, root, rtol=1e-12, atol=1e-12)


def test_steps_as_long_as_you_like():
    """A stiff drift from far away: Euler would be thrown to 10 - 0.5 * 1000."""
    y = torch.tensor([[10.0]], dtype=torch.float64)
    law = local_gaussian(lambda z: -(z**3), ONE, y, 0.5)
    assert 0 < float(law.mean) < 10
    assert 0 < float(law.root) < 1


@pytest.mark.parametrize("name", SYSTEMS)
def test_second_order_expansion(name):
    """y + h f + h^2/2 (J f + f'':a/2) and h a + h^2/2 (J a + a J'), with Hessians: what is left falls by 8."""
    recipe = SYSTEMS[name]()
    z = POINTS[:16, : recipe.dim]

    def drift(point: Tensor) -> Tensor:
        return recipe.drift(point.unsqueeze(0)).squeeze(0)

    a = 2 * recipe.matrices(z)[0]
    f, jac = recipe.drift(z), vmap(jacrev(drift))(z)
    second = (jac @ f.unsqueeze(-1)).squeeze(-1) + 0.5 * torch.einsum("bijk,bjk->bi", vmap(hessian(drift))(z), a)
    errors = []
    for h in (2e-3, 1e-3):
        law = local_gaussian(recipe.drift, recipe.diffusion, z, h)
        cov = h * a + 0.5 * h**2 * (jac @ a + a @ jac.mT)
        errors.append(
            [
                float((law.mean - z - h * f - 0.5 * h**2 * second).abs().max()),
                float((law.root @ law.root.mT - cov).abs().max()),
            ]
        )
    slopes = np.log2(np.array(errors[0]) / np.array(errors[1]))
    assert np.abs(slopes - 3).max() < 0.1, slopes


@pytest.mark.parametrize(("ito", "order", "error"), [(True, 2, 0.003), (False, 1, 0.05)])
def test_weak_order_of_the_chain(ito, order, error):
    """E y^2 after t = 1 in a double well, by Gauss-Hermite quadrature over every step, against Fokker-Planck."""
    well = FokkerPlanck(lambda x: 0.25 * x**4 - 0.5 * x**2, np.ones_like, -4.5, 4.5)
    start = np.exp(-8 * (well.x - 1) ** 2)
    start /= start.sum() * well.dx
    exact = float((well.density(start, 1.0) * well.x**2).sum() * well.dx)
    nodes, weights = np.polynomial.hermite_e.hermegauss(24)
    weights /= weights.sum()
    grid = np.linspace(-4.5, 4.5, 801)
    errors = []
    for steps in (16, 32):
        law = local_gaussian(lambda z: z - z**3, ONE, torch.from_numpy(grid)[:, None], 1 / steps, ito)
        ends = np.clip(law.mean.numpy() + law.root.numpy()[..., 0] * nodes, -4.5, 4.5)
        value = grid**2
        for _ in range(steps):
            value = CubicSpline(grid, value)(ends) @ weights
        errors.append(abs(float((start * CubicSpline(grid, value)(well.x)).sum() * well.dx) - exact))
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.2, errors
    assert errors[1] < error, errors


def test_target_is_the_gradient_of_the_density():
    recipe = SYSTEMS["SGRHMC"]()
    law = local_gaussian(recipe.drift, recipe.diffusion, POINTS[:, :2], 0.1)
    noise = normal(torch.Generator().manual_seed(0), 64, 2)
    z = law.draw(noise).requires_grad_(True)
    density = torch.distributions.MultivariateNormal(law.mean, scale_tril=law.root).log_prob(z)
    torch.testing.assert_close(law.target(noise), torch.autograd.grad(density.sum(), z)[0], rtol=1e-10, atol=1e-10)


def test_paths_of_a_linear_process_have_its_law():
    """Paths are exact there, whatever the visits before: mean and covariance within 5 standard errors."""
    recipe, a, g = linear(3, 2, 1)
    n, x = 4000, torch.tensor([[1.0, -0.5]], dtype=torch.float64)
    u = torch.rand(1, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    times = torch.cat([0.1 * u, torch.full_like(u, 0.7), torch.full_like(u, 1.5)])
    generator = torch.Generator().manual_seed(0)
    laws = local_pairs(recipe, x.expand(n, 2), times, times.clamp(max=0.3), 0.25, generator)
    z = laws.draw(normal(generator, 3 * n, 2)).reshape(3, n, 2)
    for t, states in zip(times[1:, 0], z[1:], strict=True):
        phi, root = ou_transition(a, g, t)
        white = torch.linalg.solve(root, (states - x @ phi.T).T)  # standard normal
        assert float(white.mean(1).abs().max()) < 5 / n**0.5
        assert float((white @ white.T / n - torch.eye(2)).abs().max()) < 5 * (2 / n) ** 0.5
    phi, root = ou_transition(a, g, times[0])
    white = torch.linalg.solve(root, z[0].unsqueeze(-1) - phi @ x.T).squeeze(-1)
    assert float((white.T @ white / n - torch.eye(2)).abs().max()) < 5 * (2 / n) ** 0.5


def test_dtype_and_start():
    recipe = SYSTEMS["SGHMC"]()
    z = POINTS[:8, :2]
    fine, coarse = (local_gaussian(recipe.drift, recipe.diffusion, v, 0.05) for v in (z, z.float()))
    assert coarse.mean.dtype == coarse.root.dtype == torch.float32
    torch.testing.assert_close(coarse.mean.double(), fine.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(coarse.root.double(), fine.root, rtol=1e-5, atol=1e-6)
    now = local_gaussian(recipe.drift, recipe.diffusion, z, 0.0)
    assert torch.equal(now.mean, z)
    assert not now.root.any()


def _flat() -> LocalGaussian:
    return local_gaussian(lambda z: -z, torch.diag(torch.tensor([0.0, 1.0])).double(), POINTS[:4, :2], 0.1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: local_gaussian(lambda z: -z, ONE, POINTS[:4, :1], -0.1), ValueError, "h must be finite and not neg"),
        (lambda: local_gaussian(lambda z: -z, ONE, POINTS[:4, :1], torch.ones(3)), ValueError, r"\(4,\); got shape \("),
        (lambda: local_gaussian(torch.log, ONE, -POINTS[:4, :1].abs(), 0.1), FloatingPointError, "not finite at z ="),
        (lambda: _flat().target(POINTS[:4, :2]), ValueError, "coordinate 0 of sample 0 got no noise"),
    ],
)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()

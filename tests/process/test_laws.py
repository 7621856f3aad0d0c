"""Laws that hold for every linear process, whatever its matrices and its clock."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.process.cases import ALL, CATALOG, CLOCKS, RANDOM, normal, random_recipe, times, varying
from undrift._linalg import ou_transition
from undrift.process import (
    CLD,
    MALDA,
    PSLD,
    VE,
    VP,
    CallableClock,
    ConstantClock,
    GeometricClock,
    LinearClock,
    PanelProcess,
    Recipe,
    RecipeProcess,
)


@pytest.mark.parametrize("name", ALL)
def test_transitions_compose(name):
    process = ALL[name]
    r, s, t = (x * process.horizon for x in (0.05, 0.4, 1.0))
    first, second, whole = process.transition(r, s), process.transition(s, t), process.transition(r, t)
    torch.testing.assert_close(second[0] @ first[0], whole[0], rtol=0.0, atol=1e-12)
    cov = second[0] @ first[1] @ first[1].T @ second[0].T + second[1] @ second[1].T
    expected = whole[1] @ whole[1].T
    assert float((cov - expected).abs().max()) < 1e-11 * float(expected.abs().max())
    phi, root = process.transition(s, s)
    assert torch.equal(phi, torch.eye(process.channels, dtype=torch.float64))
    assert float(root.abs().max()) == 0.0


@pytest.mark.parametrize("name", [n for n, p in ALL.items() if p.stationary is not None])
def test_the_stationary_law_stays(name):
    process = ALL[name]
    s = process.stationary
    grid = times(process, 5)
    phi, root = process.transition(torch.zeros_like(grid), grid)
    moved = phi @ s @ phi.mT + root @ root.mT
    torch.testing.assert_close(moved, s.expand_as(moved), rtol=0.0, atol=3e-13 * float(s.abs().max()))
    f, gg = process.drift(grid), process.diffusion(grid)
    assert float((f @ s + s @ f.mT + gg).abs().max()) < 1e-13 * float((f @ s).abs().max() + gg.abs().max())
    torch.testing.assert_close(process.prior() @ process.prior().T, s, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", [n for n, p in ALL.items() if isinstance(p, RecipeProcess)])
def test_reversal_flips_the_mixing(name):
    """S A' S^-1 = -(D - Q) S^-1: the stationary process backwards is the recipe with -Q."""
    process = ALL[name]
    a, d = process.matrices()
    back, same = process.reversed_matrices()
    s = process.stationary
    scale = float(a.abs().max())
    torch.testing.assert_close(same, d)
    torch.testing.assert_close(s @ a.T @ torch.linalg.inv(s), back, rtol=0.0, atol=1e-12 * scale)
    # The joint law of (z_0, z_b), read from either end.
    phi = ou_transition(a, torch.eye(len(a), dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64))[0]
    phi_back = ou_transition(back, torch.eye(len(a), dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64))[0]
    torch.testing.assert_close(phi @ s, (phi_back @ s).T, rtol=0.0, atol=1e-12 * float(s.abs().max()))


@pytest.mark.parametrize("name", CLOCKS)
def test_kernels_depend_on_time_through_the_clock_only(name):
    clock = CLOCKS[name]
    process = random_recipe(7, 3, 2, clock)
    unit = random_recipe(7, 3, 2, ConstantClock(1.0, horizon=1e3))
    t = times(process, 7)
    for a, b in zip(process.marginal(t), unit.marginal(clock.integral(t)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", CLOCKS)
def test_rate_is_the_derivative_of_the_clock(name):
    clock = CLOCKS[name]
    t = (torch.linspace(0.01, 1.0, 40, dtype=torch.float64) * clock.horizon).requires_grad_()
    (rate,) = torch.autograd.grad(clock.integral(t).sum(), t)
    torch.testing.assert_close(clock.beta(t).detach(), rate, rtol=1e-12, atol=1e-14)
    zero = torch.zeros(1, dtype=torch.float64)
    assert float(clock.integral(zero)) == pytest.approx(1e-4 if isinstance(clock, GeometricClock) else 0.0, abs=1e-17)


def test_a_callable_clock_is_the_clock_it_copies():
    named = LinearClock(0.1, 20.0)
    copy = CallableClock(lambda t: 0.1 * t + 9.95 * t**2, rate=lambda t: 0.1 + 19.9 * t)
    t = torch.logspace(-6, 0, 9, dtype=torch.float64)
    torch.testing.assert_close(VP(clock=copy).sigma(t), VP(clock=named).sigma(t), rtol=1e-13, atol=0.0)
    bare = CallableClock(lambda t: 0.1 * t + 9.95 * t**2)
    torch.testing.assert_close(bare.beta(t), named.beta(t), rtol=1e-13, atol=0.0)


def test_a_callable_clock_carries_gradients_only_where_asked():
    bare = CallableClock(lambda t: t + t**3)
    t = torch.tensor([0.2, 0.9], dtype=torch.float64)
    assert not bare.beta(t).requires_grad
    assert torch.autograd.gradcheck(bare.beta, (t.clone().requires_grad_(),))
    power = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: CallableClock(lambda t: t**p).beta(t), (power,))


@pytest.mark.parametrize("name", [*CATALOG, "varying", *list(RANDOM)[::4]])
def test_time_inverts_sigma(name):
    process = ALL[name]
    # The null direction of a random D is known to rounding only, which at smaller times is what decides sigma.
    t = times(process, 13, low=1e-3 if name in RANDOM else 1e-6)
    levels = process.sigma(t)
    assert bool((levels.diff() > 0).all())
    back = process.time(levels.reshape(13, 1))
    assert back.shape == (13, 1)
    # Where sigma hardly moves (a start at sigma_min > 0), time is as uncertain as a rounding of sigma makes it.
    slope = 0.5 * t * process.snr_rate(t) / process.snr(t)
    assert bool(((back[:, 0] / t - 1).abs() < 1e-12 + 3e-15 / slope).all())
    torch.testing.assert_close(process.sigma(back[:, 0]), levels, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("name", ALL)
def test_snr_rate_is_its_derivative(name):
    process = ALL[name]
    t = times(process, 9, low=1e-4).requires_grad_()
    (slope,) = torch.autograd.grad(process.snr(t).sum(), t)
    torch.testing.assert_close(process.snr_rate(t).detach(), -slope, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("name", ALL)
def test_statistic_shows_the_data_through_white_noise(name):
    """x~ = row z with row m = 1 and row S row' = sigma^2, and S row' along m: nothing about x0 is left behind."""
    process = ALL[name]
    t = times(process, 4, low=1e-4)
    k = process.channels
    mean, root = process.kernel(t)
    eye = torch.eye(k, dtype=torch.float64)
    read = [process.statistic(eye, u) for u in t]  # the statistic of unit vectors is the row
    rows, sigma = torch.stack([x for x, _ in read]), torch.stack([level[0] for _, level in read])
    torch.testing.assert_close(sigma, process.sigma(t), rtol=1e-12, atol=0.0)
    terms = (rows * mean).abs().sum(-1)
    assert bool((((rows * mean).sum(-1) - 1).abs() < 1e-13 * terms).all())
    spread = torch.linalg.vector_norm(root.mT @ rows.unsqueeze(-1), dim=(-2, -1))
    noise = (rows.unsqueeze(-1) * root).abs().sum((-2, -1))
    assert bool(((spread - sigma).abs() < 1e-13 * noise + 1e-11 * sigma).all())


def test_statistic_of_batches_and_events():
    process = MALDA()
    g = torch.Generator().manual_seed(0)
    z = normal(g, 4, 3, 2, 5)
    t = torch.tensor([0.1, 0.4, 0.7, 1.0])
    x, sigma = process.statistic(z, t)
    assert x.shape == (4, 2, 5)
    assert sigma.shape == (4,)
    for i in range(4):
        alone, level = process.statistic(z[i : i + 1], float(t[i]))
        torch.testing.assert_close(x[i], alone[0], rtol=1e-6, atol=1e-6)  # t is float32 here
        torch.testing.assert_close(sigma[i], level[0], rtol=1e-6, atol=0.0)
    single, level = process.statistic(z.float(), 0.4)
    assert single.dtype == torch.float32
    assert level.dtype == torch.float64


@pytest.mark.parametrize("name", CATALOG)
def test_at_time_zero_the_state_shows_the_data(name):
    process = ALL[name]
    z = normal(torch.Generator().manual_seed(0), 3, process.channels, 2)
    x, sigma = process.statistic(z, 0.0)
    if name == "VE-geometric":
        assert float(sigma[0]) == pytest.approx(0.01, rel=1e-12)
    else:
        assert float(sigma.max()) == 0.0
        assert torch.equal(x, z[:, 0])


@pytest.mark.parametrize("name", ["VP", "SubVP", "VE", "PSLD", "ALDA", "varying"])
def test_perturbed_data_has_the_kernels_law(name):
    """Mean and covariance of 40 000 draws, each within 5 of its own standard errors."""
    process, n = ALL[name], 40_000
    t = 0.5 * process.horizon
    z, noise = process.perturb(torch.full((n,), 1.5, dtype=torch.float64), t, torch.Generator().manual_seed(1))
    mean, root = process.kernel(t)
    cov = root @ root.T
    centred = z - 1.5 * mean
    torch.testing.assert_close(centred, noise @ root.T, rtol=1e-9, atol=1e-9)
    scale = cov.diagonal().sqrt()
    assert bool((centred.mean(0).abs() < 5 * scale / math.sqrt(n)).all())
    sample = centred.T @ centred / n
    error = (torch.outer(cov.diagonal(), cov.diagonal()) + cov**2).sqrt() / math.sqrt(n)
    assert bool(((sample - cov).abs() < 5 * error).all())
    again = process.perturb(torch.full((n,), 1.5, dtype=torch.float64), t, torch.Generator().manual_seed(1))[0]
    assert torch.equal(z, again)


# -- derivatives -------------------------------------------------------------------------------------------------------


def _parameters(k: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(k)
    low, skew, spread = normal(g, k, k), normal(g, k, k), normal(g, k, k)
    return tuple(x.requires_grad_() for x in (low, skew, spread))  # type: ignore[return-value]


def _recipe(low: Tensor, skew: Tensor, spread: Tensor) -> Recipe:
    eye = torch.eye(low.shape[0], dtype=torch.float64)
    return Recipe(low @ low.T + 0.1 * eye, skew - skew.T, spread @ spread.T + 0.3 * eye, LinearClock(0.1, 4.0))


@pytest.mark.parametrize("what", ["kernel", "sigma", "time", "snr_rate", "statistic"])
def test_recipes_are_differentiable_in_their_matrices(what):
    k = 2 if what == "time" else 3
    z = normal(torch.Generator().manual_seed(9), 2, k)

    def value(low: Tensor, skew: Tensor, spread: Tensor) -> Tensor:
        process = _recipe(low, skew, spread)
        if what == "kernel":
            mean, root = process.kernel([1e-3, 0.1, 0.8])
            return torch.cat([mean.unsqueeze(-1), root], -1)
        if what == "time":
            return process.time(0.5)
        if what == "statistic":
            return torch.cat([x.flatten() for x in process.statistic(z, 0.3)])
        return getattr(process, what)([0.1, 0.8]).log()

    assert torch.autograd.gradcheck(value, _parameters(k), eps=1e-6, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: PSLD(gamma=p, nu=4.01, inverse_mass=4.0),
        lambda p: PSLD(nu=4 + p),
        lambda p: CLD(mass=p),
        lambda p: MALDA(aux_scale=p),
        lambda p: VP(clock=LinearClock(p, 20.0)),
        lambda p: VE(clock=GeometricClock(p, 50.0)),
    ],
    ids=["PSLD gamma", "PSLD nu", "CLD mass", "MALDA start", "VP beta_min", "VE sigma_min"],
)
def test_named_processes_are_differentiable_in_their_numbers(make):
    p = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: make(p).kernel([0.05, 0.4])[1], (p,), eps=1e-7, atol=1e-5, rtol=1e-5)
    assert torch.autograd.gradcheck(lambda p: make(p).sigma([0.05, 0.4]), (p,), eps=1e-7, atol=1e-5, rtol=1e-5)


def test_time_is_differentiable_in_the_level():
    for process in (VP(), PSLD(), varying()):
        level = torch.tensor([0.3, 1.0], dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(process.time(level).sum(), level)
        t = process.time(level.detach())
        # d sigma/dt = sigma^3 (-snr') / 2
        torch.testing.assert_close(slope, 2 / (level.detach() ** 3 * process.snr_rate(t)), rtol=1e-9, atol=0.0)


# -- processes without one clock ---------------------------------------------------------------------------------------


def test_panels_converge_at_order_sixteen():
    """Halving a panel divides the error by 2^16, here from one panel to two."""
    process = varying()
    exact = PanelProcess(process.drift, process.diffusion, panels=64, start=0.0).marginal(1.0)
    errors = []
    for panels in (1, 2):
        phi, _ = PanelProcess(lambda t: 2.5 * process.drift(t), process.diffusion, panels=panels).marginal(1.0)
        sharp, _ = PanelProcess(lambda t: 2.5 * process.drift(t), process.diffusion, panels=64).marginal(1.0)
        errors.append(float((phi - sharp).abs().max()))
    assert 14 < np.log2(errors[0] / errors[1]) < 20, errors
    for a, b in zip(process.marginal(1.0), exact, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=1e-13)


def test_a_clocked_process_by_panels():
    process = RANDOM["K3-rank1-geometric"]
    panels = PanelProcess(
        process.drift, process.diffusion, process.horizon, process.start()[1:, 1:], process.stationary
    )
    s, t = 0.2 * process.horizon, 0.9 * process.horizon
    for a, b in zip(panels.transition(s, t), process.transition(s, t), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)

"""The Brownian bridge: laws by hand, by an ODE solver and by the general routes of the base class, up to T itself."""

import math

import pytest
import torch

from tests.reference.exact import ode_kernels
from undrift.process import BrownianBridge, LinearProcess

BRIDGE = BrownianBridge(scale=0.8, horizon=1.5)
INNER = BRIDGE.horizon * torch.tensor([1e-9, 1e-4, 0.1, 0.4, 0.8, 0.99], dtype=torch.float64)


def test_the_kernel_solves_its_ode():
    grid = INNER[1:]
    exact = ode_kernels(
        lambda t: BRIDGE.drift(t).numpy(), lambda t: BRIDGE.diffusion(t).numpy(), BRIDGE.start().numpy(), grid.tolist()
    )
    mean, root = BRIDGE.kernel(grid)
    for i, (phi, cov) in enumerate(exact):
        assert float(mean[i]) == pytest.approx(float(phi[0, 0]), rel=1e-10)
        assert float(root[i].square()) == pytest.approx(float(cov[0, 0]), rel=1e-10)


def test_transitions_are_those_of_a_bridge():
    """From x at s to the origin at T: mean x (T - t)/(T - s), variance s^2 (t - s)(T - t)/(T - s)."""
    s, t, end = 0.3, 1.1, BRIDGE.horizon
    phi, root = BRIDGE.transition(s, t)
    assert float(phi) == pytest.approx((end - t) / (end - s), rel=1e-14)
    assert float(root.square()) == pytest.approx(0.64 * (t - s) * (end - t) / (end - s), rel=1e-14)
    first, second, whole = BRIDGE.transition(0.1, s), BRIDGE.transition(s, t), BRIDGE.transition(0.1, t)
    assert float(second[0] * first[0]) == pytest.approx(float(whole[0]), rel=1e-14)
    cov = second[0] ** 2 * first[1] ** 2 + second[1] ** 2
    assert float(cov) == pytest.approx(float(whole[1] ** 2), rel=1e-13)
    phi, root = BRIDGE.transition(INNER, INNER)
    assert bool((phi == 1).all())
    assert bool((root == 0).all())


def test_short_steps_keep_their_digits():
    s = torch.tensor([0.2, 1.4], dtype=torch.float64)
    step = 2.0**-36
    phi, root = BRIDGE.transition(s, s + step)
    end = BRIDGE.horizon
    torch.testing.assert_close(1 - phi[:, 0, 0], step / (end - s), rtol=1e-4, atol=0.0)  # 1 - phi has 12 digits less
    exact = 0.64 * step * (end - s - step) / (end - s)
    torch.testing.assert_close(root[:, 0, 0].square(), exact, rtol=1e-13, atol=0.0)


def test_at_the_end_nothing_is_left():
    end = torch.tensor(BRIDGE.horizon, dtype=torch.float64)
    for start in (0.0, 0.7, BRIDGE.horizon - 1e-12):
        phi, root = BRIDGE.transition(start, end)
        assert float(phi) == 0.0
        assert float(root) == 0.0
    assert [float(v) for v in BRIDGE.transition(end, end)] == [1.0, 0.0]
    assert [float(v) for v in BRIDGE.kernel(end)] == [0.0, 0.0]
    assert float(BRIDGE.snr(end)) == 0.0
    assert float(BRIDGE.sigma(end)) == math.inf
    assert float(BRIDGE.snr_rate(end)) == pytest.approx(1 / (0.8 * BRIDGE.horizon) ** 2, rel=1e-14)
    assert float(BRIDGE.time(math.inf)) == BRIDGE.horizon


def test_its_shortcuts_are_the_general_routes():
    """Weights, levels, rate and inverse against the base class, which knows only kernels."""
    for short, general in zip(BRIDGE._weights(INNER), LinearProcess._weights(BRIDGE, INNER), strict=True):
        torch.testing.assert_close(short, general, rtol=1e-13, atol=0.0)
    for short, general in zip(BRIDGE.information(INNER), LinearProcess.information(BRIDGE, INNER), strict=True):
        torch.testing.assert_close(short, general, rtol=1e-12, atol=0.0)
    levels = BRIDGE.sigma(INNER)
    torch.testing.assert_close(BRIDGE.time(levels), INNER, rtol=1e-13, atol=0.0)
    torch.testing.assert_close(LinearProcess.time(BRIDGE, levels), INNER, rtol=1e-11, atol=0.0)
    whole = torch.cat([INNER, torch.tensor([BRIDGE.horizon], dtype=torch.float64)]).requires_grad_()
    (slope,) = torch.autograd.grad(BRIDGE.snr(whole).sum(), whole)
    torch.testing.assert_close(BRIDGE.snr_rate(whole).detach(), -slope, rtol=1e-12, atol=0.0)
    assert float(BRIDGE.snr(0.0)) == math.inf
    with pytest.raises(ValueError, match="sigma must be positive, got -1"):
        BRIDGE.time([0.5, -1.0])


def test_run_back_from_its_reference_it_is_a_brownian_motion():
    """Data N(0, s^2 T): Cov(z_s, z_t) = s^2 (T - t) for s < t, that of Brownian motion in T - t."""
    end, var = BRIDGE.horizon, 0.64 * BRIDGE.horizon
    for s, t in ((0.0, 0.4), (0.2, 0.9), (1.0, 1.5)):
        mean, root = BRIDGE.kernel(s)
        early = mean**2 * var + root[0] ** 2
        phi, _ = BRIDGE.transition(s, t)
        assert float(early) == pytest.approx(0.64 * (end - s), rel=1e-13)
        assert float(phi[0, 0] * early) == pytest.approx(0.64 * (end - t), rel=1e-13, abs=1e-15)


def test_refusals():
    with pytest.raises(ValueError, match="BrownianBridge: scale must be a finite positive"):
        BrownianBridge(scale=0.0)
    with pytest.raises(ValueError, match="BrownianBridge: horizon must be a finite positive"):
        BrownianBridge(horizon=math.inf)

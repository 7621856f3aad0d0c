"""The automatic splitting sampler against the hand-derived formulas of CLD and PSLD (psld sheet 4.3), to 1e-8."""

from __future__ import annotations

import math

import pytest
import torch

from undrift.process import CLD, MALDA, PSLD, VE, VP, LinearClock
from undrift.sample import SSCS, Uniform

from .affine import law


def _half_step(b, gamma, nu):
    """Closed form of the reversed Ornstein-Uhlenbeck part over the integral b of beta: mean matrix and covariance."""
    lam, delta = (nu + gamma) / 4, (nu - gamma) / 2
    m = 1 / delta**2
    e = math.exp(-lam * b)
    phi = e * torch.tensor([[1 + delta * b / 2, -(delta**2) * b / 2], [b / 2, 1 - delta * b / 2]], dtype=torch.float64)
    s = torch.diag(torch.tensor([1.0, m], dtype=torch.float64))
    return phi, s - phi @ s @ phi.T


@pytest.mark.parametrize(("gamma", "nu"), [(0.0, 4.0), (0.01, 4.01), (0.25, 4.25)])
@pytest.mark.parametrize("beta", ["constant", "linear"])
def test_a_whole_walk_matches_the_hand_derived_sampler(gamma, nu, beta):
    from undrift.process import ConstantClock

    clock = ConstantClock(8.0) if beta == "constant" else LinearClock(0.1, 15.9)
    process = PSLD(gamma=gamma, nu=nu, clock=clock)
    steps = 7
    plan = SSCS(steps, Uniform(), "none").plan(process)
    m = 4 / (gamma - nu) ** 2
    s = torch.diag(torch.tensor([1.0, m], dtype=torch.float64))
    d = torch.diag(torch.tensor([gamma, m * nu], dtype=torch.float64))  # GG' / beta
    times = torch.linspace(1.0, 1e-3, steps + 1, dtype=torch.float64)

    def integral(t):
        return float(clock.integral(torch.as_tensor(t, dtype=torch.float64)))

    # By hand: mean and covariance of the walk for data N(.3, .25) and its exact score.
    mean, cov = torch.zeros(2, dtype=torch.float64), s.clone()
    for t, t_next in zip(times.tolist(), times.tolist()[1:], strict=False):
        middle = 0.5 * (t + t_next)
        phi, q = _half_step(integral(t) - integral(middle), gamma, nu)
        mean, cov = phi @ mean, phi @ cov @ phi.T + q
        m_t, root = process.kernel(t)
        p = root @ root.T + 0.25 * m_t[:, None] * m_t
        beta_t = float(clock.beta(torch.tensor(t, dtype=torch.float64)))
        weight = (integral(t) - integral(t_next)) if beta == "linear" else beta_t * (t - t_next)
        kick = torch.eye(2, dtype=torch.float64) + weight * d @ (torch.linalg.inv(s) - torch.linalg.inv(p))
        mean = kick @ mean + weight * d @ torch.linalg.inv(p) @ m_t * 0.3
        cov = kick @ cov @ kick.T
        phi, q = _half_step(integral(middle) - integral(t_next), gamma, nu)
        mean, cov = phi @ mean, phi @ cov @ phi.T + q
    got_mean, got_cov = law(plan, 0.3, 0.25)
    assert torch.allclose(got_mean, mean, atol=1e-8)
    assert torch.allclose(got_cov, cov, atol=1e-8)


def test_cld_is_psld_without_noise_on_the_data():
    grid = Uniform()
    a, b = SSCS(9, grid).plan(CLD()), SSCS(9, grid).plan(PSLD(gamma=0.0, nu=4.0))
    for name in ("A", "B", "L", "prior"):
        assert torch.allclose(getattr(a, name), getattr(b, name), atol=1e-12)


@pytest.mark.parametrize("process", [VP(), CLD(), PSLD(), MALDA()])
def test_exact_when_the_data_is_the_stationary_law(process):
    """With stationary data and stationary auxiliaries the kick vanishes, and the walk stays where it is."""
    import dataclasses

    if process.channels > 1:
        process = dataclasses.replace(process, aux_scale=1.0)
    _, cov = law(SSCS(5, Uniform(0.1), "none").plan(process), 0.0, 1.0)
    assert torch.allclose(cov, process.stationary, atol=1e-12)


def test_order_two_makes_two_calls_a_step():
    assert SSCS(10, order=2).plan(CLD()).calls == 19
    assert SSCS(10).plan(CLD()).calls == 10


def test_a_process_without_stationary_law_is_refused():
    with pytest.raises(ValueError, match=r"VE is not built from \(D, Q, S\); use Ancestral or Exponential"):
        SSCS(5).plan(VE())

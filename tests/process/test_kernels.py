"""Kernels against an adaptive ODE solver, and their smallest entries against 80-digit arithmetic."""

import functools
import math

import numpy as np
import pytest
import torch

from tests.process.cases import ALL, CATALOG, RANDOM, times
from tests.reference import mdm
from tests.reference.exact import ode_kernels, precise_kernel, precise_sigma
from undrift.process import (
    ALDA,
    CLD,
    HOLD,
    MALDA,
    ClockedProcess,
    ConstantClock,
    CosineClock,
    GeometricClock,
    LinearClock,
    PowerClock,
)

ROOT3 = math.sqrt(3.0)

# Written from the papers, not through the library: A, GG' (both over beta), the start of the auxiliaries, beta(t).
AFRESH = {
    "VP": ([[-0.5]], [[1.0]], [], lambda t: 0.1 + 19.9 * t),
    "VP-cosine": (
        [[-0.5]], [[1.0]], [],
        lambda t: math.pi / 1.008 * math.tan(math.pi / 2 * (t + 0.008) / 1.008),
    ),
    "VE": ([[0.0]], [[1.0]], [], lambda t: 2 * t),
    "VE-geometric": ([[0.0]], [[1.0]], [], lambda t: 2 * math.log(5000.0) * (0.01 * 5000.0**t) ** 2),
    "CLD": ([[0, 4], [-1, -4]], [[0, 0], [0, 2]], [0.01], lambda t: 4.0),
    "CLD-underdamped": ([[0, 1], [-1, -0.5]], [[0, 0], [0, 1]], [0.04], lambda t: 0.1 + 9.9 * t),
    "PSLD": ([[-0.005, 2], [-0.5, -2.005]], [[0.01, 0], [0, 1.0025]], [0.01], lambda t: 8.0),
    "PSLD-dsm": ([[-0.01, 2], [-0.5, -2.01]], [[0.02, 0], [0, 1.005]], [0.0], lambda t: 8.0),
    "ALDA": (
        [[0, 1, 0], [-1, 0, 1], [0, -1, -1]], np.diag([0, 0, 2.0]), [0.01, 0.01], lambda t: 0.1 + 9.9 * t,
    ),
    "HOLD": (
        [[0, 1, 0], [-1, 0, 2 * math.sqrt(2)], [0, -2 * math.sqrt(2), -3 * ROOT3]], np.diag([0, 0, 6 * ROOT3]),
        [0.01, 0.01], lambda t: 0.1 + 9.9 * t,
    ),
    "MALDA": (
        [[0, 1, 1], [-1, -2, 1], [-1, -1, -2]], np.diag([0, 4.0, 4.0]), [0.01, 0.01], lambda t: 0.1 + 9.9 * t,
    ),
    "MALDA-4": (
        [[0, 2, 2, 2], [-1, -2 * math.sqrt(2), 2, 2], [-1, -2, -2 * math.sqrt(2), 2], [-1, -2, -2, -2 * math.sqrt(2)]],
        np.diag([0, 2 * math.sqrt(2), 2 * math.sqrt(2), 2 * math.sqrt(2)]), [0.005, 0.005, 0.005],
        lambda t: 0.1 + 9.9 * t,
    ),
}  # fmt: skip


def rate(clock):
    """beta(t) of a clock in plain Python, from its formula."""
    if isinstance(clock, ConstantClock):
        return lambda t: clock.rate
    if isinstance(clock, LinearClock):
        return lambda t: clock.beta_min + (clock.beta_max - clock.beta_min) * t / clock.horizon
    if isinstance(clock, CosineClock):
        return AFRESH["VP-cosine"][3]
    if isinstance(clock, PowerClock):
        n = 2 * clock.exponent
        return lambda t: clock.sigma_max**2 * n * t ** (n - 1) / clock.horizon**n
    if isinstance(clock, GeometricClock):
        ratio = clock.sigma_max / clock.sigma_min
        return lambda t: 2 * math.log(ratio) * (clock.sigma_min * ratio**t) ** 2
    return lambda t: 1 + 0.5 * math.cos(t)  # the callable clock of the cases


def coefficients(name):
    process = ALL[name]
    if name in AFRESH:
        a, noise, start, beta = AFRESH[name]
        a, noise = np.array(a, float), np.array(noise, float)
        return (lambda t: beta(t) * a), (lambda t: beta(t) * noise), np.diag([0.0, *start])
    if isinstance(process, ClockedProcess):
        d, q, s = (m.numpy() for m in process.terms())
        a, beta = -(d + q) @ np.linalg.inv(s), rate(process.clock)
        return (lambda t: beta(t) * a), (lambda t: 2 * beta(t) * d), process.start().numpy()
    if name == "SubVP":
        beta, integral = (lambda t: 0.1 + 19.9 * t), (lambda t: 0.1 * t + 9.95 * t * t)
        return (
            (lambda t: np.array([[-0.5 * beta(t)]])),
            (lambda t: np.array([[-beta(t) * math.expm1(-2 * integral(t))]])),
            np.zeros((1, 1)),
        )
    if name == "FlowMatching":
        return (lambda t: np.array([[-1 / (1 - t)]])), (lambda t: np.array([[2 * t / (1 - t)]])), np.zeros((1, 1))
    assert name == "varying"

    def drift(t):
        c = 2 * math.sin(3 * t)
        return np.array([[-0.2, c], [-c, -1.0]])

    return drift, (lambda t: np.diag([0.4, 2.0])), np.zeros((2, 2))


@pytest.mark.parametrize("name", ALL)
def test_kernels_solve_their_ode(name):
    process = ALL[name]
    drift, diffusion, start = coefficients(name)
    grid = times(process, 7)
    clock = getattr(process, "clock", None)
    if isinstance(clock, GeometricClock):
        # The clock starts at sigma_min^2, as if it had run from 0 to there before t = 0.
        before = float(clock.sigma_min) ** 2
        beta = rate(clock)
        (first,) = ode_kernels(lambda b: drift(0.0) / beta(0.0), lambda b: diffusion(0.0) / beta(0.0), start, [before])
        rest = ode_kernels(drift, diffusion, first[1], grid.tolist())
        exact = [(phi @ first[0], cov) for phi, cov in rest]
    else:
        exact = ode_kernels(drift, diffusion, start, grid.tolist())
    phis, roots = process.marginal(grid)
    means, kernel_roots = process.kernel(grid)
    assert torch.equal(means, phis[..., 0])
    assert torch.equal(kernel_roots, roots)
    for (phi_exact, cov_exact), phi, root in zip(exact, phis.numpy(), roots.numpy(), strict=True):
        assert np.abs(phi - phi_exact).max() < 1e-11
        assert np.abs(root @ root.T - cov_exact).max() < 1e-10 * np.abs(cov_exact).max()
        assert (np.triu(root, 1) == 0).all()
        assert (np.diag(root) >= 0).all()


@pytest.mark.parametrize(
    "name", ["VP", "SubVP", "FlowMatching", "PSLD", "ALDA", "MALDA-4", "K4-rank1-callable", "varying"]
)
def test_transitions_solve_their_ode(name):
    process = ALL[name]
    drift, diffusion, start = coefficients(name)
    s, t = 0.31 * process.horizon, 0.77 * process.horizon
    zero = np.zeros_like(start)
    ((phi_exact, cov_exact),) = ode_kernels(lambda u: drift(s + u), lambda u: diffusion(s + u), zero, [t - s])
    phi, root = process.transition(s, t)
    assert np.abs(phi.numpy() - phi_exact).max() < 1e-10 * np.abs(phi_exact).max()
    assert np.abs((root @ root.T).numpy() - cov_exact).max() < 1e-10 * np.abs(cov_exact).max()


PRECISE = {
    "CLD": CLD(mass=1.0, aux_scale=0.01, clock=ConstantClock(1.0, horizon=30.0)),
    "MALDA": MALDA(clock=ConstantClock(1.0, horizon=30.0)),
    "ALDA": ALDA(clock=ConstantClock(1.0, horizon=30.0)),
    "HOLD": HOLD(clock=ConstantClock(1.0, horizon=30.0)),
    "CLD-dsm": CLD(mass=1.0, aux_scale=0.0, clock=ConstantClock(1.0, horizon=30.0)),
    "MALDA-dsm": MALDA(aux_scale=0.0, clock=ConstantClock(1.0, horizon=30.0)),
    "ALDA-dsm": ALDA(aux_scale=0.0, clock=ConstantClock(1.0, horizon=30.0)),
}


@functools.cache
def _exact(name, b):
    process = PRECISE[name]
    a, d = (m.numpy() for m in process.matrices())
    return precise_kernel(a, 2 * d, process.start().numpy(), b)


@pytest.mark.parametrize("batched", [True, False], ids=["one batch", "one by one"])
@pytest.mark.parametrize("name", PRECISE)
def test_roots_are_accurate_entry_by_entry(name, batched):
    """The published accuracy of this method is 1.5e-11 for ALDA (sheet T20); sorted rows reach 1e-13 for all."""
    process = PRECISE[name]
    clocks = torch.tensor(mdm.CLOCKS, dtype=torch.float64)
    if batched:
        roots, levels = process.kernel(clocks)[1], process.sigma(clocks)
    else:
        roots = torch.stack([process.kernel(b)[1] for b in clocks])
        levels = torch.stack([process.sigma(b) for b in clocks])
    for b, root, sigma in zip(mdm.CLOCKS, roots.tolist(), levels.tolist(), strict=True):
        phi_exact, exact = _exact(name, b)
        for i in range(process.channels):
            assert abs(root[i][i] / exact[i, i] - 1) < 1e-13, (b, i)
            for j in range(i):  # correlations fade with e^-b: there the size of the row counts
                assert abs(root[i][j] - exact[i, j]) < 1e-13 * max(abs(exact[i, j]), 0.1 * exact[i, i]), (b, i, j)
        assert abs(sigma / precise_sigma(phi_exact, exact) - 1) < 5e-12, b


@pytest.mark.parametrize("name", [*RANDOM, *CATALOG])
def test_a_batch_agrees_with_its_members(name):
    process = ALL[name]
    grid = times(process, 5)
    phis, roots = process.marginal(grid.reshape(5, 1))
    assert phis.shape == roots.shape == (5, 1, process.channels, process.channels)
    for i, t in enumerate(grid):
        phi, root = process.marginal(t)
        torch.testing.assert_close(phis[i, 0], phi, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(roots[i, 0], root, rtol=1e-10, atol=1e-13 * float(root.abs().max()))

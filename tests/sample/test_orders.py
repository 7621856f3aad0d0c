"""Measured orders of convergence on Gaussian data, against theory; moments are exact, so nothing is left to luck."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch

from undrift.process import CLD, MALDA, VP, LinearClock
from undrift.sample import SSCS, Ancestral, DPMSolver2M, EulerMaruyama, Exponential, Heun, Uniform

from .affine import law

PROCESSES = {"VP": VP(LinearClock(0.1, 10.0)), "CLD": CLD(), "MALDA": MALDA()}
GRID = Uniform(0.05)  # stops where the score is smooth, so that orders show at moderate steps
MEAN, VARIANCE = 0.3, 0.25


def _law(sampler, process):
    mean, cov = law(sampler.plan(process), MEAN, VARIANCE)
    return torch.cat([mean, cov.flatten()])


@functools.cache
def _reference(process, deterministic):
    if deterministic:
        return _law(Exponential(1280, GRID, "none", order=3, guard=False), process)
    return _law(SSCS(1600, GRID, "none", order=2), process)


STEPS = (80, 160, 320)
# sampler, deterministic, order, smallest slope accepted between 160 and 320 steps
METHODS = {
    "Euler-Maruyama": (lambda n: EulerMaruyama(n, GRID, "none"), False, 1),
    "Euler": (lambda n: EulerMaruyama(n, GRID, "none", stochasticity=0.0), True, 1),
    "ancestral": (lambda n: Ancestral(n, GRID, "none"), False, 1),
    "SSCS": (lambda n: SSCS(n, GRID, "none"), False, 1),
    "SSCS midpoint, one call": (lambda n: SSCS(n, GRID, "none", score_time="midpoint"), False, 1),
    "SSCS order 2": (lambda n: SSCS(n, GRID, "none", order=2), False, 2),
    "exponential 1": (lambda n: Exponential(n, GRID, "none", order=1), True, 1),
    "exponential 2": (lambda n: Exponential(n, GRID, "none", order=2, guard=False), True, 2),
    "exponential 2, stochastic": (
        lambda n: Exponential(n, GRID, "none", order=2, stochasticity=1.0, guard=False),
        False,
        2,
    ),
    "DPM-Solver++(2M)": (lambda n: DPMSolver2M(n, GRID, "none"), True, 2),
    "Heun": (lambda n: Heun(n, GRID, "none"), True, 2),
}


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("method", METHODS)
def test_weak_order_of_mean_and_covariance(method, process):
    make, deterministic, order = METHODS[method]
    exact = _reference(PROCESSES[process], deterministic)
    errors = [float((_law(make(n), PROCESSES[process]) - exact).abs().max()) for n in STEPS[1:]]
    slope = math.log2(errors[0] / errors[1])
    # Order p up to pre-asymptotic terms: never a whole order off.
    assert order - 0.35 < slope < order + 0.75, (errors, slope)


@pytest.mark.parametrize("process", ["VP", "MALDA"])
def test_third_order_where_the_start_up_does_not_show(process):
    """Steps one and two run at orders one and two; near the prior predictions are flat, so it hardly shows."""
    exact = _reference(PROCESSES[process], True)
    errors = [
        float((_law(Exponential(n, GRID, "none", order=3, guard=False), PROCESSES[process]) - exact).abs().max())
        for n in STEPS
    ]
    assert math.log2(errors[0] / errors[1]) > 2.5
    assert math.log2(errors[1] / errors[2]) > 2.5


@pytest.mark.parametrize("process", PROCESSES)
def test_order_of_the_local_error(process):
    """One step with exact history, on the exact flow of Gaussian data: the error of order p shrinks as h^(p + 1)."""
    p = PROCESSES[process]
    errors: dict[int, list[float]] = {order: [] for order in (1, 2, 3)}
    for h in (0.01, 0.005):
        times = torch.tensor([0.5 + 2 * h, 0.5 + h, 0.5, 0.5 - h], dtype=torch.float64)
        states = _gaussian_flow(p, times)  # exact propagators stand for every start at once
        snr, row = p._weights(times)
        predictions = [VARIANCE / (VARIANCE + 1 / snr[i]) * (row[i] @ states[i]) for i in range(3)]
        for order in (1, 2, 3):
            last = Exponential(4, order=order, guard=False).rows(p, times)[-1]
            terms = [b[:, :1] * x for b, x in zip(last.B, reversed(predictions), strict=False)]
            errors[order].append(float((last.A[0] @ states[2] + sum(terms) - states[3]).norm()))
    for order, (coarse, fine) in errors.items():
        assert order + 0.75 < math.log2(coarse / fine) < order + 1.35, errors


def _gaussian_flow(process, times):
    """Exact propagators of the probability-flow ODE for data N(0, VARIANCE), by an independent integrator."""
    from scipy.integrate import solve_ivp

    k = process.channels

    def velocity(t, y):
        time = torch.tensor(t, dtype=torch.float64)
        m, root = process.kernel(time)
        p = root @ root.T + VARIANCE * m[:, None] * m
        generator = process.drift(time) + 0.5 * process.diffusion(time) @ torch.linalg.inv(p)
        return (generator @ torch.from_numpy(y).reshape(k, k)).reshape(-1).numpy()

    out, state = [torch.eye(k, dtype=torch.float64)], torch.eye(k, dtype=torch.float64)
    for a, b in zip(times.tolist(), times.tolist()[1:], strict=False):
        y = solve_ivp(velocity, (a, b), state.reshape(-1).numpy(), method="DOP853", rtol=1e-12, atol=1e-14).y[:, -1]
        state = torch.from_numpy(y).reshape(k, k)
        out.append(state)
    return out


def test_strong_order_of_euler_maruyama_with_additive_noise():
    """Coarse and fine walks on one Brownian path; the noise does not depend on the state, so the strong order is 1."""
    process = CLD()
    fine = 640
    errors = [_strong_error(process, n, fine) for n in (40, 80)]
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert 0.8 < slopes[-1] < 1.3, (errors, slopes)


def _strong_error(process, coarse, fine):
    """Root mean square distance at the end between two EM walks whose increments are sums of each other's, exactly."""
    plans = [EulerMaruyama(n, GRID, "none").plan(process) for n in (coarse, fine)]
    ratio, k = fine // coarse, process.channels

    def affine(plan, i):
        m, root = process.kernel(plan.times[i])
        inverse = torch.cholesky_inverse(root)
        gain = VARIANCE * inverse @ m / (1 + VARIANCE * (m @ inverse @ m))
        return plan.A[i, 0] + plan.B[i, 0, :, :1] * gain

    prior = plans[0].prior @ plans[0].prior.T
    cov = prior.repeat(2, 2)  # the two walks start at one point
    for i in range(coarse):
        step = torch.zeros(2 * k, 2 * k, dtype=torch.float64)
        step[:k, :k] = affine(plans[0], i)
        tail, noises = torch.eye(k, dtype=torch.float64), []
        for j in reversed(range(i * ratio, (i + 1) * ratio)):
            noises.append(tail @ plans[1].L[j])
            tail = tail @ affine(plans[1], j)
        step[k:, k:] = tail
        cov = step @ cov @ step.T
        for noise in noises:  # the coarse increment is the sum of the fine ones
            both = torch.cat([plans[0].L[i] / math.sqrt(ratio), noise])
            cov = cov + both @ both.T
    difference = cov[:k, :k] - cov[:k, k:] - cov[k:, :k] + cov[k:, k:]
    return math.sqrt(float(difference.trace()))

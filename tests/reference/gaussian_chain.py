"""Rows of a controlled diffusion by conditioning dense Gaussians in many digits, from a process's own equation.

For use within ``mpmath.workdps``.
"""

import mpmath as mp
import numpy as np

from tests.reference.exact import precise_kernel
from undrift.process import VE, BrownianBridge, ClockedProcess, LinearClock, LinearProcess, SubVP


def kernel(process: LinearProcess, s: float, t: float) -> tuple[mp.matrix, mp.matrix]:
    """Phi and covariance of z_t given z_s; a process on a clock needs a linear one."""
    if s == t:
        return mp.eye(process.channels), mp.zeros(process.channels)
    s, t = mp.mpf(s), mp.mpf(t)
    if isinstance(process, BrownianBridge):
        end, scale = mp.mpf(process.horizon), mp.mpf(process.scale)
        left = (end - t) / (end - s)
        return mp.matrix([[left]]), mp.matrix([[scale**2 * (t - s) * left]])
    if isinstance(process, VE):
        scale, power, end = (mp.mpf(v) for v in (process.clock.sigma_max, process.clock.exponent, process.horizon))
        return mp.matrix([[1]]), mp.matrix([[(scale * (t / end) ** power) ** 2 - (scale * (s / end) ** power) ** 2]])
    clock = process.clock
    assert isinstance(clock, LinearClock)
    low, high = mp.mpf(clock.beta_min), mp.mpf(clock.beta_max)
    bs, bt = (low * u + (high - low) * u**2 / (2 * mp.mpf(clock.horizon)) for u in (s, t))
    if isinstance(process, SubVP):  # d Sigma / dB = -Sigma + 1 - e^(-2 B)
        cov = 1 + mp.exp(-2 * bt) - mp.exp(bs - bt) * (1 + mp.exp(-2 * bs))
        return mp.matrix([[mp.exp((bs - bt) / 2)]]), mp.matrix([[cov]])
    assert isinstance(process, ClockedProcess)
    a, d = (m.detach().numpy() for m in process.matrices())
    phi, root = precise_kernel(a, 2 * d, np.zeros_like(a), bt - bs)
    return phi, root * root.T


class Step:
    """Joint law of x0, z_{k+1} and z_k for data N(mean, var), with z_{k+1} at time ``early`` and z_k at ``late``."""

    def __init__(self, process: LinearProcess, early: float, late: float, mean: float = 0.0, var: float = 1.0) -> None:
        start = mp.matrix(process.start().detach().tolist())
        first, cov = kernel(process, 0.0, early)
        self.phi, self.noise = kernel(process, early, late)
        m = first[:, 0]
        self.mean_x, self.mean_early = mp.matrix([mean]), m * mp.mpf(mean)
        self.mean_late = self.phi * self.mean_early
        self.var_x, self.x_early = mp.matrix([[var]]), m.T * mp.mpf(var)
        self.early = m * m.T * mp.mpf(var) + cov + first * start * first.T
        self.late = self.phi * self.early * self.phi.T + self.noise
        precision = mp.inverse(self.late)
        self.x_on_late = self.x_early * self.phi.T * precision
        self.early_on_late = self.early * self.phi.T * precision

    def x_given_late(self, z: mp.matrix) -> mp.matrix:
        return self.mean_x + self.x_on_late * (z - self.mean_late)

    def early_given_late(self, z: mp.matrix) -> mp.matrix:
        return self.mean_early + self.early_on_late * (z - self.mean_late)

    def var_x_given_late(self) -> mp.matrix:
        return self.var_x - self.x_on_late * self.phi * self.x_early.T

    def cov_early_given_late(self) -> mp.matrix:
        return self.early - self.early_on_late * self.phi * self.early

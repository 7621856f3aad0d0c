"""Independent routes to transition kernels: an adaptive ODE solver in float64, and matrix exponentials in mpmath."""

from collections.abc import Callable, Sequence

import mpmath as mp
import numpy as np
from scipy.integrate import solve_ivp

Matrix = Callable[[float], np.ndarray]


def ode_kernels(
    drift: Matrix, diffusion: Matrix, start: np.ndarray, times: Sequence[float]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Phi(0, t) and covariance at increasing times: dPhi = F Phi, dSigma = F Sigma + Sigma F' + GG', by DOP853."""
    k = start.shape[0]

    def rate(t: float, y: np.ndarray) -> np.ndarray:
        f, phi, sigma = drift(t), y[: k * k].reshape(k, k), y[k * k :].reshape(k, k)
        f_sigma = f @ sigma
        return np.concatenate([(f @ phi).ravel(), (f_sigma + f_sigma.T + diffusion(t)).ravel()])

    y, now, out = np.concatenate([np.eye(k).ravel(), start.ravel()]), 0.0, []
    for t in times:
        # Tolerances follow the size of Phi and of the covariance, which near t = 0 is far below 1.
        size = max(np.abs(y[k * k :]).max(), (t - now) * np.abs(diffusion(t)).max())
        atol = np.concatenate([np.full(k * k, 1e-13), np.full(k * k, 1e-13 * size)])
        y = solve_ivp(rate, (now, t), y, method="DOP853", rtol=1e-13, atol=atol).y[:, -1]
        now = t
        out.append((y[: k * k].reshape(k, k), y[k * k :].reshape(k, k)))
    return out


def precise_kernel(a: np.ndarray, diffusion: np.ndarray, start: np.ndarray, b: float) -> tuple[mp.matrix, mp.matrix]:
    """Phi and lower Cholesky root for dz = A z db + g dw, gg' = ``diffusion``, over clock b: Van Loan in 80 digits.

    Entries of the matrices may be floats or mpmath numbers (arrays of objects).
    """
    k = a.shape[0]
    with mp.workdps(80):
        block = mp.zeros(2 * k, 2 * k)
        for i in range(k):
            for j in range(k):
                block[i, j] = mp.mpf(a[i, j]) * b
                block[i, k + j] = mp.mpf(diffusion[i, j]) * b
                block[k + i, k + j] = -mp.mpf(a[j, i]) * b
        full = mp.expm(block, method="taylor")
        phi = full[:k, :k]
        cov = full[:k, k:] * phi.T + phi * mp.matrix(start.tolist()) * phi.T
        return phi, mp.cholesky((cov + cov.T) / 2)


def precise_sigma(phi: mp.matrix, root: mp.matrix) -> mp.mpf:
    """(m' S^-1 m)^(-1/2) for the kernel of :func:`precise_kernel`."""
    with mp.workdps(80):
        u = mp.lu_solve(root, phi[:, 0])
        return 1 / mp.sqrt(sum(v * v for v in u))

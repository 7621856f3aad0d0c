r"""Gaussians given a linear observation with Gaussian noise: Bayes' rule in closed form, from roots.

For :math:`x \sim N(\mu, W W^\top)` and :math:`y = A x + N(0, R R^\top)` the joint law of (y, x) has the root

.. math:: \begin{pmatrix} R & A W \\ 0 & W \end{pmatrix} Q = \begin{pmatrix} G & 0 \\ H & P \end{pmatrix}

made lower triangular by one QR, and then :math:`y \sim N(A \mu, G G^\top)` and
:math:`x \mid y \sim N(\mu + H G^{-1} (y - A \mu),\; P P^\top)`. Nothing is subtracted or inverted but G, so singular
covariances of the data, or of the noise, keep their digits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from undrift._linalg import as_f64, sqrt_sum

__all__ = ["Conditioned", "condition"]


class Conditioned(NamedTuple):
    """Log densities of y (M,), and means (M, d) and covariances (M, d, d) of x given y."""

    log_evidence: Tensor
    means: Tensor
    covs: Tensor


def condition(means: Tensor, roots: Tensor, a: object, noise_cov: object, y: object) -> Conditioned:
    """M Gaussians in R^d given y = A x + noise.

    Args:
        means: (M, d).
        roots: W (M, d, d) or (1, d, d), of the covariances W W'.
        a: A, (m, d).
        noise_cov: a variance, one per observed number (m,), or a covariance (m, m).
        y: observed numbers, (m,).

    Raises:
        ValueError: if the shapes do not fit, a number is not finite, ``noise_cov`` is not a covariance, or y has no
            density: A C A' plus the noise is singular.
    """
    d = means.shape[1]
    matrix, noise, data = as_f64(a), as_f64(noise_cov), as_f64(y)
    if matrix.ndim != 2 or matrix.shape[1] != d or matrix.shape[0] < 1 or data.shape != matrix.shape[:1]:
        raise ValueError(
            f"posterior: A must have shape (m, {d}), of the flattened event, and y (m,); got {tuple(matrix.shape)} and "
            f"{tuple(data.shape)}."
        )
    m = len(data)
    if noise.shape not in ((), (m,), (m, m)):
        raise ValueError(
            f"posterior: noise_cov must be a number, or have shape ({m},) or ({m}, {m}), got {tuple(noise.shape)}."
        )
    if not all(bool(v.isfinite().all()) for v in (matrix, noise, data)):
        raise ValueError("posterior: A, noise_cov and y must be finite.")
    full = noise if noise.ndim == 2 else torch.diag(noise.expand(m))
    values, vectors = torch.linalg.eigh(0.5 * (full + full.mT))
    if bool(((full - full.mT).abs() > 1e-10 * full.abs().max()).any()) or float(values[0]) < -1e-10 * float(values[-1]):
        raise ValueError("posterior: noise_cov must be symmetric and positive semi-definite.")
    noise_root = (vectors * values.clamp(min=0).sqrt()).expand(len(roots), m, m)
    zero = roots.new_zeros(len(roots), d, m)
    joint = sqrt_sum(torch.cat([torch.cat([noise_root, matrix @ roots], -1), torch.cat([zero, roots], -1)], -2))
    g, h, p = joint[:, :m, :m], joint[:, m:, :m], joint[:, m:, m:]
    scale = torch.linalg.vector_norm(joint[:, :m], dim=-1).amax(-1, keepdim=True)
    if not bool((g.diagonal(dim1=-2, dim2=-1) > 1e-13 * scale).all()):
        raise ValueError(
            "posterior: y has no density, since A C A' plus the noise is singular; give the noise a positive variance, "
            "or leave out rows of A that repeat what others say."
        )
    white = torch.linalg.solve_triangular(g, (data - means @ matrix.mT).unsqueeze(-1), upper=False)
    log_det = g.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_evidence = -0.5 * (white.square().sum((-2, -1)) + m * math.log(2 * math.pi)) - log_det
    covs = (p @ p.mT).expand(len(means), d, d)
    return Conditioned(log_evidence, means + (h @ white).squeeze(-1), covs)

r"""Exact likelihoods by the augmented probability-flow ODE, for any number of channels.

.. math:: \log p(z_0) = \log p_T(z_T) + \int_0^T \nabla\cdot\frac{dz}{dt}\,dt

along the flow; :mod:`undrift.measure.transport` solves it.

For K > 1, with auxiliaries started from :math:`q(v_0)`, independent of the data,

.. math:: \log p(x) \ge E_{v_0 \sim q}[\log p(x, v_0) - \log q(v_0)],

and the log-mean-exp of S such terms is a tighter bound that tends to log p(x).

References:
    Song et al., Score-Based Generative Modeling through Stochastic Differential Equations, 2021, section 4.3.
    Singhal, Goldstein & Ranganath, Where to Diffuse, How to Diffuse, and How to Get Back, 2023 (auxiliaries).
    Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders, 2016 (the tighter bound).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from undrift._linalg import psd_sqrt
from undrift.diffusion import Diffusion, NoiseDiffusion, require_white
from undrift.guided_noise import GuidedNoise
from undrift.measure.transport import Trace, transport
from undrift.process.linear import mix

__all__ = ["Likelihood", "bits_per_dim", "log_likelihood"]


@dataclass(frozen=True, eq=False)
class Likelihood:
    """Log likelihoods of a batch of points, in nats.

    Attributes:
        log_likelihood: (batch,), float64; for K > 1 a lower bound, see :func:`log_likelihood`.
        std_error: (batch,) standard error of each over probes or auxiliary starts, None if there was one of both.
        dim: coordinates of a point, d.
        calls: network calls, each on batch x samples points.
    """

    log_likelihood: Tensor
    std_error: Tensor | None
    dim: int
    calls: int

    def bits_per_dim(self, log_det: Tensor | float = 0.0, bins: int = 256) -> Tensor:
        """See :func:`bits_per_dim`."""
        return bits_per_dim(self.log_likelihood, self.dim, log_det, bins)

    def __str__(self) -> str:
        mean, spread = float(self.log_likelihood.mean()), float(self.log_likelihood.std(correction=0))
        n = self.log_likelihood.numel()
        return f"log likelihood {mean:.4f} ± {spread / math.sqrt(n):.4f} nats (mean of {n} points, {self.calls} calls)"


def log_likelihood(
    diffusion: Diffusion | NoiseDiffusion | GuidedNoise,
    x: Tensor,
    *,
    t_min: float = 1e-5,
    trace: Trace = "auto",
    probes: int = 1,
    samples: int = 1,
    terminal: Callable[[Tensor], Tensor] | None = None,
    rtol: float = 1e-6,
    atol: float = 1e-6,
    seed: int | torch.Generator = 0,
    progress: bool = False,
    **condition: Any,
) -> Likelihood:
    """Log density of x under the model that the probability flow defines, from its prior at T.

    For K = 1 it is exact up to the solver's tolerance (and unbiased with Hutchinson's trace). For K > 1 it is a lower
    bound in expectation over the auxiliary starts: the mean bound with ``samples = 1``, the importance-weighted one,
    which tends to log p(x), with more. Noise of Hutchinson's trace enters the weights of the latter too; prefer the
    exact trace there.

    Args:
        diffusion: a process with a denoiser or a noise network.
        x: data (batch, *event), float32 or float64; the model is called in this dtype, the ODE is solved in float64.
        t_min: time at which the adaptive solver takes over, in (0, T); smaller is not always better, since the model
            must tell D from x at the noise level sigma(t_min).
        trace, probes, rtol, atol, seed, progress, condition: see :func:`transport`.
        samples: auxiliary starts per point.
        terminal: log density of z_T, maps (n, K, *event) to (n,); default the process's prior N(0, S).

    Raises:
        ValueError: for a bad argument, before any work.
        RuntimeError: see :func:`transport`.
    """
    require_white(diffusion, "log_likelihood")
    process = diffusion.process
    if not x.is_floating_point() or x.ndim < 2:
        raise ValueError(f"log_likelihood: x must be floating point (batch, *event), got {x.dtype} {tuple(x.shape)}.")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("log_likelihood: x must be finite.")
    if samples < 1:
        raise ValueError(f"log_likelihood: samples must be at least 1, got {samples}.")
    if samples > 1 and process.channels == 1:
        raise ValueError(
            f"log_likelihood: samples = {samples} is for auxiliaries, and {type(process).__name__} has none."
        )
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator(x.device).manual_seed(seed)
    z, log_q = _augment(diffusion, x, samples, generator)
    options = {"rtol": rtol, "atol": atol, "seed": generator, "progress": progress, **condition}
    joint = transport(
        diffusion, z.to(x.dtype), 0.0, process.horizon, t_min=t_min, trace=trace, probes=probes, **options
    )
    last = _gaussian_log_prob(joint.state, process.prior()) if terminal is None else terminal(joint.state).double()
    log_w = (last.unsqueeze(-1) + joint.divergence - log_q.unsqueeze(-1)).unflatten(0, (samples, x.shape[0]))
    per_start = log_w.mean(-1)
    value = per_start.logsumexp(0) - math.log(samples)
    error = None
    if samples > 1:  # of the log of a mean; the spread over starts includes the probes'
        error = (per_start - value).exp().std(0) / math.sqrt(samples)
    elif log_w.shape[-1] > 1:
        error = log_w[0].std(-1) / math.sqrt(log_w.shape[-1])
    return Likelihood(value, error, x[0].numel(), joint.calls)


def _augment(
    diffusion: Diffusion | NoiseDiffusion | GuidedNoise, x: Tensor, samples: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """States z_0 (samples * batch, K, *event) in float64 and log q(v_0) (samples * batch,)."""
    process = diffusion.process
    data = x.double().repeat(samples, *[1] * (x.ndim - 1)).unsqueeze(1)
    if process.channels == 1:
        return data, torch.zeros(data.shape[0], dtype=torch.float64, device=x.device)
    root = psd_sqrt(process.start()[1:, 1:]).detach()
    if bool((root.diagonal() <= 0).any()):
        raise ValueError(
            f"log_likelihood: the auxiliaries of {type(process).__name__} start without spread, so (x, v) has no "
            "density; give them a positive start covariance (aux_scale)."
        )
    noise = torch.empty(data.shape[0], process.channels - 1, *x.shape[1:], dtype=torch.float64, device=x.device)
    noise.normal_(generator=generator)
    auxiliary = mix(root, noise)
    return torch.cat([data, auxiliary], 1), _gaussian_log_prob(auxiliary, root)


def _gaussian_log_prob(z: Tensor, root: Tensor) -> Tensor:
    """log N(z; 0, (L L') (x) I), (n,), for z (n, J, *event) and L = ``root`` (J, J)."""
    root = root.detach().to(z)
    white = torch.linalg.solve_triangular(root, z.flatten(2).movedim(1, 0).flatten(1), upper=False)
    squares = white.square().unflatten(1, (z.shape[0], -1)).sum((0, 2))
    d = z[0, 0].numel()
    return -0.5 * squares - d * root.diagonal().log().sum() - 0.5 * z.shape[1] * d * math.log(2 * math.pi)


def bits_per_dim(log_likelihood: Tensor, dim: int, log_det: Tensor | float = 0.0, bins: int = 256) -> Tensor:
    r"""Bits per dimension of integer data that was dequantised, scaled to [0, 1) and transformed.

    .. math:: bpd = -\frac{\log p(y) + \log|\det dy/dx|}{d \log 2} + \log_2 bins

    Args:
        log_likelihood: of the transformed data y, in nats, (batch,).
        dim: coordinates, d.
        log_det: log Jacobian of the transform from [0, 1), (batch,); see :func:`undrift.pixels.dequantise`.
        bins: values that a coordinate could take.
    """
    if bins < 1 or dim < 1:
        raise ValueError(f"bits_per_dim: dim and bins must be at least 1, got {dim} and {bins}.")
    return -(log_likelihood + log_det) / (dim * math.log(2)) + math.log2(bins)

r"""The exact law of a plan on Gaussian data.

On a spectrum the denoiser is affine, so a step of any plan maps the joint Gaussian law of what it remembers to the
next one. Per eigenvalue, with :math:`y = (z_i, z_{i-1}, \hat x_{0,i-1}, \dots)`,

.. math:: y \leftarrow T_i y + c_i + N_i \xi, \qquad
    m \leftarrow T_i m + c_i, \qquad V \leftarrow T_i V T_i^\top + N_i N_i^\top .

Nothing is sampled and nothing is approximated. The recursion is differentiable in the plan, hence in its times and in
the process. Against data of variance p, samples of variance q along the same eigenvector are off by

.. math::
    KL(data \| samples) = \tfrac12 \sum_i \Bigl(\frac{p_i}{q_i} - 1 + \ln\frac{q_i}{p_i}
      + \frac{(\mu_i - m_i)^2}{q_i}\Bigr), \qquad
    W_2^2 = \sum_i (\sqrt{p_i} - \sqrt{q_i})^2 + (\mu_i - m_i)^2 .

References:
    Pierret & Galerne, Diffusion Models for Gaussian Distributions: Exact Solutions and Wasserstein Errors, 2025 (the
    same idea for VP and given schemes).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from undrift._linalg import as_f64
from undrift.design.score_error import ScoreError
from undrift.design.spectrum import Spectrum
from undrift.sample.plan import Plan

__all__ = ["Law", "examine", "inputs", "propagate", "reference", "strangeness", "trajectory"]

Start = Literal["prior", "exact"]
_State = tuple[int, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Law:
    """The law of a plan's state, eigenvalue by eigenvalue, and the exact one beside it.

    Attributes:
        spectrum: the data.
        time: of the state; 0 after a final call.
        mean, cov: of the K channels, (n, K) and (n, K, K).
        exact_mean, exact_cov: of z_t for that data, of the same shapes; at t = 0 those of the data and of
            the auxiliaries' start.
    """

    spectrum: Spectrum
    time: float
    mean: Tensor
    cov: Tensor
    exact_mean: Tensor
    exact_cov: Tensor

    @property
    def variance(self) -> Tensor:
        """Variances of the data channel, (n,)."""
        return self.cov[:, 0, 0]

    @property
    def kl_modes(self) -> Tensor:
        """KL(exact || samples) of the data channel, one coordinate of each eigenvalue, nats; (n,).

        Where either law is a point it is infinite, unless both are and at the same place.
        """
        p, q, gap = self.exact_cov[:, 0, 0], self.variance, self.exact_mean[:, 0] - self.mean[:, 0]
        point = (p == 0) | (q == 0)
        same = (p == 0) & (q == 0) & (gap == 0)
        p, q = torch.where(point, 1.0, p), torch.where(point, 1.0, q)
        ratio = p / q
        smooth = 0.5 * (ratio - 1 - ratio.log() + gap.square() / q)
        return torch.where(point, torch.where(same, 0.0, math.inf), smooth)

    @property
    def w2_modes(self) -> Tensor:
        """Squared W2 of the data channel, one coordinate of each eigenvalue, squared data units; (n,)."""
        p, q = self.exact_cov[:, 0, 0], self.variance
        # (p - q) / (sqrt p + sqrt q) keeps its digits, and its derivative, where p and q meet.
        width = (p - q) / (_root(p) + _root(q)).clamp(min=1e-150)
        return width.square() + (self.exact_mean[:, 0] - self.mean[:, 0]).square()

    @property
    def kl(self) -> Tensor:
        """KL(exact || samples) of the data channel, nats. Infinite where the samples miss a direction of the data."""
        return (self.spectrum._count * self.kl_modes).sum()

    @property
    def w2(self) -> Tensor:
        """W2 between the data channel's exact and sampled laws, data units."""
        return _root((self.spectrum._count * self.w2_modes).sum())

    def smoothed(self, sigma: float) -> Law:
        """Both laws with noise of this level added: what differs at a finer resolution no longer counts.

        A final prediction leaves no noise, so in directions in which the data hardly varies, such as pixels that are
        always black, ratios of variances, and with them KL, say nothing; smoothed by half a grey level they do.
        """
        extra = sigma**2 * torch.eye(self.cov.shape[-1], dtype=torch.float64)
        return dataclasses.replace(self, cov=self.cov + extra, exact_cov=self.exact_cov + extra)

    @property
    def finite(self) -> bool:
        """Whether the walk stayed finite."""
        return bool(self.cov.isfinite().all() & self.mean.isfinite().all())


def _root(square: Tensor) -> Tensor:
    """Square root, with derivative 0 instead of infinity at 0."""
    positive = square > 0
    return torch.where(positive, square.clamp(min=1e-300).sqrt(), 0.0 * square)


def reference(plan: Plan, spectrum: Spectrum, time: Tensor | float) -> tuple[Tensor, Tensor]:
    """Mean (n, K) and covariance (n, K, K) of z_t for data with that spectrum.

    At t = 0 those of the data and the auxiliaries' start, also where the clock begins with noise already gathered.
    """
    if float(as_f64(time).detach()) == 0:
        noise = plan.process.start()
        mean = torch.eye(len(noise), dtype=torch.float64)[0]
    else:
        phi, root = plan.process.marginal(time)
        mean, noise = phi[:, 0], root @ root.mT
    return (
        spectrum._mean.unsqueeze(-1) * mean,
        spectrum.variance[:, None, None] * mean.unsqueeze(-1) * mean + noise,
    )


def propagate(plan: Plan, spectrum: Spectrum, error: ScoreError | None = None, start: Start = "prior") -> Law:
    """The law of a plan's last state.

    Args:
        plan: of any sampler on any process and grid.
        spectrum: of the data.
        error: of the denoiser; None for the exact one.
        start: "prior", as a sampler does, or "exact": from the law of z at the first time.
    """
    return trajectory(plan, spectrum, error, start, last=True)[-1]


def trajectory(
    plan: Plan,
    spectrum: Spectrum,
    error: ScoreError | None = None,
    start: Start = "prior",
    last: bool = False,
) -> list[Law]:
    """The laws of the states between steps, from the first call's on; see :func:`propagate`.

    Where a method joins the halves of its steps, as SSCS does, its states in between are half a step past their time.

    Args:
        last: only the last one.
    """
    laws = []
    for i, mean, cov in _walk(plan, spectrum, error, start):
        time = plan.times[0] if i == 0 else plan.after[i - 1]
        if (not last or i == plan.calls) and not math.isnan(float(time.detach())):
            exact = reference(plan, spectrum, time)
            laws.append(Law(spectrum, float(time.detach()), mean, cov, *exact))
    return laws


def inputs(
    plan: Plan, spectrum: Spectrum, error: ScoreError | None = None, start: Start = "prior"
) -> tuple[Tensor, Tensor, Tensor]:
    """The law of what the denoiser is shown at each call: levels (N,), and mean and variance of x~, each (N, n).

    A denoiser is trained on x~ of mean mu and variance lambda + sigma^2: see :func:`strangeness`.
    """
    return _inputs(plan, list(_walk(plan, spectrum, error, start)))


def _inputs(plan: Plan, walk: list[_State]) -> tuple[Tensor, Tensor, Tensor]:
    snr, row = plan.process._weights(plan.times)
    row = row.unsqueeze(1)  # (N, 1, K)
    means, covs = torch.stack([m for _, m, _ in walk[:-1]]), torch.stack([c for *_, c in walk[:-1]])
    spread = (row.unsqueeze(-2) @ covs @ row.unsqueeze(-1))[..., 0, 0]
    return snr.rsqrt(), (means * row).sum(-1), spread


def strangeness(plan: Plan, spectrum: Spectrum, error: ScoreError | None = None) -> Tensor:
    """How far the denoiser's inputs are from those it was trained on, at each call: nats per coordinate, (N,).

    The KL divergence of the training inputs from the plan's. A closed form answers everywhere; what a network says
    about inputs that it never saw, no theory tells.
    """
    return _strangeness(spectrum, *inputs(plan, spectrum, error))


def _strangeness(spectrum: Spectrum, sigma: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    ratio = (spectrum.variance + sigma.square().unsqueeze(-1)) / variance
    kl = 0.5 * (ratio - 1 - ratio.log() + (mean - spectrum._mean).square() / variance)
    return (spectrum._count * kl).sum(-1) / spectrum.dim


def examine(plan: Plan, spectrum: Spectrum, error: ScoreError | None = None) -> tuple[Law, Tensor]:
    """The law of the last state and the strangeness of all calls, (N,), at the cost of one of them."""
    walk = list(_walk(plan, spectrum, error, "prior"))
    _, mean, cov = walk[-1]
    time = plan.after[-1]
    law = Law(spectrum, float(time.detach()), mean, cov, *reference(plan, spectrum, time))
    return law, _strangeness(spectrum, *_inputs(plan, walk))


def _walk(plan: Plan, spectrum: Spectrum, error: ScoreError | None, start: Start) -> Iterator[_State]:
    """Mean (n, K) and covariance (n, K, K) of the state before call i = 0 ... N - 1, and after the last."""
    if start not in ("prior", "exact"):
        raise ValueError(f"propagate: start must be 'prior' or 'exact', got {start!r}.")
    k, states, depth = plan.process.channels, plan.A.shape[1], plan.B.shape[1]
    n, size = len(spectrum.variance), k * states + depth - 1
    step, shift, noise = _steps(plan, spectrum, error)

    lead, extra = plan.lead
    if start == "prior":
        mean = torch.zeros(n, k, dtype=torch.float64)
        cov = (plan.prior @ plan.prior.mT).expand(n, k, k)
    else:
        exact, spread = reference(plan, spectrum, plan.start)
        mean = exact @ lead.mT
        cov = lead @ spread @ lead.mT + extra @ extra.mT
    mean = torch.nn.functional.pad(mean, (0, size - k)).unsqueeze(-1)
    cov = torch.nn.functional.pad(cov, (0, size - k, 0, size - k))
    for i in range(plan.calls):
        yield i, mean[:, :k, 0], cov[:, :k, :k]
        mean = step[i] @ mean + shift[i]
        cov = step[i] @ cov @ step[i].mT + noise[i]
    yield plan.calls, mean[:, :k, 0], cov[:, :k, :k]


def _steps(plan: Plan, spectrum: Spectrum, error: ScoreError | None) -> tuple[Tensor, Tensor, Tensor]:
    """T (N, n, s, s), c (N, n, s, 1) and noise covariances (N, n, s, s) of all rows on all eigenvalues."""
    process, k = plan.process, plan.process.channels
    (calls, states), depth, n = plan.A.shape[:2], plan.B.shape[1], len(spectrum.variance)
    snr, row = process._weights(plan.times)
    sigma = snr.rsqrt()
    # x0^ = gain x~ + offset + rough xi on each eigenvalue.
    keep = spectrum.variance / (spectrum.variance + sigma.square().unsqueeze(-1))
    gain, offset, rough = keep, (1 - keep) * spectrum._mean, None
    if error is not None:
        relative, bias, variance = error.terms(spectrum, sigma)
        gain, offset = gain + relative * (gain - 1), offset * (1 + relative) + bias
        rough = variance if bool((variance != 0).any()) else None
    read = gain.unsqueeze(-1) * row.unsqueeze(1)  # (N, n, K)

    b = plan.B[..., 0].unsqueeze(1)  # (N, 1, J, K): a denoiser uses the first column
    a = plan.A.movedim(1, 2).flatten(2).unsqueeze(1).expand(calls, n, k, states * k)
    a = torch.cat([a[..., :k] + b[:, :, 0].unsqueeze(-1) * read.unsqueeze(-2), a[..., k:]], -1)
    past = b[:, :, 1:].mT.expand(calls, n, k, depth - 1)
    rows = [torch.cat([a, past], -1)]
    size = k * states + depth - 1
    eye = torch.eye(size, dtype=torch.float64).expand(calls, n, size, size)
    if states > 1:
        rows.append(eye[..., : k * (states - 1), :])
    if depth > 1:
        rows.append(torch.nn.functional.pad(read, (0, size - k)).unsqueeze(-2))
        rows.append(eye[..., k * states : size - 1, :])
    # What a fresh prediction adds to each entry of y: to z through B, to the memory of predictions itself.
    lands = torch.cat([b[:, :, 0], torch.zeros(calls, 1, k * (states - 1), dtype=torch.float64)], -1)
    if depth > 1:
        lands = torch.cat([lands, torch.ones(calls, 1, 1, dtype=torch.float64)], -1)
        lands = torch.nn.functional.pad(lands, (0, depth - 2))
    noise = torch.nn.functional.pad(plan.L @ plan.L.mT, (0, size - k, 0, size - k)).unsqueeze(1)
    if rough is not None:
        noise = noise + rough[..., None, None] * lands.unsqueeze(-1) * lands.unsqueeze(-2)
    return torch.cat(rows, -2), (offset.unsqueeze(-1) * lands).unsqueeze(-1), noise.expand(calls, n, size, size)

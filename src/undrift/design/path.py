r"""Path KL: how far the whole walk of a sampler is from the reversed diffusion, step by step and exactly.

Two samplers hold one thing over a step, and both have the exact conditional mean: held prediction (ancestral sampling
with the posterior's variance) and held score (the forward transition's). For any linear process and any data with a
second moment, with mmse(sigma) of the data and a denoiser whose error is :math:`e_k^2 = E|\hat D - D|^2(\sigma_k)`,

.. math::
    KL_{path} = E_I + \sum_k E_{D,k} + \sum_k E_{S,k}, \qquad
    E_{D,k} = \tfrac12 \Bigl[d\,(h_k - n_k) + a_k\,mmse_k - \int_{snr_k}^{snr_{k+1}} mmse\,d\,snr\Bigr], \qquad
    E_{S,k} = \tfrac12 a_k e_k^2,

where step k goes from time :math:`t_k` down to :math:`t_{k+1}` and, with N the covariance of the forward transition
over the step,

    held prediction   a = snr_{k+1} - snr_k,  h = n = 0
    held score        a = m'S^-1 N S^-1 m,  n = tr(S^-1 N),  h = [ln det S - 2 ln det Phi] from t_{k+1} to t_k

with m, S at :math:`t_k`. On the variance-exploding process with :math:`v = \sigma^2` and the Fisher information
:math:`J = d/v - mmse/v^2` the second line says :math:`E_{D,k} = \frac12 \int J\,dv - \frac12 J(v_k)(v_k - v_{k+1})`.

Why. Girsanov's theorem gives the path KL as half the integral of the squared error of what is held. Along the reverse
process :math:`E[x_0|z_t]` is a martingale, and so is :math:`\Phi(0,t)^\top \nabla\log p_t(z_t)`: the mean square of
an increment is a difference of mean squares, and its product with an error made before it vanishes. The first gives
mmse. For the second, :math:`y = \Phi^{-1} z` has no drift and gathers noise at the rate
:math:`\Phi^{-1} GG^\top \Phi^{-\top}`, and :math:`E[s s^\top] = S^{-1} d - S^{-1} m\,mmse\,m^\top S^{-1}` summed over
coordinates, with :math:`\int tr(GG^\top S^{-1}) dt = h` and :math:`m^\top S^{-1} GG^\top S^{-1} m\,dt = -d\,snr`. Both
walks and the reversed diffusion are the same bridges between two times of the grid, so the KL between the chains on
the grid is that between the paths. Derived and checked here; the one-channel case of held prediction is the evidence
lower bound's sum of Kingma et al. 2021.

The start is exact too. With the prior N(0, P) and I the information that z_T has about x0,

.. math::
    E_I = KL(p(z_T) \| N(0, P)) = E_{x_0} KL(p(z_T|x_0) \| N(0, P)) - I, \qquad
    I = \tfrac12 \int_0^{snr_T} mmse\,d\,snr .

References:
    Kingma et al., Variational Diffusion Models, 2021, section 4.
    Guo, Shamai & Verdú, Mutual Information and Minimum Mean-Square Error in Gaussian Channels, 2005 (I).
    Wang, He & Tao, Evaluating the Design Space of Diffusion-Based Generative Models, 2024 (bounds of this shape).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from undrift._linalg import sqrt_sum
from undrift.design.curves import DataModel
from undrift.design.score_error import ScoreError
from undrift.design.spectrum import Spectrum
from undrift.process.linear import LinearProcess
from undrift.sample.exponential import Ancestral, Exponential
from undrift.sample.plan import Plan, Sampler

__all__ = ["Held", "PathSteps", "chain_kl", "held_by", "is_chain", "path_steps", "start_kl"]

Held = Literal["prediction", "score"]


def held_by(sampler: Sampler) -> Held | None:
    """What a sampler holds over a step of the reverse SDE and solves the rest exactly, or None if it does not."""
    if isinstance(sampler, Ancestral):
        return "prediction" if sampler.variance == "posterior" else "score"
    if isinstance(sampler, Exponential) and sampler.order == 1 and sampler.stochasticity == 1:
        return "prediction"
    return None


@dataclass(frozen=True, eq=False)
class PathSteps:
    """What the process and the grid contribute to the path KL; all float64, differentiable in both.

    Attributes:
        held: what is held over a step.
        times: the grid, (M + 1,), decreasing.
        sigma: its noise levels, (M + 1,).
        weight: a, the weight of the denoiser's squared error at the start of each step, (M,).
        gathered: h, nats per coordinate, (M,); its sum depends on the ends of the grid alone.
        spent: n, nats per coordinate, (M,).
    """

    held: Held
    times: Tensor
    sigma: Tensor
    weight: Tensor
    gathered: Tensor
    spent: Tensor

    def discretisation(self, data: DataModel) -> Tensor:
        """E_D of each step, (M,), nats."""
        known = self.weight * data.mmse(self.sigma[:-1]) - data.information(self.sigma[1:], self.sigma[:-1])
        return 0.5 * (data.dim * (self.gathered - self.spent) + known)

    def score(self, excess: Tensor) -> Tensor:
        """E_S of each step, (M,), nats, for E|D^ - D|^2 at the steps' starts, (M,)."""
        return 0.5 * self.weight * excess


def path_steps(process: LinearProcess, times: Tensor, held: Held) -> PathSteps:
    """The coefficients of the path KL on a grid.

    Args:
        process: any linear process.
        times: at least two, strictly decreasing in (0, T].
        held: "prediction" or "score".

    Raises:
        ValueError: for times that are no grid.
    """
    if held not in ("prediction", "score"):
        raise ValueError(f"path_steps: held must be 'prediction' or 'score', got {held!r}.")
    if times.ndim != 1 or len(times) < 2 or bool((times.diff() >= 0).any()) or not bool(times[-1] > 0):
        raise ValueError(
            f"path_steps: times must be two or more, strictly decreasing and positive, got {times.tolist()}."
        )
    snr = process.snr(times)
    if held == "prediction":
        zero = torch.zeros_like(snr[1:])
        return PathSteps(held, times, snr.rsqrt(), snr.diff(), zero, zero)
    step, noise = process.transition(times[1:], times[:-1])
    phi, root = process.marginal(times)
    white = torch.linalg.solve_triangular(root[:-1], torch.cat([noise, phi[:-1, :, :1]], -1), upper=False)
    spread, signal = white[..., :-1], white[..., -1:]
    log_det = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return PathSteps(
        held,
        times,
        snr.rsqrt(),
        weight=(signal.mT @ spread).square().sum((-2, -1)),
        gathered=-log_det.diff() - 2 * torch.linalg.slogdet(step)[1],
        spent=spread.square().sum((-2, -1)),
    )


def start_kl(process: LinearProcess, time: Tensor | float, data: DataModel, known: bool = True) -> Tensor:
    """E_I: KL from the law of z at a time to the process's prior there, nats.

    Args:
        process: any linear process.
        time: where sampling starts.
        data: its mean square, and its information above that noise level.
        known: False leaves out what z knows about x0: the mean KL given x0, a bound by convexity.
    """
    prior, (phi, root) = process.prior(time), process.marginal(time)
    k = process.channels
    white = torch.linalg.solve_triangular(prior, torch.cat([root, phi[:, :1]], -1), upper=False)
    spread, signal = white[:, :k].square().sum(), white[:, k].square().sum()
    log_det = 2 * (prior.diagonal().log() - root.diagonal().log()).sum()
    given = 0.5 * (data.dim * (spread - k + log_det) + data.second_moment * signal)
    if not known:
        return given
    sigma = process.sigma(time)
    return (given - 0.5 * data.information(sigma, torch.full_like(sigma, torch.inf))).clamp(min=0)


def is_chain(plan: Plan) -> bool:
    """Whether a plan makes one call a step, at the step's start, and remembers nothing."""
    eye = torch.eye(plan.process.channels, dtype=torch.float64)
    if plan.A.shape[1] > 1 or plan.B.shape[1] > 1 or bool(plan.after.isnan().any()):
        return False
    starts = torch.cat([plan.start.reshape(1), plan.after[:-1]])
    return torch.equal(plan.times, starts) and torch.equal(plan.lead[0], eye)


def chain_kl(plan: Plan, spectrum: Spectrum, error: ScoreError | None = None) -> Tensor:
    r"""KL from the reversed diffusion to a sampler, both as Markov chains on the sampler's times, on Gaussian data.

    For any stochastic plan of one step and one call, nothing about the sampler assumed. Where the sampler's own path
    between two times is the diffusion's bridge this is its path KL.

    An error that is fresh noise at each call (:class:`Noise`) counts as noise of the chain, so it widens a step. With
    the noise known the KL is larger by convexity: it is what :class:`PathSteps` says for that squared error, and what a
    fixed error of that mean square costs.

    Args:
        plan: of the sampler.
        spectrum: of the data.
        error: of the denoiser.

    Returns:
        KL of the start, then of each step given its start, averaged over the diffusion, (N + 1,), nats. Infinite for
        a step whose noise does not reach every direction, as the last one of most plans.

    Raises:
        ValueError: for plans of several stages, or that remember, or whose calls lie between the times.
    """
    process, k = plan.process, plan.process.channels
    if not is_chain(plan):
        raise ValueError(
            f"chain_kl: {plan!r} is no chain on its times; it needs one call a step, at the step's start, and no "
            "memory."
        )
    ends = torch.cat([plan.start.reshape(1), plan.after])
    n, lam, mean = len(spectrum.variance), spectrum.variance, spectrum._mean
    phi, root = process.marginal(ends)
    signal = phi[..., :1]  # (N + 1, K, 1)

    def whole(i: slice) -> Tensor:
        """Roots of the diffusion's covariances on all eigenvalues, (..., n, K, K)."""
        spread = lam.sqrt()[:, None, None] * signal[i].unsqueeze(1)
        return sqrt_sum(spread, root[i].unsqueeze(1).expand(-1, n, k, k))

    first = _gaussian_kl(whole(slice(0, 1)), plan.prior.expand(1, n, k, k), (mean[:, None, None] * signal[0])[None])
    snr, row = process._weights(plan.times)
    sigma = snr.rsqrt()
    gain = lam / (lam + sigma.square().unsqueeze(-1))
    offset = (1 - gain) * mean
    column = plan.B[:, 0, :, :1].unsqueeze(1)  # (N, 1, K, 1)
    roots = [plan.L.unsqueeze(1).expand(-1, n, k, k)]
    if error is not None:
        relative, bias, rough = error.terms(spectrum, sigma)
        gain, offset = gain + relative * (gain - 1), offset * (1 + relative) + bias
        roots.append(rough.sqrt()[..., None, None] * column)
    noise = sqrt_sum(*roots)
    reached = noise.diagonal(dim1=-2, dim2=-1) > 1e-13 * torch.linalg.vector_norm(noise, dim=-1)
    steps = torch.full((plan.calls, n), torch.inf, dtype=torch.float64)
    use = reached.all(-1).all(-1) & (plan.after > 0)
    if bool(use.any()):
        start, end = ends[:-1][use], ends[1:][use]
        there, way = process.transition(end, start)
        after = sqrt_sum(
            lam.sqrt()[:, None, None] * signal[1:][use].unsqueeze(1),
            root[1:][use].unsqueeze(1).expand(-1, n, k, k),
        )
        way = way.unsqueeze(1).expand_as(after)
        top = torch.cat([there.unsqueeze(1) @ after, way], -1)
        joint = sqrt_sum(torch.cat([top, torch.cat([after, torch.zeros_like(way)], -1)], -2))
        before, across, left = joint[..., :k, :k], joint[..., k:, :k], joint[..., k:, k:]
        back = torch.linalg.solve_triangular(before, across, upper=False, left=False)
        step = plan.A[use, 0].unsqueeze(1) + column[use] * (gain[use].unsqueeze(-1) * row[use].unsqueeze(1)).unsqueeze(
            -2
        )
        off = step - back
        level = mean[:, None, None]
        centre = step @ (level * signal[:-1][use].unsqueeze(1)) + column[use] * offset[use][..., None, None]
        gap = centre - level * signal[1:][use].unsqueeze(1)
        steps[use] = _gaussian_kl(left, noise[use], torch.cat([off @ before, gap], -1))
    return torch.cat([first, steps]) @ spectrum._count


def _gaussian_kl(exact: Tensor, ours: Tensor, gap: Tensor) -> Tensor:
    """KL(N(0, exact exact') || N(gap, ours ours')), gaps in the columns of ``gap`` added in square; (...)."""
    k = exact.shape[-1]
    white = torch.linalg.solve_triangular(ours, torch.cat([exact, gap], -1), upper=False).square().sum((-2, -1))
    log_det = (ours.diagonal(dim1=-2, dim2=-1).log() - exact.diagonal(dim1=-2, dim2=-1).log()).sum(-1)
    return 0.5 * (white - k) + log_det

r"""Which noise levels to train at, from measurements, and how training's weight compares with sampling's.

Write :math:`e(\sigma) = E\|x_0 - D\|^2` per coordinate and :math:`g_\sigma` for the gradient of one sample's error. An
objective is :math:`\int \mathrm{total}(\sigma)\, e(\sigma)\, d\ln\sigma` whatever levels it is estimated at (see
:class:`~undrift.train.Denoising`). Batches are stratified: one sample falls into each slice of equal probability, and
the gradient of a batch of n has the variance

.. math:: \frac1n \int \frac{\mathrm{total}^2}{p}\, \mathrm{tr}\,\mathrm{Cov}\, g_\sigma\; d\ln\sigma + O(n^{-3})

which is least for :math:`p \propto \mathrm{total}\, \sqrt{\mathrm{tr}\,\mathrm{Cov}\, g_\sigma}` (Neyman's allocation;
for independent draws the second moment would stand in place of the covariance).

On the side of sampling, a walk that holds the denoiser pays :math:`\tfrac12 (\mathrm{snr}_{k+1} - \mathrm{snr}_k)` nats
for each unit of squared error at :math:`\sigma_k`, in the limit of many steps :math:`\sigma^{-2}\, d\ln\sigma`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from undrift._linalg import as_f64
from undrift.diffusion import Diffusion
from undrift.train.levels import NoiseLevels, Tabulated
from undrift.train.objectives import Denoising

__all__ = [
    "LevelProfile",
    "gradient_variance",
    "max_ratio",
    "measure_levels",
    "noise_levels",
    "residual_balance",
    "sampling_weight",
    "training_weight",
]


@dataclass(frozen=True, eq=False)
class LevelProfile:
    """A denoiser's error and its gradient, level by level; all (L,) float64.

    They are of the plain error e, so that one measurement serves every objective.

    Attributes:
        sigma: levels, increasing.
        loss, loss_error: e, and its standard error.
        variance, variance_error: trace of the covariance of one sample's gradient, and its standard error.
        signal, signal_error: squared norm of the expected gradient; an unbiased estimate, which may be negative where
            that is small.
        sigma_data: the denoiser's, if it has one; the EDM weight needs it.
    """

    sigma: Tensor
    loss: Tensor
    loss_error: Tensor
    variance: Tensor
    variance_error: Tensor
    signal: Tensor
    signal_error: Tensor
    sigma_data: float | None = None

    @property
    def noise_scale(self) -> Tensor:
        """Samples at which noise and signal of a batch's gradient are equal; infinite where no signal was found.

        McCandlish et al., An Empirical Model of Large-Batch Training, 2018.
        """
        return torch.where(self.signal > 0, self.variance / self.signal.clamp(min=1e-300), torch.inf)

    def at(self, values: Tensor, sigma: Tensor) -> Tensor:
        """Positive values at the levels, interpolated to others linearly in their logarithms; held beyond the ends."""
        place, log_values, wanted = self.sigma.log(), values.log(), sigma.log()
        right = torch.searchsorted(place, wanted).clamp(1, len(place) - 1)
        share = ((wanted - place[right - 1]) / (place[right] - place[right - 1])).clamp(0, 1)
        return torch.lerp(log_values[right - 1], log_values[right], share).exp()


def measure_levels(
    model: nn.Module | Diffusion,
    x: Tensor,
    levels: Tensor,
    generator: torch.Generator,
    *,
    pairs: int = 16,
    batch: int = 32,
    **condition: Tensor,
) -> LevelProfile:
    r"""Error and gradient of a denoiser at given levels.

    By pairs of independent batches of b samples with mean gradients g, g': :math:`\frac b2 \|g - g'\|^2` is an unbiased
    estimate of the trace of the covariance of one sample's gradient, and :math:`g \cdot g'` of the squared norm of the
    expected one; standard errors are those over pairs. It takes 2 ``pairs`` backward passes a level, and the memory of
    two gradients.

    Args:
        model: a denoiser with parameters, or the diffusion that has it; measured in the mode (training or evaluation)
            that it is in, and left as it was.
        x: data (n, *event); batches are drawn from it with replacement.
        levels: noise levels (L,), positive, increasing, at least two.
        generator: source of all randomness, on x's device.
        pairs: at least two.
        batch: samples b of a batch.
        condition: what the model is conditioned on, tensors with one row for each of x.

    Raises:
        ValueError: for levels or numbers that cannot be used, or a model without parameters to train.
    """
    denoiser: Any = model.denoiser if isinstance(model, Diffusion) else model
    sigma = as_f64(levels)
    if sigma.ndim != 1 or len(sigma) < 2 or bool((sigma.diff() <= 0).any()) or not float(sigma[0]) > 0:
        raise ValueError(f"measure_levels: levels must be at least two, positive and increasing, got {levels}.")
    if pairs < 2 or batch < 1:
        raise ValueError(f"measure_levels: needs pairs >= 2 and batch >= 1, got {pairs} and {batch}.")
    parameters = [p for p in denoiser.parameters() if p.requires_grad] if isinstance(denoiser, nn.Module) else []
    if not parameters:
        raise ValueError("measure_levels: the model has no parameters to train, so that no gradient can be measured.")

    def gradient(level: Tensor) -> tuple[Tensor, list[Tensor]]:
        index = torch.randint(len(x), (batch,), generator=generator, device=x.device)
        clean = x[index]
        noise = torch.empty_like(clean).normal_(generator=generator)
        error = denoiser(clean + level * noise, level.expand(batch), **{k: v[index] for k, v in condition.items()})
        each = (error - clean).reshape(batch, -1).square().mean(1)
        parts = torch.autograd.grad(each.mean(), parameters, allow_unused=True, materialize_grads=True)
        return each.detach(), [p.double() for p in parts]

    rows = []
    for level in sigma.to(x):
        losses, spread, common = [], [], []
        with torch.enable_grad():
            for _ in range(pairs):
                (first, g), (second, h) = gradient(level), gradient(level)
                losses += [first, second]
                spread.append(sum((0.5 * batch) * (a - b).square().sum() for a, b in zip(g, h, strict=True)))
                common.append(sum((a * b).sum() for a, b in zip(g, h, strict=True)))
        for values in (torch.cat(losses), torch.stack(spread), torch.stack(common)):  # type: ignore[arg-type]
            values = values.double()
            rows.append(torch.stack([values.mean(), values.std() / len(values) ** 0.5]))
    loss, loss_error, variance, variance_error, signal, signal_error = torch.stack(rows).reshape(len(sigma), 6).mT.cpu()
    return LevelProfile(
        sigma, loss, loss_error, variance, variance_error, signal, signal_error, getattr(denoiser, "sigma_data", None)
    )


def _points(low: float, high: float, n: int) -> Tensor:
    points = torch.linspace(0, 1, n, dtype=torch.float64)
    return low * (high / low) ** points


def noise_levels(profile: LevelProfile, objective: Denoising, *, share: float = 0.1, knots: int = 65) -> Tabulated:
    """The density of levels at which an objective's gradient has the least variance, by a measured profile.

    Use it as ``objective.visiting(noise_levels(profile, objective))``: the objective stays what it was, and importance
    weights make up for the levels. The variance is that of the plain gradient; an optimiser that scales coordinates, as
    Adam does, sees another, for which this one is a guide.

    Args:
        profile: of :func:`measure_levels`, over the whole range of the objective's levels.
        objective: what is minimised.
        share: of uniform ln sigma mixed in: bounds the weights, and the damage where the profile is off.
        knots: of the table.
    """
    if not 0 < share <= 1:
        raise ValueError(f"noise_levels: share must lie in (0, 1], got {share}.")
    sigma = _points(float(profile.sigma[0]), float(profile.sigma[-1]), knots)
    best = objective.total(sigma, profile.sigma_data) * profile.at(profile.variance, sigma).sqrt()
    place = sigma.log()
    best = best / torch.trapezoid(best, place)
    weight = (1 - share) * best + share / (place[-1] - place[0])
    ends = [float(profile.sigma[0]), *sigma[1:-1].tolist(), float(profile.sigma[-1])]
    return Tabulated(ends, weight.tolist())


def gradient_variance(profile: LevelProfile, objective: Denoising, noise: NoiseLevels | None = None) -> float:
    """Predicted variance of the gradient of a stratified batch, summed over parameters, times the batch's size.

    Args:
        profile: of :func:`measure_levels`; levels beyond its range are not counted.
        objective: what is minimised.
        noise: levels to visit in place of the objective's own.
    """
    sigma = _points(float(profile.sigma[0]), float(profile.sigma[-1]), 4001)
    p = (noise or objective.noise).density(sigma)
    total = objective.total(sigma, profile.sigma_data)
    # Levels that count for nothing need no visits; those that count and have none are never estimated.
    term = torch.where(total > 0, total.square() / p * profile.at(profile.variance, sigma), 0.0)
    return float(torch.trapezoid(term, sigma.log()))


def residual_balance(profile: LevelProfile, objective: Denoising, *, knots: int = 65) -> Tabulated:
    r"""The density that makes every level add the same to an objective's loss: total weighting :math:`1/e(\sigma)`.

    For an objective of your own choice, not the same one at other levels: use it as ``target`` (or ``noise``) of an
    "edm" or "uniform" :class:`~undrift.train.Denoising`. The error includes what no network can predict, so this is
    where a loss is, not where it can be reduced.
    """
    if objective.weighting == "likelihood":
        raise ValueError("residual_balance: the likelihood fixes the weights of all levels; use another weighting.")
    sigma = _points(float(profile.sigma[0]), float(profile.sigma[-1]), knots)
    plain = replace(objective, target=None).weight(sigma, profile.sigma_data)
    weight = 1 / (plain * profile.at(profile.loss, sigma))
    ends = [float(profile.sigma[0]), *sigma[1:-1].tolist(), float(profile.sigma[-1])]
    return Tabulated(ends, (weight / weight.max()).tolist())


def sampling_weight(sigma: Tensor) -> Tensor:
    """Nats of path KL for a unit of squared error at each level but the last: half the step's gain in snr; (N,).

    Args:
        sigma: levels of a walk that holds the denoiser over each step, decreasing, (N + 1,).
    """
    levels = as_f64(sigma)
    if levels.ndim != 1 or len(levels) < 2 or bool((levels.diff() >= 0).any()) or not float(levels[-1]) > 0:
        raise ValueError("sampling_weight: sigma must be at least two positive, strictly decreasing levels.")
    return 0.5 * levels.square().reciprocal().diff()


def training_weight(sigma: Tensor, objective: Denoising, sigma_data: float | None = None) -> Tensor:
    """What an objective puts on the error between consecutive levels: its total weighting, integrated; (N,)."""
    levels = as_f64(sigma).log()
    inner = torch.linspace(0, 1, 129, dtype=torch.float64)
    points = levels[:-1, None] + levels.diff().unsqueeze(-1) * inner
    return -torch.trapezoid(objective.total(points.exp(), sigma_data), points)


def max_ratio(sigma: Tensor, objective: Denoising, sigma_data: float | None = None) -> float:
    """How badly an objective's weight can miss the weight that a walk puts on the same errors; at least 1.

    The largest ratio of :func:`sampling_weight` to :func:`training_weight` over steps, in units of the ratio of their
    sums. For an excess error that is constant over each step, the path KL it causes is at most so many times what it
    would be if training weighed levels as sampling does, at the same excess loss. Infinite if training never
    goes where a step does.
    """
    sampling, training = sampling_weight(sigma), training_weight(sigma, objective, sigma_data)
    if not bool((training > 0).all()):
        return math.inf
    return float((sampling / training).max() * training.sum() / sampling.sum())

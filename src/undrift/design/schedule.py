r"""Noise levels from a loss curve, or from a density: optimal for the KL divergence between paths.

With :math:`v = \sigma^2` and the loss curve :math:`L(\sigma) = E\|x_0 - \hat D\|^2` of a denoiser, summed over its d
coordinates, the path KL of a walk :math:`\sigma_0 > \dots > \sigma_N` that starts from the right law is

.. math::
    KL = \tfrac12 \sum_k c(\sigma_k, \sigma_{k+1}) - \tfrac12 \int \mathrm{mmse}\; d\,\mathrm{snr}

where a step that holds the denoiser (ancestral sampling of any linear process), or the score (the reverse SDE of a
process with one channel, in the frame in which it explodes), costs

.. math::
    c_{denoiser} = L(\sigma) \Bigl(\frac1{v'} - \frac1v\Bigr), \qquad
    c_{score} = \frac{L(\sigma)}{v} \Bigl(1 - \frac{v'}v\Bigr) + d \Bigl(\ln\frac v{v'} - 1 + \frac{v'}v\Bigr).

Both follow from the martingales :math:`E[x_0 | z_t]` and score: discretisation and the denoiser's error add up, and
L is all that need be known of either. The integral does not depend on the levels. As costs of single steps add up,
dynamic programming finds the best levels, for all numbers of steps at once. For many steps and an exact denoiser, the
levels have density :math:`\sqrt f` in v and :math:`KL \to \frac1{4N} (\int \sqrt f\, dv)^2`, with
:math:`f = \mathrm{mmse}'(v) / v^2` and :math:`f = -\frac{d}{dv}(d/v - \mathrm{mmse}/v^2)`.

The path KL bounds the KL of the samples, and is the ELBO's gap; it is not their W2, which other levels serve better:
see :mod:`undrift.design.optimise`.

References:
    Watson, Ho, Norouzi & Chan, Learning to Efficiently Sample from Diffusion Probabilistic Models, 2021, arXiv
    2106.03802 (dynamic programming on the terms of the ELBO, for every budget, over discrete times).
    Wang, He & Tao, Evaluating the Design Space of Diffusion-Based Generative Models, 2024, arXiv 2406.12839.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from undrift._linalg import as_f64
from undrift.design.spectrum import Spectrum
from undrift.sample.grid import Given, Interpolated, log_linear

__all__ = ["Form", "Schedule", "every_budget", "from_density", "from_loss_curve", "path_kl", "step_density"]

Form = Literal["denoiser", "score"]
Curve = Callable[[Tensor], Tensor]
"""A function of noise levels (N,), such as ``Spectrum.mmse``."""

_WINDOW = 8  # candidates on either side of a level when it is refined


@dataclass(frozen=True, eq=False)
class Schedule:
    """Noise levels, and what they are good for.

    Attributes:
        sigma: decreasing, (N + 1,), float64: N steps.
        value: of the objective; NaN if it was not evaluated.
        objective: what the levels minimise.
    """

    sigma: Tensor
    value: float
    objective: str

    @property
    def steps(self) -> int:
        """Steps between the levels, N; a sampler with a final call at the last level makes one more."""
        return len(self.sigma) - 1

    def grid(self) -> Given:
        """The levels as a sampler's grid: N steps with ``final="none"``, N + 1 with a final call."""
        return Given(self.sigma.tolist(), sigma=True)

    def interpolated(self) -> Interpolated:
        """The levels as a grid that serves any number of steps; see :class:`~undrift.sample.Interpolated`."""
        return Interpolated(self.sigma.tolist())

    def resampled(self, n: int) -> Schedule:
        """n steps along the same curve, log sigma linear between neighbours."""
        if n < 1:
            raise ValueError(f"Schedule.resampled: n must be at least 1, got {n}.")
        if n == self.steps:
            return self
        return Schedule(log_linear(self.sigma, n + 1), math.nan, f"{self.objective}; resampled from {self.steps} steps")

    def to_dict(self) -> dict[str, Any]:
        """Plain data; a value that was not evaluated is None."""
        value = None if math.isnan(self.value) else self.value
        return {"sigma": self.sigma.tolist(), "value": value, "objective": self.objective}


def _cost(form: Form, dim: float | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Half the cost c of a step from v to v' with loss L, or infinity where v' is not below v."""
    if form not in ("denoiser", "score"):
        raise ValueError(f"schedule: form must be 'denoiser' or 'score', got {form!r}.")
    if form == "score" and (dim is None or not dim > 0):
        raise ValueError(f"schedule: form 'score' needs dim, the data's number of coordinates, got {dim}.")
    d = 0.0 if dim is None else float(dim)

    def cost(v: Tensor, loss: Tensor, to: Tensor) -> Tensor:
        ratio = to / v
        if form == "denoiser":
            half = 0.5 * loss * (1 - ratio) / to
        else:
            half = 0.5 * (loss / v * (1 - ratio) + d * (ratio - 1 - ratio.log()))
        return torch.where(ratio < 1, half, math.inf)

    return cost


def _curve(loss: Curve, sigma: Tensor) -> Tensor:
    values = as_f64(loss(sigma))
    if values.shape != sigma.shape:
        raise ValueError(
            f"schedule: the loss must be a function of noise levels (N,) with values (N,), got {tuple(values.shape)} "
            f"for {tuple(sigma.shape)}."
        )
    if not bool((values.isfinite() & (values >= 0)).all()):
        bad = sigma[~(values.isfinite() & (values >= 0))]
        raise ValueError(
            f"schedule: the loss must be finite and not negative, and is not at sigma = {float(bad[0]):.4g}; a "
            "measured curve must reach all levels asked for."
        )
    return values


def path_kl(
    loss: Curve, sigma: Tensor, *, form: Form = "denoiser", dim: float | None = None, information: float = 0.0
) -> float:
    """Path KL of noise levels, in nats, but for the law it starts from.

    Args:
        loss: E|x0 - D^|^2 of noise levels, summed over coordinates.
        sigma: strictly decreasing levels (N + 1,).
        form: what a step holds: "denoiser" or "score".
        dim: coordinates of the data; needed for "score".
        information: the integral of the mmse over snr between the last level and the first
            (:meth:`Spectrum.information`), which no choice of levels changes. Without it the value is an upper bound.
    """
    levels = as_f64(sigma)
    if levels.ndim != 1 or len(levels) < 2 or bool((levels.diff() >= 0).any()) or not float(levels[-1]) > 0:
        raise ValueError("path_kl: sigma must be at least two positive, strictly decreasing levels.")
    v = levels.square()
    return float(_cost(form, dim)(v[:-1], _curve(loss, levels[:-1]), v[1:]).sum()) - 0.5 * information


def from_loss_curve(
    loss: Curve,
    n: int,
    sigma_max: float,
    sigma_min: float,
    *,
    candidates: int = 900,
    form: Form = "denoiser",
    dim: float | None = None,
    information: float = 0.0,
    refine: bool = True,
) -> Schedule:
    """The n steps from ``sigma_max`` to ``sigma_min`` of least path KL.

    Args:
        loss: E|x0 - D^|^2 of noise levels (N,), summed over coordinates: measured, or ``Spectrum.mmse`` with or without
            an excess. Small levels weigh most, by 1/sigma^2: a noisy measurement is to be smoothed there first.
        n: steps; what a sampler with ``final="none"`` calls ``steps``.
        sigma_max, sigma_min: first and last level.
        candidates: levels to choose from, equal steps in log sigma. The optimum over them is exact.
        form, dim, information: see :func:`path_kl`.
        refine: choose again among finer levels around each one found, until the value gains less than 1e-10 of itself:
            the optimum then no longer depends on the candidates, if there is but one near.

    Raises:
        ValueError: for levels, numbers or losses that cannot be used.
    """
    table = _Table(loss, n, sigma_max, sigma_min, candidates, form, dim)
    return table.schedule(n, information, refine)


def every_budget(
    loss: Curve,
    n: int,
    sigma_max: float,
    sigma_min: float,
    *,
    candidates: int = 900,
    form: Form = "denoiser",
    dim: float | None = None,
    information: float = 0.0,
    refine: bool = True,
) -> list[Schedule]:
    """The best schedules of 1, 2, ... n steps, from one table; arguments as in :func:`from_loss_curve`."""
    table = _Table(loss, n, sigma_max, sigma_min, candidates, form, dim)
    return [table.schedule(k, information, refine) for k in range(1, n + 1)]


class _Table:
    """Least costs from the first candidate to each in 1 ... n steps, and the steps that achieve them."""

    def __init__(
        self,
        loss: Curve,
        n: int,
        sigma_max: float,
        sigma_min: float,
        candidates: int,
        form: Form,
        dim: float | None,
    ) -> None:
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(f"schedule: needs 0 < sigma_min < sigma_max < inf, got {sigma_min} and {sigma_max}.")
        if not 1 <= n < candidates:
            raise ValueError(f"schedule: needs 1 <= n < candidates, got n = {n} and {candidates} candidates.")
        self.loss, self.cost, self.form = loss, _cost(form, dim), form
        self.sigma = _geometric(sigma_max, sigma_min, candidates)
        v = self.sigma.square()
        steps = self.cost(v.unsqueeze(-1), _curve(loss, self.sigma).unsqueeze(-1), v)
        best = torch.full_like(v, math.inf)
        best[0] = 0.0
        self.values, self.origin = [], []
        for _ in range(n):
            best, origin = (best.unsqueeze(-1) + steps).min(0)
            self.values.append(float(best[-1]))
            self.origin.append(origin)

    def schedule(self, n: int, information: float, refine: bool) -> Schedule:
        path = [len(self.sigma) - 1]
        for origin in reversed(self.origin[:n]):
            path.append(int(origin[path[-1]]))
        sigma, value = self.sigma[path[::-1]], self.values[n - 1]
        if refine and n > 1:
            sigma, value = self._refined(sigma, value)
        law = "path KL" if information else "path KL + a constant"
        return Schedule(sigma, value - 0.5 * information, f"{law}, held {self.form}")

    def _refined(self, sigma: Tensor, value: float) -> tuple[Tensor, float]:
        """The same choice among finer candidates around each level, over and over."""
        pitch = float((self.sigma[0] / self.sigma[1]).log())
        offsets = torch.arange(-_WINDOW, _WINDOW + 1, dtype=torch.float64)
        for _ in range(100):
            near = (sigma[1:-1].log().unsqueeze(-1) + 0.5 * pitch * offsets).exp()
            near[:, _WINDOW] = sigma[1:-1]
            near = near.clamp(float(sigma[-1]), float(sigma[0]))
            losses = _curve(self.loss, torch.cat([sigma[:1], near.flatten()]))
            inner, v = losses[1:].reshape(near.shape), near.square()
            best = self.cost(sigma[0].square(), losses[0], v[0])
            origins = []
            for k in range(1, len(near)):
                best, origin = (best.unsqueeze(-1) + self.cost(v[k - 1, :, None], inner[k - 1, :, None], v[k])).min(0)
                origins.append(origin)
            total, last = (best + self.cost(v[-1], inner[-1], sigma[-1].square())).min(0)
            places = [int(last)]
            for origin in reversed(origins):
                places.append(int(origin[places[-1]]))
            chosen = torch.tensor(places[::-1])
            gained = value - float(total)
            if gained > 0:
                value = float(total)
                sigma = torch.cat([sigma[:1], near.gather(1, chosen.unsqueeze(-1)).squeeze(-1), sigma[-1:]])
            if bool(((chosen - _WINDOW).abs() < _WINDOW).all()):  # no level at the edge of its window
                if gained <= 1e-10 * abs(value) and pitch < 1e-4:
                    break
                pitch *= 0.5
        return sigma, value


def _geometric(sigma_max: float, sigma_min: float, n: int) -> Tensor:
    levels = torch.linspace(math.log(sigma_max), math.log(sigma_min), n, dtype=torch.float64).exp()
    levels[0], levels[-1] = sigma_max, sigma_min
    return levels


def step_density(source: Spectrum | Curve, form: Form = "denoiser", dim: float | None = None) -> Curve:
    """The function f of noise levels whose root is the density of optimal levels in v = sigma^2.

    Args:
        source: the data's spectrum, for the closed form; or its mmse (or a loss close to it) as a function of levels,
            differentiated by central differences over one per cent of sigma and cut at 0 where noise makes it fall.
        form: what a step holds: "denoiser" or "score".
        dim: coordinates of the data; needed for "score" from a curve.
    """
    if isinstance(source, Spectrum):
        variance, count = source.variance, source._count
        if form == "denoiser":
            return lambda sigma: (
                (count * (variance / (variance + sigma.square().unsqueeze(-1))).square()).sum(-1) / sigma**4
            )
        if form == "score":
            return lambda sigma: (count / (variance + sigma.square().unsqueeze(-1)).square()).sum(-1)
    _cost(form, dim)  # its arguments are the same, and checked there
    curve, d = source, 0.0 if dim is None else float(dim)

    def density(sigma: Tensor) -> Tensor:
        at = sigma * torch.tensor([[-0.005], [0.005]], dtype=torch.float64).exp()
        mmse, v = curve(at.flatten()).reshape(2, -1), at.square()
        # Minus the score's square is differenced whole: where noise is small its terms all but cancel.
        held = mmse if form == "denoiser" else mmse / v.square() - d / v
        slope = (held[1] - held[0]).clamp(min=0) / (0.02 * sigma.square())  # ln v moves twice as far as ln sigma
        return slope / sigma**4 if form == "denoiser" else slope

    return density


def from_density(f: Curve, n: int, sigma_max: float, sigma_min: float, *, points: int = 4096) -> Schedule:
    r"""The n steps whose levels are quantiles of :math:`\sqrt f\, dv`, v = sigma^2.

    Levels for long walks, and first levels for anything else, at no cost; its value is the limit that N times the path
    KL tends to, over N: :math:`\frac1{4N} (\int \sqrt f\, dv)^2`.

    Args:
        f: of noise levels, not negative; see :func:`step_density`.
        n: steps.
        sigma_max, sigma_min: first and last level.
        points: of the trapezoidal rule, equal steps in log sigma.

    Raises:
        ValueError: for levels or densities that cannot be used.
    """
    if not 0 < sigma_min < sigma_max < math.inf or n < 1:
        raise ValueError(
            f"from_density: needs 0 < sigma_min < sigma_max < inf and n >= 1, got {sigma_min}, {sigma_max} and {n}."
        )
    sigma = _geometric(sigma_max, sigma_min, points)
    log_sigma = sigma.log()
    root = _curve(f, sigma).sqrt() * 2 * sigma.square()  # per unit of ln sigma
    mass = torch.cumulative_trapezoid(root, -log_sigma)
    total = float(mass[-1])
    if not total > 0:
        raise ValueError("from_density: f vanishes everywhere between the levels.")
    mass = torch.cat([torch.zeros(1, dtype=torch.float64), mass])
    wanted = torch.linspace(0, total, n + 1, dtype=torch.float64)[1:-1]
    right = torch.searchsorted(mass, wanted).clamp(1, points - 1)
    share = (wanted - mass[right - 1]) / (mass[right] - mass[right - 1])
    inner = torch.lerp(log_sigma[right - 1], log_sigma[right], share).exp()
    levels = torch.cat([sigma[:1], inner, sigma[-1:]])
    return Schedule(levels, total**2 / (4 * n), "limit of the path KL for many steps")

r"""Coordinates from the best independent Gaussian, by maximising its evidence lower bound.

.. math::
    \mathrm{ELBO}(m, s) = E_{\epsilon \sim N(0, I)} \bigl[ \log \gamma(m + s \odot \epsilon) \bigr] + \sum_i \log s_i
    + \tfrac d2 (1 + \log 2\pi) \le \log Z,

for :math:`q = N(m, \mathrm{diag}\, s^2)`, and x = m + s z as coordinates: "variational preconditioning" in Phillips et
al., Particle Denoising Diffusion Sampler (arXiv 2402.06320). Scales are exponentials, so they stay positive.

The gradient is that along the path of a draw without the score of q in its own parameters, whose mean is zero (Roeder,
Wu & Duvenaud, Sticking the Landing, arXiv 1703.09194). With :math:`p = \nabla \log \gamma(x) + \epsilon / s`,

.. math::
    \partial_m \mathrm{ELBO} = E[p], \qquad \partial_{\log s} \mathrm{ELBO} = E[p \odot s \odot \epsilon].

Draws come in pairs :math:`\pm \epsilon`. Adam (Kingma & Ba, arXiv 1412.6980) climbs in windows of 50 steps: when the
mean ELBO of a window is not above that of the one before by two standard errors, the rate is halved; after two
halvings the fit ends as soon as another has brought nothing. The iterates of the last window are averaged. A step of m
is in units of s, or at first of 1 where s is smaller, which falls tenfold with each halving: m travels to the mass
before s allows no more than small steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from undrift.density.affine import AffineTarget
from undrift.density.coordinates import Coordinates
from undrift.density.law import positive
from undrift.density.target import Target, TargetError

__all__ = ["Fit", "MeanField"]

_WINDOW = 50
_MEMORY, _SQUARES = 0.9, 0.99  # of the gradient, and of its square: early gradients may be huge


@dataclass(frozen=True, eq=False)
class Fit:
    """An independent Gaussian, fitted.

    Attributes:
        loc: m, (d,).
        scale: s, (d,).
        elbo: evidence lower bound over the last window, of iterates that still move: that of ``loc`` and ``scale``, of
            their average, is a little higher.
        std_error: of ``elbo``.
        steps: how many were made.
        settled: whether the fit came to rest before it ran out of steps.
    """

    loc: Tensor
    scale: Tensor
    elbo: float
    std_error: float
    steps: int
    settled: bool


@dataclass(frozen=True, eq=False)
class MeanField(Coordinates):
    r"""Centre and scales of the best independent Gaussian, from the score alone.

    Posteriors of up to 61 coordinates take 20 000 to 45 000 gradients. Correlations are not seen, and scales are those
    of each coordinate given the others: for a Gaussian of precision P they are :math:`P_{ii}^{-1/2}`.

    Args:
        steps: most steps; the fit ends before where it has come to rest.
        samples: draws a step, an even number: gradients of the target.
        rate: of the first steps, in units of s, and of log s.
        start: coordinates to fit in, null for the target's own: where the mass is far from the origin, or where widths
            differ by orders of magnitude. The scale fitted multiplies theirs, which may be a matrix.
    """

    steps: int = 2000
    samples: int = 64
    rate: float = 0.1
    start: Coordinates | None = None

    def __post_init__(self) -> None:
        positive(self, rate=self.rate)
        if self.steps < 1:
            raise ValueError(f"MeanField: steps must be at least 1, got {self.steps}.")
        if self.samples < 2 or self.samples % 2:
            raise ValueError(f"MeanField: samples must be an even number, at least 2, got {self.samples}.")

    def choose(self, target: Target, generator: torch.Generator, dtype: torch.dtype) -> AffineTarget:
        if self.start is None:
            found = self.fit(target, generator, dtype)
            return target.affine(found.loc, found.scale)
        seen = self.start.choose(target, generator, dtype)
        found = self.fit(seen, generator, dtype)
        loc = seen.to_x(found.loc.unsqueeze(0))[0]
        return target.affine(loc, seen.scale.to(loc) * found.scale)  # of a matrix, the columns

    def fit(self, target: Target, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Fit:
        """The fit itself.

        Args:
            target: what to fit.
            generator: of the draws; the fit runs on its device.
            dtype: in which the target is evaluated. The fit is kept in float64.

        Raises:
            TargetError: for a target with faults, or whose ELBO is not finite.
        """
        shape, device = (self.samples // 2, target.dim), generator.device
        first = torch.empty(8, target.dim, dtype=torch.float64, device=device).normal_(generator=generator)
        target.check(first.to(dtype))
        state = torch.zeros(2, target.dim, dtype=torch.float64, device=device)  # m and log s
        moment, square = torch.zeros_like(state), torch.zeros_like(state)
        entropy = 0.5 * target.dim * (1 + math.log(2 * math.pi))
        before: tuple[float, float] | None = None  # the window before, at the same rate
        faster: tuple[float, float] | None = None  # the last window at the rate before
        done, halvings, settled = 0, 0, False
        while True:
            elbos, total = [], torch.zeros_like(state)
            for _ in range(min(_WINDOW, self.steps - done)):
                done += 1
                noise = torch.empty(shape, dtype=torch.float64, device=device).normal_(generator=generator)
                value, gradient = _elbo(target, state, torch.cat([noise, -noise]), dtype, done)
                elbos.append(value + entropy)
                moment = _MEMORY * moment + (1 - _MEMORY) * gradient
                square = _SQUARES * square + (1 - _SQUARES) * gradient.square()
                step = (moment / (1 - _MEMORY**done)) / ((square / (1 - _SQUARES**done)).sqrt() + 1e-12)
                unit = torch.stack([state[1].exp().clamp(min=0.1**halvings), torch.ones_like(state[1])])
                state = state + self.rate * 0.5**halvings * unit * step
                total += state
            bound = torch.stack(elbos)
            now = float(bound.mean()), float(bound.var()) / len(elbos) if len(elbos) > 1 else math.inf
            if done < self.steps and not _rises(before, now):
                settled = halvings >= 2 and not _rises(faster, now)
                faster, before, halvings = now, None, halvings + 1
            else:
                before = now
            if settled or done == self.steps:
                loc, log_scale = total / len(elbos)
                return Fit(loc, log_scale.exp(), now[0], math.sqrt(now[1]), done, settled)


def _rises(before: tuple[float, float] | None, now: tuple[float, float]) -> bool:
    """Whether a mean (and its variance) is above an earlier one, by more than two standard errors."""
    return before is None or now[0] - before[0] > 2 * math.sqrt(before[1] + now[1])


def _elbo(target: Target, state: Tensor, noise: Tensor, dtype: torch.dtype, step: int) -> tuple[Tensor, Tensor]:
    """The ELBO without its constant, (), and its gradient in m and log s, (2, d), from standard normals (n, d)."""
    loc, scale = state[0], state[1].exp()
    x = (loc + scale * noise).to(dtype)
    value, score = target.log_prob_and_score(x)
    good = torch.isfinite(value) & torch.isfinite(score).all(-1)
    if not bool(good.all()):
        i = int((~good).nonzero()[0])
        what = "its gradient is not finite" if math.isfinite(float(value[i])) else f"log_prob is {float(value[i])}"
        raise TargetError(
            f"{target.name}: the evidence lower bound is not finite at step {step} of the mean-field fit: {what} at "
            f"{target._show(x[i])}, {int((~good).sum())} of {len(x)} draws of the Gaussian. It needs a density on "
            "all of R^d that is finite where the Gaussian goes: use constrained parameters, or start nearer to the "
            "mass, as in MeanField(start=Affine(loc, scale)) or MeanField(start=Laplace())."
        )
    path = score.double() + noise / scale
    return value.double().mean() + state[1].sum(), torch.stack([path.mean(0), (path * scale * noise).mean(0)])

r"""Score matching for processes without a kernel: match the gradient of a short, local Gaussian transition.

A path is simulated from the data to :math:`y_s`; the local Gaussian :math:`N(\mu, L L^\top)` of
:mod:`undrift.process.local` leads from there to t = s + h, and :math:`g = -L^{-\top} \xi` at
:math:`y_t = \mu + L \xi` is an unbiased target of the score of the law of :math:`y_t`. What is minimised is

.. math::
    \tfrac12 \|s_\theta\|^2 - s_\theta \cdot g = \tfrac12 \|s_\theta - g\|^2 - \tfrac12 \|g\|^2

whose mean is :math:`\frac12 E\|s_\theta - \nabla \log p_t\|^2 - \frac12 E\|\nabla \log p_t\|^2`, and negative once
something is learned. The term left out has nothing to learn from, mean :math:`\operatorname{tr} \Sigma^{-1}/2`, and a
variance that would drown the rest.

**The step h.** The variance of g is :math:`\Sigma^{-1} \sim 1/h`, the bias of the local law grows with h. Pairs
:math:`\mu \pm L \xi` remove the conflict. Over a pair g changes its sign, and :math:`-s \cdot g` averages to
:math:`\frac12 (s_+ - s_-) \cdot L^{-\top} \xi`, which tends to :math:`(L \xi)^\top (\nabla s) L^{-\top} \xi` as h goes
to 0: Hutchinson's estimate of the divergence in implicit score matching, of finite variance. No divergence is taken,
and no derivative of the network but that of the loss. Without pairs, take h larger, and let it grow with t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from undrift.nonlinear_diffusion import NonlinearDiffusion
from undrift.process.local import local_pairs
from undrift.process.nonlinear import _apply
from undrift.train.levels import stratified
from undrift.train.objectives import Objective

__all__ = ["LocalScoreMatching"]


@dataclass(frozen=True, eq=False)
class LocalScoreMatching(Objective):
    r"""Local denoising score matching, for a :class:`~undrift.nonlinear_diffusion.NonlinearDiffusion`.

    Every path of a batch is matched at ``visits`` times, one in each of as many slices of equal length in
    :math:`\log \varsigma_t`; within the slices they are stratified over the batch. A batch costs about T/step + visits
    local steps without the network, and 2 visits evaluations of the network for each sample (one call).

    * "uniform": weight :math:`\varsigma_t^2`, which is unit weight on the error of the raw network;
    * "likelihood": :math:`\frac12 \|\cdot\|^2` in the norm of :math:`GG^\top = 2 D(y_t)`, integrated over t: up to a
      constant, the ELBO's path term per coordinate. Coordinates without noise are not trained: the way back does not
      use them.

    Args:
        weighting: one of the above.
        visits: times matched along each path.
        step: longest step of the simulation, in units of time.
        lag: h, the step that is matched, in units of time.
        growth: the step matched at t is h + growth t, and never more than t.
        pairs: match :math:`\mu + L \xi` and :math:`\mu - L \xi` together; otherwise two independent draws, at the
            same cost.
        ito: with the Itô term in the local steps.

    References:
        Singhal, Goldstein & Ranganath, What's the score? Automated denoising score matching for nonlinear diffusions,
        2024.
    """

    weighting: Literal["uniform", "likelihood"] = "uniform"
    visits: int = 8
    step: float = 0.05
    lag: float = 0.02
    growth: float = 0.0
    pairs: bool = True
    ito: bool = True

    def __post_init__(self) -> None:
        if self.weighting not in ("uniform", "likelihood"):
            raise ValueError(
                f"LocalScoreMatching: weighting must be 'uniform' or 'likelihood', got {self.weighting!r}."
            )
        if self.visits < 1:
            raise ValueError(f"LocalScoreMatching: visits must be at least 1, got {self.visits}.")
        for name in ("step", "lag"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"LocalScoreMatching: {name} must be positive, got {getattr(self, name)}.")
        if not 0 <= self.growth <= 1:
            raise ValueError(
                f"LocalScoreMatching: growth must lie in [0, 1], got {self.growth}; beyond 1 a step would begin ever "
                "earlier as t grows."
            )

    def loss(self, model: Any, x: Tensor, generator: torch.Generator, **condition: Any) -> tuple[Tensor, Tensor]:
        """Loss of each path (batch,), and the level at its visit of the largest loss (batch,).

        ``condition`` tensors of size batch are given to every visit of their path.
        """
        if not isinstance(model, NonlinearDiffusion):
            raise TypeError(
                f"LocalScoreMatching: trains a NonlinearDiffusion, got a {type(model).__name__}; Denoising trains "
                "denoisers and NoiseMatching NoiseDiffusions."
            )
        batch, dim = x.shape[0], model.process.dim
        if x.shape != (batch, dim):
            raise ValueError(f"LocalScoreMatching: data must be (batch, {dim}), got {tuple(x.shape)}.")
        with torch.no_grad():
            cells = torch.arange(self.visits, dtype=torch.float64, device=x.device).unsqueeze(-1)
            times = model.times((cells + stratified(batch, generator)) / self.visits)
            lag = torch.minimum(self.lag + self.growth * times, times)
            local = local_pairs(model.process, x, times, lag, self.step, generator, self.ito)
            noise = torch.empty_like(local.mean).normal_(generator=generator)
            other = -noise if self.pairs else torch.empty_like(noise).normal_(generator=generator)
            z = torch.cat([local.draw(noise), local.draw(other)])
            target = torch.cat([local.target(noise), local.target(other)])
            t = times.flatten().repeat(2)
            level = model.level(t).to(x)
        repeats = 2 * self.visits
        many = {
            k: v.repeat(repeats, *[1] * (v.ndim - 1)) if isinstance(v, Tensor) and v.ndim and len(v) == batch else v
            for k, v in condition.items()
        }
        s = model.score(z, t, **many)
        if self.weighting == "likelihood":
            dual = 2 * _apply(model.process.matrices(z)[0], s)
            weight = model.spacing(t).to(x)
        else:
            dual, weight = s, level.square()
        value = weight * (dual * (0.5 * s - target)).mean(-1)
        value = value.reshape(2, self.visits, batch).mean(0)
        worst = value.detach().abs().argmax(0, keepdim=True)
        return value.mean(0), level[: self.visits * batch].reshape(self.visits, batch).gather(0, worst).squeeze(0)

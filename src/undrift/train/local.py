r"""Score matching for processes without a kernel: match the gradient of a short, local Gaussian transition.

A path is simulated from the data to :math:`y_s`; the local Gaussian :math:`N(\mu, L L^\top)` of
:mod:`undrift.process.local` leads from there to t = s + h, and :math:`g = -L^{-\top} \xi` at
:math:`y_t = \mu + L \xi` is an unbiased target of the score of the law of :math:`y_t`. What is minimised is

.. math::
    \tfrac12 \|s_\theta - g\|^2 - \tfrac12 \|{-\nabla H} - g\|^2
        = \tfrac12 \|r_\theta\|^2 - r_\theta \cdot (g + \nabla H), \qquad s_\theta = -\nabla H + r_\theta

the error less that of the stationary law's score: 0 where the network says nothing, negative once it has learned. What
is left out has nothing to learn from, and a variance that would drown the rest.

**The step h.** The variance of g is :math:`\Sigma^{-1} \sim 1/h`, the bias of the local law grows with h. Pairs
:math:`\mu \pm L \xi` remove the conflict. Over a pair g changes its sign, and :math:`-r \cdot g` averages to
:math:`\frac12 (r_+ - r_-) \cdot L^{-\top} \xi`, which tends to :math:`(L \xi)^\top (\nabla r) L^{-\top} \xi` as h goes
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
    * "likelihood": :math:`\frac12 \|\cdot\|^2` in the norm of :math:`GG^\top = 2 D(y_t)`, integrated over t: the mean
      over data of :math:`\log \pi(x) - \text{ELBO}(x)`, in nats per coordinate, where :math:`\pi` is the stationary
      law (:meth:`NonlinearDiffusion.elbo`). Coordinates without noise are not trained: the way back does not use them.

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
        likelihood = self.weighting == "likelihood"
        value, level = model.matching(
            x,
            stratified(x.shape[0], generator),
            generator,
            self.visits,
            self.step,
            self.lag,
            self.growth,
            self.pairs,
            self.ito,
            likelihood,
            **condition,
        )
        value = value / model.process.dim
        worst = value.detach().abs().argmax(0, keepdim=True)
        return value.mean(0), level.gather(0, worst).squeeze(0)

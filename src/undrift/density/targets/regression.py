r"""Bayesian logistic regression on three data sets of the UCI repository.

With design X (N, d), its column of ones first, and labels y in {0, 1},

.. math::
    \log \gamma(w) = \sum_i \log \sigma(m_i) + \log N(w; 0, s^2 I), \qquad m = A w, \quad A = (2y - 1) \odot X,

and gradient :math:`A^\top \sigma(-m) - w / s^2`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from undrift.density.target import Target
from undrift.density.targets._data import Placed, Reference, load_npz, references

__all__ = ["LogisticRegression"]

_LOG_Z = {"ionosphere": (-111.60637, 0.00280), "sonar": (-108.37722, 0.00432), "german": (-585.09612, 0.00212)}
_COEFFICIENTS = {"ionosphere": 35, "sonar": 61, "german": 25}


@dataclass(frozen=True, eq=False)
class LogisticRegression(Target):
    r"""Posterior of the weights of a logistic regression.

    - ``ionosphere`` (d = 35) and ``sonar`` (d = 61): columns centred and divided by their deviation (a constant column
      is only centred), prior N(0, I). The densities of Vargas et al., Denoising Diffusion Samplers (arXiv 2302.13834),
      and of Phillips et al. (arXiv 2402.06320). log Z by adapted importance sampling: -111.6064 (standard error .0028)
      and -108.3772 (.0043); by sequential Monte Carlo -111.600 (.012) and -108.417 (.015). Published for the former
      paper, without errors: -111.559 and -108.581.
    - ``german`` (d = 25): columns divided by their deviation but not centred, prior :math:`N(0, 10^2)`, :math:`P(y = 1)
      = \sigma(-x^\top w)`: Blessing et al., Beyond ELBOs (arXiv 2406.07423), whose 10 000 reference draws are what
      :meth:`reference` summarises. log Z by adapted importance sampling: -585.0961 (.0021).

    Args:
        data: which data set.
    """

    data: Literal["ionosphere", "sonar", "german"] = "ionosphere"

    @property
    def dim(self) -> int:  # type: ignore[override]
        return _COEFFICIENTS[self.data]

    @property
    def log_z(self) -> float:  # type: ignore[override]
        return _LOG_Z[self.data][0]

    @property
    def log_z_std_error(self) -> float:
        """Standard error of ``log_z``."""
        return _LOG_Z[self.data][1]

    @property
    def _prior_variance(self) -> float:
        return 100.0 if self.data == "german" else 1.0

    @cached_property
    def _constants(self) -> Placed:
        arrays = load_npz(self.data)
        x, sign = arrays["X"], 2 * arrays["y"] - 1
        spread = x.std(0, correction=0)
        spread[spread < 1e-12] = 1.0
        if self.data == "german":
            x, sign = x / spread, -sign
        else:
            x = (x - x.mean(0)) / spread
        design = torch.cat([x.new_ones(len(x), 1), x], -1)
        return Placed(signed=sign.unsqueeze(-1) * design)

    def _log_prior(self, w: Tensor) -> Tensor:
        v = self._prior_variance
        return -0.5 * (w.square().sum(-1) / v + self.dim * math.log(2 * math.pi * v))

    def _log_density(self, x: Tensor) -> Tensor:
        margin = x @ self._constants.on(x)["signed"].T
        return self._log_prior(x) + torch.nn.functional.logsigmoid(margin).sum(-1)

    def _gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        signed = self._constants.on(x)["signed"]
        margin = x @ signed.T
        value = self._log_prior(x) + torch.nn.functional.logsigmoid(margin).sum(-1)
        # In place, where no graph needs the margins: (n, N) is the largest array of a step.
        slope = (-margin).sigmoid() if margin.requires_grad else margin.neg_().sigmoid_()
        return value, slope @ signed - x / self._prior_variance

    def reference(self) -> Mapping[str, Reference]:
        """Means and deviations of published reference draws, by label; empty where there are none."""
        return references("german") if self.data == "german" else {}

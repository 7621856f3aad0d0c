r"""An observation: data with the operator and the noise that made them, which is a likelihood.

.. math:: \ell(x) = \log p(y \mid x) = \log p_{noise}(y \mid A(x))
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from undrift.observe.base import LinearOperator, Operator
from undrift.observe.noise import Noise

__all__ = ["Observation"]


@dataclass(frozen=True, eq=False)
class Observation:
    """Data y, and how they came about.

    Args:
        operator: forward operator, (batch, *event) -> (batch, *data).
        noise: law of the data given the operator's prediction.
        y: data (*data), the same for all of a batch; or (batch, *data), one for each of it.

    Raises:
        ValueError: if the data are not finite, or not of this noise's kind, or not of the operator's shape.
    """

    operator: Operator
    noise: Noise
    y: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "y", torch.as_tensor(self.y))
        self.noise.check(self.y)
        tail = self.operator.data_shape
        if tail is not None and self.y.shape[self.y.ndim - len(tail) :] != tail:
            raise ValueError(
                f"Observation: {type(self.operator).__name__} predicts data whose shape ends in {tail}, "
                f"y has shape {tuple(self.y.shape)}."
            )

    @classmethod
    def simulate(
        cls, operator: Operator, noise: Noise, x: Tensor, generator: torch.Generator | None = None
    ) -> Observation:
        """The observation of a truth.

        Args:
            operator, noise: how to observe.
            x: truths (batch, *event). A batch of one gives data (*data), which any number of samples can share.
            generator: where the noise comes from.
        """
        with torch.no_grad():
            y = noise.sample(operator(x), generator)
        return cls(operator, noise, y[0] if len(y) == 1 else y)

    @property
    def linear(self) -> bool:
        """Whether the operator is linear."""
        return isinstance(self.operator, LinearOperator)

    def predict(self, x: Tensor) -> Tensor:
        """The data without noise, (batch, *data), of x (batch, *event)."""
        return self.operator(x)

    def shared(self, x: Tensor) -> bool:
        """Whether the data are one observation for all of a batch, and not one for each of x (batch, *event)."""
        with torch.no_grad():
            return self.y.ndim < self.operator(x[:1]).ndim or len(self.y) == 1

    def log_likelihood(self, x: Tensor) -> Tensor:
        """log p(y | x), normalised over y: (batch,), float64, differentiable in x (batch, *event).

        Raises:
            ValueError: if the data's shape is not that of the predictions for x.
        """
        return self.noise.log_prob(self.y, self.operator(x))

    def gradient(self, x: Tensor) -> Tensor:
        """Euclidean gradient of the log-likelihood at x (batch, *event): same shape and dtype.

        In function space precondition it with the prior's covariance: as an array it depends on the grid.
        """
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            return torch.autograd.grad(self.log_likelihood(point).sum(), point)[0]

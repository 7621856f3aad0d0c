r"""Posteriors of named, constrained parameters.

.. math::
    \log \gamma(x) = \log p(\theta(x), y) + \log |\det d\theta / dx|,

so that :math:`\theta(x)` has the posterior law when x has density :math:`\gamma / Z`, and Z is the evidence p(y).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from undrift.density.target import Target
from undrift.density.targets._data import Reference, references

__all__ = ["Posterior"]


class Posterior(Target):
    """Gives ``parameters`` and :meth:`_log_joint`; draws come back out under the parameters' names."""

    _reference: ClassVar[str | None] = None

    def _log_joint(self, values: Mapping[str, Tensor]) -> Tensor:
        """log density of parameters and data, (n,), of named values (n, *shape) on their own scale."""
        raise NotImplementedError

    @property
    def dim(self) -> int:  # type: ignore[override]
        assert self.parameters is not None
        return self.parameters.dim

    def _log_density(self, x: Tensor) -> Tensor:
        assert self.parameters is not None
        values, log_det = self.parameters.constrain(x)
        return self._log_joint(values) + log_det

    def reference(self) -> Mapping[str, Reference]:
        """Means and deviations of reference draws, by label, on the parameters' scale; empty where there are none."""
        return references(self._reference) if self._reference else {}

r"""A drug in one compartment: absorbed at first order, eliminated by Michaelis and Menten's law.

.. math::
    \dot C = \frac{k_a D}{V} e^{-k_a t} - \frac{V_m}{V} \frac{C}{K_m + C}, \qquad C(0) = 0.

What has been absorbed by time t is known, :math:`A(t) = \frac{D}{V} (1 - e^{-k_a t})`, so only the eliminated part
:math:`E = A - C` is integrated, :math:`\dot E = \frac{V_m}{V} \frac{A - E}{K_m + A - E}`, by the classical method of
order four. Where K_m is small elimination saturates almost at once: the first interval is graded, :math:`t_j = t_1
(j/m)^4`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints

from undrift.density.parameters import Parameters
from undrift.density.targets._data import Placed
from undrift.density.targets._densities import log_half_cauchy, log_lognormal
from undrift.density.targets._posterior import Posterior
from undrift.density.targets.posteriors import data

__all__ = ["OneCompartment"]

_DOSE, _VOLUME = 30.0, 2.0
_GRADED, _UNIFORM = 16, 2
_FLOOR = 1e-10  # for concentrations that the method, far from any plausible parameters, takes below zero


@dataclass(frozen=True, eq=False)
class OneCompartment(Posterior):
    r"""Rates of absorption and elimination from twenty concentrations, d = 4.

    :math:`\hat C_i \sim \mathrm{logNormal}(\log C(t_i), \sigma)`, with a dose of 30 in a volume of 2, none of it
    absorbed at the start; k_a, K_m, V_m, sigma ~ half-Cauchy(1). posteriordb:
    one_comp_mm_elim_abs-one_comp_mm_elim_abs; Stan case study by Margossian & Gillespie (2016). Concentrations are
    right to a relative 5e-7 wherever the reference draws go, K_m from 1e-4 to 300.
    """

    _reference: ClassVar[str | None] = "one_comp_mm_elim_abs"

    @cached_property
    def parameters(self) -> Parameters:  # type: ignore[override]
        return Parameters({name: constraints.positive for name in ("k_a", "K_m", "V_m", "sigma")})

    @cached_property
    def _constants(self) -> Placed:
        d = data("one_comp_mm_elim_abs")
        times = d["times"]
        graded = times[0] * torch.linspace(0, 1, _GRADED + 1, dtype=torch.float64) ** 4
        uniform = torch.linspace(0, 1, _UNIFORM + 1, dtype=torch.float64)[1:]
        rest = (times[:-1, None] + times.diff()[:, None] * uniform).reshape(-1)
        nodes = torch.cat([graded, rest])
        middles = 0.5 * (nodes[1:] + nodes[:-1])
        return Placed(nodes=nodes, middles=middles, steps=nodes.diff(), seen=d["C_hat"])

    def concentration(self, k_a: Tensor, K_m: Tensor, V_m: Tensor) -> Tensor:
        """C at the twenty times: parameters (n,) -> (n, 20)."""
        c = self._constants.on(k_a)
        at_nodes = -_DOSE / _VOLUME * torch.expm1(-c["nodes"].unsqueeze(-1) * k_a)  # A(t), (times, n)
        at_middles = -_DOSE / _VOLUME * torch.expm1(-c["middles"].unsqueeze(-1) * k_a)
        rate = V_m / _VOLUME
        eliminated, out = torch.zeros_like(k_a), []

        def slope(absorbed: Tensor, gone: Tensor) -> Tensor:
            left = (absorbed - gone).clamp(min=0)
            return rate * (left / (K_m + left))

        steps = c["steps"].tolist()
        for j, (h, start, middle, end) in enumerate(
            zip(steps, at_nodes[:-1], at_middles, at_nodes[1:], strict=True), 1
        ):
            k1 = slope(start, eliminated)
            k2 = slope(middle, torch.add(eliminated, k1, alpha=h / 2))
            k3 = slope(middle, torch.add(eliminated, k2, alpha=h / 2))
            k4 = slope(end, torch.add(eliminated, k3, alpha=h))
            eliminated = torch.add(eliminated, torch.add(k1 + k4, k2 + k3, alpha=2), alpha=h / 6)
            if j >= _GRADED and (j - _GRADED) % _UNIFORM == 0:
                out.append(end - eliminated)
        return torch.stack(out, -1)

    def _log_joint(self, values: Mapping[str, Tensor]) -> Tensor:
        k_a, K_m, V_m, sigma = (values[k] for k in ("k_a", "K_m", "V_m", "sigma"))
        expected = self.concentration(k_a, K_m, V_m).clamp(min=_FLOOR)
        seen = self._constants.on(k_a)["seen"]
        likelihood = log_lognormal(seen, expected.log(), sigma.unsqueeze(-1)).sum(-1)
        prior = [log_half_cauchy(v, 1.0) for v in (k_a, K_m, V_m, sigma)]
        return likelihood + torch.stack(prior).sum(0)

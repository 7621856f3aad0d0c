r"""What a control is regressed on: one problem, whatever the process.

The control of a reversal (chain.py) sees a state z only through y = E[x_0 | z] under the reference, and time only
through V = Var(x_0 | z). Noising takes a point x_0 to

.. math:: y = (1 - V) x_0 + \sqrt{V (1 - V)}\, n, \qquad n \sim N(0, I),

by *any* linear process, Dirac starts and auxiliaries included; processes differ in how fast they go through V, and in
where they end. With N = grad log g_0(x_0), the *novel* score, and draws x_0 of the target,

.. math:: a(y, V) = E[N | y] = E[(x_0 - y) / V \,|\, y], \qquad
    \mathrm{KL}(P^* \| F) = \tfrac12 \int_0^{V_T} E |a_\theta - a|^2\, dV

in the limit of many steps. The two targets are novel and denoising score matching. Their scaled difference

.. math:: r = x_0 - y - V N, \qquad E[r | y] = 0,

is a control variate: :math:`N + \kappa(V)\, r` has the same conditional mean for every kappa; kappa = 0 is the novel
target, 1/V the denoising one, and the least variance lies at :math:`\kappa = -E[N r] / E[r^2]`, one number for each
coordinate and V, which the draws themselves show; what y explains linearly of N and r is taken out first. For a
Gaussian target of independent coordinates no variance is left.

References:
    Phillips et al., Particle Denoising Diffusion Sampler, 2024 (novel score matching).
    De Bortoli et al., Target Score Matching, 2024 (the same identity, and mixtures with denoising).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from undrift.density.controlled.chain import Chain
from undrift.density.controlled.control import View
from undrift.density.controlled.diffusion import ControlledDiffusion

__all__ = ["Curvature", "Examples", "TimeLaw", "Times", "control_at", "noised", "stein", "steps_spread", "unknown_of"]

TimeLaw = Literal["divergence", "angle"]


def unknown_of(label: Tensor) -> Tensor:
    """V at labels, which are angles in units of pi/2: sin^2."""
    return (0.5 * math.pi * label).sin().square()


def _label(unknown: Tensor) -> Tensor:
    return unknown.sqrt().asin() / (0.5 * math.pi)


def noised(x: Tensor, unknown: Tensor, generator: torch.Generator) -> Tensor:
    """y for points x (n, d), each at its V (n,)."""
    v = unknown.to(x).unsqueeze(-1)
    noise = torch.empty_like(x).normal_(generator=generator)
    return (1 - v) * x + (v * (1 - v)).sqrt() * noise


def stein(x: Tensor, novel: Tensor, y: Tensor, unknown: Tensor) -> Tensor:
    """r = x - y - V N, (n, d), of mean 0 given y where x are draws of the target."""
    return x - y - unknown.to(x).unsqueeze(-1) * novel


class Times(NamedTuple):
    """Where in time a control is trained, and with which weight.

    Attributes:
        label: (n,), float64, increasing.
        weight: of the squared error, (n,).
    """

    label: Tensor
    weight: Tensor

    @property
    def unknown(self) -> Tensor:
        return unknown_of(self.label)

    @staticmethod
    def spread(n: int, top: float, law: TimeLaw, generator: torch.Generator) -> Times:
        """n times below V = ``top``, one in each of n equal parts of their law.

        Args:
            n: how many.
            top: V at the prior.
            law: "divergence": uniform in V, so that the mean loss is a divergence of path measures. "angle": uniform in
                the angle of the cosine schedule, with weight 1 - V: the score's own unit.
            generator: of the places within the parts.
        """
        places = _places(n, generator)
        if law == "divergence":
            label = _label(top * places)
            return Times(label, torch.full_like(label, 0.5 * top))
        label = places * _label(torch.tensor(top, dtype=torch.float64, device=places.device))
        return Times(label, 0.5 * (1 - unknown_of(label)))


def _places(n: int, generator: torch.Generator) -> Tensor:
    """One number in each of n equal parts of [0, 1)."""
    u = torch.empty(n, dtype=torch.float64, device=generator.device).uniform_(generator=generator)
    return (torch.arange(n, dtype=torch.float64, device=u.device) + u) / n


def steps_spread(n: int, chain: Chain, law: TimeLaw, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """n steps k of a chain, from the prior on, one in each of n equal parts of their law, and weights (n,)."""
    if law == "divergence":
        share = chain.information.double()
        k = torch.searchsorted(share.cumsum(0) / share.sum(), _places(n, generator)).clamp(max=chain.steps - 1)
        return k, torch.full((n,), 0.5 * float(share.sum()), dtype=torch.float64, device=k.device)
    k = (_places(n, generator) * chain.steps).long()
    return k, 0.5 * (1 - chain.unknown.double()[k])


class Curvature(NamedTuple):
    r"""kappa at V, as the curvature q of the Gaussian g_0 for which it would be best: kappa = q / (1 + q V).

    Attributes:
        top: label of the last node.
        q: at labels top (1, ..., n) / n, (n, d).
    """

    top: float
    q: Tensor

    @staticmethod
    def fit(
        x: Tensor, novel: Tensor, top: float, generator: torch.Generator, nodes: int = 24, damped: bool = False
    ) -> Curvature:
        """Of least variance for draws of the target.

        Args:
            x, novel: draws and their novel scores, (n, d).
            top: V at the prior.
            generator: of the noise.
            nodes: how many values of V.
            damped: keep kappa V in [0, .98]: a share of a step; see matching.py.
        """
        end = float(_label(torch.tensor(top, dtype=torch.float64)))
        q = torch.empty(nodes, x.shape[-1], dtype=x.dtype, device=x.device)
        for i in range(nodes):
            v = unknown_of(torch.full((len(x),), end * (i + 1) / nodes, dtype=torch.float64, device=x.device))
            y = noised(x, v, generator)
            r = stein(x, novel, y, v)
            first, second = _beyond(novel, y), _beyond(r, y)
            kappa = -(first * second).sum(0) / second.square().sum(0).clamp(min=torch.finfo(x.dtype).tiny)
            share = (kappa * v[0].to(kappa)).clamp(max=0.98 if damped else 1 - 1e-6)
            q[i] = (share / (1 - share) / v[0].to(kappa)).clamp(min=0.0 if damped else -0.9)
        return Curvature(end, q)

    def at(self, label: Tensor) -> Tensor:
        """kappa (n, d) at labels (n,): q is linear between the nodes."""
        place = label * (len(self.q) / self.top) - 1
        low = place.floor().long().clamp(0, len(self.q) - 2)
        share = (place - low).clamp(0, 1).to(self.q).unsqueeze(-1)
        q = torch.lerp(self.q[low], self.q[low + 1], share)
        return q / (1 + q * unknown_of(label).to(q).unsqueeze(-1))


def _beyond(f: Tensor, y: Tensor) -> Tensor:
    """f (n, d) less its linear regression on y, coordinate by coordinate."""
    f, y = f - f.mean(0), y - y.mean(0)
    return f - y * ((f * y).sum(0) / y.square().sum(0).clamp(min=torch.finfo(y.dtype).tiny))


class Examples(NamedTuple):
    """A regression problem, in order of time.

    Attributes:
        label: time, (n,), float64.
        weight: of the squared error, (n,).
        y: where the control is wanted, (n, d).
        target: what its mean given y should be, (n, d).
        value, score: log gamma at y (n,) and its gradient (n, d), for controls that see them.
    """

    label: Tensor
    weight: Tensor
    y: Tensor
    target: Tensor
    value: Tensor | None = None
    score: Tensor | None = None

    def take(self, index: Tensor) -> Examples:
        """The examples at an index."""
        return Examples(
            self.label[index],
            self.weight[index],
            self.y[index],
            self.target[index],
            None if self.value is None else self.value[index],
            None if self.score is None else self.score[index],
        )

    def batch(self, n: int, generator: torch.Generator) -> Examples:
        """One example out of each of n equal parts: as evenly spread over time as all of them."""
        return self.take((_places(n, generator) * len(self.label)).long().clamp(max=len(self.label) - 1))


def control_at(
    diffusion: ControlledDiffusion, chain: Chain, label: Tensor, y: Tensor, value: Tensor | None, score: Tensor | None
) -> Tensor:
    """The control of a reversal at points y (n, d), each at a time of its own, (n,): (n, d).

    Args:
        diffusion: any reversal without a backward control.
        chain: any table of it, for what does not depend on time.
        label: times in [0, 1], float64.
        y: E[x_0 | z] under the reference.
        value, score: log gamma at y and its gradient, for controls that see them.
    """
    unknown = unknown_of(label)
    times = diffusion.control.times(replace(chain, label=label, unknown=unknown))
    inputs = y * (1 - unknown).clamp(min=1e-12).rsqrt().to(y).unsqueeze(-1)
    guide = None if score is None else (score + y).unsqueeze(1)
    log_g = None if value is None else (value + 0.5 * y.square().sum(-1)).unsqueeze(1)
    view = View(slice(0, len(y)), inputs.to(diffusion._dtype).unsqueeze(1), y.unsqueeze(1), guide, log_g)
    return diffusion.control(view, times).squeeze(1).to(y)

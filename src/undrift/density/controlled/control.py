r"""Controls: what a controlled diffusion adds to its reference, d numbers at every state and time.

At its best the forward control of a reversal is :math:`a(z, t) = E[\nabla \log g_0(x_0) | z]`, a function of
:math:`y = E[x_0 | z]` under the reference and of V = Var(x0 | z) (see chain.py), with :math:`\log g_0 = \log\gamma +
\tfrac12 |x|^2` up to a constant in the reference's coordinates. What the target says at one point is a first guess at
it, exact where V = 0: the guide :math:`\nabla \log g_0(y)`.

    Plain       a = N(y, t)
    Informed    a = N(y, t) + c(t) clip(guide)
    Potential   a = grad_y G(y, t) with  G = s(t) <N(y, t), y> + (1 - s(t)) log g_0(y),  s = 0 where V = 0
    Exact       a = (D - y) / V for a denoiser D that is known

N is a :class:`TimeMLP`, silent at the start; c is a :class:`TimeGate`. A control is a setting (a frozen dataclass) that
builds a field (a module) for a target of d coordinates.

References:
    Zhang & Chen 2022 (guided by the score); Berner, Richter & Ullrich 2024 (interpolated scores, clipping);
    Phillips et al., Particle Denoising Diffusion Sampler, 2024 (the potential).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from undrift.denoise.base import Denoiser
from undrift.density.controlled.chain import Chain
from undrift.density.controlled.network import TimeGate, TimeMLP, as_rows

__all__ = ["Control", "Exact", "Field", "Informed", "Plain", "Potential", "View"]


class View(NamedTuple):
    """What a control sees, of states at consecutive times.

    Attributes:
        at: which times of the chain.
        inputs: states as the network takes them, (steps, batch, inputs), of the order of 1.
        y: E[x0 | z] under the reference, in its unit, (steps, batch, d).
        guide: grad log g_0(y), likewise; None where nobody asked for it.
        log_g: log g_0(y), (steps, batch), likewise.
    """

    at: slice
    inputs: Tensor
    y: Tensor
    guide: Tensor | None = None
    log_g: Tensor | None = None


class Field(nn.Module, ABC):
    """A control for one target."""

    guided = False
    """Whether it needs the target's gradient at y."""
    valued = False
    """Whether it needs the target's value there too."""

    def times(self, chain: Chain) -> tuple[Tensor, ...]:
        """What depends on time alone, a row a time of the chain: computed once for all walkers."""
        return ()

    @abstractmethod
    def forward(self, view: View, times: tuple[Tensor, ...]) -> Tensor:
        """a (steps, batch, d) for what is seen; ``times`` as :meth:`times` gave them, for these steps."""


class Control(ABC):
    """How a control is parametrised."""

    @abstractmethod
    def field(self, inputs: int, dim: int) -> Field:
        """A field of ``inputs`` numbers at a state and ``dim`` coordinates, silent at the start."""


def _net(control: Plain | Informed | Potential, inputs: int, dim: int) -> TimeMLP:
    return TimeMLP(inputs, dim, control.width, control.depth)


def _check(control: Plain | Informed | Potential) -> None:
    name = type(control).__name__
    for key, least in (("width", 1), ("depth", 0)):
        if getattr(control, key) < least:
            raise ValueError(f"{name}: {key} must be at least {least}, got {getattr(control, key)}.")


def _most(control: Informed | Potential, unknown: Tensor) -> Tensor:
    """Largest entry of the guide at V."""
    return (control.reach / unknown.clamp(min=1e-30)).clamp(max=control.clip)


# -- the network alone -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Plain(Control):
    """A network, and nothing else: never asks the target for gradients.

    Args:
        width, depth: of the network.
    """

    width: int = 64
    depth: int = 2

    def __post_init__(self) -> None:
        _check(self)

    def field(self, inputs: int, dim: int) -> Field:
        return _Plain(_net(self, inputs, dim))


class _Plain(Field):
    def __init__(self, net: TimeMLP) -> None:
        super().__init__()
        self.net = net

    def times(self, chain: Chain) -> tuple[Tensor, ...]:
        return (self.net.time(chain.label.to(self.net.outward.weight.dtype)),)

    def forward(self, view: View, times: tuple[Tensor, ...]) -> Tensor:
        return self.net(view.inputs, times[0])


# -- guided by the target ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Informed(Control):
    """A network beside the target's own score.

    Args:
        width, depth: of the network.
        gate: whether the factor of the guide is one number a time ("scalar") or one for each coordinate.
        initial: the factor at the start.
        interpolate: multiply the guide by 1 - V, from 0 at pure noise to 1 at the target: the score is then
            interpolated between those of the reference and of the target.
        clip: largest entry of the guide, in 1 / (unit of the reference).
        reach: largest displacement V a of the posterior mean that the guide may ask for, in units of the reference:
            where little is known, the slope at one point says nothing about places far from it.
    """

    width: int = 64
    depth: int = 2
    gate: Literal["scalar", "coordinate"] = "scalar"
    initial: float = 1.0
    interpolate: bool = True
    clip: float = 1e3
    reach: float = 3.0

    def __post_init__(self) -> None:
        _check(self)
        for key in ("clip", "reach"):
            if not getattr(self, key) > 0:
                raise ValueError(f"Informed: {key} must be positive, got {getattr(self, key)}.")
        if self.gate not in ("scalar", "coordinate"):
            raise ValueError(f"Informed: gate must be scalar or coordinate, got {self.gate!r}.")

    def field(self, inputs: int, dim: int) -> Field:
        return _Informed(self, inputs, dim)


class _Informed(Field):
    guided = True

    def __init__(self, control: Informed, inputs: int, dim: int) -> None:
        super().__init__()
        self.control = control
        self.net = _net(control, inputs, dim)
        self.gate = TimeGate(dim if control.gate == "coordinate" else 1, control.initial)

    def times(self, chain: Chain) -> tuple[Tensor, ...]:
        label = chain.label.to(self.net.outward.weight.dtype)
        gate, unknown = self.gate(label), chain.unknown.to(label).unsqueeze(-1)
        if self.control.interpolate:
            gate = gate * (1 - unknown)
        return self.net.time(label), gate, _most(self.control, unknown)

    def forward(self, view: View, times: tuple[Tensor, ...]) -> Tensor:
        e, gate, most = times
        assert view.guide is not None
        most = as_rows(most).to(view.guide)
        return self.net(view.inputs, e) + as_rows(gate) * torch.clamp(view.guide, -most, most)


# -- a gradient --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Potential(Control):
    """The gradient of a learned potential, which is log g_0 itself at the target.

    Its value estimates :math:`log E[g_0(x_0) | z]`, up to a constant a time, and so weighs walkers under way.

    Args:
        width, depth: of the network.
        clip, reach: bounds of the guide in the control, as in :class:`Informed`; the value has none.
    """

    width: int = 64
    depth: int = 2
    clip: float = 1e3
    reach: float = 3.0

    def __post_init__(self) -> None:
        _check(self)
        for key in ("clip", "reach"):
            if not getattr(self, key) > 0:
                raise ValueError(f"Potential: {key} must be positive, got {getattr(self, key)}.")

    def field(self, inputs: int, dim: int) -> Field:
        return PotentialField(self, _net(self, inputs, dim))


class PotentialField(Field):
    """The field of :class:`Potential`; :meth:`potential` gives its value as well."""

    guided = True
    valued = True

    def __init__(self, control: Potential, net: TimeMLP) -> None:
        super().__init__()
        self.control = control
        self.net = net
        self.mixing = TimeGate(1, 0.0)

    def times(self, chain: Chain) -> tuple[Tensor, ...]:
        label = chain.label.to(self.net.outward.weight.dtype)
        mixing = self.mixing(label) - self.mixing(torch.zeros_like(label[:1]))
        unknown = chain.unknown.to(label).unsqueeze(-1)
        scale = (1 - unknown).clamp(min=1e-12).sqrt().reciprocal()
        return self.net.time(label), mixing, scale, _most(self.control, unknown)

    def potential(self, view: View, times: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """G (steps, batch), up to a constant a time, and its gradient in y (steps, batch, d), the guide bounded."""
        e, mixing, scale, most = times
        assert view.guide is not None
        assert view.log_g is not None
        graph = torch.is_grad_enabled()
        with torch.enable_grad():
            y = view.y.to(e)
            y = y if y.requires_grad else y.detach().requires_grad_()
            learned = (self.net(y * as_rows(scale), e) * y).sum(-1)
            (slope,) = torch.autograd.grad(learned.sum(), y, create_graph=graph)
        if not graph:
            learned, slope = learned.detach(), slope.detach()
        value = mixing * learned + (1 - mixing) * view.log_g
        most = as_rows(most).to(view.guide)
        return value, as_rows(mixing) * slope + (1 - as_rows(mixing)) * torch.clamp(view.guide, -most, most)

    def forward(self, view: View, times: tuple[Tensor, ...]) -> Tensor:
        return self.potential(view, times)[1]


# -- known ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Exact(Control):
    """The control of a denoiser that is known: nothing is learned, and what remains is the error of the steps.

    Args:
        denoiser: E[x0 | x0 + sigma n] for the target, in the coordinates in use; or a network trained on data.
    """

    denoiser: Denoiser

    def field(self, inputs: int, dim: int) -> Field:
        return _Exact(self.denoiser)


class _Exact(Field):
    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def times(self, chain: Chain) -> tuple[Tensor, ...]:
        return (chain.unknown.double(),)

    def forward(self, view: View, times: tuple[Tensor, ...]) -> Tensor:
        out = []
        for y, unknown in zip(view.y, times[0].tolist(), strict=True):
            level = min(math.sqrt(unknown / max(1 - unknown, 1e-300)), 1e6)
            x = y * (1 + level**2)  # y = x~ / (1 + sigma^2)
            sigma = torch.full((len(x),), level, dtype=torch.float64, device=y.device)
            out.append((self.denoiser(x, sigma).to(y) - y) / unknown)
        return torch.stack(out)

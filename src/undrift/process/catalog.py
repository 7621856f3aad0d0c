r"""Named processes. Each is its recipe (D, Q, S), a clock, and the start of its auxiliaries, with the paper's symbols.

All of them serve one trained denoiser: they differ in how they carry x0 to noise, not in what must be learned.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from undrift._linalg import as_f64
from undrift.process.clock import Clock, ConstantClock, LinearClock, Number, PowerClock, _positive, number
from undrift.process.families import ClockedProcess, ScalarProcess, auxiliary_start
from undrift.process.recipe import RecipeProcess, validate_recipe

__all__ = ["ALDA", "CLD", "HOLD", "MALDA", "PSLD", "VE", "VP", "FlowMatching", "SubVP"]


def _matrix(rows: list[list[Number]]) -> Tensor:
    return torch.stack([torch.stack([as_f64(entry) for entry in row]) for row in rows])


def _vp_clock() -> Clock:
    return LinearClock(0.1, 20.0)


def _mdm_clock() -> Clock:
    return LinearClock(0.1, 10.0)


@dataclass(frozen=True, eq=False)
class VP(RecipeProcess):
    r"""Variance preserving: :math:`dx = -\frac{\beta}{2} x\,dt + \sqrt\beta\,dw`; D = 1/2, Q = 0, S = 1.

    The only scalar linear process with stationary law N(0, 1). The cosine schedule is ``VP(clock=CosineClock())``.

    References:
        Song et al., Score-Based Generative Modeling through Stochastic Differential Equations, 2021, eq. 11.
    """

    clock: Clock = field(default_factory=_vp_clock)

    def terms(self) -> tuple[Tensor, Tensor, Tensor]:
        one = torch.ones(1, 1, dtype=torch.float64)
        return 0.5 * one, 0.0 * one, one

    def start(self) -> Tensor:
        return torch.zeros(1, 1, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class SubVP(ScalarProcess):
    r"""sub-VP: VP's drift with :math:`GG^\top = \beta(1 - e^{-2B})`.

    The kernel has mean :math:`e^{-B/2}` and deviation :math:`1 - e^{-B}`.

    Drift and noise share no clock, so exponentials of integrals are wrong for it; N(0, 1) is approached, not invariant.

    References:
        Song et al., 2021, eq. 29.
    """

    clock: Clock = field(default_factory=_vp_clock)

    @property
    def horizon(self) -> float:  # type: ignore[override]
        return self.clock.horizon

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self.clock.integral(t))

    def ratio(self, t: Tensor) -> Tensor:
        return 2 * torch.sinh(0.5 * self.clock.integral(t))

    def drift(self, t: object) -> Tensor:
        return -0.5 * self.clock.beta(self._time(t))[..., None, None]

    def diffusion(self, t: object) -> Tensor:
        time = self._time(t)
        return (-self.clock.beta(time) * torch.expm1(-2 * self.clock.integral(time)))[..., None, None]


@dataclass(frozen=True, eq=False)
class VE(ClockedProcess):
    r"""Variance exploding: :math:`z_t = x_0 + \sigma(t) n` with :math:`\sigma(t)^2 = B(t)`; no stationary law.

    The default clock is EDM's, :math:`\sigma(t) = t` up to 80; ``VE(clock=GeometricClock())`` is Song's.

    References:
        Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, 2022, table 1.
    """

    clock: Clock = field(default_factory=PowerClock)

    def matrices(self) -> tuple[Tensor, Tensor]:
        one = torch.ones(1, 1, dtype=torch.float64)
        return 0.0 * one, 0.5 * one

    def start(self) -> Tensor:
        return torch.zeros(1, 1, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class FlowMatching(ScalarProcess):
    r"""The linear interpolant :math:`z_t = (1 - t) x_0 + t n`.

    At t = 1 the data is gone and sigma = t / (1 - t) is infinite, so the horizon is where sigma reaches ``sigma_max``.

    References:
        Lipman et al., Flow Matching for Generative Modeling, 2023; Liu et al., Rectified Flow, 2023.
    """

    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        _positive("sigma_max", "FlowMatching", self.sigma_max)

    @property
    def horizon(self) -> float:  # type: ignore[override]
        return self.sigma_max / (1 + self.sigma_max)

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def ratio(self, t: Tensor) -> Tensor:
        return t / (1 - t)

    def drift(self, t: object) -> Tensor:
        return (-1 / (1 - self._time(t)))[..., None, None]

    def diffusion(self, t: object) -> Tensor:
        time = self._time(t)
        return (2 * time / (1 - time))[..., None, None]


@dataclass(frozen=True, eq=False)
class BrownianBridge(ScalarProcess):
    r"""The bridge to a point: from the data at t = 0 to the origin at t = T, :math:`dx = -x / (T - t)\,dt + s\,dw`.

    :math:`z_t = (1 - t/T)\, x_0 + s \sqrt{t (T - t) / T}\, n`. Run back from data N(0, s^2 T) it is a Brownian motion
    that starts at the origin: the reference of path integral samplers. At T nothing is left, so a sampler of data,
    which divides by m_t, must begin below T.

    Args:
        scale: s; with the default horizon, the deviation of the reference's end.
        horizon: T.

    References:
        Zhang & Chen, Path Integral Sampler, 2022; Föllmer, An Entropy Approach to the Time Reversal of Diffusion
        Processes, 1985.
    """

    scale: float = 1.0
    horizon: float = 1.0

    def __post_init__(self) -> None:
        _positive("scale", "BrownianBridge", self.scale)
        _positive("horizon", "BrownianBridge", self.horizon)

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t / self.horizon

    def ratio(self, t: Tensor) -> Tensor:
        return self.scale * (t / self.alpha(t)).sqrt()

    def drift(self, t: object) -> Tensor:
        return (-1 / (self.horizon - self._time(t)))[..., None, None]

    def diffusion(self, t: object) -> Tensor:
        return (self.scale**2 * torch.ones_like(self._time(t)))[..., None, None]

    def _transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        left = (self.horizon - t) / (self.horizon - s)
        spread = self.scale * ((t - s) * left).clamp(min=0).sqrt()
        left = torch.where(s < self.horizon, left, torch.ones_like(left))
        return left[..., None, None], spread.nan_to_num(0.0)[..., None, None]

    def _weights(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self.alpha(t)
        return alpha / (self.scale**2 * t), alpha.reciprocal().unsqueeze(-1)

    def information(self, t: object) -> tuple[Tensor, Tensor]:
        time = self._time(t)
        return self._weights(time)[0], (self.scale * time).square().reciprocal()

    def time(self, sigma: object) -> Tensor:
        """Inverse of :meth:`sigma`, which reaches every level: T for an infinite one."""
        level = as_f64(sigma)
        if not bool((level > 0).all()):
            raise ValueError(f"BrownianBridge.time: sigma must be positive, got {float(level.detach().min()):g}.")
        return ((self.scale / level).square() + 1 / self.horizon).reciprocal()


class _Augmented(RecipeProcess):
    """Processes with auxiliaries: validated once; auxiliaries start from a multiple of their stationary covariance."""

    aux_scale: Number

    def __post_init__(self) -> None:
        _positive("aux_scale", type(self).__name__, self.aux_scale, strict=False)
        validate_recipe(*self.terms())

    def start(self) -> Tensor:
        s = self.terms()[2]
        return auxiliary_start(as_f64(self.aux_scale) * s[1:, 1:], s.shape[0])


@dataclass(frozen=True, eq=False)
class CLD(_Augmented):
    r"""Critically damped Langevin: D = diag(0, Gamma), Q = [[0, -1], [1, 0]], S = diag(1, M).

    .. math:: dx = \beta M^{-1} m\,dt, \qquad dm = -\beta(x + \Gamma M^{-1} m)\,dt + \sqrt{2\Gamma\beta}\,dw

    Args:
        mass: M.
        friction: Gamma; None for critical damping, Gamma^2 = 4 M.
        aux_scale: gamma; momenta start from N(0, gamma M).
        clock: constant 4 in the paper.

    References:
        Dockhorn, Vahdat & Kreis, Score-Based Generative Modeling with Critically-Damped Langevin Diffusion, 2022,
        eq. 5.
    """

    mass: Number = 0.25
    friction: Number | None = None
    aux_scale: Number = 0.04
    clock: Clock = field(default_factory=lambda: ConstantClock(4.0))

    def __post_init__(self) -> None:
        _positive("mass", "CLD", self.mass)
        super().__post_init__()

    def terms(self) -> tuple[Tensor, Tensor, Tensor]:
        m = as_f64(self.mass)
        friction = 2 * m.sqrt() if self.friction is None else as_f64(self.friction)
        return _matrix([[0, 0], [0, friction]]), _matrix([[0, -1], [1, 0]]), _matrix([[1, 0], [0, m]])


@dataclass(frozen=True, eq=False)
class PSLD(_Augmented):
    r"""Phase-space Langevin: D = 1/2 diag(Gamma, M nu), Q = 1/2 [[0, -1], [1, 0]], S = diag(1, M).

    .. math::
        dx = \tfrac{\beta}{2}(-\Gamma x + M^{-1} m)\,dt + \sqrt{\beta\Gamma}\,dw_1, \qquad
        dm = \tfrac{\beta}{2}(-x - \nu m)\,dt + \sqrt{\beta M \nu}\,dw_2

    Args:
        gamma: Gamma, friction and noise on the data; 0 gives CLD.
        nu: friction of the momenta.
        inverse_mass: 1/M; None for critical damping, 4/M = (Gamma - nu)^2.
        aux_scale: the paper's gamma ("kappa" in its configurations); momenta start from N(0, gamma M).
        clock: constant 8 in the paper.

    References:
        Pandey & Mandt, A Complete Recipe for Diffusion Generative Models, 2023, eq. 6-7.
    """

    gamma: Number = 0.01
    nu: Number = 4.01
    inverse_mass: Number | None = None
    aux_scale: Number = 0.04
    clock: Clock = field(default_factory=lambda: ConstantClock(8.0))

    def __post_init__(self) -> None:
        _positive("gamma", "PSLD", self.gamma, strict=False)
        _positive("nu", "PSLD", self.nu, strict=False)
        if self.inverse_mass is not None:
            _positive("inverse_mass", "PSLD", self.inverse_mass)
        elif number(self.gamma) == number(self.nu):
            raise ValueError(
                f"PSLD: gamma = nu = {number(self.nu):g} has no critically damped mass, (gamma - nu)^2 = 4/M; "
                "give inverse_mass."
            )
        super().__post_init__()

    def terms(self) -> tuple[Tensor, Tensor, Tensor]:
        g, n = as_f64(self.gamma), as_f64(self.nu)
        m = 4 / (g - n) ** 2 if self.inverse_mass is None else 1 / as_f64(self.inverse_mass)
        return 0.5 * _matrix([[g, 0], [0, m * n]]), 0.5 * _matrix([[0, -1], [1, 0]]), _matrix([[1, 0], [0, m]])


@dataclass(frozen=True, eq=False)
class ALDA(_Augmented):
    r"""Accelerated (third-order) Langevin.

    Q = [[0, -1/l, 0], [1/l, 0, -a], [0, a, 0]], D = diag(0, 0, xi/l), S = diag(1, 1/l, 1/l).

    Args:
        lipschitz: l; auxiliaries are stationary at N(0, 1/l).
        coupling: a, between velocity and acceleration.
        xi: friction of the acceleration.
        aux_scale: auxiliaries start from this multiple of their stationary covariance.

    References:
        Mou et al., High-Order Langevin Diffusion, 2021, as used by Singhal et al., Where to Diffuse, 2023.
    """

    lipschitz: Number = 1.0
    coupling: Number = 1.0
    xi: Number = 1.0
    aux_scale: Number = 0.01
    clock: Clock = field(default_factory=_mdm_clock)

    def __post_init__(self) -> None:
        for name in ("lipschitz", "xi"):
            _positive(name, "ALDA", getattr(self, name))
        super().__post_init__()

    def terms(self) -> tuple[Tensor, Tensor, Tensor]:
        s, a, xi = 1 / as_f64(self.lipschitz), as_f64(self.coupling), as_f64(self.xi)
        q = _matrix([[0, -s, 0], [s, 0, -a], [0, a, 0]])
        return _matrix([[0, 0, 0], [0, 0, 0], [0, 0, xi * s]]), q, _matrix([[1, 0, 0], [0, s, 0], [0, 0, s]])


@dataclass(frozen=True, eq=False)
class HOLD(_Augmented):
    r"""Critically damped third-order Langevin: one triple eigenvalue :math:`-\sqrt 3`.

    ALDA's couplings with a = 2 sqrt(2) and xi = 3 sqrt(3), for which :math:`(A + \sqrt 3 I)^3 = 0`: the fastest
    convergence a chain of three can have.

    Args:
        aux_scale: auxiliaries start from this multiple of their stationary covariance.
    """

    aux_scale: Number = 0.01
    clock: Clock = field(default_factory=_mdm_clock)

    def terms(self) -> tuple[Tensor, Tensor, Tensor]:
        a, xi = 2 * 2**0.5, 3 * 3**0.5
        q = _matrix([[0, -1, 0], [1, 0, -a], [0, a, 0]])
        return _matrix([[0, 0, 0], [0, 0, 0], [0, 0, xi]]), q, torch.eye(3, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class MALDA(_Augmented):
    r"""Modified accelerated Langevin: every pair coupled, Q_ij = -1 for i < j, D = diag(0, G, ..., G), G = 2 sqrt(M).

    Args:
        auxiliaries: number of auxiliaries per data coordinate, K - 1; one gives CLD.
        mass: M, stationary variance of the auxiliaries.
        aux_scale: auxiliaries start from this multiple of their stationary covariance.

    References:
        Singhal, Goldstein & Ranganath, Where to Diffuse, How to Diffuse, and How to Get Back, 2023.
    """

    auxiliaries: int = 2
    mass: Number = 1.0
    aux_scale: Number = 0.01
    clock: Clock = field(default_factory=_mdm_clock)

    def __post_init__(self) -> None:
        if self.auxiliaries < 1:
            raise ValueError(f"MALDA: auxiliaries must be at least 1, got {self.auxiliaries}.")
        _positive("mass", "MALDA", self.mass)
        super().__post_init__()

    def terms(self) -> tuple[Tensor, Tensor, Tensor]:
        k, m = self.auxiliaries + 1, as_f64(self.mass)
        upper = torch.triu(torch.ones(k, k, dtype=torch.float64), 1)
        data = torch.zeros(k, dtype=torch.float64)
        data[0] = 1.0
        return torch.diag((1 - data) * 2 * m.sqrt()), upper.T - upper, torch.diag(data + (1 - data) * m)

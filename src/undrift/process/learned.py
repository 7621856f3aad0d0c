r"""A linear process whose matrices, and clock if asked, are learned with the model.

.. math:: dz = -\beta(t) (D + Q) S^{-1} z\,dt + \sqrt{2 \beta(t) D}\,dw

Parameters, all unconstrained, float64:

    Q = W - W'               skew by construction
    D = L L' + floor I       positive definite by construction, so the process converges to N(0, S) whatever they are
    S = R R' + floor I       if learned; the stationary covariance
    start = P P' + floor I   if learned; the auxiliaries' start
    beta                     if learned; piecewise linear and positive, see LearnedClock

Not all of them matter: auxiliaries may be transformed among themselves without any effect on the data channel. Where
S and the start are both multiples of the identity there, rotations are free; see :attr:`LearnedProcess.degrees`.

References:
    Singhal, Goldstein & Ranganath, Where to Diffuse, How to Diffuse, and How to Get Back, 2023, section 3 (Q and a
    diagonal D learned).
    Ma, Chen & Fox, A Complete Recipe for Stochastic Gradient MCMC, 2015.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from undrift._linalg import as_f64, psd_sqrt
from undrift.process.clock import Clock, LinearClock
from undrift.process.families import auxiliary_start
from undrift.process.recipe import Recipe, RecipeProcess, validate_recipe

__all__ = ["LearnedClock", "LearnedProcess"]

Matrix = Tensor | list[list[float]]

Part = Literal["Q", "D", "S", "start", "clock"]


class LearnedClock(nn.Module, Clock):
    r"""A clock with a rate that is piecewise linear between learned positive values at equally spaced times.

    :math:`B` is then piecewise quadratic, increasing by construction, with a continuous derivative, and closed: nothing
    is integrated numerically. Two values make a :class:`LinearClock`.

    Args:
        rates: beta at the times 0, T/n, ..., T: n + 1 positive numbers.
        horizon: end time T.
    """

    def __init__(self, rates: list[float] | Tensor, horizon: float = 1.0) -> None:
        super().__init__()
        values = as_f64(rates).detach()
        if values.ndim != 1 or len(values) < 2 or not bool((values.isfinite() & (values > 0)).all()):
            raise ValueError(f"LearnedClock: rates must be two or more positive finite numbers, got {values.tolist()}.")
        if not 0 < horizon < math.inf:
            raise ValueError(f"LearnedClock: horizon must be positive and finite, got {horizon}.")
        self.horizon = float(horizon)
        self.log_rates = nn.Parameter(values.log())
        self._begun = values.log(), values

    @classmethod
    def like(cls, clock: Clock, knots: int = 9) -> LearnedClock:
        """The learned clock that agrees with ``clock`` at ``knots`` times.

        Raises:
            ValueError: if that clock stands still or is infinitely fast at one of them.
        """
        if knots < 2:
            raise ValueError(f"LearnedClock: knots must be at least 2, got {knots}.")
        rates = clock.beta(torch.linspace(0.0, clock.horizon, knots, dtype=torch.float64)).detach()
        if not bool((rates.isfinite() & (rates > 0)).all()):
            raise ValueError(
                f"LearnedClock: the rate of {type(clock).__name__} is not positive and finite at all of the {knots} "
                f"knots: {rates.tolist()}; begin with another clock, such as LinearClock."
            )
        return cls(rates, clock.horizon)

    @property
    def config(self) -> Mapping[str, Any]:
        """Constructor arguments that make this clock as it stands; to the bit those given, until it is trained."""
        raw, given = self._begun
        now = self.log_rates.detach()
        return {"rates": (given if torch.equal(raw, now) else now.exp()).tolist(), "horizon": self.horizon}

    def _apply(self, fn: Any, recurse: bool = True) -> LearnedClock:
        return self  # coefficients stay in float64 on the CPU, wherever the model goes

    def _place(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rates (n + 1,), the interval that t lies in, and where in it, in [0, 1]."""
        rates = self.log_rates.exp()
        scaled = t * ((len(rates) - 1) / self.horizon)
        interval = scaled.detach().floor().long().clamp(0, len(rates) - 2)
        return rates, interval, scaled - interval

    def beta(self, t: Tensor) -> Tensor:
        rates, i, u = self._place(t)
        return torch.lerp(rates[i], rates[i + 1], u)

    def integral(self, t: Tensor) -> Tensor:
        rates, i, u = self._place(t)
        width = self.horizon / (len(rates) - 1)
        past = torch.nn.functional.pad((0.5 * width * (rates[1:] + rates[:-1])).cumsum(0), (1, 0))
        return past[i] + width * u * (rates[i] + 0.5 * u * (rates[i + 1] - rates[i]))


class LearnedProcess(nn.Module, RecipeProcess):
    """A process with K channels whose (D, Q), and on request S, auxiliary start and clock, are parameters.

    The arguments are where it begins, and :attr:`config` gives them as they stand, so a trained process is saved and
    loaded like any of the catalog. It samples like any of them too: everything a sampler needs follows from the
    matrices.

    Args:
        channels: K; with K = 1 there is only the noise to learn, and the clock.
        Q: mixing, (K, K) skew-symmetric; None for -1/2 above the diagonal, every pair coupled as in MALDA.
        D: noise, (K, K), above ``floor`` in every direction; None for I/2, so that K = 1 begins as VP.
        S: stationary covariance, (K, K) positive definite; None for the identity.
        start_cov: covariance of the auxiliaries at t = 0, (K - 1, K - 1), or a number: that multiple of the identity.
        clock: common clock of D and Q; with "clock" in ``learn`` any clock begins a LearnedClock of ``knots`` knots.
        learn: which of "Q", "D", "S", "start", "clock" are trained.
        floor: least eigenvalue of D, and of S and the start if learned.
        knots: of the learned clock.

    Raises:
        ValueError: if the arguments make no convergent process, or begin below the floor.
    """

    Q_raw: Tensor
    D_raw: Tensor
    S_raw: Tensor
    start_raw: Tensor
    clock: Clock

    def __init__(
        self,
        channels: int = 2,
        Q: Matrix | None = None,
        D: Matrix | None = None,
        S: Matrix | None = None,
        start_cov: Matrix | float = 0.01,
        clock: Clock | None = None,
        learn: tuple[Part, ...] = ("Q", "D"),
        floor: float = 1e-3,
        knots: int = 9,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"LearnedProcess: channels must be at least 1, got {channels}.")
        unknown = [part for part in learn if part not in get_args(Part)]
        if unknown or len(set(learn)) < len(learn):
            raise ValueError(
                f"LearnedProcess: learn may name each of {', '.join(get_args(Part))} once, got {list(learn)}."
            )
        if not 0 < floor < math.inf:
            raise ValueError(f"LearnedProcess: floor must be positive, got {floor}.")
        self.learn, self.floor, self.knots = tuple(learn), float(floor), knots
        eye = torch.eye(channels, dtype=torch.float64)
        upper = torch.triu(torch.ones_like(eye), 1)
        q = 0.5 * (upper.mT - upper) if Q is None else as_f64(Q).detach()
        d = 0.5 * eye if D is None else as_f64(D).detach()
        s = eye if S is None else as_f64(S).detach()
        for name, m in (("Q", q), ("D", d), ("S", s)):
            if m.shape != eye.shape:
                raise ValueError(f"LearnedProcess: {name} must be {tuple(eye.shape)}, got shape {tuple(m.shape)}.")
        validate_recipe(d, q, s)
        start = auxiliary_start(as_f64(start_cov), channels).detach()[1:, 1:]
        self._add("Q_raw", 0.5 * q, "Q")
        self._add("D_raw", self._above_floor("D", d), "D")
        self._add("S_raw", self._above_floor("S", s) if "S" in learn else s, "S")
        learn_start = "start" in learn and channels > 1
        self._add("start_raw", self._above_floor("start_cov", start) if learn_start else start, "start")
        clock = clock or LinearClock(0.1, 10.0)
        if "clock" in learn and not isinstance(clock, LearnedClock):
            clock = LearnedClock.like(clock, knots)
        if isinstance(clock, LearnedClock):
            clock.requires_grad_("clock" in learn)
        self.clock = clock
        given = {"Q": q, "D": d, "S": s, "start_cov": start}
        self._begun = {k: v.detach().clone() for k, v in self.state_dict().items()}, given

    @classmethod
    def like(cls, process: RecipeProcess, **settings: Any) -> LearnedProcess:
        """The learned process that begins at one of the catalog, on its clock.

        Where that one has no noise its D is raised to twice the floor: below, a learned D cannot go.

        Args:
            process: any process made by the recipe.
            settings: other arguments of the constructor.
        """
        d, q, s = (m.detach() for m in process.terms())
        k, floor = len(d), settings.get("floor", 1e-3)
        d = d + max(0.0, 2 * floor - float(torch.linalg.eigvalsh(d)[0])) * torch.eye(k, dtype=d.dtype)
        start = process.start().detach()[1:, 1:]
        return cls(k, q, d, s, **{"start_cov": start, "clock": process.clock, **settings})

    @classmethod
    def random(cls, channels: int, seed: int = 0, **settings: Any) -> LearnedProcess:
        """The start of Singhal et al.: Q = W - W' and D diagonal, softplus of W and of delta uniform in +-1/sqrt(K).

        Args:
            channels: K.
            seed: of W and delta.
            settings: other arguments of the constructor.
        """
        generator = torch.Generator().manual_seed(seed)
        bound = channels**-0.5
        w = torch.empty(channels, channels, dtype=torch.float64).uniform_(-bound, bound, generator=generator)
        delta = torch.empty(channels, dtype=torch.float64).uniform_(-bound, bound, generator=generator)
        return cls(channels, w - w.mT, torch.diag(torch.nn.functional.softplus(delta) + 1e-3), **settings)

    def _apply(self, fn: Any, recurse: bool = True) -> LearnedProcess:
        return self  # coefficients stay in float64 on the CPU, wherever the model goes

    def _add(self, name: str, value: Tensor, part: str) -> None:
        if part in self.learn and value.numel():
            self.register_parameter(name, nn.Parameter(value.clone(memory_format=torch.contiguous_format)))
        else:
            self.register_buffer(name, value.clone(memory_format=torch.contiguous_format))

    def _above_floor(self, name: str, m: Tensor) -> Tensor:
        """Root of m - floor I."""
        if m.numel() == 0:
            return m
        low = float(torch.linalg.eigvalsh(m)[0])
        if low < self.floor * (1 - 1e-9):
            raise ValueError(
                f"LearnedProcess: {name} must be above floor = {self.floor:g} in every direction to begin with; its "
                f"smallest eigenvalue is {low:.3g}. Raise it there (LearnedProcess.like does), or lower floor."
            )
        return psd_sqrt(m - self.floor * torch.eye(len(m), dtype=m.dtype))

    def _from_root(self, root: Tensor) -> Tensor:
        return root @ root.mT + self.floor * torch.eye(len(root), dtype=root.dtype)

    @property
    def channels(self) -> int:  # type: ignore[override]
        return self.Q_raw.shape[0]

    def terms(self) -> tuple[Tensor, Tensor, Tensor]:
        s = self._from_root(self.S_raw) if "S" in self.learn else self.S_raw
        return self._from_root(self.D_raw), self.Q_raw - self.Q_raw.mT, s

    def start(self) -> Tensor:
        raw = self.start_raw
        block = self._from_root(raw) if "start" in self.learn and raw.numel() else raw
        return torch.nn.functional.pad(block, (1, 0, 1, 0))

    @property
    def config(self) -> Mapping[str, Any]:
        """Constructor arguments that make this process as it stands; to the bit those given, until it is trained."""
        raw, matrices = self._begun
        if not all(torch.equal(raw[k], v) for k, v in self.state_dict().items()):
            d, q, s = (m.detach() for m in self.terms())
            start = self.start().detach()[1:, 1:]
            matrices = {"Q": q, "D": 0.5 * (d + d.mT), "S": 0.5 * (s + s.mT), "start_cov": start}
        return {
            "channels": self.channels,
            **matrices,
            "clock": self.clock,
            "learn": list(self.learn),
            "floor": self.floor,
            "knots": self.knots,
        }

    def frozen(self) -> Recipe:
        """The process as it stands, with nothing left to learn."""
        d, q, s = (m.detach() for m in self.terms())
        clock = copy.deepcopy(self.clock)
        if isinstance(clock, LearnedClock):
            clock.requires_grad_(False)
        return Recipe(0.5 * (d + d.mT), q, 0.5 * (s + s.mT), clock, self.start().detach()[1:, 1:])

    @property
    def degrees(self) -> int:
        """Free parameters once those are taken off that the data channel cannot tell apart.

        Q has K (K - 1)/2, D and S K (K + 1)/2 each, the start m (m + 1)/2 with m = K - 1, the clock its knots. Where Q
        and D are both learned, auxiliaries may be mapped among themselves by whatever leaves the parts that are *not*
        learned as they are: rotations, m (m - 1)/2 of them, if S and the start are multiples of the identity there; any
        invertible matrix, m^2, if both are learned. And the scale of a learned clock is that of D and Q.
        """
        k, m = self.channels, self.channels - 1
        sizes = {"Q": k * m // 2, "D": k * (k + 1) // 2, "S": k * (k + 1) // 2, "start": m * (m + 1) // 2}
        total = sum(size for part, size in sizes.items() if part in self.learn)
        total += len(self.clock.log_rates) if isinstance(self.clock, LearnedClock) and "clock" in self.learn else 0
        if "Q" not in self.learn or "D" not in self.learn:
            return total
        # Generators X of the maps exp(X): X C + C X' = 0 for each covariance C that is fixed, X c = 0 for S's column c.
        basis = torch.eye(m * m, dtype=torch.float64).reshape(m * m, m, m)
        fixed = [part for part in ("S", "start") if part not in self.learn]
        rows = [torch.zeros(m * m, 1, dtype=torch.float64)]
        for part in fixed:
            c = (self.terms()[2] if part == "S" else self.start()).detach()
            moved = basis @ c[1:, 1:]
            rows += [(moved + moved.mT).flatten(1), (basis @ c[1:, :1]).flatten(1)]
        gauge = m * m - int(torch.linalg.matrix_rank(torch.cat(rows, 1))) if m else 0
        return total - gauge - ("clock" in self.learn)

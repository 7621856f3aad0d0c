r"""What designs minimise: the exact error of a sampler, as a function of its times and its process.

.. math:: f(t, \theta) = \frac1J \sum_j \ln W_2\bigl(\text{data}_j,\ \text{plan}(t, \theta)\bigr)
    + \text{trust} \cdot \sum_i \text{strangeness}_i

(or the same of the KL divergence). The law of a plan is exact and differentiable, so L-BFGS needs nothing else. Times
are written as numbers without constraints: a start, an end, and the shares that the steps have of what lies between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from undrift.design.gaussian import Law, examine, propagate
from undrift.design.score_error import ScoreError
from undrift.design.spectrum import Spectrum
from undrift.process.linear import LinearProcess
from undrift.sample.plan import TableSampler

__all__ = ["Descent", "Metric", "Objective", "Times"]

Metric = Literal["w2", "kl"]
Numbers = NDArray[np.float64]

_GROUPS = 64  # eigenvalues that a spectrum is reduced to while it is designed for
_WALL = 1e6  # value of a plan that cannot be made, or does not stay finite
_SHARE = 1e-4  # least share of a step: tables have no limit where steps vanish
_EDGE = 1e-3  # ends begin no closer to their bounds than this part of the range, where the logistic has a slope


class Objective:
    """The mean log of a metric over a family of spectra, and ``trust`` times the strangeness.

    Args:
        sampler: with its number of steps.
        spectra: one, or a family.
        metric: "w2" or "kl".
        error: of the denoiser; None for an exact one.
        trust: weight of the strangeness.
        resolution: noise level at which laws are compared.

    Raises:
        ValueError: for arguments that cannot be used.
    """

    def __init__(
        self,
        sampler: TableSampler,
        spectra: Spectrum | Sequence[Spectrum],
        metric: Metric,
        error: ScoreError | None,
        trust: float,
        resolution: float,
    ) -> None:
        self.spectra = [spectra] if isinstance(spectra, Spectrum) else list(spectra)
        if not self.spectra:
            raise ValueError("design: give at least one spectrum.")
        if metric not in ("w2", "kl"):
            raise ValueError(f"design: metric must be 'w2' or 'kl', got {metric!r}.")
        if not 0 <= trust < math.inf:
            raise ValueError(f"design: trust must be finite and not negative, got {trust}.")
        if not 0 <= resolution < math.inf:
            raise ValueError(f"design: resolution must be a noise level, finite and not negative, got {resolution}.")
        self.sampler, self.metric, self.error, self.trust, self.resolution = sampler, metric, error, trust, resolution
        self._groups = [s.grouped(_GROUPS) for s in self.spectra]
        # An exact denoiser treats an eigenvalue alike whatever the others are: one walk serves the family.
        self._walks = self._groups if error is not None else [_joined(self._groups)]

    def parts(self, process: LinearProcess, times: Tensor) -> tuple[Tensor, Tensor]:
        """Log of the metric on each spectrum, (J,), and the strangeness, a number; spectra reduced to groups."""
        plan = self.sampler.table(process, times)
        if not self.trust:
            laws, strange = [propagate(plan, s, self.error) for s in self._walks], torch.zeros((), dtype=torch.float64)
        else:
            walks = [examine(plan, s, self.error) for s in self._walks]
            laws = [law for law, _ in walks]
            weights = torch.tensor([s.dim for s in self._walks], dtype=torch.float64)
            strange = (weights / weights.sum()) @ torch.stack([calls.sum() for _, calls in walks])
        each = torch.cat([self._modes(law) for law in laws])
        return self._log(each, self._groups), strange

    def __call__(self, process: LinearProcess, times: Tensor) -> Tensor:
        """The objective, differentiable in times and process."""
        logs, strange = self.parts(process, times)
        return logs.mean() + self.trust * strange

    def report(self, process: LinearProcess, times: Tensor) -> tuple[tuple[float, ...], float]:
        """The metric on each whole spectrum, and the strangeness over the family."""
        with torch.no_grad():
            plan = self.sampler.table(process, times)
            walks = [examine(plan, s, self.error) for s in self.spectra]
            each = torch.cat([self._modes(law) for law, _ in walks])
            total = sum(s.dim * float(calls.sum()) for s, (_, calls) in zip(self.spectra, walks, strict=True))
        return tuple(self._log(each, self.spectra).exp().tolist()), total / sum(s.dim for s in self.spectra)

    def _modes(self, law: Law) -> Tensor:
        seen = law.smoothed(self.resolution) if self.resolution else law
        return seen.spectrum._count * (seen.w2_modes if self.metric == "w2" else seen.kl_modes)

    def _log(self, each: Tensor, spectra: list[Spectrum]) -> Tensor:
        sums = torch.stack([part.sum() for part in each.split([len(s.variance) for s in spectra])])
        return sums.clamp(min=1e-300).log() * (0.5 if self.metric == "w2" else 1.0)


def _joined(spectra: list[Spectrum]) -> Spectrum:
    return Spectrum(
        torch.cat([s.variance for s in spectra]),
        torch.cat([s._mean for s in spectra]),
        torch.cat([s._count for s in spectra]),
    )


@dataclass(frozen=True, eq=False)
class Times:
    """Decreasing times from numbers without constraints (size,), and back.

    Attributes:
        nodes: how many times.
        sigma_max, sigma_min: noise levels between which they lie, or sigma(T) if that is below ``sigma_max``.
        free_start, free_end: whether the first and the last may leave their ends of the range.
        log_times: the range in log t, for a process that stays as it is. None for one that changes: the numbers then
            stand for noise levels, which mean the same to all processes.
    """

    nodes: int
    sigma_max: float
    sigma_min: float
    free_start: bool
    free_end: bool
    log_times: tuple[float, float] | None = None

    @classmethod
    def of(
        cls,
        process: LinearProcess,
        nodes: int,
        sigma_max: float,
        sigma_min: float,
        free_start: bool,
        free_end: bool,
        changes: bool,
    ) -> Times:
        """Those of a process, which ``changes`` or not.

        Raises:
            ValueError: for levels that the process does not reach, or times that have no freedom.
        """
        with torch.no_grad():
            top = float(process.sigma(process.horizon))
            if not 0 < sigma_min < sigma_max < math.inf:
                raise ValueError(f"design: needs 0 < sigma_min < sigma_max < inf, got {sigma_min:g} and {sigma_max:g}.")
            if not sigma_min < top:
                raise ValueError(
                    f"design: {type(process).__name__} reaches no more than sigma = {top:g}, which is not above "
                    f"sigma_min = {sigma_min:g}; lower sigma_min, or take a process with more noise."
                )
            if not changes:
                if max(0, nodes - 2) + free_start + free_end == 0:
                    raise ValueError(
                        f"design: {nodes} times between fixed ends leave nothing to choose; free an end, or add steps."
                    )
                levels = torch.tensor([sigma_min, min(sigma_max, top)], dtype=torch.float64)
                low, high = process.time(levels).log().tolist()
                return cls(nodes, sigma_max, sigma_min, free_start, free_end, (low, high))
        return cls(nodes, sigma_max, sigma_min, free_start, free_end)

    @property
    def size(self) -> int:
        """How many numbers: a share for each step, and one for each end that is free; one for a single time."""
        return 1 if self.nodes == 1 else self.nodes - 1 + self.free_start + self.free_end

    def _range(self, process: LinearProcess) -> tuple[Tensor, Tensor]:
        if self.log_times is not None:
            low, high = torch.tensor(self.log_times, dtype=torch.float64)
        else:
            top = process.sigma(process.horizon).log()
            low, high = torch.tensor([self.sigma_min, self.sigma_max], dtype=torch.float64).log()
            high = torch.minimum(high, top)
        return low, high

    def __call__(self, process: LinearProcess, v: Tensor) -> Tensor:
        """Times (nodes,) of the numbers (size,)."""
        low, high = self._range(process)
        start, end = high, low
        if self.nodes == 1 or self.free_start:
            v, raw = v[:-1], v[-1]
            start = high - (high - low) * torch.sigmoid(raw)
        if self.nodes > 1 and self.free_end:
            v, raw = v[:-1], v[-1]
            end = low + (start - low) * torch.sigmoid(raw)
        share = _SHARE + (1 - _SHARE * (self.nodes - 1)) * v.softmax(0)
        places = torch.cat([start.reshape(1), start - (start - end) * share.cumsum(0)]).exp()
        if self.log_times is not None:
            return places
        return process.time(places)

    def back(self, process: LinearProcess, times: Tensor) -> Tensor:
        """The numbers that give these times, ends moved inside the range."""
        low, high = (float(bound.detach()) for bound in self._range(process))
        places = times if self.log_times is not None else process.sigma(times)
        places = places.detach().log().clamp(low, high)

        def logit(u: float) -> Tensor:
            u = min(max(u, _EDGE), 1 - _EDGE)
            return torch.tensor([math.log(u / (1 - u))], dtype=torch.float64)

        parts = []
        start = float(places[0]) if self.nodes == 1 or self.free_start else high
        if self.nodes > 1:
            end = float(places[-1]) if self.free_end else low
            steps = -torch.cat([torch.tensor([start]), places[1:-1], torch.tensor([end])]).diff()
            share = (steps / max(start - end, 1e-12)).clamp(min=2 * _SHARE)
            share = (share / share.sum() - _SHARE) / (1 - _SHARE * (self.nodes - 1))
            parts.append(share.clamp(min=1e-6).log())
            if self.free_end:
                parts.append(logit((end - low) / max(start - low, 1e-12)))
        if self.nodes == 1 or self.free_start:
            parts.append(logit((high - start) / (high - low)))
        return torch.cat(parts)


class Descent:
    """L-BFGS on an objective, over the times of a process and, if any, its parameters.

    Args:
        objective: to be minimised.
        process: its parameters that need gradients are varied with the times; they are changed in place.
        times: of the process.
        parameters: those to vary.
    """

    def __init__(
        self,
        objective: Objective,
        process: LinearProcess,
        times: Times,
        parameters: Sequence[torch.nn.Parameter] = (),
    ) -> None:
        self.objective, self.process, self.times, self.parameters = objective, process, times, list(parameters)
        self.evaluations = 0

    def numbers(self, times: Tensor) -> Numbers:
        """The numbers of these times and of the parameters as they stand."""
        raw = self.times.back(self.process, times)
        found: Numbers = torch.cat([raw, *(p.detach().flatten() for p in self.parameters)]).numpy()
        return found

    def place(self, flat: Numbers) -> Tensor:
        """Set the parameters; the times that the numbers stand for."""
        raw = self._place(flat)
        with torch.no_grad():
            return self.times(self.process, raw)

    def _place(self, flat: Numbers) -> Tensor:
        raw, *rest = torch.from_numpy(flat.copy()).split([self.times.size, *(p.numel() for p in self.parameters)])
        for p, part in zip(self.parameters, rest, strict=True):
            p.data.copy_(part.reshape(p.shape))
        return raw

    def value(self, flat: Numbers) -> tuple[float, Numbers]:
        """The objective and its gradient; a wall where there is no plan, or its law is not finite."""
        self.evaluations += 1
        raw = self._place(flat).requires_grad_(True)
        inputs = [raw, *self.parameters]
        try:
            with torch.enable_grad():
                value = self.objective(self.process, self.times(self.process, raw))
            gradients = torch.autograd.grad(value, inputs, allow_unused=True)
        except (ValueError, torch.linalg.LinAlgError):  # times that coincide, or a process on the brink
            return _WALL, np.zeros_like(flat)
        filled = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, inputs, strict=True)]
        gradient: Numbers = torch.cat([g.flatten() for g in filled]).numpy()
        if not (math.isfinite(float(value.detach())) and bool(np.isfinite(gradient).all())):
            return _WALL, np.zeros_like(flat)
        return float(value.detach()), gradient

    def run(self, flat: Numbers, iterations: int) -> tuple[float, Numbers, int]:
        """The lowest value found within so many iterations, its numbers, and how many iterations there were."""
        result = minimize(
            self.value,
            flat,
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": iterations, "maxfun": 2 * iterations, "maxcor": 20, "ftol": 1e-12, "gtol": 1e-7},
        )
        return float(result.fun), result.x, int(result.nit)

r"""LogVariance towards a target that moves: as far from the present path measure as a bound on divergence allows.

References:
    Blessing et al., Trust Region Constrained Measure Transport, 2025.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from undrift.density.controlled.diffusion import Paths, Scheme, Tables
from undrift.density.controlled.objective import (
    Objective,
    Runner,
    Work,
    centred,
    facts,
    join_paths,
    lost,
)

__all__ = ["TrustRegion", "tempering"]


@dataclass(frozen=True, eq=False)
class TrustRegion(Objective):
    r"""LogVariance towards :math:`F_{old}^{1-\eta} (\gamma B)^\eta`, on a buffer of paths of F_old.

    The next path density is as near to the target's as a divergence of ``bound`` from the present one allows; eta comes
    from the weights of the buffer by bisection. Between two refreshments the target is not asked at all.

    It trains the forward control alone: noise, process and backward kernels have to be fixed.

    Args:
        bound: largest divergence of the next path measure from the present one, in nats.
        buffer: paths that are kept.
        refresh: steps between two refreshments.
    """

    bound: float = 0.1
    buffer: int = 4096
    refresh: int = 100

    def __post_init__(self) -> None:
        if not self.bound > 0:
            raise ValueError(f"TrustRegion: bound must be positive, got {self.bound}.")
        for key in ("buffer", "refresh"):
            if getattr(self, key) < 1:
                raise ValueError(f"TrustRegion: {key} must be at least 1, got {getattr(self, key)}.")

    def validate(self, scheme: Scheme, batch: int) -> None:
        super().validate(scheme, batch)
        if scheme.backward is not None or scheme.annealed:
            raise ValueError(
                "TrustRegion: trains the forward control towards fixed backward kernels, and these have a control of "
                "their own; take LogVariance or LogDerivative, or a diffusion with backward: null, annealed: false."
            )

    def runner(self, work: Work) -> Runner:
        return _TrustRunner(self, work)


def tempering(log_w: Tensor, bound: float) -> float:
    """Largest eta in [0, 1] for which the weights w^eta diverge from equal ones by no more than ``bound`` nats."""
    log_w = log_w[torch.isfinite(log_w)].double()

    def divergence(eta: float) -> float:
        p = (eta * log_w).log_softmax(0)
        return float((p.exp() * p).sum()) + math.log(len(log_w))

    if divergence(1.0) <= bound:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if divergence(middle) <= bound else (low, middle)
    return low


class _TrustRunner(Runner):
    def __init__(self, objective: TrustRegion, work: Work) -> None:
        self.objective, self.work = objective, work
        self.paths: Paths | None = None
        self.old = self.log_w = torch.zeros(0)
        self.eta, self.age, self.facts = 0.0, 0, {"loss": math.nan}

    def step(self) -> dict[str, float]:
        work, tables = self.work, self.work.tables()
        if self.paths is None or self.age >= self.objective.refresh:
            log_w = self._refresh(tables)
            if self.paths is None:
                return lost(log_w)
        generator, pieces = work.generator, work.pieces(tables)
        index = torch.randint(len(self.old), (work.batch,), generator=generator, device=generator.device)
        paths, old, log_w = self.paths.take(index), self.old[index], self.log_w[index]
        kernels = None
        if len(pieces) == 1:
            kernels = self._forward(tables, pieces[0], paths)
            forward = self._start(tables, paths) + kernels.detach().double()
        else:
            forward = self._whole(tables, paths)
        miss, count = centred(forward - old - self.eta * log_w, 1)
        c = 2 * miss / (count - 1).clamp(min=1)
        for at in pieces:
            part = self._forward(tables, at, paths) if kernels is None else kernels
            (c.to(part) * part).sum().backward(retain_graph=at.stop < tables.chain.steps)
        self.age += 1
        return {**self.facts, "loss": float((0.5 * c * miss).sum()), "eta": self.eta}

    def _forward(self, tables: Tables, at: slice, paths: Paths) -> Tensor:
        """log F of the steps ``at``, (batch,)."""
        z = paths.z[at.start : at.stop + 1]
        value = None if paths.value is None else paths.value[at]
        score = None if paths.score is None else paths.score[at]
        control = self.work.diffusion.forward_control(tables, at, z[:-1], value, score)
        return tables.chain.log_forward(at, z, control).sum(0)

    def _start(self, tables: Tables, paths: Paths) -> Tensor:
        return self.work.diffusion.log_start(tables, paths.z[0]).double()

    @torch.no_grad()
    def _whole(self, tables: Tables, paths: Paths) -> Tensor:
        """log F of paths, (batch,), without a graph."""
        total = self._start(tables, paths)
        for at in self.work.pieces(tables):
            total = total + self._forward(tables, at, paths).double()
        return total

    def _refresh(self, tables: Tables) -> Tensor:
        """Walk the buffer anew: log w of all its paths; without a usable one, none are kept."""
        work = self.work
        parts, walked = [], 0
        while walked < self.objective.buffer:
            n = min(max(work.batch, 1024), self.objective.buffer - walked)
            parts.append(work.walk(tables, n))
            walked += n
        paths = parts[0]
        for part in parts[1:]:
            paths = join_paths(paths, part)
        with torch.no_grad():
            log_w = work.diffusion.log_weights(tables, paths, work.chunk)
        good = torch.isfinite(log_w).nonzero().squeeze(-1)
        if len(good) == 0:
            self.paths = None
            return log_w
        self.paths = paths._replace(control=None).take(good)
        self.log_w, self.age = log_w[good], 0
        self.old = self._whole(tables, self.paths)
        self.eta = tempering(self.log_w, self.objective.bound)
        self.facts = facts(math.nan, log_w)
        return log_w

    def state(self) -> Mapping[str, Tensor]:
        if self.paths is None:
            return {}
        found = {name: part for name, part in self.paths._asdict().items() if part is not None}
        more = {"old": self.old, "log_w": self.log_w, "eta": torch.tensor([self.eta, self.age], dtype=torch.float64)}
        numbers = torch.tensor([self.facts.get(key, math.nan) for key in _FACTS], dtype=torch.float64)
        return {f"trust.{name}": part for name, part in {**found, **more, "facts": numbers}.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        device = self.work.generator.device
        found = {
            name.removeprefix("trust."): part.to(device) for name, part in tensors.items() if name.startswith("trust.")
        }
        if not found:
            return
        self.paths = Paths(**{name: found.get(name) for name in Paths._fields})  # type: ignore[arg-type]
        self.old, self.log_w = found["old"], found["log_w"]
        self.eta, age = found["eta"].tolist()
        self.age = int(age)
        self.facts = dict(zip(_FACTS, found["facts"].tolist(), strict=True))


_FACTS = ("loss", "elbo", "log_z", "ess", "dropped")

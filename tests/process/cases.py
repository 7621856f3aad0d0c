"""The processes that every law is tested on: the whole catalog, and random recipes with one to five channels."""

import math

import torch
from torch import Tensor

from undrift.process import (
    ALDA,
    CLD,
    HOLD,
    MALDA,
    PSLD,
    VE,
    VP,
    CallableClock,
    Clock,
    ConstantClock,
    CosineClock,
    FlowMatching,
    GeometricClock,
    LinearClock,
    LinearProcess,
    PanelProcess,
    PowerClock,
    Recipe,
    SubVP,
    time_varying_recipe,
)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


CLOCKS: dict[str, Clock] = {
    "constant": ConstantClock(1.7),
    "linear": LinearClock(0.1, 10.0),
    "cosine": CosineClock(),
    "power": PowerClock(sigma_max=2.0, exponent=1.5, horizon=3.0),
    "geometric": GeometricClock(0.01, 2.0),
    "callable": CallableClock(lambda t: t + 0.5 * torch.sin(t), horizon=2.0),
}


def random_recipe(seed: int, channels: int, rank: int, clock: Clock) -> Recipe:
    """D of the given rank, skew Q, positive definite S, and an auxiliary start that is singular for even seeds."""
    g = torch.Generator().manual_seed(seed)
    low = normal(g, channels, rank) / channels**0.5
    skew = normal(g, channels, channels)
    spread = normal(g, channels, channels)
    start = normal(g, channels - 1, max(1, channels - 1 - (seed + 1) % 2)) * 0.3
    if channels == 3 and seed % 2 == 0:
        start = torch.zeros(channels - 1, 1, dtype=torch.float64)
    return Recipe(
        D=low @ low.T,
        Q=skew - skew.T,
        S=spread @ spread.T / channels + 0.3 * torch.eye(channels, dtype=torch.float64),
        clock=clock,
        start_cov=start @ start.T,
    )


RANDOM: dict[str, Recipe] = {
    f"K{k}-rank{rank}-{name}": random_recipe(10 * k + rank, k, rank, clock)
    for k in range(1, 6)
    for rank in range(1, k + 1)
    for name, clock in [list(CLOCKS.items())[(k + rank) % len(CLOCKS)]]
}


def varying() -> PanelProcess:
    """Sheet T10: D = diag(0.2, 1), Q_01 = -2 sin 3t, S = I."""

    def q(t: Tensor) -> Tensor:
        c = -2 * torch.sin(3 * t)
        return torch.stack([torch.stack([0 * c, c], -1), torch.stack([-c, 0 * c], -1)], -2)

    def d(t: Tensor) -> Tensor:
        return torch.diag(torch.tensor([0.2, 1.0], dtype=torch.float64)).expand(*t.shape, 2, 2)

    return time_varying_recipe(d, q, [[1.0, 0.0], [0.0, 1.0]], start=0.0)


CATALOG: dict[str, LinearProcess] = {
    "VP": VP(),
    "VP-cosine": VP(clock=CosineClock()),
    "SubVP": SubVP(),
    "VE": VE(),
    "VE-geometric": VE(clock=GeometricClock()),
    "FlowMatching": FlowMatching(),
    "CLD": CLD(),
    "CLD-underdamped": CLD(mass=1.0, friction=0.5, clock=LinearClock(0.1, 10.0)),
    "PSLD": PSLD(),
    "PSLD-dsm": PSLD(gamma=0.02, nu=4.02, aux_scale=0.0),
    "ALDA": ALDA(),
    "HOLD": HOLD(),
    "MALDA": MALDA(),
    "MALDA-4": MALDA(auxiliaries=3, mass=0.5),
}

ALL: dict[str, LinearProcess] = {**CATALOG, **RANDOM, "varying": varying()}


def times(process: LinearProcess, count: int = 9, low: float = 1e-6) -> Tensor:
    """``count`` times from ``low`` T to T, uniform in log t."""
    grid = torch.logspace(math.log10(low), 0.0, count, dtype=torch.float64) * process.horizon
    return grid.clamp(max=process.horizon)

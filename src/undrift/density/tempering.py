r"""Parallel tempering: chains at all levels of a path at once, which exchange their states.

Levels :math:`\pi_0, \dots, \pi_{N-1}` of a path, from its start to the target, hold one chain each: a ladder. Between
local moves neighbours propose to exchange their points p and q, and do so with probability

.. math::
    \alpha = \min\Bigl(1, \frac{\pi_i(q)\, \pi_{i+1}(p)}{\pi_i(p)\, \pi_{i+1}(q)}\Bigr)
    = \min\bigl(1, e^{W_i(p) - W_i(q)}\bigr), \qquad W_i = \log \pi_{i+1} - \log \pi_i,

which leaves the product of all levels invariant. Even and odd pairs take turns deterministically: states then travel
straight through the ladder rather than diffuse (the non-reversible scheme of Syed et al.). How well they can travel is
in the mean rejections :math:`r_i`: the barrier :math:`\Lambda = \sum_i r_i` belongs to the path, not to the number of
levels, and a ladder of equal rejections makes the most of its levels. What matters in the end are round trips, from the
first level to the target and back: modes exchange weight through them and through nothing else.

Where the first level is a law with exact draws (the geometric path), it is drawn anew before every exchange, and the
ratios of neighbouring normalisers, by bridge sampling with :math:`\sigma(x) = 1 / (1 + e^{-x})`,

.. math:: \log \frac{Z_{i+1}}{Z_i} = c + \log E_{\pi_i} \sigma(W_i - c) - \log E_{\pi_{i+1}} \sigma(c - W_i),

add up to log Z. The identity holds for every c; near the answer its variance is least (Bennett).

References:
    Geyer, Markov Chain Monte Carlo Maximum Likelihood, 1991.
    Syed, Bouchard-Côté, Deligiannidis & Doucet, Non-Reversible Parallel Tempering, JRSS B 2022.
    Bennett 1976; Meng & Wong 1996 (bridge sampling).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from tqdm import tqdm

from undrift.density.coordinates import Coordinates
from undrift.density.draws import Draws
from undrift.density.ladders import Ladders
from undrift.density.method import Method
from undrift.density.move import MALA, Move
from undrift.density.path import Geometric, Path
from undrift.density.session import Session

__all__ = ["ParallelTempering"]


@dataclass(frozen=True, eq=False)
class ParallelTempering(Method):
    """Chains at all levels of a path, which exchange states; exact in the limit of many iterations.

    All levels of all ladders are one batch. During warm-up the ladder is steered to equal rejections, and each level's
    step size to the move's acceptance; then both are frozen.

    Args:
        path: of densities, whose levels differ in y: geometric, tilt or tempered dilation.
        move: exact local move.
        levels: levels of the ladder, the first and the target among them; about twice the barrier is enough.
        moves: local moves between exchanges.
        iterations: exchanges, warm-up included.
        warmup: share of the iterations that adapts and is thrown away.
        thin: iterations between kept states.
        coordinates: centre and scale; null for the target's own.

    Every ladder keeps (1 - warmup) iterations / thin states, so n draws need as many ladders as that divides n into.
    """

    path: Path = field(default_factory=Geometric)
    move: Move = field(default_factory=MALA)
    levels: int = 10
    moves: int = 1
    iterations: int = 1000
    warmup: float = 0.5
    thin: int = 50
    coordinates: Coordinates | None = None

    def __post_init__(self) -> None:
        for key, least in (("levels", 2), ("moves", 1), ("iterations", 2), ("thin", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"ParallelTempering: {key} must be at least {least}, got {getattr(self, key)}.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"ParallelTempering: warmup is a share of the iterations, in [0, 1), got {self.warmup}.")
        if self.length < 1:
            raise ValueError(
                f"ParallelTempering: {self.iterations - self.warm} iterations are left after warm-up, fewer than "
                f"thin = {self.thin}: no state would be kept."
            )
        if not self.move.exact:
            raise ValueError(
                f"ParallelTempering: {type(self.move).__name__} does not leave the levels invariant, and exchanges "
                "would spread its error; take MALA or HMC."
            )
        first, last = self.path.level(0.0), self.path.level(1.0)
        if (first.exponent, first.base) == (last.exponent, last.base):
            raise ValueError(
                f"ParallelTempering: all levels of {type(self.path).__name__} have the same density in y, so every "
                "exchange would be accepted and exchange nothing: barriers are as high at the first level as at the "
                "target. Temper instead: Geometric, TemperedDilation or Tilt."
            )

    @property
    def warm(self) -> int:
        """Iterations of the warm-up."""
        return int(self.warmup * self.iterations)

    @property
    def length(self) -> int:
        """States kept of each ladder."""
        return (self.iterations - self.warm) // self.thin

    @property
    def refreshed(self) -> bool:
        """Whether the first level is the law that the path starts from, normalised and drawn exactly."""
        first = self.path.level(0.0)
        return first.exponent == 0 and first.base == 1 and self.path.start is self.path.law

    def in_words(self) -> str:
        """One line for reports."""
        return f"parallel tempering ({type(self.path).__name__} path, {self.levels} levels, {type(self.move).__name__})"

    def draw(self, session: Session) -> Draws:
        walkers = -(-session.n // (session.repeats * self.length))
        resumed, seen = session.resumed, session.see(self.coordinates)
        engine = Ladders(self, seen, session.repeats, walkers, session.generator)
        if resumed is None:
            seen.check(self.path.start.sample(64, seen.dim, session.generator, session.dtype))
            state = engine.begin(session.dtype)
        else:
            state = engine.restore(*resumed)

        def entry() -> tuple[dict[str, Tensor], dict[str, Any]]:
            tensors, plain = state.written()
            return {**session.kept, **tensors, "generator": mark}, {**plain, **session.costs()}

        mark = session.generator.get_state()
        with tqdm(total=self.iterations, initial=state.k, disable=not session.progress, desc="tempering") as bar:
            try:
                while state.k < self.iterations:
                    state = engine.iterate(state)
                    bar.update()
                    if session.journal.active:
                        mark = session.generator.get_state()
                        session.journal.write(entry)
                    if session.progress:
                        barrier, trips = float(state.tally.rejections.sum()), int(state.tally.trips[-1])
                        bar.set_postfix_str(f"barrier {barrier:.2f}, round trips {trips}", refresh=False)
            except KeyboardInterrupt:
                session.journal.write(entry, force=True)
                raise
        session.journal.close()
        return engine.draws(state, session)

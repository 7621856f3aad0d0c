"""A run under way: what it samples and in which coordinates, its randomness, what it has cost, what it left behind."""

from __future__ import annotations

import time
from dataclasses import astuple
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from undrift._journal import Journal
from undrift.density.affine import AffineTarget
from undrift.density.coordinates import Coordinates
from undrift.density.journal import APART, fingerprint
from undrift.density.target import Evaluations, Target

__all__ = ["Session"]


class Session:
    """What every method needs of a run.

    Args:
        method: with all its settings, for the identity of the run.
        target: as the user gave it.
        n, seed, repeats, checkpoint, progress, dtype, device: of the run.

    Attributes:
        seen: the target in the coordinates chosen; :meth:`see` makes it.
        generator: all randomness.
    """

    seen: Target

    def __init__(
        self,
        method: object,
        target: Target,
        n: int,
        seed: int,
        repeats: int,
        checkpoint: str | Path | None,
        progress: bool,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        if repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {repeats}.")
        if n < repeats:
            raise ValueError(f"n must be at least one draw a repeat, {repeats}, got {n}.")
        self.method, self.target, self.n, self.seed, self.repeats = method, target, n, seed, repeats
        self.checkpoint, self.progress, self.dtype = checkpoint, progress, dtype
        self.generator = torch.Generator(device).manual_seed(seed)
        self._began, self._before = time.perf_counter(), target.evaluations.copy()

    # -- where it was interrupted --------------------------------------------------------------------------------------

    @cached_property
    def journal(self) -> Journal:
        """Where the run keeps its state."""
        if self.checkpoint is None:
            return Journal(None)
        settings = {"n": self.n, "seed": self.seed, "repeats": self.repeats, "dtype": self.dtype}
        return Journal(self.checkpoint, fingerprint(self.target, method=self.method, **settings), apart=APART)

    @cached_property
    def resumed(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What an interrupted run left: tensors and facts. Its costs count, and its random numbers go on."""
        found = self.journal.read()
        if found is not None:
            tensors, plain = found
            self.charge(Evaluations(*plain["evaluations"]), plain["seconds"])
            self.generator.set_state(tensors["generator"])
        return found

    @property
    def kept(self) -> dict[str, Tensor]:
        """The coordinates, for the journal."""
        return {} if self._own is None else {"loc": self._own.loc, "scale": self._own.scale}

    def costs(self) -> dict[str, Any]:
        """What the run has cost so far, for the journal."""
        return {"evaluations": astuple(self.evaluations), "seconds": self.seconds}

    # -- what it costs -------------------------------------------------------------------------------------------------

    @property
    def evaluations(self) -> Evaluations:
        return self.target.evaluations - self._before

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def charge(self, evaluations: Evaluations, seconds: float) -> None:
        """Count what was spent before this session."""
        self._before = self._before - evaluations
        self._began -= seconds

    # -- coordinates ---------------------------------------------------------------------------------------------------

    def see(self, coordinates: Coordinates | None) -> Target:
        """The target in coordinates: those of the run that is resumed, or chosen now."""
        if self.resumed is not None:
            tensors, _ = self.resumed
            self.seen = self.target.affine(tensors["loc"], tensors["scale"]) if "loc" in tensors else self.target
        elif coordinates is None:
            self.seen = self.target
        else:
            self.seen = coordinates.choose(self.target, self.generator, self.dtype)
        return self.seen

    @property
    def _own(self) -> AffineTarget | None:
        """The coordinates that the run has added to the target, which may be an affine view itself."""
        return self.seen if self.seen is not self.target and isinstance(self.seen, AffineTarget) else None

    def own(self, points: Tensor) -> Tensor:
        """Points (..., d) of the coordinates seen, in the target's own."""
        if self._own is None:
            return points
        return self._own.to_x(points.reshape(-1, points.shape[-1])).reshape(points.shape)

"""What every way of sampling a density has in common: it runs on a target and gives draws."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path

import torch

from undrift.density.draws import Draws
from undrift.density.session import Session
from undrift.density.target import Target

__all__ = ["Method"]


class Method(ABC):
    """A sampler of densities, with all its settings."""

    @abstractmethod
    def draw(self, session: Session) -> Draws:
        """Draw what a session asks for; costs are filled in by :meth:`run`."""

    def run(
        self,
        target: Target,
        n: int = 4096,
        seed: int = 0,
        *,
        repeats: int = 8,
        checkpoint: str | Path | None = None,
        progress: bool = False,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> Draws:
        """Draw from a target.

        Args:
            target: what to sample.
            n: draws, over all repeats; rounded up to whole walkers.
            seed: the same seed gives the same draws on the same device.
            repeats: independent groups of walkers, run in one batch: their spread gives the standard errors.
            checkpoint: file to keep the run's state in, so that an interrupted run goes on where it was; removed when
                the run is complete.
            progress: show a bar.
            dtype, device: of the walkers.

        Raises:
            TargetError: for a target that cannot be sampled as it is, before any work starts.
            ValueError: for settings that do not fit.
            FloatingPointError: if the walkers leave the numbers.
        """
        session = Session(self, target, n, seed, repeats, checkpoint, progress, dtype, device)
        draws = self.draw(session)
        return replace(draws, evaluations=session.evaluations, seconds=session.seconds)

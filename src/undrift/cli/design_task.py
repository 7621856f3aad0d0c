"""What a design works on, and how its slow parts are kept: shared by all that ``undrift design`` does."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from undrift.cli.common import Checkpoint
from undrift.design.optimise import family
from undrift.design.spectrum import Spectrum
from undrift.report import JsonLines
from undrift.train import Dataset

if TYPE_CHECKING:
    from undrift.cli.design import DesignRun

__all__ = ["Task"]


@dataclass(frozen=True, eq=False)
class Task:
    """A design at work.

    Attributes:
        run: what was asked for.
        out: folder of the design.
        spectrum: of the data.
        resolution: level of noise below which KL does not look.
        checkpoint: of the denoiser, or None for the data alone.
        data: what is to be sampled.
        holdout: points that the denoiser has not seen, if there are any.
        log: finished parts.
    """

    run: DesignRun
    out: Path
    spectrum: Spectrum
    resolution: float
    checkpoint: Checkpoint | None
    data: Dataset
    holdout: Dataset | None
    log: JsonLines

    @property
    def unseen(self) -> Dataset:
        """The data that the denoiser is judged on."""
        return self.holdout or self.data

    @property
    def digest(self) -> str:
        """Tells the checkpoint from others."""
        assert self.checkpoint is not None
        return hashlib.sha256(self.checkpoint.path.read_bytes()).hexdigest()[:16]

    def say(self, line: str) -> None:
        print(line, flush=True)

    def kept(self, what: str, settings: dict[str, Any], make: Callable[[], dict[str, Any]]) -> Any:
        """What was made with these settings before, or is made now; None, with a line, where it cannot be."""
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        for row in self.log.rows:
            if row["key"] == key:
                return row["made"]
        clock = time.perf_counter()
        try:
            made = make()
        except ValueError as error:
            self.say(f"left out: {what}: {error}")
            return None
        seconds = time.perf_counter() - clock
        self.log.append({"key": key, "what": what, "seconds": round(seconds, 2), "settings": settings, "made": made})
        self.say(f"{what}, {seconds:.1f} s")
        return made

    def settings(self, **more: Any) -> dict[str, Any]:
        """What an optimisation depends on, as plain data."""
        s = self.spectrum
        numbers = torch.stack([s.variance, s._mean, s._count]).numpy().tobytes()
        return {"spectrum": hashlib.sha256(numbers).hexdigest()[:16], **self._common(), **more}

    def goal(self) -> dict[str, Any]:
        """Arguments that optimisation and search share."""
        return {"spectra": family(self.spectrum), **self._common()}

    def _common(self) -> dict[str, Any]:
        names = ("metric", "trust", "sigma_min", "sigma_max", "iterations")
        resolution = self.resolution if self.run.metric == "kl" else None
        return {**{k: getattr(self.run, k) for k in names}, "resolution": resolution}

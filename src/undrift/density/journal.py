"""A run that can be interrupted: its state in one sealed file, written atomically, read back only by the same run."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from undrift.config import ConfigError, describe
from undrift.container import read_file, write_file
from undrift.density.target import Target

__all__ = ["Journal", "fingerprint"]


def fingerprint(target: Target, **settings: Any) -> str:
    """What makes two runs the same: their settings, and the target's value at a fixed point."""
    plain: dict[str, Any] = {}
    for key, value in settings.items():
        try:
            plain[key] = describe(value)
        except ConfigError:
            plain[key] = repr(value)
    probe = torch.linspace(-0.5, 0.5, target.dim, dtype=torch.float64).unsqueeze(0)
    plain |= {"target": target.name, "dim": target.dim, "value": f"{float(target.log_prob(probe)):.9g}"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()


class Journal:
    """Where a run keeps its state.

    Args:
        path: of the file; None keeps nothing.
        identity: of the run, as :func:`fingerprint` gives it.
        every: least seconds between two writes.
    """

    def __init__(self, path: str | Path | None, identity: str = "", every: float = 10.0) -> None:
        self._path, self._identity, self._every = None if path is None else Path(path), identity, every
        self._last = time.monotonic()

    @property
    def active(self) -> bool:
        return self._path is not None

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state of the run that was interrupted; None if there is none.

        Raises:
            ValueError: if the file belongs to another run.
        """
        if self._path is None or not self._path.exists():
            return None
        tensors, description = read_file(self._path)
        if description.get("identity") != self._identity:
            raise ValueError(
                f"{self._path} belongs to a run with another target, method, n, repeats or seed; give the same "
                "settings to resume it, or remove the file to start anew."
            )
        return tensors, description["state"]

    def write(self, state: Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Any]]], force: bool = False) -> None:
        """Write ``state()`` if the last write is long enough ago, or forced."""
        if self._path is None or not (force or time.monotonic() - self._last >= self._every):
            return
        tensors, plain = state()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_file(self._path, tensors, {"identity": self._identity, "state": dict(plain)})
        self._last = time.monotonic()

    def close(self) -> None:
        """The run is complete: nothing is left to resume."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

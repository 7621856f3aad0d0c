"""A run that can be interrupted: its state in one sealed file, written atomically, read back only by the same run."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from undrift.config import ConfigError, describe
from undrift.container import read_file, write_file

__all__ = ["Entry", "Journal", "digest"]

Entry = Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Any]]]
"""Makes tensors and plain facts of a state that was remembered; later changes to the run do not touch them."""

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # another in every process
_SHARE = 20.0  # a write may take a twentieth of the time


def digest(**settings: Any) -> str:
    """What makes two runs the same.

    Numbers and described objects count exactly, arrays of floats by two sums to six digits, which another number of
    threads does not change. An object without a description counts by what it prints: where that says little, give its
    values at fixed points as well.
    """
    plain: dict[str, Any] = {}
    for key, value in settings.items():
        try:
            plain[key] = _sums(value) if isinstance(value, Tensor) else describe(value)
        except ConfigError:
            plain[key] = _ADDRESS.sub("", repr(value))
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()


def _sums(x: Tensor) -> list[Any]:
    x = x.detach().cpu()
    about = [str(x.dtype), list(x.shape)]
    if not x.is_floating_point():
        return [*about, hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()]
    flat = x.double().flatten()
    waves = torch.arange(flat.numel(), dtype=torch.float64).cos()
    return [*about, f"{float(flat.norm()):.6g}", f"{float(flat @ waves):.6g}"]


class Journal:
    """Where a run keeps its state.

    What a write costs grows with what the run has kept, so writes are rarer as they take longer: they never take more
    than about a twentieth of the run.

    Args:
        path: of the file; None keeps nothing.
        identity: of the run, see :func:`digest`.
        every: least seconds between two writes.
        apart: what tells runs apart, in words.
        keep: leave the file where it is when the run is complete; the same run then finds its end there.

    Within ``with journal:`` a run notes its states, and the newest is written at the end, whatever ended it.

    Attributes:
        earlier: seconds that the run had taken when it was interrupted.
    """

    def __init__(
        self,
        path: str | Path | None,
        identity: str = "",
        every: float = 10.0,
        *,
        apart: str = "settings or seed",
        keep: bool = False,
    ) -> None:
        self._path, self._identity, self._every = None if path is None else Path(path), identity, every
        self._apart, self._keep = apart, keep
        self._began = self._last = time.monotonic()
        self._pause, self.earlier = every, 0.0
        self._noted: Entry | None = None

    @classmethod
    def of(cls, checkpoint: str | Path | Journal | None, identity: Callable[[], str], apart: str) -> Journal:
        """The journal of a run: in a file of its own, or one that was made for it and is told here whose it is."""
        journal = checkpoint if isinstance(checkpoint, Journal) else cls(checkpoint)
        if journal.active:
            journal._identity, journal._apart = identity(), apart
        return journal

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
                f"{self._path} belongs to a run with another {self._apart}; give the same "
                "settings to resume it, or remove the file to start anew."
            )
        self.earlier = description.get("seconds", 0.0)
        return tensors, description["state"]

    def __enter__(self) -> Journal:
        self._noted = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._noted is not None:
            self.write(self._noted, force=True)

    def note(self, state: Entry) -> None:
        """Remember a state, and write it if the last write is long enough ago."""
        self._noted = state
        self.write(state)

    def write(self, state: Entry, force: bool = False) -> None:
        """Write ``state()`` if the last write is long enough ago, or forced."""
        if self._path is None or not (force or time.monotonic() - self._last >= self._pause):
            return
        began = time.monotonic()
        tensors, plain = state()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        seconds = self.earlier + began - self._began
        write_file(self._path, tensors, {"identity": self._identity, "state": dict(plain), "seconds": seconds})
        self._last = time.monotonic()
        self._pause = self._every and max(self._every, _SHARE * (self._last - began))

    def close(self) -> None:
        """The run is complete: nothing is left to resume."""
        if not self._keep:
            self.discard()

    def discard(self) -> None:
        """Nothing of the run is of use."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

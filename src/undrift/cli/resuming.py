"""Folders of runs that can be interrupted: refused, gone on with, or replaced; and what Ctrl-C says."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from undrift.cli.common import begin
from undrift.config import ConfigError

__all__ = ["begin_or_resume", "interruptible"]


def begin_or_resume(run: Any, out: Path, files: Sequence[str], states: Sequence[str], end: str) -> None:
    """Make a run's folder, or find in it the run that was interrupted.

    Args:
        run: the command's configuration, with ``resume`` and ``overwrite``.
        out: its folder.
        files: of a run in the folder.
        states: files that only an interrupted run leaves, the first of which most do.
        end: the file that a complete run has.

    Raises:
        ConfigError: if there is nothing to resume, or a run is there that is not to be overwritten.
    """
    there = [name for name in states if (out / name).exists()]
    if run.resume:
        if not there:
            what = "a complete run" if (out / end).exists() else "no run to resume"
            raise ConfigError(f"resume: {out} holds {what} (no {states[0]}).")
        return
    if there and not run.overwrite:
        raise ConfigError(
            f"out: {out} holds an interrupted run ({there[0]}); --resume goes on with it, --overwrite starts anew."
        )
    begin(run, out, (*files, *states), run.overwrite)


@contextlib.contextmanager
def interruptible(out: Path, states: Sequence[str], command: Sequence[str]) -> Iterator[None]:
    """Within, Ctrl-C says how to go on, if a state was written."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if not any((out / name).exists() for name in states):
            raise
        raise KeyboardInterrupt(f"saved in {out}. Continue with: {_resumed(command)}") from stop


def _resumed(command: Sequence[str]) -> str:
    """The command that goes on with what another has begun."""
    words: list[str] = []
    choosing = False
    for word in command:
        if word.startswith("--"):
            choosing = word.partition("=")[0] in ("--resume", "--overwrite")
        if not choosing:
            words.append(word)
    return shlex.join([*words, "--resume"])

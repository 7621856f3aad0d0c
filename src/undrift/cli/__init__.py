"""The command line: ``undrift train | sample | evaluate | compare | report | demo``."""

from undrift.cli.main import main

__all__ = ["main"]

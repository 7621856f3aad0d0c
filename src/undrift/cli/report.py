"""undrift report: a run's folder as one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from undrift.report import write_report

__all__ = ["ReportRun"]


@dataclass(frozen=True, eq=False)
class ReportRun:
    """Write report.html, one file that opens without a network, into the folder of a run.

    Args:
        run: the folder.
    """

    run: str

    def execute(self, command: Sequence[str]) -> int:
        print(f"report  {write_report(self.run)}")
        return 0

"""What a run leaves behind: comparisons, figures, and one HTML file that shows them."""

from undrift.report.comparison import Cell, at_calls, cells, compare, label, shown, table, text_table
from undrift.report.document import write_report
from undrift.report.files import JsonLines, read_npz, write_bytes, write_json, write_npz, write_provenance
from undrift.report.plots import samples_figure
from undrift.report.posterior import PosteriorRecord, accuracy, rank_table
from undrift.report.tones import Tones

__all__ = [
    "Cell",
    "JsonLines",
    "PosteriorRecord",
    "Tones",
    "accuracy",
    "at_calls",
    "cells",
    "compare",
    "label",
    "rank_table",
    "read_npz",
    "samples_figure",
    "shown",
    "table",
    "text_table",
    "write_bytes",
    "write_json",
    "write_npz",
    "write_provenance",
    "write_report",
]

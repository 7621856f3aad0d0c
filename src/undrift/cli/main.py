"""Entry of the command line: finds the command, reads its configuration, and turns errors into one message.

Exit status: 0 done, 1 the run failed, 2 the call or its configuration is wrong, 130 interrupted.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence

from undrift import __version__
from undrift.cli.arguments import help_text, parse, to_yaml
from undrift.cli.compare import CompareRun
from undrift.cli.demo import DemoRun
from undrift.cli.density import DensityRun
from undrift.cli.design import DesignRun
from undrift.cli.evaluate import EvaluateRun
from undrift.cli.invert import InvertRun
from undrift.cli.report import ReportRun
from undrift.cli.sample import SampleRun
from undrift.cli.train import TrainRun
from undrift.train import CheckpointError, TrainingDiverged

__all__ = ["COMMANDS", "main"]

COMMANDS: dict[str, type] = {
    "train": TrainRun,
    "sample": SampleRun,
    "evaluate": EvaluateRun,
    "compare": CompareRun,
    "design": DesignRun,
    "density": DensityRun,
    "invert": InvertRun,
    "report": ReportRun,
    "demo": DemoRun,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if words else 2
    if words[0] == "--version":
        print(__version__)
        return 0
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        return _fail(2, f"unknown command {name!r}; one of {', '.join(COMMANDS)}.")
    command = COMMANDS[name]
    if "--help" in rest or "-h" in rest:
        print(help_text(name, command))
        return 0
    try:
        run, print_config = parse(command, rest)
        if print_config:
            print(to_yaml(run), end="")
            return 0
        return run.execute(["undrift", *words])
    except KeyboardInterrupt as stop:
        return _fail(130, f"interrupted; {stop}" if str(stop) else "interrupted.")
    except (TrainingDiverged, FloatingPointError) as error:
        return _fail(1, str(error))
    except (CheckpointError, ValueError, OSError, ImportError) as error:
        return _fail(2, str(error))


def _fail(status: int, message: str) -> int:
    print(f"undrift: {message}", file=sys.stderr)
    return status


def _overview() -> str:
    lines = ["undrift: design a diffusion, learn it, and get back.", "", "usage: undrift COMMAND [--key value ...]", ""]
    for name, command in COMMANDS.items():
        summary = (inspect.getdoc(command) or "").partition("\n\n")[0]
        lines.append(f"  {name:<9} {' '.join(summary.split())}")
    return "\n".join([*lines, "", "undrift COMMAND --help lists the keys of a command."])

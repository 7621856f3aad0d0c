"""undrift density: from a density that can only be evaluated to draws, evidence, and how far to trust them."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

import undrift.density.targets  # noqa: F401  a family is what is in memory
from undrift._memory import keep_memory
from undrift.cli.common import Clock, finish
from undrift.cli.resuming import begin_or_resume, interruptible
from undrift.config import ConfigError
from undrift.density import Affine, Auto, Method, Target, Trained, TrainedSampler
from undrift.density.archive import save_draws
from undrift.density.summary import summarise
from undrift.report import text_table, write_json, write_report
from undrift.report.density import parameters_table
from undrift.report.learning import bounds_line

__all__ = ["DensityRun", "import_target"]

_STATE = "state.safetensors"
_STATE_AGAIN = f"{_STATE}.again"  # of a second run, where Auto saw more in the first one's draws
_SAMPLER = "sampler.safetensors"  # what a learned sampler has learned
_FILES = ("draws.safetensors", _SAMPLER, "summary.json", "run.json", "report.html")
_SHOWN = 24
_DTYPES = {"float64": torch.float64, "float32": torch.float32}


@dataclass(frozen=True, eq=False)
class DensityRun:
    """Draw from a density that can only be evaluated; say how far the draws can be trusted.

    Args:
        target: a benchmark target, by name; null with log_prob.
        log_prob: module:name of a function of your own, (batch, dim) -> (batch,), differentiable by autograd; or of a
            Target, or of a function without arguments that returns one. The module is imported from the current
            directory or from where Python finds it.
        dim: number of coordinates of log_prob.
        method: how to draw, with all its settings.
        n: draws, over all repeats.
        repeats: independent groups of walkers in one batch; standard errors are over them.
        seed: of all randomness.
        loc, scale: centre and scale of the target, numbers, as a short form of the method's coordinates.
        dtype: of the walkers.
        device: of the walkers, such as cpu or cuda.
        out: folder of the run.
        resume: go on with the interrupted run in the folder; its settings must be the same.
        overwrite: replace the run in the folder.
        progress: show a bar.
    """

    target: Target | None = None
    log_prob: str | None = None
    dim: int | None = None
    method: Method = field(default_factory=Auto)
    n: int = 4096
    repeats: int = 8
    seed: int = 0
    loc: float | None = None
    scale: float | None = None
    dtype: Literal["float64", "float32"] = "float64"
    device: str = "cpu"
    out: str = "runs/density"
    resume: bool = False
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for name, least in (("n", 1), ("repeats", 1), ("seed", 0), *((("dim", 1),) if self.dim is not None else ())):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: expected at least {least}, got {getattr(self, name)}.")
        if self.n < self.repeats:
            raise ConfigError(f"n: expected at least one draw a repeat, {self.repeats}, got {self.n}.")
        if self.scale is not None and not self.scale > 0:
            raise ConfigError(f"scale: expected a positive number, got {self.scale}.")
        if self.target is not None and self.log_prob is not None:
            raise ConfigError("log_prob: give either target or log_prob, not both.")
        if self.target is not None and self.dim is not None:
            raise ConfigError("dim: is for log_prob; a target has a setting of its own where it can be chosen.")
        if self.resume and self.overwrite:
            raise ConfigError("resume: give either resume or overwrite, not both.")

    def execute(self, command: Sequence[str]) -> int:
        clock, out = Clock(), Path(self.out)
        keep_memory()
        target, method, device = self.open_target(), self.in_coordinates(), self.open_device()
        states = (_STATE, _STATE_AGAIN)
        begin_or_resume(self, out, _FILES, states, "summary.json")
        with interruptible(out, states, command):
            draws = method.run(
                target,
                self.n,
                self.seed,
                repeats=self.repeats,
                checkpoint=out / _STATE,
                progress=self.progress,
                dtype=_DTYPES[self.dtype],
                device=device,
            )
        save_draws(out / "draws.safetensors", draws)
        if isinstance(draws.sampler, TrainedSampler) and not isinstance(method, Trained):
            draws.sampler.save(out / _SAMPLER)
        summary = summarise(draws)
        write_json(out / "summary.json", summary)
        finish(out, command, clock)
        _say(summary)
        print(f"draws    {out / 'draws.safetensors'}")
        if (out / _SAMPLER).exists():
            print(f"sampler  {out / _SAMPLER}")
        print(f"summary  {out / 'summary.json'}")
        print(f"report   {write_report(out)}")
        return 0

    def open_target(self) -> Target:
        """What is to be sampled; the function of the user's own is imported here, and tried at two points.

        Raises:
            ConfigError: if there is none, or it is not what was announced.
        """
        if self.target is not None:
            return self.target
        if self.log_prob is None:
            raise ConfigError(
                "target: give a benchmark target by name, as in --target funnel, or a function of your own, "
                "--log-prob module:name --dim 10; undrift density --help lists the targets."
            )
        target = import_target(self.log_prob, self.dim)
        self._try(target)
        return target

    def _try(self, target: Target) -> None:
        x = torch.randn(2, target.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x = (self.loc or 0.0) + (self.scale or 1.0) * x
        try:
            target.log_prob(x.to(self.device, _DTYPES[self.dtype]))
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"log_prob: {error}") from error
        except Exception as error:
            raise ConfigError(
                f"log_prob: {self.log_prob} failed at points of shape (2, {target.dim}): {_where(error)}."
            ) from error

    def in_coordinates(self) -> Method:
        """The method, in the coordinates that loc and scale give.

        Raises:
            ConfigError: if it takes none, or has its own.
        """
        if self.loc is None and self.scale is None:
            return self.method
        name = type(self.method).__name__
        if not hasattr(self.method, "coordinates") or not dataclasses.is_dataclass(self.method):
            raise ConfigError(f"loc: {name} takes no coordinates; give the method its own start, or another method.")
        if self.method.coordinates is not None:
            raise ConfigError("loc: method.coordinates is given as well; give one of them.")
        coordinates = Affine(0.0 if self.loc is None else self.loc, 1.0 if self.scale is None else self.scale)
        return dataclasses.replace(self.method, coordinates=coordinates)

    def open_device(self) -> torch.device:
        """The device, tried with one number.

        Raises:
            ConfigError: if there is no such device here.
        """
        try:
            device = torch.device(self.device)
            torch.zeros((), device=device, dtype=_DTYPES[self.dtype])
        except (RuntimeError, AssertionError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"device: {self.device} with {self.dtype} is not at hand: {reason}") from error
        return device


# -- a density of the user's own ---------------------------------------------------------------------------------------


def import_target(place: str, dim: int | None = None) -> Target:
    """The target that ``module:name`` stands for.

    Args:
        place: of a batched log density, a Target, or a function without arguments that returns a Target.
        dim: coordinates; needed for a log density.

    Raises:
        ConfigError: naming what was not found, or what was found instead.
    """
    module, _, name = place.partition(":")
    if not name or not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        raise ConfigError(
            f"log_prob: {place!r} is not module:name, such as my_module:log_prob for the function log_prob in "
            "my_module.py."
        )
    found: Any = _import(module)
    for part in name.split("."):
        if not hasattr(found, part):
            known = [n for n, v in vars(found).items() if callable(v) and not n.startswith("_")] if _has(found) else []
            there = f"; it has {', '.join(known[:8])}" if known else ""
            raise ConfigError(f"log_prob: {module} has no attribute {name!r}{there}.")
        found = getattr(found, part)
    if not isinstance(found, Target) and callable(found) and _stands_alone(found, dim):
        try:
            made = found()
        except Exception as error:
            raise ConfigError(f"log_prob: {place}() failed: {_where(error)}.") from error
        if not isinstance(made, Target):
            raise ConfigError(
                f"log_prob: {place} takes no arguments and returned a {type(made).__name__}; it must return a Target, "
                "or be a log density: a function of a batch of points."
            )
        found = made
    if isinstance(found, Target):
        if dim is not None and dim != found.dim:
            raise ConfigError(f"dim: {place} is a target of {found.dim} coordinates, got {dim}; leave dim out.")
        return found
    if not callable(found):
        raise ConfigError(
            f"log_prob: {place} is a {type(found).__name__}, not a function; give a batched log density, a Target, or "
            "a function without arguments that returns one."
        )
    if dim is None:
        raise ConfigError(f"dim: the number of coordinates of {place} is needed, as in --dim 10.")
    return Target(found, dim, name=name)


def _has(module: Any) -> bool:
    return hasattr(module, "__dict__")


def _import(name: str) -> Any:
    """A module from the current directory, or from where Python finds it."""
    importlib.invalidate_caches()
    with _from_here():
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
                raise ConfigError(
                    f"log_prob: no module {error.name!r} in {Path.cwd()} nor where Python looks for modules; run the "
                    "command in the module's folder, or install it."
                ) from error
            raise ConfigError(f"log_prob: importing {name} failed: {_where(error)}.") from error
        except Exception as error:
            raise ConfigError(f"log_prob: importing {name} failed: {_where(error)}.") from error


@contextlib.contextmanager
def _from_here() -> Iterator[None]:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _stands_alone(function: Any, dim: int | None) -> bool:
    """Whether a call without arguments is what is meant: there are none, or all have defaults and no dim was given."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return False
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if any(p.kind in kinds or p.default is inspect.Parameter.empty for p in parameters):
        return False
    return not parameters or dim is None


def _where(error: Exception) -> str:
    """An error of the user's code: its kind, its words, and the line it comes from."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} ({Path(error.filename or '?').name}, line {error.lineno})"
    own = [f for f in frames if not f.filename.startswith((sys.prefix, str(Path(torch.__file__).parent)))]
    own = [f for f in own if Path(f.filename).parent.parent.name != "undrift"]
    place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}{place}" if words else f"{type(error).__name__}{place}"


# -- what is printed ---------------------------------------------------------------------------------------------------


def _say(summary: dict[str, Any]) -> None:
    count, spent = summary["draws"], summary["evaluations"]
    print(
        f"{count['total']} draws of {summary['target']} in {summary['dim']} dimension"
        f"{'' if summary['dim'] == 1 else 's'} by {summary['method']}, {count['repeats']} repeat"
        f"{'' if count['repeats'] == 1 else 's'}, {spent['gradients']} gradients, {summary['seconds']:.1f} s"
    )
    print(f"{summary['reason']}\n" if summary["reason"] else "")
    head, lines = parameters_table(summary, _SHOWN)
    print(text_table(head, lines, names=1))
    rest = len(summary["parameters"]) - _SHOWN
    if rest > 0:
        print(f"and {rest} more in summary.json")
    if summary["log_z"] is not None:
        error, truth = summary["log_z_std_error"], summary["true_log_z"]
        print(
            f"\nlog Z   {summary['log_z']:.4f}"
            + ("" if error is None else f" ± {error:.4f}")
            + f", {summary['promise']}"
            + ("" if truth is None else f"; the target's is {truth:.4f}")
        )
    if summary["bounds"] is not None:
        print(bounds_line(summary["bounds"]))
    print()
    for line in summary["warnings"]:
        print(f"warning: {line}")
    if not summary["warnings"]:
        print("no warnings: nothing in the run speaks against these draws")
    print()

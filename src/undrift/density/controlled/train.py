r"""Training a controlled diffusion: Adam, averaged weights, a record, and a state to go on from when interrupted."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from undrift.density.controlled.diffusion import ControlledDiffusion
from undrift.density.controlled.objective import Objective, Work
from undrift.density.target import Target

__all__ = ["Training", "train"]

_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_PATIENCE = 50  # steps in a row from which nothing can be learned


@dataclass(frozen=True, eq=False)
class Training:
    """How a controlled diffusion is trained.

    Args:
        steps: gradient steps.
        batch: paths, or points, a step.
        rate: of Adam; it falls by a cosine to ``final`` of it.
        final: share of the rate that is left at the end.
        warmup: steps in which the rate rises.
        clip: largest norm of the gradient.
        average: the weights that draw are an average over about the last so many steps; 0 for the last ones.
        chunk: steps of the paths whose graph is kept at a time; null for all. For objectives that take paths as data:
            KL differentiates through the walk, and keeps all of it; matching keeps none.
        precision: of the states; networks compute in float32.
        record: steps between two rows of the record.
    """

    steps: int = 2000
    batch: int = 512
    rate: float = 2e-3
    final: float = 0.02
    warmup: int = 20
    clip: float = 1.0
    average: int = 100
    chunk: int | None = None
    precision: str = "float32"
    record: int = 20

    def __post_init__(self) -> None:
        least = {"steps": 0, "batch": 2, "warmup": 0, "average": 0, "record": 1}
        for key, low in (*least.items(), *((("chunk", 1),) if self.chunk is not None else ())):
            if getattr(self, key) < low:
                raise ValueError(f"Training: {key} must be at least {low}, got {getattr(self, key)}.")
        for key in ("rate", "clip"):
            if not getattr(self, key) > 0:
                raise ValueError(f"Training: {key} must be positive, got {getattr(self, key)}.")
        if not 0 < self.final <= 1:
            raise ValueError(f"Training: final must lie in (0, 1], got {self.final}.")
        if self.precision not in _DTYPES:
            raise ValueError(f"Training: precision must be float32 or float64, got {self.precision!r}.")

    @property
    def dtype(self) -> torch.dtype:
        """Of the states."""
        return _DTYPES[self.precision]

    def factor(self, step: int) -> float:
        """Share of the rate at a step."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


Save = Callable[[Callable[[], tuple[dict[str, Tensor], dict[str, Any]]], bool], None]


def train(
    diffusion: ControlledDiffusion,
    target: Target,
    objective: Objective,
    settings: Training,
    generator: torch.Generator,
    *,
    resumed: tuple[Mapping[str, Tensor], Mapping[str, Any]] | None = None,
    save: Save | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Train in place; the diffusion ends with the averaged weights.

    Args:
        diffusion: what is trained.
        target: in its coordinates.
        objective: what is minimised.
        settings: how.
        generator: all randomness, on the device of the walkers.
        resumed: tensors and facts that an interrupted training left.
        save: called after each step with a function that gives them, and whether to write at any rate.
        progress: show a bar.

    Returns:
        The record: rows of "step", "seconds", "skipped" steps so far, and means since the row before of "loss",
        "gradient_norm", "dropped" paths a step, and what else the objective says, such as "elbo", "log_z", "ess".

    Raises:
        ValueError: if the objective cannot train the diffusion; before any work.
        FloatingPointError: if nothing can be learned from many steps in a row.
    """
    objective.validate(diffusion.scheme, settings.batch)
    diffusion.to(generator.device)
    teacher = copy.deepcopy(diffusion).requires_grad_(False)
    work = Work(diffusion, target, generator, settings.batch, settings.dtype, settings.chunk, teacher)
    runner = objective.runner(work)
    parameters = [p for p in diffusion.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=settings.rate) if parameters else None
    rows: list[dict[str, Any]] = []
    first, skipped, lost, before = 0, 0, 0, 0.0
    if resumed is not None:
        tensors, plain = resumed
        first, skipped, lost, before = plain["step"], plain["skipped"], plain["lost"], plain["seconds"]
        rows = [dict(row) for row in plain["record"]]
        _restore(tensors, diffusion, teacher, optimiser, generator)
        runner.load({k.removeprefix("runner."): v for k, v in tensors.items() if k.startswith("runner.")})
    began = time.perf_counter() - before
    recent: list[dict[str, float]] = []

    def entry() -> tuple[dict[str, Tensor], dict[str, Any]]:
        kept = _pack(diffusion, teacher, optimiser, generator)
        kept |= {f"runner.{name}": part for name, part in runner.state().items()}
        seconds = time.perf_counter() - began
        return kept, {"step": step + 1, "skipped": skipped, "lost": lost, "record": rows, "seconds": seconds}

    bar = tqdm(range(first, settings.steps), disable=not progress, desc="train", unit="step", initial=first)
    bar.total = settings.steps
    for step in bar:
        if optimiser is None:
            break
        optimiser.zero_grad()
        facts = runner.step()
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, settings.clip))
        if math.isfinite(norm) and math.isfinite(facts["loss"]):
            lost = 0
            for group in optimiser.param_groups:
                group["lr"] = settings.rate * settings.factor(step)
            optimiser.step()
        else:
            skipped, lost = skipped + 1, lost + 1
            if lost >= _PATIENCE:
                raise FloatingPointError(
                    f"{target.name}: {lost} training steps in a row gave no finite loss or gradient; the walkers leave "
                    "the support or the numbers. Give coordinates (loc, scale), a lower rate, or a smaller clip of the "
                    "control's guide."
                )
        _average(teacher, diffusion, settings.average, step)
        recent.append({**facts, "gradient_norm": norm})
        last = step + 1 == settings.steps
        if (step + 1) % settings.record == 0 or last:
            row = _mean(recent) | {"step": step + 1, "skipped": skipped, "seconds": time.perf_counter() - began}
            rows.append(row)
            recent = []
            shown = {key: f"{row[key]:.3g}" for key in ("loss", "elbo", "ess") if row.get(key) is not None}
            bar.set_postfix(shown, refresh=False)
        if save is not None and not recent:
            save(entry, last)
    diffusion.load_state_dict(teacher.state_dict())
    return rows


def _average(teacher: ControlledDiffusion, student: ControlledDiffusion, span: int, step: int) -> None:
    keep = 0.0 if span == 0 else min(1 - 1 / span, (1 + step) / (10 + step))
    with torch.no_grad():
        old: list[Tensor] = [p for p in teacher.parameters() if p.is_floating_point()]
        new: list[Tensor] = [p for p in student.parameters() if p.is_floating_point()]
        torch._foreach_lerp_(old, new, 1 - keep)
        for a, b in zip(teacher.buffers(), student.buffers(), strict=True):
            a.copy_(b)


def _mean(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Mean of what is finite in each column, None where nothing is."""
    out: dict[str, Any] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [row[key] for row in rows if key in row and math.isfinite(row[key])]
        out[key] = sum(values) / len(values) if values else None
    return out


def _pack(
    diffusion: ControlledDiffusion,
    teacher: ControlledDiffusion,
    optimiser: torch.optim.Optimizer | None,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    kept = {f"model.{k}": v.detach().clone() for k, v in diffusion.state_dict().items()}
    kept |= {f"average.{k}": v.detach().clone() for k, v in teacher.state_dict().items()}
    if optimiser is not None:
        for i, moments in optimiser.state_dict()["state"].items():
            kept |= {f"adam.{i}.{k}": torch.as_tensor(v).clone() for k, v in moments.items()}
    kept["training.generator"] = generator.get_state()
    return kept


def _restore(
    tensors: Mapping[str, Tensor],
    diffusion: ControlledDiffusion,
    teacher: ControlledDiffusion,
    optimiser: torch.optim.Optimizer | None,
    generator: torch.Generator,
) -> None:
    for prefix, module in (("model.", diffusion), ("average.", teacher)):
        module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    if optimiser is not None:
        moments: dict[int, dict[str, Tensor]] = {}
        for name, part in tensors.items():
            if name.startswith("adam."):
                _, index, key = name.split(".")
                moments.setdefault(int(index), {})[key] = part
        optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})
    generator.set_state(tensors["training.generator"])

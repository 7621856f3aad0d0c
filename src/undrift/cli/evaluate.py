"""undrift evaluate: how near samples are to data, whether they are copies, and the likelihood of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from undrift.cli.common import Clock, begin, check_event, diffusion_of, finish, open_checkpoint
from undrift.cli.judge import Judge, memorisation
from undrift.config import ConfigError
from undrift.diffusion import Diffusion, NoiseDiffusion
from undrift.measure import energy_distance, log_likelihood, mmd, sliced_wasserstein, wasserstein
from undrift.process import LinearProcess
from undrift.report import JsonLines, read_npz, text_table, write_json, write_report
from undrift.train import Dataset, DataSource, Digits

__all__ = ["EvaluateRun"]


@dataclass(frozen=True, eq=False)
class EvaluateRun:
    """Measure samples against data.

    Args:
        samples: npz file of samples, as undrift sample writes it.
        data: what they are compared with: the training data.
        holdout: data the model has not seen, for the floor of each measure; null for none.
        run: folder or checkpoint of the model, needed for the likelihood.
        process: for the likelihood, as in undrift sample.
        likelihood: number of held-out points whose likelihood is computed; 0 for none.
        rtol: relative and absolute tolerance of the likelihood's ODE solver.
        points: at most so many points enter the measures whose cost grows with its square or cube.
        seed: of random directions and of the feature network's training.
        out: folder of the result; null for the folder of the samples.
        overwrite: replace an evaluation that is there.
    """

    samples: str
    data: DataSource = field(default_factory=Digits)
    holdout: DataSource | None = field(default_factory=lambda: Digits("test"))
    run: str | None = None
    process: LinearProcess | None = None
    likelihood: int = 0
    rtol: float = 1e-4
    points: int = 1000
    seed: int = 0
    out: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.likelihood < 0:
            raise ConfigError(f"likelihood: expected 0 or more points, got {self.likelihood}.")
        if not self.rtol > 0:
            raise ConfigError(f"rtol: expected a positive number, got {self.rtol}.")
        if self.points < 2:
            raise ConfigError(f"points: expected at least 2, got {self.points}.")
        if self.likelihood and self.run is None:
            raise ConfigError("run: the likelihood is the model's; give the folder of the training run.")

    def execute(self, command: Sequence[str]) -> int:
        clock = Clock()
        x, _ = read_npz(self.samples)
        data = self.data.load()
        holdout = None if self.holdout is None else self.holdout.load()
        for other, place in ((data, "data"), *(((holdout, "holdout"),) if holdout is not None else ())):
            if other.event != tuple(x.shape[1:]):
                raise ConfigError(
                    f"{place}: points of {other.name} have shape {other.event}, the samples {tuple(x.shape[1:])}."
                )
        checkpoint = None if self.run is None else open_checkpoint(self.run)
        diffusion = None if checkpoint is None else diffusion_of(checkpoint, self.process)
        if checkpoint is not None:
            check_event(data, checkpoint, "data")
        out = Path(self.samples).parent if self.out is None else Path(self.out)
        if self.out is None:  # config.yaml there says how the samples were drawn
            if (out / "evaluation.json").exists() and not self.overwrite:
                raise ConfigError(f"out: {out} already holds an evaluation; give --overwrite to replace it, or --out.")
        else:
            begin(self, out, ("evaluation.json", "report.html"), self.overwrite)
        measures = self._distances(x.to(data.x), data, holdout)
        remarks = []
        if diffusion is not None and self.likelihood:
            value, remark = self._likelihood(diffusion, holdout or data)
            measures.append(value)
            remarks.append(remark)
        caption = f"{len(x)} samples of {self.samples} against {data.name}; lower is better."
        write_json(out / "evaluation.json", {"measures": measures, "caption": caption, "remarks": remarks})
        JsonLines(out / "evaluation.jsonl").append(
            {"samples": self.samples, **{m["name"]: m["value"] for m in measures}}
        )
        if self.out is not None:
            finish(out, command, clock)
        print(text_table(["measure", "value", "floor"], [[m["name"], m["value"], m["floor"] or "-"] for m in measures]))
        for remark in remarks:
            print(remark)
        print(f"report  {write_report(out)}")
        return 0

    def _distances(self, x: Tensor, data: Dataset, holdout: Dataset | None) -> list[dict[str, Any]]:
        judge = Judge.of(data, holdout, self.seed)
        generator = torch.Generator().manual_seed(self.seed)

        def some(points: Tensor, most: int) -> Tensor:
            return points[torch.randperm(len(points), generator=generator)[:most]].flatten(1)

        other = None if holdout is None else some(holdout.x, self.points)
        # exact transport needs sets of one size, and every bias depends on the sizes: the same for samples and floor
        size = min(len(x), len(data), self.points, *(() if other is None else (len(other),)))
        reference, mine = some(data.x, size), some(x, size)
        unseen = None if other is None else other[:size]
        rows = [{"name": judge.measure, "value": f"{judge.distance(x):.4g}", "floor": _text(judge.floor)}]
        measures = (
            ("sliced W2", lambda a, b: sliced_wasserstein(a, b, seed=self.seed)),
            ("exact W2", wasserstein),
            ("MMD", mmd),
            ("energy distance", energy_distance),
        )
        for name, measure in measures:
            floor = None if unseen is None else float(measure(unseen, reference))
            rows.append(
                {
                    "name": f"{name}, {size} points",
                    "value": _text(float(measure(mine, reference))),
                    "floor": _text(floor),
                }
            )
        if holdout is not None:
            found = memorisation(x, data, holdout)
            near, floor = float(found.samples.median()), float(found.held_out.median())
            rows.append(
                {"name": "median distance to the nearest training point", "value": _text(near), "floor": _text(floor)}
            )
        return rows

    def _likelihood(self, diffusion: Diffusion | NoiseDiffusion, data: Dataset) -> tuple[dict[str, Any], str]:
        x = data.x[: self.likelihood]
        result = log_likelihood(diffusion, x, rtol=self.rtol, atol=self.rtol, seed=self.seed)
        bits = result.bits_per_dim(bins=1)
        error = float(bits.std() / len(x) ** 0.5) if len(x) > 1 else None
        kind = "a lower bound on the likelihood" if diffusion.process.channels > 1 else "the model's density"
        remark = (
            f"Bits per dimension: of {len(x)} points of {data.name}, scaled as for training and not dequantised, so "
            f"the values are of a density ({kind}) and may be negative; standard error {_text(error) or 'unknown'}."
        )
        return {"name": "bits per dimension", "value": _text(float(bits.mean())), "floor": None}, remark


def _text(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"

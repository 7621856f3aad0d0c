"""undrift evaluate: how near samples are to data, whether they are copies, and the likelihood of held-out data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from undrift.cli.bits import HeldOut, bound_bits, flow_bits
from undrift.cli.common import (
    Checkpoint,
    Clock,
    begin,
    check_data,
    check_pixels,
    dequantised_flag,
    diffusion_of,
    finish,
    open_checkpoint,
)
from undrift.cli.judge import Judge, centred, memorisation
from undrift.config import ConfigError
from undrift.measure import energy_distance, mmd, sliced_wasserstein, wasserstein
from undrift.process import LinearProcess
from undrift.report import JsonLines, Tones, read_npz, shown, text_table, write_json, write_report
from undrift.train import Dataset, DataSource, Digits

__all__ = ["EvaluateRun"]


@dataclass(frozen=True, eq=False)
class EvaluateRun:
    """Measure samples against data, and the likelihood of held-out data under a model.

    Args:
        samples: npz file of samples, as undrift sample writes it; null to ask for bpd or likelihood alone.
        data: what they are compared with: the training data.
        holdout: data the model has not seen, for the floor of each measure, and for bpd and likelihood; null for none.
        run: folder or checkpoint of the model, needed for bpd and likelihood. A network that is told what was observed
            is told what the data say of that, and what is measured is the likelihood given it; without, the prior's.
        process: for bpd and likelihood, as in undrift sample.
        bpd: number of held-out points whose bits per dimension are bounded; 0 for none. The data must be Dequantised.
        bpd_times: times per point at which the bound's path term is estimated.
        sigma_min: noise level at which the bound's decoder takes over; null for that of the training.
        likelihood: number of held-out points whose likelihood is computed by the probability flow; 0 for none.
        rtol: relative and absolute tolerance of the likelihood's ODE solver.
        points: at most so many points enter the measures whose cost grows with its square or cube.
        seed: of random directions, of the feature network's training, of held-out points and the noise on them.
        out: folder of the result; null for the folder of the samples, or without them one beside the checkpoint.
        overwrite: replace an evaluation that is there.
        progress: show a bar.
    """

    samples: str | None = None
    data: DataSource = field(default_factory=Digits)
    holdout: DataSource | None = field(default_factory=lambda: Digits("test"))
    run: str | None = None
    process: LinearProcess | None = None
    bpd: int = 0
    bpd_times: int = 4
    sigma_min: float | None = None
    likelihood: int = 0
    rtol: float = 1e-4
    points: int = 1000
    seed: int = 0
    out: str | None = None
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for name, least in (("likelihood", 0), ("bpd", 0), ("bpd_times", 1), ("points", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: expected {least} or more, got {getattr(self, name)}.")
        for name in ("rtol", "sigma_min"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name}: expected a positive number, got {value}.")
        asked = self.likelihood or self.bpd
        if self.samples is None and not asked:
            raise ConfigError("samples: give a file of samples, or --run with --bpd or --likelihood.")
        if asked and self.run is None:
            raise ConfigError("run: the likelihood is the model's; give the folder of the training run.")

    def execute(self, command: Sequence[str]) -> int:
        clock = Clock()
        x, settings = (None, {}) if self.samples is None else read_npz(self.samples)
        checkpoint = None if self.run is None else open_checkpoint(self.run)
        diffusion = None if checkpoint is None else diffusion_of(checkpoint, self.process)
        loaded = self._load(x, Tones.read(settings), checkpoint)
        test = list(loaded.values())[-1]
        told = checkpoint is not None and checkpoint.told
        if checkpoint is not None and (self.bpd or self.likelihood) and test.observed is None:
            pairs = "give pairs, as in --holdout '{type: Simulated, source: ..., operator: ..., noise: ...}'"
            checkpoint.check_prior(test.name, pairs)
        out = self._folder(checkpoint)
        if self.out is None and x is not None:  # config.yaml there says how the samples were drawn
            if (out / "evaluation.json").exists() and not self.overwrite:
                raise ConfigError(f"out: {out} already holds an evaluation; give --overwrite to replace it, or --out.")
        else:
            begin(self, out, ("evaluation.json", "report.html"), self.overwrite)
        measures: list[dict[str, Any]] = []
        remarks: list[str] = []
        caption = f"The likelihood of {test.name}."
        if x is not None:
            caption = f"{len(x)} samples of {self.samples} against {loaded['data'].name}; lower is better."
            measures += self._distances(centred(x, loaded["data"]).to(loaded["data"].x), **loaded)
        if diffusion is not None and checkpoint is not None and self.bpd:
            points = HeldOut.draw(test, self.bpd, self.seed, told)
            rows, said = bound_bits(diffusion, checkpoint, points, self.bpd_times, self.sigma_min, self.progress)
            measures, remarks = measures + rows, remarks + said
        if diffusion is not None and self.likelihood:
            points = HeldOut.draw(test, self.likelihood, self.seed, told)
            rows, said = flow_bits(diffusion, points, self.rtol, self.progress)
            measures, remarks = measures + rows, remarks + said
        write_json(out / "evaluation.json", {"measures": measures, "caption": caption, "remarks": remarks})
        asked = {"samples": self.samples, "run": self.run}
        JsonLines(out / "evaluation.jsonl").append({**asked, **{m["name"]: m["value"] for m in measures}})
        if self.out is not None or x is None:
            finish(out, command, clock)
        print(text_table(["measure", "value", "floor"], [[m["name"], shown(m), m["floor"] or "-"] for m in measures]))
        for remark in remarks:
            print(remark)
        print(f"report  {write_report(out)}")
        return 0

    def _load(self, x: Tensor | None, made: Tones, checkpoint: Checkpoint | None) -> dict[str, Dataset]:
        """The data and the held-out data, what of them is needed, by the names of their keys; checked."""
        sources = {"data": self.data} if x is not None or self.holdout is None else {}
        if self.holdout is not None:
            sources["holdout"] = self.holdout
        loaded = {}
        for place, source in sources.items():
            data = loaded[place] = source.load()
            if x is not None:
                if data.event != tuple(x.shape[1:]):
                    raise ConfigError(
                        f"{place}: points of {data.name} have shape {data.event}, the samples {tuple(x.shape[1:])}."
                    )
                check_pixels(data, source, made, place, f"{self.samples}")
            if checkpoint is not None:
                check_data(data, source, checkpoint, place)
        if self.bpd and data.pixels is None:
            flag = dequantised_flag(source, {"transform": "center", "bins": 256}, place)
            raise ConfigError(
                f"{place}: bits per dimension are of pixels with dequantisation noise, and {data.name} has none; give "
                f"{flag}, where bins is the number of values a pixel can take, and a model trained on such data."
            )
        return loaded

    def _folder(self, checkpoint: Checkpoint | None) -> Path:
        if self.out is not None:
            return Path(self.out)
        if self.samples is not None:
            return Path(self.samples).parent
        assert checkpoint is not None
        return checkpoint.path.parent / "evaluate"

    def _distances(self, x: Tensor, data: Dataset, holdout: Dataset | None = None) -> list[dict[str, Any]]:
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


def _text(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"

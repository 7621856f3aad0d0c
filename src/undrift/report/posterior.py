"""A posterior on disk: draws with their truth and data as arrays, and what was made of them as plain data."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from undrift.inverse.calibration import Calibration
from undrift.report.files import write_bytes, write_json

__all__ = ["LEVELS", "PosteriorRecord", "accuracy", "rank_table"]

LEVELS = (0.5, 0.9)
"""Central intervals whose coverage is told."""

_SORTED = 2**23  # numbers that are sorted at a time: torch.quantile takes no more than 2^24

_ARRAYS = ("draws", "mean", "std", "truth", "y", "predicted", "sites", "known")


@dataclass(frozen=True, eq=False)
class PosteriorRecord:
    """What a report of a posterior shows.

    Attributes:
        draws: of equal weight, values (n, *event).
        mean, std: of every value (*event); of all draws with their weights.
        about: plain data: "kind" ("curve", "field", "image" or "vector"), "lead" and "facts" in words, "warnings", and
            where there are such "quantities", "errors", "calibration", "tones", "direct" (the data are values of the
            unknown itself) and "noise_std".
        truth: (*event), if it is known.
        y: data (*data); with ``known``, (*event), of which only the known part counts.
        predicted: data that draws predict, without noise (some, *data).
        sites: where the data were taken (m, d), in the unit cube.
        known: true where the values are data, (*event).
        traces: of scalars along chains, by name: (iterations, chains).
    """

    draws: Tensor
    mean: Tensor
    std: Tensor
    about: Mapping[str, Any]
    truth: Tensor | None = None
    y: Tensor | None = None
    predicted: Tensor | None = None
    sites: Tensor | None = None
    known: Tensor | None = None
    traces: Mapping[str, Tensor] = field(default_factory=dict)

    def save(self, folder: str | Path) -> None:
        """Write posterior.npz and posterior.json."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        arrays |= {f"trace/{name}": value for name, value in self.traces.items()}
        buffer = io.BytesIO()
        kept: dict[str, Any] = {k: v.detach().cpu().numpy() for k, v in arrays.items() if v is not None}
        np.savez_compressed(buffer, **kept)
        write_bytes(Path(folder) / "posterior.npz", buffer.getvalue())
        write_json(Path(folder) / "posterior.json", dict(self.about))

    @classmethod
    def load(cls, folder: str | Path) -> PosteriorRecord:
        """Read what :meth:`save` wrote."""
        place = Path(folder)
        about = json.loads((place / "posterior.json").read_text(encoding="utf-8"))
        with np.load(place / "posterior.npz", allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files}
        traces = {k.removeprefix("trace/"): v for k, v in arrays.items() if k.startswith("trace/")}
        return cls(about=about, traces=traces, **{k: v for k, v in arrays.items() if not k.startswith("trace/")})


def accuracy(draws: Tensor, mean: Tensor, std: Tensor, truth: Tensor, known: Tensor | None = None) -> dict[str, Any]:
    """Errors against the truth over the values that were not known, and how often intervals hold it.

    Coverage is that of one truth at many places, which vary together: a hint, no test. See :func:`rank_table` for one.

    Args:
        draws: (n, *event), of equal weight.
        mean, std: posterior mean and deviation (*event).
        truth: (*event).
        known: true where values are data (*event), which do not count.
    """
    open_ = torch.ones(truth.shape, dtype=torch.bool) if known is None else ~known.expand(truth.shape)
    miss = (mean.double() - truth.double())[open_]
    scale = float(truth.double()[open_].square().mean().sqrt())
    rmse = float(miss.square().mean().sqrt())
    spread = float(std.double()[open_].square().mean().sqrt())
    values = draws[:, open_]
    tails = torch.tensor([t for level in LEVELS for t in (0.5 - level / 2, 0.5 + level / 2)], dtype=torch.float64)
    most = max(1, _SORTED // len(values))
    ends = torch.cat([part.double().quantile(tails, 0) for part in values.split(most, 1)], 1)
    inside = (truth.double()[open_] >= ends[::2]) & (truth.double()[open_] <= ends[1::2])
    return {
        "rmse": rmse,
        "relative": rmse / scale if scale > 0 else None,
        "std": spread,
        "coverage": {f"{level:g}": float(row.double().mean()) for level, row in zip(LEVELS, inside, strict=True)},
        "places": int(open_.sum()),
    }


def rank_table(calibration: Calibration) -> dict[str, Any]:
    """Simulation-based calibration as plain data: a histogram of ranks, p-values and coverage for each functional."""
    most = max(2, min(20, len(calibration.ranks) // 5))
    # Bins of equally many ranks, so that bars are of one height if ranks are uniform.
    bins = max((b for b in range(2, most + 1) if (calibration.draws + 1) % b == 0), default=most)
    histograms, chi, cvm = calibration.histogram(bins), calibration.chi_square(bins), calibration.uniformity()
    covered = calibration.coverage(LEVELS)
    scalars = [
        {
            "name": name,
            "histogram": histogram.tolist(),
            "chi_square": float(a),
            "uniformity": float(b),
            "coverage": [c.share[i] for c in covered],
        }
        for i, (name, histogram, a, b) in enumerate(zip(calibration.names, histograms, chi, cvm, strict=True))
    ]
    return {
        "experiments": len(calibration.ranks),
        "draws": calibration.draws,
        "levels": [c.level for c in covered],
        "scalars": scalars,
    }


def shown_number(value: float | None, digits: int = 3) -> str:
    """A number as a table shows it."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}g}"

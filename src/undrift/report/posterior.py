"""A posterior on disk: draws with their truth and data as arrays, and what was made of them as plain data."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from undrift.report.files import write_bytes, write_json

__all__ = ["LEVELS", "PosteriorRecord", "accuracy", "rank_table"]

LEVELS = (0.5, 0.9)
"""Central intervals whose coverage is told."""

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
    values = draws.double()[:, open_]
    tails = torch.tensor([t for level in LEVELS for t in (0.5 - level / 2, 0.5 + level / 2)], dtype=torch.float64)
    ends = values.quantile(tails, 0)
    inside = (truth.double()[open_] >= ends[::2]) & (truth.double()[open_] <= ends[1::2])
    return {
        "rmse": rmse,
        "relative": rmse / scale if scale > 0 else None,
        "std": spread,
        "coverage": {f"{level:g}": float(row.double().mean()) for level, row in zip(LEVELS, inside, strict=True)},
        "places": int(open_.sum()),
    }


def rank_table(names: Sequence[str], ranks: Tensor, draws: int, bins: int = 10) -> dict[str, Any]:
    r"""Simulation-based calibration as plain data: is the truth's rank among posterior draws uniform?

    Args:
        names: of the scalars that were ranked.
        ranks: how many of ``draws`` independent posterior draws lie below the truth, (experiments, scalars).
        draws: L, so that a rank is one of 0 ... L.
        bins: of the histograms, at most; fewer where L + 1 has no such divisor.

    Returns:
        A histogram for each scalar, its chi-square p-value, and the coverage of central intervals.

    References:
        Talts et al., Validating Bayesian Inference Algorithms with Simulation-Based Calibration, 2018.
    """
    from scipy.stats import chi2

    if ranks.ndim != 2 or len(names) != ranks.shape[1] or int(ranks.min()) < 0 or int(ranks.max()) > draws:
        raise ValueError(
            f"rank_table: ranks must be ({'experiments'}, {len(names)}) numbers of 0 ... {draws}, got "
            f"{tuple(ranks.shape)} from {int(ranks.min())} to {int(ranks.max())}."
        )
    count = max(b for b in range(1, bins + 1) if (draws + 1) % b == 0)
    scalars = []
    for name, column in zip(names, ranks.long().T, strict=True):
        histogram = torch.bincount(column * count // (draws + 1), minlength=count)
        expected = len(column) / count
        statistic = float((histogram - expected).square().sum() / expected)
        level = (column.double() + 0.5) / (draws + 1)
        scalars.append(
            {
                "name": name,
                "histogram": histogram.tolist(),
                "p_value": float(chi2.sf(statistic, count - 1)) if count > 1 else None,
                "coverage": {f"{q:g}": float(((level - 0.5).abs() <= q / 2).double().mean()) for q in LEVELS},
            }
        )
    return {"experiments": ranks.shape[0], "draws": draws, "bins": count, "scalars": scalars}


def shown_number(value: float | None, digits: int = 3) -> str:
    """A number as a table shows it."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}g}"

"""The numbers of a run as plain data: parameters, evidence, modes, cost and warnings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from undrift.density.draws import Draws
from undrift.density.trust import mode_shares, verdict, warnings
from undrift.measure.evidence import effective_sample_size, total_variation

__all__ = ["QUANTILES", "summarise"]

QUANTILES = (0.05, 0.5, 0.95)


def _number(value: Any) -> float | None:
    """A float for JSON, which has no infinities."""
    if value is None:
        return None
    value = float(value)
    return value if math.isfinite(value) else None


def _column(values: Tensor | None, count: int) -> list[float | None]:
    return [None] * count if values is None else [_number(v) for v in values.tolist()]


def summarise(draws: Draws) -> dict[str, Any]:
    """Everything that ``summary.json`` says; what is not known is None.

    Returns:
        ``parameters``: for each scalar of the target mean, sd, mcse (the mean's standard error, over repeats),
        quantiles, rhat, ess; ``log_z`` and its error, the promise, the true value, bounds; modes; evaluations;
        warnings; of training the number of rows, the first and the last.
    """
    labels = draws.target.labels
    mean, mcse = draws.expectation(draws.values)
    sd = draws.std()
    low, middle, high = draws.quantile(QUANTILES).cpu()
    rhat, ess = _column(draws.rhat, len(labels)), _column(draws.chain_ess, len(labels))
    if draws.walker_log_weights is not None:
        ess = [_number(draws.ess)] * len(labels)
    elif not draws.corrected:
        ess = [None] * len(labels)
    columns = (labels, mean.tolist(), sd.tolist(), mcse.tolist(), low.tolist(), middle.tolist(), high.tolist())
    parameters = [
        {
            "name": name,
            "mean": _number(m),
            "sd": _number(s),
            "mcse": _number(e),
            "q5": _number(a),
            "q50": _number(b),
            "q95": _number(c),
            "rhat": r,
            "ess": k,
        }
        for name, m, s, e, a, b, c, r, k in zip(*columns, rhat, ess, strict=True)
    ]
    repeats, walkers, length, _ = draws.states.shape
    log_w = draws.walker_log_weights
    found = warnings(draws)
    return {
        "target": draws.target.name,
        "dim": draws.target.dim,
        "method": draws.method,
        "reason": draws.reason,
        "verdict": verdict(draws, found),
        "warnings": found,
        "draws": {"repeats": repeats, "walkers": walkers, "states": length, "total": repeats * walkers * length},
        "corrected": draws.corrected,
        "log_z": _number(draws.log_z),
        "log_z_std_error": _number(draws.log_z_std_error),
        "promise": draws.promise,
        "repeat_log_z": None if draws.repeat_log_z is None else [_number(z) for z in draws.repeat_log_z.tolist()],
        "true_log_z": _number(draws.target.log_z),
        "bounds": None if draws.bounds is None else {k: _number(v) for k, v in asdict(draws.bounds).items()},
        "ess": _number(draws.ess),
        "ess_by_repeat": None
        if log_w is None
        else [_number(e) for e in effective_sample_size(log_w.double()).tolist()],
        "evaluations": {
            "values": draws.evaluations.values,
            "gradients": draws.evaluations.gradients,
            "total": draws.evaluations.total,
        },
        "seconds": _number(draws.seconds),
        "acceptance": _number(draws.acceptance),
        "relative_step": _number(draws.relative_step),
        "training": _training(draws),
        "modes": _modes(draws),
        "parameters": parameters,
    }


def _modes(draws: Draws) -> dict[str, Any] | None:
    shares = mode_shares(draws)
    if shares is None:
        return None
    return {
        "weights": _column(shares.share, len(shares.share)),
        "std_errors": _column(shares.std_error, len(shares.share)),
        "true_weights": _column(shares.truth, len(shares.share)),
        "total_variation": _number(total_variation(shares.share, shares.truth)),
        "over_dispersion": _number(shares.overdispersion) if torch.isfinite(shares.std_error).all() else None,
    }


def _training(draws: Draws) -> dict[str, Any] | None:
    rows = draws.training
    return {"rows": len(rows), "first": _row(rows[0]), "last": _row(rows[-1])} if rows else None


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _number(v) if isinstance(v, float) else v for k, v in row.items()}

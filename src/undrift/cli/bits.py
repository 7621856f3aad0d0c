"""Rows and remarks about the likelihood of held-out data: its bound in bits per dimension, and the probability flow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from undrift.cli.common import Checkpoint
from undrift.denoise import NetworkDenoiser
from undrift.diffusion import Diffusion, NoiseDiffusion
from undrift.measure import elbo, log_likelihood
from undrift.report import label
from undrift.train import Dataset

__all__ = ["HeldOut", "bound_bits", "flow_bits", "row"]


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Points whose likelihood is asked for, drawn at random from a data set, with fresh noise if they are pixels.

    Attributes:
        data: where they come from.
        y: the points (n, *event).
        log_det: log Jacobian of the pixels' transform (n,), or 0.
        bins: values that a pixel can take; 1 where the data are no pixels, and bits are of a density.
        seed: of the draw, and of all further randomness.
        told: what was observed of each, for a network that is told; or nothing.
    """

    data: Dataset
    y: Tensor
    log_det: Tensor | float
    bins: int
    seed: int
    told: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def draw(cls, data: Dataset, n: int, seed: int, told: bool = False) -> HeldOut:
        """n points, or all there are; with what was observed of them if a network is ``told`` and the data say it."""
        generator = torch.Generator().manual_seed(seed)
        index = torch.randperm(len(data), generator=generator)[:n]
        if data.pixels is None:
            found = cls(data, data.x[index], 0.0, 1, seed)
        else:
            y, log_det = data.pixels.draw(index, generator)
            found = cls(data, y.to(data.x), log_det, data.pixels.bins, seed)
        observed = data.observe(index, found.y, generator) if told else None
        return found if observed is None else replace(found, told={"observed": observed})

    @property
    def given(self) -> str:
        """What the likelihood is of beside the points."""
        return " given what was observed of each" if self.told else ""


def bound_bits(
    diffusion: Diffusion | NoiseDiffusion,
    checkpoint: Checkpoint,
    points: HeldOut,
    times: int,
    sigma_min: float | None,
    progress: bool,
) -> tuple[list[dict[str, Any]], list[str]]:
    """The bound in bits per dimension, and its terms, as rows of a table; and what to know about them.

    Args:
        diffusion: the model, under the process it is measured under.
        checkpoint: where it comes from.
        points: dequantised pixels.
        times: per point.
        sigma_min: where the decoder takes over; None for the level that the model was trained from.
        progress: show a bar.
    """
    denoiser = diffusion.denoiser if isinstance(diffusion, Diffusion) else None
    lowest = denoiser.sigma_min if isinstance(denoiser, NetworkDenoiser) else None
    level = sigma_min or checkpoint.notes.get("sigma_min") or lowest or 1e-3
    told: dict[str, Any] = dict(points.told)
    found = elbo(diffusion, points.y, sigma_min=level, samples=times, seed=points.seed, progress=progress, **told)
    bits, error = found.bits_per_dim(points.log_det, points.bins)
    scale, n = found.dim * math.log(2), len(points.y)
    rows = [row(f"bits per dimension, upper bound, {n} points", bits, error)]
    for name in ("prior", "path", "start"):
        rows.append(row(f"of these, {name} term", -float(getattr(found, name).mean()) / scale))
    change = math.log2(points.bins) - float(torch.as_tensor(points.log_det).mean()) / scale
    rows.append(row("of these, change of variables", change))
    remarks = [
        f"Upper bound: minus the evidence lower bound of {n} points of {points.data.name}{points.given} under "
        f"{label(diffusion.process)}, {times} times a point, the decoder from noise level {level:g} on; the standard "
        "error counts the choice of points, times and noise."
    ]
    if lowest is not None and level < lowest:
        remarks.append(
            f"The denoiser was trained down to noise level {lowest:g} only, and answers below it as at that level."
        )
    if checkpoint.tones.pixels is None:
        remarks.append("The model does not say that it was trained on dequantised pixels; the bound may be loose.")
    return rows, remarks


def flow_bits(
    diffusion: Diffusion | NoiseDiffusion, points: HeldOut, tolerance: float, progress: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """The likelihood by the probability flow, in bits per dimension, as a row of a table; and what to know about it."""
    told: dict[str, Any] = dict(points.told)
    result = log_likelihood(
        diffusion, points.y, rtol=tolerance, atol=tolerance, seed=points.seed, progress=progress, **told
    )
    bits, n = result.bits_per_dim(points.log_det, points.bins), len(points.y)
    error = float(bits.std()) / math.sqrt(n) if n > 1 else None
    kind = "a lower bound on the likelihood" if diffusion.process.channels > 1 else "the model's density"
    if points.data.pixels is not None:
        remark = (
            f"Probability flow: {kind}, of {n} points of {points.data.name}{points.given}, one draw of dequantisation "
            "noise each."
        )
        return [row(f"bits per dimension, probability flow, {n} points", float(bits.mean()), error)], [remark]
    remark = (
        f"Bits per dimension: of {n} points of {points.data.name}{points.given}, scaled as for training and not "
        f"dequantised, so the values are of a density ({kind}) and may be negative."
    )
    return [row("bits per dimension", float(bits.mean()), error)], [remark]


def row(name: str, value: float, error: float | None = None) -> dict[str, Any]:
    """A measure without a floor, with its standard error where that is known."""
    known = error is not None and math.isfinite(error)
    return {"name": name, "value": f"{value:.4f}", "floor": None, "std_error": f"{error:.4f}" if known else None}

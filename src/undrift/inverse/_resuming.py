"""What a journal holds of runs on posteriors: which run it is of, and the states kept so far."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from undrift.inverse.posterior import Posterior

__all__ = ["APART", "marks", "packed", "unpacked"]

APART = "posterior, start, setting or seed"
"""What tells runs apart, in words."""


def marks(posterior: Posterior, start: Tensor) -> dict[str, Any]:
    """Values by which runs on other posteriors, or from other starts (n, *event), are told apart."""
    space = posterior.space
    probe = torch.arange(start[0].numel(), dtype=start.dtype, device=start.device).cos().reshape(1, *start.shape[1:])
    points = start.detach() + space.colour(probe)
    with torch.no_grad():
        likelihood, slope = posterior.log_likelihood(points), posterior.prior.slope(points[:2], 0.1)
    return {"space": space, "start": start, "likelihood": likelihood, "slope": slope, "probe": points[:1]}


def packed(states: list[Tensor], likelihoods: list[Tensor]) -> dict[str, Tensor]:
    """States kept so far and their log-likelihoods, as tensors."""
    lists = {"states": states, "likelihoods": likelihoods}
    return {name: torch.stack(values, 1) for name, values in lists.items() if values}


def unpacked(tensors: dict[str, Tensor], place: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """The inverse of :func:`packed`."""
    states, likelihoods = (
        list(tensors[name].to(place).unbind(1)) if name in tensors else [] for name in ("states", "likelihoods")
    )
    return states, likelihoods

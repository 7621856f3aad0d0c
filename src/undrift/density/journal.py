"""Which run of a method a journal belongs to."""

from __future__ import annotations

from typing import Any

import torch

from undrift._journal import digest
from undrift.density.target import Target

__all__ = ["APART", "fingerprint"]

APART = "target, method, n, repeats or seed"
"""What tells runs apart, in words."""


def fingerprint(target: Target, **settings: Any) -> str:
    """What makes two runs the same: their settings, and the target's value at a fixed point."""
    probe = torch.linspace(-0.5, 0.5, target.dim, dtype=torch.float64).unsqueeze(0)
    value = f"{float(target.log_prob(probe)):.9g}"
    return digest(**settings, target=target.name, dim=target.dim, value=value)

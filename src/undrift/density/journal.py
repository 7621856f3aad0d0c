"""Which run of a method a journal belongs to."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from undrift.config import ConfigError, describe
from undrift.density.target import Target

__all__ = ["APART", "fingerprint"]

APART = "target, method, n, repeats or seed"
"""What tells runs apart, in words."""


def fingerprint(target: Target, **settings: Any) -> str:
    """What makes two runs the same: their settings, and the target's value at a fixed point."""
    plain: dict[str, Any] = {}
    for key, value in settings.items():
        try:
            plain[key] = describe(value)
        except ConfigError:
            plain[key] = repr(value)
    probe = torch.linspace(-0.5, 0.5, target.dim, dtype=torch.float64).unsqueeze(0)
    plain |= {"target": target.name, "dim": target.dim, "value": f"{float(target.log_prob(probe)):.9g}"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()

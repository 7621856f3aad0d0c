"""The numbers that come with the library, in ``undrift/density/data``; its NOTICE.md says where each file is from."""

from __future__ import annotations

import functools
import json
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Placed", "Reference", "load_json", "load_npz", "references"]


@functools.cache
def load_json(name: str) -> Any:
    """Contents of ``data/<name>.json``; shared between callers, not to be changed."""
    return json.loads((files("undrift.density") / "data" / f"{name}.json").read_text(encoding="utf-8"))


@functools.cache
def load_npz(name: str) -> dict[str, Tensor]:
    """Arrays of ``data/<name>.npz`` as float64 tensors."""
    path = files("undrift.density") / "data" / f"{name}.npz"
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
        return {key: torch.from_numpy(archive[key].astype(np.float64)) for key in archive.files}


class Placed:
    """Constants of a target, float64, copied once to each device and dtype they are asked for.

    Args:
        constants: name -> tensor.
    """

    def __init__(self, **constants: Tensor) -> None:
        self._home = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in constants.items()}
        self._copies: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}

    def on(self, x: Tensor) -> dict[str, Tensor]:
        """The constants where x is, in x's dtype."""
        key = (x.device, x.dtype)
        if key not in self._copies:
            self._copies[key] = {name: value.to(x) for name, value in self._home.items()}
        return self._copies[key]


class Reference(NamedTuple):
    """What reference draws say of one scalar, with Monte Carlo standard errors.

    Attributes:
        mean: of the draws.
        sd: standard deviation.
        mcse_mean: standard error of ``mean``.
        mcse_sd: standard error of ``sd``.
    """

    mean: float
    sd: float
    mcse_mean: float
    mcse_sd: float


def references(name: str) -> dict[str, Reference]:
    """Reference of every scalar of a posterior, by the label that :attr:`Target.labels` gives it."""
    return {label: Reference(*numbers) for label, numbers in load_json("references")[name].items()}

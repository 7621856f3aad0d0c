"""What is given to condition on: arrays and images on disk, masks, truths, and what was seen of them."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from undrift.cli.common import Checkpoint
from undrift.config import ConfigError, build
from undrift.observe import GaussianNoise, Noise, Observation, Operator, Points
from undrift.report import Tones
from undrift.train import DataSource, Simulated

__all__ = [
    "MASKS",
    "direct",
    "known_part",
    "noise_level",
    "pick",
    "read_event",
    "read_mask",
    "seen",
    "sites",
    "trained_on",
]

MASKS = ("left", "right", "top", "bottom", "frame")
"""Masks that go by a name: which half of the last axes is known, or all but the middle quarter."""

_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


def read_array(path: str, place: str, keys: Sequence[str]) -> Tensor:
    """The array of an npz file that goes by one of ``keys``, or its only one.

    Raises:
        ConfigError: naming the flag and the file.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"{place}: no such file: {file.absolute()}.")
    try:
        with np.load(file, allow_pickle=False) as found:
            names = list(getattr(found, "files", []))
            key = next((k for k in keys if k in names), names[0] if len(names) == 1 else None)
            if key is None:
                wanted = " or ".join(repr(k) for k in keys)
                raise ConfigError(f"{place}: {file} holds {', '.join(names) or 'one bare array'}; expected {wanted}.")
            values = found[key]
    except ConfigError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{place}: {file} is not a readable npz file ({error}).") from error
    if values.dtype.kind not in "fiub":
        raise ConfigError(f"{place}: array {key!r} of {file} must hold numbers, got {values.dtype}.")
    return torch.from_numpy(np.ascontiguousarray(values))


def _read_picture(path: str, place: str, channels: int) -> Tensor:
    """An image file (channels, H, W) in [0, 1]."""
    from PIL import Image, UnidentifiedImageError

    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"{place}: no such file: {file.absolute()}.")
    try:
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"), np.float32) / 255
    except (UnidentifiedImageError, OSError) as error:
        raise ConfigError(f"{place}: {file} is not a readable image ({error}).") from error
    x = torch.from_numpy(pixels)
    return x.unsqueeze(0) if channels == 1 else x.permute(2, 0, 1)


def _is_picture(path: str, event: Sequence[int]) -> bool:
    return len(event) == 3 and event[0] in (1, 3) and Path(path).suffix.lower() in _PICTURES


def read_event(path: str, place: str, event: tuple[int, ...], tones: Tones | None = None) -> Tensor:
    """One point (*event) from an npz file (x or known), or an image file.

    Raises:
        ConfigError: if the file is not one, or not of this shape.
    """
    if _is_picture(path, event):
        shades = _read_picture(path, place, event[0])
        if tones is not None and tones.pixels is not None:
            raise ConfigError(f"{place}: the model is of dequantised pixels; give their values as an npz file.")
        low, high = (-1.0, 1.0) if tones is None else (tones.low, tones.high)
        x = low + shades * (high - low)
    else:
        x = read_array(path, place, ("x", "known", "truth")).float()
    if x.shape == (1, *event):
        x = x[0]
    if tuple(x.shape) != tuple(event):
        raise ConfigError(f"{place}: {path} holds an array of shape {tuple(x.shape)}, the model makes {tuple(event)}.")
    return x


def read_mask(mask: str, event: tuple[int, ...]) -> Tensor:
    """Where the data are known, (*event), true or false: a name of MASKS, or a file: npz (mask) or an image.

    Raises:
        ConfigError: if it is none of these, or all or nothing is known.
    """
    if mask in MASKS:
        known = torch.zeros(event, dtype=torch.bool)
        n = event[-1]
        if mask in ("top", "bottom", "frame") and len(event) < 2:
            raise ConfigError(f"mask: {mask} needs events of two axes or more, got {event}; use left or right.")
        if mask == "left":
            known[..., : n // 2] = True
        elif mask == "right":
            known[..., n - n // 2 :] = True
        elif mask == "top":
            known[..., : event[-2] // 2, :] = True
        elif mask == "bottom":
            known[..., event[-2] - event[-2] // 2 :, :] = True
        else:
            known[...] = True
            known[..., event[-2] // 4 : event[-2] - event[-2] // 4, n // 4 : n - n // 4] = False
    else:
        if not Path(mask).expanduser().is_file():
            raise ConfigError(f"mask: {mask!r} is neither one of {', '.join(MASKS)} nor a file.")
        values = (
            _read_picture(mask, "mask", 1)[0] > 0.5 if _is_picture(mask, event) else read_array(mask, "mask", ("mask",))
        )
        if values.dtype != torch.bool and not bool(((values == 0) | (values == 1)).all()):
            raise ConfigError(f"mask: {mask} must hold 1 (known) and 0 (unknown) only.")
        try:
            known = values.bool().expand(event)
        except RuntimeError:
            raise ConfigError(
                f"mask: {mask} has shape {tuple(values.shape)}, which does not fit events of shape {event}."
            ) from None
    if not bool(known.any()) or bool(known.all()):
        raise ConfigError(f"mask: {'nothing' if not bool(known.any()) else 'everything'} is known; nothing to do.")
    return known.clone()


def trained_on(checkpoint: Checkpoint) -> DataSource | None:
    """The source of the data that a run was trained on, by the configuration beside its model, if that is there."""
    path = checkpoint.path.parent / "config.yaml"
    if not path.is_file():
        return None
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        return build(config["data"], DataSource) if isinstance(config, dict) and "data" in config else None
    except ConfigError:
        return None


def pick(source: DataSource | None, index: int, checkpoint: Checkpoint) -> tuple[Tensor, str]:
    """Point ``index`` of a source as the truth (*event), and its name.

    Raises:
        ConfigError: if there is no such point, or it is not what the model makes.
    """
    if source is None:
        source = trained_on(checkpoint)
    if source is None:
        raise ConfigError(
            "simulate: no configuration beside the model says what it was trained on; name the data, as in "
            "--source '{type: Digits, split: test}'."
        )
    if isinstance(source, Simulated):
        source = source.source
    data = source.load()
    if data.event != checkpoint.event:
        raise ConfigError(
            f"source: points of {data.name} have shape {data.event}, the model of {checkpoint.path} makes "
            f"{checkpoint.event}."
        )
    if not 0 <= index < len(data):
        raise ConfigError(f"simulate: {data.name} has points 0 to {len(data) - 1}, got {index}.")
    return data.x[index], f"point {index} of {data.name}"


def seen(
    operator: Operator,
    noise: Noise,
    event: tuple[int, ...],
    y: Tensor | None,
    truth: Tensor | None,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> Observation:
    """The observation of an unknown of shape ``event``: data that were read, or simulated from a truth.

    Raises:
        ConfigError: with the reason of what does not fit.
    """
    try:
        predicted = operator(torch.zeros(2, *event, dtype=dtype))
    except (ValueError, RuntimeError, IndexError) as error:
        raise ConfigError(
            f"observe: {type(operator).__name__} does not fit events of shape {event}: {error}"
        ) from error
    if y is not None and y.shape != predicted.shape[1:]:
        if y.shape == (1, *predicted.shape[1:]):
            y = y[0]
        else:
            raise ConfigError(
                f"data: has shape {tuple(y.shape)}, {type(operator).__name__} sees {tuple(predicted.shape[1:])} of "
                f"events of shape {event}."
            )
    try:
        if y is not None:
            observation = Observation(operator, noise, y.to(predicted))
        else:
            assert truth is not None
            generator = torch.Generator().manual_seed(seed)
            observation = Observation.simulate(operator, noise, truth.to(dtype).unsqueeze(0), generator)
        observation.log_likelihood(torch.zeros(2, *event, dtype=dtype))
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"observe: {error}") from error
    return observation


def sites(operator: Operator) -> Tensor | None:
    """Where in the unit cube the data were taken, (m, d), if the operator reads at places."""
    places: Any = getattr(operator, "locations", None)
    if places is None:
        return None
    return torch.tensor([s if isinstance(s, (tuple, list)) else (s,) for s in places], dtype=torch.float64)


def direct(operator: Operator) -> bool:
    """Whether data are values of the unknown itself."""
    return isinstance(operator, Points)


def noise_level(noise: Noise) -> float | None:
    """The standard deviation of a datum's noise, if it is one number."""
    return float(noise.std) if isinstance(noise, GaussianNoise) and not isinstance(noise.std, Tensor) else None


def known_part(
    known: str | None, mask: str | None, truth: Tensor | None, event: tuple[int, ...], tones: Tones
) -> tuple[Tensor, Tensor]:
    """Known values (*event), 0 where unknown, and the mask.

    Raises:
        ConfigError: for files that do not fit, or values that are not finite where they are said to be known.
    """
    if known is not None:
        values = read_event(known, "known", event, tones)
    else:
        assert truth is not None
        values = truth
    where = read_mask(mask, event) if mask is not None else values.isfinite()
    if mask is None and bool(where.all()):
        raise ConfigError(
            f"mask: needed with {known}, all of whose values are there; give --mask, or mark what is unknown by NaN."
        )
    if not bool(values[where].isfinite().all()):
        raise ConfigError(f"known: {known} has values that are not finite where the mask says they are known.")
    return torch.where(where, values, 0.0), where

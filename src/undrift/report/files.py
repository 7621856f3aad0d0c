"""What a run leaves in its folder: written whole or not at all, and nothing that another run left is overwritten."""

from __future__ import annotations

import io
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["JsonLines", "read_npz", "write_bytes", "write_json", "write_npz", "write_provenance"]


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write a file atomically: a reader, or a kill, sees the old file or the new one. Makes its folder."""
    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, place)
    finally:
        partial.unlink(missing_ok=True)
    return place


def write_json(path: str | Path, data: Any) -> Path:
    return write_bytes(path, (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())


def write_npz(path: str | Path, x: Tensor, settings: Mapping[str, Any], **more: Tensor) -> Path:
    """Samples ``x`` (n, *event), in the range of the data, and ``settings``, a JSON text of how they were made.

    ``more`` are further arrays, such as ``log_weights`` (n,).
    """
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {k: v.cpu().numpy() for k, v in {"x": x, **more}.items()}
    np.savez_compressed(buffer, **arrays, settings=np.array(json.dumps(dict(settings))))
    return write_bytes(path, buffer.getvalue())


def read_npz(path: str | Path) -> tuple[Tensor, dict[str, Any]]:
    """Samples and settings of :func:`write_npz`; any npz with an array ``x`` will do. Pickled arrays are refused.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no samples.
    """
    place = Path(path)
    if not place.is_file():
        raise FileNotFoundError(f"{place}: no such file; undrift sample writes one.")
    try:
        with np.load(place, allow_pickle=False) as file:
            names = getattr(file, "files", [])
            if "x" not in names:
                raise ValueError(f"holds no array 'x', only {', '.join(names) or 'one without a name'}")
            x = torch.from_numpy(file["x"])
            settings = json.loads(str(file["settings"])) if "settings" in names else {}
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{place} is not a file of samples: {error}.") from error
    if x.ndim < 2 or not x.is_floating_point() or not bool(x.isfinite().all()):
        raise ValueError(f"{place}: x must be finite floating (n, *event), got {x.dtype} {tuple(x.shape)}.")
    return x, settings


def write_provenance(folder: str | Path, command: Sequence[str], seconds: float) -> Path:
    """``run.json``: the command that made the folder, how long it took, and the versions it ran with."""
    import undrift

    return write_json(
        Path(folder) / "run.json",
        {
            "command": list(command),
            "seconds": round(seconds, 1),
            "undrift": undrift.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        },
    )


class JsonLines:
    """Rows of JSON, one a line, appended as they are found; the half line that a kill leaves is dropped."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.rows: list[dict[str, Any]] = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            try:
                self.rows.append(json.loads(line))
            except ValueError:
                break

    def append(self, row: Mapping[str, Any]) -> None:
        self.rows.append(dict(row))
        write_bytes(self.path, "".join(json.dumps(r) + "\n" for r in self.rows).encode())

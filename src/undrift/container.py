r"""One file: tensors and a JSON description, sealed.

The file is a valid safetensors file (an 8-byte length, a JSON header, the tensors' bytes), whose ``__metadata__`` holds

    undrift       version of this format
    description   JSON text
    sha256        digest of the whole file, read with these 64 characters as zeros

so a change of any byte is noticed, and equal contents give equal files. Nothing in it can execute: pickles are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

__all__ = ["FORMAT", "CheckpointError", "read_file", "write_file"]

FORMAT = "1"
_BLANK = "0" * 64


class CheckpointError(ValueError):
    """A file that is not an intact checkpoint of this library; the message says what it is instead."""


def write_file(path: str | Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write atomically: whatever happens, ``path`` holds either the old file or the new one, complete.

    Args:
        path: where to; its folder must exist.
        tensors: by name.
        description: plain data for JSON.
    """
    place = Path(path)
    blob = safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in sorted(tensors.items())})
    length = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + length])
    header["__metadata__"] = {
        "undrift": FORMAT,
        "sha256": _BLANK,
        "description": json.dumps(description, allow_nan=False),
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(head)
    digest.update(memoryview(blob)[8 + length :])
    at = _digest_at(head, _BLANK)
    head = head[:at] + digest.hexdigest().encode() + head[at + 64 :]
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(head)
            file.write(memoryview(blob)[8 + length :])
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, place)
    finally:
        partial.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(place.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)  # so that the new name survives a power failure
        finally:
            os.close(folder)


def _digest_at(head: bytes, digest: str) -> int:
    key = b'"sha256":"'
    at = head.find(key + digest.encode())
    return -1 if at < 0 else at + len(key)


def read_file(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and the description, of an intact file.

    Raises:
        FileNotFoundError: if there is none.
        CheckpointError: if it is a pickle, another kind of file, truncated, altered, or of an unknown format version.
    """
    place = Path(path)
    if not place.is_file():
        raise FileNotFoundError(
            f"no checkpoint at {place.absolute()}; undrift train writes model.safetensors in its folder."
        )
    raw = place.read_bytes()
    if raw[:2] == b"PK" or (raw[:1] == b"\x80" and raw[1:2] in b"\x00\x01\x02\x03\x04\x05" and raw[3:8].strip(b"\x00")):
        raise CheckpointError(
            f"{place} is a pickle (torch.save), which can run any code when loaded and is never opened here; load it "
            "where you trust it and save its tensors with undrift.train.save."
        )
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or 8 + length > len(raw):
        raise CheckpointError(f"{place} is truncated, or no safetensors file: {len(raw)} bytes do not hold its header.")
    head, data = raw[: 8 + length], memoryview(raw)[8 + length :]
    try:
        header = json.loads(head[8:])
        size = max((int(v["data_offsets"][1]) for k, v in header.items() if k != "__metadata__"), default=0)
        meta = header.get("__metadata__", {})
        version, seal, text = (meta.get(k) for k in ("undrift", "sha256", "description"))
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{place} is damaged, or no safetensors file: unreadable header ({error}).") from error
    if not (isinstance(version, str) and isinstance(seal, str) and isinstance(text, str)):
        raise CheckpointError(f"{place} is no undrift checkpoint: its header lacks a version, description or digest.")
    if version != FORMAT:
        raise CheckpointError(
            f"{place} has format version {version!r}, this undrift reads {FORMAT!r}; it comes from "
            "another release, or is damaged."
        )
    if len(data) != size:
        raise CheckpointError(
            f"{place} is truncated or overlong: its header promises {size} bytes of data, it has {len(data)}."
        )
    at = _digest_at(head, seal)
    digest = hashlib.sha256(head[:at] + _BLANK.encode() + head[at + 64 :])
    digest.update(data)
    if at < 0 or digest.hexdigest() != seal:
        raise CheckpointError(
            f"{place} is damaged: its contents do not match its digest. Use a backup or an earlier checkpoint."
        )
    return safetensors.torch.load(raw), json.loads(text)

"""Where training points come from: bundled digits, files in common formats, toy data. Images are scaled to [-1, 1]."""

from __future__ import annotations

import dataclasses
import gzip
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from undrift.observe import GaussianNoise, Identity, Noise, Operator
from undrift.pixels import PixelTransform, dequantise
from undrift.space import Basis, Cosine
from undrift.train.data import Dataset, DataSource, Grids, Measured, Pixels

__all__ = ["Dequantised", "Digits", "Idx", "ImageFolder", "Npz", "Resampled", "Ring", "Simulated"]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}


@dataclass(frozen=True, eq=False)
class Digits(DataSource):
    """The 1797 handwritten digits of 8 x 8 pixels that come with scikit-learn, (N, 1, 8, 8) in [-1, 1], 10 classes.

    Args:
        split: 1500 for "train", 297 for "test", or "all"; the partition is a fixed permutation.
    """

    split: Literal["train", "test", "all"] = "train"

    def __post_init__(self) -> None:
        if self.split not in ("train", "test", "all"):
            raise ValueError(f"Digits: split must be 'train', 'test' or 'all', got {self.split!r}.")

    def load(self) -> Dataset:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1797))
        part = {"train": order[:1500], "test": order[1500:], "all": order}[self.split]
        x = torch.as_tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
        return Dataset(f"digits-{self.split}", x[part], torch.as_tensor(labels, dtype=torch.int64)[part])


def _exists(owner: str, path: str) -> Path:
    place = Path(path).expanduser()
    if not place.exists():
        raise FileNotFoundError(f"{owner}: no such file or folder: {place.absolute()}.")
    return place


def _read_idx(path: str, dims: int) -> np.ndarray:
    place = _exists("Idx", path)
    raw = place.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"Idx: {place} is a damaged gzip file ({error}).") from error
    expected = bytes([0, 0, 8, dims])
    if raw[:4] != expected:
        raise ValueError(
            f"Idx: {place} must start with {expected.hex()} (bytes in {dims} dimension{'s' * (dims > 1)}), "
            f"got {raw[:4].hex() or 'nothing'}; are images and labels swapped?"
        )
    shape = np.frombuffer(raw, ">u4", dims, 4) if len(raw) >= 4 + 4 * dims else np.zeros(dims, int)
    size = int(np.prod(shape, dtype=np.int64))
    if len(raw) != 4 + 4 * dims + size or size == 0:
        raise ValueError(f"Idx: {place} promises {size} bytes of data, it has {max(len(raw) - 4 - 4 * dims, 0)}.")
    return np.frombuffer(raw, np.uint8, size, 4 + 4 * dims).reshape(shape)


@dataclass(frozen=True, eq=False)
class Idx(DataSource):
    """MNIST's file format, plain or gzipped: (N, 1, H, W) in [-1, 1].

    Args:
        images: path of an idx3-ubyte file.
        labels: path of the idx1-ubyte file that belongs to it, or None.
    """

    images: str
    labels: str | None = None

    def load(self) -> Dataset:
        x = torch.from_numpy(_read_idx(self.images, 3).copy())
        y = None if self.labels is None else torch.from_numpy(_read_idx(self.labels, 1).astype(np.int64))
        name = Path(self.images).name.removesuffix(".gz")
        return Dataset(name, x.unsqueeze(1).float() / 127.5 - 1, y)


@dataclass(frozen=True, eq=False)
class Npz(DataSource):
    """One array of an npz file, points along its first axis. Pickled arrays are refused.

    Args:
        path: the file.
        key: name of the array of points.
        labels: name of the array of classes, or None.
        low, high: values that become -1 and 1; None leaves the values as they are, except that bytes are 0 to 255.
        layout: "as is", or for images "NHW" (grey) or "NHWC", which become (N, C, H, W).
        observed: name of an array of data (N, ...), one for each point, for models of points given data; or None. It is
            left as it is.
    """

    path: str
    key: str = "x"
    labels: str | None = None
    low: float | None = None
    high: float | None = None
    layout: Literal["as is", "NHW", "NHWC"] = "as is"
    observed: str | None = None

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise ValueError("Npz: give both low and high, or neither.")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError(f"Npz: low must be below high, got {self.low} and {self.high}.")

    def load(self) -> Dataset:
        place = _exists("Npz", self.path)
        try:
            with np.load(place, allow_pickle=False) as file:
                if not isinstance(file, np.lib.npyio.NpzFile):
                    raise ValueError(f"Npz: {place} holds one bare array; save it with numpy.savez.")
                for key in filter(None, (self.key, self.labels, self.observed)):
                    if key not in file.files:
                        raise ValueError(
                            f"Npz: {place} has no array {key!r}; it holds {', '.join(file.files) or 'none'}."
                        )
                data, labels = file[self.key], None if self.labels is None else file[self.labels]
                seen = None if self.observed is None else file[self.observed]
        except (zipfile.BadZipFile, EOFError, OSError) as error:
            raise ValueError(f"Npz: {place} is not a readable npz file ({error}).") from error
        except ValueError as error:
            if "pickle" in str(error):
                raise ValueError(f"Npz: {place} holds pickled objects, which are never loaded.") from error
            raise
        if data.dtype.kind not in "fiub":
            raise ValueError(f"Npz: array {self.key!r} of {place} must hold numbers, got {data.dtype}.")
        if seen is not None and seen.dtype.kind not in "fiub":
            raise ValueError(f"Npz: array {self.observed!r} of {place} must hold numbers, got {seen.dtype}.")
        ndim = {"NHW": 3, "NHWC": 4}.get(self.layout, data.ndim)
        if data.ndim != ndim:
            raise ValueError(
                f"Npz: layout {self.layout} needs {ndim} dimensions, array {self.key!r} has shape {data.shape}."
            )
        low, high = (0.0, 255.0) if self.low is None and data.dtype == np.uint8 else (self.low, self.high)
        x = torch.from_numpy(data.astype(np.float32))
        if low is not None and high is not None:
            x = (x - low) * (2 / (high - low)) - 1
        x = x.unsqueeze(1) if self.layout == "NHW" else x.movedim(-1, 1) if self.layout == "NHWC" else x
        y = None if labels is None else torch.from_numpy(labels.astype(np.int64))
        given = None if seen is None else torch.from_numpy(seen.astype(np.float32))
        return Dataset(place.stem, x.contiguous(), y, observed=given)


@dataclass(frozen=True, eq=False)
class ImageFolder(DataSource):
    """Images of a folder and its subfolders, cropped to the central square and resized: (N, C, size, size) in [-1, 1].

    If all images lie in subfolders, the subfolders of the first level, in alphabetical order, are the classes.

    Args:
        path: the folder.
        size: height and width.
        grey: one channel of brightness instead of three of colour.
    """

    path: str
    size: int
    grey: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"ImageFolder: size must be at least 1, got {self.size}.")

    def load(self) -> Dataset:
        from PIL import Image, UnidentifiedImageError

        root = _exists("ImageFolder", self.path)
        files = sorted(f for f in root.rglob("*") if f.suffix.lower() in _SUFFIXES)
        if not files:
            raise ValueError(f"ImageFolder: {root} holds no images ({', '.join(sorted(_SUFFIXES))}).")
        pictures = np.empty((len(files), self.size, self.size, 1 if self.grey else 3), np.uint8)
        for i, file in enumerate(files):
            try:
                with Image.open(file) as image:
                    side = min(image.size)
                    left, top = (image.width - side) // 2, (image.height - side) // 2
                    square = image.convert("L" if self.grey else "RGB").resize(
                        (self.size, self.size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side)
                    )
            except (UnidentifiedImageError, OSError) as error:
                raise ValueError(f"ImageFolder: {file} is not a readable image ({error}).") from error
            pictures[i] = np.asarray(square).reshape(self.size, self.size, -1)
        x = torch.from_numpy(pictures).movedim(-1, 1).float().contiguous() / 127.5 - 1
        folders = [f.relative_to(root).parts[0] for f in files if f.parent != root]
        names = sorted(set(folders))
        labels = torch.tensor([names.index(f) for f in folders]) if len(folders) == len(files) else None
        return Dataset(root.name, x, labels)


@dataclass(frozen=True, eq=False)
class Ring(DataSource):
    """Toy data in the plane: equal Gaussians, equally spaced on a circle; the mode is the class. (n, 2), not scaled.

    Args:
        modes: number of Gaussians.
        radius: of the circle.
        std: deviation of each Gaussian.
        n: number of points.
        seed: of the draw.
    """

    modes: int = 8
    radius: float = 1.3
    std: float = 0.08
    n: int = 20_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("modes", self.modes), ("n", self.n)):
            if value < 1:
                raise ValueError(f"Ring: {name} must be at least 1, got {value}.")
        for name, size in (("radius", self.radius), ("std", self.std)):
            if not 0 < size < float("inf"):
                raise ValueError(f"Ring: {name} must be positive and finite, got {size}.")

    def load(self) -> Dataset:
        g = torch.Generator().manual_seed(self.seed)
        mode = torch.randint(self.modes, (self.n,), generator=g)
        angle = mode.double() * (2 * torch.pi / self.modes)
        centre = self.radius * torch.stack([angle.cos(), angle.sin()], -1)
        x = centre + self.std * torch.randn(self.n, 2, generator=g, dtype=torch.float64)
        bound = self.radius + 4 * self.std
        return Dataset(f"ring-{self.modes}", x.float(), mode, low=-bound, high=bound)


@dataclass(frozen=True, eq=False)
class Dequantised(DataSource):
    """Another source's images as continuous data with a density: every pixel gets uniform noise of its bin's width.

    The noise is fresh at every step of training. Likelihoods and bits per dimension are of such data.

    Args:
        source: images scaled from 0 ... bins - 1 to [-1, 1], as all sources of images here are.
        transform: "center", to [-1, 1]; or "logit", to the whole line.
        bins: values a pixel can take: 256, and 17 for Digits.
        alpha: margin of the logit transform.
    """

    source: DataSource = field(default_factory=Digits)
    transform: PixelTransform = "center"
    bins: int = 256
    alpha: float = 0.05

    def __post_init__(self) -> None:
        if self.transform not in ("center", "logit"):
            raise ValueError(f"Dequantised: transform must be 'center' or 'logit', got {self.transform!r}.")
        if self.bins < 2:
            raise ValueError(f"Dequantised: bins must be at least 2, got {self.bins}.")
        if not 0 < self.alpha < 0.5:
            raise ValueError(f"Dequantised: alpha must lie in (0, 0.5), got {self.alpha}.")

    def load(self) -> Dataset:
        base = self.source.load()
        scaled = (base.x.double() + 1) / 2 * (self.bins - 1)
        values = scaled.round()
        miss = float((scaled - values).abs().max())
        if miss > 1e-3 or float(values.min()) < 0 or float(values.max()) > self.bins - 1:
            raise ValueError(
                f"Dequantised: {base.name} holds no whole numbers of 0 ... {self.bins - 1} scaled to [-1, 1] (off by "
                f"up to {miss:.3g}, from {float(scaled.min()):.4g} to {float(scaled.max()):.4g}); give bins, how many "
                "values a pixel can take, or data that are pixels."
            )
        pixels = Pixels(values.to(torch.int16), self.transform, self.bins, self.alpha)
        ends = torch.tensor([[0], [self.bins - 1]])
        centre, low_high = (
            dequantise(v, self.transform, bins=self.bins, alpha=self.alpha, noise=torch.tensor(0.5))[0]
            for v in (pixels.values, ends)
        )
        low, high = low_high.flatten().tolist()
        name = f"{base.name}, dequantised ({self.transform})"
        return Dataset(name, centre.float(), base.labels, low, high, pixels)


@dataclass(frozen=True, eq=False)
class Simulated(DataSource):
    """Another source's points with observations of them, simulated with fresh noise at every step of training.

    Args:
        source: the points; the operator sees them as they are trained on.
        operator: what an experiment sees.
        noise: law of the data around that.
    """

    source: DataSource
    operator: Operator = field(default_factory=Identity)
    noise: Noise = field(default_factory=lambda: GaussianNoise(0.1))

    def load(self) -> Dataset:
        base = self.source.load()
        measured = Measured(self.operator, self.noise)
        measured.draw(base.x[:1], torch.Generator().manual_seed(0))  # what does not fit must fail before training
        return dataclasses.replace(base, name=f"{base.name}, observed", observed=measured)


@dataclass(frozen=True, eq=False)
class Resampled(DataSource):
    """Another source's fields on other grids, by way of a basis; of several grids, every step of training draws one.

    Args:
        source: fields (N, *grid), or (N, C, *grid).
        basis: Cosine, Sine or Fourier, of the domain's dimension.
        grids: the grids.
    """

    source: DataSource
    grids: tuple[tuple[int, ...], ...]
    basis: Basis = field(default_factory=Cosine)

    def load(self) -> Dataset:
        base, grids = self.source.load(), Grids(self.basis, self.grids)
        if base.pixels is not None:
            raise ValueError(f"Resampled: {base.name} holds pixels with fresh dequantisation noise, not functions.")
        if len(grids.grids) == 1:
            return dataclasses.replace(base, x=self.basis.resample(base.x, grids.grids[0]))
        return dataclasses.replace(base, grids=grids)

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from undrift.config import build
from undrift.train import Dataset, DataSource, Digits, Idx, ImageFolder, Npz, Ring


def test_digits_are_the_bundled_ones_split_without_overlap():
    from sklearn.datasets import load_digits

    train, test, everything = (Digits(s).load() for s in ("train", "test", "all"))
    assert (len(train), len(test), train.event, train.classes) == (1500, 297, (1, 8, 8), 10)
    assert float(train.x.min()) == -1
    assert float(train.x.max()) == 1
    both = torch.cat([train.x, test.x])
    assert torch.equal(both, everything.x)
    raw = torch.as_tensor(load_digits().images).flatten(1)
    assert torch.equal(((both + 1) * 8).flatten(1).double().sort(0).values, raw.sort(0).values)
    assert torch.equal(Digits("train").load().x, train.x)


def test_bytes_come_back():
    data = Dataset("d", torch.linspace(-1, 1, 256).reshape(-1, 1))
    assert torch.equal(data.to_uint8(data.x).flatten(), torch.arange(256, dtype=torch.uint8))
    assert data.to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_std_is_the_deviation_of_a_coordinate():
    x = torch.tensor([[0.0, 10.0], [2.0, 14.0]])
    assert Dataset("d", x).std == pytest.approx(((1 + 4) / 2) ** 0.5)


def write_idx(path, array, magic=None):
    head = bytes([0, 0, 8, array.ndim]) if magic is None else magic
    raw = head + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return str(path)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 4), dtype=np.uint8)
    images = write_idx(tmp_path / f"images{suffix}", pixels)
    labels = write_idx(tmp_path / f"labels{suffix}", np.arange(5, dtype=np.uint8))
    data = Idx(images, labels).load()
    assert np.array_equal(data.to_uint8(data.x)[:, 0].numpy(), pixels)
    assert data.labels.tolist() == [0, 1, 2, 3, 4]


def test_npz_layouts_and_ranges(tmp_path):
    path = str(tmp_path / "a.npz")
    colour = np.random.default_rng(0).integers(0, 256, (4, 2, 3, 3), dtype=np.uint8)
    np.savez(path, colour=colour, grey=colour[..., 0], v=np.eye(4), y=np.array([0, 1, 0, 1]))
    data = Npz(path, "colour", labels="y", layout="NHWC").load()
    assert np.array_equal(data.to_uint8(data.x).movedim(1, -1).numpy(), colour)
    assert data.classes == 2
    assert Npz(path, "grey", layout="NHW").load().event == (1, 2, 3)
    assert torch.equal(Npz(path, "v").load().x, torch.eye(4))
    assert torch.equal(Npz(path, "v", low=0.0, high=2.0).load().x, torch.eye(4) - 1)


def test_image_folder_crops_the_centre_and_reads_classes(tmp_path):
    for name, value in (("b", 200), ("a", 50)):
        (tmp_path / name).mkdir()
        pixels = np.zeros((4, 8), np.uint8)
        pixels[:, 2:6] = value  # the central square of a 4 x 8 picture
        Image.fromarray(pixels).save(tmp_path / name / "x.png")
    data = ImageFolder(str(tmp_path), 4, grey=True).load()
    assert data.to_uint8(data.x).flatten(1).tolist() == [[50] * 16, [200] * 16]
    assert data.labels.tolist() == [0, 1]
    assert ImageFolder(str(tmp_path), 2).load().event == (3, 2, 2)


def test_ring_modes_have_their_radius_width_and_equal_share():
    """Standard errors over n / 8 = 5000 points a mode; 4.5 of them."""
    data = Ring(n=40_000, std=0.1).load()
    count = torch.bincount(data.labels)
    assert float((count - 5000).abs().max()) < 4.5 * (40_000 * 7 / 64) ** 0.5
    for mode in range(8):
        x = data.x[data.labels == mode].double()
        angle = torch.tensor(2 * torch.pi * mode / 8)
        centre = 1.3 * torch.stack([angle.cos(), angle.sin()])
        n = len(x)
        assert float((x.mean(0) - centre).abs().max()) < 4.5 * 0.1 / n**0.5
        assert float((x.var(0) / 0.01 - 1).abs().max()) < 4.5 * (2 / n) ** 0.5


@pytest.mark.skipif("UNDRIFT_DATA" not in os.environ, reason="UNDRIFT_DATA does not name a folder of data sets")
def test_mnist():
    folder = Path(os.environ["UNDRIFT_DATA"]) / "images" / "mnist"
    found = {p.name: str(p) for p in folder.rglob("t10k-*ubyte*")}
    if len(found) < 2:
        pytest.skip(f"no MNIST test files in {folder}")
    images, labels = (next(v for k, v in found.items() if part in k) for part in ("images", "labels"))
    data = Idx(images, labels).load()
    assert (len(data), data.event, data.classes) == (10_000, (1, 28, 28), 10)
    assert data.labels[:5].tolist() == [7, 2, 1, 0, 4]


def wrong_magic(p):
    return Idx(write_idx(p / "x", np.zeros((2, 3), np.uint8), bytes([0, 0, 8, 1])))


def short_idx(p):
    path = Path(write_idx(p / "x", np.zeros((2, 3, 3), np.uint8)))
    path.write_bytes(path.read_bytes()[:-1])
    return Idx(str(path))


def damaged_gzip(p):
    path = Path(write_idx(p / "x.gz", np.zeros((2, 3, 3), np.uint8)))
    path.write_bytes(path.read_bytes()[:-6])
    return Idx(str(path))


def npz(p, **arrays):
    np.savez(p / "a.npz", **arrays)
    return str(p / "a.npz")


def text(p, name):
    (p / name).write_text("no such thing")
    return str(p / name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Idx(str(p / "none")), "Idx: no such file or folder: .*none"),
        (
            wrong_magic,
            r"must start with 00000803 \(bytes in 3 dimensions\), got 00000801; are images",
        ),
        (short_idx, "promises 18 bytes of data, it has 17"),
        (damaged_gzip, "damaged gzip"),
        (lambda p: Npz(str(p / "none.npz")), "Npz: no such file"),
        (lambda p: Npz(npz(p, a=np.zeros(3), b=np.zeros(3)), "x"), "no array 'x'; it holds a, b"),
        (lambda p: Npz(npz(p, x=np.array([{}])), "x"), "pickled objects, which are never loaded"),
        (lambda p: Npz(npz(p, x=np.array(["a"])), "x"), "must hold numbers, got <U1"),
        (lambda p: Npz(text(p, "t.npz")), "not a readable npz file|pickled objects"),
        (
            lambda p: Npz(npz(p, x=np.array([[0.0], [np.nan], [np.inf]]))),
            "2 of 3 points hold NaN or Inf, .* index 1",
        ),
        (lambda p: Npz(npz(p, x=np.zeros((2, 2))), layout="NHWC"), r"needs 4 dimensions, array 'x' has shape \(2, 2\)"),
        (
            lambda p: Npz(npz(p, x=np.zeros((2, 2)), y=np.zeros(3, int)), labels="y"),
            "labels must be whole",
        ),
        (lambda p: Npz("a.npz", low=0.0), "both low and high"),
        (lambda p: ImageFolder(str(p), 8), "holds no images"),
        (lambda p: (text(p, "x.png"), ImageFolder(str(p), 8))[1], "x.png is not a readable image"),
        (lambda p: Digits("validation"), "split must be 'train', 'test' or 'all', got 'validation'"),
        (lambda p: Ring(modes=0), "modes must be at least 1, got 0"),
        (lambda p: build({"type": "Digts"}, DataSource, "data"), r"data.type: unknown 'Digts' \(did you mean 'Digits'"),
    ],
)
def test_bad_data_is_named(tmp_path, make, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make(tmp_path).load()

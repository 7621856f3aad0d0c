import io
import json
import pickle
import random

import pytest
import safetensors.torch
import torch

from undrift.denoise import NetworkDenoiser, SpectralDenoiser
from undrift.diffusion import Diffusion, NoiseDiffusion
from undrift.networks import MLP, UNet
from undrift.process import PSLD, VP, CallableClock
from undrift.space import Blurring, FunctionSpace, Matern, Sine
from undrift.train import CheckpointError, load, notes, save
from undrift.train.checkpoint import parts_of, with_parts


def shaken(network):
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return network


def models():
    torch.manual_seed(0)
    denoiser = NetworkDenoiser(shaken(MLP(2, width=8, depth=1)), sigma_data=0.9, sigma_max=80.0)
    return {
        "denoiser": denoiser,
        "diffusion": Diffusion(PSLD(gamma=0.02, nu=4.02), denoiser),
        "noise": NoiseDiffusion(PSLD(), shaken(MLP(4, width=8, depth=1)), "dsm", "upper", True, 0.7),
    }


@pytest.mark.parametrize("kind", ["denoiser", "diffusion", "noise"])
def test_a_loaded_model_equals_the_saved_one(tmp_path, kind):
    model = models()[kind]
    path = tmp_path / "new" / "model.safetensors"
    save(path, model, {"data": "ring", "event": [2]})
    again = load(path)
    assert type(again) is type(model)
    assert notes(path) == {"data": "ring", "event": [2]}
    if kind == "denoiser":
        x = torch.randn(5, 2)
        assert torch.equal(again(x, 0.4), model(x, 0.4))
        assert not again.training
    else:
        z = torch.randn(5, 2, 2)
        assert torch.equal(again.score(z, 0.3), model.score(z, 0.3))
        assert torch.equal(again.predict(z, 0.3), model.predict(z, 0.3))


@pytest.mark.parametrize("coordinates", ["physical", "whitened"])
def test_a_loaded_model_lives_where_the_saved_one_did(tmp_path, coordinates):
    torch.manual_seed(0)
    space = FunctionSpace(Sine(), Matern(1.5, 4.0), coordinates)
    net, joint = shaken(MLP(3, width=8, depth=1)), shaken(MLP(6, width=8, depth=1))
    z = torch.randn(5, 2, 3)
    for model in (NoiseDiffusion(PSLD(), joint, space=space), Diffusion(PSLD(), NetworkDenoiser(net, space=space))):
        save(tmp_path / "m.safetensors", model)
        again = load(tmp_path / "m.safetensors")
        assert again.space.coordinates == coordinates
        assert torch.equal(again.score(z, 0.3), model.score(z, 0.3))
    apart = Diffusion(PSLD(), NetworkDenoiser(net), space)
    save(tmp_path / "m.safetensors", apart)
    assert load(tmp_path / "m.safetensors").space == space
    assert with_parts(apart, parts_of(apart)).space == space
    blurred = SpectralDenoiser(net, space, Matern(2.0, 5.0), Blurring(width=0.2))
    save(tmp_path / "m.safetensors", blurred)
    assert torch.equal(load(tmp_path / "m.safetensors")(z[:, 0], 0.3), blurred(z[:, 0], 0.3))


def test_channels_last_weights_survive(tmp_path):
    torch.manual_seed(0)
    model = NetworkDenoiser(shaken(UNet(1, 8, width=8))).eval()
    save(tmp_path / "m", model)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(load(tmp_path / "m")(x, 0.4), model(x, 0.4))


def test_equal_models_give_equal_files_and_the_file_is_plain_safetensors(tmp_path):
    save(tmp_path / "a", models()["diffusion"])
    save(tmp_path / "b", models()["diffusion"])
    raw = (tmp_path / "a").read_bytes()
    assert raw == (tmp_path / "b").read_bytes()
    with safetensors.safe_open(tmp_path / "a", "pt") as file:
        description = json.loads(file.metadata()["description"])
        assert description["model"]["process"]["gamma"] == 0.02
        assert "weights/outward.bias" in set(file.keys())
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_every_flipped_bit_and_every_truncation_is_detected(tmp_path):
    path = tmp_path / "m"
    save(path, models()["diffusion"])
    raw = path.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    rng = random.Random(0)
    places = list(range(header)) + rng.sample(range(header, len(raw)), 100)
    for place in places:
        bad = bytearray(raw)
        bad[place] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(CheckpointError):
            load(path)
    for size in [0, 1, 7, 8, 9, header - 1, header, len(raw) - 1, *rng.sample(range(len(raw)), 50)]:
        path.write_bytes(raw[:size])
        with pytest.raises(CheckpointError):
            load(path)
    path.write_bytes(raw + b"\0")
    with pytest.raises(CheckpointError, match="overlong"):
        load(path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m"
    save(path, models()["denoiser"])
    before = path.read_bytes()

    def full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        save(path, models()["diffusion"])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def zip_pickle():
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(2)}, buffer)
    return buffer.getvalue()


def altered(raw, **meta):
    """The file with other metadata."""
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    header["__metadata__"] |= meta
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + raw[8 + n :]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda raw: zip_pickle(), "is a pickle .* never opened"),
        *[
            (
                lambda raw, p=p: pickle.dumps(Bomb(), protocol=p),
                "is a pickle .* never opened" if p >= 2 else "truncated|no",
            )
            for p in range(6)
        ],
        (lambda raw: safetensors.torch.save({"w": torch.zeros(2)}), "no undrift checkpoint"),
        (lambda raw: altered(raw, undrift="2"), "format version '2', this undrift reads '1'"),
        (lambda raw: altered(raw, description="{}"), "do not match its digest"),
        (lambda raw: b"weights" * 100, "truncated, or no safetensors file"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, content, message):
    save(tmp_path / "m", models()["denoiser"])
    (tmp_path / "m").write_bytes(content((tmp_path / "m").read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "m")


def test_missing_file_and_models_that_cannot_be_described(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*none"):
        load(tmp_path / "none")
    clock = CallableClock(lambda t: t)
    with pytest.raises(ValueError, match=r"process\.clock"):
        save(tmp_path / "m", Diffusion(VP(clock=clock), models()["denoiser"]))
    with pytest.raises(TypeError, match="holds no network to train or save"):
        save(tmp_path / "m", Diffusion(VP(), lambda x, sigma: x))
    assert not (tmp_path / "m").exists()

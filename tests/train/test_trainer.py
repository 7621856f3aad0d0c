import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, replace

import pytest
import torch

from undrift.container import read_file
from undrift.denoise import NetworkDenoiser
from undrift.diffusion import Diffusion, NoiseDiffusion
from undrift.networks import MLP, UNet
from undrift.process import PSLD, VP
from undrift.train import (
    CheckpointError,
    Dataset,
    Denoising,
    Digits,
    NoiseMatching,
    Objective,
    Ring,
    TrainConfig,
    Trainer,
    TrainingDiverged,
    load,
)
from undrift.train.trainer import step_seed

SMALL = TrainConfig(steps=30, batch=32, lr=2e-3, warmup=5, ema=500.0, log_every=7, checkpoint_every=10)


def ring(n=200):
    return Ring(n=n).load()


def denoiser(seed=0, width=16):
    torch.manual_seed(seed)
    return NetworkDenoiser(MLP(2, width=width, depth=1), sigma_data=0.9)


def weights(path):
    return read_file(path)[0]


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def metrics(folder, drop=("samples_per_second",)):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in drop} for row in rows]


def test_training_learns_and_the_average_is_better_than_the_start():
    data = Ring(n=2000).load()
    torch.manual_seed(0)
    model = NetworkDenoiser(MLP(2, width=64, depth=2), sigma_data=data.std)
    config = TrainConfig(steps=400, batch=128, lr=3e-3, warmup=20, ema=5000.0)
    fit = Trainer(model, Denoising(), data, config).fit(progress=False)
    x = Ring(n=4000, seed=9).load().x
    with torch.no_grad():
        after = Denoising().loss(fit.model, x, torch.Generator().manual_seed(0))[0]
        before = Denoising().loss(denoiser(), x, torch.Generator().manual_seed(0))[0]
    gap = before - after
    assert float(gap.mean()) > 10 * float(gap.std()) / len(gap) ** 0.5
    assert float(after.mean()) < 0.8 * float(before.mean())


@pytest.mark.parametrize("kind", ["denoiser", "dropout and classes", "noise"])
def test_a_run_in_pieces_equals_a_run_in_one(tmp_path, kind):
    def trainer(folder, steps):
        torch.manual_seed(0)
        config = replace(SMALL, steps=steps)
        if kind == "denoiser":
            return Trainer(denoiser(), Denoising(), ring(), config, folder)
        if kind == "noise":
            return Trainer(NoiseDiffusion(PSLD(), MLP(4, width=8, depth=1)), NoiseMatching(), ring(), config, folder)
        network = UNet(1, 8, width=8, dropout=0.3, classes=10)
        return Trainer(NetworkDenoiser(network), Denoising(), Digits("test"), replace(config, batch=16), folder)

    one = trainer(tmp_path / "one", 30).fit(progress=False)
    for steps in (4, 17, 30):
        torch.rand(steps)  # the state of the global generator must not matter
        pieces = trainer(tmp_path / "pieces", steps).fit(progress=False)
    assert_same(weights(tmp_path / "one" / "last.safetensors"), weights(tmp_path / "pieces" / "last.safetensors"))
    assert metrics(tmp_path / "one") == metrics(tmp_path / "pieces")
    assert [row["step"] for row in metrics(tmp_path / "one")] == [7, 14, 21, 28]
    assert one.loss == pieces.loss


SCRIPT = """
    import sys, torch
    sys.modules["torch.utils.tensorboard"] = None  # as where it is not installed
    from undrift.denoise import NetworkDenoiser
    from undrift.networks import MLP
    from undrift.train import Denoising, Ring, TrainConfig, Trainer
    torch.manual_seed(0)
    model = NetworkDenoiser(MLP(2, width=16, depth=1))
    config = TrainConfig(steps=int(sys.argv[2]), batch=16, warmup=5, log_every=10, checkpoint_every=20, threads=1)
    trainer = Trainer(model, Denoising(), Ring(n=100), config, sys.argv[1])
    print("ready", flush=True)
    fit = trainer.fit(progress=False)
    print(fit.step, fit.interrupted)
"""


def start(folder, steps):
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder), str(steps)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path, process, seconds=60):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.002)


def test_kill_minus_nine_and_ctrl_c_resume_to_the_same_bits(tmp_path, monkeypatch, capsys):
    steps = 800
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    killed = start(broken, steps)
    wait_for(broken / "last.safetensors", killed)
    time.sleep(0.05)  # somewhere, at no particular step
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    first = read_file(broken / "last.safetensors")[1]["training"]["step"]
    assert 0 < first < steps

    interrupted = start(broken, steps)
    assert interrupted.stdout.readline() == "ready\n"
    while read_file(broken / "last.safetensors")[1]["training"]["step"] == first:
        assert interrupted.poll() is None, interrupted.stderr.read()
        time.sleep(0.002)
    interrupted.send_signal(signal.SIGINT)
    out, err = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 0, err
    step, flag = out.split()
    assert flag == "True"
    assert first < int(step) < steps
    assert read_file(broken / "last.safetensors")[1]["training"]["step"] == int(step)

    monkeypatch.setattr(sys, "argv", ["script", str(broken), str(steps)])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for folder in (broken, whole):  # in this process, a third one
        sys.argv[1] = str(folder)
        exec(textwrap.dedent(SCRIPT), {})
        assert capsys.readouterr().out.split() == ["ready", str(steps), "False"]
    for name in ("last.safetensors", "model.safetensors"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()
    assert metrics(whole) == metrics(broken)
    assert [p.name for p in whole.iterdir() if "partial" in p.name] == []


@dataclass(frozen=True, eq=False)
class Poisoned(Objective):
    """The denoising loss, not finite from a step on (the trainer's schedule tells the step by the batch's seed)."""

    seeds: list[int]

    def loss(self, model, x, generator, **condition):
        bad = generator.initial_seed() in self.seeds
        loss, sigma = Denoising().loss(model, x, generator)
        return (loss * float("nan") if bad else loss), sigma


def test_divergence_stops_with_step_levels_and_the_last_good_checkpoint(tmp_path):
    seeds = [step_seed(0, "step", i) ^ 1 for i in range(23, 30)]
    trainer = Trainer(denoiser(), Poisoned(seeds), ring(), SMALL, tmp_path)
    with pytest.raises(TrainingDiverged, match="stopped at step 24: loss nan, at noise levels sigma from") as caught:
        trainer.fit(progress=False)
    assert caught.value.step == 24
    low, high = caught.value.sigma
    assert 0.002 <= low < 0.1 < 20 < high <= 300
    assert str(tmp_path) in str(caught.value)
    kept = read_file(tmp_path / "last.safetensors")
    assert kept[1]["training"]["step"] == 20
    assert all(bool(v.isfinite().all()) for v in kept[0].values())
    load(tmp_path / "model.safetensors")
    clean = Trainer(denoiser(), Denoising(), ring(), replace(SMALL, steps=20), tmp_path / "clean")
    clean.fit(progress=False)
    assert_same(kept[0], weights(tmp_path / "clean" / "last.safetensors"))


def test_the_average_follows_its_definition():
    """EDM's half-life in samples, capped by a share of the samples seen, replayed with plain arithmetic."""
    config = replace(SMALL, steps=6, ema=100.0)
    model = denoiser()
    trainer = Trainer(model, Denoising(), ring(), config)
    expected = None
    for i in range(6):
        trainer._train_step()
        now = [p.detach().clone().double() for p in model.network.parameters()]
        decay = 0.5 ** (32 / min(100.0, 0.05 * 32 * (i + 1)))
        expected = (
            now if expected is None else [decay * e + (1 - decay) * p for e, p in zip(expected, now, strict=True)]
        )
    for e, p in zip(expected, trainer.average.network.parameters(), strict=True):
        torch.testing.assert_close(p.detach().double(), e, rtol=1e-5, atol=1e-7)


def test_every_epoch_sees_every_point_once_in_a_new_order():
    trainer = Trainer(denoiser(), Denoising(), ring(48), replace(SMALL, batch=32))
    seen = torch.cat([trainer._indices(i) for i in range(3)])
    first, second = seen[:48], seen[48:]
    assert torch.equal(first.sort().values, torch.arange(48))
    assert torch.equal(second.sort().values, torch.arange(48))
    assert not torch.equal(first, second)
    assert torch.equal(trainer._indices(1), seen[32:64])  # asked again, out of order


def test_warm_up_and_clipping():
    config = TrainConfig(lr=1e-2, warmup=4)
    assert [config.rate(i) for i in (0, 1, 3, 4, 100)] == [2.5e-3, 5e-3, 1e-2, 1e-2, 1e-2]
    model = denoiser()
    trainer = Trainer(model, Denoising(), ring(), replace(SMALL, clip=1e-9, warmup=0))
    seen = []
    trainer._optimizer.register_step_pre_hook(
        lambda *_: seen.append(
            torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        )
    )
    trainer._train_step()
    assert float(seen[0]) <= 1e-9 * (1 + 1e-5)


def test_bf16_touches_the_network_alone():
    seen = {}
    model = denoiser()
    model.network.inward.register_forward_hook(lambda m, i, o: seen.update(inside=o.dtype))
    fit = Trainer(model, Denoising(), ring(), replace(SMALL, precision="bf16", steps=3)).fit(progress=False)
    assert seen["inside"] == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert fit.model(torch.zeros(2, 2), 0.5).dtype == torch.float32
    assert "forward" not in vars(model.network)  # and the network is left as it was


def test_global_state_is_left_alone():
    torch.manual_seed(5)
    expected, threads = torch.rand(3), torch.get_num_threads()
    trainer = Trainer(denoiser(), Denoising(), ring(), replace(SMALL, steps=3, threads=1))
    handler = signal.getsignal(signal.SIGINT)
    torch.manual_seed(5)
    trainer.fit(progress=False)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_diffusion_keeps_its_process_and_tensorboard_gets_the_scalars(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = Diffusion(PSLD(gamma=0.02, nu=4.02), denoiser())
    Trainer(model, Denoising(), ring(), SMALL, tmp_path, notes={"author": "a test"}).fit(progress=False)
    again = load(tmp_path / "model.safetensors")
    assert isinstance(again, Diffusion)
    assert again.process.gamma == 0.02
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    rows = metrics(tmp_path)
    assert [e.step for e in board.Scalars("loss")] == [row["step"] for row in rows]
    assert [e.value for e in board.Scalars("loss")] == pytest.approx([row["loss"] for row in rows])


def resume_with(**changes):
    def run(tmp_path):
        Trainer(denoiser(), Denoising(), ring(), replace(SMALL, steps=2), tmp_path).fit(progress=False)
        parts = {"model": denoiser(), "objective": Denoising(), "data": ring(), "config": SMALL} | changes
        Trainer(*parts.values(), tmp_path).fit(progress=False)

    return run


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (resume_with(config=replace(SMALL, lr=1e-4)), "holds a run of another config .lr: 0.002 -> 0.0001."),
        (resume_with(objective=Denoising("uniform")), "another objective .weighting: 'edm' -> 'uniform'."),
        (resume_with(data=ring(150)), "another data .points: 200 -> 150."),
        (resume_with(model=denoiser(width=8)), "another model"),
        (
            lambda p: Trainer(denoiser(), Denoising(), torch.zeros(9, 2)),
            "must be a Dataset or a DataSource, got a Tensor",
        ),
        (lambda p: Trainer(denoiser(), Denoising(), ring(20), SMALL), "batch is 32, but ring-8 has 20 points"),
        (lambda p: Trainer(lambda x: x, Denoising(), ring()), "a function holds no network"),
        (lambda p: Trainer(Diffusion(VP(), lambda x, s: x), Denoising(), ring()), "a Diffusion of a function holds no"),
        (
            lambda p: Trainer(NetworkDenoiser(UNet(1, 8, width=8, classes=3)), Denoising(), Digits()),
            "takes 3 classes, but digits-train has 10",
        ),
        (lambda p: TrainConfig(steps=0), "steps must be at least 1, got 0"),
        (lambda p: TrainConfig(lr=float("inf")), "lr must be positive and finite, got inf"),
        (lambda p: TrainConfig(betas=(0.9, 1.0)), r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        (lambda p: TrainConfig(precision="fp16"), "precision must be 'float32' or 'bf16', got 'fp16'"),
        (lambda p: TrainConfig(clip=0.0), "clip must be positive, or null for none, got 0.0"),
        (lambda p: TrainConfig(class_dropout=2.0), "class_dropout must be a probability, got 2.0"),
        (lambda p: Dataset("d", torch.zeros(0, 2)), r"x must be floating \(N, \*event\), N > 0"),
        (lambda p: Trainer(denoiser(), object(), ring(), SMALL, p), "objective: a object cannot be written"),
    ],
)
def test_misuse_is_named_before_any_work(tmp_path, call, message):
    with pytest.raises((ValueError, TypeError, CheckpointError), match=message):
        call(tmp_path)


def test_a_folder_with_a_damaged_checkpoint_is_not_overwritten(tmp_path):
    Trainer(denoiser(), Denoising(), ring(), replace(SMALL, steps=2), tmp_path).fit(progress=False)
    path = tmp_path / "last.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 4
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="damaged"):
        Trainer(denoiser(), Denoising(), ring(), SMALL, tmp_path).fit(progress=False)
    assert path.read_bytes() == bytes(raw)
    assert os.path.exists(tmp_path / "model.safetensors")

"""Bits per dimension on images: fixed against learned processes, noise networks against denoisers, on one budget.

Every cell trains the same U-Net (but for the channels it sees) by the evidence bound for the same number of steps on
the same batches, and bounds the bits per dimension of the same held-out images with the same noise, along the way and
at the end. MNIST's 28 x 28 pixels are read as 14 x 14 blocks of four channels, which halves the network's cost and
leaves bits per dimension what they are. The claim tested is that of Singhal et al. 2023: a learned process matches or
beats each fixed one.

MNIST and Fashion-MNIST are read from UNDRIFT_DATA; digits come with scikit-learn. Finished cells are kept in --out and
not run again.

    python bench/bits.py --data digits
    python bench/bits.py --data mnist fashion_mnist --out bench/results/bits.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from undrift import Diffusion, NoiseDiffusion, elbo
from undrift.denoise import NetworkDenoiser
from undrift.networks import UNet
from undrift.process import CLD, MALDA, VP, LearnedProcess, LinearClock, LinearProcess
from undrift.train import Dataset, DataSource, Dequantised, Digits, EvidenceBound, Idx, TrainConfig, Trainer

PROCESSES: dict[str, Callable[[], LinearProcess]] = {
    "VP": lambda: VP(clock=LinearClock(0.1, 10.0)),
    "CLD": lambda: CLD(mass=1.0, aux_scale=0.01, clock=LinearClock(0.1, 10.0)),
    "MALDA": lambda: MALDA(clock=LinearClock(0.1, 10.0)),
    "learned K=1, clock": lambda: LearnedProcess(1, learn=("S", "clock")),
    "learned K=2": lambda: LearnedProcess(2),
    "learned K=3": lambda: LearnedProcess(3),
    "learned K=2, all": lambda: LearnedProcess(2, learn=("Q", "D", "S", "start", "clock")),
}
SIGMA_MIN = 1e-3
TEST_POINTS, TEST_TIMES = 1000, 2


def blocks(data: Dataset) -> Dataset:
    """Images (N, 1, 28, 28) as blocks of 2 x 2 pixels, (N, 4, 14, 14); smaller ones as they are."""
    if data.event[-1] < 28 or data.pixels is None:
        return data
    pixels = dataclasses.replace(data.pixels, values=torch.pixel_unshuffle(data.pixels.values, 2))
    return dataclasses.replace(data, x=torch.pixel_unshuffle(data.x, 2), pixels=pixels)


def sources(name: str) -> tuple[DataSource, DataSource]:
    """Training and test images, dequantised."""
    if name == "digits":
        return Dequantised(Digits(), "logit", 17), Dequantised(Digits("test"), "logit", 17)
    root = os.environ.get("UNDRIFT_DATA")
    if root is None:
        raise SystemExit(f"{name}: set UNDRIFT_DATA to the folder that holds images/{name}; or use --data digits.")
    folder = Path(root) / "images" / name
    parts = (str(folder / f"{part}-images-idx3-ubyte.gz") for part in ("train", "t10k"))
    train, test = (Dequantised(Idx(path), "logit") for path in parts)
    return train, test


def cell(name: str, form: str, process_name: str, seed: int, args: argparse.Namespace) -> list[dict[str, object]]:
    """Train one model and bound its bits at a quarter, a half and the whole of the budget."""
    train, test = (blocks(source.load()) for source in sources(name))
    process = PROCESSES[process_name]()
    channels = train.event[0] * (process.channels if form == "noise" else 1)
    # The root mean square, not the deviation: logits of black pixels are far from zero.
    scale = float(train.x.square().mean().sqrt())
    torch.manual_seed(seed)
    network = UNet(channels, train.event[-1], width=args.width, multipliers=(1, 2))
    model = (
        NoiseDiffusion(process, network, data_std=scale)
        if form == "noise"
        else Diffusion(process, NetworkDenoiser(network, scale, sigma_min=SIGMA_MIN))
    )
    config = TrainConfig(args.steps, args.batch, lr=args.lr, process_lr=args.process_lr, seed=seed, log_every=50)
    trainer = Trainer(model, EvidenceBound(sigma_min=SIGMA_MIN), train, config)
    assert test.pixels is not None
    index = torch.arange(min(TEST_POINTS, len(test)))
    y, log_det = test.pixels.draw(index, torch.Generator().manual_seed(0))
    rows: list[dict[str, object]] = []
    seconds = 0.0
    for part in (4, 2, 1):
        trainer.config = dataclasses.replace(config, steps=args.steps // part)
        begin = time.perf_counter()
        fit = trainer.fit(progress=False)
        seconds += time.perf_counter() - begin
        bound = elbo(fit.model, y.float(), sigma_min=SIGMA_MIN, samples=TEST_TIMES, batch=100, seed=1)
        bits, error = bound.bits_per_dim(log_det, test.pixels.bins)
        scale_bits = bound.dim * math.log(2)
        now = fit.model.process
        learned = {"matrices": [m.tolist() for m in now.terms()[:2]]} if isinstance(now, LearnedProcess) else {}
        rows.append({
            "data": name, "form": form, "process": process_name, "seed": seed, "step": fit.step, "bits": bits,
            "std_error": error, "prior_bits": -float(bound.prior.mean()) / scale_bits,
            "sigma_max": float(now.sigma(now.horizon)), "seconds": seconds, **learned,
            "budget": [args.steps, args.batch, args.width, args.lr, args.process_lr],
        })  # fmt: skip
    return rows


def table(rows: list[dict[str, object]]) -> None:
    """Mean over seeds and its standard error, at every step that was looked at."""
    keys = list(dict.fromkeys((r["data"], r["form"], r["process"]) for r in rows))
    steps = sorted({int(str(r["step"])) for r in rows})
    print(f"\n{'bits per dimension, mean over seeds ± standard error':52s}" + "".join(f"{s:>17d}" for s in steps))
    for key in keys:
        line = f"{key[0]!s:14s} {key[1]!s:9s} {key[2]!s:27s}"
        for step in steps:
            mine = [r for r in rows if (r["data"], r["form"], r["process"]) == key and r["step"] == step]
            bits = [float(str(r["bits"])) for r in mine]
            spread = f" ± {statistics.stdev(bits) / math.sqrt(len(bits)):.3f}" if len(bits) > 1 else ""
            line += f"{(f'{statistics.mean(bits):.3f}{spread}' if bits else '-'):>17s}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["digits"], choices=["digits", "mnist", "fashion_mnist"])
    parser.add_argument("--forms", nargs="+", default=["noise", "denoiser"], choices=["noise", "denoiser"])
    parser.add_argument("--processes", nargs="+", default=list(PROCESSES), choices=list(PROCESSES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=24)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--process-lr", type=float, default=5e-3)
    parser.add_argument("--out", type=Path, default=None, help="JSON lines: finished cells are read, new ones added")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out and args.out.exists() else []
    wanted = [(d, f, p, s) for s in args.seeds for d in args.data for f in args.forms for p in args.processes]
    budget = [args.steps, args.batch, args.width, args.lr, args.process_lr]
    done = {(r["data"], r["form"], r["process"], r["seed"]) for r in rows if r["budget"] == budget}
    for key in wanted:
        if key in done:
            continue
        new = cell(*key, args)
        print(f"{key}: {new[-1]['bits']:.4f} ± {new[-1]['std_error']:.4f} in {new[-1]['seconds']:.0f} s", flush=True)
        rows += new
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("a", encoding="utf-8") as file:  # one write, so a cell is there whole or not at all
                file.write("".join(json.dumps(row) + "\n" for row in new))
    table([r for r in rows if r["budget"] == budget])


if __name__ == "__main__":
    main()

"""A denoiser trained on one grid serves finer ones: what that costs, by network and by noise.

Networks of spectral convolutions, of fixed physical modes (half of those of the training grid; in one dimension also of
"all modes"), and of dilated convolutions, trained on coarse fields and judged on finer grids. The noise is a "function"
of half a derivative in the mean square, or "white" on the pixels; for fields of a steep spectrum also "matched", of the
data's own, and "by modes": the same, with a network preconditioned mode by mode. "Gaussian fit" is no network, but the
exact denoiser of a Gaussian field of the training data's spectrum.

* denoising: the error in the norm of L^2, relative to the data's variance, at levels where the noise on every mode of
  the training grid is what it was there (white noise is made so much louder per pixel), over the modes shared with that
  grid and over all; for Gaussian fields also the excess over the exact denoiser's error, in parts of it;
* sampling, 20 calls of an order-2 exponential integrator on VE, the white models' levels louder likewise: the energy
  distance to data in L^2 (squared distance; the unbiased estimate), and the W2 distance between the spectra of samples
  and data, relative to the data's deviation.

"upsampled" takes the samples of the training grid to the finer one by way of the basis; "data" judges training fields
in the place of samples: what is left to a perfect sampler. Gaussian fields are our own; with UNDRIFT_DATA set there are
solutions of partial differential equations, which ``pde_fields.py`` describes. Darcy's pressures are few: 900 to train
on, and of the networks at every 250 steps that with the least denoising error on 100 others is kept. "curve" holds
steps, the error on training fields and on the others: geometric means over the levels. As only 50 are for testing, the
samples' modes of the training grid are compared with those of all training fields too.

    python bench/resolution.py      # an hour and a half on one core; a second start goes on where the first was stopped
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pde_fields import burgers, circle, darcy
from undrift.denoise import Denoiser, FieldGaussian, NetworkDenoiser, SpectralDenoiser
from undrift.diffusion import Diffusion
from undrift.measure import energy_distance
from undrift.networks import FourierFeatures, Network, SpectralNet
from undrift.process import VE, PowerClock
from undrift.sample import Exponential, Rho, sample
from undrift.space import Basis, Cosine, EmpiricalSpectrum, Fourier, FunctionSpace, Matern, Space, White
from undrift.train import Dataset, DefensiveMixture, Denoising, Objective, SpectralDenoising, TrainConfig, Trainer

LEVELS = (0.05, 0.2, 1.0, 5.0)
LOW, HIGH, CALLS = 0.01, 80.0, 20
LEG, PATIENCE = 250, 1000  # steps between looks at the fields held out, and without a better one
MODELS = [
    ("Gaussian fit", "function"),
    *((network, noise) for network in ("spectral", "convolutions") for noise in ("function", "white")),
    ("spectral, all modes", "function"),
    *(("spectral", noise) for noise in ("matched", "by modes")),
]


class Convolutions(Network):
    """Residual dilated convolutions of 3 points an axis, modulated by the label: any grid, but a span in pixels."""

    def __init__(self, dims: int, width: int = 48, dilations: tuple[int, ...] = (1, 2, 4, 8, 1)) -> None:
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d}[dims]
        self.dims, self.dilations = dims, dilations
        self.embed = nn.Sequential(FourierFeatures(32), nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU())
        self.inward, self.outward = conv(1, width, 1), conv(width, 1, 1)
        self.layers = nn.ModuleList(conv(width, width, 3, dilation=d) for d in dilations)
        self.mixes = nn.ModuleList(conv(width, width, 1) for _ in dilations)
        self.modulations = nn.ModuleList(nn.Linear(64, 2 * width) for _ in dilations)
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(self.outward.bias)
        self.mode = "reflect"

    def forward(self, x: Tensor, label: Tensor, **condition: Any) -> Tensor:
        h, e = self.inward(x.unsqueeze(1)), self.embed(label)
        for d, layer, mix, modulation in zip(self.dilations, self.layers, self.mixes, self.modulations, strict=True):
            scale, shift = modulation(e).reshape(len(e), -1, *[1] * self.dims).chunk(2, 1)
            h = h + mix(F.gelu(layer(F.pad(h, [d] * 2 * self.dims, mode=self.mode)) * (1 + scale) + shift))
        return self.outward(F.gelu(h)).squeeze(1)


@dataclass
class Problem:
    """Fields to train on, (N, *grid) of unit pointwise variance, some held out, and fresh ones (n, *grid)."""

    name: str
    basis: Basis
    space: FunctionSpace
    train: Tensor
    grids: tuple[tuple[int, ...], ...]
    test: Callable[[int, tuple[int, ...]], Tensor]
    steps: int
    exact: Matern | None = None
    matched: FunctionSpace | None = None
    held: Tensor | None = None


def gaussian(dims: int, coarse: int, grids: tuple[int, ...]) -> Problem:
    basis, data = Cosine(dims), Matern(2.0 if dims == 1 else 2.5, 6.0)
    space = FunctionSpace(basis, Matern(1.0 if dims == 1 else 1.5, 6.0))
    field = FieldGaussian(space, data)

    def draw(n: int, grid: tuple[int, ...], seed: int = 1) -> Tensor:
        return field.draw(n, grid, torch.Generator().manual_seed(seed), torch.float32)

    shapes = tuple((n,) * dims for n in grids)
    train, steps = draw(4000, (coarse,) * dims, 0), 1500 if dims == 1 else 400
    return Problem(f"Gaussian field, {dims}-d", basis, space, train, shapes, draw, steps, data)


def equations(root: Path) -> Iterator[Problem]:
    """What there is of solutions of partial differential equations."""

    def problem(name: str, basis: Basis, train: Tensor, test: Any, grids: Sequence[int], **kind: Any) -> Problem:
        space, matched = FunctionSpace.of(train, basis), FunctionSpace.matched(train, basis)
        shapes = tuple((n,) * basis.dims for n in grids)
        return Problem(name, basis, space, train, shapes, test, matched=matched, **kind)

    circles = {
        "Kuramoto-Sivashinsky": "kuramoto_sivashinsky",
        "Korteweg-de Vries": "korteweg_de_vries",
        "Allen-Cahn": "allen_cahn",
        "Burgers, one shock": "burgers_shock",
    }
    for name, file in circles.items():
        if (root / f"{file}.npz").exists():
            yield problem(name, Fourier(), *circle(root / f"{file}.npz", Fourier(), 32), (32, 64, 128, 256), steps=1500)
        else:
            print(f"{name}: left out, as {root} has no {file}.npz.", flush=True)
    yield problem("Burgers", Fourier(), *burgers(root, Fourier()), (16, 32, 64, 128), steps=1500)
    train, held, test = darcy(root)
    yield problem("Darcy pressure", Cosine(2), train, test, (16, 32), steps=3000, held=held)  # Sine learned less well


def problems() -> list[Problem]:
    found = [gaussian(1, 32, (32, 64, 128, 256)), gaussian(2, 16, (16, 32, 64))]
    if "UNDRIFT_DATA" in os.environ:
        found[1:1] = equations(Path(os.environ["UNDRIFT_DATA"]) / "pde")
    return found


def trained(problem: Problem, network: str, noise: str, seed: int) -> tuple[Denoiser, dict[str, Any]]:
    """The denoiser, and what its training was."""
    if network == "Gaussian fit":
        spectrum = problem.exact or EmpiricalSpectrum.of(problem.train, problem.basis)
        return FieldGaussian(problem.space, spectrum), {"steps": 0}
    torch.manual_seed(seed)
    dims = problem.basis.dims
    net: Network
    if network.startswith("spectral"):
        modes = problem.train.shape[-1] // (1 if network.endswith("all modes") else 2)
        net = SpectralNet(problem.basis, width=32 if dims == 1 else 24, modes=modes)
    else:
        net = Convolutions(dims, 48 if dims == 1 else 32)
        net.mode = "circular" if isinstance(problem.basis, Fourier) else "reflect"
    space: Space = {"function": problem.space, "white": White()}.get(noise, problem.matched)
    model = NetworkDenoiser(net, sigma_data=1.0, space=space)
    objective: Objective = Denoising()
    if noise == "by modes":
        model, objective = SpectralDenoiser(net, space), SpectralDenoising(DefensiveMixture())
    batch = 64 if dims == 1 else 32
    config = TrainConfig(problem.steps, batch=batch, lr=2e-3, ema=10_000.0, class_dropout=0.0, seed=seed)
    trainer = Trainer(model, objective, Dataset(problem.name, problem.train), config)
    start = time.process_time()
    curve: list[list[float]] = []
    if problem.held is None:
        best = trainer.fit(progress=False).model
    else:
        for steps in range(LEG, problem.steps + 1, LEG):
            trainer.config = replace(config, steps=steps)
            now = trainer.fit(progress=False).model
            fields = problem.train[: len(problem.held)], problem.held
            errors = [denoising(problem, now, noise, u, 3)["error"] for u in fields]
            curve.append([steps, *(math.exp(math.fsum(map(math.log, e)) / len(e)) for e in errors)])
            least = min(curve, key=lambda row: row[-1])
            if least[0] == steps:
                best = now
            elif steps - least[0] >= PATIENCE:
                break
    report = {"steps": trainer.step, "train_seconds": round(time.process_time() - start, 1)}
    return best, report | ({"kept": least[0], "curve": curve} if curve else {})


def louder(problem: Problem, noise: str, grid: tuple[int, ...]) -> float:
    """White noise on n points has variance 1/n on a mode of L^2: the factor that keeps it that of the training grid."""
    ratio = math.prod(grid) / math.prod(problem.train.shape[1:])
    return math.sqrt(ratio) if noise == "white" else 1.0


@torch.no_grad()
def denoising(problem: Problem, model: Denoiser, noise: str, x: Tensor, draws: int = 1) -> dict[str, Any]:
    basis, grid = problem.basis, tuple(x.shape[1:])
    x = x.repeat(draws, *[1] * basis.dims)
    g = torch.Generator().manual_seed(2)
    shared = basis.fit(torch.ones(problem.train.shape[1:]), grid).bool()
    total = float(problem.space.norm2(x - x.mean(0)).mean())
    rows: dict[str, Any] = {"sigma": list(LEVELS), "error": [], "shared": []}
    if problem.exact is not None:
        rows["excess"], rows["shared excess"] = [], []
    for sigma in LEVELS:
        level = sigma * louder(problem, noise, grid)
        noisy = x + level * model.space.colour(torch.empty_like(x).normal_(generator=g))
        error = basis.analyse(model(noisy, level) - x).square().mean(0)
        rows["error"].append(float(error.sum()) / total)
        rows["shared"].append(float(error[shared].sum()) / total)
        if problem.exact is not None:
            data = FunctionSpace(basis, problem.exact).variances(grid)
            own = problem.space.variances(grid) if noise == "function" else torch.full(grid, 1 / math.prod(grid))
            gain = data / (data + level**2 * own)
            best = basis.synthesise(basis.analyse(noisy.double()) * gain) - x
            exact = basis.analyse(best).square().mean(0)
            rows["excess"].append(float(error.sum() / exact.sum()) - 1)
            rows["shared excess"].append(float(error[shared].sum() / exact[shared].sum()) - 1)
    return rows


def judged(problem: Problem, x: Tensor, data: Tensor) -> dict[str, float]:
    grid = tuple(x.shape[1:])
    size = math.sqrt(math.prod(grid))
    c, d = problem.basis.analyse(x.double()), problem.basis.analyse(data.double())
    gap = (c.std(0) - d.std(0)).square() + (c.mean(0) - d.mean(0)).square()
    shared = problem.basis.fit(torch.ones(problem.train.shape[1:]), grid).bool()
    total = float(d.var(0).sum())
    return {
        "energy": energy_distance(x / size, data / size),
        "spectrum": math.sqrt(float(gap.sum()) / total),
        "spectrum, shared": math.sqrt(float(gap[shared].sum()) / total),
        "variance": float(c.var(0).sum()) / total,
        "variance beyond": float(c.var(0)[~shared].sum()) / total,
        "data beyond": float(d.var(0)[~shared].sum()) / total,
    }


def samples(problem: Problem, model: Denoiser, noise: str, grid: tuple[int, ...], count: int) -> Tensor:
    factor = louder(problem, noise, grid)
    process = VE(PowerClock(sigma_max=HIGH * factor, horizon=HIGH * factor))
    sampler = Exponential(CALLS, Rho(sigma_min=LOW * factor, sigma_max=HIGH * factor), order=2)
    return sample(Diffusion(process, model), count, grid, sampler, seed=3, batch=128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", help="names, or how they begin; all if not given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of networks and their training")
    parser.add_argument("--out", type=Path, default=Path("bench/results/resolution.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    done = set()
    if options.out.exists():
        known = map(json.loads, options.out.read_text().splitlines())
        done = {(r["problem"], r["network"], r["noise"], r.get("seed", 0)) for r in known}
    chosen = [p for p in problems() if p.name.startswith(tuple(options.problems or [""]))]
    for problem, seed, (network, noise) in itertools.product(chosen, options.seeds, MODELS):
        missing = noise in ("matched", "by modes") and problem.matched is None
        missing |= network == "spectral, all modes" and problem.basis.dims > 1
        if missing or (problem.name, network, noise, seed) in done:
            continue
        model, training = trained(problem, network, noise, seed)
        coarse, rows = None, []
        for grid in problem.grids:
            count = 512 if math.prod(grid) <= 1024 else 64
            x = samples(problem, model, noise, grid, count)
            few = problem.held is not None
            fresh = problem.test(256 if math.prod(grid) <= 1024 else 64, grid)
            row = {"problem": problem.name, "network": network, "noise": noise, "seed": seed, "grid": list(grid)}
            row |= training | {"samples": count}
            row["denoising"] = denoising(problem, model, noise, fresh, 5 if few else 1)
            data, resample = problem.test(count, grid), problem.basis.resample
            row["sampling"] = judged(problem, x, data)
            if coarse is None:
                coarse = x
            else:
                row["upsampled"] = judged(problem, resample(coarse[:count], grid), data)
            some = torch.randperm(len(problem.train), generator=torch.Generator().manual_seed(4))[:count]
            row["data"] = judged(problem, resample(problem.train[some], grid), data)
            if few:
                row["training modes"] = judged(problem, resample(x, problem.grids[0]), problem.train)
            rows.append(row)
            print(json.dumps(row), flush=True)
        with options.out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()

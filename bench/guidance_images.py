r"""Conditional images: what guidance buys and costs, and how well the known methods fill in what is missing.

    classes     class-conditional samples by a noise-aware classifier, and without one, against the guidance's strength;
                judged by an independent classifier (another architecture, trained on clean images alone), and by the
                Frechet distance of its features to those of the training images, and by the spread of a class, in
                units of the training images' own
    processes   one classifier, trained once, guiding four processes
    inpainting  held-out images of which some pixels are seen, with noise: PSNR of the posterior mean and of one sample
                on the unseen pixels, and how often the truth lies within the range of 19 samples, which for draws of
                the posterior happens 18/20 = 90 % of the time. Pixels take few values, so samples are rounded to them
                and ties broken at random, without which nothing calibrated could be told apart on a black background.
                The strength of point estimates is named: at 1, as derived, their steps are longer than is stable where
                the noise of the data is small

Models are trained where --runs has none. Finished cells are kept in --out and not run again.

    python bench/guidance_images.py --data digits                 # about half an hour on one core
    UNDRIFT_DATA=... python bench/guidance_images.py --data fashion   # Fashion-MNIST in 14 x 14 blocks
    python bench/guidance_images.py --print
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from undrift.denoise import (
    ClassifierFree,
    ClassifierPotential,
    Guided,
    Known,
    NetworkClassifier,
    NetworkDenoiser,
    PointEstimate,
    PseudoInverse,
    TweedieMoments,
)
from undrift.diffusion import Diffusion
from undrift.measure.distance import jackknife
from undrift.measure.fid import TrainedFeatures, extract, frechet_distance, train_features
from undrift.networks import ConvClassifier, UNet
from undrift.observe import GaussianNoise, Mask, Observation
from undrift.process import CLD, PSLD, VE, VP
from undrift.sample import Ancestral, Exponential, Replace, sample
from undrift.sample.twisted import twisted
from undrift.train import (
    Classification,
    Dataset,
    Denoising,
    Digits,
    Idx,
    LogUniform,
    TrainConfig,
    Trainer,
    accuracy,
    load,
)

STRENGTHS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
DRAWS = 19
NOISE = 0.05
PARTICLES = {"digits": (32, 256, 1024), "fashion": (32,)}
PROCESSES = {"VP": VP, "VE": VE, "CLD": CLD, "PSLD": PSLD}


@dataclass(frozen=True)
class Task:
    """A data set with the sizes that go with it: levels of grey, width, training steps, samples, images."""

    train: Dataset
    test: Dataset
    greys: int
    width: int
    steps: int
    samples: int
    images: int
    moments: int  # conjugate gradients of TweedieMoments


def blocks(data: Dataset, factor: int) -> Dataset:
    """Means over blocks of pixels."""
    return dataclasses.replace(data, x=torch.nn.functional.avg_pool2d(data.x, factor))


def task(name: str) -> Task:
    if name == "digits":
        return Task(Digits("train").load(), Digits("test").load(), 17, 32, 2500, 1000, 100, 4)
    folder = Path(os.environ["UNDRIFT_DATA"]) / "images" / "fashion_mnist"

    def read(part: str) -> Dataset:
        return Idx(str(folder / f"{part}-images-idx3-ubyte.gz"), str(folder / f"{part}-labels-idx1-ubyte.gz")).load()

    return Task(blocks(read("train"), 2), blocks(read("t10k"), 2), 1021, 16, 1000, 500, 30, 4)


class Models:
    """Denoiser, noise-aware classifier and judge of a task; trained, or loaded from a folder."""

    def __init__(self, task: Task, folder: Path) -> None:
        self.task, std, size = task, task.train.std, task.train.event[-1]
        quick = TrainConfig(steps=task.steps, batch=128, lr=2e-3, log_every=250, checkpoint_every=500, threads=1)
        torch.manual_seed(1)
        unet = UNet(1, size, width=task.width, classes=10)
        self.denoiser = self._fit(folder / "denoiser", NetworkDenoiser(unet, std), Denoising(), quick)
        torch.manual_seed(2)
        net = ConvClassifier(1, 10, width=16, dropout=0.1)
        classifier = NetworkClassifier(net, std, 0.01, 50.0)
        self.classifier = self._fit(folder / "classifier", classifier, Classification(LogUniform(0.01, 50.0)), quick)
        some = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(3))[:12000]
        self.judge: TrainedFeatures = train_features(
            task.train.x[some], task.train.labels[some], epochs=20 if len(some) < 2000 else 5, seed=7
        )
        right = [
            self.judge.classifier(x).argmax(1) == y
            for x, y in zip(task.test.x.split(500), task.test.labels.split(500), strict=True)
        ]
        self.judge_accuracy = proportion(torch.cat(right))
        self.train_features = extract(self.judge, task.train.x[some[: max(1500, task.samples)]])
        self.test_features = extract(self.judge, task.test.x[:1000])

    def _fit(self, folder: Path, model: Any, objective: Any, config: TrainConfig) -> Any:
        if not Trainer(model, objective, self.task.train, config, folder).fit(progress=False).interrupted:
            return load(folder / "model.safetensors")
        raise KeyboardInterrupt


def proportion(right: Tensor) -> list[float]:
    """Share of True and its standard error."""
    p = float(right.double().mean())
    return [round(p, 4), round(math.sqrt(p * (1 - p) / len(right)), 4)]


def mean(v: Tensor, digits: int = 4) -> list[float]:
    """Mean and its standard error."""
    return [round(float(v.mean()), digits), round(float(v.std()) / math.sqrt(len(v)), digits)]


# -- classes -----------------------------------------------------------------------------------------------------------


def classes(models: Models, method: str, strength: float, process: str = "VP") -> dict[str, Any]:
    """Samples of all classes under one guidance, judged."""
    n, size = models.task.samples, models.task.train.event
    labels = torch.arange(n) % 10
    if method == "classifier":
        denoiser: Any = Guided(models.denoiser, ClassifierPotential(models.classifier), strength)
        condition = {"label": labels}
    else:
        denoiser, condition = ClassifierFree(models.denoiser, strength), {"y": labels}
    diffusion = Diffusion(PROCESSES[process](), denoiser)
    x = sample(diffusion, n, size, Exponential(20), seed=11, batch=500, **condition)
    right = torch.cat([models.judge.classifier(part).argmax(1) for part in x.split(500)]) == labels
    distance = jackknife(frechet_distance, extract(models.judge, x), models.train_features)
    return {
        "judged right": proportion(right),
        "frechet": [round(distance.value, 3), round(distance.std_error, 3)],
        "spread": round(within(x, labels) / within(models.task.train.x, models.task.train.labels), 4),
    }


def within(x: Tensor, labels: Tensor) -> float:
    """Mean variance of a pixel within a class."""
    return sum(float(x[labels == c].double().var(0).mean()) for c in range(10)) / 10


# -- inpainting --------------------------------------------------------------------------------------------------------


def masks(size: int) -> dict[str, Tensor]:
    """Where pixels are seen: a quarter of them at random, or the upper half."""
    order = torch.randperm(size * size, generator=torch.Generator().manual_seed(5))
    scattered = torch.zeros(size * size, dtype=torch.bool)
    scattered[order[: size * size // 4]] = True
    upper = torch.zeros(size, size, dtype=torch.bool)
    upper[: size // 2] = True
    return {"scattered quarter": scattered.reshape(size, size), "upper half": upper}


def fill(models: Models, mask: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """The estimate (images, *event) and samples (19, images, *event) of a method; the mean fill has none."""
    t = models.task
    truth, event, images = t.test.x[: t.images], t.test.event, t.images
    noise = GaussianNoise(NOISE)
    y = noise.sample(Mask(mask)(truth), torch.Generator().manual_seed(6))
    seen = Observation(Mask(mask), noise, y)
    if method == "mean":
        out = t.train.x.mean(0).expand(images, *event).clone()
        out[..., mask] = y
        return out, out.new_empty(0, *out.shape)
    if method == "gaussian":
        draws = gaussian(t.train.x, mask, y)
        return draws[0], draws[1]
    values = torch.zeros(images, *event)
    values[..., mask] = y
    many = images * DRAWS

    def walk(denoiser: Any, **condition: Any) -> tuple[Tensor, Tensor]:
        diffusion = Diffusion(VP(), denoiser)
        x = sample(diffusion, many, event, Ancestral(20), seed=12, batch=950, **condition)
        x = x.reshape(DRAWS, images, *event)
        return x.mean(0), x

    def guided(potential: Any) -> Guided:
        return Guided(models.denoiser, potential)

    if method == "known":
        return walk(Known(models.denoiser, mask), known=values.repeat(DRAWS, 1, 1, 1))
    if method == "replacement":
        return walk(models.denoiser, steer=Replace(mask, values.repeat(DRAWS, 1, 1, 1)))
    if method.startswith("twisted"):
        found, particles = [], int(method.removeprefix("twisted, "))
        for one in y:
            here = dataclasses.replace(seen, y=one)
            potential = PseudoInverse(here, prior_variance=t.train.std**2)
            draws = twisted(Diffusion(VP(), models.denoiser), here, potential, particles, event, Ancestral(20), seed=13)
            found.append(draws.resample(DRAWS, torch.Generator().manual_seed(14)))
        x = torch.stack(found, 1)
        return x.mean(0), x
    if method == "pseudo-inverse":
        return walk(guided(PseudoInverse(seen, prior_variance=t.train.std**2)), observed=y.repeat(DRAWS, 1, 1))
    if method == "tweedie moments":
        return walk(guided(TweedieMoments(seen, dense=0, iterations=t.moments)), observed=y.repeat(DRAWS, 1, 1))
    strength = float(method.removeprefix("point estimate, "))
    return walk(Guided(models.denoiser, PointEstimate(seen), strength), observed=y.repeat(DRAWS, 1, 1))


def gaussian(train: Tensor, mask: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and samples of the posterior under a Gaussian fitted to the training images: the best linear estimate."""
    flat = train.flatten(1).double()
    mu, cov = flat.mean(0), torch.cov(flat.T)
    k = mask.flatten()
    gain = torch.linalg.solve(cov[k][:, k] + NOISE**2 * torch.eye(int(k.sum())).double(), cov[k]).T
    centre = mu + (y.flatten(1).double() - mu[k]) @ gain.T
    rest = cov - gain @ cov[k]
    values, vectors = torch.linalg.eigh(0.5 * (rest + rest.T))
    root = vectors * values.clamp(min=0).sqrt()
    xi = torch.empty(DRAWS, *centre.shape, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(9))
    shape = (len(y), *train.shape[1:])
    return centre.float().reshape(shape), (centre + xi @ root.T).float().reshape(DRAWS, *shape)


def inpainting(models: Models, mask_name: str, method: str) -> dict[str, Any]:
    """A method's marks on the pixels that were not seen, over held-out images."""
    mask = masks(models.task.train.event[-1])[mask_name]
    truth = models.task.test.x[: models.task.images]
    try:
        estimate, draws = fill(models, mask, method)
    except FloatingPointError:
        return {"diverged": True}

    def psnr(x: Tensor) -> Tensor:
        error = (x - truth)[..., ~mask].flatten(-2).square().mean(-1)
        return 10 * (4 / error.clamp(min=1e-6)).log10()

    out: dict[str, Any] = {"psnr of mean": mean(psnr(estimate), 2)}
    if len(draws):
        out["psnr of samples"] = mean(psnr(draws).mean(0), 2)
        greys = models.task.greys - 1

        def rounded(v: Tensor) -> Tensor:
            return ((v[..., ~mask].clamp(-1, 1) + 1) / 2 * greys).round()

        t, d = rounded(truth), rounded(draws)
        ties = torch.empty_like(t).uniform_(generator=torch.Generator().manual_seed(8))
        below, equal = (d < t).sum(0), (d == t).sum(0)
        rank = below + torch.floor(ties * (equal + 1))
        inside = ((rank > 0) & (rank < DRAWS)).double()
        out["within the range of 19"] = mean(inside.flatten(1).mean(1))
    return out


# -- the run -----------------------------------------------------------------------------------------------------------


def cells(name: str) -> Iterator[tuple[dict[str, Any], Callable[[Models], dict[str, Any]]]]:
    """What is to be measured: the cell's name, and how."""
    yield {"table": "models"}, about
    for strength in STRENGTHS:
        for method in ("classifier", "classifier-free"):
            yield (
                {"table": "classes", "method": method, "strength": strength},
                lambda m, method=method, strength=strength: classes(m, method, strength),
            )
    points = [f"point estimate, {strength}" for strength in ("1", "0.03", "0.01")]
    quick = ["mean", "gaussian", "known", "replacement", "pseudo-inverse", *points]
    for methods in (quick, [*(f"twisted, {n}" for n in PARTICLES[name]), "tweedie moments"]):
        for mask in ("scattered quarter", "upper half"):
            for method in methods:
                yield (
                    {"table": "inpainting", "mask": mask, "method": method},
                    lambda m, mask=mask, method=method: inpainting(m, mask, method),
                )
    if name == "digits":
        for process in PROCESSES:
            yield (
                {"table": "processes", "method": "classifier", "strength": 2.0, "process": process},
                lambda m, process=process: classes(m, "classifier", 2.0, process),
            )


def about(models: Models) -> dict[str, Any]:
    """The judge, the classifier at each level, and the distance of held-out images to training ones."""
    floor = jackknife(frechet_distance, models.test_features, models.train_features)
    levels = (0.0, 0.1, 0.3, 0.5, 1.0, 2.0, 5.0, 20.0)
    return {
        "judge, held-out": models.judge_accuracy,
        "frechet of held-out images": [round(floor.value, 3), round(floor.std_error, 3)],
        "classifier, held-out": {
            f"{a.sigma:g}": [round(a.accuracy, 4), round(a.accuracy_se, 4), round(a.cross_entropy, 4)]
            for a in accuracy(models.classifier, models.task.test, levels)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "fashion"), default="digits")
    parser.add_argument("--runs", type=Path, default=Path("runs/guidance_images"), help="where models are kept")
    parser.add_argument("--out", type=Path, default=Path("bench/results/guidance_images.jsonl"))
    parser.add_argument("--print", action="store_true", help="print what has been measured, and stop")
    args = parser.parse_args()
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    if args.print:
        for row in done:
            print(json.dumps(row))
        return
    models = None
    for cell, measure in cells(args.data):
        key = {"data": args.data, **cell}
        if any(all(row.get(k) == v for k, v in key.items()) for row in done):
            continue
        models = models or Models(task(args.data), args.runs / args.data)
        start = time.perf_counter()
        row = {**key, **measure(models), "seconds": round(time.perf_counter() - start, 1)}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

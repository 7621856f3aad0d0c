r"""Two families of parabolas given one noisy value: an amortised posterior against quadrature.

The functions of Baldassari et al. 2023 (arXiv 2305.19147), :math:`u(s) = a s^2 + e` on [-3, 3], a = -1 or 1 with equal
probability, e ~ Gamma(1, rate 2.5), which no Gaussian resembles; here seen once, :math:`y = u(s_0) + 0.3 n`. Given a
and y, e has a density on the half line, so that the posterior of any value u(s) is a mixture of two one-dimensional
laws: quadrature gives its quantiles, and W1 is the mean distance between them and the samples'.

A spectral network is trained on 16 to 32 points with fresh observations at every step, and sampled on 25, 50 and 100.

    python bench/quadratics.py      # one minute on one core
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from undrift.denoise import NetworkDenoiser
from undrift.diffusion import Diffusion
from undrift.networks import SpectralNet
from undrift.observe import GaussianNoise, Points
from undrift.process import VP
from undrift.sample import Exponential, sample
from undrift.space import Cosine, FunctionSpace
from undrift.train import Dataset, Denoising, Grids, Measured, TrainConfig, Trainer

RATE, STD, FINE, SCALE = 2.5, 0.3, 32, 5.0
SEEN = (0.4, 0.5)  # places on [0, 1]: s = 6 * place - 3


def functions(a: Tensor, e: Tensor, n: int) -> Tensor:
    """Values of a s^2 + e at the n midpoints, in units of SCALE."""
    s = 6 * (torch.arange(n) + 0.5) / n - 3
    return (a.unsqueeze(1) * s.square() + e.unsqueeze(1)) / SCALE


def draw(n: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(2, (n,), generator=g) * 2.0 - 1, torch.empty(n).exponential_(RATE, generator=g)


def posterior(y: float, place: float) -> tuple[Tensor, Tensor, Tensor]:
    """e on a line of midpoints (M,), and probabilities (2, M) of a = -1, 1 and e given y, in the functions' units."""
    e = (torch.arange(40_000, dtype=torch.float64) + 0.5) * 2e-4  # to 8: a tail of e^-20
    a = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    log = -RATE * e - 0.5 * ((SCALE * y - a * (6 * place - 3) ** 2 - e) / STD).square()
    return e, a, torch.softmax(log.flatten(), 0).reshape(2, -1)


def w1(values: Tensor, e: Tensor, a: Tensor, p: Tensor, s2: float) -> float:
    """W1 between samples of u(s) and its exact law, s2 = s^2: the area between their distribution functions."""
    exact, order = (a * s2 + e).flatten().sort()
    cumulative = p.flatten()[order].cumsum(0)
    points = torch.cat([values.double(), exact]).sort().values
    left = points[:-1]
    empirical = torch.searchsorted(values.double().sort().values, left, right=True) / len(values)
    place = torch.searchsorted(exact, left, right=True) - 1
    law = torch.where(place < 0, 0.0, cumulative[place.clamp(min=0)])
    return float(((empirical - law).abs() * points.diff()).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("bench/results/quadratics.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    x = functions(*draw(20_000, 0), FINE)
    space = FunctionSpace.matched(x, Cosine())
    rows = []
    for place in SEEN:
        torch.manual_seed(0)
        operator, noise = Points((place,), Cosine()), GaussianNoise(STD / SCALE)
        data = Dataset("parabolas", x, observed=Measured(operator, noise), grids=Grids(Cosine(), ((16,), (24,), (32,))))
        model = NetworkDenoiser(SpectralNet(width=32, modes=8, depth=3, condition_features=1), 1.0, space=space)
        config = TrainConfig(steps=options.steps, batch=128, lr=3e-3, ema=20_000.0)
        start = time.process_time()
        model = Trainer(model, Denoising(), data, config).fit(progress=False).model
        seconds = time.process_time() - start
        s0 = (6 * place - 3) ** 2
        for y in dict.fromkeys((s0 + 0.3, -s0 + 0.3, 1.0)):  # near either family, and between
            e, a, p = posterior(y / SCALE, place)
            for n in (25, 50, 100):
                given = torch.tensor([y / SCALE])
                u = SCALE * sample(Diffusion(VP(), model), 2000, (n,), Exponential(30, order=2), seed=1, observed=given)
                s = 6 * (torch.arange(n, dtype=torch.float64) + 0.5) / n - 3
                ends, middle = float(s[0].square()), float(s[n // 2].square())
                g = torch.Generator().manual_seed(2)
                pick = torch.multinomial(p.flatten(), 2000, replacement=True, generator=g)
                truth = (a + 0 * e).flatten()[pick], (0 * a + e).flatten()[pick]
                row = {"place": place, "y": round(y, 3), "grid": n, "samples": len(u), "steps": options.steps}
                row |= {"train_seconds": round(seconds, 1), "P(a = 1)": float(p[1].sum())}
                row |= {"P(a = 1), samples": float((u[:, 0] > u[:, n // 2]).double().mean())}
                for name, s2, column in (("end", ends, 0), ("middle", middle, n // 2)):
                    row[f"W1, {name}"] = w1(u[:, column], e, a, p, s2)
                    row[f"W1, {name}, of as many exact draws"] = w1(truth[0] * s2 + truth[1], e, a, p, s2)
                    law = (p * (a * s2 + e)).sum()
                    row[f"deviation, {name}"] = math.sqrt(float((p * (a * s2 + e - law).square()).sum()))
                rows.append(row)
                print(json.dumps(row), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("".join(json.dumps(r) + "\n" for r in rows))


if __name__ == "__main__":
    main()

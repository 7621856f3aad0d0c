"""How noisy is one draw of the evidence bound? Exact standard deviations, and what each device takes off them.

Gaussian data N(0.3, 0.7^2) in one dimension, exact denoiser, integral from t_min = 1e-3, clock from 0.1 to 10. All of
it is a polynomial of degree 4 in Gaussian numbers, so Gauss-Hermite cubature over noise and data and Gauss-Legendre
quadrature over time give the deviations without sampling. In nats per coordinate, for one time and one noise per point.

    uniform        times uniform
    importance     times in proportion to beta/(1 - e^-B), VP's tr(GG' S^-1), for every process
    adapted        times in proportion to the process's own tr(GG' S^-1)
    ln sigma       times uniform in ln sigma
    + control      with the control variate, its factor the best at every t
    + stratified   and what is left when stratified times leave no variance between times

    python bench/estimator_variance.py
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from undrift import Diffusion
from undrift.bound import Bound, Form
from undrift.denoise import GaussianDenoiser
from undrift.process import ALDA, CLD, MALDA, VP, InformationTimes, LinearClock, LinearProcess, LogSnrTimes

T_MIN, MEAN, STD = 1e-3, 0.3, 0.7
CLOCK = LinearClock(0.1, 10.0)
PROCESSES: dict[str, LinearProcess] = {
    "VP": VP(clock=CLOCK),
    "CLD": CLD(mass=1.0, aux_scale=0.01, clock=CLOCK),
    "MALDA": MALDA(clock=CLOCK),
    "ALDA": ALDA(clock=CLOCK),
}
DENSITIES = ("uniform", "importance", "adapted", "ln sigma")
DEVICES = ("", "+ control", "+ stratified")


def hermite(dims: int) -> tuple[Tensor, Tensor]:
    """Three points a dimension, exact for degree 5: points (3^n, n) and weights."""
    x, w = np.polynomial.hermite_e.hermegauss(3)
    points = torch.cartesian_prod(*[torch.from_numpy(x)] * dims).reshape(-1, dims)
    weights = torch.cartesian_prod(*[torch.from_numpy(w / w.sum())] * dims).reshape(-1, dims).prod(1)
    return points, weights


def time_nodes(panels: int = 60) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre in ln t."""
    x, w = np.polynomial.legendre.leggauss(12)
    edges = torch.linspace(math.log(T_MIN), 0.0, panels + 1, dtype=torch.float64)
    width = edges.diff().unsqueeze(-1)
    s = (edges[:-1, None] + width * torch.from_numpy((x + 1) / 2)).flatten()
    return s.exp(), (width * torch.from_numpy(w / 2)).flatten() * s.exp()


def deviations(process: LinearProcess, form: Form = "hybrid") -> dict[tuple[str, str], float]:
    """Standard deviation of one draw for every density and device."""
    bound = Bound(
        Diffusion(process, GaussianDenoiser(torch.tensor([MEAN], dtype=torch.float64), STD**2)), form, t_min=T_MIN
    )
    points, p = hermite(1 + bound.noises)
    t, weight = time_nodes()
    x, noise = (MEAN + STD * points[:, :1]).repeat(len(t), 1), points[:, 1:, None].repeat(len(t), 1, 1)
    at = t.repeat_interleave(len(p))
    path, raw = (v.reshape(len(t), -1) for v in (bound.path(x, at, noise), bound.path_control(at, noise)))
    # What a point contributes whatever the time: its prior and the mean of its start.
    fixed = bound.prior(x[: len(p)]) + bound.start_constant(x[: len(p)])

    def expect(v: Tensor) -> Tensor:
        return (p * v).sum(-1)

    level = path.mul(p).sum(-1)
    factor = expect((path - level.unsqueeze(-1)) * raw) / expect(raw.square())
    controlled = path - factor.unsqueeze(-1) * raw

    def spread(values: Tensor, density: Tensor, within: bool) -> float:
        draw = fixed + values / density.unsqueeze(-1)
        first, second = expect(draw), expect(draw.square())
        chance = weight * density
        mean = (chance * first).sum() / chance.sum()
        inner = (chance * (second - first.square())).sum()
        between = (chance * (first - mean).square()).sum()
        return math.sqrt(float(inner if within else inner + between))

    def density_of(of: LinearProcess, times: InformationTimes | LogSnrTimes) -> Tensor:
        _, rate = times.measure(of, t)
        return rate / (weight * rate).sum()

    densities = {
        "uniform": torch.full_like(t, 1 / (1 - T_MIN)),
        "importance": density_of(PROCESSES["VP"], InformationTimes()),
        "adapted": density_of(process, InformationTimes()),
        "ln sigma": density_of(process, LogSnrTimes()),
    }
    return {
        (name, device): spread(path if device == "" else controlled, density, device == "+ stratified")
        for name, density in densities.items()
        for device in DEVICES
    }


def main() -> None:
    print(f"{'':34s}" + "".join(f"{name:>12s}" for name in DENSITIES))
    for name, process in PROCESSES.items():
        forms: tuple[Form, ...] = ("hybrid", "denoising")
        for form in forms[process.channels == 1 :]:  # one form for one channel
            row = deviations(process, form)
            for device in DEVICES:
                title = f"{name}, {form}" if not device else f"  {device}"
                print(f"{title:34s}" + "".join(f"{row[density, device]:12.2f}" for density in DENSITIES))


if __name__ == "__main__":
    main()

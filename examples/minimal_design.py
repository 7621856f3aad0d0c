"""Find the noise levels for a few network calls before any is spent, and see what the prediction was worth.

    python minimal_design.py [number of calls] [number of samples]

Predicted W2 and KL are exact for Gaussian data with the spectrum of the 8x8 digits; nothing is sampled for them. The
digits are not Gaussian, so samples are drawn too, with the exact denoiser of the data set, and held against it: what
is left is the plan's error. "floor" is the distance of 60 calls. Distances in different columns have different units.
"""

import sys
from dataclasses import replace

from undrift import Diffusion, sample
from undrift.denoise import EmpiricalDenoiser
from undrift.design import Spectrum, family, optimise, propagate
from undrift.measure import sliced_wasserstein
from undrift.process import VP
from undrift.sample import Ancestral, DPMSolver2M, Exponential, LogSigma, Quadratic, Rho, TableSampler, Tangent
from undrift.train import Digits

METHODS = {"DDIM": Exponential(order=1), "ancestral": Ancestral(), "DPM-Solver++(2M)": DPMSolver2M()}
GRIDS = {"log sigma": LogSigma(), "rho 7": Rho(), "quadratic": Quadratic(), "tangent": Tangent(scale=0.8)}


def main(calls: int = 5, n: int = 1000) -> None:
    data = Digits().load().x
    spectrum = Spectrum.of(data, name="digits")
    process = VP()
    diffusion = Diffusion(process, EmpiricalDenoiser(data))

    def show(name: str, sampler: TableSampler, note: str = "") -> None:
        law = propagate(sampler.plan(process), spectrum).smoothed(1 / 16)  # by half a grey level
        x = sample(diffusion, n, data.shape[1:], sampler, seed=0)
        measured = sliced_wasserstein(x, data, projections=128)
        print(f"{name:30} {float(law.w2):8.3f} {float(law.kl):8.2f} {measured:10.4f}  {note}")

    floor = sample(diffusion, n, data.shape[1:], Exponential(steps=60), seed=0)
    print(f"{spectrum}\n\n{calls} calls{'':23} {'W2':>8} {'KL':>8} {'sliced W2':>10}  of {n} samples", end=", ")
    print(f"floor {sliced_wasserstein(floor, data, projections=128):.4f}")
    for name, method in METHODS.items():
        for grid_name, grid in GRIDS.items():
            show(f"{name}, {grid_name}", replace(method, steps=calls, grid=grid))
        design = optimise(process, replace(method, steps=calls), family(spectrum))
        levels = ", ".join(f"{s:.3g}" for s in design.sigma.tolist())
        show(f"{name}, optimised", design.sampler, f"sigma = {levels}")
        if isinstance(method, DPMSolver2M):  # its errors can cancel on Gaussian data; those of DDIM cannot
            ddim = Exponential(steps=calls, order=1)
            design = optimise(process, replace(method, steps=calls), family(spectrum), by=ddim)
            show(f"{name}, by DDIM", design.sampler)
        print()


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))

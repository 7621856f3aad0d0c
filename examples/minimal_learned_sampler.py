"""Train a sampler for a density of your own, keep it, draw again with other steps, and hold it against SMC.

    python minimal_learned_sampler.py [steps]

The density is a chain of particles, each in a well at -1 or 1 and drawn to its neighbours, in a field that prefers 1:
two modes, in which all particles sit on one side, and little between them.
"""

import sys
from pathlib import Path

import torch

from undrift.density import DIS, SMC, Affine, Draws, Geometric, Normal, Target, TrainedSampler
from undrift.density.controlled import AdjointMatching, LogVariance, Stages, Training
from undrift.process import CLD

SITES = 6


def log_prob(x: torch.Tensor) -> torch.Tensor:
    """(batch, sites) -> (batch,)."""
    wells = 2.0 * (x.square() - 1).square().sum(-1)
    bonds = x.diff(dim=-1).square().sum(-1)
    return 0.1 * x.sum(-1) - wells - bonds


def say(what: str, draws: Draws) -> None:
    positive, error = draws.expectation((draws.x.mean(-1) > 0).double())
    share = (draws.ess or 0.0) / len(draws.x)
    bound = "" if draws.bounds is None else f"   ELBO {draws.bounds.elbo:7.3f}"
    print(
        f"{what:26} log Z {draws.log_z:7.3f} ± {draws.log_z_std_error:.3f}   P(mean > 0) {positive:.3f} ± {error:.3f}"
        f"   ESS {share:4.0%}{bound}   {draws.evaluations.gradients} gradients"
    )


def main(steps: int = 300) -> None:
    target = Target(log_prob, SITES, name="chain")
    method = DIS(
        process=CLD(),  # underdamped; VP(), PSLD() or any other linear process would do
        steps=100,
        train_steps=25,
        objective=Stages(AdjointMatching(), LogVariance(), after=max(1, 2 * steps // 3)),
        training=Training(steps=steps, batch=256, rate=3e-3),
        coordinates=Affine(0.0, 0.7),  # the prior covers both modes
    )
    draws = method.run(target, 4096, seed=0)
    say("learned, with training", draws)
    print("\n".join(draws.warnings()) or "nothing in the run speaks against these draws")

    path = draws.sampler.save(Path("sampler.safetensors"))
    sampler = TrainedSampler.load(path, target)
    for k in (25, 200):
        say(f"the same, {k} steps", sampler.draw(4096, seed=1, steps=k))

    say("SMC", SMC(path=Geometric(Normal(1.0))).run(target, 4096, seed=0))


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))

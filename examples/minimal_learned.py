"""Train a process together with its model, by the evidence bound, beside a fixed process on the same budget.

    python minimal_learned.py [steps]

The data is a ring of Gaussians in the plane, whose density is known, so each bound can be held against the truth. The
models are networks that see all K channels and predict the noise: there the process decides how hard their task is.
(A denoiser's bound depends on the process only through its noise levels at both ends.)
"""

import sys

import torch

from undrift import NoiseDiffusion, elbo
from undrift.denoise import MixtureDenoiser
from undrift.networks import MLP
from undrift.process import CLD, VP, LearnedProcess, LinearClock, LinearProcess
from undrift.train import Dataset, EvidenceBound, TrainConfig, Trainer


def main(steps: int = 1000) -> None:
    ring = MixtureDenoiser.ring(modes=4, std=0.3)
    train = Dataset("ring", ring.sample(20_000, torch.Generator().manual_seed(0)).float())
    test = ring.sample(2000, torch.Generator().manual_seed(1))
    truth = ring.log_prob(test)
    print(f"log density of {len(test)} new points: {float(truth.mean()):.4f} nats, known in closed form\n")

    clock = LinearClock(0.1, 10.0)
    processes: dict[str, LinearProcess] = {
        "VP": VP(clock=clock),
        "CLD": CLD(mass=1.0, aux_scale=0.01, clock=clock),
        "learned, 2 channels": LearnedProcess(channels=2, learn=("Q", "D", "clock")),
    }
    objective = EvidenceBound(sigma_min=0.01)
    config = TrainConfig(steps=steps, batch=512, lr=2e-3, process_lr=1e-2, warmup=min(100, steps), seed=0)
    print(f"{'process':20} {'below truth':>11} {'std error':>9} {'prior term':>10} {'sigma(T)':>9}")
    for name, process in processes.items():
        torch.manual_seed(0)
        model = NoiseDiffusion(process, MLP(features=2 * process.channels, width=64, depth=3), data_std=train.std)
        model = Trainer(model, objective, train, config).fit(progress=False).model
        bound = elbo(model, test.float(), sigma_min=objective.sigma_min, samples=8, seed=0)
        gap, error = bound.mean(-truth)
        end = float(model.process.sigma(model.process.horizon))
        print(f"{name:20} {-gap:11.4f} {error:9.4f} {float(bound.prior.mean()):10.4f} {end:9.3g}")

    d, q, _ = model.process.terms()
    print(f"\nlearned, of {model.process.degrees} effective parameters, with a rate of")
    print(", ".join(f"{rate:.2f}" for rate in model.process.clock.config["rates"]), "at equally spaced times:")
    for name, matrix in (("Q", q), ("D", d)):
        for i, row in enumerate(matrix.tolist()):
            print(f"{name if i == 0 else ' '} {'  '.join(f'{value:8.4f}' for value in row)}")


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))

"""What does the library cost on top of the network? Sampling and training, with a peer on the same networks.

Sampling: ``sample`` with N calls over N bare network calls. Training: one step of the trainer (data, noise, loss,
gradient clipping, EMA, logging) over one bare forward + backward + optimiser step; and of the evidence bound, on fixed
processes and on learned ones. The peer is diffusers: the loop of
its schedulers, and the loop of its training examples (``add_noise``, clipping, ``EMAModel``) with the same network.

Rounds are interleaved. Two ratios: of the best times, the steadier one on a machine that others use too, and the median
over rounds of paired times, with its quartiles.

    python bench/cost.py --out bench/results/cost.json
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from undrift import Diffusion, NoiseDiffusion, sample
from undrift.denoise import NetworkDenoiser
from undrift.networks import MLP, UNet
from undrift.process import MALDA, PSLD, VP, LearnedProcess, LinearProcess
from undrift.sample import SSCS, Ancestral, Exponential, Plan, Sampler
from undrift.train import Dataset, Denoising, EvidenceBound, NoiseMatching, TrainConfig, Trainer

CALLS = 20


def interleave(tasks: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each task in each round, after one round of warming up."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for r in range(rounds + 1):
        for name, task in tasks.items():
            begin = time.perf_counter()
            task()
            if r:
                times[name].append(time.perf_counter() - begin)
    return times


def report(title: str, times: dict[str, list[float]], base: str, results: list[dict[str, object]]) -> None:
    print(f"\n{title}\n{'':40s} {'best ms':>9s} {'ratio of bests':>15s} {'median ratio':>13s}  (quartiles)")
    for name, values in times.items():
        ratios = [v / b for v, b in zip(values, times[base], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        best = min(values) / min(times[base])
        print(f"{name:40s} {1e3 * min(values):9.2f} {best:15.3f} {middle:13.3f}  ({low:.3f} to {high:.3f})")
        results.append({"title": title, "name": name, "ms": 1e3 * min(values), "ratio": best, "median": middle,
                        "quartiles": [low, high]})  # fmt: skip


class Free(nn.Module):
    """A network that costs nothing, with a parameter so that it has a dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return x


def added(times: dict[str, list[float]], network_ms: float, results: list[dict[str, object]]) -> None:
    """What a walk costs when the network is free, beside what the network costs: steadier than a ratio of long runs."""
    print(f"\nthe same walks with a free network\n{'':40s} {'best ms':>9s} {'1 + added / network':>20s}")
    for name, values in list(times.items())[1:]:
        ratio = 1 + 1e3 * min(values) / network_ms
        print(f"{name:40s} {1e3 * min(values):9.2f} {ratio:20.3f}")
        results.append({"title": "free network", "name": name, "ms": 1e3 * min(values), "ratio": ratio})


def sampling(network: nn.Module, event: tuple[int, ...], batch: int) -> dict[str, Callable[[], None]]:
    network.eval()
    denoiser = NetworkDenoiser(network)
    x, label = torch.randn(batch, *event), torch.zeros(batch)
    walks = [(VP(), Ancestral(CALLS)), (VP(), Exponential(CALLS)), (PSLD(), SSCS(CALLS)), (PSLD(), Exponential(CALLS))]

    def bare() -> None:
        with torch.no_grad():
            for _ in range(CALLS):
                network(x, label)

    tasks: dict[str, Callable[[], None]] = {f"{CALLS} bare network calls": bare}
    for process, sampler in walks:
        name = f"{type(process).__name__}, {type(sampler).__name__}"
        diffusion = Diffusion(process, denoiser)
        tasks[f"sample: {name}"] = walk(diffusion, sampler, batch, event)
        tasks[f"sample: {name}, plan given"] = walk(diffusion, sampler.plan(process), batch, event)
    tasks |= peer_sampling(network, event, batch)
    return tasks


def walk(diffusion: Diffusion, sampler: Sampler | Plan, batch: int, event: tuple[int, ...]) -> Callable[[], None]:
    def run() -> None:
        sample(diffusion, batch, event, sampler, seed=0)

    return run


def peer_sampling(network: nn.Module, event: tuple[int, ...], batch: int) -> dict[str, Callable[[], None]]:
    try:
        from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
    except ImportError:
        return {}

    def loop(scheduler: object) -> Callable[[], None]:
        def run() -> None:
            g = torch.Generator().manual_seed(0)
            scheduler.set_timesteps(CALLS)  # type: ignore[attr-defined]
            with torch.no_grad():
                z = torch.randn(batch, *event, generator=g)
                for t in scheduler.timesteps:  # type: ignore[attr-defined]
                    noise = network(z, (t / 1000.0).float().expand(batch))
                    z = scheduler.step(noise, t, z).prev_sample  # type: ignore[attr-defined]

        return run

    return {
        "diffusers: DDIM": loop(DDIMScheduler()),
        "diffusers: DDPM": loop(DDPMScheduler()),
        "diffusers: DPM-Solver++": loop(DPMSolverMultistepScheduler()),
    }


def training(network: nn.Module, event: tuple[int, ...], batch: int) -> dict[str, Callable[[], None]]:
    data = Dataset("random", torch.randn(4096, *event).clamp(-1, 1))
    bare_net = copy.deepcopy(network).train()
    optimizer = torch.optim.Adam(bare_net.parameters(), lr=1e-4, fused=True)
    x, label = data.x[:batch], torch.zeros(batch)

    def bare() -> None:
        loss = (bare_net(x, label) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def trainer(model: object, objective: object) -> Callable[[], None]:
        t = Trainer(model, objective, data, TrainConfig(steps=10**6, batch=batch))  # type: ignore[arg-type]
        t.network.train()
        return t._train_step

    tasks: dict[str, Callable[[], None]] = {
        "bare forward, backward, Adam": bare,
        "trainer: denoising": trainer(NetworkDenoiser(copy.deepcopy(network)), Denoising()),
        "trainer: noise matching, VP": trainer(NoiseDiffusion(VP(), copy.deepcopy(network)), NoiseMatching()),
    }
    processes: dict[str, LinearProcess] = {
        "VP": VP(),
        "MALDA": MALDA(),
        **{f"learned, K = {k}": LearnedProcess(k) for k in (1, 2, 3, 5)},
        "learned whole, K = 3": LearnedProcess(3, learn=("Q", "D", "S", "start", "clock")),
    }
    for name, process in processes.items():
        model = Diffusion(process, NetworkDenoiser(copy.deepcopy(network)))
        tasks[f"trainer: bound, {name}"] = trainer(model, EvidenceBound())
    try:
        from diffusers import DDPMScheduler
        from diffusers.training_utils import EMAModel
    except ImportError:
        return tasks
    peer = copy.deepcopy(network).train()
    adam = torch.optim.Adam(peer.parameters(), lr=1e-4, fused=True)
    ema, scheduler = EMAModel(peer.parameters()), DDPMScheduler()

    def peer_step() -> None:
        index = torch.randint(0, len(data.x), (batch,))
        clean, noise = data.x[index], torch.randn(batch, *event)
        t = torch.randint(0, 1000, (batch,))
        loss = torch.nn.functional.mse_loss(peer(scheduler.add_noise(clean, noise, t), t / 1000.0), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        ema.step(peer.parameters())

    tasks["diffusers: training example"] = peer_step
    return tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["sampling", "training"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    unet, mlp = UNet(1, 8, width=24), MLP(64, width=512)
    results: list[dict[str, object]] = []
    shapes = [("digits U-Net", unet, (1, 8, 8), 256), ("MLP, width 512", mlp, (64,), 512)]
    for name, network, event, batch in shapes if args.only != "training" else []:
        times = interleave(sampling(network, event, batch), args.rounds)
        base = f"{CALLS} bare network calls"
        report(f"sampling, {name}, batch {batch}, {CALLS} calls", times, base, results)
        added(interleave(sampling(Free(), event, batch), 3 * args.rounds), 1e3 * min(times[base]), results)
    shapes = [("digits U-Net", unet, (1, 8, 8), 128), ("MLP, width 512", mlp, (64,), 512)]
    for name, network, event, batch in shapes if args.only != "sampling" else []:
        times = interleave(training(network, event, batch), 6 * args.rounds)
        report(f"training step, {name}, batch {batch}", times, "bare forward, backward, Adam", results)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

r"""A training step beside sde_sampler (Richter & Berner 2024), in one run: mixture of nine, DIS, log-variance and KL.

Same target, network width and depth, batch and number of steps; CPU seconds of loss and gradient on one thread, the two
in turns. The peer's own bias is shown too: its weights are sums of Girsanov terms, ours ratios of kernels, both under
the exact control of N(0, I) in ten dimensions.

Needs a checkout of github.com/juliusberner/sde_sampler; nothing of it is installed. Its imports of wandb, torchquad and
torchsde, which no line used here calls, are answered by empty modules where they are missing.

    python bench/learned_peers.py path/to/sde_sampler
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import time
import types
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from undrift.denoise import GaussianDenoiser
from undrift.density.controlled import (
    KL,
    ControlledDiffusion,
    EqualTimes,
    Exact,
    Informed,
    LogVariance,
    Objective,
    Scheme,
    walk,
)
from undrift.density.controlled.objective import Work
from undrift.density.targets import Gaussian, Mixture9
from undrift.measure.evidence import log_mean_exp
from undrift.process import VP, LinearClock


def vp() -> VP:
    return VP(clock=LinearClock(0.1, 10.0))


def peer(path: Path) -> types.SimpleNamespace:
    """The modules of the peer that are used."""
    for name in ("wandb", "torchquad", "torchsde"):
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = types.ModuleType(name)
    if not hasattr(sys.modules.get("wandb"), "run"):
        sys.modules["wandb"].run = None  # type: ignore[attr-defined]
    sys.path.insert(0, str(path))
    from sde_sampler.distr.gauss import GMM, IsotropicGauss
    from sde_sampler.eq.sdes import VP as PeerVP
    from sde_sampler.losses.oc import TimeReversalLoss
    from sde_sampler.models.mlp import FourierMLP, TimeEmbed
    from sde_sampler.models.reparam import LerpCtrl

    return types.SimpleNamespace(
        GMM=GMM,
        IsotropicGauss=IsotropicGauss,
        VP=PeerVP,
        TimeReversalLoss=TimeReversalLoss,
        FourierMLP=FourierMLP,
        TimeEmbed=TimeEmbed,
        LerpCtrl=LerpCtrl,
    )


def their_step(their: Any, method: str, batch: int, steps: int) -> Callable[[], None]:
    """One loss and gradient of the peer, as its configuration for DIS has it."""
    target, prior = their.GMM(dim=2, name="grid"), their.IsotropicGauss(dim=2)
    sde = their.VP(diff_coeff_sq_min=0.1, diff_coeff_sq_max=10.0, scale_diff_coeff=1.0, terminal_t=1.0)
    silent = {"last_bias_init": nn.init.zeros_, "last_weight_init": nn.init.zeros_}
    base = their.FourierMLP(dim=2, num_layers=4, channels=64, activation=nn.GELU(), **silent)
    silent["last_bias_init"] = partial(nn.init.constant_, val=1.0)
    gate = their.TimeEmbed(dim_out=1, num_layers=4, channels=64, activation=nn.GELU(), **silent)
    control = their.LerpCtrl(
        base_model=base,
        target_score=target.score,
        prior_score=prior.score,
        score_model=gate,
        sde=sde,
        detach_score=False,
        clip_score=1e4,
        clip_model=1e4,
    )
    loss = their.TimeReversalLoss(generative_ctrl=control, sde=sde, method=method, max_rnd=1e8)
    ts = torch.linspace(0.0, 1.0, steps + 1)

    def run() -> None:
        value, _ = loss(ts, prior.sample((batch,)), target.unnorm_log_prob, prior.log_prob)
        value.backward()
        control.zero_grad()

    return run


def our_step(objective: Objective, batch: int, steps: int) -> Callable[[], None]:
    """One loss and gradient of ours: the network as wide and deep as theirs."""
    diffusion = ControlledDiffusion(Scheme(vp(), EqualTimes(), steps, Informed(width=64, depth=2)), 2)
    runner = objective.runner(Work(diffusion, Mixture9(), torch.Generator().manual_seed(0), batch, torch.float32))

    def run() -> None:
        runner.step()
        diffusion.zero_grad()

    return run


def steps_table(their: Any) -> None:
    """CPU time of a step, in turns."""
    print("objective     batch  steps    peer    ours   ratio")
    for name, method, objective in (("log-variance", "lv", LogVariance()), ("KL", "kl", KL())):
        for batch, steps in ((512, 100), (2048, 200)):
            runs = {"peer": their_step(their, method, batch, steps), "ours": our_step(objective, batch, steps)}
            times: dict[str, list[float]] = {key: [] for key in runs}
            for _ in range(4):
                for key, run in runs.items():
                    began = time.process_time()
                    run()
                    times[key].append(time.process_time() - began)
            a, b = (1e3 * min(times[key][1:]) for key in ("peer", "ours"))
            print(f"{name:12s}  {batch:5d}  {steps:5d}  {a:5.0f} ms {b:5.0f} ms  {b / a:5.2f}", flush=True)


def bias_table(their: Any, d: int = 10, n: int = 50_000) -> None:
    """log Z and ELBO of both under a perfect control: the truth is 0."""
    print("\nperfect control, N(0, I) in ten dimensions     ELBO   log Z of the weights   variance")
    for steps in (100, 200):
        sde = their.VP(diff_coeff_sq_min=0.1, diff_coeff_sq_max=10.0, scale_diff_coeff=1.0, terminal_t=1.0)
        prior = their.IsotropicGauss(dim=d)

        def exact(t: Tensor, x: Tensor, sde: Any = sde) -> Tensor:
            return -sde.diff(t, x) * x

        loss = their.TimeReversalLoss(generative_ctrl=exact, sde=sde, method="lv")
        torch.manual_seed(0)
        with torch.no_grad():
            ts = torch.linspace(0.0, 1.0, steps + 1)
            _, rnd, _ = loss.simulate(
                ts, prior.sample((n,)), prior.log_prob, prior.log_prob, train=False, compute_ito_int=True
            )
        target = Gaussian(d)
        control = Exact(GaussianDenoiser(torch.zeros(d), torch.ones(d)))
        generator = torch.Generator().manual_seed(0)
        kernels = Scheme(vp(), EqualTimes(), steps, control)
        for name, log_w in (
            ("peer, sums of Girsanov terms", -rnd.double().flatten()),
            ("ours, Euler's kernels", _weights(replace(kernels, integrator="euler"), target, n, generator)),
            ("ours, exponential kernels", _weights(kernels, target, n, generator)),
        ):
            found = f"{float(log_w.mean()):+.4f}   {float(log_mean_exp(log_w)):+.4f}   {float(log_w.var()):.2e}"
            error = math.sqrt(float(log_w.var()) / n)
            print(f"K = {steps}  {name:32s}  {found}   (± {error:.4f})", flush=True)


def _weights(scheme: Scheme, target: Any, n: int, generator: torch.Generator) -> Tensor:
    diffusion = ControlledDiffusion(scheme, target.dim)
    return walk(diffusion, target, 1, n, generator, torch.float64).log_weights[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    their = peer(parser.parse_args().checkout)
    torch.set_num_threads(1)
    steps_table(their)
    bias_table(their)


if __name__ == "__main__":
    main()

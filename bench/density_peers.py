r"""Sampling a density beside a peer: error against gradient evaluations and against time, same targets, same run.

The peer is blackjax: NUTS with window adaptation, and adaptive tempered sequential Monte Carlo (SMC) with HMC and MALA,
whose step sizes and mass matrices its own functions tune from acceptance and particles. It gets the same densities,
written in JAX from the constants of our targets and checked against them to 1e-9, in float64, and starts from the same
law N(0, s^2 I). Everything runs on one core, to which the process is pinned before either library is loaded, and
methods take turns within a seed. Seconds are CPU seconds; compilation is timed apart and not counted.

    TV       half the sum of |share of draws nearest to each mode - its true share|
    Z        |log Z^ - log Z|
    moments  the larger of the worst |mean - truth| / sd and the worst |sd - truth| / sd over scalars;
             the funnel's first coordinate alone: the others have no standard deviation that draws could find

    work     error^2 x gradients: what an error of 1 would cost where errors fall as 1 / sqrt(gradients); less is better

Gradients are all that a method asks for: pilot, survey, warm-up. Log densities without a gradient are kept apart; the
peer's SMC asks for two of them per particle and level, ours for none. "exact" are independent draws of the target.

    python bench/density_peers.py                  # a quarter of an hour of CPU, over a third of it the compiler
    python bench/density_peers.py --only Grid --seeds 0
    python bench/density_peers.py --cost               # nanoseconds a point: bare targets, compiled or not
    python bench/density_peers.py --print
"""

from __future__ import annotations

import os

if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
os.environ["JAX_PLATFORMS"] = "cpu"

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import blackjax
import blackjax.smc.adaptive_tempered as tempered
import blackjax.smc.resampling as resampling
import jax
import jax.numpy as jnp
import numpy as np
import torch
from blackjax.smc.tuning.from_kernel_info import update_scale_from_acceptance_rate
from blackjax.smc.tuning.from_particles import particles_stds
from torch import Tensor

from undrift.density import (
    HMC,
    SMC,
    AdaptiveLevels,
    Affine,
    DilationLangevin,
    Draws,
    StudentT,
    Target,
)
from undrift.density.auto import Auto
from undrift.density.coordinates import ascend, curvature, factor_of, spread
from undrift.density.targets import (
    Banana,
    EightSchools,
    Funnel,
    Grid16,
    LogisticRegression,
    ManyWell,
    Mixture40,
    TwoModes,
)
from undrift.density.tempering import ParallelTempering
from undrift.measure.evidence import mode_weights

jax.config.update("jax_enable_x64", True)
torch.set_num_threads(1)

BUDGETS = (512, 2048, 8192)  # draws
COSTED = ("Grid16", "Mixture40", "EightSchools")
OUT = Path(__file__).parent / "results" / "density_peers.jsonl"
Density = Callable[[Any], Any]  # log gamma of one point (d,), in JAX


# -- the same densities in JAX -----------------------------------------------------------------------------------------


def mixture(target: Any) -> Density:
    natural = target._natural.on(torch.zeros((), dtype=torch.float64))
    centre, features, c = (jnp.asarray(natural[k].numpy()) for k in ("centre", "features", "c"))

    def density(x: Any) -> Any:
        y = x - centre
        return jax.nn.logsumexp(jnp.append(y, y @ y) @ features + c)

    return density


def banana(target: Banana) -> Density:
    s, b = target.scale, target.bend
    constant = 0.5 * target.dim * math.log(2 * math.pi) + math.log(s)

    def density(x: Any) -> Any:
        straight = x[1] - b * (x[0] ** 2 - s**2)
        return -0.5 * ((x[0] / s) ** 2 + straight**2 + (x[2:] ** 2).sum()) - constant

    return density


def funnel(target: Funnel) -> Density:
    s, d = target.scale, target.dim
    constant = 0.5 * d * math.log(2 * math.pi) + math.log(s)

    def density(x: Any) -> Any:
        rest = 0.5 * jnp.exp(-x[0]) * (x[1:] ** 2).sum() + 0.5 * (d - 1) * x[0]
        return -0.5 * (x[0] / s) ** 2 - rest - constant

    return density


def many_well(target: ManyWell) -> Density:
    def density(x: Any) -> Any:
        u, v = x[::2], x[1::2]
        return (0.5 * u + 6 * u**2 - u**4 - 0.5 * v**2).sum()

    return density


def eight_schools(target: EightSchools) -> Density:
    effect, error = _schools(target)
    effect, error = jnp.asarray(effect), jnp.asarray(error)

    def density(x: Any) -> Any:
        e, mu, log_tau = x[:8], x[8], x[9]
        tau = jnp.exp(log_tau)
        normal = jax.scipy.stats.norm.logpdf
        likelihood = normal(effect, mu + tau * e, error).sum()
        half_cauchy = math.log(2 / (math.pi * 5)) - jnp.log1p((tau / 5) ** 2)
        return likelihood + normal(e).sum() + normal(mu, 0.0, 5.0) + half_cauchy + log_tau

    return density


def logistic(target: LogisticRegression) -> Density:
    signed = jnp.asarray(target._constants.on(torch.zeros((), dtype=torch.float64))["signed"].numpy())
    v, d = target._prior_variance, target.dim

    def density(w: Any) -> Any:
        prior = -0.5 * (w @ w / v + d * math.log(2 * math.pi * v))
        return jax.nn.log_sigmoid(signed @ w).sum() + prior

    return density


# -- the truth ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Truth:
    """mean and sd of the scalars that are compared, and exact draws of them and of the points, if there are any."""

    mean: Tensor
    sd: Tensor
    draw: Callable[[int, torch.Generator], Tensor]


def mixture_truth(target: Any) -> Truth:
    w, means, covs = target._mixture
    mean = w @ means
    return Truth(mean, (w @ (means.square() + covs.unsqueeze(-1)) - mean.square()).sqrt(), target.sample)


def banana_truth(target: Banana) -> Truth:
    s, b = target.scale, target.bend
    return Truth(torch.zeros(2).double(), torch.tensor([s, math.sqrt(1 + 2 * b**2 * s**4)]).double(), target.sample)


def funnel_truth(target: Funnel) -> Truth:
    return Truth(
        torch.zeros(1).double(), torch.tensor([target.scale]).double(), lambda n, g: target.sample(n, g)[:, :1]
    )


def many_well_truth(target: ManyWell) -> Truth:
    first, second = 1.18796098, 2.95980609  # of u, by quadrature; v is N(0, 1)
    mean = torch.tensor([first, 0.0] * (target.dim // 2)).double()
    return Truth(mean, torch.tensor([math.sqrt(second - first**2), 1.0] * (target.dim // 2)).double(), target.sample)


def _schools(target: EightSchools) -> tuple[np.ndarray, np.ndarray]:
    constants = target._constants.on(torch.zeros((), dtype=torch.float64))
    return constants["effect"].numpy(), constants["error"].numpy()


def eight_schools_truth(target: EightSchools) -> Truth:
    """theta, mu and tau: Gaussian given tau, whose own density is tabulated."""
    y, error = _schools(target)
    tau = np.exp(np.linspace(math.log(1e-6), math.log(1e4), 40001))
    variance = error**2 + tau[:, None] ** 2
    precision = 1 / 25 + (1 / variance).sum(-1)
    mu = (y / variance).sum(-1) / precision
    fit = np.log(variance).sum(-1) + (y**2 / variance).sum(-1) - mu**2 * precision + np.log(precision)
    log_p = -0.5 * fit - np.log1p((tau / 5) ** 2) + np.log(tau)
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    own = 1 / (1 / error**2 + 1 / tau[:, None] ** 2)  # variance of theta given mu and tau
    slope = own / tau[:, None] ** 2
    theta = own * y / error**2 + slope * mu[:, None]
    theta_square = theta**2 + own + slope**2 / precision[:, None]
    values = np.concatenate([theta, np.stack([mu, tau], -1)], -1)
    squares = np.concatenate([theta_square, np.stack([mu**2 + 1 / precision, tau**2], -1)], -1)
    mean = p @ values

    def draw(n: int, generator: torch.Generator) -> Tensor:
        k = torch.multinomial(torch.from_numpy(p), n, replacement=True, generator=generator).numpy()
        noise = torch.empty(n, 9, dtype=torch.float64).normal_(generator=generator).numpy()
        m = mu[k] + noise[:, 8] / np.sqrt(precision[k])
        t = own[k] * y / error**2 + slope[k] * m[:, None] + np.sqrt(own[k]) * noise[:, :8]
        return torch.from_numpy(np.concatenate([t, np.stack([m, tau[k]], -1)], -1))

    return Truth(torch.from_numpy(mean), torch.from_numpy(np.sqrt(p @ squares - mean**2)), draw)


def logistic_truth(target: LogisticRegression) -> Truth:
    """By importance sampling from a Student law fitted to the posterior: 2^17 draws, effective for most of them."""
    generator, law = torch.Generator().manual_seed(0), StudentT(1.0, 30.0)
    peak = ascend(target, torch.zeros(1, target.dim).double()).x[0]
    seen = target.affine(peak, factor_of(curvature(target, peak)))
    for count in (2**15, 2**17):
        z = law.sample(count, target.dim, generator, torch.float64)
        w = torch.cat([seen.log_prob(part) - law.log_prob(part) for part in z.split(2**13)]).softmax(0)
        x = seen.to_x(z)
        seen = target.affine(*spread(x, w))
    assert float(1 / w.square().sum()) > count / 2
    mean = w @ x
    pick = lambda n, g: x[torch.multinomial(w, n, replacement=True, generator=g)]  # noqa: E731
    return Truth(mean, (w @ (x - mean).square()).sqrt(), pick)


# -- cases -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Case:
    """A target with what every method is told of it: the width s of the start law N(0, s^2 I).

    Args:
        target: ours.
        jax: builds the peer's.
        truth: builds the truth.
        width: s, about the target's root mean square.
        chains: of NUTS: few for one peak, many for several.
        scalars: how many leading scalars are compared; None for all.
    """

    target: Any
    jax: Callable[[Any], Density]
    exact: Callable[[Any], Truth]
    width: float
    chains: int = 16
    scalars: int | None = None

    @cached_property
    def density(self) -> Density:
        return self.jax(self.target)

    @cached_property
    def truth(self) -> Truth:
        return self.exact(self.target)

    @property
    def modes(self) -> bool:
        return getattr(self.target, "mode_weights", None) is not None

    def values(self, x: Tensor) -> Tensor:
        space = self.target.parameters
        return (x if space is None else space.flat(x))[:, : self.scalars]

    def check(self) -> float:
        """Largest relative difference of values and of gradients between the two libraries; must be under 1e-9."""
        x = self.width * torch.randn(256, self.target.dim, generator=torch.Generator().manual_seed(1)).double()
        value, score = self.target.log_prob_and_score(x)
        other, gradient = jax.jit(jax.vmap(jax.value_and_grad(self.density)))(x.numpy())
        gaps = [
            float((a - torch.from_numpy(np.array(b))).abs().div(1 + a.abs()).max())
            for a, b in ((value, other), (score, gradient))
        ]
        assert max(gaps) < 1e-9, f"{self.target.name}: the two densities differ by {gaps}"
        return max(gaps)

    def errors(self, values: Tensor, weights: Tensor | None, x: Tensor | None) -> dict[str, float | None]:
        """Of scalars (n, k), weighted (n,) or not, and of the modes that points x (n, d) are in."""
        n = len(values)
        w = torch.full((n,), 1 / n).double() if weights is None else weights
        mean = w @ values
        sd = (w @ (values - mean).square()).sqrt()
        out: dict[str, float | None] = {
            "mean": float(((mean - self.truth.mean) / self.truth.sd).abs().max()),
            "sd": float((sd / self.truth.sd - 1).abs().max()),
            "tv": None,
        }
        if self.modes and x is not None:
            share = mode_weights(self.target.assign(x), len(self.target.mode_weights), w.log())
            out["tv"] = 0.5 * float((share - self.target.mode_weights).abs().sum())
        return out


CASES: dict[str, Case] = {
    "TwoModes": Case(TwoModes(), mixture, mixture_truth, 5.0, chains=64),
    "Grid16": Case(Grid16(), mixture, mixture_truth, 12.0, chains=64),
    "Grid16(dim=10)": Case(Grid16(dim=10), mixture, mixture_truth, 12.0, chains=64),
    "Mixture40": Case(Mixture40(), mixture, mixture_truth, 25.0, chains=64),
    "ManyWell(32)": Case(ManyWell(32), many_well, many_well_truth, 2.0, chains=64),
    "Banana": Case(Banana(), banana, banana_truth, 15.0),
    "Funnel(10)": Case(Funnel(10), funnel, funnel_truth, 5.0, scalars=1),
    "EightSchools": Case(EightSchools(), eight_schools, eight_schools_truth, 2.0),
    "german credit": Case(LogisticRegression("german"), logistic, logistic_truth, 1.0),
}


# -- methods -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Result:
    """What a run gives: points, weights, log Z^ and what it spent; seconds without ``compile``."""

    x: Tensor
    weights: Tensor | None
    log_z: float | None
    gradients: int
    values: int
    seconds: float
    compile: float = 0.0


def of_draws(run: Callable[[], Draws]) -> Result:
    began = time.process_time()
    draws = run()
    spent = draws.evaluations
    seconds = time.process_time() - began
    weights = None if draws.walker_log_weights is None else draws.weights
    return Result(draws.x, weights, draws.log_z, spent.gradients, spent.values, seconds)


def ours_smc(case: Case, n: int, seed: int) -> Result:
    method = SMC(coordinates=Affine(0.0, case.width))
    return of_draws(lambda: method.run(case.target, n, seed))


def ours_smc_hmc(case: Case, n: int, seed: int) -> Result:
    """The peer's settings: one population, adapted on its way, five moves of about five leapfrogs, scaled by axis."""
    method = SMC(
        move=HMC(8),
        moves=5,
        levels=AdaptiveLevels(0.9),
        metric="diagonal",
        pilot=False,
        coordinates=Affine(0.0, case.width),
    )
    return of_draws(lambda: method.run(case.target, n, seed, repeats=1))


def ours_tempering(case: Case, n: int, seed: int) -> Result:
    method = ParallelTempering(coordinates=Affine(0.0, case.width))
    return of_draws(lambda: method.run(case.target, n, seed))


def ours_dilation(case: Case, n: int, seed: int) -> Result:
    method = DilationLangevin(coordinates=Affine(0.0, case.width))
    return of_draws(lambda: method.run(case.target, n, seed))


def ours_auto(case: Case, n: int, seed: int) -> Result:
    return of_draws(lambda: Auto().run(case.target, n, seed))


def start(case: Case, n: int, seed: int) -> np.ndarray:
    noise = torch.randn(n, case.target.dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (case.width * noise).numpy()


def compiled(function: Callable[..., Any], *example: Any) -> tuple[Callable[..., Any], float]:
    began = time.process_time()
    ready = jax.jit(function).lower(*example).compile()
    return ready, time.process_time() - began


def to_torch(x: Any) -> Tensor:
    return torch.from_numpy(np.array(x))


MOVES = {"HMC": (5, 5, 0.8), "MALA": (10, 1, 0.574)}  # moves a level, leapfrogs a move, acceptance
TARGET_ESS = 0.9


@cache
def peer_smc_program(name: str, kind: str, n: int, target_ess: float) -> tuple[Callable[..., Any], float]:
    case = CASES[name]
    d, width, density = case.target.dim, case.width, case.density
    moves, leapfrogs, acceptance = MOVES[kind]
    constant = d * (math.log(width) + 0.5 * math.log(2 * math.pi))

    def base(x: Any) -> Any:
        return -0.5 * (x @ x) / width**2 - constant

    if kind == "HMC":
        step = partial(blackjax.hmc.build_kernel(), num_integration_steps=leapfrogs)
        first, algorithm = jnp.asarray([d**-0.25]), blackjax.hmc
    else:
        step, first, algorithm = blackjax.mala.build_kernel(), jnp.asarray([0.5 * width**2 * d**-0.33]), blackjax.mala
    kernel = tempered.build_kernel(
        base, lambda x: density(x) - base(x), step, algorithm.init, resampling.systematic, target_ess
    )

    def program(key: Any, particles: Any) -> Any:
        def going(carry: Any) -> Any:
            return carry[1] < 1.0  # temperature at which the last step's moves were made

        def body(carry: Any) -> Any:
            key, _, state, scales, log_z, levels = carry
            key, own = jax.random.split(key)
            settings = {"step_size": scales}
            if kind == "HMC":
                settings["inverse_mass_matrix"] = particles_stds(state.particles)[None] ** 2
            new, info = kernel(own, state, moves, settings)
            rates = info.update_info.acceptance_rate.mean(-1)
            scales = update_scale_from_acceptance_rate(scales, rates, acceptance)
            return key, state.tempering_param, new, scales, log_z + info.log_likelihood_increment, levels + 1

        state = tempered.init(particles)
        state = state._replace(tempering_param=jnp.asarray(0.0))
        scales = jnp.broadcast_to(first, (n,))
        carry = key, jnp.asarray(-1.0), state, scales, jnp.asarray(0.0), jnp.asarray(0)
        _, _, state, _, log_z, levels = jax.lax.while_loop(going, body, carry)
        return state.particles, state.weights, log_z, levels

    return compiled(program, jax.random.key(0), jnp.asarray(start(case, n, 0)))


def peer_smc(case: Case, n: int, seed: int, *, name: str, kind: str, target_ess: float = TARGET_ESS) -> Result:
    program, spent = peer_smc_program(name, kind, n, target_ess)
    moves, leapfrogs, _ = MOVES[kind]
    began = time.process_time()
    x, w, log_z, levels = jax.block_until_ready(program(jax.random.key(seed), jnp.asarray(start(case, n, seed))))
    seconds = time.process_time() - began
    gradients, values = int(levels) * n * (1 + moves * leapfrogs), 2 * int(levels) * n
    return Result(to_torch(x), to_torch(w), float(log_z), gradients, values, seconds, spent)


WARMUP = 300


@cache
def peer_nuts_program(name: str) -> tuple[Callable[..., Any], float]:
    case = CASES[name]
    adaptation = blackjax.window_adaptation(
        blackjax.nuts, case.density, adaptation_info_fn=lambda state, info, adapt: info.num_integration_steps
    )
    kernel = blackjax.nuts.build_kernel()

    def chain(key: Any, x: Any, keep: Any) -> Any:
        warm, own = jax.random.split(key)
        (state, settings), steps = adaptation.run(warm, x, WARMUP)

        def move(i: Any, carry: Any) -> Any:
            state, kept, count = carry
            state, info = kernel(jax.random.fold_in(own, i), state, case.density, **settings)
            return state, kept.at[i].set(state.position), count + info.num_integration_steps

        room = jnp.zeros((max(BUDGETS) // case.chains, case.target.dim))
        _, kept, count = jax.lax.fori_loop(0, keep, move, (state, room, steps.sum()))
        return kept, count

    keys = jax.random.split(jax.random.key(0), case.chains)
    many = jax.vmap(chain, in_axes=(0, 0, None))
    return compiled(many, keys, jnp.asarray(start(case, case.chains, 0)), jnp.asarray(1))


def peer_nuts(case: Case, n: int, seed: int, *, name: str) -> Result:
    program, spent = peer_nuts_program(name)
    keys, keep = jax.random.split(jax.random.key(seed), case.chains), n // case.chains
    began = time.process_time()
    x0 = jnp.asarray(start(case, case.chains, seed))
    kept, steps = jax.block_until_ready(program(keys, x0, jnp.asarray(keep)))
    seconds = time.process_time() - began
    x = to_torch(kept)[:, :keep].reshape(-1, case.target.dim)
    return Result(x, None, None, int(steps.sum()) + case.chains, 0, seconds, spent)


METHODS: dict[str, Callable[..., Result]] = {
    "undrift SMC": lambda name, n, seed: ours_smc(CASES[name], n, seed),
    "blackjax SMC, MALA": lambda name, n, seed: peer_smc(CASES[name], n, seed, name=name, kind="MALA"),
    "undrift SMC, HMC": lambda name, n, seed: ours_smc_hmc(CASES[name], n, seed),
    "blackjax SMC, HMC": lambda name, n, seed: peer_smc(CASES[name], n, seed, name=name, kind="HMC"),
    "undrift tempering": lambda name, n, seed: ours_tempering(CASES[name], n, seed),
    "blackjax NUTS": lambda name, n, seed: peer_nuts(CASES[name], n, seed, name=name),
    "undrift auto": lambda name, n, seed: ours_auto(CASES[name], n, seed),
    "undrift dilation": lambda name, n, seed: ours_dilation(CASES[name], n, seed),
}


def run(name: str, method: str, n: int, seed: int) -> dict[str, Any]:
    case = CASES[name]
    row: dict[str, Any] = {"kind": "run", "target": name, "method": method, "n": n, "seed": seed}
    if method == "exact":
        generator = torch.Generator().manual_seed(1000 + seed)
        values = case.truth.draw(n, generator)
        return row | case.errors(values, None, values if case.modes else None)
    wall = time.perf_counter()
    try:
        result = METHODS[method](name, n, seed)
    except FloatingPointError as error:
        return row | {"failed": str(error)}
    wall = time.perf_counter() - wall
    known = case.target.log_z
    return row | {
        **case.errors(case.values(result.x), result.weights, result.x),
        "log_z": None if result.log_z is None else abs(result.log_z - known),
        "gradients": result.gradients,
        "values": result.values,
        "seconds": result.seconds,
        "wall": wall,
        "compile": result.compile,
    }


# -- nanoseconds a point -----------------------------------------------------------------------------------------------


def per_point(function: Callable[[], Any], n: int, least: float = 0.05) -> float:
    """CPU nanoseconds a point, of as many calls as take ``least`` seconds."""
    calls, spent = 0, 0.0
    began = time.process_time()
    while spent < least:
        function()
        calls, spent = calls + 1, time.process_time() - began
    return 1e9 * spent / (calls * n)


def costs(name: str, n: int, rounds: int = 5) -> dict[str, Any]:
    """Value and gradient of n points: ours, the peer's, and ours compiled; taking turns, medians of the rounds."""
    case = CASES[name]
    torch._dynamo.reset()
    x = case.width * torch.randn(n, case.target.dim, generator=torch.Generator().manual_seed(2)).double()
    placed = jnp.asarray(x.numpy())
    peer = jax.jit(jax.vmap(jax.value_and_grad(case.density)))
    bare = case.target.log_prob_and_score
    began = time.process_time()
    fast = compiled_target(case.target).log_prob_and_score
    fast(x)
    compile_seconds = time.process_time() - began
    ways: dict[str, Callable[[], Any]] = {
        "undrift": lambda: bare(x),
        "blackjax": lambda: jax.block_until_ready(peer(placed)),
        "compiled": lambda: fast(x),
    }
    for way in ways.values():
        way()
    found: dict[str, list[float]] = {key: [] for key in ways}
    for _ in range(rounds):
        for key, way in ways.items():
            found[key].append(per_point(way, n))
    row = {"kind": "cost", "target": name, "n": n, "compile": compile_seconds}
    return row | {key: statistics.median(v) for key, v in found.items()}


def compiled_target(target: Any) -> Target:
    """The target with value and gradient as one compiled function, by ``torch.func`` where no gradient is given."""
    known = target._gradient(torch.zeros(2, target.dim).double()) is not None
    function = target._gradient if known else _by_func(target)
    fast = torch.compile(function, dynamic=False)
    fresh = dataclasses.replace(target)
    object.__setattr__(fresh, "_gradient", lambda x: fast(x))
    return fresh


def _by_func(target: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        def total(x: Tensor) -> tuple[Tensor, Tensor]:
            value = target._log_density(x)
            return value.sum(), value

        score, value = torch.func.grad(total, has_aux=True)(x)
        return value, score

    return both


def whole(name: str, n: int, rounds: int = 3) -> dict[str, Any]:
    """Nanoseconds a gradient in sequential Monte Carlo by HMC, one population of n: ours, the peer's, ours compiled."""
    case = CASES[name]
    torch._dynamo.reset()
    fast = dataclasses.replace(case, target=compiled_target(case.target))
    ways: dict[str, Callable[[int], Result]] = {
        "undrift": lambda seed: ours_smc_hmc(case, n, seed),
        "blackjax": lambda seed: peer_smc(case, n, seed, name=name, kind="HMC"),
        "compiled": lambda seed: ours_smc_hmc(fast, n, seed),
    }
    for way in ways.values():
        way(99)
    found: dict[str, list[float]] = {key: [] for key in ways}
    for seed in range(rounds):
        for key, way in ways.items():
            result = way(seed)
            found[key].append(1e9 * result.seconds / result.gradients)
    return {"kind": "whole", "target": name, "n": n} | {key: statistics.median(v) for key, v in found.items()}


# -- tables ------------------------------------------------------------------------------------------------------------


def middle(rows: list[dict[str, Any]], key: str, form: str, spread: bool = False) -> str:
    """Median of a column, with its range."""
    values = [r[key] for r in rows if r.get(key) is not None]
    if not values:
        return "–"
    text = format(statistics.median(values), form)
    return f"{text} ({min(values):{form}}–{max(values):{form}})" if spread and len(values) > 1 else text


def show(rows: list[dict[str, Any]]) -> None:
    head = ["method", "n", "gradients", "CPU s", "ns / gradient", "error", "work", "|log Z^ - log Z|", "compile s"]
    for name, case in CASES.items():
        own = [r for r in rows if r["kind"] == "run" and r["target"] == name]
        if not own:
            continue
        error = "TV" if case.modes else "moments"
        print(f"\n**{name}** (s = {case.width:g}; NUTS: {case.chains} chains; error: {error})\n")
        print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
        for method in ["exact", *METHODS]:
            for n in BUDGETS:
                some = [r for r in own if (r["method"], r["n"]) == (method, n)]
                if not some:
                    continue
                for r in some:
                    if "failed" not in r:
                        r["error"] = r["tv"] if case.modes else max(r["mean"], r["sd"])
                    if "seconds" in r:
                        r["ns"] = 1e9 * r["seconds"] / r["gradients"]
                        r["work"] = r["gradients"] * r["error"] ** 2
                failed = sum("failed" in r for r in some)
                label = method + (f" ({failed} of {len(some)} gave up)" if failed else "")
                cells = [label, str(n), middle(some, "gradients", ".3g"), middle(some, "seconds", ".3g")]
                cells += [middle(some, "ns", ".3g"), middle(some, "error", ".2g", True), middle(some, "work", ".2g")]
                cells += [middle(some, "log_z", ".2g", True), middle(some, "compile", ".2g")]
                print("| " + " | ".join(cells) + " |")
    head = ["target", "points", "undrift", "blackjax", "undrift, compiled"]
    for kind, title in (("cost", "value and gradient alone"), ("whole", "within SMC, HMC")):
        own = [r for r in rows if r["kind"] == kind]
        if own:
            print(f"\n**CPU nanoseconds a point, {title}**\n")
            print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
        for r in own:
            print(f"| {r['target']} | {r['n']} | " + " | ".join(f"{r[k]:.3g}" for k in head[2:4]), end="")
            print(f" | {r['compiled']:.3g} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="JSON lines to read and extend")
    parser.add_argument("--only", nargs="*", help="names of targets, or parts of them")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--limit", type=float, default=6.0, help="CPU seconds over which a larger budget is not run")
    parser.add_argument("--cost", action="store_true", help="nanoseconds a point instead")
    parser.add_argument("--print", action="store_true", help="only print")
    args = parser.parse_args()
    args.out.parent.mkdir(exist_ok=True)
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")

    names = [k for k in CASES if not args.only or any(part.lower() in k.lower() for part in args.only)]
    if args.cost:
        for name in [k for k in names if k in COSTED]:
            for n in (1024, 8192):
                for kind, measure in (("cost", costs), ("whole", whole)):
                    if not any((r["kind"], r["target"], r["n"]) == (kind, name, n) for r in rows):
                        keep(measure(name, n))
    elif not args.print:
        for name in names:
            CASES[name].check()
            measure_errors(name, args.seeds, args.limit, rows, keep)
    show(rows)


def measure_errors(
    name: str, seeds: list[int], limit: float, rows: list[dict[str, Any]], keep: Callable[[dict[str, Any]], None]
) -> None:
    done = {(r["method"], r["n"], r["seed"]): r for r in rows if r["kind"] == "run" and r["target"] == name}
    for seed in seeds:
        for n, fewer in zip(BUDGETS, (None, *BUDGETS), strict=False):
            for method in ["exact", *METHODS]:
                if (method, n, seed) in done or (method == "undrift dilation" and not CASES[name].modes):
                    continue
                before = done.get((method, fewer, seed), {}) if fewer else {}
                if fewer and method != "exact" and not before.get("seconds", math.inf) * n / fewer < limit:
                    continue
                row = run(name, method, n, seed)
                done[method, n, seed] = row
                keep(row)


if __name__ == "__main__":
    main()

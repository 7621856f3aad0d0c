"""Weights: exact moments on Gaussian targets, and E[w] = Z for networks that know nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests.reference.quadratic import Quadratic, walk_along, weights_of
from torch import Tensor

from undrift.denoise import GaussianDenoiser
from undrift.density.controlled.control import Control, Exact, Field, Informed, Plain, Potential, View
from undrift.density.controlled.diffusion import ControlledDiffusion, Paths, Scheme, Tables
from undrift.density.controlled.grid import EqualAngles, EqualTimes, PowerTimes
from undrift.density.targets import Gaussian
from undrift.measure.evidence import effective_sample_size
from undrift.process import (
    CLD,
    MALDA,
    PSLD,
    VE,
    VP,
    BrownianBridge,
    ConstantClock,
    LearnedProcess,
    LinearClock,
    LinearProcess,
    PowerClock,
    SubVP,
)

LOG_Z = 0.7
CLOCK = LinearClock(0.1, 10.0)


@dataclass(frozen=True, eq=False)
class Constant(Control):
    """The same control everywhere; a tensor with a graph if asked."""

    value: Any = 0.0

    def field(self, inputs: int, dim: int) -> Field:
        return _Constant(self.value)


class _Constant(Field):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, view: View, times: tuple[Tensor, ...]) -> Tensor:
        return self.value + torch.zeros_like(view.y)


def gaussian(mean: float, std: float) -> Gaussian:
    return Gaussian(dim=1, loc=mean, scale=std, log_z=LOG_Z)


def exact_control(target: Gaussian) -> Exact:
    return Exact(GaussianDenoiser([target.loc], target.scale**2))


def moments(process, target: Gaussian, steps: int, control: Control | None = None, **settings: Any) -> Quadratic:
    """Of log w - log Z."""
    scheme = Scheme(process, EqualTimes(), steps, control or exact_control(target), **settings)
    found = weights_of(ControlledDiffusion(scheme, 1), target)
    return Quadratic(found.c - LOG_Z, found.b, found.h)


# -- path integral samplers --------------------------------------------------------------------------------------------

PIS = BrownianBridge(scale=math.sqrt(0.2), horizon=5.0)


@pytest.mark.parametrize("steps", [1, 2, 10, 100])
def test_the_best_control_of_a_shifted_reference_leaves_no_variance(steps):
    """N(m, 1) seen from N(0, 1): grad log g_0 = m everywhere, and every path has weight Z."""
    found = moments(PIS, gaussian(1.7, 1.0), steps, Constant(1.7))
    assert float(found.var) < 1e-24
    assert float(found.mean) == pytest.approx(0.0, abs=1e-12)


def test_losses_of_a_constant_control_and_their_gradients():
    """u = theta: KL = T (theta - theta*)^2 / 2, LV twice that; on paths as given the gradient is twice KL's."""
    best = 1.7 / (math.sqrt(0.2) * 5.0)
    assert best == pytest.approx(0.7602631, abs=5e-8)
    target, steps = gaussian(1.7, 1.0), 7
    theta = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    learner = ControlledDiffusion(Scheme(PIS, EqualTimes(), steps, Constant(theta / math.sqrt(0.2))), 1)
    driver = ControlledDiffusion(Scheme(PIS, EqualTimes(), steps, Constant(0.1 / math.sqrt(0.2))), 1)

    def along(noise: Tensor, walker: ControlledDiffusion) -> Tensor:
        shaped = noise.reshape(steps + 1, 1, -1, 1)
        paths = walk_along(walker, target, shaped)._replace(control=None)
        return learner.log_weights(learner.tables(noise), paths)

    pathwise = Quadratic.of(lambda noise: along(noise, learner), steps + 1, graph=True)
    kl = LOG_Z - pathwise.mean
    assert float(kl.detach()) == pytest.approx(1.0898684, abs=5e-8)
    assert float(kl.detach()) == pytest.approx(2.5 * (0.1 - best) ** 2, rel=1e-12)
    given = Quadratic.of(lambda noise: along(noise, driver), steps + 1, graph=True)
    assert float(given.var.detach()) == pytest.approx(2.1797369, abs=5e-8)
    (grad_kl,) = torch.autograd.grad(kl, theta, retain_graph=True)
    (grad_lv,) = torch.autograd.grad(given.var, theta)
    assert float(grad_lv) == pytest.approx(-6.6026311, abs=5e-8)
    assert float(grad_lv) == pytest.approx(2 * float(grad_kl), rel=1e-12)


@pytest.mark.parametrize(
    ("steps", "elbo", "var", "ess"),
    [
        (25, -0.02306, 0.04852, 0.95898),
        (50, -0.01139, 0.02336, 0.97854),
        (100, -0.00566, 0.01146, 0.98902),
        (200, -0.002821, 0.005678, 0.99444),
    ],
)
def test_the_control_of_continuous_time_on_a_narrow_target(steps, elbo, var, ess):
    found = moments(PIS, gaussian(1.0, 0.5), steps)
    assert float(found.mean) == pytest.approx(elbo, rel=2e-3)
    assert float(found.var) == pytest.approx(var, rel=2e-3)
    assert found.ess == pytest.approx(ess, abs=2e-5)
    assert found.log_z == pytest.approx(0.0, abs=1e-11)


# -- denoising diffusion samplers --------------------------------------------------------------------------------------

DDS = VP(clock=ConstantClock(10.0))  # signal e^-5 at the end


@pytest.mark.parametrize("steps", [1, 5, 40])
def test_only_the_prior_is_wrong_for_a_shifted_target(steps):
    """The gain of the posterior mean is exact at every step length: what is left is N(e^-5, 1) against N(0, 1)."""
    found = moments(DDS, gaussian(1.0, 1.0), steps)
    assert float(found.var) == pytest.approx(math.exp(-10), rel=1e-8)
    assert found.log_z == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("steps", "var", "ess"),
    [
        (25, 0.7289, 0.79976),
        (50, 0.2522, 0.87787),
        (100, 0.1015, 0.93070),
        (200, 0.04531, 0.96272),
    ],
)
def test_the_score_gain_on_a_narrow_target(steps, var, ess):
    found = moments(DDS, gaussian(1.0, 0.5), steps, gain="score")
    assert float(found.var) == pytest.approx(var, rel=1e-3)
    assert found.ess == pytest.approx(ess, abs=1e-5)
    assert found.log_z == pytest.approx(0.0, abs=1e-11)
    assert float(moments(DDS, gaussian(1.0, 0.5), steps).var) < float(found.var)


# -- what the ratio of kernels is for ----------------------------------------------------------------------------------


def girsanov(steps: int, std: float) -> Quadratic:
    """Weights of continuous time summed along Euler's chain, as DIS has it, under the exact control of N(0 or 1, std).

    log w = log gamma(x) - log nu(z_0) - sum [|u|^2 h / 2 + u sqrt(h) xi] + int beta / 2 dt,  u = sqrt(beta) score.
    """
    target = gaussian(0.0 if std == 1 else 1.0, std)
    scheme = Scheme(VP(clock=CLOCK), EqualTimes(), steps, exact_control(target), integrator="euler")
    diffusion = ControlledDiffusion(scheme, 1)
    times = scheme.grid.times(scheme.process, steps)
    h, beta = -times.diff(), CLOCK.beta(times[:-1])
    mean = scheme.process.kernel(times[:-1])[0][:, 0]
    var = mean.square() * std**2 + 1 - mean.square()

    def log_w(noise: Tensor) -> Tensor:
        paths = walk_along(diffusion, target, noise.reshape(steps + 1, 1, -1, 1))
        z = paths.z[:-1, 0, :, 0]
        u = -beta.sqrt().unsqueeze(-1) * (z - (mean * target.loc).unsqueeze(-1)) / var.unsqueeze(-1)
        cost = (0.5 * u.square() * h.unsqueeze(-1) + u * h.sqrt().unsqueeze(-1) * noise[1:]).sum(0)
        start = -0.5 * z[0].square() - 0.5 * math.log(2 * math.pi)
        return paths.log_target - LOG_Z - start - cost + 0.5 * 5.05

    return Quadratic.of(log_w, steps + 1)


@pytest.mark.parametrize(
    ("steps", "elbo", "var", "bias", "ess", "kernel_var"),
    [
        (50, -0.1388, 0.3803, 0.03306, 0.7516, 1.454e-3),
        (100, -0.0681, 0.1788, 0.01692, 0.8569, 3.557e-4),
        (200, -0.03373, 0.08674, 0.008564, 0.92261, 8.797e-5),
    ],
)
def test_sums_of_continuous_time_are_biased_and_noisy_where_the_ratio_is_not(steps, elbo, var, bias, ess, kernel_var):
    """A perfect control on N(0, 1): more paths and more training leave a bias of .0086 a dimension at 200 steps."""
    summed = girsanov(steps, 1.0)
    assert float(summed.mean) == pytest.approx(elbo, rel=2e-3)
    assert float(summed.var) == pytest.approx(var, rel=1e-3)
    assert summed.log_z == pytest.approx(bias, rel=1e-3)
    assert summed.ess == pytest.approx(ess, abs=1e-4)
    times = EqualTimes().times(VP(clock=CLOCK), steps)
    a = 0.5 * CLOCK.beta(times[:-1])
    assert summed.log_z == pytest.approx(2.525 - float(torch.log1p(-a * times.diff()).sum()), rel=1e-9)
    ratio = moments(VP(clock=CLOCK), gaussian(0.0, 1.0), steps, integrator="euler")
    assert ratio.log_z == pytest.approx(0.0, abs=1e-12)
    assert float(ratio.var) == pytest.approx(kernel_var, rel=1e-3)
    exact = moments(VP(clock=CLOCK), gaussian(0.0, 1.0), steps)
    assert float(exact.var) < 1e-20


@pytest.mark.parametrize(("steps", "var"), [(50, 0.04058), (100, 0.02203), (200, 0.01390)])
def test_the_same_on_a_narrow_target(steps, var):
    ratio = moments(VP(clock=CLOCK), gaussian(1.0, 0.5), steps, integrator="euler")
    assert float(ratio.var) == pytest.approx(var, rel=1e-3)
    assert ratio.log_z == pytest.approx(0.0, abs=1e-11)
    if steps == 200:
        summed = girsanov(steps, 0.5)
        assert float(summed.mean) == pytest.approx(-0.05212, rel=1e-3)
        assert float(summed.var) == pytest.approx(0.1244, rel=1e-3)
        assert summed.log_z == pytest.approx(0.008564, rel=1e-3)
        assert summed.ess == pytest.approx(0.8908, abs=1e-4)


@pytest.mark.parametrize("process", [SubVP(clock=CLOCK), CLD(), PSLD()], ids=lambda p: type(p).__name__)
def test_any_process_is_unbiased_and_sharpens_with_its_steps(process):
    found = [moments(process, gaussian(0.6, 0.7), steps) for steps in (10, 20, 40)]
    for each in found:
        assert each.log_z == pytest.approx(0.0, abs=1e-10)
        assert float(each.mean) < 0
    assert float(found[0].var) > 1.5 * float(found[1].var) > 2 * float(found[2].var)


# -- controlled Monte Carlo diffusions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [8, 25])
def test_the_weight_of_a_moving_gaussian(steps):
    """pi_t = N(t m, 1) under its velocity m: log w - log Z = -(h/4)(y_K^2 - y_0^2) for y centred, path by path."""
    m = 1.3
    target = gaussian(m, 1.0)
    scheme = Scheme(VP(clock=ConstantClock(2.0)), EqualTimes(), steps, Constant(m), annealed=True)
    diffusion = ControlledDiffusion(scheme, 1)
    noise = torch.randn(steps + 1, 1, 500, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    paths = walk_along(diffusion, target, noise)
    log_w = diffusion.log_weights(diffusion.tables(noise), paths) - LOG_Z
    y = paths.z[[0, -1], 0, :, 0] - torch.tensor([[0.0], [m]], dtype=torch.float64)
    expected = -(y[1].square() - y[0].square()) / (4 * steps)
    torch.testing.assert_close(log_w, expected, rtol=0.0, atol=1e-12)
    assert weights_of(diffusion, target).log_z == pytest.approx(LOG_Z, abs=1e-11)


# -- networks that know nothing ----------------------------------------------------------------------------------------

TARGET = Gaussian(dim=2, loc=0.4, scale=0.85, condition=1.3, log_z=LOG_Z)
SMALL = {"width": 16, "depth": 1}
LEARNED = LearnedProcess.random(2, seed=1, clock=CLOCK, learn=("Q", "D", "S", "start", "clock"))

REVERSALS: dict[str, LinearProcess] = {
    "VP": VP(clock=CLOCK),
    "SubVP": SubVP(clock=CLOCK),
    "VE": VE(clock=PowerClock(sigma_max=6.0, exponent=2.0, horizon=1.0)),
    "BrownianBridge": BrownianBridge(),
    "CLD": CLD(clock=CLOCK),
    "PSLD": PSLD(clock=CLOCK),
    "MALDA": MALDA(clock=CLOCK),
    "LearnedProcess": LEARNED,
}
CONTROLS: dict[str, dict[str, Any]] = {
    "plain": {"control": Plain(**SMALL)},
    "informed": {"control": Informed(**SMALL)},
    "informed, each coordinate": {"control": Informed(**SMALL, gate="coordinate", interpolate=False, clip=3.0)},
    "potential": {"control": Potential(**SMALL)},
    "noise": {"control": Informed(**SMALL), "learn": ["noise"]},
    "bridge": {"control": Informed(**SMALL), "backward": Plain(**SMALL)},
    "bridge, noise": {"control": Plain(**SMALL), "backward": Plain(**SMALL), "learn": ["noise"]},
}
GRIDS = {"VE": EqualAngles()}


def cases() -> dict[str, Scheme]:
    found = {}
    for name, process in REVERSALS.items():
        for label, settings in CONTROLS.items():
            if name in ("SubVP", "MALDA") and label not in ("informed", "bridge", "bridge, noise"):
                continue
            found[f"{name}: {label}"] = Scheme(process, GRIDS.get(name, EqualTimes()), 6, **settings)
        if process.channels == 1:
            found[f"{name}: score"] = Scheme(process, EqualAngles(), 6, Informed(**SMALL), gain="score")
        if name in ("VP", "SubVP", "VE"):
            grid, process = PowerTimes(1.5), VE(clock=PowerClock(sigma_max=1.5)) if name == "VE" else process
            found[f"{name}: euler"] = Scheme(process, grid, 12, Informed(**SMALL), integrator="euler")
            found[f"{name}: euler bridge"] = Scheme(
                process, grid, 24, Plain(**SMALL), Plain(**SMALL), integrator="euler", learn=["noise"]
            )
    found["BrownianBridge: elsewhere"] = Scheme(BrownianBridge(0.7, 1.6), EqualTimes(), 6, Informed(**SMALL))
    for name in ("VP", "CLD", "PSLD"):
        process = {"VP": VP(clock=ConstantClock(3.0)), "CLD": CLD(mass=0.6), "PSLD": PSLD(clock=ConstantClock(4.0))}[
            name
        ]
        found[f"annealed {name}"] = Scheme(process, EqualTimes(), 8, Plain(**SMALL), annealed=True)
        for learn in (["noise"], ["prior"], ["levels"], ["noise", "prior", "levels"]):
            label = f"annealed {name}: {', '.join(learn)}"
            found[label] = Scheme(process, EqualTimes(), 8, Plain(**SMALL), annealed=True, learn=learn)
    learned = LearnedProcess.like(CLD(mass=0.6), learn=("Q", "D", "clock"))
    found["annealed LearnedProcess"] = Scheme(learned, EqualTimes(), 8, Plain(**SMALL), annealed=True, learn=["noise"])
    return found


CASES = cases()


def untrained(name: str, scale: float = 0.1) -> ControlledDiffusion:
    """With every parameter moved, the last layers too: a silent network would test nothing."""
    diffusion = ControlledDiffusion(CASES[name], 2, seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for part in diffusion.parameters():
            part.add_(scale * torch.randn(part.shape, generator=generator, dtype=part.dtype))
    return diffusion


def drawn(diffusion: ControlledDiffusion, n: int, seed: int = 1, **settings: Any) -> tuple[Tables, Paths]:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        tables = diffusion.tables(torch.zeros((), dtype=torch.float64))
        start = diffusion.start(tables, n, generator)
        return tables, diffusion.walk(TARGET, tables, start, generator, **settings)


def assert_mean_is_one(ratio: Tensor) -> None:
    """Within 4 standard errors, which are small enough for a bias of 5 % to be seen."""
    error = float(ratio.std()) / math.sqrt(len(ratio))
    assert 4 * error < 0.05, error
    assert abs(float(ratio.mean()) - 1) < 4 * error, (float(ratio.mean()), error)


@pytest.mark.parametrize("name", CASES)
def test_the_mean_weight_is_z_whatever_the_networks_say(name):
    """E_F[w] = Z and E_B[1 / w] = 1 / Z; ELBO <= log Z <= EUBO; ESS in [1 / n, 1]."""
    n, diffusion = 10_000, untrained(name)
    with torch.no_grad():
        tables, paths = drawn(diffusion, n)
        assert float(paths.control.abs().mean()) > 0.03
        log_w = diffusion.log_weights(tables, paths) - LOG_Z
        assert_mean_is_one(log_w.exp())
        assert 1 / n <= float(effective_sample_size(log_w)) / n <= 1
        assert float(log_w.mean()) < 0
        back = diffusion.walk_back(TARGET, tables, TARGET.sample(n, 2), torch.Generator().manual_seed(3))
        log_back = diffusion.log_weights(tables, back) - LOG_Z
        assert float(log_back.mean()) > 0
        assert_mean_is_one((-log_back).exp())


def asked(diffusion: ControlledDiffusion, tables: Tables, paths: Paths) -> Paths:
    """The same states as a path that nothing else is known of: the target is asked again, controls are not kept."""
    answers = [diffusion.ask(TARGET, tables, k, z) for k, z in enumerate(paths.z)]
    parts = [None, None] if answers[0] is None else [torch.stack(part) for part in zip(*answers, strict=True)]
    return Paths(paths.z, parts[0], parts[1], TARGET.log_prob(paths.x))


ALONG = [
    "VP: noise",
    "SubVP: bridge",
    "BrownianBridge: bridge, noise",
    "CLD: potential",
    "annealed PSLD: noise, prior, levels",
]


@pytest.mark.parametrize("name", ALONG)
def test_a_path_weighs_the_same_whoever_walked_it(name):
    """Its weight is a function of its states: not of the direction it was walked in, nor of what was kept."""
    diffusion = untrained(name)
    with torch.no_grad():
        tables, there = drawn(diffusion, 50)
        back = diffusion.walk_back(TARGET, tables, TARGET.sample(50, 2), torch.Generator().manual_seed(3))
        for paths in (there, back):
            log_w = diffusion.log_weights(tables, paths)
            for chunk in (1, 4):
                torch.testing.assert_close(diffusion.log_weights(tables, paths, chunk), log_w, rtol=1e-5, atol=1e-5)
            again = diffusion.log_weights(tables, asked(diffusion, tables, paths))
            torch.testing.assert_close(again, log_w, rtol=1e-5, atol=1e-5)  # networks compute in float32
            few = torch.tensor([7, 3])
            part = diffusion.log_weights(tables, paths.take(few))
            torch.testing.assert_close(part, log_w[few], rtol=1e-5, atol=1e-5)
    kept = diffusion.log_weights(tables, there)  # with a graph, from which controls are computed anew
    assert kept.requires_grad
    torch.testing.assert_close(kept.detach(), diffusion.log_weights(tables, there).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["VP: informed", "BrownianBridge: noise", "CLD: bridge", "annealed CLD: noise"])
def test_explored_paths_have_the_weights_of_their_density(name):
    """With a factor s > 1 on the noise, w p_F / p_explored still has mean Z: p_F is the diffusion's own."""
    n, spread, diffusion = 20_000, 1.03, untrained(name)
    tables, paths = drawn(diffusion, n, spread=spread)
    with torch.no_grad():
        forth = diffusion.log_kernels(tables, slice(0, tables.chain.steps), paths, paths.control)[0]
        z = paths.z if tables.noise is None else paths.z / tables.noise
        a = paths.control if tables.noise is None else paths.control * tables.noise
        noise = tables.chain.forward.residual(slice(0, tables.chain.steps), z[:-1], a, z[1:])
        size = noise[0].numel() // n
        explored = forth + (0.5 - 0.5 / spread**2) * noise.square().sum((-3, -1)) - size * math.log(spread)
        log_w = diffusion.log_weights(tables, paths) - LOG_Z + (forth - explored).sum(0)
    assert_mean_is_one(log_w.exp())
    assert float(noise.var()) == pytest.approx(spread**2, rel=0.02)


@pytest.mark.parametrize(
    "name", ["VP: informed", "SubVP: euler", "BrownianBridge: bridge, noise", "CLD: noise", "annealed PSLD"]
)
def test_single_precision(name):
    """Walks and weighs in float32; the same states weighed in float64 agree."""
    n, diffusion = 2000, untrained(name)
    with torch.no_grad():
        narrow = diffusion.tables(torch.zeros((), dtype=torch.float32))
        wide = diffusion.tables(torch.zeros((), dtype=torch.float64))
        generator = torch.Generator().manual_seed(1)
        start = diffusion.start(narrow, n, generator)
        for paths in (
            diffusion.walk(TARGET, narrow, start, generator),
            diffusion.walk_back(TARGET, narrow, TARGET.sample(n, 2).float(), generator),
        ):
            assert paths.z.dtype == torch.float32
            log_w = diffusion.log_weights(narrow, paths)
            assert log_w.dtype == torch.float64
            exact = Paths(*(None if part is None else part.double() for part in paths))
            same = diffusion.log_weights(wide, asked(diffusion, wide, exact))
            torch.testing.assert_close(log_w, same, rtol=0.0, atol=2e-3)


@pytest.mark.parametrize("name", ["VP: potential", "BrownianBridge: informed", "CLD: informed", "annealed CLD"])
def test_the_gradient_through_a_walk_is_that_of_differences(name):
    """Of -E[log w] on fixed noise, along a random direction in all parameters: the pathwise gradient of KL."""
    diffusion = untrained(name).double()
    direction = [
        torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).double()
        for i, p in enumerate(diffusion.parameters())
    ]

    def kl(graph: bool) -> Tensor:
        generator = torch.Generator().manual_seed(4)
        tables = diffusion.tables(torch.zeros((), dtype=torch.float64))
        start = diffusion.start(tables, 40, generator)
        if graph:
            start = start.detach().requires_grad_()
        paths = diffusion.walk(TARGET, tables, start, generator, graph=graph)
        return -diffusion.log_weights(tables, paths).mean()

    loss = kl(True)
    slopes = torch.autograd.grad(loss, list(diffusion.parameters()), allow_unused=True)
    slope = sum(float((g * v).sum()) for g, v in zip(slopes, direction, strict=True) if g is not None)
    found, eps = [], 1e-5
    with torch.no_grad():
        for sign in (1.0, -1.0):
            for p, v in zip(diffusion.parameters(), direction, strict=True):
                p.add_(sign * eps * v)
            found.append(float(kl(False)))
            for p, v in zip(diffusion.parameters(), direction, strict=True):
                p.sub_(sign * eps * v)
    assert slope == pytest.approx((found[0] - found[1]) / (2 * eps), rel=1e-4)


@pytest.mark.parametrize("name", ["LearnedProcess: informed", "annealed LearnedProcess"])
def test_weights_are_differentiable_in_a_learned_process(name):
    diffusion = untrained(name)
    tables = diffusion.tables(torch.zeros((), dtype=torch.float64))
    with torch.no_grad():
        start = diffusion.start(tables, 20, torch.Generator().manual_seed(1))
        paths = diffusion.walk(TARGET, tables, start, torch.Generator().manual_seed(2))
    diffusion.log_weights(tables, paths).square().mean().backward()
    for key, part in diffusion.process.named_parameters():
        assert part.grad is not None, key
        assert bool(torch.isfinite(part.grad).all()), key
        assert float(part.grad.abs().max()) > 0, key

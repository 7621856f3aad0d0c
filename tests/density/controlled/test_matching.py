"""Matching: the targets of the regression, their variance, what training with them reaches, and interruptions."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from undrift.config import build, describe
from undrift.denoise import MixtureDenoiser
from undrift.density.controlled.chain import reversal
from undrift.density.controlled.control import Control, Exact, Informed, Plain, Potential
from undrift.density.controlled.diffusion import ControlledDiffusion, Scheme
from undrift.density.controlled.grid import EqualAngles
from undrift.density.controlled.matching import AdjointMatching, ScoreMatching
from undrift.density.controlled.methods import Controlled
from undrift.density.controlled.objective import LogVariance, Objective, Runner, Work
from undrift.density.controlled.regression import Curvature, Times, control_at, noised, stein
from undrift.density.controlled.stages import Stages
from undrift.density.controlled.train import Training
from undrift.density.controlled.train import train as run
from undrift.density.schedule import Resampling
from undrift.density.target import Target
from undrift.density.targets import Gaussian
from undrift.process import CLD, VP, BrownianBridge, CosineClock, LearnedProcess
from undrift.process.linear import LinearProcess

WEIGHTS, MEANS, VARIANCES = [0.3, 0.7], [[-0.9, 0.4], [0.8, -0.5]], [0.15, 0.3]
PROCESSES: list[LinearProcess] = [VP(clock=CosineClock()), CLD(), BrownianBridge()]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def f64(values: object) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def mixture() -> tuple[Target, MixtureDenoiser]:
    means, weights, variances = f64(MEANS), f64(WEIGHTS), f64(VARIANCES)
    law = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(weights),
        torch.distributions.Independent(
            torch.distributions.Normal(means, variances.sqrt().unsqueeze(-1).expand_as(means)), 1
        ),
    )
    return Target.of(law), MixtureDenoiser(weights, means, variances)


def scheme(process: LinearProcess, control: Control, steps: int = 20) -> Scheme:
    return Scheme(process, EqualAngles(), steps, control)


def exact_control(mean: float, deviation: float) -> ControlledDiffusion:
    return ControlledDiffusion(scheme(VP(), Exact(MixtureDenoiser(f64([1.0]), f64([[mean]]), deviation**2))), 1)


# -- the targets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean", "deviation", "unknown", "x", "value"),
    [(2.75, 0.25, 0.5, 0.3, 3.3956115732), (1.0, 2.0, 0.9, -1.2, -0.0336709492)],
)
def test_novel_score_identity(mean: float, deviation: float, unknown: float, x: float, value: float) -> None:
    r"""The score of g_t is sqrt(1 - V) E[grad log g_0 | x_t]: the Gaussian posterior by hand, and the exact control."""
    root = math.sqrt(1 - unknown)
    d = exact_control(mean, deviation)
    chain = d.tables(f64(0.0)).chain
    label = f64([math.asin(math.sqrt(unknown)) / (0.5 * math.pi)])
    ours = root * control_at(d, chain, label, f64([[root * x]]), None, None)
    precision = deviation**-2 + (1 - unknown) / unknown
    posterior = (mean * deviation**-2 + root * x / unknown) / precision
    assert float(ours) == pytest.approx(value, abs=1e-9)
    assert root * (posterior - (posterior - mean) * deviation**-2) == pytest.approx(value, abs=1e-9)


def test_variance_of_the_targets() -> None:
    """N(0, .25^2): published values of both, given z, in the score's unit; and nothing is left of the mixture.

    20 000 draws: sample variances of Gaussians have a relative standard error of .01; 4.5 of them, and the rounding.
    """
    s2, n = 0.25**2, 20_000
    x = 0.25 * torch.randn(n, 1, generator=generator(), dtype=torch.float64)
    novel = x - x / s2
    curvature = Curvature.fit(x, novel, 1.0, generator(1))
    for unknown, published in ((1e-3, (0.22, 984.0)), (0.1, (8.1, 3.6)), (0.99, (0.14, 0.0006))):
        v = torch.full((n,), unknown, dtype=torch.float64)
        y = noised(x, v, generator(2))
        a = -y * (1 - s2) / (s2 * (1 - unknown) + unknown)
        r = stein(x, novel, y, v)
        label = v.sqrt().asin() / (0.5 * math.pi)
        best = novel + curvature.at(label) * r
        found = [(1 - unknown) * float((t - a).square().mean()) for t in (novel, (x - y) / unknown, best)]
        assert found[0] == pytest.approx(published[0], rel=0.09)
        assert found[1] == pytest.approx(published[1], rel=0.09)
        assert found[2] < 1e-3 * min(found[:2])


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_conditional_means_are_the_exact_control(process: LinearProcess) -> None:
    """Residuals of all targets, states noised by the process itself, have mean zero against functions of y: 4.5 s.e."""
    target, denoiser = mixture()
    d = ControlledDiffusion(scheme(process, Exact(denoiser)), 2)
    chain = d.tables(f64(0.0)).chain
    n = 20_000
    x = target.sample(n, generator(3))
    novel = target.score(x) + x
    curvature = Curvature.fit(x, novel, float(chain.unknown[0]), generator(4))
    for k in (4, 10, 16):
        z, _ = process.perturb(x, chain.times[k], generator(5 + k))
        y = (chain.look[k, :, None] * z).sum(1)
        v = chain.unknown[k].expand(n)
        a = control_at_step(d, k, z)
        r = stein(x, novel, y, v)
        best = novel + curvature.at(chain.label[k].expand(n)) * r
        spread = []
        for t in (novel, (x - y) / chain.unknown[k], best):
            for test in (torch.ones_like(y), y, y.flip(-1).tanh()):
                miss = (t - a) * test
                assert bool((miss.mean(0).abs() < 4.5 * miss.std(0) / math.sqrt(n)).all())
            spread.append(float((t - a).square().mean()))
        assert spread[2] < 1.03 * min(spread[:2])


def control_at_step(d: ControlledDiffusion, k: int, z: Tensor) -> Tensor:
    """The control of the walk at step k, states (n, C, d)."""
    tables = d.tables(f64(0.0))
    return d.forward_control(tables, slice(k, k + 1), z.movedim(1, 0).unsqueeze(0), None, None)[0]


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("control", [Plain(), Informed(), Potential()], ids=lambda c: type(c).__name__)
def test_a_control_in_training_is_the_control_of_the_walk(process: LinearProcess, control: Control) -> None:
    target, _ = mixture()
    d = randomised(ControlledDiffusion(scheme(process, control), 2))
    tables = d.tables(f64(0.0))
    paths = d.walk(target, tables, d.start(tables, 7, generator()), generator(1))
    at = slice(1, 20)
    y = d.look(tables, at, paths.z[at])
    label = tables.chain.label[at].repeat_interleave(7)
    answers = target.log_prob_and_score(y.flatten(0, 1)) if d.guided else (None, None)
    assert paths.control is not None
    with torch.no_grad():
        ours = control_at(d, tables.chain, label, y.flatten(0, 1), *answers)
    assert torch.allclose(ours, paths.control[at].flatten(0, 1), rtol=1e-4, atol=1e-4)


def randomised(d: ControlledDiffusion, scale: float = 0.1) -> ControlledDiffusion:
    with torch.no_grad():
        for p in d.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator(11)))
    return d


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_the_loss_is_a_divergence(process: LinearProcess) -> None:
    """With many steps the information of a chain is dV: half of it times |error|^2 is the divergence."""
    chain = reversal(process, EqualAngles(), 400)
    passed = chain.information.cumsum(0)
    assert torch.allclose(passed, chain.unknown[0] - chain.unknown[1:], atol=0.01)
    times = Times.spread(1000, float(chain.unknown[0]), "divergence", generator())
    assert torch.allclose(times.unknown, (torch.arange(1000).double() + 0.5) / 1000 * chain.unknown[0], atol=1e-3)
    assert float(times.weight.mean()) == pytest.approx(0.5 * float(chain.unknown[0]))


# -- training ----------------------------------------------------------------------------------------------------------


def train(target: Target, s: Scheme, objective: Objective, steps: int, rate: float = 5e-3) -> ControlledDiffusion:
    d = ControlledDiffusion(s, target.dim, 0)
    runner = objective.runner(Work(d, target, generator(), 256, torch.float64))
    optimizer = torch.optim.Adam(d.parameters(), rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        runner.step()
        torch.nn.utils.clip_grad_norm_(d.parameters(), 1.0)
        optimizer.step()
        decay.step()
    return d


def verdict(d: ControlledDiffusion, target: Target, n: int = 20_000) -> tuple[float, float, float]:
    """log Z - ELBO, error of log Z, and its standard error."""
    assert target.log_z is not None
    tables = d.tables(f64(0.0))
    with torch.no_grad():
        paths = d.walk(target, tables, d.start(tables, n, generator(9)), generator(10))
        log_w = d.log_weights(tables, paths) - target.log_z
    w = log_w.exp()
    return -float(log_w.mean()), math.log(float(w.mean())), float(w.std() / w.mean()) / math.sqrt(n)


@pytest.mark.parametrize(
    ("objective", "control"),
    [
        (AdjointMatching(draws=512, examples=4096, refresh=25), Plain()),
        (AdjointMatching(draws=512, examples=4096, refresh=25, points="path"), Informed()),
        (ScoreMatching(draws=1024, examples=4096, refresh=50), Plain()),
    ],
    ids=["bridge", "path", "particles"],
)
def test_training_reaches_a_mixture(objective: Objective, control: Control) -> None:
    """From a Dirac start: within .1 nats of log Z, of which the 20 steps themselves cost about .03."""
    target, denoiser = mixture()
    s = scheme(BrownianBridge(), control)
    gap, error, uncertain = verdict(train(target, s, objective, 250), target)
    floor = verdict(ControlledDiffusion(scheme(BrownianBridge(), Exact(denoiser)), 2), target)[0]
    assert gap < floor + 0.1
    assert abs(error) < 4.5 * uncertain


def test_one_damped_step_is_exact_for_a_gaussian() -> None:
    """Draws of any Gaussian law q: damped targets have the mean -kappa (y - m) of the target's own control."""
    mean, s2 = 0.7, 0.16
    x = 0.3 + 1.5 * torch.randn(20_000, 1, generator=generator(), dtype=torch.float64)
    novel = x - (x - mean) / s2
    curvature = Curvature.fit(x, novel, 1.0, generator(1))
    for unknown in (0.2, 0.6, 0.95):
        v = torch.full((len(x),), unknown, dtype=torch.float64)
        y = noised(x, v, generator(2))
        label = v.sqrt().asin() / (0.5 * math.pi)
        damped = novel + curvature.at(label) * stein(x, novel, y, v)
        denoised = (s2 * y + unknown * mean) / (s2 * (1 - unknown) + unknown)
        assert torch.allclose(damped, (denoised - y) / unknown, atol=0.02)


@pytest.mark.parametrize("objective", [AdjointMatching(draws=16, examples=64, refresh=1)])
def test_gradients_are_counted(objective: AdjointMatching) -> None:
    """A plain control: one gradient a draw, and none for the steps of the walk or the examples."""
    target, _ = mixture()
    d = ControlledDiffusion(scheme(BrownianBridge(), Plain()), 2)
    before = target.evaluations.copy()
    objective.runner(Work(d, target, generator(), 8, torch.float64)).step()
    assert (target.evaluations - before).gradients == 16


def test_large_targets_are_cut_and_counted() -> None:
    target = Gaussian(dim=1, scale=0.01)
    d = ControlledDiffusion(scheme(BrownianBridge(), Plain()), 1)
    runner = AdjointMatching(draws=4000, examples=64, clip=1e4).runner(Work(d, target, generator(), 8, torch.float64))
    share = runner.step()["clipped"]
    expected = 2 * (1 - float(torch.distributions.Normal(0.0, 1.0).cdf(f64(1e4 / (1e4 - 1)))))
    assert share == pytest.approx(expected, abs=4.5 * math.sqrt(expected * (1 - expected) / 4000))


# -- interruptions -----------------------------------------------------------------------------------------------------


def _optimised(d: ControlledDiffusion, runner: Runner, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        runner.step()
        optimizer.step()


@pytest.mark.parametrize(
    ("objective", "control"),
    [
        (AdjointMatching(draws=32, examples=128, refresh=3, buffer=64), Plain()),
        (AdjointMatching(draws=32, examples=128, refresh=3, points="path"), Informed()),
        (
            ScoreMatching(draws=32, examples=128, refresh=3, replace=4, resampling=Resampling(threshold=0.3)),
            Potential(),
        ),
    ],
    ids=["bridge", "path", "particles"],
)
def test_taken_up_again_it_is_the_same(objective: Objective, control: Control) -> None:
    """Eleven steps, and five with six after an interruption: every parameter equal to the last bit."""
    target, _ = mixture()

    def begin() -> tuple[ControlledDiffusion, torch.Generator, Runner, torch.optim.Optimizer]:
        d, g = ControlledDiffusion(scheme(VP(), control, 8), 2), generator(1)
        return d, g, objective.runner(Work(d, target, g, 16, torch.float64)), torch.optim.SGD(d.parameters(), 1e-2)

    whole, _, runner, optimizer = begin()
    _optimised(whole, runner, optimizer, 11)
    first, g, runner, optimizer = begin()
    _optimised(first, runner, optimizer, 5)
    kept = {name: part.clone() for name, part in runner.state().items()}
    second, other, runner, optimizer = begin()
    second.load_state_dict(first.state_dict())
    other.set_state(g.get_state())
    runner.load(kept)
    _optimised(second, runner, optimizer, 6)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert any(bool(a.detach().abs().sum() > 0) for a in whole.parameters())


# -- what it refuses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scheme(VP(), EqualAngles(), 8, Plain(), annealed=True), "annealed"),
        (lambda: Scheme(VP(), EqualAngles(), 8, Plain(), backward=Plain()), "backward"),
        (
            lambda: Scheme(VP(), EqualAngles(), 8, Plain(), learn=("noise",)),
            "noise cannot be learned .* controls alone",
        ),
        (lambda: Scheme(LearnedProcess(), EqualAngles(), 8, Plain()), "process cannot be learned"),
    ],
)
@pytest.mark.parametrize(
    "objective",
    [
        AdjointMatching(),
        ScoreMatching(),
        Stages(ScoreMatching(), LogVariance()),
        Stages(LogVariance(), AdjointMatching()),
    ],
    ids=["adjoint", "score", "first stage", "second stage"],
)
def test_what_cannot_be_matched(make: Callable[[], Scheme], message: str, objective: Objective) -> None:
    """Refused with the settings, and by a training before the target is asked."""
    target, scheme = mixture()[0], make()
    with pytest.raises(ValueError, match=message):
        objective.validate(scheme, 8)
    diffusion, before = ControlledDiffusion(scheme, 2), target.evaluations.copy()
    with pytest.raises(ValueError, match=message):
        run(diffusion, target, objective, Training(steps=1, batch=8), generator())
    assert (target.evaluations - before).total == 0
    process, learn = scheme.process, scheme.learn
    with pytest.raises(ValueError, match=message):
        Controlled(
            process,
            control=Plain(),
            backward=scheme.backward,
            annealed=scheme.annealed,
            learn=learn,
            objective=objective,
        )


def test_both_stages_are_validated_each_with_its_batch() -> None:
    s = scheme(VP(), Plain())
    three, resampled = LogVariance(paths_per_start=3), ScoreMatching(resampling=Resampling())
    Stages(ScoreMatching(), three, batch=9).validate(s, 8)
    with pytest.raises(ValueError, match="batch = 8 is no multiple"):
        Stages(ScoreMatching(), three).validate(s, 8)
    with pytest.raises(ValueError, match="batch = 8 is no multiple"):
        Stages(three, ScoreMatching(), batch=9).validate(s, 8)
    with pytest.raises(ValueError, match="never asks"):
        Stages(LogVariance(), resampled).validate(s, 8)
    Stages(LogVariance(), resampled).validate(scheme(VP(), Potential()), 8)


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="never asks"):
        ScoreMatching(resampling=Resampling()).validate(scheme(VP(), Plain()), 8)
    with pytest.raises(ValueError, match="must hold"):
        AdjointMatching(draws=100, buffer=50)
    with pytest.raises(ValueError, match="novel"):
        AdjointMatching(mix="denoising")
    with pytest.raises(ValueError, match="clip"):
        ScoreMatching(clip=0.0)


def test_settings_are_data() -> None:
    objective = ScoreMatching(draws=77, mix="novel", resampling=Resampling(threshold=0.3))
    assert describe(build(describe(objective), Objective)) == describe(objective)

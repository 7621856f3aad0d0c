"""Learned processes: what they can become, what of it matters, and that they are processes like any other."""

import copy

import pytest
import torch

from undrift.config import ConfigError, build, describe
from undrift.denoise import GaussianDenoiser
from undrift.diffusion import Diffusion
from undrift.process import (
    CLD,
    HOLD,
    MALDA,
    PSLD,
    VP,
    ConstantClock,
    CosineClock,
    LearnedClock,
    LearnedProcess,
    LinearClock,
    LinearProcess,
    PowerClock,
    validate_recipe,
)
from undrift.process.times import InformationTimes
from undrift.sample import SSCS, Ancestral, EulerMaruyama, Exponential, Heun, ProbabilityFlow, sample

EVERYTHING = ("Q", "D", "S", "start", "clock")


def shaken(channels: int, learn: tuple[str, ...] = EVERYTHING, seed: int = 0, size: float = 0.2) -> LearnedProcess:
    """A learned process at a point of no symmetry."""
    process = LearnedProcess.random(channels, seed, learn=learn, knots=4)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for p in process.parameters():
            p.add_(size * torch.empty_like(p).normal_(generator=generator))
    return process


def test_one_channel_begins_as_vp_and_one_more_as_noise_on_both():
    one, vp = LearnedProcess(1), VP(clock=LinearClock(0.1, 10.0))
    t = torch.linspace(0.01, 1, 7, dtype=torch.float64)
    for a, b in zip(one.kernel(t), vp.kernel(t), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)
    assert LearnedProcess(1).degrees == 1
    assert len([p for p in LearnedProcess(2).parameters()]) == 2


@pytest.mark.parametrize("process", [CLD(), PSLD(), MALDA(), MALDA(3), HOLD()], ids=lambda p: type(p).__name__)
def test_it_can_begin_at_a_process_of_the_catalog(process):
    learned = LearnedProcess.like(process, floor=1e-6)
    d, q, s = process.terms()
    ours = learned.terms()
    torch.testing.assert_close(ours[0], d + max(0.0, 2e-6 - float(torch.linalg.eigvalsh(d)[0])) * torch.eye(len(d)))
    torch.testing.assert_close(ours[1], q, rtol=0, atol=1e-15)
    torch.testing.assert_close(ours[2], s)
    t = torch.tensor([0.1, 0.7], dtype=torch.float64)
    torch.testing.assert_close(learned.kernel(t)[0], process.kernel(t)[0], rtol=0, atol=1e-5)
    assert float(learned.D_raw.detach().diagonal().abs().min()) > 0  # where a root is zero its square could not grow


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_convergent_whatever_the_parameters(channels, seed):
    process = shaken(channels, seed=seed, size=3.0)
    d, q, s = process.terms()
    validate_recipe(d, q, s)
    low = 0.999 * process.floor
    for m in (d, s, process.start()[1:, 1:]):
        assert m.numel() == 0 or float(torch.linalg.eigvalsh(m.detach())[0]) >= low
    assert bool((process.clock.beta(torch.linspace(0, 1, 33, dtype=torch.float64)) > 0).all())


@pytest.mark.parametrize("learn", [(), ("Q",), ("D",), ("Q", "D"), ("Q", "D", "S", "clock"), EVERYTHING])
def test_description_round_trip(learn):
    process = shaken(3, learn)
    again = build(describe(process), LinearProcess)
    t = torch.linspace(0.01, 1, 5, dtype=torch.float64)
    for other in (again, process.frozen(), build(describe(process.frozen()), LinearProcess), copy.deepcopy(process)):
        for a, b in zip(other.marginal(t), process.marginal(t), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert again.learn == process.learn
    assert not any(m.requires_grad for m in process.frozen().kernel(t))
    assert {p.requires_grad for p in process.parameters()} <= ({True} if learn else {False})


@pytest.mark.parametrize("learn", [("Q", "D"), ("Q", "D", "clock"), ("Q", "D", "S"), ("Q", "D", "start"), EVERYTHING])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_degrees_are_the_rank_of_what_can_be_told(channels, learn):
    """The number of independent directions in which anything changes that no map of the auxiliaries can undo: moments
    of the data channel, the information about x0, and the divergence from the prior."""
    process = shaken(channels, learn, seed=1)
    parameters = [p for p in process.parameters() if p.requires_grad]
    t = torch.linspace(0.03, 1, 12, dtype=torch.float64)
    phi, root = process.marginal(t)
    cov = root @ root.mT
    seen = [phi[:, 0, 0], cov[:, 0, 0], process.snr(t), InformationTimes().measure(process, t)[1]]
    for i in range(0, 11, 2):
        later = process.transition(t[i].expand(11 - i), t[i + 1 :])[0]
        seen.append((later @ cov[i])[:, 0, 0])
    ratio = torch.linalg.solve(process.stationary, cov)
    seen += [torch.logdet(ratio)] + [
        torch.linalg.matrix_power(ratio, n).diagonal(dim1=-2, dim2=-1).sum(-1) for n in (1, 2)
    ]
    values = torch.cat(seen)
    slopes = torch.autograd.grad(values, parameters, torch.eye(len(values)).to(values), is_grads_batched=True)
    jacobian = torch.cat([g.flatten(1) for g in slopes], 1)
    values = torch.linalg.svdvals(jacobian / torch.linalg.vector_norm(jacobian, dim=1, keepdim=True).clamp(min=1e-30))
    assert int((values > 1e-9 * values[0]).sum()) == process.degrees


def test_degrees_of_the_paper():
    """Q and D learned, the clock's scale taken off: 3 for K = 2 and 7 for K = 3, and one more with a fixed clock."""
    assert [LearnedProcess(k).degrees for k in (1, 2, 3)] == [1, 4, 8]
    uneven = torch.diag(torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64))
    assert LearnedProcess(3, S=uneven).degrees == 9  # rotations would change S


def test_rotating_auxiliaries_changes_nothing_seen():
    process = shaken(3, ("Q", "D"))
    turn = torch.eye(3, dtype=torch.float64)
    angle = torch.tensor(0.7, dtype=torch.float64)
    turn[1:, 1:] = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    d, q, _ = process.terms()
    other = LearnedProcess(3, turn @ q @ turn.mT, turn @ d @ turn.mT, clock=process.clock)
    t = torch.linspace(0.01, 1, 9, dtype=torch.float64)
    torch.testing.assert_close(other.sigma(t), process.sigma(t), rtol=1e-11, atol=0)
    torch.testing.assert_close(other.kernel(t)[0][:, 0], process.kernel(t)[0][:, 0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "sampler",
    [EulerMaruyama(60), SSCS(60), SSCS(40, order=2), Ancestral(60), Exponential(40), Exponential(40, order=2), Heun(60),
     ProbabilityFlow()],
    ids=lambda s: type(s).__name__,
)  # fmt: skip
def test_every_sampler_runs_it(sampler):
    """Mean and deviation of Gaussian data come back, within 5 standard errors and the samplers' own bias."""
    process = shaken(3, ("Q", "D", "clock"), seed=4)
    diffusion = Diffusion(process, GaussianDenoiser([0.3], 0.49))
    x = sample(diffusion, 4000, (1,), sampler, 0)
    assert not x.requires_grad
    assert float(x.mean()) == pytest.approx(0.3, abs=5 * 0.7 / 4000**0.5 + 0.02)
    assert float(x.std()) == pytest.approx(0.7, abs=5 * 0.7 / 8000**0.5 + 0.03)


# -- the clock ---------------------------------------------------------------------------------------------------------


def test_two_knots_are_the_linear_clock():
    ours, linear = LearnedClock([0.1, 10.0]), LinearClock(0.1, 10.0)
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(ours.beta(t), linear.beta(t), rtol=1e-14, atol=0)
    torch.testing.assert_close(ours.integral(t), linear.integral(t), rtol=1e-14, atol=0)
    torch.testing.assert_close(LearnedClock.like(linear).integral(t), linear.integral(t), rtol=1e-13, atol=0)


def test_clock_is_the_integral_of_its_rate():
    clock = LearnedClock([0.3, 2.0, 0.05, 7.0], horizon=2.0)
    t = torch.linspace(0, 2, 4001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(clock.integral(t).sum(), t)
    torch.testing.assert_close(slope, clock.beta(t).detach(), rtol=1e-12, atol=1e-12)
    assert float(clock.integral(torch.zeros(1, dtype=torch.float64)).detach()) == 0.0
    knots = torch.linspace(0, 2, 4, dtype=torch.float64)
    assert clock.beta(knots).tolist() == pytest.approx([0.3, 2.0, 0.05, 7.0])


def test_clock_of_another():
    knots = torch.linspace(0, 0.995, 17, dtype=torch.float64)
    cosine = CosineClock()
    torch.testing.assert_close(LearnedClock.like(cosine, 17).beta(knots), cosine.beta(knots))
    with pytest.raises(ValueError, match="is not positive and finite at all of the 9 knots"):
        LearnedClock.like(PowerClock())  # stands still at t = 0


def test_it_stays_in_float64_on_the_cpu():
    process = LearnedProcess(2, learn=("Q", "clock"))
    moved = torch.nn.ModuleDict({"process": process, "other": torch.nn.Linear(1, 1)}).half()
    assert moved["other"].weight.dtype == torch.float16
    assert {p.dtype for p in process.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    ("build_it", "message"),
    [
        (lambda: LearnedProcess(0), "channels must be at least 1"),
        (lambda: LearnedProcess(2, learn=("Q", "Q")), "may name each of Q, D, S, start, clock once"),
        (lambda: LearnedProcess(2, learn=("B",)), "may name each of"),
        (lambda: LearnedProcess(3, Q=[[0, 1], [-1, 0]]), r"Q must be \(3, 3\)"),
        (lambda: LearnedProcess(2, Q=[[0, 1], [1, 0]]), "Q must be skew-symmetric"),
        (lambda: LearnedProcess(2, D=[[0.0, 0.0], [0.0, 1.0]]), "D must be above floor = 0.001"),
        (lambda: LearnedProcess(2, start_cov=1e-5, learn=("start",)), "start_cov must be above floor"),
        (lambda: LearnedProcess(2, floor=0.0), "floor must be positive"),
        (lambda: LearnedClock([1.0]), "two or more positive"),
        (lambda: LearnedClock([1.0, -1.0]), "two or more positive"),
        (lambda: LearnedClock([1.0, 1.0], 0.0), "horizon must be positive"),
        (lambda: LearnedClock.like(ConstantClock(), 1), "knots must be at least 2"),
    ],
)
def test_refusals(build_it, message):
    with pytest.raises(ValueError, match=message):
        build_it()


def test_a_configuration_names_the_parts():
    with pytest.raises(ConfigError, match="learn"):
        build({"type": "LearnedProcess", "learn": ["Q", "clocks"]}, LinearProcess)
    process = build({"type": "LearnedProcess", "channels": 3, "learn": ["Q", "D", "clock"]}, LinearProcess)
    assert isinstance(process.clock, LearnedClock)

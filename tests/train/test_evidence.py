"""Training by the evidence bound: unbiased in value and in the process's gradient, and processes that learn."""

import copy
from dataclasses import replace

import pytest
import torch
from tests.gaussian import PROCESSES, elbo_with_gradient, exact_denoiser, exact_elbo
from tests.reference import mdm
from torch import nn

from undrift import Diffusion, NoiseDiffusion, elbo, load, sample, save
from undrift.bound import Bound
from undrift.config import build, describe
from undrift.container import read_file
from undrift.denoise import NetworkDenoiser
from undrift.networks import MLP
from undrift.pixels import quantise
from undrift.process import (
    CLD,
    VP,
    InformationTimes,
    LearnedClock,
    LearnedProcess,
    LinearClock,
    LogSnrTimes,
    UniformTimes,
)
from undrift.sample import Exponential
from undrift.train import (
    Denoising,
    Dequantised,
    Digits,
    EvidenceBound,
    NoiseMatching,
    Objective,
    Ring,
    TrainConfig,
    Trainer,
)

SMALL = TrainConfig(steps=24, batch=32, lr=2e-3, warmup=5, ema=500.0, log_every=7, checkpoint_every=8)
EVERYTHING = ("Q", "D", "S", "start", "clock")


class Shrinks(nn.Module):
    """A denoiser far from the best."""

    def forward(self, x, sigma):
        return 0.4 * x / (1 + sigma.reshape(-1, 1)) + 0.1


def gaussian_data(n, seed=0):
    noise = torch.empty(n, 1, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(seed))
    return mdm.DATA_MEAN + mdm.DATA_STD * noise


def blocks(objective, model, x, count):
    """Means of the loss over ``count`` blocks of points, each stratified by itself: independent draws."""
    generator = torch.Generator().manual_seed(7)
    return torch.stack([objective.loss(model, part, generator)[0].mean() for part in x.chunk(count)])


@pytest.mark.parametrize("times", [None, UniformTimes(), InformationTimes(16), LogSnrTimes(16)])
@pytest.mark.parametrize("name", ["VP", "MALDA"])
def test_loss_is_minus_the_bound(name, times):
    """In nats per coordinate, against the bound with its expectations exact: 4 standard errors."""
    diffusion = exact_denoiser(PROCESSES[name])
    objective = EvidenceBound(t_min=0.05, times=times)
    x = torch.full((40_000, 1), 0.9, dtype=torch.float64)
    losses = blocks(objective, diffusion, x, 100)
    exact = -float(exact_elbo(Bound(diffusion, t_min=0.05), (0.9,)))
    assert abs(float(losses.mean()) - exact) < 4 * float(losses.std()) / 10


def test_loss_of_a_noise_network_is_minus_its_bound():
    """The zero network is the score 0: its bound is -KL - 1/2 int tr(GG' S^-1) dt + the decoder's, in closed form."""
    process = PROCESSES["CLD"]
    model = NoiseDiffusion(process, lambda z, label: torch.zeros_like(z))
    bound = Bound(model, t_min=0.05)
    x = gaussian_data(40_000)
    losses = blocks(EvidenceBound(t_min=0.05), model, x, 100)
    total, _ = InformationTimes().measure(process, torch.tensor([0.05, 1.0], dtype=torch.float64))
    exact = 0.5 * (total[1] - total[0]) + 0.5 - bound.start_constant(x) - bound.prior(x).mean()
    assert abs(float(losses.mean()) - float(exact)) < 4 * float(losses.std()) / 10


@pytest.mark.parametrize("kind", ["denoiser", "noise"])
def test_process_gradient_is_unbiased(kind):
    """Mean of autograd's gradients of the loss over 150 stratified batches against the exact gradient: 4.5 standard
    errors for each of the parameters of (D, Q, S, start, clock)."""
    process = LearnedProcess.random(2, 3, learn=EVERYTHING, knots=3)
    model = Diffusion(process, Shrinks())
    if kind == "noise":
        torch.manual_seed(0)
        head = nn.Linear(2, 2).double()
        model = NoiseDiffusion(process, lambda z, label: head(z.squeeze(-1)).unsqueeze(-1))
    parameters = [p for p in process.parameters() if p.requires_grad]
    # Two points that average quadratics of the data exactly, so that both sides see the same x.
    points = torch.tensor([[mdm.DATA_MEAN + mdm.DATA_STD], [mdm.DATA_MEAN - mdm.DATA_STD]], dtype=torch.float64)
    exact = -elbo_with_gradient(Bound(model, t_min=0.05), tuple(points.flatten().tolist())).mean()
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(exact, parameters)])
    generator = torch.Generator().manual_seed(3)
    x = points.repeat_interleave(200, 0)
    found = []
    for _ in range(150):
        shuffled = x[torch.randperm(len(x), generator=generator)]  # strata are in order
        loss = EvidenceBound(t_min=0.05, start_share=0.2).loss(model, shuffled, generator)[0].mean()
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    found = torch.stack(found)
    error = found.std(0) / len(found) ** 0.5
    assert bool(((found.mean(0) - wanted).abs() <= 4.5 * error + 1e-9).all())
    assert bool((wanted.abs() > 4.5 * error).sum() >= 5)  # and what is compared is not noise


def test_the_time_of_the_decoder_follows_sigma_min():
    objective, model = EvidenceBound(sigma_min=0.05), Diffusion(CLD(), Shrinks())
    _, sigma = objective.loss(model, gaussian_data(4096), torch.Generator().manual_seed(0))
    assert float(sigma.min()) == pytest.approx(0.05, rel=0.1)
    assert float(sigma.max()) == pytest.approx(float(CLD().sigma(1.0)), rel=0.1)
    at_start = sigma <= sigma.min() * (1 + 1e-9)
    assert int(at_start.sum()) == 4096 // 16


# -- processes that learn ----------------------------------------------------------------------------------------------


def test_the_best_process_is_found():
    """Exact denoiser of Gaussian data, K = 1, fixed S, and D learned at a fixed sigma_min: all a process can do is to
    forget more, so D grows and the divergence from the prior falls from its start."""

    class Exact(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.unused = exact_denoiser(VP()).denoiser, nn.Parameter(torch.zeros(1))

        def forward(self, x, sigma):
            return self.inner(x, sigma) + 0 * self.unused

    process = LearnedProcess(1, clock=LinearClock(0.1, 4.0))
    model, objective = Diffusion(process, Exact()), EvidenceBound(sigma_min=0.05)
    before = Bound(model, t_min=0.05).prior(gaussian_data(100)).mean().detach()
    optimiser = torch.optim.Adam([process.D_raw], lr=0.02)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        optimiser.zero_grad()
        objective.loss(model, gaussian_data(256), generator)[0].mean().backward()
        optimiser.step()
    after = Bound(model, t_min=0.05).prior(gaussian_data(100)).mean().detach()
    assert float(process.terms()[0].detach()) > 0.6
    assert float(after) > 0.7 * float(before)  # both negative


def model_of(kind, process):
    torch.manual_seed(0)
    network = MLP(2 * (process.channels if kind == "noise" else 1), width=16, depth=1)
    if kind == "noise":
        return NoiseDiffusion(process, network, data_std=0.9)
    return Diffusion(process, NetworkDenoiser(network, 0.9))


@pytest.mark.parametrize("kind", ["denoiser", "noise"])
def test_a_learned_run_in_pieces_equals_a_run_in_one(tmp_path, kind):
    data = Ring(n=200).load()

    def trainer(folder, steps=SMALL.steps):
        process = LearnedProcess(2, learn=EVERYTHING, knots=3)
        objective = EvidenceBound(sigma_min=0.01)
        return Trainer(model_of(kind, process), objective, data, replace(SMALL, steps=steps), tmp_path / folder)

    whole = trainer("whole").fit(progress=False)
    for steps in (5, 17, SMALL.steps):
        pieces = trainer("pieces", steps).fit(progress=False)
    for name in ("last", "model"):
        a, b = (read_file(tmp_path / folder / f"{name}.safetensors") for folder in ("whole", "pieces"))
        assert a[0].keys() == b[0].keys()
        assert [k for k in a[0] if not torch.equal(a[0][k], b[0][k])] == []
        assert a[1] == b[1]
    for a, b in zip(whole.model.process.state_dict().values(), pieces.model.process.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    moved = (LearnedProcess(2).terms()[0] - whole.model.process.terms()[0]).detach()
    assert float(moved.abs().max()) > 1e-3


def test_a_learned_process_is_saved_loaded_and_sampled(tmp_path):
    trainer = Trainer(
        model_of("denoiser", LearnedProcess(2, learn=EVERYTHING, knots=3)), EvidenceBound(sigma_min=0.01), Ring(n=200),
        SMALL, tmp_path,
    )  # fmt: skip
    fit = trainer.fit(progress=False)
    back = load(tmp_path / "model.safetensors")
    assert isinstance(back.process, LearnedProcess)
    assert not any(p.requires_grad for p in back.process.parameters())
    for a, b in zip(back.process.terms(), fit.model.process.terms(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)  # roots are taken anew: the last bit may differ
    torch.testing.assert_close(
        sample(back, 8, (2,), Exponential(8), seed=0),
        sample(fit.model, 8, (2,), Exponential(8), seed=0),
        rtol=1e-4,
        atol=1e-5,
    )
    # and without anything to learn
    save(tmp_path / "frozen.safetensors", Diffusion(back.process.frozen(), back.denoiser))
    frozen = load(tmp_path / "frozen.safetensors")
    torch.testing.assert_close(
        sample(frozen, 8, (2,), Exponential(8), seed=0),
        sample(back, 8, (2,), Exponential(8), seed=0),
        rtol=1e-4,
        atol=1e-5,
    )
    assert elbo(back, Ring(n=50).load().x).elbo.isfinite().all()


def test_the_average_of_the_process_and_its_own_learning_rate():
    process = LearnedProcess(2)
    config = TrainConfig(steps=3, batch=32, lr=1e-9, process_lr=0.05, warmup=0, clip=1.0)
    trainer = Trainer(model_of("denoiser", process), EvidenceBound(sigma_min=0.01), Ring(n=200), config)
    weights = copy.deepcopy(trainer.network.state_dict())
    average = trainer.model.process.D_raw.detach().clone()
    for step in range(3):
        trainer._train_step()
        average.lerp_(process.D_raw.detach(), 1 - config.ema_decay(step) if step else 1.0)
    torch.testing.assert_close(trainer.average.process.D_raw, average, rtol=1e-12, atol=0)
    assert max(float((w - weights[k]).abs().max()) for k, w in trainer.network.state_dict().items()) < 1e-7
    assert 0.01 < float((process.D_raw - LearnedProcess(2).D_raw).detach().abs().max()) < 0.16  # at most lr a step


def test_other_objectives_leave_the_process_alone():
    process = LearnedProcess(2)
    trainer = Trainer(model_of("denoiser", process), Denoising(), Ring(n=200), replace(SMALL, steps=2))
    trainer.fit(progress=False)
    assert describe(process) == describe(LearnedProcess(2))
    trainer = Trainer(model_of("noise", process), NoiseMatching(), Ring(n=200), replace(SMALL, steps=2))
    trainer.fit(progress=False)
    assert describe(process) == describe(LearnedProcess(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EvidenceBound(sigma_min=0.0), "sigma_min must be positive"),
        (lambda: EvidenceBound(t_min=-1.0), "t_min must be positive"),
        (lambda: EvidenceBound(start_share=1.0), r"start_share must lie in \(0, 1\)"),
    ],
)
def test_misuse_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_bare_denoiser_has_no_bound():
    with pytest.raises(TypeError, match="the bound is of a process with a model"):
        EvidenceBound().loss(NetworkDenoiser(MLP(2), 1.0), torch.zeros(4, 2), torch.Generator())


def test_a_fixed_process_on_a_learned_clock_is_refused_and_has_a_way_out(tmp_path):
    fixed = VP(clock=LearnedClock([0.1, 4.0, 10.0]))
    with pytest.raises(TypeError, match=r"a VP does not train its LearnedClock; make it a learned process"):
        Trainer(model_of("denoiser", fixed), EvidenceBound(sigma_min=0.01), Ring(n=200), SMALL)
    learned = LearnedProcess.like(fixed, learn=("clock",))
    assert "process" in Trainer(model_of("denoiser", learned), EvidenceBound(), Ring(n=200), SMALL).parts
    save(tmp_path / "a.safetensors", model_of("denoiser", fixed))
    assert "process" not in Trainer(load(tmp_path / "a.safetensors"), Denoising(), Ring(n=200), SMALL).parts


def test_objective_round_trip():
    objective = build(describe(EvidenceBound(times=LogSnrTimes(32), t_min=1e-4)), Objective)
    assert isinstance(objective.times, LogSnrTimes)
    assert (objective.t_min, objective.times.points) == (1e-4, 32)


# -- pixels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", ["center", "logit"])
def test_training_sees_fresh_noise_in_every_bin(transform):
    data = Dequantised(Digits(), transform, 17).load()
    index = torch.arange(40)
    one, two = (data.draw(index, torch.Generator().manual_seed(s)) for s in (0, 1))
    assert torch.equal(one, data.draw(index, torch.Generator().manual_seed(0)))
    assert not bool((one == two).any())
    for x in (one, two, data.x[:40]):
        assert torch.equal(quantise(x, transform, bins=17), data.pixels.values[:40].long())
    seen = []

    class Look(Objective):
        def loss(self, model, x, generator, **condition):
            seen.append(x.clone())
            return model.network(x.flatten(1), x.new_zeros(len(x))).square().mean(1), torch.ones(len(x))

    model = NetworkDenoiser(MLP(64, width=8, depth=1), 1.0)
    Trainer(model, Look(), data, TrainConfig(steps=2, batch=1500, warmup=0)).fit(progress=False)
    assert not torch.equal(seen[0].sort(0).values, seen[1].sort(0).values)
    assert not bool(torch.isin(seen[0], data.x).all())


def test_what_is_no_pixels_is_refused():
    with pytest.raises(ValueError, match=r"holds no whole numbers of 0 \.\.\. 255 scaled"):
        Dequantised(Digits(), bins=256).load()
    with pytest.raises(ValueError, match="bins must be at least 2"):
        Dequantised(Digits(), bins=1)

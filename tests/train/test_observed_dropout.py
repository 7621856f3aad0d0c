"""One network for the posterior and the prior: observations that are dropped in training, and what is told nothing."""

import math

import pytest
import torch
from torch import nn

from undrift.container import read_file, write_file
from undrift.denoise import ClassifierFree, GaussianDenoiser, NetworkDenoiser
from undrift.networks import MLP, NeuralOperator, SpectralNet, UNet
from undrift.observe import GaussianNoise, Matrix
from undrift.train import Dataset, Denoising, LogUniform, Measured, TrainConfig, Trainer, load

A, STD = torch.tensor([[1.0, 0.5]]), 0.4


def pairs(n: int = 2000) -> Dataset:
    """Standard normal points in the plane, seen through A with noise."""
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    return Dataset("normal", x, observed=Measured(Matrix(A), GaussianNoise(STD)))


class Pointwise(nn.Module):
    """A stand-in for an operator of another library: (batch, inputs, n) to (batch, 1, n)."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(inputs, 8, 1), nn.Tanh(), nn.Conv1d(8, 1, 1))

    def forward(self, x):
        return self.layers(x)


KINDS = {
    "vector": (lambda **kw: MLP(4, 16, 1, condition_features=3, **kw), (4,), (3,)),
    "image": (lambda **kw: UNet(1, 4, 8, (1, 1), attention=False, condition_channels=2, **kw), (1, 4, 4), (2, 4, 4)),
    "function and vector": (
        lambda **kw: SpectralNet(width=8, modes=4, depth=1, condition_features=3, **kw),
        (8,),
        (3,),
    ),
    "function and field": (
        lambda **kw: SpectralNet(width=8, modes=4, depth=1, condition_channels=1, **kw),
        (8,),
        (1, 6),
    ),
    "operator": (lambda **kw: NeuralOperator(Pointwise(2 + len(kw) + 1), condition_channels=1, **kw), (8,), (1, 8)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_none_and_nan_are_no_observation_sample_by_sample(kind):
    make, event, data = KINDS[kind]
    torch.manual_seed(0)
    network = make(condition_optional=True).double()
    for p in network.parameters():
        nn.init.normal_(p, std=0.3)
    x, label = torch.randn(4, *event, dtype=torch.float64), torch.linspace(-1, 1, 4, dtype=torch.float64)
    seen = torch.randn(4, *data, dtype=torch.float64)
    some = seen.clone()
    some[1:3] = math.nan
    out, told, nothing = (network(x, label, observed=o) for o in (some, seen, None))
    torch.testing.assert_close(out[[0, 3]], told[[0, 3]], rtol=0, atol=1e-12)
    torch.testing.assert_close(out[1:3], nothing[1:3], rtol=0, atol=1e-12)
    torch.testing.assert_close(network(x, label, observed=some[1]), nothing, rtol=0, atol=1e-12)
    # data that happen to be zero are data
    zero = network(x, label, observed=torch.zeros_like(seen))
    assert float((zero - nothing).detach().flatten(1).abs().amax(1).min()) > 1e-3
    out.square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in network.parameters())
    assert kind == "operator" or float(network.absent.grad.abs().max()) > 0
    with pytest.raises(TypeError, match="is told what was observed, so give observed="):
        make()(x.float(), label.float())


def test_files_from_before_still_load_and_resume(tmp_path):
    """Without condition_optional weights have the names that they had, and what a file lacks stands at its default."""

    def run(folder, steps):
        torch.manual_seed(0)
        model = NetworkDenoiser(MLP(2, width=8, depth=1, condition_features=1))
        return Trainer(model, Denoising(), pairs(64), TrainConfig(steps=steps, batch=16, warmup=2), folder)

    def age(path):
        tensors, description = read_file(path)
        assert not any("absent" in name for name in tensors)
        for model in (description["model"], description["training"].get("model")):
            if model:
                del model["denoiser"]["network"]["condition_optional"]
        if description["training"]:
            del description["training"]["config"]["observed_dropout"]
        write_file(path, tensors, description)

    whole = run(tmp_path / "whole", 8).fit(progress=False).model
    half = run(tmp_path / "parts", 4).fit(progress=False).model
    age(tmp_path / "parts" / "model.safetensors")
    age(tmp_path / "parts" / "last.safetensors")
    again = load(tmp_path / "parts" / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), half.parameters(), strict=True))
    parts = run(tmp_path / "parts", 8).fit(progress=False).model
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    optional = {f"condition_{k}": v for k, v in (("features", 1), ("optional", True))}
    extra = set(MLP(2, width=8, depth=1, **optional).state_dict()) - set(again.network.state_dict())
    assert extra == {"absent"}


def test_a_network_with_dropped_observations_learns_posterior_and_prior(tmp_path):
    torch.manual_seed(0)
    network = MLP(2, width=48, depth=1, condition_features=1, condition_optional=True)
    levels = LogUniform(0.2, 5.0)
    config = TrainConfig(steps=400, batch=128, lr=5e-3, warmup=20, ema=5_000.0, observed_dropout=0.2)
    Trainer(NetworkDenoiser(network, 1.0), Denoising(noise=levels), pairs(), config, tmp_path).fit(progress=False)
    model = load(tmp_path / "model.safetensors")
    cov = torch.linalg.inv(torch.eye(2) + A.T @ A / STD**2)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(4000, 2, generator=g)
    y = x @ A.T + STD * torch.randn(4000, 1, generator=g)
    with torch.no_grad():
        for sigma in (0.5, 1.0, 3.0):
            noisy = x + sigma * torch.randn(4000, 2, generator=g)
            centre = y @ (cov @ A.T / STD**2).T
            exact = centre + GaussianDenoiser([0.0, 0.0], cov)(noisy - centre, sigma)
            prior = GaussianDenoiser([0.0, 0.0], 1.0)(noisy, sigma)
            # a network that ignores the data, or one that cannot tell that it has none, is off by gap on one side or
            # the other, or by a quarter of it on both; either must be within a twentieth
            gap = float((exact - prior).square().sum(1).mean())
            for found, wanted in (
                (model(noisy, sigma, observed=y), exact),
                (model(noisy, sigma), prior),
                (ClassifierFree(model, 0.0)(noisy, sigma, observed=y), prior),
            ):
                assert float((found - wanted).square().sum(1).mean()) < 0.05 * gap, sigma
            # strength 2 doubles what the data say, and with it the differences of the errors
            found, wanted = ClassifierFree(model, 2.0)(noisy, sigma, observed=y), 2 * exact - prior
            assert float((found - wanted).square().sum(1).mean()) < 2 * (4 + 1) * 0.05 * gap, sigma


class Own(nn.Module):
    """A user's network, which takes tensors only; it counts the samples that were told nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.absent, self.seen = nn.Linear(4, 2), 0, 0

    def forward(self, x, label, observed):
        self.absent += int(observed.isnan().all(1).sum())
        self.seen += len(x)
        return self.layer(torch.cat([x, observed.nan_to_num(), label.unsqueeze(1)], 1))


def test_a_network_of_ones_own_is_told_tensors_and_drops_where_it_says_it_can():
    plain = Own()
    config = TrainConfig(steps=4, batch=500)
    Trainer(NetworkDenoiser(plain), Denoising(), pairs(), config).fit(progress=False)
    assert (plain.absent, plain.seen) == (0, 2000)
    config = TrainConfig(steps=4, batch=500, observed_dropout=0.3)
    with pytest.raises(ValueError, match="the Own cannot do without"):
        Trainer(NetworkDenoiser(Own()), Denoising(), pairs(), config)
    own = Own()
    own.condition_optional = True
    Trainer(NetworkDenoiser(own), Denoising(), pairs(), config).fit(progress=False)
    # binomial: four standard errors
    assert abs(own.absent / own.seen - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 2000)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TrainConfig(observed_dropout=1.5), "observed_dropout must be a probability"),
        (lambda: MLP(2, condition_optional=True), "condition_optional is of what was observed"),
        (lambda: UNet(1, 4, condition_optional=True), "the network is told nothing"),
        (lambda: SpectralNet(condition_optional=True), "the network is told nothing"),
        (lambda: NeuralOperator(Pointwise(2), condition_optional=True), "the network is told nothing"),
        (
            lambda: Trainer(
                NetworkDenoiser(MLP(2, condition_features=1, condition_optional=True)), Denoising(), pairs()
            ),
            "never learns at observed_dropout 0",
        ),
        (
            lambda: Trainer(
                NetworkDenoiser(MLP(2)),
                Denoising(),
                Dataset("x", torch.zeros(200, 2)),
                TrainConfig(observed_dropout=0.1),
            ),
            "has no observations to drop",
        ),
    ],
)
def test_misuse_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

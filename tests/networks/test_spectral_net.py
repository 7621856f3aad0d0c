import itertools
import math

import pytest
import torch
from torch import nn

from undrift.config import build, describe
from undrift.denoise import NetworkDenoiser
from undrift.networks import Network, NeuralOperator, SpectralNet
from undrift.space import Cosine, EmpiricalSpectrum, Fourier, FunctionSpace, Sine
from undrift.train import Dataset, Denoising, Grids, LogUniform, TrainConfig, Trainer, load


def net(basis, seed=0, **options):
    """A network that is not silent, in float64."""
    torch.manual_seed(seed)
    made = SpectralNet(basis, **{"width": 12, "modes": 6, "depth": 2, **options}).double()
    nn.init.normal_(made.outward.weight, std=0.3)
    return made


def smooth(basis, grid, kept=5, batch=2, components=1, seed=0):
    """Functions of the lowest modes, the same on every grid."""
    g = torch.Generator().manual_seed(seed)
    c = torch.randn(batch, components, *[kept] * basis.dims, dtype=torch.float64, generator=g) / kept ** (
        basis.dims / 2
    )
    return basis.synthesise(basis.fit(c, grid))


def miss(basis, model, grid, reference, **condition):
    """Distance in L^2 of the output function's lowest modes from a reference's, relative to it."""
    out = basis.fit(basis.analyse(model(smooth(basis, grid), LABEL, **condition)), (6,) * basis.dims)
    return float((out - reference).norm() / reference.norm())


LABEL = torch.tensor([0.1, -0.3], dtype=torch.float64)


def errors(basis, sizes, finest, **options):
    model = net(basis, **options)
    with torch.no_grad():
        u = model(smooth(basis, (finest,) * basis.dims), LABEL)
        reference = basis.fit(basis.analyse(u), (6,) * basis.dims)
        return [miss(basis, model, (n,) * basis.dims, reference) for n in sizes]


@pytest.mark.parametrize("coordinates", [True, False])
@pytest.mark.parametrize("basis", [Cosine(), Fourier()], ids=repr)
def test_one_function_in_is_one_function_out_up_to_aliasing_that_falls_exponentially(basis, coordinates):
    found = errors(basis, (8, 16, 32, 64), 256, coordinates=coordinates)
    # measured: from 4e-3 to 1e-2, 5e-6 to 6e-5, and below 3e-9; then rounding
    assert found[0] < 0.05
    assert found[1] < 0.02 * found[0]
    assert found[2] < 0.001 * found[1]
    assert found[3] < 1e-14


def test_at_a_boundary_that_the_basis_does_not_continue_it_falls_with_the_square():
    # gelu of an odd continuation is not odd: a jump at the boundary, and the midpoint rule's n^-2
    found = errors(Sine(), (16, 32, 64), 1024)
    assert all(3 < a / b < 6 for a, b in itertools.pairwise(found))


def test_in_two_dimensions():
    found = errors(Cosine(2), (12, 24, 48), 64)
    assert found[1] < 0.05 * found[0]
    assert found[2] < 0.05 * found[1]


def test_dealiasing_buys_the_error_of_the_finer_grid():
    plain = errors(Cosine(), (16, 32, 64), 512)
    finer = errors(Cosine(), (16, 32), 512, dealias=2)
    assert finer == pytest.approx(plain[1:], rel=1e-6)


@pytest.mark.parametrize("basis", [Cosine(), Sine(), Fourier(), Fourier(2)], ids=repr)
def test_grids_with_fewer_points_than_modes_are_served(basis):
    model = net(basis, modes=9)
    for n in (1, 4, 7, 20):
        x = torch.randn(2, *(n,) * basis.dims, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        y = model(x, LABEL)
        assert y.shape == x.shape
        assert bool(y.isfinite().all())


def test_only_the_kept_modes_meet_the_spectral_weights():
    model = net(Cosine(), modes=6)
    u = Cosine().synthesise(torch.nn.functional.pad(torch.ones(1, 12, 3, dtype=torch.float64), (7, 22)))
    assert float(model.blocks[0].spectral(u).abs().max().detach()) < 1e-12


def test_fourier_convolutions_can_be_any_translation_invariant_map():
    # a derivative turns sines into cosines of the same frequency: weights that couple the pair
    model = net(Fourier(), width=1, modes=7, depth=1)
    layer = model.blocks[0].spectral
    with torch.no_grad():
        layer.weight.zero_()
        for k in (1, 2, 3):
            layer.weight[1, 0, 2 * k - 1] = -2 * math.pi * k  # the sine of the derivative, from the cosine
            layer.weight[1, 0, 2 * k] = 2 * math.pi * k
        u = smooth(Fourier(), (33,), 7)
        k = torch.fft.rfftfreq(33, 1 / 33, dtype=torch.float64)
        slope = torch.fft.irfft(2j * math.pi * k * torch.fft.rfft(u), 33)
        torch.testing.assert_close(layer(u), slope, rtol=0, atol=1e-10)


def test_leading_axes_are_components_and_a_fresh_network_says_nothing():
    model = net(Cosine(2), channels=6)
    x = smooth(Cosine(2), (8, 9), components=6)
    torch.testing.assert_close(model(x.unflatten(1, (2, 3)), LABEL), model(x, LABEL).unflatten(1, (2, 3)))
    assert not SpectralNet()(torch.ones(1, 8), torch.zeros(1)).any()
    again = build(describe(model), Network)
    assert again.config == model.config
    again.double().load_state_dict(model.state_dict())
    torch.testing.assert_close(again(x, LABEL), model(x, LABEL))


def test_what_was_observed_matters_on_any_grid_of_its_own():
    basis = Cosine()
    model, x = net(basis, condition_channels=2), smooth(basis, (64,))
    seen = smooth(basis, (64,), components=2, seed=1)
    out = model(x, LABEL, observed=seen)
    torch.testing.assert_close(model(x, LABEL, observed=basis.resample(seen, (12,))), out, rtol=0, atol=1e-10)
    torch.testing.assert_close(model(x, LABEL, observed=seen[0])[0], out[0])
    assert float((model(x, LABEL, observed=2 * seen) - out).detach().abs().max()) > 1e-3
    vector = net(basis, condition_features=3)
    y = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    coarse, fine = vector(smooth(basis, (128,)), LABEL, observed=y), vector(smooth(basis, (256,)), LABEL, observed=y)
    torch.testing.assert_close(basis.resample(fine, (8,)), basis.resample(coarse, (8,)), rtol=0, atol=1e-9)
    assert float((vector(x, LABEL, observed=y + 1) - vector(x, LABEL, observed=y)).detach().abs().max()) > 1e-3
    classes = net(basis, classes=3)
    torch.testing.assert_close(classes(x, LABEL), classes(x, LABEL, y=torch.tensor([-1, -1])))
    assert float((classes(x, LABEL, y=torch.tensor([0, 1])) - classes(x, LABEL)).detach().abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SpectralNet(modes=0), "modes must be at least 1"),
        (lambda: SpectralNet(condition_channels=1, condition_features=1), "not both"),
        (lambda: SpectralNet()(torch.zeros(2, 3, 8), torch.zeros(2)), "built for 1 component on a grid of 1 dimension"),
        (lambda: SpectralNet()(torch.zeros(2, 8), torch.zeros(2), observed=torch.zeros(2)), "got observed, but"),
        (lambda: SpectralNet(condition_features=1)(torch.zeros(2, 8), torch.zeros(2)), "give observed="),
        (
            lambda: SpectralNet(condition_features=4)(torch.zeros(2, 8), torch.zeros(2), observed=torch.zeros(3, 4)),
            r"shape \(2, 4\), one for each sample, or \(4\) for all, got \(3, 4\)",
        ),
        (lambda: SpectralNet()(torch.zeros(2, 8), torch.zeros(2), y=torch.zeros(2)), "classes=None"),
        (lambda: SpectralNet()(torch.zeros(2, 8), torch.zeros(2), z=1), "got z"),
        (lambda: NeuralOperator(3), "must be a torch.nn.Module, got a int"),
        (lambda: NeuralOperator(nn.Conv1d(2, 2, 1))(torch.zeros(2, 8), torch.zeros(2)), "module must return"),
        (lambda: describe(NeuralOperator(nn.Conv1d(2, 1, 1))), "NeuralOperator of a Conv1d has no description"),
    ],
)
def test_misuse_is_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


class Lifted(nn.Module):
    """A stand-in with the interface of a neural operator: (batch, channels, *grid) to the same."""

    def __init__(self, inputs, outputs, dims):
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d}[dims]
        self.inner, self.outer = conv(inputs, 8, 1), conv(8, outputs, 1)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x)))


@pytest.mark.parametrize("dims", [1, 2])
def test_an_operator_of_another_library_sees_fields_label_and_place(dims):
    options = {"channels": 2, "dims": dims, "coordinates": True, "condition_channels": 1}
    model = NeuralOperator(Lifted(2 + 1 + 1 + dims, 2, dims), **options)
    assert model.inputs == 4 + dims
    grid, g = (4, 6)[:dims], torch.Generator().manual_seed(0)
    x, seen = torch.randn(3, 2, *grid, generator=g), torch.randn(3, 1, *grid, generator=g)
    label = torch.tensor([0.0, 0.5, 1.0])
    points = torch.stack([p.float() for p in Cosine(dims).points(grid).movedim(-1, 0)]).expand(3, dims, *grid)
    constant = label.reshape(3, *[1] * (dims + 1)).expand(3, 1, *grid)
    expected = model.module(torch.cat([x, seen, constant, points], 1))
    torch.testing.assert_close(model(x, label, observed=seen), expected)
    NetworkDenoiser(NeuralOperator(Lifted(2, 1, dims), dims=dims))(torch.zeros(2, *grid), 1.0).sum().backward()


def test_training_on_functions_of_several_grids_learns_and_its_checkpoint_keeps_the_space(tmp_path):
    basis, g = Cosine(), torch.Generator().manual_seed(0)
    c = 0.1 * torch.randn(400, 16, generator=g) / torch.arange(1, 17)
    c[:, 1] += torch.randint(2, (400,), generator=g) * 2 - 1  # one of two functions, which no linear map can tell apart
    fields = basis.synthesise(c)
    space = FunctionSpace.matched(fields)
    torch.manual_seed(0)
    model = NetworkDenoiser(SpectralNet(width=12, modes=6, depth=1), sigma_data=1.0, space=space)
    objective = Denoising(noise=LogUniform(0.3, 1.0))
    data = Dataset("fields", fields, grids=Grids(basis, (12, 16, 24)))
    config = TrainConfig(steps=60, batch=32, lr=1e-2, warmup=5, ema=500.0)
    Trainer(model, objective, data, config, tmp_path).fit(progress=False)
    kept = load(tmp_path / "model.safetensors")
    assert isinstance(kept.space, FunctionSpace)
    assert isinstance(kept.space.spectrum, EmpiricalSpectrum)
    assert torch.equal(kept.space.variances((40,)), space.variances((40,)))
    torch.manual_seed(0)
    silent = NetworkDenoiser(SpectralNet(width=12, modes=6, depth=1), sigma_data=1.0, space=space)
    for n in (12, 32, 64):  # on grids of training and on finer ones it beats the best linear denoiser
        x = basis.resample(fields, (n,))
        with torch.no_grad():
            after, before = (objective.loss(m, x, torch.Generator().manual_seed(1))[0] for m in (kept, silent))
        gap = before - after
        assert float(gap.mean()) > 5 * float(gap.std()) / 20


class Turned(nn.Module):
    """Complex weights, as Fourier layers of other libraries have them."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=torch.complex64))

    def forward(self, x):
        return (x * self.weight.reshape(2, 1)).real.sum(1, keepdim=True)


def test_complex_weights_are_trained():
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    model = NetworkDenoiser(NeuralOperator(Turned()))
    fit = Trainer(model, Denoising(), Dataset("d", x), TrainConfig(steps=3, batch=8, warmup=1)).fit(progress=False)
    assert not torch.equal(fit.model.network.module.weight, torch.ones(2, dtype=torch.complex64))

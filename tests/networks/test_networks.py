import builtins
import math

import pytest
import torch

from undrift.config import ConfigError, build, describe
from undrift.networks import MLP, DiffusersUNet, FourierFeatures, Network, UNet


def shaken(network, seed=0):
    """The network with all parameters moved, so that its zero-initialised output says something."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.empty_like(p).normal_(generator=g))
    return network


CASES = {
    "vector": (lambda: MLP(3, width=16, depth=2), (3,)),
    "vector, K = 2": (lambda: MLP(6, width=16, depth=2), (2, 3)),
    "scalar": (lambda: MLP(1, width=16, depth=1), ()),
    "8 x 8": (lambda: UNet(1, 8, width=8), (1, 8, 8)),
    "8 x 8, K = 2": (lambda: UNet(2, 8, width=8), (2, 1, 8, 8)),
    "28 x 28": (lambda: UNet(1, 28, width=8, multipliers=(1, 2, 2)), (1, 28, 28)),
    "32 x 32 colour, K = 3": (lambda: UNet(9, 32, width=8, multipliers=(1, 1, 2), blocks=2), (3, 3, 32, 32)),
    "diffusers, K = 2": (lambda: DiffusersUNet(2, 8, widths=(32, 32), layers=1), (2, 1, 8, 8)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_network_maps_every_layout_to_itself_sample_by_sample(case):
    make, event = CASES[case]
    torch.manual_seed(0)
    network = shaken(make()).eval()
    x, label = torch.randn(4, *event), torch.linspace(-1.5, 1.4, 4)
    y = network(x, label)
    assert y.shape == x.shape
    # One sample's answer depends on no other sample: the same alone and in company.
    torch.testing.assert_close(network(x[1:2], label[1:2]), y[1:2], rtol=1e-4, atol=1e-5)
    # It depends on the label and on every coordinate of the input.
    assert float((network(x, label.flip(0)) - y).detach().abs().max()) > 1e-3
    x.requires_grad_(True)
    assert bool((torch.autograd.grad(network(x, label).square().sum(), x)[0] != 0).all())


@pytest.mark.parametrize("case", CASES)
def test_a_description_rebuilds_the_network(case):
    network = shaken(CASES[case][0]())
    again = build(describe(network), Network)
    assert type(again) is type(network)
    assert describe(again) == describe(network)
    again.load_state_dict(network.state_dict())
    event = CASES[case][1]
    x, label = torch.randn(2, *event), torch.tensor([-1.0, 1.0])
    assert torch.equal(again.eval()(x, label), network.eval()(x, label))


@pytest.mark.parametrize("make", [lambda: MLP(4), lambda: UNet(1, 8)])
def test_a_fresh_network_says_nothing_and_learns_at_once(make):
    network = make()
    x = torch.randn(3, 4) if isinstance(network, MLP) else torch.randn(3, 1, 8, 8)
    y = network(x, torch.zeros(3))
    assert float(y.detach().abs().max()) == 0
    (y - 1).square().sum().backward()
    assert network.outward.weight.grad.abs().max() > 0


def test_the_small_unet_is_small():
    assert 1e5 < sum(p.numel() for p in UNet(1, 8, width=24).parameters()) < 4e5


def test_classes_matter_and_minus_one_means_none():
    network = shaken(UNet(1, 8, width=8, classes=3)).eval()
    x, label = torch.randn(2, 1, 8, 8), torch.zeros(2)
    free = network(x, label)
    assert torch.equal(network(x, label, y=torch.tensor([-1, -1])), free)
    assert float((network(x, label, y=torch.tensor([0, 2])) - free).detach().abs().max()) > 1e-3


def test_fourier_features_separate_nearby_levels_and_order_far_ones():
    features = FourierFeatures(32)
    c = 0.25 * torch.tensor([0.002, 1.0, 1.05, 300.0]).log()
    f = features(c)
    assert float((f[1] - f[2]).norm()) > 0.2  # 5 % apart in sigma
    lowest = features.frequencies[0] * c
    assert float(lowest.max() - lowest.min()) < math.pi  # the lowest frequency does not wrap over the levels in use


def test_diffusers_missing_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def hidden(name, *args, **kwargs):
        if name.startswith("diffusers"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", hidden)
    with pytest.raises(ImportError, match=r'pip install "undrift\[unet\]"'):
        DiffusersUNet(1, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MLP(0), "features must be at least 1, got 0"),
        (lambda: MLP(2)(torch.zeros(3, 5), torch.zeros(3)), r"must hold 2 numbers, got x of shape \(3, 5\)"),
        (lambda: MLP(2)(torch.zeros(3, 2), torch.zeros(3), y=torch.zeros(3)), "its only condition, got y"),
        (lambda: UNet(1, 9), "divisible by 2, got 9"),
        (lambda: UNet(1, 8, width=10), "width must be a multiple of 8, got 10"),
        (lambda: UNet(1, 8, dropout=1.0), r"dropout must lie in \[0, 1\), got 1.0"),
        (lambda: UNet(1, 8, multipliers=()), "multipliers must be numbers of at least 1"),
        (lambda: UNet(1, 8)(torch.zeros(2, 2, 1, 8, 8), torch.zeros(2)), r"channels = K C"),
        (lambda: UNet(1, 8)(torch.zeros(2, 1, 8, 8), torch.zeros(2), y=torch.zeros(2)), "built with classes=None"),
        (lambda: DiffusersUNet(1, 8, widths=(48,)), "widths must be multiples of 32"),
        (lambda: DiffusersUNet(1, 8, attention=(True,)), "each of the 2 levels, got 1"),
    ],
)
def test_misuse_is_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_an_unknown_key_of_a_network_is_named_with_its_place():
    with pytest.raises(ConfigError, match=r"denoiser.network.widht: unknown key .*'width'"):
        build({"type": "MLP", "features": 2, "widht": 3}, Network, "denoiser.network")

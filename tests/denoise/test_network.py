import pytest
import torch
from torch import nn

from undrift.config import build, describe
from undrift.denoise.network import NetworkDenoiser
from undrift.networks import MLP, UNet


class Recorder(nn.Module):
    """A network that remembers what it was asked and answers with a constant."""

    def __init__(self, answer):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.answer = answer

    def forward(self, x, label, **condition):
        self.x, self.label, self.condition = x, label, condition
        return self.answer.to(x) + self.weight * x


def test_edm_coefficients_against_their_definition():
    """Karras et al. 2022, table 1, last column, evaluated by hand at sigma = 2, sigma_data = 0.5."""
    network = Recorder(torch.full((1, 3), 0.7))
    d = NetworkDenoiser(network, sigma_data=0.5)
    x = torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.float64)
    out = d(x, 2.0)
    assert out.dtype == torch.float64
    assert network.x.dtype == torch.float32
    torch.testing.assert_close(network.x.double(), x / 4.25**0.5, rtol=1e-6, atol=0)
    assert float(network.label) == pytest.approx(0.17328679513998632, rel=1e-6)  # ln(2)/4
    torch.testing.assert_close(out, 0.25 / 4.25 * x + 1.0 / 4.25**0.5 * 0.7, rtol=1e-6, atol=1e-7)


def test_a_silent_network_is_the_best_linear_denoiser():
    """For data N(0, sigma_d^2) the posterior mean is sigma_d^2/(sigma^2 + sigma_d^2) x: exactly F = 0."""
    d = NetworkDenoiser(MLP(2), sigma_data=1.3)
    x, sigma = torch.randn(5, 2, dtype=torch.float64), torch.logspace(-3, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(d(x, sigma), x * (1.69 / (1.69 + sigma**2))[:, None], rtol=1e-12, atol=0)


def test_input_and_target_have_unit_variance_at_every_level():
    """EDM's requirement (appendix B.6), on Gaussian data; 4 standard errors of a variance of 40 000 unit normals."""
    g = torch.Generator().manual_seed(0)
    n = 40_000
    network = Recorder(torch.zeros(n, 1))
    d = NetworkDenoiser(network, sigma_data=0.7)
    bound = 4 * (2 / n) ** 0.5
    for sigma in (0.01, 0.3, 1.0, 20.0):
        x0 = 0.7 * torch.empty(n, 1, dtype=torch.float64).normal_(generator=g)
        x = x0 + sigma * torch.empty_like(x0).normal_(generator=g)
        network.answer = torch.zeros(n, 1)
        skip = d(x, sigma)
        network.answer = torch.ones(n, 1)
        target = (x0 - skip) / (d(x, sigma) - skip)
        assert abs(float(network.x.double().var()) - 1) < bound
        assert abs(float(target.detach().var()) - 1) < bound


def test_labels_stop_at_the_trained_range_and_coefficients_do_not():
    network = Recorder(torch.zeros(4, 1))
    d = NetworkDenoiser(network, sigma_min=0.01, sigma_max=100.0)
    x = torch.ones(4, 1, dtype=torch.float64)
    out = d(x, torch.tensor([0.0, 1e-4, 1e3, 1e6], dtype=torch.float64))
    expected = 0.25 * torch.tensor([0.01, 0.01, 100.0, 100.0]).log()
    torch.testing.assert_close(network.label, expected)
    torch.testing.assert_close(out[:, 0], 0.25 / (0.25 + torch.tensor([0.0, 1e-8, 1e6, 1e12], dtype=torch.float64)))


def test_condition_reaches_the_network_and_shapes_and_dtypes_come_back():
    network = Recorder(torch.zeros(()))
    d = NetworkDenoiser(network)
    y = torch.tensor([1, 2])
    d(torch.zeros(2, 1, 4, 4), torch.tensor([0.1, 1.0]), y=y)
    assert network.condition["y"] is y
    image = NetworkDenoiser(UNet(1, 8, width=8))
    for dtype in (torch.float32, torch.float64):
        assert image(torch.zeros(2, 1, 8, 8, dtype=dtype), 0.5).dtype == dtype


def test_description_round_trip():
    d = NetworkDenoiser(MLP(2, width=8, depth=1), sigma_data=0.9, sigma_max=80.0)
    again = build(describe(d), NetworkDenoiser)
    again.load_state_dict(d.state_dict())
    assert describe(again) == describe(d)
    x = torch.randn(3, 2)
    assert torch.equal(again(x, 0.3), d(x, 0.3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NetworkDenoiser(lambda x, c: x), "must be a torch.nn.Module, got a function"),
        (lambda: NetworkDenoiser(MLP(2), sigma_data=0.0), "sigma_data must be positive and finite, got 0.0"),
        (
            lambda: NetworkDenoiser(MLP(2), sigma_min=1.0, sigma_max=0.5),
            "sigma_min < sigma_max < inf, got 1.0 and 0.5",
        ),
        (lambda: NetworkDenoiser(MLP(2))(torch.zeros(3, 2), torch.ones(2)), r"one per sample \(3,\), got shape \(2,\)"),
    ],
)
def test_misuse_is_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()

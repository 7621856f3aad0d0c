"""The estimator of the bound: unbiased, honest about its error, and never above the exact likelihood."""

import math

import pytest
import torch
from bench.estimator_variance import deviations
from tests.gaussian import PROCESSES, exact_denoiser, exact_elbo
from tests.reference import mdm

from undrift import Diffusion, NoiseDiffusion, elbo
from undrift.bound import Bound
from undrift.denoise import MixtureDenoiser
from undrift.measure import dequantise
from undrift.process import CLD, MALDA, PSLD, VP, InformationTimes, LearnedProcess, LogSnrTimes, UniformTimes

FAST = {"VP": VP(), "CLD": CLD(), "PSLD": PSLD(), "MALDA": MALDA()}


def gaussian_data(n: int, seed: int = 0) -> torch.Tensor:
    noise = torch.empty(n, 1, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(seed))
    return mdm.DATA_MEAN + mdm.DATA_STD * noise


def mixture() -> tuple[MixtureDenoiser, torch.distributions.Distribution]:
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    means = torch.tensor([[-1.0, 0.3], [0.8, -0.6], [0.2, 1.1]], dtype=torch.float64)
    covs = torch.tensor([[0.05, 0.02], [0.02, 0.08]], dtype=torch.float64).repeat(3, 1, 1)
    law = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(weights), torch.distributions.MultivariateNormal(means, covs)
    )
    return MixtureDenoiser(weights, means, covs), law


# -- unbiased ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [None, "hybrid", "dsm", "ism"])
@pytest.mark.parametrize("name", ["VP", "CLD"])
def test_every_form_is_unbiased(name, form):
    """Against the bound with its expectations exact, at one point seen 4000 times; within 4 standard errors."""
    diffusion = exact_denoiser(PROCESSES[name])
    x = torch.full((4000, 1), 0.9, dtype=torch.float64)
    found = elbo(diffusion, x, form=form, t_min=0.02, seed=1, batch=4000)
    exact = float(exact_elbo(Bound(diffusion, form, t_min=0.02), (0.9,)))
    mean, error = found.mean()
    assert abs(mean - exact) < 4 * error
    assert 0 < error < 0.5


@pytest.mark.parametrize("times", [UniformTimes(), InformationTimes(), LogSnrTimes(16)])
@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("stratify", [False, True])
def test_every_device_is_unbiased(times, control, stratify):
    diffusion = exact_denoiser(PROCESSES["CLD"])
    x = torch.full((6000, 1), 0.9, dtype=torch.float64)
    found = elbo(diffusion, x, t_min=0.05, times=times, control=control, stratify=stratify, samples=2, batch=6000)
    exact = float(exact_elbo(Bound(diffusion, t_min=0.05), (0.9,)))
    mean, error = found.mean()
    assert abs(mean - exact) < 4 * error


def test_stated_errors_are_the_spread_of_repeats():
    """40 repeats with new data: the mean of the squared stated errors against the variance of the means; the ratio of
    two such has a standard error of about sqrt(2/39) = .23, and neighbouring strata overstate by little."""
    diffusion = exact_denoiser(PROCESSES["CLD"])
    for options in ({}, {"stratify": False, "control": False}):
        runs = [
            elbo(diffusion, gaussian_data(500, s), t_min=1e-2, seed=s, batch=500, **options).mean() for s in range(40)
        ]
        means, errors = (torch.tensor(v, dtype=torch.float64) for v in zip(*runs, strict=True))
        ratio = float(errors.square().mean() / means.var())
        assert 0.4 < ratio < 2.2


def test_sampled_deviation_is_the_computed_one():
    """One draw a point: the deviation over 200 000 points against the benchmark's exact number, within 3 %; the
    draws' kurtosis, 22 without a control variate, puts the standard error of the deviation at 0.5 %."""
    process = PROCESSES["VP"]
    exact = deviations(process, "denoising")
    found = elbo(
        exact_denoiser(process),
        gaussian_data(200_000),
        t_min=1e-3,
        times=InformationTimes(),
        stratify=False,
        batch=200_000,
    )
    # the start's own noise, which the computed numbers leave out, is below 1
    assert float(found.elbo.std()) == pytest.approx(exact["adapted", "+ control"], rel=0.03)
    plain = elbo(
        exact_denoiser(process), gaussian_data(200_000), t_min=1e-3, times=InformationTimes(), stratify=False,
        control=False, batch=200_000,
    )  # fmt: skip
    assert float(plain.elbo.std()) == pytest.approx(exact["adapted", ""], rel=0.03)


@pytest.mark.parametrize("name", list(mdm.ESTIMATOR_STD))
def test_variance_table(name):
    """Sheet 8.2. Its deviations for importance and for the control variate hold to 8 %, what 1e3 sampled draws of
    such tails can tell; its uniform ones are below the exact ones, as samples of a heavy tail are."""
    exact = deviations(PROCESSES[name], "hybrid" if name != "VP" else "denoising")
    uniform, importance, control = mdm.ESTIMATOR_STD[name]
    assert min(abs(exact[d, ""] / importance - 1) for d in ("importance", "adapted")) < 0.08
    assert min(abs(exact[d, "+ control"] / control - 1) for d in ("importance", "adapted")) < 0.09
    assert uniform < exact["uniform", ""] < 1.4 * uniform
    assert exact["uniform", ""] > exact["importance", ""] > exact["importance", "+ control"]
    assert exact["importance", "+ control"] > exact["importance", "+ stratified"]


# -- a bound -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(FAST))
def test_never_above_the_exact_likelihood(name):
    """Gaussian mixture in the plane, exact denoiser: the mean gap is not negative, and no larger than the prior's and
    the decoder's share, here below 2e-2 nats."""
    denoiser, law = mixture()
    torch.manual_seed(0)
    x = law.sample((10_000,))
    bound = elbo(Diffusion(FAST[name], denoiser), x, sigma_min=5e-3, samples=4, batch=10_000)
    gap, error = bound.mean(-law.log_prob(x))
    assert -gap > -3 * error
    assert -gap < 2e-2 + 3 * error
    assert error < 0.05


def test_a_wrong_model_is_further_below():
    denoiser, law = mixture()
    torch.manual_seed(0)
    x = law.sample((2000,))

    def shrunk(z, sigma):
        return 0.9 * denoiser(z, sigma)

    good, bad = (elbo(Diffusion(FAST["CLD"], d), x, sigma_min=0.02, batch=2000).mean()[0] for d in (denoiser, shrunk))
    assert bad < good - 1


def test_terminal_law_can_be_given():
    process = PROCESSES["VP"]
    mean, root = process.kernel(process.horizon)
    x = gaussian_data(50)
    own = elbo(exact_denoiser(process), x, t_min=0.1, terminal=(torch.zeros(1).double(), process.prior()))
    default = elbo(exact_denoiser(process), x, t_min=0.1)
    assert torch.equal(own.elbo, default.elbo)
    other = elbo(exact_denoiser(process), x, t_min=0.1, terminal=(mean * 0.3, root))
    assert float(other.prior.mean()) != float(default.prior.mean())


# -- pixels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", ["center", "logit"])
def test_uniform_pixels_cost_their_bits(transform):
    """Pixels uniform on 16 values: no model can do better than 4 bits, and the exact denoiser of the dequantised law,
    by quadrature, pays 4 within 3 standard errors and the decoder's price at the edges."""
    grid = torch.linspace(0, 1, 4001, dtype=torch.float64)[1:-1]
    u = 16 * grid
    level, frac = u.floor().clamp(max=15), u - u.floor()
    y, log_det = dequantise(level.reshape(-1, 1), transform, bins=16, noise=frac.reshape(-1, 1))
    weights = torch.full_like(log_det, 1 / len(log_det))

    def exact(x, sigma):
        logits = -0.5 * ((x - y.T) / sigma.reshape(-1, 1)) ** 2 + weights.log()
        return torch.softmax(logits, 1) @ y

    pixels = torch.randint(0, 16, (1500, 1), generator=torch.Generator().manual_seed(0))
    x, jacobian = dequantise(pixels, transform, bins=16, generator=torch.Generator().manual_seed(1))
    bits, error = elbo(Diffusion(VP(), exact), x, sigma_min=5e-3, samples=20, batch=1500).bits_per_dim(jacobian, 16)
    assert bits > 4 - 3 * error
    assert bits < 4.03 + 3 * error
    assert error < 0.03


def test_bits_of_a_given_bound():
    """T16: elbo = -1.25 d and log det = 1.6 d make 7.495056735689 bits."""
    found = elbo(exact_denoiser(PROCESSES["VP"]), torch.zeros(4, 1, dtype=torch.float64), t_min=0.1)
    offset = 1.6 - 1.25 - found.elbo
    bits, error = found.bits_per_dim(offset)
    assert bits == pytest.approx(7.495056735689, abs=1e-11)
    assert error == pytest.approx(0.0, abs=1e-12)


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_same_seed_same_bound_and_conditions_are_cut_like_the_points():
    seen = []

    def model(x, sigma, y=None):
        seen.append((len(x), None if y is None else y.tolist()))
        return 0.5 * x

    x, y = gaussian_data(7), torch.arange(7)
    first = elbo(Diffusion(VP(), model), x, batch=3, seed=5, y=y)
    assert seen[0] == (3, [0, 1, 2])
    assert seen[-1] == (1, [6])
    assert first.calls == 14
    assert torch.equal(first.elbo, elbo(Diffusion(VP(), model), x, batch=3, seed=5, y=y).elbo)
    assert "log p(x) >= " in str(first)


def test_a_learned_process_is_bounded_like_any():
    process = LearnedProcess.random(3, 0)
    value = elbo(Diffusion(process, mixture()[0]), mixture()[0].means, sigma_min=0.05)
    assert not value.elbo.requires_grad
    network = torch.nn.Linear(6, 6)
    noise = NoiseDiffusion(process, lambda z, c: network(z.flatten(1)).reshape(z.shape))
    assert math.isfinite(elbo(noise, mixture()[0].means.float(), sigma_min=0.05).mean()[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"t_min": 2.0}, "t_min must lie in"),
        ({"sigma_min": 1e9}, "sigma must lie in"),
        ({"x": torch.zeros(3)}, "must be floating point"),
        ({"x": torch.full((3, 1), math.nan)}, "must be finite"),
    ],
)
def test_refusals(options, message):
    options = {"x": gaussian_data(3), **options}
    with pytest.raises(ValueError, match=message):
        elbo(exact_denoiser(PROCESSES["CLD"]), options.pop("x"), **options)


def test_a_model_that_breaks_down_is_named_with_its_level():
    broken = Diffusion(VP(), lambda x, s: torch.where(s.reshape(-1, 1) > 1, torch.nan, x))
    with pytest.raises(FloatingPointError, match="not finite at noise level sigma = "):
        elbo(broken, gaussian_data(64))

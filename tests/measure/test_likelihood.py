"""Likelihood by the probability flow: published values, exactness on known data, and its estimators' laws."""

import math

import numpy as np
import pytest
import torch

from undrift.denoise import GaussianDenoiser, MixtureDenoiser
from undrift.diffusion import Diffusion, NoiseDiffusion
from undrift.measure import bits_per_dim, dequantise, log_likelihood, transport
from undrift.process import CLD, HOLD, MALDA, PSLD, VE, VP, FlowMatching, LinearClock, LinearProcess, SubVP

SLOW = LinearClock(0.1, 10.0)
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


def cld() -> CLD:
    return CLD(mass=1.0, aux_scale=0.01, clock=SLOW)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(seed))


def mixture(modes: int = 3) -> MixtureDenoiser:
    roots = 0.3 * normal(modes, 2, 2, seed=1) + 0.3 * torch.eye(2, dtype=torch.float64)
    return MixtureDenoiser(torch.arange(1, modes + 1), normal(modes, 2, seed=2), roots @ roots.mT)


def law(process: LinearProcess, data: MixtureDenoiser, t: float) -> torch.distributions.Distribution:
    """Law of z_t flattened (K d)."""
    mean, root = process.kernel(t)
    eye = torch.eye(data.means.shape[1], dtype=torch.float64)
    covs = torch.kron(torch.outer(mean, mean), torch.ones_like(eye)) * data.covs.repeat(1, len(mean), len(mean))
    return torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(data.weights.double()),
        torch.distributions.MultivariateNormal(
            torch.kron(mean.unsqueeze(0), data.means), covs + torch.kron(root @ root.mT, eye)
        ),
    )


def standard_prior(z: torch.Tensor, stationary: torch.Tensor) -> torch.Tensor:
    return torch.distributions.MultivariateNormal(torch.zeros(len(stationary)).double(), stationary).log_prob(z[..., 0])


# -- published and independently computed values: x0 ~ N(.3, .7^2) a coordinate ----------------------------------------


def test_cld_joint_density_has_the_computed_values():
    process = cld()
    start = torch.tensor([[[0.9], [0.05]]], dtype=torch.float64)
    out = transport(Diffusion(process, GaussianDenoiser([0.3], 0.49)), start, 0.0, 1.0, **TIGHT)
    assert out.state.flatten().tolist() == pytest.approx((0.153421111, 0.972024676), abs=1e-7)
    assert float(out.divergence) == pytest.approx(2.657755095, abs=1e-6)
    assert float(standard_prior(out.state, process.stationary) + out.divergence) == pytest.approx(
        0.335693024563, abs=1e-6
    )


def test_vp_has_the_computed_values():
    diffusion = Diffusion(VP(clock=SLOW), GaussianDenoiser([0.3], 0.49))
    x = torch.tensor([[0.9]], dtype=torch.float64)
    assert float(log_likelihood(diffusion, x, **TIGHT).log_likelihood) == pytest.approx(-0.950887985814, abs=1e-7)
    m, root = diffusion.process.kernel(1.0)

    def marginal(z: torch.Tensor) -> torch.Tensor:
        return torch.distributions.Normal(0.3 * m, (root[0, 0] ** 2 + 0.49 * m**2).sqrt()).log_prob(z[:, 0, 0])

    value = log_likelihood(diffusion, x, terminal=marginal, **TIGHT).log_likelihood
    assert float(value) == pytest.approx(-0.929610528, abs=1e-8)


@pytest.mark.parametrize(
    ("process", "bound", "exact"),
    [(cld(), -0.92940711386869, -0.92928958511630), (MALDA(), -0.930342062227 - 3.12858e-6, -0.930342062227)],
    ids=["CLD", "MALDA"],
)
def test_bound_and_importance_limit_over_the_auxiliary_start(process, bound, exact):
    """Gauss-Hermite over v0 in place of draws: the mean of log p(x, v) - log q(v), and the log of its mean exp."""
    aux = process.channels - 1
    nodes, weights = np.polynomial.hermite_e.hermegauss(12 if aux == 1 else 8)
    v = 0.1 * torch.cartesian_prod(*[torch.tensor(nodes)] * aux).reshape(-1, aux)
    w = torch.tensor(weights / weights.sum())
    w = w if aux == 1 else torch.outer(w, w).flatten()
    z = torch.cat([torch.full((len(v), 1), 0.9, dtype=torch.float64), v], 1).unsqueeze(-1)
    out = transport(Diffusion(process, GaussianDenoiser([0.3], 0.49)), z, 0.0, 1.0, rtol=1e-8, atol=1e-8)
    joint = standard_prior(out.state, process.stationary) + out.divergence[:, 0]
    ratio = joint - torch.distributions.Normal(0.0, 0.1).log_prob(v).sum(-1)
    assert float(w @ ratio) == pytest.approx(bound, abs=2e-6)
    assert float((w @ ratio.exp()).log()) == pytest.approx(exact, abs=2e-6)
    assert exact > bound


def test_psld_flow_has_the_computed_values():
    """x0 ~ N(.3, .25): the flow from z(1) = (1, .5), and log p along it from the exact marginal at t = 1."""
    for gamma, mid, end, density in (
        (0.01, (-0.099081315916, 0.451665822470), (-0.407161089814, 0.001127891958), (-1.5675148066, -0.1241684554)),
        (0.0, (-0.102212405694, 0.445625399509), (-0.406998939737, -0.001528280514), (-1.5590899889, -0.1235153607)),
    ):
        diffusion = Diffusion(PSLD(gamma=gamma, nu=4 + gamma), GaussianDenoiser([0.3], 0.25))
        m, root = diffusion.process.kernel(1.0)
        marginal = torch.distributions.MultivariateNormal(0.3 * m, root @ root.mT + 0.25 * torch.outer(m, m))
        z = torch.tensor([[[1.0], [0.5]]], dtype=torch.float64)
        first = marginal.log_prob(z[..., 0])
        if gamma:
            assert float(first) == pytest.approx(-2.1446226741, abs=1e-9)
        begin, log_p = 1.0, first
        for t, state, value in ((0.1, mid, density[0]), (1e-3, end, density[1])):
            out = transport(diffusion, z, begin, t, rtol=1e-9, atol=1e-9)
            begin, z, log_p = t, out.state, log_p - out.divergence
            assert z.flatten().tolist() == pytest.approx(state, abs=1e-7)
            assert float(log_p) == pytest.approx(value, abs=1e-7)


# -- exactness ---------------------------------------------------------------------------------------------------------

PROCESSES = {
    "VP": (VP(), 1e-5),
    "SubVP": (SubVP(), 1e-4),
    "VE": (VE(), 1e-3),
    "FlowMatching": (FlowMatching(), 1e-5),
    "CLD": (cld(), 1e-5),
    "PSLD": (PSLD(), 1e-5),
    "MALDA 3": (MALDA(auxiliaries=3), 1e-4),
    "HOLD": (HOLD(aux_scale=0.1), 1e-3),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_density_of_a_mixture_is_exact(name):
    """With the true law at T the flow returns the true joint density p(x) q(v), whatever K, to 1e-5."""
    (process, t_min), data = PROCESSES[name], mixture()
    x = data.sample(6, torch.Generator().manual_seed(3)).unsqueeze(1)
    root = torch.linalg.cholesky(process.start()[1:, 1:])
    v = torch.einsum("jk,nkd->njd", root, normal(6, process.channels - 1, 2, seed=4))
    out = transport(
        Diffusion(process, data), torch.cat([x, v], 1), 0.0, process.horizon, t_min=t_min, rtol=1e-8, atol=1e-8
    )
    last = law(process, data, process.horizon).log_prob(out.state.flatten(1))
    start = (
        torch.distributions.MultivariateNormal(torch.zeros(len(root)).double(), scale_tril=root) if len(root) else None
    )
    want = data.log_prob(x[:, 0]) + (start.log_prob(v.mT).sum(-1) if start else 0.0)
    torch.testing.assert_close(last + out.divergence[:, 0], want, rtol=0, atol=1e-5)


def test_log_likelihood_of_a_mixture_is_exact():
    process, data = VP(), mixture()
    x = data.sample(6, torch.Generator().manual_seed(3))
    exact = law(process, data, 1.0)
    out = log_likelihood(
        Diffusion(process, data), x, terminal=lambda z: exact.log_prob(z.flatten(1)), rtol=1e-8, atol=1e-8
    )
    torch.testing.assert_close(out.log_likelihood, data.log_prob(x), rtol=0, atol=1e-5)
    assert out.std_error is None
    assert out.dim == 2


def test_noise_network_has_the_divergence_of_its_flow():
    """A linear network makes the flow a matrix: its log determinant is the divergence, and Hutchinson's is unbiased."""
    mixing = 0.2 * normal(4, 4, seed=3)

    def network(z: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return (z.flatten(1) @ mixing.T).unflatten(1, (2, 2))

    diffusion = NoiseDiffusion(PSLD(), network)
    basis = torch.eye(4, dtype=torch.float64).unflatten(1, (2, 2))
    out = transport(diffusion, basis, 0.1, 1.0, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(
        out.divergence[:, 0], torch.linalg.slogdet(out.state.flatten(1)).logabsdet.expand(4), rtol=0, atol=5e-5
    )
    probed = transport(diffusion, basis, 0.1, 1.0, trace="hutchinson", probes=32).divergence
    error = probed.std(-1) / math.sqrt(32)
    assert bool(((probed.mean(-1) - out.divergence[:, 0]).abs() < 4 * error + 1e-4).all())


# -- estimators --------------------------------------------------------------------------------------------------------


def test_hutchinson_is_unbiased_and_knows_its_error():
    """Full covariances, so that probes disagree: each of 4 points within 4 of its own standard errors."""
    diffusion, x = Diffusion(VP(), mixture()), 0.8 * normal(4, 2, seed=5)
    exact = log_likelihood(diffusion, x, trace="exact", rtol=1e-5, atol=1e-5).log_likelihood
    probed = log_likelihood(diffusion, x, trace="hutchinson", probes=64, seed=6, rtol=1e-5, atol=1e-5)
    assert bool((probed.std_error > 1e-4).all())
    assert bool(((probed.log_likelihood - exact).abs() < 4 * probed.std_error + 1e-4).all())
    again = log_likelihood(diffusion, x, trace="hutchinson", probes=64, seed=6, rtol=1e-5, atol=1e-5)
    assert torch.equal(again.log_likelihood, probed.log_likelihood)


def test_importance_weighting_tightens_the_bound():
    """CLD on Gaussian data: the mean over 64 independent points is within 4 SE of the limit, computed by quadrature."""
    diffusion = Diffusion(cld(), GaussianDenoiser([0.3], 0.49))
    x = torch.full((64, 1), 0.9, dtype=torch.float64)
    out = log_likelihood(diffusion, x, samples=32, t_min=1e-4)
    spread = float(out.log_likelihood.std()) / 8
    assert abs(float(out.log_likelihood.mean()) + 0.92928958511630) < 4 * spread + 1e-5
    # and the standard error each point reports is the spread that is seen between points
    assert float(out.std_error.mean()) == pytest.approx(8 * spread, rel=0.5)


# -- bits per dimension ------------------------------------------------------------------------------------------------


def test_bits_per_dim_and_dequantisation_have_the_computed_values():
    pixels = torch.tensor([[128], [0], [255]])
    noise = torch.tensor([[0.5], [0.5], [0.25]], dtype=torch.float64)
    y, log_det = dequantise(pixels, "logit", noise=noise)
    assert y.flatten().tolist() == pytest.approx((0.00703127896807, -2.9080345547392, 2.8902686810523), abs=1e-12)
    assert log_det.tolist() == pytest.approx((1.28094620515759, 2.9089647136976, 2.8930534586589), abs=1e-12)
    assert float(bits_per_dim(torch.tensor(-1.25 * 12).double(), 12, 1.6 * 12)) == pytest.approx(
        7.495056735689, abs=1e-11
    )
    y, log_det = dequantise(pixels, "center", noise=noise)
    assert y[0].item() == pytest.approx(2 * 128.5 / 256 - 1)
    assert log_det.tolist() == pytest.approx([math.log(2)] * 3)


def test_uniform_pixels_cost_eight_bits():
    """Independent uniform pixels under the uniform density on [-1, 1): log p = -d log 2."""
    _, log_det = dequantise(torch.randint(0, 256, (4, 5), generator=torch.Generator().manual_seed(0)))
    assert bits_per_dim(torch.full((4,), -5 * math.log(2)), 5, log_det).tolist() == pytest.approx([8.0] * 4)


# -- errors ------------------------------------------------------------------------------------------------------------


def vp() -> Diffusion:
    return Diffusion(VP(), GaussianDenoiser([0.0], 1.0))


X = torch.zeros(2, 1)
BAD = [
    (lambda: log_likelihood(vp(), X, t_min=2.0), r"t_min must lie in \(0, 1\), got 2"),
    (lambda: log_likelihood(vp(), X, trace="full"), r"trace must be 'exact', 'hutchinson' or 'auto', got 'full'"),
    (lambda: log_likelihood(vp(), X, probes=0), r"probes must be at least 1, got 0"),
    (lambda: log_likelihood(vp(), X, samples=0), r"samples must be at least 1, got 0"),
    (lambda: log_likelihood(vp(), X, samples=4), r"samples = 4 is for auxiliaries, and VP has none"),
    (lambda: log_likelihood(vp(), X, rtol=0.0), r"rtol and atol must be positive, got 0 and 1e-06"),
    (lambda: log_likelihood(vp(), X.long()), r"x must be floating point \(batch, \*event\), got torch.int64"),
    (lambda: log_likelihood(vp(), X / 0), r"x must be finite"),
    (
        lambda: log_likelihood(Diffusion(CLD(aux_scale=0.0), GaussianDenoiser([0.0], 1.0)), X),
        r"auxiliaries of CLD start without spread.*positive start covariance",
    ),
    (lambda: transport(vp(), X.unsqueeze(1), 0.5, 1.5), r"start must lie in \[0, 1\], end in \(0, 1\]; got 0.5, 1.5"),
    (lambda: transport(vp(), X.expand(2, 2).unsqueeze(-1), 0.5, 1.0), r"z must have shape \(batch, 1, \*event\)"),
    (lambda: dequantise(torch.tensor([[256]])), r"whole numbers in 0 ... 255, got 256"),
    (lambda: dequantise(torch.tensor([[0.5]])), r"whole numbers in 0 ... 255, got 0.5"),
    (lambda: dequantise(torch.tensor([[3]]), "sigmoid"), r"'logit' or 'center', got 'sigmoid'"),
    (lambda: bits_per_dim(torch.zeros(1), 0), r"dim and bins must be at least 1, got 0 and 256"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_model_that_breaks_down_is_named_with_its_time():
    def broken(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x * (math.nan if float(sigma[0]) > 0.5 else 0.0)

    with pytest.raises(
        RuntimeError, match=r"could not be solved past t = 0\.\d+.*shares one step size.*raise the tolerances"
    ):
        log_likelihood(Diffusion(VP(), broken), X)

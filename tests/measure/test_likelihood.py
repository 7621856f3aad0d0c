"""Likelihood by the probability flow: published values, exactness on known data, and its estimators' laws."""

import math

import numpy as np
import pytest
import torch

from undrift._linalg import gauss_legendre
from undrift.denoise import GaussianDenoiser, MixtureDenoiser
from undrift.diffusion import Diffusion, NoiseDiffusion
from undrift.measure import bits_per_dim, dequantise, log_likelihood, transport
from undrift.process import CLD, HOLD, MALDA, PSLD, VE, VP, FlowMatching, LinearClock, LinearProcess, Recipe, SubVP

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
    # From the law of the data at T, the flow ends at the law of the data at 0.
    m, root = process.kernel(1.0)
    marginal = torch.distributions.MultivariateNormal(0.3 * m, root @ root.mT + 0.49 * torch.outer(m, m))
    assert float(marginal.log_prob(out.state[..., 0]) + out.divergence) == pytest.approx(0.329036031768, abs=1e-7)


def test_vp_has_the_computed_values():
    diffusion = Diffusion(VP(clock=SLOW), GaussianDenoiser([0.3], 0.49))
    x = torch.tensor([[0.9]], dtype=torch.float64)
    assert float(log_likelihood(diffusion, x, **TIGHT).log_likelihood) == pytest.approx(-0.950887985814, abs=1e-7)
    m, root = diffusion.process.kernel(1.0)

    def marginal(z: torch.Tensor) -> torch.Tensor:
        return torch.distributions.Normal(0.3 * m, (root[0, 0] ** 2 + 0.49 * m**2).sqrt()).log_prob(z[:, 0, 0])

    value = log_likelihood(diffusion, x, terminal=marginal, **TIGHT).log_likelihood
    assert float(value) == pytest.approx(-0.929610528, abs=1e-8)


def bound_and_limit(process: LinearProcess, x: float, points: int) -> tuple[float, float]:
    """E[log w] and log E[w] over v0 ~ N(0, start), w = p(x, v0) / q(v0), by Gauss-Hermite quadrature."""
    aux = process.channels - 1
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(points))
    v = torch.cartesian_prod(*[nodes] * aux).reshape(-1, aux)
    share = torch.cartesian_prod(*[weights / weights.sum()] * aux).reshape(-1, aux).prod(-1)
    scale = process.start().diagonal()[1:].sqrt()
    z = torch.cat([torch.full((len(v), 1), x, dtype=torch.float64), scale * v], 1).unsqueeze(-1)
    out = transport(Diffusion(process, GaussianDenoiser([0.3], 0.49)), z, 0.0, 1.0, t_min=1e-4, **TIGHT)
    log_q = torch.distributions.Normal(torch.zeros(aux).double(), scale).log_prob(scale * v).sum(-1)
    log_w = standard_prior(out.state, process.stationary) + out.divergence[:, 0] - log_q
    return float(share @ log_w), float((share.log() + log_w).logsumexp(0))


@pytest.mark.parametrize(
    ("process", "exact", "gap"),
    [(cld(), -0.92928958511630, 1.1752875e-4), (MALDA(), -0.930342062227, 3.12858e-6)],
    ids=["CLD", "MALDA"],
)
def test_bound_and_importance_limit_over_the_auxiliary_start(process, exact, gap):
    """Quadrature over v0 in place of draws: the mean of log p(x, v) - log q(v), and the log of its mean exp."""
    mean, limit = bound_and_limit(process, 0.9, 12 if process.channels == 2 else 8)
    assert limit == pytest.approx(exact, abs=2e-8)
    assert limit - mean == pytest.approx(gap, rel=2e-6)


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


def random_recipe() -> Recipe:
    """Noise on all three channels, correlated, and correlated auxiliaries at the start."""
    low, skew, spread, start = normal(3, 3, seed=7), normal(3, 3, seed=8), normal(3, 3, seed=9), normal(2, 2, seed=10)
    return Recipe(
        D=low @ low.mT / 3,
        Q=skew - skew.mT,
        S=spread @ spread.mT / 3 + 0.3 * torch.eye(3, dtype=torch.float64),
        clock=SLOW,
        start_cov=0.05 * start @ start.mT + 0.02 * torch.eye(2, dtype=torch.float64),
    )


PROCESSES = {
    "VP": (VP(), 1e-5),
    "SubVP": (SubVP(), 1e-4),
    "VE": (VE(), 1e-3),
    "FlowMatching": (FlowMatching(), 1e-5),
    "CLD": (cld(), 1e-5),
    "PSLD": (PSLD(), 1e-5),
    "MALDA 3": (MALDA(auxiliaries=3), 1e-4),
    "HOLD": (HOLD(aux_scale=0.1), 1e-3),
    "random K = 3": (random_recipe(), 1e-5),
}


GAUSSIAN = ("VP", "CLD", "PSLD", "MALDA 3", "random K = 3")


@pytest.mark.parametrize(("name", "modes"), [*[(n, 3) for n in PROCESSES], *[(n, 1) for n in GAUSSIAN]])
def test_density_is_exact(name, modes):
    """With the true law at T the flow returns the true joint density p(x) q(v), whatever K, to 1e-5."""
    (process, t_min), data = PROCESSES[name], mixture(modes)
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


class Curved:
    """A network whose Jacobian is full and changes from point to point; it counts the backward passes through it."""

    def __init__(self, channels: int, d: int) -> None:
        self.mixing = 0.4 * normal(channels * d, channels * d, seed=11)
        self.backwards = 0

    def __call__(self, z: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        out = torch.tanh(z.flatten(1) @ self.mixing.T).unflatten(1, z.shape[1:])
        if out.requires_grad:
            out.register_hook(self._count)
        return out

    def _count(self, grad: torch.Tensor) -> None:
        self.backwards += 1


def rank_one() -> Recipe:
    """Three channels, one source of noise that reaches all of them."""
    low, skew = torch.tensor([[0.5], [1.0], [-0.7]]).double(), normal(3, 3, seed=8)
    return Recipe(D=low @ low.mT, Q=skew - skew.mT, clock=SLOW)


@pytest.mark.parametrize(
    ("process", "rank"),
    [(VP(), 1), (cld(), 1), (PSLD(), 2), (MALDA(), 2), (HOLD(), 1), (random_recipe(), 3), (rank_one(), 1)],
    ids=["VP", "CLD", "PSLD", "MALDA", "HOLD", "full rank", "rank one"],
)
def test_the_trace_runs_over_coordinates_with_noise(process, rank):
    """tr(GG' J) by the whole K d x K d Jacobian, and by the library in r d backward passes a call."""
    d, (start, end) = 2, (0.3, 0.300001)
    diffusion = NoiseDiffusion(process, Curved(process.channels, d))
    z = normal(3, process.channels, d, seed=12)
    out = transport(diffusion, z, start, end, trace="exact")
    assert diffusion.network.backwards == rank * d * out.calls
    t = torch.tensor([0.5 * (start + end)], dtype=torch.float64)
    middle = 0.5 * (z + out.state)
    jacobian = torch.stack(
        [torch.autograd.functional.jacobian(lambda x: diffusion.score(x[None], t)[0], point) for point in middle]
    )  # (batch, K, d, K, d)
    noise = torch.einsum("ij,njaia->n", process.diffusion(t)[0], jacobian)
    want = (end - start) * (d * process.drift(t)[0].diagonal().sum() - 0.5 * noise)
    torch.testing.assert_close(out.divergence[:, 0], want, rtol=1e-10, atol=0.0)
    assert torch.equal(transport(diffusion, z, start, end).divergence, out.divergence)  # r d <= 64: "auto" is exact


def test_auto_counts_the_coordinates_of_the_trace():
    """40 coordinates of data: 40 with noise under CLD, 80 under PSLD, where one probe takes their place."""
    z = normal(1, 2, 40, seed=13)
    for process, passes in ((cld(), 40), (PSLD(), 1)):
        network = Curved(2, 40)
        out = transport(NoiseDiffusion(process, network), z, 0.5, 0.50001)
        assert network.backwards == passes * out.calls


def test_probes_where_the_noise_is_disagree_less():
    """Linear network, so that the divergence of probe v is v'Nv with one matrix N = int g'J g dt for every point.

    Its variance is sum_{i<j} (N_ij + N_ji)^2 over d coordinates; probes of all K d coordinates would have that of
    int GG'J dt. CLD: the variance measured over 2000 probes is the first, and lies below the second by more than 4 of
    its standard errors.
    """
    mixing = 0.4 * normal(8, 8, seed=14)
    diffusion = NoiseDiffusion(cld(), lambda z, label: (z.flatten(1) @ mixing.T).unflatten(1, (2, 4)))
    process, start, end = diffusion.process, 0.1, 1.0
    nodes, weights = gauss_legendre(32)
    noisy, whole = torch.zeros(4, 4).double(), torch.zeros(8, 8).double()
    for node, weight in zip(nodes, weights, strict=True):
        t = start + (end - start) * node
        state = torch.zeros(1, 2, 4, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda x, t=t: diffusion.score(x, t), state)[0, :, :, 0]
        weight = 0.5 * (end - start) * weight
        noisy += weight * process.diffusion(t)[1, 1] * jacobian[1, :, 1, :]
        whole += weight * torch.einsum("ij,jakb->iakb", process.diffusion(t), jacobian).reshape(8, 8)
    ours, theirs = (float((n + n.mT).triu(1).square().sum()) for n in (noisy, whole))
    z = normal(2000, 2, 4, seed=15)
    probed = transport(diffusion, z, start, end, trace="hutchinson", seed=16, rtol=1e-4, atol=1e-4).divergence
    squares = (probed - probed.mean()).square()
    measured, error = float(squares.mean()), float(squares.std()) / math.sqrt(len(z))
    assert abs(measured - ours) < 4 * error
    assert measured + 4 * error < theirs


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
    """A start of CLD's momenta too wide for the model: E[log w] and log E[w] 0.03 nats apart, by quadrature.

    The mean of 2000 independent points with S samples each rises from the first towards the second; with S = 2000 a
    point is at the second, give or take the standard error it states (bias: half its square, below 1e-4).
    """
    process = CLD(mass=1.0, aux_scale=0.01, clock=LinearClock(0.1, 3.0))
    diffusion = Diffusion(process, GaussianDenoiser([0.3], 0.49))
    bound, limit = bound_and_limit(process, 0.9, 40)
    tolerances = {"rtol": 1e-5, "atol": 1e-5, "t_min": 1e-4}
    means, errors = [], []
    for samples in (1, 3, 27):
        x = torch.full((2000, 1), 0.9, dtype=torch.float64)
        value = log_likelihood(diffusion, x, samples=samples, seed=samples, **tolerances).log_likelihood
        means.append(float(value.mean()))
        errors.append(float(value.std()) / math.sqrt(2000))
    assert abs(means[0] - bound) < 4 * errors[0]
    for i in (1, 2):
        assert means[i] - means[i - 1] > 2 * math.hypot(errors[i], errors[i - 1]), means
        assert means[i] < limit + 4 * errors[i]
    many = log_likelihood(diffusion, x[:32], samples=2000, seed=5, **tolerances)
    pulls = (many.log_likelihood - limit) / many.std_error
    assert bool((pulls.abs() < 4).all())
    # 32 independent pulls: their mean square is 1 with standard error (2 / 32)^(1/2) = 0.25
    assert float(pulls.square().mean()) == pytest.approx(1.0, abs=4 * 0.25)


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

"""Diffusions of functions, mode by mode against scalar ones, in all coordinates and on every grid."""

import dataclasses
import math

import pytest
import torch

from undrift.denoise import (
    FieldGaussian,
    GaussianDenoiser,
    Guided,
    NetworkDenoiser,
    OnFunctions,
    PointEstimate,
    SpectralDenoiser,
)
from undrift.design import Spectrum, propagate
from undrift.diffusion import Diffusion
from undrift.networks import MLP, SpectralNet
from undrift.observe import GaussianNoise, Observation, Points
from undrift.process import CLD, PSLD, VE, VP
from undrift.process.linear import mix
from undrift.sample import SSCS, Ancestral, Exponential, ProbabilityFlow, Rho, sample
from undrift.sample.run import run_plan
from undrift.space import Blurring, Cosine, Fourier, FunctionSpace, Matern, Sine
from undrift.train import Denoising

COORDINATES = ("physical", "coefficients", "whitened")
DATA, NOISE = Matern(2.0, 3.0), Matern(1.0, 3.0)


def in_all_coordinates(basis=None, mean=None):
    basis = basis or Cosine()
    space = FunctionSpace(basis, NOISE if basis.dims == 1 else Matern(1.5, 3.0))
    return [FieldGaussian(space.in_coordinates(c), DATA, mean) for c in COORDINATES]


@pytest.mark.parametrize("process", [VP(), CLD(), PSLD()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("coordinates", COORDINATES)
def test_states_have_the_scalar_law_in_every_mode(process, coordinates):
    n, t = 9, 0.4
    space = FunctionSpace(Cosine(), NOISE, coordinates)
    mean, root = process.kernel(t)
    k = process.channels
    xi = torch.eye(k * n, dtype=torch.float64).reshape(k * n, k, n)
    z = space.coefficients(mix(root, space.colour(xi)))
    cov = torch.einsum("ski,slj->klij", z, z)
    expected = torch.einsum("kl,ij->klij", root @ root.mT, torch.diag(space.variances((n,))))
    torch.testing.assert_close(cov, expected, rtol=0, atol=1e-13)
    # and the score is that of N(0, m mu m' + lambda S) in every mode, C times it where it is preconditioned
    diffusion = Diffusion(process, FieldGaussian(space, DATA))
    z = torch.randn(3, k, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    c, lam, mu = space.coefficients(z), space.variances((n,)), DATA.variances(Cosine(), (n,))
    whole = mu[:, None, None] * mean.unsqueeze(-1) * mean + lam[:, None, None] * (root @ root.mT)
    score = -torch.linalg.solve(whole, c.movedim(1, -1).unsqueeze(-1)).squeeze(-1).movedim(-1, 1)
    found = diffusion.preconditioned_score(z, t)
    torch.testing.assert_close(space.coefficients(found), lam * score, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("basis", [Cosine(), Sine(), Fourier(), Cosine(2)], ids=repr)
def test_one_gaussian_field_serves_every_grid_and_all_coordinates(basis):
    coarse, fine = ((6,), (11,)) if basis.dims == 1 else ((4, 5), (9, 7))
    g = torch.Generator().manual_seed(0)
    kept = tuple(n - 1 for n in coarse)
    c = basis.fit(torch.randn(2, *kept, dtype=torch.float64, generator=g), coarse)
    mean = basis.synthesise(basis.fit(torch.randn(kept, dtype=torch.float64, generator=g), coarse))
    sigma = torch.tensor([0.3, 2.0], dtype=torch.float64)
    physical, *others = in_all_coordinates(basis, mean)
    x = basis.synthesise(c)
    answer = physical(x, sigma)
    for other in others:
        found = other.space.decode(other(other.space.encode(x), sigma))
        torch.testing.assert_close(found, answer, rtol=0, atol=1e-11)
        wrapped = OnFunctions(physical, other.space)
        torch.testing.assert_close(
            other.space.decode(wrapped(other.space.encode(x), sigma)), answer, rtol=0, atol=1e-11
        )
    there = physical(basis.resample(x, fine), sigma)
    torch.testing.assert_close(there, basis.resample(answer, fine), rtol=0, atol=1e-11)
    # in whitened coordinates it is Gaussian data with variances mu / lambda on independent noise
    white = others[1]
    kappa = DATA.variances(basis, coarse) / white.space.variances(coarse)
    plain = GaussianDenoiser(white.space.encode(mean), kappa)
    w = white.space.encode(x)
    torch.testing.assert_close(white(w, sigma), plain(w, sigma), rtol=0, atol=1e-11)


def test_draws_have_the_field_s_law():
    mean = torch.linspace(-1, 1, 8, dtype=torch.float64)
    fields = in_all_coordinates(mean=mean)
    draws = [f.space.decode(f.draw(4000, (8,), torch.Generator().manual_seed(0))) for f in fields]
    torch.testing.assert_close(draws[1], draws[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(draws[2], draws[0], rtol=0, atol=1e-12)
    c = Cosine().analyse(draws[0] - mean)
    mu = DATA.variances(Cosine(), (8,))
    # a sample variance of n normals deviates by sqrt(2/n) = 0.022 of it, a mean by 0.016: five of these
    assert float((c.square().mean(0) / mu - 1).abs().max()) < 0.112
    assert float((c.mean(0) / mu.sqrt()).abs().max()) < 0.08


@pytest.mark.parametrize(
    ("process", "sampler"),
    [
        (VP(), Ancestral(8)),
        (PSLD(), Exponential(8, order=2)),
        (CLD(), SSCS(8)),
        (VP(), ProbabilityFlow(rtol=1e-5, atol=1e-7)),
    ],
    ids=["ancestral", "exponential", "sscs", "flow"],
)
def test_the_same_seed_walks_the_same_path_in_all_coordinates(process, sampler):
    states = []
    for field in in_all_coordinates(mean=torch.ones(6, dtype=torch.float64)):
        walk = sample(Diffusion(process, field), 3, (6,), sampler, seed=1, trajectory=True, dtype=torch.float64)
        states.append(field.space.decode(walk.states if not isinstance(sampler, ProbabilityFlow) else walk.x))
    # the adaptive solver chooses its steps by the error in its coordinates, so its paths agree as far as it is exact
    atol = 1e-3 if isinstance(sampler, ProbabilityFlow) else 1e-10
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=atol)
    torch.testing.assert_close(states[2], states[0], rtol=0, atol=atol)


@pytest.mark.parametrize("process", [VP(), CLD()], ids=lambda p: type(p).__name__)
def test_a_deterministic_sampler_s_law_is_the_exact_one_mode_by_mode(process):
    n, k = 8, process.channels
    field = in_all_coordinates()[0]
    plan = Exponential(6, order=1).plan(process)
    noise = torch.eye(k * n, dtype=torch.float64).reshape(k * n, k, n)  # the walk is linear: its whole law at once
    x = run_plan(Diffusion(process, field), plan, noise, torch.Generator()).x
    c = Cosine().analyse(x)
    lam = field.space.variances((n,))
    law = propagate(plan, Spectrum(DATA.variances(Cosine(), (n,)) / lam))
    torch.testing.assert_close(c.T @ c, torch.diag(lam * law.variance), rtol=0, atol=1e-12)


def distances(sampler, smoothness, n):
    """W2 in L^2 between samples and data, and KL on the last state, of data of smoothness 2."""
    mu = DATA.variances(Cosine(), (n,))
    lam = Matern(smoothness, 3.0).variances(Cosine(), (n,)) if smoothness else torch.ones_like(mu)
    law = propagate(sampler.plan(VE()), Spectrum(mu / lam))
    w2 = (lam * (law.variance.sqrt() - (mu / lam).sqrt()).square()).sum().sqrt()
    return float(w2), float(law.kl)


TABLE = [  # smoothness of the noise, then W2 and KL at n = 32 and 4096: ancestral, DDIM
    (0.0, (0.2255, 0.2589, 3.61, 3.63), (0.127, 0.180, 1.06, 1.07)),
    (1.0, (0.2142, 0.2142, 4.3, 117), (0.1190, 0.1190, 1.18, 35.7)),
    (2.0, (0.2170, 0.2170, 2.27, 290), (0.1208, 0.1208, 0.58, 74)),
    (2.5, (0.2167, 0.2167, 1.64, 161), (0.1207, 0.1207, 0.42, 193)),
]


@pytest.mark.parametrize(("smoothness", "ancestral", "ddim"), TABLE)
def test_the_distance_of_samples_in_l2_is_that_of_the_coarse_grid_and_kl_is_not(smoothness, ancestral, ddim):
    samplers = Ancestral(20, Rho(), "none"), Exponential(20, Rho(), "none", order=1)
    for sampler, (coarse, fine, kl_coarse, kl_fine) in zip(samplers, (ancestral, ddim), strict=True):
        (w2, kl), (w2_fine, kl_there) = (distances(sampler, smoothness, n) for n in (32, 4096))
        assert w2 == pytest.approx(coarse, abs=1.01e-3 if coarse == 0.127 else 1.01e-4)  # digits, the last one loose
        assert w2_fine == pytest.approx(fine, abs=1.01e-3 if coarse == 0.127 else 1.01e-4)
        assert kl == pytest.approx(kl_coarse, rel=0.02)
        assert kl_there == pytest.approx(kl_fine, rel=0.02)
        if smoothness:
            assert w2_fine == pytest.approx(w2, rel=5e-4)  # four digits over a factor of 128 in the grid


def test_the_loss_of_a_function_is_flat_in_the_grid_and_in_the_norm_of_cameron_and_martin_it_is_not():
    # the target of a score at tau = 0.01 is C^(1/2) xi / sqrt(1 - e^-tau), and its mean square tr C / (1 - e^-tau)
    tau = 0.01
    scale = 1 / -math.expm1(-tau)
    for alpha, expected in ((1.0, (99.05, 100.41)), (2.0, (100.50, 100.50))):
        for n, value in zip((32, 512), expected, strict=True):
            space = FunctionSpace(Cosine(), Matern(alpha, 3.0))
            target = space.colour(torch.eye(n, dtype=torch.float64)) * math.sqrt(scale)
            assert float(space.norm2(target).sum()) == pytest.approx(value, abs=5.1e-3)
            cameron_martin = float(space.norm2(target, 1.0).sum())
            assert cameron_martin == pytest.approx({32: 3216, 512: 51456}[n], abs=0.5)


def test_training_s_error_has_the_mean_that_the_exact_denoiser_makes():
    field = in_all_coordinates()[0]
    means = []
    for theta, n in ((0.0, 16), (0.0, 64), (1.0, 16), (1.0, 64)):
        x = field.draw(4000, (n,), torch.Generator().manual_seed(0))
        objective = Denoising("uniform", theta=theta)
        loss, sigma = objective.loss(field, x, torch.Generator().manual_seed(1))
        lam, mu = field.space.variances((n,)), DATA.variances(Cosine(), (n,))
        noise = sigma.unsqueeze(-1).square() * lam
        exact = (lam.pow(-theta) * mu * noise / (mu + noise)).sum(-1) / sigma.square()
        gap = loss - exact
        assert abs(float(gap.mean())) < 4 * float(gap.std()) / math.sqrt(len(gap))
        means.append(float(exact.mean()))
    assert means[1] / means[0] < 1.05
    assert means[3] / means[2] > 1.5


def test_misuse_is_named():
    space = FunctionSpace()
    with pytest.raises(TypeError, match="space must be a FunctionSpace, got a int"):
        FieldGaussian(3, DATA)
    with pytest.raises(ValueError, match="mean must be finite"):
        FieldGaussian(space, DATA, torch.tensor([math.nan]))
    with pytest.raises(TypeError, match="FieldGaussian takes no condition, got y"):
        FieldGaussian(space, DATA)(torch.zeros(1, 4), 1.0, y=0)
    with pytest.raises(TypeError, match="space must be a FunctionSpace"):
        OnFunctions(FieldGaussian(space, DATA), None)
    inner = NetworkDenoiser(MLP(4), space=space.in_coordinates("whitened"))
    with pytest.raises(ValueError, match="works on whitened coordinates itself"):
        OnFunctions(inner, space)
    with pytest.raises(ValueError, match="not trace class in 2 dimensions"):
        FieldGaussian(FunctionSpace(Cosine(2)), NOISE)


def test_spaces_are_equal_by_value_and_a_potential_knows_its_own_again():
    space, again = (FunctionSpace(Cosine(), NOISE) for _ in range(2))
    assert space == again
    assert space != again.in_coordinates("whitened")
    assert space != FunctionSpace(Cosine(), DATA)
    observation = Observation(Points((0.3,)), GaussianNoise(0.1), torch.ones(1))
    guided = Guided(FieldGaussian(space, DATA), PointEstimate(observation, space=again))
    assert guided(torch.ones(2, 5), 0.5).isfinite().all()


def test_what_is_kept_in_inference_mode_serves_training():
    space, places = FunctionSpace(Cosine(), NOISE), Points((0.21, 0.43))
    network = SpectralNet(Cosine(), width=4, modes=4, depth=1)
    x = torch.ones(2, 5)
    with torch.inference_mode():
        space.power(x, -1.0), places(x.double()), network(x, torch.zeros(2))
    point = x.requires_grad_()
    (space.norm2(point, 1.0).sum() + places(point.double()).sum() + network(point, torch.zeros(2)).sum()).backward()
    assert point.grad.isfinite().all()


def test_a_denoiser_on_a_clock_of_modes_is_no_diffusion_on_one_clock():
    space = FunctionSpace(Cosine(), NOISE)
    with pytest.raises(ValueError, match="give it to a ModalDiffusion"):
        Diffusion(VP(), SpectralDenoiser(SpectralNet(width=4, modes=4, depth=1), space, clock=Blurring()))


def test_a_model_of_one_space_is_not_given_another():
    """Else noise of one colour would be removed by a denoiser of another, and dataclasses.replace does just that."""
    space, other = FunctionSpace(spectrum=Matern(2.0)), FunctionSpace(spectrum=Matern(1.5))
    first = Diffusion(VP(), FieldGaussian(space, Matern(3.0)))
    with pytest.raises(ValueError, match="Leave the space out"):
        dataclasses.replace(first, denoiser=FieldGaussian(other, Matern(3.0)))
    moved = dataclasses.replace(first, denoiser=FieldGaussian(other, Matern(3.0)), space=None)
    assert moved.space == other
    with pytest.raises(ValueError, match="Leave the space out"):
        Diffusion(VP(), first.denoiser, space.in_coordinates("whitened"))

"""Posteriors against joints written with SciPy, and against public reference draws by Stein's identities."""

import json
import math
import os
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats
from torch import Tensor

from undrift.config import build, describe
from undrift.density.target import Target
from undrift.density.targets import (
    AutoRegression,
    EightSchools,
    GPRegression,
    KidScore,
    LogisticRegression,
    LowDimGaussMix,
    Mesquite,
    Nes1980,
    OneCompartment,
    Posterior,
    SblrcBlr,
)

POSTERIORS = {
    EightSchools(): "eight_schools-eight_schools_noncentered",
    EightSchools(centered=True): "eight_schools-eight_schools_noncentered",
    KidScore("momiq"): "kidiq-kidscore_momiq",
    KidScore("momhsiq"): "kidiq-kidscore_momhsiq",
    KidScore("interaction"): "kidiq-kidscore_interaction",
    Mesquite(log=True): "mesquite-logmesquite",
    Mesquite(log=False): "mesquite-mesquite",
    Nes1980(): "nes1980-nes",
    SblrcBlr(): "sblrc-blr",
    AutoRegression(): "arK-arK",
    GPRegression(): "gp_pois_regr-gp_regr",
    LowDimGaussMix(): "low_dim_gauss_mix-low_dim_gauss_mix",
    OneCompartment(): "one_comp_mm_elim_abs-one_comp_mm_elim_abs",
}
every = pytest.mark.parametrize("target", POSTERIORS, ids=repr)


def block(name: str) -> dict[str, np.ndarray]:
    """Columns of a data set, read here without the library's loader."""
    path = files("undrift.density") / "data" / "posteriors.npz"
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
        return {k.split(".")[1]: archive[k].astype(float) for k in archive.files if k.startswith(name + ".")}


def around_reference(target: Posterior, n: int = 4) -> Tensor:
    """Points (n, d) near the reference means: half a deviation of scatter, seeded."""
    reference = target.reference()
    rng = np.random.default_rng(0)
    values, at = {}, 0
    for name, shape in target.parameters.shapes.items():
        count = math.prod(shape)
        rows = [reference[label] for label in target.labels[at : at + count]]
        at += count
        scatter = rng.uniform(-0.5, 0.5, size=(n, count))
        flat = np.array([r.mean for r in rows]) + scatter * np.array([r.sd for r in rows])
        if name in ("tau", "sigma", "K_m", "V_m"):
            flat = np.abs(flat) + 1e-3
        values[name] = torch.from_numpy(flat).reshape(n, *shape)
    return target.parameters.unconstrain(values)


# -- the joint densities once more, for one point, on the scale of the parameters --------------------------------------

half_cauchy, half_normal = stats.halfcauchy, stats.halfnorm


def eight_schools(theta, mu, tau):
    y, error = [28, 8, -3, 7, -1, 1, 18, 12], [15, 10, 16, 11, 9, 11, 10, 18]
    prior = stats.norm(0, 5).logpdf(mu) + half_cauchy(0, 5).logpdf(tau) + stats.norm(mu, tau).logpdf(theta).sum()
    return prior + stats.norm(theta, error).logpdf(y).sum()


def kidscore(model, beta, sigma):
    d = block("kidiq")
    mean = {
        "momiq": lambda: beta[0] + beta[1] * d["mom_iq"],
        "momhsiq": lambda: beta[0] + beta[1] * d["mom_hs"] + beta[2] * d["mom_iq"],
        "interaction": lambda: (
            beta[0] + beta[1] * d["mom_hs"] + beta[2] * d["mom_iq"] + beta[3] * d["mom_hs"] * d["mom_iq"]
        ),
    }[model]()
    return stats.norm(mean, sigma).logpdf(d["kid_score"]).sum() + half_cauchy(0, 2.5).logpdf(sigma)


def mesquite(logs, beta, sigma):
    d = block("mesquite")
    f = np.log if logs else np.asarray
    names = ("diam1", "diam2", "canopy_height", "total_height", "density")
    mean = beta[0] + sum(b * f(d[k]) for b, k in zip(beta[1:6], names, strict=True)) + beta[6] * d["group"]
    return stats.norm(mean, sigma).logpdf(f(d["weight"])).sum()


def nes(beta, sigma):
    d = block("nes1980")
    age = np.array([0.0, beta[3], beta[4], beta[5]])[d["age_discrete"].astype(int) - 1]
    mean = beta[0] + beta[1] * d["real_ideo"] + beta[2] * d["race_adj"] + age
    mean = mean + beta[6] * d["educ1"] + beta[7] * d["gender"] + beta[8] * d["income"]
    return stats.norm(mean, sigma).logpdf(d["partyid7"]).sum()


def blr(beta, sigma):
    d = block("sblrc")
    prior = stats.norm(0, 10).logpdf(beta).sum() + stats.norm(0, 10).logpdf(sigma)
    return prior + stats.norm(d["X"] @ beta, sigma).logpdf(d["y"]).sum()


def auto_regression(alpha, beta, sigma):
    y = block("arK")["y"]
    out = stats.norm(0, 10).logpdf([alpha, *beta]).sum() + half_cauchy(0, 2.5).logpdf(sigma)
    means = [alpha + sum(beta[k] * y[t - k - 1] for k in range(5)) for t in range(5, 200)]
    return out + stats.norm(means, sigma).logpdf(y[5:]).sum()


def gp(rho, alpha, sigma):
    d = block("gp_pois_regr")
    kernel = alpha**2 * np.exp(-(np.subtract.outer(d["x"], d["x"]) ** 2) / (2 * rho**2)) + sigma * np.eye(11)
    prior = stats.gamma(25, scale=1 / 4).logpdf(rho)
    prior += half_normal(0, 2).logpdf(alpha) + half_normal(0, 1).logpdf(sigma)
    return prior + stats.multivariate_normal(np.zeros(11), kernel).logpdf(d["y"])


def mixture(mu, sigma, theta):
    y = block("low_dim_gauss_mix")["y"]
    density = theta * stats.norm(mu[0], sigma[0]).pdf(y) + (1 - theta) * stats.norm(mu[1], sigma[1]).pdf(y)
    prior = stats.norm(0, 2).logpdf(mu).sum() + half_normal(0, 2).logpdf(sigma).sum() + stats.beta(5, 5).logpdf(theta)
    return prior + np.log(density).sum()


def concentration(k_a, k_m, v_m):
    def slope(t, c):
        return math.exp(-k_a * t) * 30 * k_a / 2 - v_m / 2 * c / (k_m + c)

    times = np.arange(1, 21) / 2
    return integrate.solve_ivp(slope, (0, 10), [0.0], t_eval=times, method="DOP853", rtol=1e-10, atol=1e-12).y[0]


def compartment(k_a, K_m, V_m, sigma):
    prior = half_cauchy(0, 1).logpdf([k_a, K_m, V_m, sigma]).sum()
    seen = block("one_comp_mm_elim_abs")["C_hat"]
    return prior + stats.lognorm(sigma, scale=concentration(k_a, K_m, V_m)).logpdf(seen).sum()


def joint(target, values):
    match target:
        case EightSchools():
            return eight_schools(**values)
        case KidScore():
            return kidscore(target.model, **values)
        case Mesquite():
            return mesquite(target.log, **values)
        case Nes1980():
            return nes(**values)
        case SblrcBlr():
            return blr(**values)
        case AutoRegression():
            return auto_regression(**values)
        case GPRegression():
            return gp(**values)
        case LowDimGaussMix():
            return mixture(**values)
        case OneCompartment():
            return compartment(**values)


def log_det(target: Posterior, x: Tensor) -> float:
    """log |det d theta / dx| of one point, from autograd's Jacobian of the flattened parameters."""
    jacobian = torch.autograd.functional.jacobian(lambda v: target.parameters.flat(v.unsqueeze(0))[0], x)
    return float(torch.linalg.slogdet(jacobian).logabsdet)


@every
def test_density_by_scipy(target):
    """Within 1e-8; the differential equation's own error, 5e-7 a concentration, makes 1e-4 of some hundred nats."""
    x = around_reference(target)
    named = target.constrain(x)
    for i, value in enumerate(target.log_prob(x).tolist()):
        values = {k: v[i].numpy() if v.ndim > 1 else float(v[i]) for k, v in named.items()}
        expected = joint(target, values) + log_det(target, x[i])
        tolerance = 1e-4 if isinstance(target, OneCompartment) else 1e-8 * max(1.0, abs(expected))
        assert value == pytest.approx(expected, abs=tolerance)


@every
def test_checks_and_precision(target):
    x = around_reference(target, 8)
    target.check(x)
    value, score = target.log_prob_and_score(x)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(target._log_density(leaf).sum(), leaf)
    torch.testing.assert_close(score, gradient, rtol=1e-9, atol=1e-9)
    low, low_score = target.log_prob_and_score(x.float())
    assert low.dtype == low_score.dtype == torch.float32
    torch.testing.assert_close(low.double(), value, rtol=1e-4, atol=1e-2)
    again = build(describe(target), Target)
    assert torch.equal(again.log_prob(x), value)


@every
def test_reference_names_every_scalar(target):
    reference = target.reference()
    assert set(reference) == set(target.labels)
    assert all(0 < r.mcse_mean < 0.2 * r.sd and 0 < r.mcse_sd < 0.2 * r.sd for r in reference.values())


def test_both_parametrisations_are_the_same_posterior():
    """Densities differ by the Jacobian of theta = mu + tau e alone: tau^8."""
    plain, centered = EightSchools(), EightSchools(centered=True)
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    named = plain.constrain(x)
    torch.testing.assert_close(plain.parameters.unconstrain(named), x)
    expected = centered.log_prob(centered.parameters.unconstrain(named)) + 8 * named["tau"].log()
    torch.testing.assert_close(plain.log_prob(x), expected)
    narrow = torch.cat([x[:, :9], x[:, 9:] - 40], -1)
    assert bool(plain.score(narrow).isfinite().all())


def test_evidence_of_eight_schools():
    """Given tau the data is Gaussian with covariance diag(error^2 + tau^2) + 25; a quadrature over tau remains."""
    y, error = np.array([28, 8, -3, 7, -1, 1, 18, 12.0]), np.array([15, 10, 16, 11, 9, 11, 10, 18.0])

    def integrand(u):
        tau = math.tan(u)
        law = stats.multivariate_normal(np.zeros(8), np.diag(error**2 + tau**2) + 25)
        return law.pdf(y) * half_cauchy(0, 5).pdf(tau) / math.cos(u) ** 2

    found = integrate.quad(integrand, 0, math.pi / 2 - 1e-9, epsabs=0, epsrel=1e-9)[0]
    assert math.log(found) == pytest.approx(EightSchools().log_z, abs=1e-6)


@pytest.mark.parametrize("target", [SblrcBlr(), AutoRegression()], ids=repr)
def test_evidence_of_linear_models(target):
    """Given sigma, and coefficients N(0, 10), the data is Gaussian; a quadrature over log sigma remains."""
    if isinstance(target, SblrcBlr):
        x, y, prior = block("sblrc")["X"], block("sblrc")["y"], stats.norm(0, 10)
    else:
        series = block("arK")["y"]
        y, prior = series[5:], half_cauchy(0, 2.5)
        x = np.stack([np.ones(195), *(series[5 - k : 200 - k] for k in range(1, 6))], -1)
    values, vectors = np.linalg.eigh(x @ x.T)
    parts, logs = (vectors.T @ y) ** 2, np.linspace(-4, 4, 2001)
    variance = 100 * np.clip(values, 0, None)[:, None] + np.exp(2 * logs)
    total = -0.5 * (np.log(2 * np.pi * variance) + parts[:, None] / variance).sum(0)
    total += prior.logpdf(np.exp(logs)) + logs
    found = special.logsumexp(total) + math.log(logs[1] - logs[0])
    assert found == pytest.approx(target.log_z, abs=1e-6)


def test_evidence_of_the_gaussian_process():
    """The trapezoid rule over the logs of its three settings."""
    target, axes, cell = GPRegression(), [], 0.0
    for low, high in ((0.2, 3.4), (-9, 4), (-9, 3)):
        axes.append(torch.linspace(low, high, 46, dtype=torch.float64))
        cell += math.log((high - low) / 45)
    found = float(target.log_prob(torch.cartesian_prod(*axes)).logsumexp(0)) + cell
    assert found == pytest.approx(target.log_z, abs=1e-5)


@pytest.mark.parametrize(
    ("k_a", "k_m", "v_m"), [(0.75, 1.0, 0.9), (0.5, 1e-4, 0.14), (1.4, 290.0, 22.0), (1.0, 0.02, 0.2), (0.7, 20.0, 3.0)]
)
def test_differential_equation(k_a, k_m, v_m):
    """Concentrations to a relative 1e-6, over the range of the reference draws."""
    found = OneCompartment().concentration(*(torch.tensor([v], dtype=torch.float64) for v in (k_a, k_m, v_m)))
    np.testing.assert_allclose(found[0], concentration(k_a, k_m, v_m), rtol=1e-6)


def test_far_from_the_data_densities_stay_numbers():
    """The corners of a box that any explorer may start from: no NaN, so that a step there is refused, not fatal."""
    for target in POSTERIORS:
        signs = torch.randint(0, 2, (64, target.dim), generator=torch.Generator().manual_seed(0)).double()
        value, score = target.log_prob_and_score(12 * (2 * signs - 1))
        assert not bool(value.isnan().any()), target
        assert bool(score[value.isfinite()].isfinite().all()), target


# -- reference draws ---------------------------------------------------------------------------------------------------

DATA = os.environ.get("UNDRIFT_DATA")
with_draws = pytest.mark.skipif(
    not DATA, reason="needs the reference draws: set UNDRIFT_DATA to the folder that has them"
)


def stein(x: Tensor, score: Tensor) -> Tensor:
    r"""z-scores of E[score_i] = 0 and E[(x_i - m_i) score_i] = -1, by means of 100 batches of draws.

    They hold for draws of the density whose score it is, and fail for a wrong model, prior or Jacobian.
    """
    moments = torch.cat([score, (x - x.mean(0)) * score + 1], -1)
    batches = moments.reshape(100, -1, moments.shape[-1]).mean(1)
    return batches.mean(0) / (batches.std(0) / 10)


def draws_of(target: Posterior, name: str) -> Tensor:
    with np.load(Path(str(DATA)) / "posteriordb" / "draws" / f"{name}.npz", allow_pickle=False) as archive:
        draws, names = torch.from_numpy(archive["draws"]).flatten(0, 1), [str(n) for n in archive["names"]]
    values = {}
    for key, shape in target.parameters.shapes.items():
        columns = [i for i, n in enumerate(names) if n.split("[")[0] == key]
        values[key] = draws[:, columns].reshape(-1, *shape)
    return target.parameters.unconstrain(values)


@with_draws
@every
def test_reference_draws_have_the_density(target):
    """Stein's identities for every coordinate within 4 standard errors: 178 of them in all, so one fails by chance in a
    hundred runs of new draws; these are fixed."""
    x = draws_of(target, POSTERIORS[target])
    assert len(x) == 10_000
    assert float(stein(x, target.score(x)).abs().max()) < 4
    # What is shipped of the draws: their means and deviations.
    flat, reference = target.parameters.flat(x), target.reference()
    for column, label in zip(flat.T, target.labels, strict=True):
        assert float(column.mean()) == pytest.approx(reference[label].mean, abs=0.01 * reference[label].mcse_mean)
        assert float(column.std()) == pytest.approx(reference[label].sd, rel=1e-6)


@with_draws
def test_steins_identities_notice_a_wrong_density():
    """The same test refuses a missing Jacobian, and a prior with half its scale."""
    target = EightSchools()
    x = draws_of(target, POSTERIORS[next(iter(POSTERIORS))])
    score = target.score(x)
    missing = score.clone()
    missing[:, 9] -= 1
    assert float(stein(x, missing).abs().max()) > 10
    tight = score.clone()
    tight[:, 8] -= 3 * x[:, 8] / 25  # mu ~ N(0, 2.5) instead of N(0, 5)
    assert float(stein(x, tight).abs().max()) > 10


@with_draws
def test_reference_draws_of_german_credit():
    target = LogisticRegression("german")
    path = Path(str(DATA)) / "sampler_targets" / "gt_german_credit_10000.npz"
    with np.load(path, allow_pickle=False) as archive:
        x = torch.from_numpy(archive["samples"])
    assert float(stein(x, target.score(x)).abs().max()) < 4
    reference = target.reference()
    for column, label in zip(x.T, target.labels, strict=True):
        assert float(column.mean()) == pytest.approx(reference[label].mean, abs=0.01 * reference[label].mcse_mean)
        assert float(column.std()) == pytest.approx(reference[label].sd, rel=1e-6)


@with_draws
def test_shipped_data_is_the_published_data():
    folder = Path(str(DATA)) / "posteriordb" / "data"
    for name in ("kidiq", "mesquite", "nes1980", "low_dim_gauss_mix", "sblrc", "arK", "gp_pois_regr"):
        published = json.loads((folder / f"{name}.json").read_text())
        for key, column in block(name).items():
            np.testing.assert_array_equal(column, published[key])

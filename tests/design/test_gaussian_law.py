"""Exact laws of plans: against brute force, closed forms, published orders, and their own derivatives."""

from __future__ import annotations

import itertools
import math

import pytest
import scipy.linalg
import torch
from tests.process.cases import ALL, CATALOG
from tests.sample.affine import law as scalar_law

from undrift import Diffusion
from undrift.design.gaussian import Law, propagate, reference, trajectory
from undrift.design.score_error import Bias, Noise, Relative
from undrift.design.spectrum import Spectrum
from undrift.process import CLD, MALDA, PSLD, VE, VP, GeometricClock, LearnedProcess, LinearClock, PowerClock
from undrift.sample import (
    SSCS,
    Ancestral,
    DPMSolver2M,
    EulerMaruyama,
    Exponential,
    Given,
    Heun,
    LogSigma,
    Uniform,
)
from undrift.sample.run import run_plan

SPECTRUM = Spectrum(torch.tensor([4.0, 0.3, 0.01]), torch.tensor([0.5, -0.7, 0.2]))
POWER_LAW = Spectrum.power_law(64)


def _levels(kind: str, n: int, high: float = 80.0, low: float = 0.002) -> torch.Tensor:
    ramp = torch.linspace(0, 1, n + 1, dtype=torch.float64)
    if kind == "exp":
        return high * (low / high) ** ramp
    return (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7


# -- the recursion -----------------------------------------------------------------------------------------------------

BRUTE = {
    "CLD": (CLD(), Exponential(4, LogSigma(0.05), "none", order=2, stochasticity=0.5), None),
    "PSLD": (PSLD(), SSCS(4, LogSigma(0.05), "none"), Bias(0.05)),
    "PSLD-drift": (PSLD(), Ancestral(3, LogSigma(0.05), "drift", "forward"), Relative(0.1)),
    "MALDA": (MALDA(), EulerMaruyama(5, Uniform(0.02), "none"), None),
    "VE": (VE(), Heun(4, LogSigma(0.05), "none", churn=1.5), None),
    "VP": (VP(), DPMSolver2M(5, LogSigma(0.05), "none"), Noise(lambda s: 0.05 * s / (1 + s))),
}


@pytest.mark.parametrize("name", BRUTE)
def test_samples_have_the_mean_and_covariance_of_the_law(name):
    """All channels and both coordinates of 2e5, the real loop, within 4 standard errors of Gaussian moments."""
    process, sampler, error = BRUTE[name]
    spectrum, n = Spectrum(torch.tensor([1.5, 0.05]), torch.tensor([0.5, -0.3])), 1_000_000
    plan = sampler.plan(process)
    law = propagate(plan, spectrum, error)
    generator = torch.Generator().manual_seed(11)
    denoiser = spectrum.denoiser() if error is None else error.denoiser(spectrum, generator)
    k = process.channels
    noise = torch.empty(n, k, 2, dtype=torch.float64).normal_(generator=generator)
    with torch.no_grad():
        z = run_plan(Diffusion(process, denoiser), plan, noise, generator).states[-1]
    flat = z.movedim(1, 2).flatten(1)  # (n, 2 K), coordinate by coordinate
    mean, cov = law.mean.flatten(), torch.block_diag(*law.cov)
    spread = cov.diagonal()
    assert float(((flat.mean(0) - mean).abs() / (spread / n).sqrt()).max()) < 4
    error_of_cov = ((spread * spread.unsqueeze(-1) + cov.square()) / n).sqrt()
    assert float(((flat.T.cov() - cov).abs() / error_of_cov).max()) < 4


@pytest.mark.parametrize("name", ["VP", "PSLD", "MALDA"])
def test_laws_between_steps_are_those_of_the_states(name):
    """1e5 trajectories: every state that the loop keeps, channel by channel, within 4 standard errors."""
    process, n = CATALOG[name], 100_000
    spectrum = Spectrum(torch.tensor([0.4]), torch.tensor([0.5]))
    for sampler in (Exponential(5, LogSigma(0.05), "none", order=3), Heun(3, LogSigma(0.2), "none", churn=1.0)):
        plan = sampler.plan(process)
        laws = trajectory(plan, spectrum)
        generator = torch.Generator().manual_seed(5)
        noise = torch.empty(n, process.channels, 1, dtype=torch.float64).normal_(generator=generator)
        with torch.no_grad():
            walk = run_plan(Diffusion(process, spectrum.denoiser()), plan, noise, generator, trajectory=True)
        assert [law.time for law in laws] == walk.times.tolist()
        for law, z in zip(laws, walk.states[..., 0], strict=True):
            cov = law.cov[0]
            spread = cov.diagonal()
            assert float(((z.mean(0) - law.mean[0]).abs() / (spread / n).sqrt()).max()) < 4
            error_of_cov = ((spread * spread.unsqueeze(-1) + cov.square()) / n).sqrt()
            assert float(((z.T.cov().reshape(cov.shape) - cov).abs() / error_of_cov).max()) < 4


@pytest.mark.parametrize("name", ["VP", "PSLD", "HOLD", "MALDA-4"])
def test_all_channels_follow_the_recursion_of_one_scalar_at_a_time(name):
    """Against a plain loop over rows for one eigenvalue, all channels of the last state."""
    process = CATALOG[name]
    for sampler in (
        Exponential(6, LogSigma(0.05), "none", order=3, stochasticity=0.3, guard=False),
        Heun(4, LogSigma(0.05), "none", churn=1.0),
        SSCS(5, LogSigma(0.05), "none", order=2),
    ):
        plan = sampler.plan(process)
        law = propagate(plan, SPECTRUM)
        for i in range(3):
            mean, cov = scalar_law(plan, float(SPECTRUM.mean[i]), float(SPECTRUM.variance[i]))
            size = cov.diagonal().sqrt() + mean.abs()
            assert float(((law.mean[i] - mean).abs() / size).max()) < 1e-9
            assert float(((law.cov[i] - cov).abs() / size / size.unsqueeze(-1)).max()) < 1e-9


# -- where it starts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CATALOG)
def test_exact_start_is_the_law_of_the_process_at_the_first_time(name):
    process = CATALOG[name]
    plan = Ancestral(4).plan(process)
    first = trajectory(plan, SPECTRUM, start="exact")[0]
    phi = process.marginal(plan.times[0])[0]
    assert torch.allclose(first.mean, SPECTRUM.mean.unsqueeze(-1) * phi[:, 0], atol=1e-14)
    for i in range(3):
        start = process.start().clone()
        start[0, 0] += SPECTRUM.variance[i]
        noise = process.transition(0.0, plan.times[0])[1]
        exact = phi @ start @ phi.T + noise @ noise.T
        assert torch.allclose(first.cov[i], exact, atol=1e-12 * float(exact.max()))
    assert float(first.kl) == pytest.approx(0.0, abs=1e-13)
    prior = trajectory(plan, SPECTRUM)[0]
    assert torch.allclose(prior.cov[0], process.prior() @ process.prior().T)
    assert bool((prior.mean == 0).all())


@pytest.mark.parametrize("start", ["prior", "exact"])
def test_first_half_step_of_the_splitting_is_part_of_the_start(start):
    """Half of A, the recipe with -Q: P' = e^{Ab} P e^{A'b} + S - e^{Ab} S e^{A'b}, by an independent exponential."""
    process = PSLD(clock=LinearClock(0.1, 8.0))
    plan = SSCS(3, Uniform(0.05)).plan(process)
    times = Uniform(0.05).times(process, 3)
    clock = process.clock.integral(torch.stack([times[0], 0.5 * (times[0] + times[1])]))
    a = process.reversed_matrices()[0]
    phi = torch.from_numpy(scipy.linalg.expm((a * (clock[0] - clock[1])).numpy()))
    mean, cov = reference(plan, SPECTRUM, times[0])
    s = process.stationary
    if start == "prior":
        mean, cov = 0 * mean, s.expand(3, 2, 2)
    law = trajectory(plan, SPECTRUM, start=start)[0]
    assert torch.allclose(law.mean, mean @ phi.T, atol=1e-13)
    assert torch.allclose(law.cov, phi @ (cov - s) @ phi.T + s, atol=1e-13)


def test_stationary_data_stay_stationary_under_the_splitting_without_a_kick():
    """Data N(0, S_00): the score is -S^-1 z, the kick vanishes, and SSCS is exact with any number of steps."""
    process = CLD(aux_scale=1.0)
    plan = SSCS(3, LogSigma(0.05), "none").plan(process)
    data = Spectrum(process.stationary[0, :1])
    for start in ("prior", "exact"):
        law = propagate(plan, data, start=start)
        assert torch.allclose(law.cov[0], process.stationary, atol=1e-12)
        assert float(law.w2) < 1e-12


def test_initial_error_kept_by_odes_and_forgotten_by_sdes():
    """VE from sigma = 80: KL at the start, what an exact flow and an exact reverse SDE make of it, and the limits."""
    ve, v, low = VE(), 80.0**2, 0.002**2
    fine = _levels("exp", 640)
    first = trajectory(Ancestral(20, final="none").table(ve, _levels("exp", 20)), POWER_LAW)[0]
    assert float(first.kl) == pytest.approx(6.363e-7, rel=1e-3)
    assert float(first.kl) < POWER_LAW.second_moment / (2 * v)
    lam, end = POWER_LAW.variance, POWER_LAW.variance + low
    contraction = end / (lam + v)
    ode = float((end.sqrt() - (contraction * v).sqrt()).square().sum().sqrt())
    sde = float((end.sqrt() - (end - contraction**2 * lam).sqrt()).square().sum().sqrt())
    assert (ode, sde) == (pytest.approx(2.42e-3, rel=5e-3), pytest.approx(3.68e-6, rel=5e-3))
    # The samplers themselves: what is left with many steps, and what the start alone changes.
    solver = Exponential(640, final="none", order=3).table(ve, fine)
    assert float(propagate(solver, POWER_LAW).w2) == pytest.approx(ode, rel=1e-3)
    assert float(propagate(solver, POWER_LAW, start="exact").w2) < 1e-5
    walk = Ancestral(640, final="none").table(ve, fine)
    there, here = (propagate(walk, POWER_LAW, start=s).variance.sqrt() for s in ("exact", "prior"))
    # With the prediction held, a step keeps w + (1 - w) v'/v: in 640 steps the exact factor but for parts in N.
    assert float((there - here).square().sum().sqrt()) == pytest.approx(sde, rel=0.05)


# -- samplers with known laws ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_ancestral_walks_keep_the_mean_and_enclose_the_covariance(name):
    """From an exact start the mean is exact at all times; the covariance is too small, or too large, all along."""
    process = ALL[name]
    with torch.no_grad():
        top = 0.99 * min(float(process.sigma(process.horizon)), 10.0)
        times = process.time(top * torch.tensor([1.0, 0.4, 0.1, 0.03], dtype=torch.float64))
    for variance, sign in (("posterior", 1.0), ("forward", -1.0)):
        plan = Ancestral(3, final="none", variance=variance).table(process, times)
        for law in trajectory(plan, SPECTRUM, start="exact"):
            scale = law.exact_cov.diagonal(dim1=-2, dim2=-1).sqrt()
            assert float(((law.mean - law.exact_mean).abs() / (scale + law.exact_mean.abs())).max()) < 1e-10
            gap = sign * (law.exact_cov - law.cov) / scale.unsqueeze(-1) / scale.unsqueeze(-2)
            assert float(torch.linalg.eigvalsh(gap).min()) > -1e-10 * max(1.0, float(gap.abs().max()))
        assert float(gap.diagonal(dim1=-2, dim2=-1).max()) > 1e-3


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("exp", [(17.0, 3.44), (4.43, 1.33), (1.12, 0.592)]), ("rho", [(22.1, 2.54), (6.27, 1.06), (1.64, 0.485)])],
)
def test_ancestral_with_forward_variance_on_ve_holds_the_score(kind, expected):
    """It is Euler-Maruyama in the clock sigma^2 with exact noise; KL and W2 at N = 10, 20, 40."""
    held = VE(PowerClock(80.0, 0.5, 1.0))
    for n, (kl, w2) in zip((10, 20, 40), expected, strict=True):
        levels = _levels(kind, n)
        law = propagate(Ancestral(n, final="none", variance="forward").table(VE(), levels), POWER_LAW)
        euler = propagate(EulerMaruyama(n, Given(levels.tolist(), sigma=True), "none").plan(held), POWER_LAW)
        assert torch.allclose(law.variance, euler.variance, rtol=1e-10)
        assert float(law.kl) == pytest.approx(kl, rel=5e-3)
        assert float(law.w2) == pytest.approx(w2, rel=5e-3)


ORDERS = {  # slopes of KL and W2 between N = 80 and 320 on EDM's levels, from the prior and from the exact start
    "forward": (lambda n: Ancestral(n, final="none", variance="forward"), (-1.99, -1.02), (-2, -1)),
    "ancestral": (lambda n: Ancestral(n, final="none"), (-1.99, -0.97), (-2, -1)),
    "ddim": (lambda n: Exponential(n, final="none", order=1), (-2.01, -0.96), (-2, -1)),
    "heun": (lambda n: Heun(n, final="none"), (-3.94, None), (-4, -2)),
    "2m": (lambda n: DPMSolver2M(n, final="none"), (None, None), (-4, -2)),
}


@pytest.mark.parametrize("name", ORDERS)
def test_orders(name):
    """W2 falls as N^-p and KL as N^-2p; of second-order methods from the prior W2 stops at the initial error."""
    make, published, order = ORDERS[name]
    for start, expected, slack in (("prior", published, 0.0051), ("exact", order, 0.08)):
        coarse, fine = (propagate(make(n).table(VE(), _levels("rho", n)), POWER_LAW, start=start) for n in (80, 320))
        for measure, slope in zip(("kl", "w2"), expected, strict=True):
            if slope is not None:
                found = math.log(getattr(fine, measure) / getattr(coarse, measure)) / math.log(4)
                assert found == pytest.approx(slope, abs=slack)
    if order == (-4, -2):
        prior, exact = (
            propagate(make(320).table(VE(), _levels("rho", 320)), POWER_LAW, start=s) for s in ("prior", "exact")
        )
        assert float(prior.w2) > 5 * float(exact.w2)


@pytest.mark.parametrize("n", [2, 5, 10, 40])
def test_ddim_on_levels_uniform_in_the_angle_is_the_best_and_a_power_of_a_cosine(n):
    """One variance c^2: deviation over exact is prod cos(theta_k - theta_{k+1}), theta = arctan(sigma / c)."""
    c, high, low = 0.5, 80.0, 0.002
    span = math.atan(high / c) - math.atan(low / c)
    theta = torch.linspace(math.atan(high / c), math.atan(low / c), n + 1, dtype=torch.float64)
    one = Spectrum(torch.tensor([c**2]))

    def ratio(levels: torch.Tensor) -> torch.Tensor:
        ends = torch.tensor([high, low], dtype=torch.float64)
        levels = torch.cat([ends[:1], levels[1:-1], ends[1:]])
        law = propagate(Exponential(n, final="none", order=1).table(VE(), levels), one, start="exact")
        return (law.variance / law.exact_cov[:, 0, 0]).sqrt()[0]

    inner = (c * theta.tan()).requires_grad_()
    best = ratio(inner)
    assert float(best.detach()) == pytest.approx(math.cos(span / n) ** n, rel=1e-12)
    (slope,) = torch.autograd.grad(best, inner)
    assert float((slope * inner.detach()).abs().max()) < 1e-10  # stationary in the log levels
    for kind in ("exp", "rho"):
        assert float(ratio(_levels(kind, n))) < float(best.detach()) - 0.01 / n


# -- derivatives -------------------------------------------------------------------------------------------------------

FAMILIES = {
    "euler": EulerMaruyama(3, stochasticity=0.5),
    "euler-drift": EulerMaruyama(3, final="drift"),
    "heun": Heun(3),
    "churn": Heun(3, churn=1.0),
    "sscs": SSCS(3),
    "sscs-2": SSCS(3, order=2),
    "exponential-1": Exponential(3, order=1),
    "exponential-3": Exponential(3, order=3, stochasticity=0.5, guard=False),
    "guarded": Exponential(3, order=2),
    "2m": DPMSolver2M(3),
    "ancestral": Ancestral(3),
    "forward": Ancestral(3, variance="forward", final="drift"),
    "none": Exponential(3, order=2, final="none"),
}
LEVELS = torch.tensor([3.0, 0.9, 0.4, 0.2], dtype=torch.float64)


# The Jacobian between two random directions, a number that any wrong entry changes.
PROJECTED = {"eps": 1e-6, "atol": 1e-6, "rtol": 1e-5, "fast_mode": True, "check_undefined_grad": False}


def _measures(law: Law) -> torch.Tensor:
    return torch.stack([law.kl, law.w2])


@pytest.mark.parametrize("name", FAMILIES)
def test_kl_and_w2_are_differentiable_in_the_times(name):
    """Against finite differences, in log t, the last time held: the data are seen at it, if it is not 0."""
    sampler = FAMILIES[name]
    for process in (VP(), PSLD()):
        log_times = process.time(LEVELS[: sampler.nodes]).log()
        inner = log_times[:-1].clone().requires_grad_()

        def objective(inner, process=process, last=log_times[-1:]):
            return _measures(propagate(sampler.table(process, torch.cat([inner, last]).exp()), SPECTRUM, Relative(0.1)))

        assert torch.autograd.gradcheck(objective, (inner,), **PROJECTED)


@pytest.mark.parametrize("name", FAMILIES)
def test_kl_and_w2_are_differentiable_in_a_published_process(name):
    sampler = FAMILIES[name]
    times = PSLD().time(LEVELS[: sampler.nodes])

    def objective(parameters):
        gamma, extra, aux = parameters
        process = PSLD(gamma=gamma, nu=4 + extra, inverse_mass=4.0, aux_scale=aux)
        return _measures(propagate(sampler.table(process, times), SPECTRUM))

    parameters = torch.tensor([0.05, 0.1, 0.04], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(objective, (parameters,), **PROJECTED)


@pytest.mark.parametrize("name", FAMILIES)
def test_kl_and_w2_are_differentiable_in_a_learned_process(name):
    """Every parameter along one random direction, against central differences, which err by about 1e-9 at this step."""
    sampler = FAMILIES[name]
    process = LearnedProcess(2, clock=LinearClock(0.5, 8.0), learn=("Q", "D", "S", "start", "clock"), knots=3)
    with torch.no_grad():
        times = process.time(LEVELS[: sampler.nodes])
    parameters = list(process.parameters())
    generator = torch.Generator().manual_seed(2)
    along = [torch.empty_like(p).normal_(generator=generator) for p in parameters]

    def objective(step: float) -> torch.Tensor:
        with torch.no_grad():
            for p, d in zip(parameters, along, strict=True):
                p.add_(d, alpha=step)
        value = _measures(propagate(sampler.table(process, times), SPECTRUM))
        with torch.no_grad():
            for p, d in zip(parameters, along, strict=True):
                p.sub_(d, alpha=step)
        return value

    eps = 1e-5
    numeric = ((objective(eps) - objective(-eps)) / (2 * eps)).detach()
    for i, measure in enumerate(_measures(propagate(sampler.table(process, times), SPECTRUM))):
        gradients = torch.autograd.grad(measure, parameters, retain_graph=True)
        exact = sum(float((g * d).sum()) for g, d in zip(gradients, along, strict=True))
        assert exact == pytest.approx(float(numeric[i]), rel=1e-5, abs=1e-7)


def test_w2_has_a_derivative_where_the_law_is_exact_and_where_an_eigenvalue_is_zero():
    spectrum = Spectrum(torch.tensor([1.0, 0.0]))
    times = VP().time(LEVELS[:3]).requires_grad_()
    law = propagate(Ancestral(3).table(VP(), times), spectrum)
    for measure in (law.w2, law.kl):
        assert bool(torch.autograd.grad(measure, times, retain_graph=True)[0].isfinite().all())


# -- the measures ------------------------------------------------------------------------------------------------------


def test_kl_and_w2_are_those_of_the_two_gaussians():
    """Against torch's KL and the general formula of W2 with matrix roots, each eigenvalue as often as its count."""
    count = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    spectrum = Spectrum(SPECTRUM.variance, SPECTRUM.mean, count)
    law = propagate(Heun(4, LogSigma(0.05), "none", churn=1.0).plan(CLD()), spectrum, Bias(0.1))
    repeats = count.long()
    mu, m, p, q = (
        v.repeat_interleave(repeats)
        for v in (law.exact_mean[:, 0], law.mean[:, 0], law.exact_cov[:, 0, 0], law.cov[:, 0, 0])
    )
    normal = torch.distributions.MultivariateNormal
    kl = torch.distributions.kl_divergence(normal(mu, p.diag()), normal(m, q.diag()))
    assert float(law.kl) == pytest.approx(float(kl), rel=1e-12)
    root = torch.from_numpy(scipy.linalg.sqrtm((p.sqrt().diag() @ q.diag() @ p.sqrt().diag()).numpy()))
    w2 = ((mu - m).square().sum() + (p + q).sum() - 2 * root.trace()).sqrt()
    assert float(law.w2) == pytest.approx(float(w2), rel=1e-9)
    assert float(law.kl_modes @ count) == pytest.approx(float(law.kl))
    assert float((law.w2_modes @ count).sqrt()) == pytest.approx(float(law.w2))


def test_kl_of_points():
    """A direction without variance is no error if the samples have none there, and infinite if one law alone has it."""
    times = VP().time(LEVELS[:3])
    with_zero = Spectrum(torch.tensor([1.0, 0.0]), torch.tensor([0.3, -0.6]))
    without = Spectrum(torch.tensor([1.0]), torch.tensor([0.3]))
    plan = Ancestral(3).table(VP(), times)
    assert float(propagate(plan, with_zero).kl) == pytest.approx(float(propagate(plan, without).kl), rel=1e-12)
    assert float(propagate(plan, with_zero, Bias(0.1)).kl) == math.inf
    assert float(propagate(plan, with_zero, Noise(0.1, "equal")).kl) == math.inf
    missed = Law(without, 0.0, torch.zeros(1, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1), torch.ones(1, 1, 1))
    assert float(missed.kl) == math.inf
    assert float(missed.w2) == 1.0


def test_at_time_zero_the_law_is_compared_with_the_data_on_every_clock():
    """Song's VE has gathered sigma_min before t = 0; a final call leaves none of it."""
    process = VE(GeometricClock(0.3, 50.0))
    law = propagate(Exponential(200, LogSigma(0.301), order=3).plan(process), SPECTRUM)
    assert torch.equal(law.exact_cov[:, 0, 0], SPECTRUM.variance)
    assert torch.equal(law.exact_mean[:, 0], SPECTRUM.mean)
    # After an exact walk to sigma, D shrinks lambda + sigma^2 to lambda^2 / (lambda + sigma^2).
    expected = SPECTRUM.variance.square() / (SPECTRUM.variance + 0.301**2)
    assert torch.allclose(law.variance, expected, rtol=2e-3)


def test_a_diverging_plan_says_so():
    law = propagate(EulerMaruyama(400, Given(torch.linspace(1, 1e-9, 401)[:400].tolist())).plan(CLD()), SPECTRUM)
    assert law.finite
    wild = Relative(1e6)
    assert not propagate(Exponential(60, order=2).plan(VE()), SPECTRUM, wild).finite


def test_the_last_law_is_the_last_of_the_trajectory():
    for process, sampler in itertools.product((VP(), PSLD()), (Heun(3), DPMSolver2M(4, final="none"))):
        plan = sampler.plan(process)
        last, laws = propagate(plan, SPECTRUM), trajectory(plan, SPECTRUM)
        assert torch.equal(last.cov, laws[-1].cov)
        assert last.time == laws[-1].time == float(plan.after[-1])
        assert len(laws) == 1 + int(plan.after.isfinite().sum())


def test_unknown_start_is_refused():
    with pytest.raises(ValueError, match="'prior' or 'exact', got 'zero'"):
        propagate(Ancestral(3).plan(VP()), SPECTRUM, start="zero")

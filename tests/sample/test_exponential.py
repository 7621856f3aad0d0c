"""The automatic exponential integrator against hand-derived formulas, and its exactness where it should be exact."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.integrate import solve_ivp

from undrift.process import ALDA, CLD, HOLD, MALDA, PSLD, VE, VP, FlowMatching, PowerClock, Recipe, SubVP
from undrift.sample import Ancestral, DPMSolver2M, EulerMaruyama, Exponential, Given, Heun, LogSigma, Uniform
from undrift.sample.exponential import reverse_flow

ALL = {
    "VP": VP(),
    "SubVP": SubVP(),
    "VE": VE(),
    "FlowMatching": FlowMatching(),
    "CLD": CLD(),
    "PSLD": PSLD(),
    "ALDA": ALDA(),
    "HOLD": HOLD(),
    "MALDA": MALDA(),
    "MALDA4": MALDA(auxiliaries=3),
    "random": Recipe(
        [[0.3, 0.24, -0.17], [0.24, 1.06, 0.27], [-0.17, 0.27, 0.63]],
        [[0.0, -1.6, 1.2], [1.6, 0.0, -0.7], [-1.2, 0.7, 0.0]],
        [[1.0, 0.2, 0.0], [0.2, 0.5, 0.1], [0.0, 0.1, 2.0]],
    ),
}


def psld_covariance(t, gamma, nu, beta=8.0, start=0.04):
    """Hand-derived hybrid kernel covariance of critically damped PSLD (sheet 2.3), t float."""
    lam, delta, b = (nu + gamma) / 4, (nu - gamma) / 2, beta * t
    m = 1 / delta**2
    e = math.exp(-lam * b)
    phi = torch.tensor([[1 + delta * b / 2, delta**2 * b / 2], [-b / 2, 1 - delta * b / 2]], dtype=torch.float64) * e
    s = torch.diag(torch.tensor([1.0, m], dtype=torch.float64))
    start_cov = torch.diag(torch.tensor([0.0, start * m], dtype=torch.float64))
    return s + phi @ (start_cov - s) @ phi.T


@pytest.mark.parametrize(("gamma", "nu"), [(0.0, 4.0), (0.01, 4.01), (0.25, 4.25)])
def test_psi_matches_the_hand_derived_ode_for_cld_and_psld(gamma, nu):
    """dPsi/dt = (F + 1/2 GG' S^-1) Psi with PSLD's closed-form S, by an independent integrator, to 1e-8."""
    f = 4.0 * torch.tensor([[-gamma, ((nu - gamma) / 2) ** 2], [-1.0, -nu]], dtype=torch.float64)
    gg = torch.diag(torch.tensor([8 * gamma, 8 * nu / ((nu - gamma) / 2) ** 2], dtype=torch.float64))

    def velocity(t, y):
        generator = f + 0.5 * gg @ torch.linalg.inv(psld_covariance(t, gamma, nu))
        return (generator @ torch.from_numpy(y).reshape(2, 2)).reshape(-1).numpy()

    times = [1.0, 0.6, 0.3, 0.1, 0.05]
    process = PSLD(gamma=gamma, nu=nu)
    t = torch.tensor(times, dtype=torch.float64)
    got = reverse_flow(process, t).flow.phi
    for i, (a, b) in enumerate(itertools.pairwise(times)):
        y = solve_ivp(
            velocity, (a, b), torch.eye(2).double().reshape(-1).numpy(), method="DOP853", rtol=1e-12, atol=1e-13
        ).y[:, -1]
        assert torch.allclose(got[i], torch.from_numpy(y).reshape(2, 2), atol=1e-8, rtol=1e-8)


def test_gddim_root_of_the_psld_sheet():
    """Section 8.7: R(.5) for R(1e-3) = Cholesky, and R R' = S."""
    process = PSLD()
    start = process.kernel(1e-3)[1]
    r = reverse_flow(process, torch.tensor([1e-3, 0.5], dtype=torch.float64)).flow.phi[0] @ start
    expected = torch.tensor([[0.96688301, 0.22831745], [-0.10946923, 0.48583028]], dtype=torch.float64)
    assert torch.allclose(r, expected, atol=1e-8)
    root = process.kernel(0.5)[1]
    assert torch.allclose(r @ r.T, root @ root.T, atol=1e-11)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_exact_when_the_data_is_one_point(name, order):
    """With x0 known the walk from N(m x0, S) ends in N(m' x0, S'), whatever the steps."""
    process = ALL[name]
    plan = Exponential(4, LogSigma(0.02), "none", order=order).plan(process)
    t_end = torch.as_tensor(float(plan.after[-1]), dtype=torch.float64)
    (m0, root0), (m1, root1) = process.kernel(plan.times[0]), process.kernel(t_end)
    x0 = 0.7
    mean, root = m0 * x0, root0
    for i in range(plan.calls):
        mean = plan.A[i, 0] @ mean + plan.B[i, :, :, 0].sum(0) * x0
        root = plan.A[i, 0] @ root
    scale = root1.diagonal()
    assert torch.allclose(mean / scale, m1 * x0 / scale, atol=1e-6 / float(scale.min()) * 1e-3)
    cov, exact = root @ root.T, root1 @ root1.T
    assert torch.allclose(cov / scale / scale[:, None], exact / scale / scale[:, None], atol=1e-8)


@pytest.mark.parametrize("name", ALL)
def test_stochastic_order_one_is_ancestral_sampling(name):
    """Two routes to the posterior q(z_s | z_t, x0): collocation of the reverse flow, and one QR of square roots."""
    process = ALL[name]
    grid = LogSigma(0.02)
    flow = Exponential(6, grid, order=1, stochasticity=1.0).plan(process)
    exact = Ancestral(6, grid).plan(process)
    assert torch.allclose(flow.A, exact.A, atol=1e-8)
    assert torch.allclose(flow.B, exact.B, atol=1e-8)
    assert torch.allclose(flow.L @ flow.L.mT, exact.L @ exact.L.mT, atol=1e-8)


@pytest.mark.parametrize("name", ALL)
def test_both_ancestral_steps_have_the_true_conditional_mean_and_enclose_the_covariance(name):
    """Gaussian data of variance lam: Cov[z_s | z_t] by conditioning, from below by x0's own variance, from above by
    the second derivative of log p_t, posterior + b mmse b' = forward - Phi^-1 Sigma P^-1 Sigma Phi^-T."""
    process, lam = ALL[name], 0.6
    times = process.time(torch.tensor([0.9, 0.3, 0.06], dtype=torch.float64))
    posterior, forward = (
        Ancestral(2, final="none", variance=v).table(process, times) for v in ("posterior", "forward")
    )
    assert torch.equal(posterior.A, forward.A)
    assert torch.equal(posterior.B, forward.B)
    snr, row = process._weights(times)
    mean, root = process.kernel(times)
    p = root @ root.mT + lam * mean.unsqueeze(-1) * mean.unsqueeze(-2)
    for i in range(2):
        phi, noise = process.transition(times[i + 1], times[i])
        sigma = noise @ noise.T
        joint = p[i + 1] @ phi.T  # Cov(z_s, z_t)
        regression = torch.linalg.solve(p[i], joint.T).T
        b = posterior.B[i, 0, :, 0]
        read = lam / (lam + 1 / snr[i]) * row[i]
        scale = p[i + 1].diagonal().sqrt()
        across = scale.unsqueeze(-1) / p[i].diagonal().sqrt()
        assert torch.allclose((posterior.A[i, 0] + b.unsqueeze(-1) * read) / across, regression / across, atol=1e-8)
        both = scale.unsqueeze(-1) * scale
        true = (p[i + 1] - regression @ joint.T) / both
        mmse = lam / (1 + lam * snr[i])
        below = posterior.L[i] @ posterior.L[i].T + mmse * b.unsqueeze(-1) * b
        back = torch.linalg.solve(phi, sigma)
        above = forward.L[i] @ forward.L[i].T - back @ torch.linalg.solve(p[i], back.T)
        assert torch.allclose(below / both, true, atol=1e-8)
        assert torch.allclose(above / both, true, atol=1e-8)


@pytest.mark.parametrize("name", ALL)
def test_ancestral_with_forward_variance_holds_the_score(name):
    """z' = Phi^-1 (z + Sigma s + Sigma^(1/2) xi) with s = -S^-1 (z - Phi_t z0): Tweedie's formula for z_s in z_t."""
    process = ALL[name]
    times = process.time(torch.tensor([0.9, 0.3, 0.06], dtype=torch.float64))
    plan = Ancestral(2, final="none", variance="forward").table(process, times)
    full, root = process.marginal(times)
    for i in range(2):
        phi, noise = process.transition(times[i + 1], times[i])
        sigma, back = noise @ noise.T, torch.linalg.inv(phi)
        pull = torch.cholesky_solve(sigma, root[i]).T  # Sigma S^-1
        eye = torch.eye(process.channels, dtype=torch.float64)
        size = float(back.abs().max() * (1 + pull.abs().max()))
        assert torch.allclose(plan.A[i, 0], back @ (eye - pull), atol=1e-9 * size)
        assert torch.allclose(plan.B[i, 0], back @ pull @ full[i], atol=1e-9 * size)
        assert torch.allclose(
            plan.L[i] @ plan.L[i].T, back @ sigma @ back.T, atol=1e-9 * float((back @ sigma @ back.T).max())
        )


def test_ancestral_variances_on_ve():
    """v - v' with the score held, v' (v - v') / v with the prediction held."""
    v = torch.tensor([9.0, 1.0, 0.04], dtype=torch.float64)
    forward = Ancestral(2, final="none", variance="forward").table(VE(), v.sqrt())
    posterior = Ancestral(2, final="none").table(VE(), v.sqrt())
    assert torch.allclose(forward.L[:, 0, 0].square(), v[:-1] - v[1:], rtol=1e-12)
    assert torch.allclose(posterior.L[:, 0, 0].square(), v[1:] * (v[:-1] - v[1:]) / v[:-1], rtol=1e-12)
    with pytest.raises(ValueError, match="'posterior' or 'forward'"):
        Ancestral(2, variance="learned")


@pytest.mark.parametrize("stochasticity", [0.0, 0.4, 1.0, 1.5])
def test_every_stochasticity_keeps_the_kernel(stochasticity):
    """Psi S Psi' + noise = S' for the frozen prediction: the marginal given x0 is preserved."""
    for name in ("VP", "PSLD", "MALDA"):
        process = ALL[name]
        plan = Exponential(5, Uniform(0.05), "none", order=1, stochasticity=stochasticity).plan(process)
        ends = torch.cat([plan.times, plan.after[-1:]])
        root = process.kernel(ends)[1]
        s = root @ root.mT
        for i in range(plan.calls):
            got = plan.A[i, 0] @ s[i] @ plan.A[i, 0].T + plan.L[i] @ plan.L[i].T
            assert torch.allclose(got, s[i + 1], atol=1e-10)


def test_order_one_on_vp_is_ddim():
    """z' = alpha' x0 + sigma' (z - alpha x0) / sigma (Song, Meng & Ermon 2021, eq. 12 with eta = 0)."""
    process = VP()
    plan = Exponential(6, Uniform(), "none", order=1).plan(process)
    b = process.clock.integral(torch.cat([plan.times, plan.after[-1:]]))
    alpha, sigma = torch.exp(-b / 2), torch.sqrt(-torch.expm1(-b))
    assert torch.allclose(plan.A[:, 0, 0, 0], sigma[1:] / sigma[:-1], rtol=1e-11)
    assert torch.allclose(plan.B[:, 0, 0, 0], alpha[1:] - alpha[:-1] * sigma[1:] / sigma[:-1], atol=1e-12)


def test_dpm_solver_2m_on_ve():
    """x' = (s'/s) x - (e^-h - 1)[(1 + h/2h_) D_k - (h/2h_) D_{k-1}] (design sheet 5)."""
    levels = [80.0, 20.0, 5.0, 1.0, 0.3]
    plan = DPMSolver2M(4, Given(levels, sigma=True), "none").plan(VE())
    h = -torch.tensor(levels, dtype=torch.float64).log().diff()
    for i in range(4):
        gain = 1 - math.exp(-float(h[i]))
        r = 0.0 if i == 0 else float(h[i] / (2 * h[i - 1]))
        assert float(plan.A[i, 0]) == pytest.approx(math.exp(-float(h[i])), rel=1e-11)
        assert float(plan.B[i, 0]) == pytest.approx(gain * (1 + r), rel=1e-11)
        if i:
            assert float(plan.B[i, 1]) == pytest.approx(-gain * r, rel=1e-11)


def test_order_two_on_ve_is_the_exact_integral_of_a_line():
    """With x0 linear in log sigma the scalar integral has a closed form: e^-h and h give both coefficients."""
    levels = [10.0, 7.0, 5.0]
    plan = Exponential(2, Given(levels, sigma=True), "none", order=2, guard=False).plan(VE())
    h0, h = math.log(10 / 7), math.log(7 / 5)
    # z' = e^-h z + int_0^h e^{-(h - u)} (D_1 + u (D_1 - D_0) / h0) du
    slope = (h - 1 + math.exp(-h)) / h0
    assert float(plan.B[1, 0]) == pytest.approx(1 - math.exp(-h) + slope, rel=1e-11)
    assert float(plan.B[1, 1]) == pytest.approx(-slope, rel=1e-11)


def test_heun_on_ve_is_edm():
    """Karras et al. 2022, algorithm 1, on scalar data: two stages written out by hand."""
    levels = [80.0, 10.0, 1.0, 0.1]
    plan = Heun(4, Given(levels, sigma=True)).plan(VE())
    assert plan.calls == 7

    def denoise(x, s):
        return 0.25 / (0.25 + s**2) * x + s**2 / (0.25 + s**2) * 0.3

    x = 55.0
    for s, s_next in zip(levels, [*levels[1:], 0.0], strict=True):
        d = (x - denoise(x, s)) / s
        euler = x + (s_next - s) * d
        x = euler if s_next == 0 else x + (s_next - s) * 0.5 * (d + (euler - denoise(euler, s_next)) / s_next)
    z, before = 55.0, 0.0
    for i in range(plan.calls):
        prediction = denoise(z, float(plan.times[i]))
        z, before = float(plan.A[i, 0]) * z + float(plan.A[i, 1]) * before + float(plan.B[i, 0]) * prediction, z
    assert z == pytest.approx(x, rel=1e-12)


def test_heun_churn_is_edm_stochastic_sampler():
    """Algorithm 2: gamma = min(S_churn / N, sqrt(2) - 1) inside [S_min, S_max], noise S_noise sqrt(s^2 hat - s^2)."""
    levels = [80.0, 10.0, 1.0, 0.1]
    plan = Heun(4, Given(levels, sigma=True), churn=0.8, churn_min=0.5, churn_max=50.0, churn_noise=1.007).plan(VE())
    gain = 1.2
    assert plan.times.tolist() == pytest.approx([80.0, 10.0, 10.0 * gain, 1.0, 1.0 * gain, 0.1, 0.1], rel=1e-10)
    noises = plan.L[:, 0, 0].tolist()
    expected = [0.0, 1.007 * 10 * math.sqrt(gain**2 - 1), 0.0, 1.007 * math.sqrt(gain**2 - 1), 0.0, 0.0, 0.0]
    assert noises == pytest.approx(expected, rel=1e-9)


def test_scalar_processes_share_ddim_on_one_set_of_noise_levels():
    """In x~ = z / alpha the deterministic order-1 step depends on noise levels alone, for every scalar process."""
    levels = [20.0, 5.0, 1.0, 0.2]
    tables = []
    for process in (VP(), VE(), FlowMatching(), SubVP()):
        plan = Exponential(4, Given(levels, sigma=True), order=1).plan(process)
        alpha = torch.cat([process.kernel(plan.times)[0][:, 0], torch.ones(1, dtype=torch.float64)])
        tables.append((plan.A[:-1, 0, 0, 0] * alpha[:-2] / alpha[1:-1], plan.B[:-1, 0, 0, 0] / alpha[1:-1]))
    for a, b in tables[1:]:
        assert torch.allclose(a, tables[0][0], rtol=1e-9)
        assert torch.allclose(b, tables[0][1], rtol=1e-9)


def test_guard_fades_out_high_orders_on_long_steps_only():
    short = [1.0, 0.8, 0.64, 0.5]
    long = [50.0, 10.0, 2.0, 0.4]
    for levels, same in ((short, "unguarded"), (long, "order 1")):
        grid = Given(levels, sigma=True)
        guarded = Exponential(3, grid, "none", order=3).plan(VP())
        other = Exponential(3, grid, "none", order=3 if same == "unguarded" else 1, guard=False).plan(VP())
        b = torch.zeros_like(guarded.B)
        b[:, : other.B.shape[1]] = other.B
        assert torch.allclose(guarded.B, b, atol=1e-13)


def test_euler_ode_and_sde_share_one_family():
    process = CLD()
    for lam in (0.0, 0.5, 1.0):
        plan = EulerMaruyama(3, Uniform(), stochasticity=lam).plan(process)
        h = float(plan.times[0] - plan.times[1])
        gg = process.diffusion(plan.times[0])
        assert torch.allclose(plan.L[0] @ plan.L[0].T, lam**2 * h * gg, atol=1e-14)


def test_exponential_clock_of_ve_with_power_one_half_needs_no_special_case():
    plan = Exponential(5, LogSigma(0.01), order=3).plan(VE(PowerClock(80.0, 0.5, 1.0)))
    assert bool(torch.isfinite(plan.B).all())
    assert float(plan.times[-1]) == pytest.approx((0.01 / 80) ** 2, rel=1e-9)

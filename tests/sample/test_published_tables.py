"""Samplers on Gaussian data against independently propagated moments (PSLD 8.5-8.6, MDM T18, design space 5)."""

from __future__ import annotations

import math

import pytest
import torch

from undrift.process import ALDA, CLD, MALDA, PSLD, VE, VP, LinearClock, PowerClock
from undrift.sample import SSCS, Ancestral, DPMSolver2M, EulerMaruyama, Exponential, Given, Heun, Quadratic, Uniform

from .affine import data_law, law

CALLS = (50, 100, 250, 500, 1000)
GRIDS = {"US": Uniform(), "QS": Quadratic()}

# x0 ~ N(0.3, 0.25), prior start, eps = 1e-3, the papers' final drift step: (mean, variance) of x per number of calls.
PSLD_TABLE = {
    (0.01, "EM", "US"): [(0.3111777158, 0.2805051477), (0.3055462002, 0.2614883525), (0.3022036459, 0.2539938916),
                         (0.3011016912, 0.2518931497), (0.3005538561, 0.2508985672)],
    (0.01, "EM", "QS"): [(0.3038338557, 0.2661851454), (0.3018751469, 0.2574938850), (0.3007445885, 0.2528408254),
                         (0.3003747715, 0.2513701449), (0.3001911467, 0.2506488126)],
    (0.01, "SSCS", "US"): [(0.3092123504, 0.2288710474), (0.3047047007, 0.2395336485), (0.3019060640, 0.2458170112),
                           (0.3009599973, 0.2478841248), (0.3004848390, 0.2489121703)],
    (0.01, "SSCS", "QS"): [(0.3031518340, 0.2414222465), (0.3016078091, 0.2455721203), (0.3006545368, 0.2481660644),
                           (0.3003324970, 0.2490472609), (0.3001706917, 0.2494908939)],
    (0.0, "EM", "US"): [(0.3113414701, 0.2800617590), (0.3056335495, 0.2613160197), (0.3022400842, 0.2539753658),
                        (0.3011201368, 0.2519242352), (0.3005631016, 0.2509541821)],
    (0.0, "SSCS", "QS"): [(0.3032713393, 0.2409722295), (0.3016675226, 0.2453834585), (0.3006783779, 0.2481376974),
                          (0.3003443738, 0.2490729157), (0.3001765843, 0.2495436711)],
}  # fmt: skip
METHODS = {"EM": EulerMaruyama, "SSCS": SSCS}


@pytest.mark.parametrize(("gamma", "method", "grid"), PSLD_TABLE)
def test_psld_sampler_table(gamma, method, grid):
    process = PSLD(gamma=gamma, nu=4 + gamma)
    for calls, expected in zip(CALLS, PSLD_TABLE[gamma, method, grid], strict=True):
        plan = METHODS[method](calls, GRIDS[grid], "drift").plan(process)
        assert plan.calls == calls
        assert data_law(plan, 0.3, 0.25) == pytest.approx(expected, abs=2e-10)


@pytest.mark.parametrize(
    ("method", "grid", "variance"),
    [
        ("EM", "US", 0.2496585859),
        ("EM", "QS", 0.2488543492),
        ("SSCS", "US", 0.2478186744),
        ("SSCS", "QS", 0.2479658333),
    ],
)
def test_psld_large_gamma_keeps_a_bias_of_the_noise_free_last_step(method, grid, variance):
    plan = METHODS[method](1000, GRIDS[grid], "drift").plan(PSLD(gamma=0.25, nu=4.25))
    assert data_law(plan, 0.3, 0.25)[1] == pytest.approx(variance, abs=2e-10)


MDM = {
    "VP": VP(LinearClock(0.1, 10.0)),
    "CLD": CLD(1.0, 2.0, 0.01, LinearClock(0.1, 10.0)),
    "MALDA": MALDA(),
    "ALDA": ALDA(),
}
# Data N(0, .49), stop at 1e-3 with a noise-free last step: variance of x for 50, 100, 500 steps.
EM_TABLE = {
    ("VP", "US"): [0.4943753637, 0.4930863464, 0.4908038607],
    ("VP", "QS"): [0.5059558207, 0.4978891771, 0.4916061211],
    ("CLD", "US"): [0.5105157109, 0.4998275509, 0.4919035555],
    ("CLD", "QS"): [0.5197918673, 0.5041334240, 0.4927190331],
    ("MALDA", "US"): [0.5228821829, 0.5053049290, 0.4929053840],
    ("ALDA", "US"): [0.7101058880, 0.5721853540, 0.5045127788],
    ("ALDA", "QS"): [1.0543753901],
}
SPLITTING_TABLE = {
    "CLD": [0.4838238891, 0.4869111943, 0.4893835438],
    "MALDA": [0.4817847309, 0.4858901265, 0.4891778528],
    "ALDA": [0.4751754359, 0.4833033454, 0.4898314849],
}


@pytest.mark.parametrize(("name", "grid"), EM_TABLE)
def test_mdm_euler_maruyama_table(name, grid):
    for steps, expected in zip((50, 100, 500), EM_TABLE[name, grid], strict=False):
        plan = EulerMaruyama(steps, GRIDS[grid], "none", noise_last=False).plan(MDM[name])
        assert data_law(plan, 0.0, 0.49)[1] == pytest.approx(expected, abs=2e-10)


@pytest.mark.parametrize("name", SPLITTING_TABLE)
def test_mdm_splitting_table(name):
    for steps, expected in zip((50, 100, 500), SPLITTING_TABLE[name], strict=True):
        plan = SSCS(steps, Uniform(), "none", score_time="midpoint").plan(MDM[name])
        assert data_law(plan, 0.0, 0.49)[1] == pytest.approx(expected, abs=2e-10)


# Design space, section 5: power-law Gaussian (d = 64, lambda_i ~ i^-2, mean variance .25), sigma 80 -> .002.
# (KL, W2) to the data at sigma_min, for N = 10, 20, 40 steps.
N_STEPS = (10, 20, 40)
DESIGN_TABLE = {
    ("frozen", "exp"): [(17.0, 3.44), (4.43, 1.33), (1.12, 0.592)],
    ("frozen", "rho"): [(22.1, 2.54), (6.27, 1.06), (1.64, 0.485)],
    ("ancestral", "exp"): [(16.9, 1.42), (4.42, 0.859), (1.12, 0.476)],
    ("ancestral", "rho"): [(29.0, 1.34), (8.15, 0.816), (2.15, 0.455)],
    ("ddim", "exp"): [(5.40, 0.931), (1.23, 0.498), (0.293, 0.258)],
    ("ddim", "rho"): [(10.1, 0.850), (2.22, 0.452), (0.522, 0.234)],
    ("heun", "exp"): [(1.70, 0.748), (0.0976, 0.159), (0.0055, 0.036)],
    ("heun", "rho"): [(3.30, 0.504), (0.228, 0.113), (0.0134, 0.026)],
    ("2m", "exp"): [(0.066, 0.159), (0.0149, 0.060), (0.0011, 0.015)],
    ("2m", "rho"): [(0.543, 0.487), (0.208, 0.125), (0.0149, 0.027)],
}
DESIGN_METHODS = {
    # Frozen score with exact noise is Euler-Maruyama in the clock sigma^2.
    "frozen": lambda n, g: (VE(PowerClock(80.0, 0.5, 1.0)), EulerMaruyama(n, g, "none")),
    "ancestral": lambda n, g: (VE(), Ancestral(n, g, "none")),
    "ddim": lambda n, g: (VE(), Exponential(n, g, "none", order=1)),
    "heun": lambda n, g: (VE(), Heun(n, g, "none")),
    "2m": lambda n, g: (VE(), DPMSolver2M(n, g, "none")),
}


def _levels(kind: str, n: int) -> list[float]:
    ramp = torch.linspace(0, 1, n + 1, dtype=torch.float64)
    if kind == "exp":
        return (80.0 * (0.002 / 80.0) ** ramp).tolist()
    a, b = 80.0 ** (1 / 7), 0.002 ** (1 / 7)
    return ((a + ramp * (b - a)) ** 7).tolist()


@pytest.mark.parametrize(("method", "kind"), DESIGN_TABLE)
def test_design_sheet_spectrum_table(method, kind):
    spectrum = torch.arange(1, 65, dtype=torch.float64) ** -2.0
    spectrum = spectrum * 0.25 / spectrum.mean()
    for n, (kl, w2) in zip(N_STEPS, DESIGN_TABLE[method, kind], strict=True):
        process, sampler = DESIGN_METHODS[method](n, Given(_levels(kind, n), sigma=True))
        plan = sampler.plan(process)
        assert plan.calls == (2 * n if method == "heun" else n)
        q = law(plan, 0.0, spectrum)[1][:, 0, 0]
        p = spectrum + 0.002**2
        got_kl = float(0.5 * (p / q - 1 + (q / p).log()).sum())  # KL(data, samples)
        got_w2 = float((p.sqrt() - q.sqrt()).square().sum().sqrt())
        # What was computed beforehand has three digits (two for the smallest).
        assert got_kl == pytest.approx(kl, rel=0.012, abs=6e-5)
        assert got_w2 == pytest.approx(w2, rel=0.012, abs=6e-4)


def test_ddim_golden_ratio_on_one_variance():
    """Final over exact deviation is prod cos(theta_k - theta_{k+1}), theta = arctan(sigma / c)."""
    c = 0.5
    tangent = (c * torch.linspace(math.atan(80 / c), math.atan(0.002 / c), 11, dtype=torch.float64).tan()).tolist()
    tangent[0], tangent[-1] = 80.0, 0.002
    for levels, expected in [
        (_levels("rho", 10), 0.7527766246),
        (_levels("exp", 10), 0.7673485925),
        (tangent, 0.8849158552),
    ]:
        plan = Exponential(10, Given(levels, sigma=True), "none", order=1).plan(VE())
        variance = data_law(plan, 0.0, c**2)[1]
        exact = 80.0**2 * (c**2 + 0.002**2) / (c**2 + 80.0**2)
        theta = torch.tensor(levels, dtype=torch.float64).div(c).atan()
        assert math.sqrt(variance / exact) == pytest.approx(expected, abs=1e-10)
        assert math.sqrt(variance / exact) == pytest.approx(float(theta.diff().cos().prod()), rel=1e-12)


def test_one_step_values_of_the_psld_sheet():
    """Section 8.5: one EM step and one SSCS step at t = .5 with the noise prediction held at (.1, .2)."""
    process = PSLD()
    z = torch.tensor([0.5, -0.2], dtype=torch.float64)
    _, root = process.kernel(0.5)
    eps = torch.tensor([0.1, 0.2], dtype=torch.float64)
    score = -torch.linalg.solve(root.T, eps)
    assert score.tolist() == pytest.approx([-0.0985898874454, -0.401619029269], abs=1e-11)
    # The predicted start state that stands for this score.
    phi = process.marginal(0.5)[0]
    start = torch.linalg.solve(phi, z + root @ root.T @ score)
    em = EulerMaruyama(1, Given([0.5, 0.49]), "none").plan(process)
    assert (em.A[0, 0] @ z + em.B[0, 0] @ start).tolist() == pytest.approx([0.53212113, -0.24428985], abs=1e-8)
    assert em.L[0].diagonal().tolist() == pytest.approx([0.028284271, 0.283196045], abs=1e-8)
    ode = EulerMaruyama(1, Given([0.5, 0.49]), "none", stochasticity=0.0).plan(process)
    flow = (ode.A[0, 0] @ z + ode.B[0, 0] @ start - z) / 0.01
    assert flow.tolist() == pytest.approx([3.21605640, -2.81849231], abs=1e-6)


def test_sscs_half_steps_match_the_closed_form():
    """Section 4.3 and 8.5: the automatic half step equals the hand-derived one for PSLD."""
    process = PSLD()
    a, d = process.reversed_matrices()
    from undrift._linalg import ou_transition
    from undrift.process.families import noise_root

    for b, phi, cov in [
        (0.04, [[0.99902119, -0.07684778], [0.01921195, 0.92217341]],
         [4.80261461653e-4, -1.47639547790e-3, 3.70299523129e-2]),
        (0.08, [[0.996566947583, -0.147639547790], [0.036909886948, 0.848927399793]],
         [0.00140495996810, -0.00544935901791, 0.0684682277159]),
    ]:  # fmt: skip
        got, root = ou_transition(a, noise_root(d), torch.tensor(b, dtype=torch.float64))
        assert torch.allclose(got, torch.tensor(phi, dtype=torch.float64), atol=5e-9)
        s = root @ root.T
        assert [float(s[0, 0]), float(s[0, 1]), float(s[1, 1])] == pytest.approx(cov, rel=1e-10)

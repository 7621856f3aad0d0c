"""Rows of the table against dense conditioning in sixty digits, for every family of linear processes."""

import math

import mpmath as mp
import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from tests.process.cases import normal, random_recipe
from tests.reference.gaussian_chain import Step, kernel

from undrift._linalg import as_f64
from undrift.density.controlled.chain import Chain, Rows, contract, langevin, reversal
from undrift.density.controlled.grid import EqualAngles, EqualTimes, GivenTimes, PowerTimes, angle
from undrift.process import (
    ALDA,
    CLD,
    HOLD,
    MALDA,
    PSLD,
    VE,
    VP,
    BrownianBridge,
    ConstantClock,
    CosineClock,
    GeometricClock,
    LearnedProcess,
    LinearClock,
    LinearProcess,
    PowerClock,
    Recipe,
    SubVP,
)

CLOCK = LinearClock(0.1, 10.0)
EPS = 2.2e-16
PROCESSES: dict[str, LinearProcess] = {
    "VP": VP(clock=CLOCK),
    "SubVP": SubVP(clock=CLOCK),
    "VE": VE(clock=PowerClock(sigma_max=8.0, exponent=2.0, horizon=1.5)),
    "BrownianBridge": BrownianBridge(),
    "bridge elsewhere": BrownianBridge(scale=0.8, horizon=3.0),
    "CLD": CLD(clock=CLOCK),
    "PSLD": PSLD(clock=CLOCK),
    "MALDA": MALDA(clock=CLOCK),
    "ALDA": ALDA(clock=CLOCK),
    "HOLD": HOLD(clock=CLOCK),
    "Recipe": random_recipe(5, 3, 2, CLOCK),
    "LearnedProcess": LearnedProcess.random(3, seed=2, clock=CLOCK, learn=("Q", "D", "S", "start")),
}


@pytest.fixture(autouse=True)
def _sixty_digits():
    with mp.workdps(60):
        yield


def chain_of(name: str, steps: int, **settings: str) -> Chain:
    with torch.no_grad():
        return reversal(PROCESSES[name], EqualTimes(), steps, **settings)  # type: ignore[arg-type]


def exact(m: torch.Tensor) -> mp.matrix:
    return mp.matrix(m.tolist())


def size(m: mp.matrix) -> float:
    return max(abs(float(v)) for v in m)


def white(root: torch.Tensor, m: mp.matrix) -> mp.matrix:
    return mp.inverse(exact(root)) * m


def places(chain: Chain) -> list[int]:
    """First, middle and last step; the first of a bridge leads out of a point and has laws of its own."""
    return [int(chain.pinned), chain.steps // 2, chain.steps - 1]


@pytest.mark.parametrize("steps", [4, 1000])
@pytest.mark.parametrize("name", PROCESSES)
def test_kernels_are_the_conditionals_of_the_reference(name, steps):
    """Errors in units of the kernel's own noise, at states of the reference: what reaches a weight."""
    chain = chain_of(name, steps)
    eye = mp.eye(chain.channels)
    for k in places(chain):
        law = Step(PROCESSES[name], chain.times[k + 1].item(), chain.times[k].item())
        f, b = ([part[k] for part in side] for side in (chain.forward, chain.backward))
        # A coefficient of order 1 is a float64 number: no nearer than that, in units of the smallest noise.
        rounded, before = (1e-10 + 200 * EPS / float(part[2].diagonal().min()) for part in (f, b))
        assert size(white(f[2], exact(f[0]) - law.early_on_late) * mp.cholesky(law.late)) < rounded
        assert size(white(f[2], white(f[2], law.cov_early_given_late()).T) - eye) < 1e-8
        assert size(white(b[2], exact(b[0]) - law.phi) * mp.cholesky(law.early)) < before
        assert size(white(b[2], white(b[2], law.noise).T) - eye) < 1e-8
        assert size(white(chain.law[k], white(chain.law[k], law.late).T) - eye) < 1e-10
        assert size(white(chain.law[k + 1], white(chain.law[k + 1], law.early).T) - eye) < 1e-10
        variance = float(law.var_x_given_late()[0, 0])
        assert float(chain.unknown[k]) == pytest.approx(variance, rel=1e-9)
        look = exact(chain.look[k].unsqueeze(0)) - law.x_on_late
        assert size(look * mp.cholesky(law.late)) < 1e-10 * math.sqrt(variance) + 4 * EPS
        gain = law.cov_early_given_late() * mp.inverse(law.early) * law.x_early.T
        assert size(white(f[2], exact(f[1].unsqueeze(-1)) - gain)) < 1e-12
        for root in (f[2], b[2]):
            assert torch.equal(root, root.tril())
            assert bool((root.diagonal() > 0).all())


@pytest.mark.parametrize("name", PROCESSES)
def test_the_gain_moves_the_mean_to_that_of_the_data(name):
    r"""With data N(m, v): A z + b (E[x0|z] - y) / V is the mean of z_{k+1} given z_k, on every channel."""
    chain, process, g = chain_of(name, 10), PROCESSES[name], torch.Generator().manual_seed(0)
    for k in places(chain):
        law = Step(process, chain.times[k + 1].item(), chain.times[k].item(), 0.7, 0.3)
        for _ in range(3):
            z = normal(g, chain.channels)
            control = (float(law.x_given_late(exact(z))[0]) - float(chain.look[k] @ z)) / float(chain.unknown[k])
            mean = chain.forward.mean[k] @ z + chain.forward.gain[k] * control
            target = torch.tensor([float(v) for v in law.early_given_late(exact(z))], dtype=torch.float64)
            torch.testing.assert_close(mean, target, rtol=1e-9, atol=1e-10 * (1 + abs(control)))


@pytest.mark.parametrize("name", [n for n in PROCESSES if not n.startswith(("Brown", "bridge"))])
def test_the_score_gain_is_covariance_times_score(name):
    """The score of z_k gains M' a over the reference's: M the row that reads E[x0 | z]."""
    chain = chain_of(name, 10, gain="score")
    for k in places(chain):
        law = Step(PROCESSES[name], chain.times[k + 1].item(), chain.times[k].item())
        gain = law.cov_early_given_late() * law.x_on_late.T
        assert size(exact(chain.forward.gain[k].unsqueeze(-1)) - gain) < 1e-9 * size(gain)


def test_the_score_gain_of_vp_is_that_of_denoising_diffusion_samplers():
    """z' = sqrt(1 - b^2) z + b^2 u + b xi with u = grad log(p / ref) = (its signal) a."""
    chain, clock = chain_of("VP", 16, gain="score"), CLOCK
    b2 = -torch.expm1(-(clock.integral(chain.times[:-1]) - clock.integral(chain.times[1:])))
    signal = torch.exp(-0.5 * clock.integral(chain.times[:-1]))
    torch.testing.assert_close(chain.forward.mean[:, 0, 0], (1 - b2).sqrt(), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(chain.forward.gain[:, 0], b2 * signal, rtol=1e-12, atol=0.0)
    for rows in (chain.forward, chain.backward):
        torch.testing.assert_close(rows.root[:, 0, 0], b2.sqrt(), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("gain", ["posterior", "score"])
def test_the_bridge_run_back_is_brownian_motion(gain):
    """s^2 T = 1: path integral samplers, z' = z + s^2 h a + s sqrt(h) xi from the origin, exactly Euler's step."""
    bridge = BrownianBridge(scale=math.sqrt(0.2), horizon=5.0)
    chain = reversal(bridge, EqualTimes(), 8, gain=gain)
    h = 5.0 / 8
    assert chain.pinned
    assert float(chain.forward.mean[0, 0, 0]) in (0.0, 1.0)  # multiplies the origin
    ones = torch.ones(8, dtype=torch.float64)
    torch.testing.assert_close(chain.forward.mean[1:, 0, 0], ones[1:], rtol=1e-13, atol=0.0)
    torch.testing.assert_close(chain.forward.gain[:, 0], 0.2 * h * ones, rtol=1e-13, atol=0.0)
    torch.testing.assert_close(chain.forward.root[:, 0, 0], math.sqrt(0.2 * h) * ones, rtol=1e-13, atol=0.0)
    torch.testing.assert_close(chain.look[1:, 0], ones, rtol=1e-13, atol=0.0)
    torch.testing.assert_close(chain.unknown, chain.times / 5.0, rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("name", ["VP", "SubVP", "VE"])
def test_euler_rows(name):
    process, chain = PROCESSES[name], chain_of(name, 6, integrator="euler")
    t, h = chain.times[:-1], -chain.times.diff()
    f, gg = process.drift(t)[:, 0, 0], process.diffusion(t)[:, 0, 0]
    mean, root = process.kernel(t)
    p = mean[:, 0] ** 2 + root[:, 0, 0] ** 2
    torch.testing.assert_close(chain.forward.mean[:, 0, 0], 1 - h * f - h * gg / p, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(chain.forward.gain[:, 0], h * gg * mean[:, 0] / p, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(chain.backward.mean[:, 0, 0], 1 + h * f, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(chain.backward.gain[:, 0], h * gg, rtol=1e-12, atol=0.0)
    for rows in (chain.forward, chain.backward):
        torch.testing.assert_close(rows.root[:, 0, 0], (h * gg).sqrt(), rtol=1e-12, atol=0.0)
    assert torch.equal(chain_of(name, 6, integrator="euler", gain="score").forward.gain, chain.forward.gain)


@pytest.mark.parametrize("name", ["VP", "CLD", "MALDA"])
def test_information_is_twice_the_divergence_of_an_error(name):
    chain = chain_of(name, 5)
    for k in range(5):
        cov = chain.forward.root[k] @ chain.forward.root[k].T
        gain = chain.forward.gain[k]
        assert float(chain.information[k]) == pytest.approx(float(gain @ torch.linalg.solve(cov, gain)), rel=1e-8)


def test_rows_have_the_density_of_a_gaussian():
    g = torch.Generator().manual_seed(3)
    mean, gain, root = normal(g, 2, 3, 3), normal(g, 2, 3), normal(g, 2, 3, 3).tril()
    root.diagonal(dim1=-2, dim2=-1).abs_().add_(0.2)
    z, to, control = normal(g, 2, 3, 5, 4), normal(g, 2, 3, 5, 4), normal(g, 2, 5, 4)
    found = Rows(mean, gain, root).log_prob(slice(0, 2), z, control, to)
    for k in range(2):
        law = torch.distributions.MultivariateNormal(torch.zeros(3, dtype=torch.float64), scale_tril=root[k])
        middle = contract(mean[k], z[k]) + gain[k][:, None, None] * control[k]
        each = law.log_prob((to[k] - middle).movedim(0, -1))
        torch.testing.assert_close(found[k], each.sum(-1), rtol=1e-11, atol=1e-11)


# -- ends --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("grid", [EqualTimes(), EqualAngles(), PowerTimes(3.0)], ids=lambda g: type(g).__name__)
def test_both_ends_are_reached_exactly(name, grid):
    process = PROCESSES[name]
    with torch.no_grad():
        chain = reversal(process, grid, 7)
    assert float(chain.times[0]) == process.horizon
    assert float(chain.times[-1]) == 0.0
    assert bool((chain.times.diff() < 0).all())
    assert float(chain.unknown[-1]) == 0.0
    assert float(chain.label[-1]) == 0.0
    assert chain.look[-1].tolist() == [1.0, *[0.0] * (chain.channels - 1)]
    whole = chain.law[-1] @ chain.law[-1].T
    block = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), chain.end @ chain.end.T)
    torch.testing.assert_close(whole, block, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(
        block,
        process.start().detach() + torch.diag(block.new_tensor([1.0] + [0.0] * (chain.channels - 1))),
        rtol=1e-12,
        atol=1e-15,
    )


def test_equal_angles_are_the_cosine_schedule():
    """For VP the signal is cos(theta), theta evenly spaced from arccos e^(-B/2) to 0."""
    vp = PROCESSES["VP"]
    times = EqualAngles().times(vp, 12)
    theta = torch.linspace(math.acos(math.exp(-0.5 * 5.05)), 0.0, 13, dtype=torch.float64)
    torch.testing.assert_close(vp.kernel(times)[0][:, 0], theta.cos(), rtol=1e-12, atol=0.0)
    for name in ("CLD", "VE", "BrownianBridge"):
        found = angle(PROCESSES[name], EqualAngles().times(PROCESSES[name], 9)).diff()
        torch.testing.assert_close(found, found.mean().expand(9), rtol=1e-9, atol=0.0)
    exploding = VE(clock=GeometricClock(0.01, 50.0))  # noise at t = 0 already: an angle of .01, not 0
    assert bool((EqualAngles().times(exploding, 1000).diff() < 0).all())


def test_the_cosine_clock_starts_at_the_data():
    """Where the published one has lambda(0) = 1.554e-4, and a sampler ends at g_0(sqrt(1 - lambda) x)."""
    offset = 0.008
    late = math.sin(0.5 * math.pi * offset / (1 + offset)) ** 2
    assert late == pytest.approx(1.55409e-4, rel=1e-5)
    # log E[(1 - lambda)^(-d/2) exp(-|x|^2 lambda / (2 (1 - lambda)))] for the funnel in ten dimensions.
    k = late / (1 - late)
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    first = 3 * nodes
    inner = np.exp(-0.5 * k * first**2) * (1 + k * np.exp(first)) ** -4.5
    bias = math.log((weights / weights.sum()) @ inner) - 5 * math.log1p(-late)
    assert bias == pytest.approx(-0.0214524, abs=2e-7)
    chain = reversal(VP(clock=CosineClock()), EqualTimes(), 10)
    assert float(chain.unknown[-1]) == 0.0
    assert float(chain.look[-1, 0]) == 1.0
    assert float(chain.law[-1, 0, 0]) == 1.0


def test_given_times():
    vp = PROCESSES["VP"]
    assert GivenTimes([1.0, 0.3, 0.0]).times(vp, 2).tolist() == [1.0, 0.3, 0.0]
    for values in ([1.0, 0.3, 0.3, 0.0], [0.9, 0.3, 0.1, 0.0], [1.0, 0.5, 0.2, 0.1]):
        with pytest.raises(ValueError, match="must fall strictly from T = 1 to 0"):
            GivenTimes(values).times(vp, 3)
    with pytest.raises(ValueError, match="4 steps need 5 times, got 3"):
        GivenTimes([1.0, 0.3, 0.0]).times(vp, 4)


def test_refusals():
    with pytest.raises(ValueError, match="auxiliaries that start without noise"):
        reversal(PSLD(aux_scale=0.0), EqualTimes(), 4)
    with pytest.raises(ValueError, match="no noise on some channels"):
        reversal(CLD(), EqualTimes(), 4, integrator="euler")
    with pytest.raises(ValueError, match="drift is infinite at T"):
        reversal(BrownianBridge(), EqualTimes(), 4, integrator="euler")
    with pytest.raises(ValueError, match="must be exponential or euler, got 'heun'"):
        reversal(VP(), EqualTimes(), 4, integrator="heun")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="of a recipe process such as VP, CLD or PSLD, got VE"):
        langevin(VE(), EqualTimes(), 4)  # type: ignore[arg-type]
    coupled = Recipe(torch.eye(2), torch.zeros(2, 2), [[1.0, 0.3], [0.3, 1.0]])
    with pytest.raises(ValueError, match="S must not couple the data"):
        langevin(coupled, EqualTimes(), 4)


# -- Langevin dynamics -------------------------------------------------------------------------------------------------


def test_langevin_of_vp_is_langevins_step():
    chain, clock = langevin(VP(clock=CLOCK), EqualTimes(), 6), CLOCK
    h = clock.integral(chain.times[:-1]) - clock.integral(chain.times[1:])
    for rows in (chain.forward, chain.backward):
        torch.testing.assert_close(rows.mean[:, 0, 0], torch.ones_like(h), rtol=1e-13, atol=0.0)
        torch.testing.assert_close(rows.gain[:, 0], h / 2, rtol=1e-13, atol=0.0)
        torch.testing.assert_close(rows.root[:, 0, 0], h.sqrt(), rtol=1e-13, atol=0.0)


@pytest.mark.parametrize(
    "process", [CLD(mass=0.4), PSLD(), MALDA(mass=0.7), ALDA(lipschitz=2.0)], ids=lambda p: type(p).__name__
)
@pytest.mark.parametrize("way", [1.0, -1.0])
def test_langevin_rows_solve_their_equation(process, way):
    """dz = (D + Q)(e_0 a - S_aux^-1 aux) dB + sqrt(2 D) dw by an ODE solver for mean, gain and covariance; back: -Q."""
    chain = langevin(process, EqualTimes(), 3)
    d, q, s = (m.numpy() for m in process.terms())
    n, h = len(d), -float(process.clock.integral(chain.times[:2]).diff())
    m = d + way * q
    inverse = np.zeros_like(s)
    inverse[1:, 1:] = np.linalg.inv(s[1:, 1:])

    def rate(_: float, y: np.ndarray) -> np.ndarray:
        mean, gain, cov = y[: n * n].reshape(n, n), y[n * n : n * n + n], y[n * n + n :].reshape(n, n)
        a = -m @ inverse
        return np.concatenate([(a @ mean).ravel(), a @ gain + m[:, 0], (a @ cov + cov @ a.T + 2 * d).ravel()])

    start = np.concatenate([np.eye(n).ravel(), np.zeros(n + n * n)])
    end = solve_ivp(rate, (0, h), start, method="DOP853", rtol=1e-12, atol=1e-14).y[:, -1]
    rows = chain.forward if way > 0 else chain.backward
    np.testing.assert_allclose(rows.mean[0].numpy(), end[: n * n].reshape(n, n), atol=1e-10)
    np.testing.assert_allclose(rows.gain[0].numpy(), end[n * n : n * n + n], atol=1e-10)
    cov = (rows.root[0] @ rows.root[0].T).numpy()
    np.testing.assert_allclose(cov, end[n * n + n :].reshape(n, n), rtol=1e-9, atol=1e-10)
    law = (chain.law[0] @ chain.law[0].T).numpy()
    np.testing.assert_allclose(law[0], [1.0, *[0.0] * (n - 1)], atol=1e-15)
    np.testing.assert_allclose(law[1:, 1:], s[1:, 1:], atol=1e-14)
    np.testing.assert_allclose((chain.end @ chain.end.T).numpy(), s[1:, 1:], atol=1e-14)


def test_langevin_keeps_its_own_gaussian_in_balance():
    """Underdamped steps at a flat force: N(0, S_aux) F(aux -> aux') = N(0, S_aux) B(aux' -> aux) with -Q."""
    process = CLD(mass=0.4, clock=ConstantClock(3.0))
    chain = langevin(process, EqualTimes(), 5)
    s = process.stationary
    f, b = chain.forward, chain.backward
    for k in (0, 4):
        joint = f.mean[k][1:, 1:] @ s[1:, 1:]
        torch.testing.assert_close(joint, (b.mean[k][1:, 1:] @ s[1:, 1:]).T, rtol=1e-12, atol=0.0)


def test_the_reference_kernel_is_right_for_sub_vp():
    """The one closed form above that is not in a paper: against the marginal 1 - e^-B."""
    phi, cov = kernel(PROCESSES["SubVP"], 0.0, 0.7)
    b = float(CLOCK.integral(as_f64(0.7)))
    assert float(cov[0, 0]) == pytest.approx((1 - math.exp(-b)) ** 2, rel=1e-14)
    assert float(phi[0, 0]) == pytest.approx(math.exp(-b / 2), rel=1e-14)

"""Published and computed kernels of the PSLD and MDM papers' processes."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.process.cases import varying
from tests.reference import mdm, psld
from undrift.process import (
    ALDA,
    CLD,
    HOLD,
    MALDA,
    PSLD,
    VE,
    VP,
    ConstantClock,
    GeometricClock,
    LinearClock,
    LinearProcess,
    PanelProcess,
    Recipe,
    SubVP,
)

LIN = LinearClock(0.1, 10.0)


def f64(values: object) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def close(value: Tensor, expected: object, digits: float = 1e-11) -> None:
    """Relative to each number: the references carry 12 digits or more unless said otherwise."""
    torch.testing.assert_close(value, f64(expected).reshape(value.shape), rtol=digits, atol=1e-14)


def triangle(cov: Tensor) -> Tensor:
    k = cov.shape[-1]
    return torch.stack([cov[i, j] for i in range(k) for j in range(i, k)])


def covariances(process: LinearProcess, t: float) -> tuple[Tensor, Tensor, Tensor]:
    """Phi, and the covariances with the auxiliaries' start left out ("DSM") and in ("HSM")."""
    phi, bare = process.transition(0.0, t)
    _, root = process.marginal(t)
    return phi, bare @ bare.T, root @ root.T


# -- PSLD and its baselines ------------------------------------------------------------------------------------------


def test_psld_kernel_in_full():
    phi, dsm, hsm = covariances(PSLD(), 0.5)
    close(phi, psld.PHI)
    close(torch.linalg.inv(phi), psld.PHI_INVERSE, 1e-10)
    for cov, expected, det, root, inverse in (
        (dsm, psld.DSM_COV, psld.DSM_DET, psld.DSM_ROOT, psld.DSM_INVERSE_ROOT),
        (hsm, psld.HSM_COV, psld.HSM_DET, psld.HSM_ROOT, psld.HSM_INVERSE_ROOT),
    ):
        close(triangle(cov), expected)
        close(torch.linalg.det(cov), det)
        low = torch.linalg.cholesky(cov)
        close(low[[0, 1, 1], [0, 0, 1]], root)
        close(torch.linalg.inv(low).T[[0, 0, 1], [0, 1, 1]], inverse)
    root = PSLD().kernel(0.5)[1]
    close(root[[0, 1, 1], [0, 0, 1]], psld.HSM_ROOT)
    close(torch.linalg.matrix_norm(torch.linalg.inv(root).T, ord=2) ** 2, psld.HSM_INVERSE_NORM2)


@pytest.mark.parametrize("row", psld.KERNELS, ids=lambda r: f"Gamma={r[0]} nu={r[1]} t={r[2]}")
def test_psld_kernels(row):
    gamma, nu, t, phi, dsm, hsm = row
    actual, bare, full = covariances(PSLD(gamma=gamma, nu=nu), t)
    if phi is not None:
        close(actual, phi)
    close(triangle(bare), dsm, 2e-10)
    close(triangle(full), hsm, 2e-10)


@pytest.mark.parametrize("row", psld.DAMPED, ids=["under", "CLD under", "over", "equal frictions"])
def test_psld_off_critical_damping(row):
    gamma, nu, inverse_mass, b, phi, cov = row
    clock = ConstantClock(1.0, horizon=4.0)
    process = PSLD(gamma=gamma, nu=nu, inverse_mass=inverse_mass, aux_scale=0.01 * inverse_mass, clock=clock)
    actual, _, full = covariances(process, b)
    torch.testing.assert_close(actual.flatten(), f64(phi), rtol=0.0, atol=1e-13)  # thirteen decimals are given
    torch.testing.assert_close(triangle(full), f64(cov), rtol=0.0, atol=1e-13)


def test_frictions_swap_with_the_channels():
    """(Gamma, nu) = (4, 0) against (0, 4): the two channels change roles."""
    phi, cov, _ = covariances(PSLD(gamma=4.0, nu=0.0), 0.1)
    other, cov_other, _ = covariances(PSLD(gamma=0.0, nu=4.0), 0.1)
    close(phi.diagonal(), other.diagonal().flip(0))
    close(cov[0, 0], cov_other[1, 1] * 4)
    close(cov[0, 1], -cov_other[0, 1])


def test_cld_is_psld_without_friction_on_the_data():
    t = f64([1e-5, 1e-3, 0.1, 1.0])
    for a, b in zip(CLD().marginal(t), PSLD(gamma=0.0, nu=4.0).marginal(t), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=0.0)


def test_score_multipliers_near_the_data():
    for (gamma, early, late), (_, first_early, first_late) in zip(
        psld.SCORE_MULTIPLIERS, psld.FIRST_MULTIPLIERS, strict=True
    ):
        root = PSLD(gamma=gamma, nu=4 + gamma).kernel([1e-5, 1e-3])[1]
        inverse = torch.linalg.inv(root).mT
        close(inverse[:, 1, 1], [early, late], 1e-5)  # six digits are published
        close(inverse[:, 0, 0], [first_early, first_late], 1e-5)


def test_small_time_laws():
    """Gamma > 0: S_xx -> Gamma B. Gamma = 0: S_xx -> nu B^3 / (12 M), S_mm -> M nu B. Momenta start at rest."""
    t, b = 1e-7, 8e-7
    close(covariances(PSLD(aux_scale=0.0), t)[1][0, 0], 0.01 * b, 1e-5)
    cov = covariances(PSLD(gamma=0.0, nu=4.0, aux_scale=0.0), t)[1]
    close(cov[0, 0], 4 * 4 * b**3 / 12, 1e-5)
    close(cov[1, 1], 0.25 * 4 * b, 1e-5)


def test_terminal_mismatch():
    for gamma, expected in psld.TERMINAL_KL:
        process = PSLD(gamma=gamma, nu=4 + gamma)
        mean, root = process.kernel(1.0)
        cov, s = root @ root.T + 0.25 * torch.outer(mean, mean), process.stationary
        m = 0.3 * mean
        ratio = torch.linalg.solve(s, cov)
        kl = 0.5 * (ratio.trace() - 2 - torch.logdet(ratio) + m @ torch.linalg.solve(s, m))
        assert float(kl) == pytest.approx(expected, rel=6e-3)  # three digits are published


def test_third_order_recipe():
    process = Recipe(D=psld.THIRD_D, Q=psld.THIRD_Q, S=psld.THIRD_S, start_cov=torch.diag(f64([0.01, 0.02])))
    close(process.matrices()[0], psld.THIRD_DRIFT)
    phi, _, cov = covariances(process, 0.7)
    torch.testing.assert_close(phi, f64(psld.THIRD_PHI), rtol=0.0, atol=1e-12)
    torch.testing.assert_close(cov, f64(psld.THIRD_COV), rtol=0.0, atol=1e-12)


def test_baselines():
    times = [row[0] for row in psld.VP]
    for process, mean, std in (
        (VP(), [r[1] for r in psld.VP], [r[2] for r in psld.VP]),
        (SubVP(), [r[1] for r in psld.VP], psld.SUB_VP),
        (VE(clock=GeometricClock()), [1.0, 1.0, 1.0], psld.VE),
    ):
        actual_mean, root = process.kernel(times)
        torch.testing.assert_close(actual_mean[:, 0], f64(mean), rtol=0.0, atol=1e-12)
        close(root[:, 0, 0], std, 1e-11)


# -- MDM ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", mdm.CLD_KERNELS, ids=lambda r: f"t={r[0]}")
def test_cld_kernels(row):
    t, phi, hybrid, dsm = row
    actual, bare, full = covariances(CLD(), t)
    close(actual, phi, 1e-13)
    close(triangle(bare), dsm, 1e-12)
    close(triangle(full), hybrid, 1e-12)


def test_cld_root():
    close(CLD().kernel(0.1)[1][[0, 1, 1], [0, 0, 1]], mdm.CLD_ROOT, 1e-14)


@pytest.mark.parametrize("row", mdm.UNIT_CLD_KERNELS, ids=lambda r: f"t={r[0]}")
def test_unit_mass_cld_kernels(row):
    t, phi, cov = row
    actual, _, full = covariances(CLD(mass=1.0, aux_scale=0.01, clock=LIN), t)
    if phi is not None:
        close(actual, phi, 1e-13)
    close(triangle(full), cov, 1e-12)


def test_loss_weights():
    """L^-1 GG' L^-T has one entry, beta tr(a0 Sigma^-1), where noise enters the last channel only."""
    process = CLD(mass=1.0, aux_scale=0.01, clock=LIN)
    for t, expected in mdm.UNIT_CLD_WEIGHTS:
        root = process.kernel(t)[1]
        weight = torch.linalg.solve(root, torch.linalg.solve(root, process.diffusion(t)).T)
        close(weight[1, 1], expected, 1e-11)
        assert float(weight[0].abs().max()) < 1e-12 * expected


def test_vp_is_the_one_channel_recipe():
    assert float(VP(clock=LIN).kernel(1.0)[0]) == pytest.approx(mdm.VP_MEAN, rel=1e-12)
    recipe = Recipe(D=[[0.5]], Q=[[0.0]], clock=LIN)
    t = f64([1e-6, 0.1, 1.0])
    for a, b in zip(VP(clock=LIN).kernel(t), recipe.kernel(t), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("row", mdm.THIRD_ORDER, ids=lambda r: f"{r[0]} t={r[1]}")
def test_third_order_kernels(row):
    name, t, phi, cov = row
    actual, _, full = covariances({"ALDA": ALDA, "MALDA": MALDA, "HOLD": HOLD}[name](), t)
    if phi is not None:
        torch.testing.assert_close(actual, f64(phi), rtol=0.0, atol=1e-13)
    if name == "HOLD":
        close(actual[0, 0], mdm.HOLD_SIGNAL, 1e-13)
    close(triangle(full), cov, 2e-13)


def test_spectra():
    for name, expected in mdm.SPECTRA.items():
        values = torch.linalg.eigvals({"ALDA": ALDA, "MALDA": MALDA}[name]().matrices()[0])
        found = f64(sorted((round(v.real, 5), abs(v.imag)) for v in values.tolist()))
        torch.testing.assert_close(found, f64(sorted(expected)), rtol=0.0, atol=6e-6)
    shifted = HOLD().matrices()[0] + math.sqrt(3) * torch.eye(3, dtype=torch.float64)
    assert float(torch.linalg.matrix_power(shifted, 3).abs().max()) < 1e-13


@pytest.mark.parametrize("name", mdm.KL_TO_PRIOR)
def test_distance_to_the_prior(name):
    processes = {
        "VP": VP(clock=LIN),
        "CLD": CLD(mass=1.0, aux_scale=0.01, clock=LIN),
        "MALDA": MALDA(),
        "ALDA": ALDA(),
        "HOLD": HOLD(),
    }
    mean, root = processes[name].kernel(1.0)
    cov, m = root @ root.T, 2 * mean
    kl = 0.5 * (cov.trace() - cov.shape[0] - torch.logdet(cov) + m @ m)
    assert float(kl) == pytest.approx(mdm.KL_TO_PRIOR[name], rel=2e-4)  # four or five digits are published


def four() -> Recipe:
    return Recipe(
        D=mdm.FOUR_D,
        Q=mdm.FOUR_Q,
        S=torch.diag(f64(mdm.FOUR_S)),
        clock=LinearClock(0.1, 2.0),
        start_cov=torch.diag(f64(mdm.FOUR_START)),
    )


def test_three_auxiliaries():
    process = four()
    phi, _, _ = covariances(process, 0.4)
    torch.testing.assert_close(phi[:2], f64(mdm.FOUR_PHI_ROWS), rtol=0.0, atol=1e-13)
    end = covariances(process, 1.0)[0]
    for (i, j), expected in mdm.FOUR_PHI_END.items():
        close(end[i, j], expected, 1e-11)
    for t, diagonal in mdm.FOUR_COV_DIAGONAL.items():
        cov = covariances(process, t)[2]
        close(cov.diagonal(), diagonal, 1e-13)
        for (i, j), expected in mdm.FOUR_COV_OFF[t].items():
            close(cov[i, j], expected, 1e-12)
    noise = 2 * process.matrices()[1]
    for t, expected in mdm.FOUR_LOGDET.items():
        cov = covariances(process, t)[2]
        close(torch.logdet(cov), expected, 1e-12)
        close(torch.linalg.solve(cov, noise).trace(), mdm.FOUR_TRACE[t], 1e-11)
    close(0.5 * (f64(mdm.FOUR_LOGDET[1.0]) - mdm.FOUR_LOGDET[0.05]), mdm.FOUR_ENTROPY, 1e-12)


def test_entropy_is_gained_at_the_rate_of_the_divergence():
    """d/dt (logdet S)/2 = tr A + tr(GG' S^-1)/2 (sheet T5), by quadrature."""
    process = four()
    nodes, weights = (f64(x) for x in np.polynomial.legendre.leggauss(40))
    t = 0.525 + 0.475 * nodes
    root = process.kernel(t)[1]
    whitened = torch.linalg.solve(root @ root.mT, process.diffusion(t)).diagonal(dim1=-2, dim2=-1).sum(-1)
    rate = 0.5 * whitened + process.drift(t).diagonal(dim1=-2, dim2=-1).sum(-1)
    close(0.475 * (weights * rate).sum(), mdm.FOUR_ENTROPY, 1e-10)


def test_rotated_auxiliaries_change_nothing_observable():
    process = MALDA(clock=ConstantClock(1.0, horizon=5.0))
    turn = torch.eye(3, dtype=torch.float64)
    turn[1:, 1:] = f64([[math.cos(0.7), -math.sin(0.7)], [math.sin(0.7), math.cos(0.7)]])
    d, q, s = process.terms()
    rotated = Recipe(turn @ d @ turn.T, turn @ q @ turn.T, turn @ s @ turn.T, process.clock, 0.01)
    cov = covariances(process, 1.2875)[2]
    phi_turned, _, cov_turned = covariances(rotated, 1.2875)
    close(phi_turned[0, 0], mdm.GAUGE_SIGNAL, 1e-13)
    close(cov_turned[0, 0], mdm.GAUGE_VARIANCE, 1e-13)
    torch.testing.assert_close(turn @ cov @ turn.T, cov_turned, rtol=0.0, atol=1e-14)
    close(rotated.sigma(1.2875), process.sigma(1.2875), 1e-13)


@pytest.mark.parametrize("name", mdm.SMALL_TIME)
def test_small_time_weights(name):
    clock = ConstantClock(1.0)
    process = {
        "CLD": CLD(mass=1.0, aux_scale=0.01, clock=clock),
        "MALDA": MALDA(clock=clock),
        "ALDA": ALDA(clock=clock),
    }[name]
    roots = [process.transition(0.0, 1e-3)[1], process.marginal(1e-3)[1]]
    for root, expected in zip(roots, mdm.SMALL_TIME[name], strict=True):
        whitened = torch.linalg.solve_triangular(root, process.diffusion(1e-3), upper=False)
        weight = torch.linalg.solve_triangular(root, whitened.T, upper=False).trace()
        assert float(1e-3 * weight) == pytest.approx(expected, rel=3e-7)  # eight digits are given


def test_score_is_unbounded_near_the_data():
    _, root = CLD().kernel(1e-5)
    _, bare = CLD().transition(0.0, 1e-5)
    values = [float(torch.linalg.inv(r @ r.T)[1, 1].sqrt()) for r in (root, bare)]
    assert values == pytest.approx(mdm.SMALL_TIME_SCORE, abs=5e-4)


def test_friction_gradient_of_the_covariance():
    gamma = f64(2.0).requires_grad_()
    process = CLD(mass=1.0, friction=gamma, aux_scale=0.01, clock=LIN)
    root = process.kernel(0.5)[1]
    gradients = [torch.autograd.grad(c, gamma, retain_graph=True)[0] for c in triangle(root @ root.T)]
    close(torch.stack(gradients), mdm.COV_BY_FRICTION, 1e-9)


# -- processes without one clock ---------------------------------------------------------------------------------------


def test_sub_vp_is_no_exponential_of_integrals():
    clock = ConstantClock(2.0)
    variance = float(SubVP(clock=clock).kernel(1.0)[1] ** 2)
    assert variance == pytest.approx(mdm.SUB_VP_TRUTH, rel=1e-14)
    assert abs(variance - mdm.SUB_VP_NAIVE) > 0.09
    panels = PanelProcess(SubVP(clock=clock).drift, SubVP(clock=clock).diffusion)
    assert float(panels.kernel(1.0)[1] ** 2) == pytest.approx(mdm.SUB_VP_TRUTH, rel=1e-13)


def test_sub_vp_by_panels_equals_its_closed_form():
    process = SubVP()
    panels = PanelProcess(process.drift, process.diffusion)
    t = torch.logspace(-6, 0, 13, dtype=torch.float64)
    for a, b in zip(panels.kernel(t), process.kernel(t), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=0.0)
    s = 0.3 * t
    for a, b in zip(panels.transition(s, t), process.transition(s, t), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=0.0)


def test_schedules_that_do_not_commute():
    phi, _, cov = covariances(varying(), 1.0)
    torch.testing.assert_close(phi.flatten(), f64(mdm.VARYING_PHI), rtol=0.0, atol=5e-11)
    torch.testing.assert_close(triangle(cov), f64(mdm.VARYING_COV), rtol=0.0, atol=1e-11)
    c = 2 * (1 - math.cos(3.0)) / 3
    naive = torch.linalg.matrix_exp(f64([[-0.2, c], [-c, -1.0]]))
    torch.testing.assert_close(naive.flatten(), f64(mdm.NAIVE_PHI), rtol=0.0, atol=1e-10)
    assert float((naive - phi).abs().max()) > 0.02

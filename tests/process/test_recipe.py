"""The recipe: what it accepts, what it recovers from a given process, and what it says about wrong input."""

import pytest
import torch
from torch import Tensor

from tests.process.cases import CATALOG, RANDOM, normal
from undrift.process import (
    ALDA,
    CLD,
    MALDA,
    PSLD,
    VE,
    VP,
    CallableClock,
    ConstantClock,
    CosineClock,
    FlowMatching,
    GeometricClock,
    LinearClock,
    PanelProcess,
    PowerClock,
    Recipe,
    RecipeProcess,
    time_varying_recipe,
)

RECIPES = {n: p for n, p in {**CATALOG, **RANDOM}.items() if isinstance(p, RecipeProcess)}
EYE, SKEW = [[1.0, 0.0], [0.0, 1.0]], [[0.0, -1.0], [1.0, 0.0]]


def f64(values: object) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("name", RECIPES)
def test_of_recovers_the_recipe(name):
    process = RECIPES[name]
    a, d = process.matrices()
    _, q, s = process.terms()
    found_d, found_q = Recipe.of(a, 2 * d, s)
    torch.testing.assert_close(found_d, d, rtol=0.0, atol=0.0)
    torch.testing.assert_close(found_q, q, rtol=0.0, atol=1e-12 * float((d + q).abs().max()))


def test_of_says_by_how_much_a_process_misses():
    """MALDA's drift with a tenth more noise on the first auxiliary: GG' is 0.4 too large there."""
    a, d = MALDA().matrices()
    noise = 2 * d
    noise[1, 1] *= 1.1
    with pytest.raises(ValueError, match=r"A S \+ S A' \+ GG' has 0\.4 at \[1, 1\] \(scale 4\.4\); it must vanish"):
        Recipe.of(a, noise)


def test_sub_vp_does_not_leave_its_limit_in_place():
    with pytest.raises(ValueError, match="is not stationary for this process"):
        Recipe.of([[-0.5]], [[1 - 2.718281828**-2]])


def test_mixing_changes_the_spectrum_and_not_the_law():
    low = normal(torch.Generator().manual_seed(0), 3, 3)
    d, s = low @ low.T, torch.diag(f64([1.0, 0.5, 2.0]))
    skew = f64([[0.0, -1.0, 0.3], [1.0, 0.0, -2.0], [-0.3, 2.0, 0.0]])
    clock = ConstantClock(1.0, horizon=200.0)
    spectra = []
    for factor in (0.0, 1.0, 3.0):
        process = Recipe(d, factor * skew, s, clock)
        root = process.kernel(200.0)[1]
        torch.testing.assert_close(root @ root.T, s, rtol=0.0, atol=1e-9)
        spectra.append(torch.linalg.eigvals(process.matrices()[0]).imag.abs().max())
    assert float(spectra[0]) < 1e-12 < float(spectra[1]) < float(spectra[2])


def _varying(d: Tensor, q: Tensor, s: object = EYE) -> PanelProcess:
    return time_varying_recipe(lambda t: d.expand(*t.shape, 2, 2), lambda t: q.expand(*t.shape, 2, 2), s)


BAD = {
    "asymmetric D": (lambda: Recipe([[1.0, 0.5], [0.2, 1.0]], SKEW), r"D must be symmetric; D - D' has .* size 0\.3"),
    "indefinite D": (lambda: Recipe([[1.0, 2.0], [2.0, 1.0]], SKEW), r"D must be positive semi-.* eigenvalue is -1\."),
    "Q not skew": (lambda: Recipe(EYE, [[0.0, -1.0], [0.5, 0.0]]), r"Q must be skew-.* has an entry of size 0\.5"),
    "Q with a diagonal": (lambda: Recipe(EYE, EYE), r"Q must be skew-symmetric; Q \+ Q' has an entry of size 2"),
    "singular S": (lambda: Recipe(EYE, SKEW, [[1.0, 1.0], [1.0, 1.0]]), "S must be positive definite; its smallest"),
    "asymmetric S": (lambda: Recipe(EYE, SKEW, [[1.0, 0.1], [0.0, 1.0]]), r"S must be symmetric; .* size 0\.1"),
    "no noise": (lambda: Recipe([[0.0, 0.0], [0.0, 0.0]], SKEW), "does not converge: .* no noise reaches"),
    "idle channel": (
        lambda: Recipe([[0.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]),
        r"real part -?0, since no noise reaches the direction with channel weights \[1\.0, 0\.0\]",
    ),
    "hidden pair": (
        lambda: Recipe(torch.diag(f64([0.0, 0.0, 1.0])), f64([[0, -1, 0], [1, 0, 0], [0, 0, 0]])),
        r"no noise reaches the direction with channel weights \[0\.707, 0\.707, 0\.0\]",
    ),
    "shapes differ": (lambda: Recipe(EYE, [[0.0]]), r"one shape, got \(2, 2\), \(1, 1\) and \(2, 2\)"),
    "D not square": (lambda: Recipe([[1.0, 0.0]], SKEW), r"D must be a square K x K matrix, got shape \(1, 2\)"),
    "D a number": (lambda: Recipe(1.0, SKEW), r"D must be a square K x K matrix, got shape \(\)"),
    "D ragged": (lambda: Recipe([[1.0], [1.0, 2.0]], SKEW), r"D must be a square K x K matrix of numbers, got \[\[1"),
    "Q not finite": (lambda: Recipe(EYE, [[0.0, float("nan")], [0.0, 0.0]]), "Q must be finite"),
    "start of a wrong shape": (lambda: Recipe(EYE, SKEW, start_cov=f64(EYE)), r"the \(1, 1\) covariance .* \(2, 2\)"),
    "negative start": (lambda: Recipe(EYE, SKEW, start_cov=-0.1), r"its smallest eigenvalue is -0\.1"),
    "asymmetric start": (
        lambda: Recipe(torch.eye(3), torch.zeros(3, 3), start_cov=f64([[1, 1], [0, 1]])),
        "start must be a finite, symmetric",
    ),
    "PSLD gamma": (lambda: PSLD(gamma=-0.1), r"PSLD: gamma must be a finite non-negative number, got -0\.1"),
    "PSLD equal frictions": (lambda: PSLD(gamma=4.0, nu=4.0), "gamma = nu = 4 has no critically damped mass"),
    "PSLD without friction": (lambda: PSLD(gamma=0.0, nu=0.0, inverse_mass=4.0), "does not converge"),
    "CLD mass": (lambda: CLD(mass=0.0), r"CLD: mass must be a finite positive number, got 0\.0"),
    "CLD friction": (lambda: CLD(friction=-1.0), r"D must be positive semi-definite; its smallest eigenvalue is -1"),
    "CLD start": (lambda: CLD(aux_scale=-1.0), r"CLD: aux_scale must be a finite non-negative number, got -1\.0"),
    "ALDA coupling": (lambda: ALDA(coupling=0.0), "does not converge"),
    "MALDA auxiliaries": (lambda: MALDA(auxiliaries=0), "MALDA: auxiliaries must be at least 1, got 0"),
    "flow": (lambda: FlowMatching(sigma_max=float("inf")), r"FlowMatching: sigma_max must be a finite positive .* inf"),
    "constant clock": (lambda: ConstantClock(0.0), r"ConstantClock: rate must be a finite positive number, got 0\.0"),
    "linear clock": (lambda: LinearClock(-1.0, 2.0), r"LinearClock: beta_min must be a finite non-negative"),
    "cosine clock": (lambda: CosineClock(horizon=1.0), r"CosineClock: horizon must lie in \(0, 1\), .* got 1\.0"),
    "power clock": (lambda: PowerClock(exponent=0.0), "PowerClock: exponent must be a finite positive number"),
    "geometric clock": (lambda: GeometricClock(2.0, 1.0), r"sigma_min must be below sigma_max, got 2\.0 >= 1\.0"),
    "decreasing clock": (lambda: CallableClock(lambda t: 1 - t), "finite, non-negative and strictly increasing"),
    "clock of a wrong shape": (lambda: CallableClock(lambda t: t.sum()), r"clock maps times \(64,\) to \(\)"),
    "wrong rate": (lambda: CallableClock(lambda t: t**2, rate=lambda t: t), r"rate differs .* by 5\.00e-01 of its max"),
    "late": (lambda: VP().kernel(1.5), r"VP: t must lie in \[0, 1\], got 1\.5"),
    "early": (lambda: CLD().sigma([0.1, -0.2]), r"CLD: t must lie in \[0, 1\], got -0\.2"),
    "no time": (lambda: VP().sigma(float("nan")), r"VP: t must lie in \[0, 1\], got nan"),
    "backwards": (lambda: VP().transition(0.5, 0.2), "needs s <= t; the reverse direction is a sampler's work"),
    "sigma too large": (lambda: VP().time(1e3), r"VP.time: sigma must lie in \[.*, 152\.167\], .* got 1000 to 1000"),
    "sigma too small": (lambda: VE(clock=GeometricClock()).time(1e-3), r"sigma must lie in \[0\.01, 50\]"),
    "sigma not positive": (lambda: VP().time([0.1, -1.0]), "sigma must be positive and finite"),
    "state without channels": (lambda: CLD().statistic(torch.zeros(4, 3), 0.1), r"\(batch, 2, \*event\), got \(4, 3\)"),
    "times for another batch": (
        lambda: CLD().statistic(torch.zeros(4, 2), [0.1, 0.2, 0.3]),
        r"one time or one per sample \(4,\), got shape \(3,\)",
    ),
    "times for other data": (lambda: CLD().perturb(torch.zeros(4), [0.1] * 3), r"one per sample \(4,\), got shape"),
    "whole numbers": (lambda: VP().perturb(torch.zeros(4, dtype=torch.int64), 0.1), r"must be floating-point.*int64"),
    "panels": (lambda: PanelProcess(VP().drift, VP().diffusion, panels=0), "panels must be at least 1, got 0"),
    "panel horizon": (lambda: PanelProcess(VP().drift, VP().diffusion, horizon=0.0), "horizon must be positive"),
    "panel shapes": (lambda: PanelProcess(lambda t: t, lambda t: t), r"must map times \(N,\) to \(N, K, K\)"),
    "panel law": (
        lambda: PanelProcess(VP().drift, VP().diffusion, stationary=f64([[2.0]])),
        r"misses F S \+ S F' \+ GG' = 0 by 1\.00e\+00",
    ),
    "varying Q": (lambda: _varying(f64(EYE), f64(EYE)), r"Q\(t\) must be skew-symmetric; at t = 0, .* size 2"),
    "varying D": (lambda: _varying(-f64(EYE), f64(SKEW)), r"D\(t\) must be positive .* eigenvalue is -1"),
    "varying S": (lambda: _varying(f64(EYE), f64(SKEW), [[1.0, 0.0], [0.0, 0.0]]), "S must be positive definite"),
    "of a wrong shape": (lambda: Recipe.of(EYE, [[1.0]]), r"diffusion must have the shape of drift, \(2, 2\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_any_work(case):
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        make()

"""The evidence bound against independently computed values, with every expectation exact (MDM, T11-T14)."""

import pytest
import torch

from tests.gaussian import (
    PROCESSES,
    SLOW,
    TWO_POINTS,
    LinearScore,
    elbo_with_gradient,
    exact_denoiser,
    exact_elbo,
    exact_score,
    last_law,
    nodes,
    noise_rule,
)
from tests.reference import mdm
from undrift.bound import Bound
from undrift.diffusion import Diffusion, NoiseDiffusion
from undrift.process import CLD, PSLD, VE, LearnedProcess, LinearClock, Recipe, SubVP

ALL = list(PROCESSES)


def whole(diffusion: object, terminal: object = None) -> Bound:
    return Bound(diffusion, "ism", "none", 0.0, terminal)  # type: ignore[arg-type]


# -- without truncation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_pointwise_tight_with_the_exact_score_and_terminal_law(name):
    """T11 (a): the bound is log p(x) itself, at one point, not only on average."""
    process = PROCESSES[name]
    value = exact_elbo(whole(exact_score(process), last_law(process)), (0.9,))
    assert float(value) == pytest.approx(mdm.LOG_P, abs=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_with_the_stationary_prior_the_gap_is_its_divergence(name):
    """T11 (b): at x = 0.9, and on average."""
    bound = whole(exact_score(PROCESSES[name]))
    assert float(exact_elbo(bound, (0.9,))) == pytest.approx(mdm.BOUND_AT[name], abs=1e-12)
    gap = -float(exact_elbo(bound, TWO_POINTS).mean()) - mdm.ENTROPY
    assert gap == pytest.approx(mdm.PRIOR_GAP[name], abs=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_a_wrong_score_costs_what_theory_says(name):
    """T11 (c): score times 1.1 and the exact terminal law."""
    process = PROCESSES[name]
    bound = whole(exact_score(process, 1.1), last_law(process))
    gap = -float(exact_elbo(bound, TWO_POINTS).mean()) - mdm.ENTROPY
    assert gap == pytest.approx(mdm.SCALED_GAP[name], abs=2e-12)


@pytest.mark.parametrize("name", list(mdm.PRIOR_SCORE))
def test_with_the_priors_own_score_the_process_does_not_matter(name):
    """T13: the value depends on the start, the prior and the data only; changing D, Q or the clock changes nothing."""
    process = CLD(mass=0.25, aux_scale=0.04, clock=SLOW) if name == "CLD M=1/4" else PROCESSES[name]

    def value(p):
        inverse = torch.linalg.inv(p.stationary)
        return -float(exact_elbo(whole(LinearScore(p, lambda t: inverse)), TWO_POINTS).mean())

    assert value(process) == pytest.approx(mdm.PRIOR_SCORE[name], abs=1e-11)
    d, q, s = process.terms()
    other = Recipe(0.6 * d + 0.2 * torch.eye(len(d)), -1.7 * q, s, LinearClock(2.0, 3.0), process.start()[1:, 1:])
    assert value(other) == pytest.approx(mdm.PRIOR_SCORE[name], abs=1e-11)


# -- truncation, decoders, forms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "eps", "none", "joint", "data", "tau2"), mdm.TRUNCATION)
def test_decoders_close_the_truncation(name, eps, none, joint, data, tau2):
    """T12, in the hybrid form; tau^2 = sigma(eps)^2."""
    diffusion = exact_denoiser(PROCESSES[name])
    for decoder, expected, tol in (("none", none, 1e-6), ("joint", joint, 1e-9), ("data", data, 1e-6)):
        bound = Bound(diffusion, "hybrid", decoder, eps)
        gap = -float(exact_elbo(bound, TWO_POINTS).mean()) - mdm.ENTROPY
        # the score is made of x - D, of which rounding leaves 1e-16/sigma
        assert gap == pytest.approx(expected, rel=tol, abs=5e-11)
    assert float(PROCESSES[name].sigma(eps)) ** 2 == pytest.approx(tau2, rel=1e-6)


@pytest.mark.parametrize("name", list(mdm.TRUNCATED_AT))
def test_truncated_bound_at_a_point(name):
    """T12, x = 0.9."""
    for decoder, expected in zip(("none", "joint"), mdm.TRUNCATED_AT[name], strict=True):
        bound = Bound(exact_denoiser(PROCESSES[name]), "hybrid", decoder, 1e-3)
        assert float(exact_elbo(bound, (0.9,))) == pytest.approx(expected, abs=2e-10)


@pytest.mark.parametrize("decoder", ["none", "joint", "data"])
@pytest.mark.parametrize("name", ALL)
def test_all_forms_are_one_number(name, decoder):
    """Hybrid, denoising score matching and implicit: equal in expectation, at every point x, for a wrong score too."""
    for diffusion in (exact_denoiser(PROCESSES[name]), exact_score(PROCESSES[name], 0.8)):
        values = [exact_elbo(Bound(diffusion, form, decoder, 0.05), (0.9, -1.2)) for form in ("hybrid", "dsm", "ism")]
        for other in values[1:]:
            torch.testing.assert_close(other, values[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eps", [1e-2, 0.2])
@pytest.mark.parametrize("name", ALL)
def test_denoising_form_is_the_form_on_k_channels(name, eps):
    """1/2 (-snr') |x - D|^2 against 1/2 |s - grad log q|^2 on all channels, integrand by integrand and as a whole."""
    diffusion = exact_denoiser(PROCESSES[name])
    denoising, hybrid = Bound(diffusion, t_min=eps), Bound(diffusion, "hybrid", t_min=eps)
    assert (denoising.noises, hybrid.noises) == (1, diffusion.process.channels)
    # the score is made of x - D, of which rounding leaves 1e-16/sigma: at the smallest sigma here, 3e-9 of the value
    torch.testing.assert_close(exact_elbo(denoising, (0.9, -1.2)), exact_elbo(hybrid, (0.9, -1.2)), rtol=1e-8, atol=0)


def test_denoising_form_depends_on_the_process_through_its_ends_only():
    """Two processes cut at one sigma(eps), on a denoiser that is far from right: path and start differ by what lies
    between their sigma(T) alone."""

    def wrong(x, sigma):
        return 0.3 * x / (1 + sigma.reshape(-1, 1)) - 0.2

    values = []
    for process in (PROCESSES["CLD"], PROCESSES["MALDA"]):
        t_max = float(process.time(2.0))
        bound = Bound(Diffusion(process, wrong), t_min=float(process.time(0.05)))
        t, weight = nodes(bound.t_min, t_max)
        rule, n = noise_rule(1), len(t)
        x = torch.full((2 * n, 1), 0.4, dtype=torch.float64)
        path = bound.path(x, t.repeat_interleave(2), rule.repeat(n, 1, 1)).reshape(n, 2).mean(1)
        values.append(float((weight * path).sum() + bound.start(x[:2], rule).mean()))
    assert values[0] == pytest.approx(values[1], rel=1e-9)


@pytest.mark.parametrize("process", [SubVP(), VE(), PSLD(clock=SLOW)], ids=lambda p: type(p).__name__)
def test_other_families_obey_the_exact_gap(process):
    """Mean gap = KL(q(z_T) || pi) + decoder's; with sigma(eps) small the first, in closed form, is all."""
    mean = process.kernel(process.horizon)[0]
    law = last_law(process)[1]
    prior = process.prior()
    white = torch.linalg.solve_triangular(prior, law, upper=False)
    shift = torch.linalg.solve_triangular(prior, 0.3 * mean.unsqueeze(-1), upper=False)
    log_dets = [m.diagonal().log().sum() for m in (prior, law)]
    divergence = 0.5 * (white.square().sum() + shift.square().sum() - len(mean)) + log_dets[0] - log_dets[1]
    bound = Bound(exact_denoiser(process), t_min=float(process.time(1e-4)))
    gap = -float(exact_elbo(bound, TWO_POINTS).mean()) - mdm.ENTROPY
    assert gap == pytest.approx(float(divergence), rel=1e-6, abs=1e-9)


# -- a noise network ---------------------------------------------------------------------------------------------------


class ExactNoise(torch.nn.Module):
    """The noise network of Gaussian data for one process, in the process's own units."""

    def __init__(self, process, kernel, mixed):
        super().__init__()
        self.process, self.kernel, self.mixed = process, kernel, mixed

    def forward(self, scaled, label):
        # the label is a quarter of log sigma, and all that tells the time
        t = self.process.time((4 * label[0]).exp())
        diffusion = NoiseDiffusion(self.process, self, self.kernel, mixed=self.mixed, data_std=0.7)
        c = diffusion.coefficients(t.reshape(1))
        z = scaled * c.scale.reshape(1, -1, 1)
        score = exact_score(self.process).score(z, t)
        return -c.root.mT @ (score - c.baseline @ z)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("kernel", ["hsm", "dsm"])
def test_noise_networks_have_the_bound_of_their_score(kernel, mixed):
    process = PROCESSES["CLD"]
    network = NoiseDiffusion(process, ExactNoise(process, kernel, mixed), kernel, mixed=mixed, data_std=0.7)
    rule = torch.tensor([[[0.3], [-1.1], [0.7]]], dtype=torch.float64)
    x = torch.tensor([[0.9]], dtype=torch.float64)
    for form, decoder in (("hybrid", "data"), ("dsm", "joint"), ("ism", "data")):
        ours, exact = (Bound(d, form, decoder, 0.02) for d in (network, exact_score(process)))
        for t in (0.02, 0.3, 1.0):
            at = torch.tensor([t], dtype=torch.float64)
            a, b = (bound.path(x, at, rule[:, : bound.noises]) for bound in (ours, exact))
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
        a, b = (bound.start(x, rule[:, : bound.noises]) for bound in (ours, exact))
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def test_training_reads_the_same_terms():
    """Bound.sampled against prior, path and start, for a batch that serves both."""
    process = PROCESSES["CLD"]
    generator = torch.Generator().manual_seed(0)
    x, network = torch.randn(6, 2, generator=generator), torch.nn.Linear(4, 4)

    def noise_model(z, label):
        return network(z.flatten(1)).reshape(z.shape)

    for diffusion in (NoiseDiffusion(process, noise_model), Diffusion(process, lambda z, s: torch.tanh(z))):
        bound = Bound(diffusion, t_min=0.03)
        noise = torch.randn(6, bound.noises, 2, generator=generator)
        t = torch.tensor([0.03, 0.03, 0.1, 0.5, 0.7, 1.0], dtype=torch.float64)
        at_start = torch.arange(6) < 2
        weight = torch.linspace(1, 2, 6, dtype=torch.float64)
        value, sigma = bound.sampled(x, t, at_start, weight, noise)
        torch.testing.assert_close(sigma, process.sigma(t))
        constant = bound.start_constant(x)
        terms = torch.cat([bound.start(x[:2], noise[:2]) - constant, bound.path(x[2:], t[2:], noise[2:])])
        torch.testing.assert_close(-value, weight * terms + bound.prior(x) + constant, rtol=1e-5, atol=1e-5)


# -- gradients in the process ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gamma", "omega", "value", "by_gamma", "by_omega"), mdm.PROCESS_GRADIENT)
def test_process_gradient(gamma, omega, value, by_gamma, by_omega):
    """T14: through kernel, weight and prior; and zero for the prior's own score (T13)."""
    g, w = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (gamma, omega))
    zero = torch.zeros((), dtype=torch.float64)
    process = Recipe(
        torch.stack([torch.stack([zero, zero]), torch.stack([zero, g])]),
        torch.stack([torch.stack([zero, -w]), torch.stack([w, zero])]),
        clock=SLOW,
        start_cov=0.01,
    )
    x = (0.7, -0.7)
    for diagonal, expected, slopes in (
        ((0.5, 2.0), value, (by_gamma, by_omega)),
        ((1.0, 1.0), mdm.PROCESS_GRADIENT_PRIOR, (0.0, 0.0)),
    ):
        matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        loss = -elbo_with_gradient(whole(LinearScore(process, lambda t, m=matrix: m)), x).mean()
        assert float(loss.detach()) == pytest.approx(expected, abs=1e-10)
        found = torch.autograd.grad(loss, [g, w])
        assert [float(v) for v in found] == pytest.approx(slopes, abs=1e-9)


@pytest.mark.parametrize(("form", "decoder"), [("denoising", "data"), ("hybrid", "data"), ("dsm", "joint")])
def test_process_gradient_through_the_decoder(form, decoder):
    """Every parameter of a learned process, clock and start included, against central differences of the value."""
    process = LearnedProcess.random(2, 3, learn=("Q", "D", "S", "start", "clock"), knots=3)
    with torch.no_grad():
        process.S_raw.add_(torch.tensor([[0.1, 0.0], [0.2, -0.3]]))

    def wrong(x, sigma):
        return 0.5 * x / (1 + sigma.reshape(-1, 1)) - 0.1

    def value():
        return -elbo_with_gradient(Bound(Diffusion(process, wrong), form, decoder, 0.05), (0.9, -1.2)).mean()

    parameters = [p for p in process.parameters() if p.requires_grad]
    found = torch.autograd.grad(value(), parameters)
    step = 1e-5
    for parameter, slope in zip(parameters, found, strict=True):
        for index in range(parameter.numel()):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.view(-1)[index] += sign * step
                    ends.append(float(value()))
                    parameter.view(-1)[index] -= sign * step
            difference = (ends[0] - ends[1]) / (2 * step)
            assert float(slope.reshape(-1)[index]) == pytest.approx(difference, rel=1e-6, abs=1e-7)


# -- what it refuses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda d: Bound(d, t_min=0.0), "only form 'ism' with decoder 'none'"),
        (lambda d: Bound(d, t_min=1.0), r"t_min must lie in \[0, 1\)"),
        (lambda d: Bound(d, "denoising", "joint"), "needs the score of all channels"),
        (lambda d: Bound(d, "best"), "form must be one of"),
        (lambda d: Bound(exact_score(d.process), "denoising"), "is for a Diffusion"),
        (
            lambda d: Bound(exact_denoiser(CLD(aux_scale=0.0)), "hybrid", "joint"),
            "start without spread, so their entropy is -inf",
        ),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build(exact_denoiser(PROCESSES["CLD"]))


def test_the_data_decoder_needs_no_spread_of_the_start():
    process = CLD(mass=1.0, aux_scale=0.0, clock=SLOW)
    gap = -float(exact_elbo(Bound(exact_denoiser(process), t_min=0.01), TWO_POINTS).mean()) - mdm.ENTROPY
    assert 0 < gap < 2e-4

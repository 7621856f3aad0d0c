import itertools
import json
import math

import pytest
import torch

from undrift.denoise import FieldGaussian
from undrift.measure import mode_errors
from undrift.space import Cosine, Fourier, FunctionSpace, Matern, White

DATA, LEVELS = Matern(2.0, 3.0), (0.1, 1.0, 10.0)


@pytest.mark.parametrize("coordinates", ["physical", "whitened"])
def test_the_exact_denoiser_errs_as_theory_says_in_every_mode(coordinates):
    field = FieldGaussian(FunctionSpace(Cosine(), Matern(1.0, 3.0), coordinates), DATA)
    x = field.draw(3000, (2, 16), torch.Generator().manual_seed(0))
    found = mode_errors(field, field.space, x, LEVELS, seed=1, batch=1000)
    mu, lam = DATA.variances(Cosine(), (16,)), field.space.variances((16,))
    for i, sigma in enumerate(LEVELS):
        exact = mu * sigma**2 * lam / (mu + sigma**2 * lam)
        # 48 numbers within 4.5 standard errors of their means; the squares of two normals have sd equal to mean,
        # so the standard error must be 1/sqrt(3000) of the mean itself, up to its own noise of a few per cent
        assert float(((found.error[i] - exact) / found.std_error[i]).abs().max()) < 4.5
        assert float((found.std_error[i] / exact * math.sqrt(3000) - 1).abs().max()) < 0.15
        torch.testing.assert_close(found.linear[i], exact, rtol=0.15, atol=0)  # with the fields' own prior
    torch.testing.assert_close(found.total, found.error.sum(1))


def test_a_denoiser_that_says_nothing_leaves_the_prior_or_the_noise():
    space = FunctionSpace(Fourier(2), Matern(2.0, 3.0))
    x = space.colour(torch.randn(50, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    x = x - x.mean(0)
    silent = mode_errors(lambda z, s: torch.zeros_like(z), space, x, (1.0,), seed=1)
    torch.testing.assert_close(silent.error[0], silent.prior * 49 / 50)
    same = mode_errors(lambda z, s: z, space, x, (0.5, 1.0), batch=7)
    torch.testing.assert_close(same.error[1], 4 * same.error[0])  # the same noise at every level


def test_conditions_follow_their_fields_and_the_summary_adds_up():
    space = FunctionSpace(Cosine(), Matern())
    x = space.colour(torch.randn(30, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    perfect = mode_errors(lambda z, s, truth: truth, space, x, (1.0,), batch=8, truth=x)
    assert float(perfect.error.max()) == 0
    found = mode_errors(lambda z, s: 0.5 * z, space, x, LEVELS)
    summary = json.loads(json.dumps(found.summary(bands=5)))
    assert sum(b["modes"] for b in summary["bands"]) == 32
    assert summary["bands"][0]["wavenumbers"] == [0.0, 0.0]
    assert sum(b["prior"] for b in summary["bands"]) == pytest.approx(summary["prior"])
    for i in range(3):
        for key in ("error", "linear"):
            assert sum(b[key][i] for b in summary["bands"]) == pytest.approx(summary[key][i])
    ends = [b["wavenumbers"] for b in summary["bands"]]
    assert all(a[1] < b[0] for a, b in itertools.pairwise(ends))


def test_misuse_is_named():
    x = torch.zeros(4, 8)
    with pytest.raises(TypeError, match="White has no modes"):
        mode_errors(lambda z, s: z, White(), x, (1.0,))
    with pytest.raises(ValueError, match="two fields or more"):
        mode_errors(lambda z, s: z, FunctionSpace(), x[:1], (1.0,))
    with pytest.raises(ValueError, match=r"positive numbers, got \[0.0\]"):
        mode_errors(lambda z, s: z, FunctionSpace(), x, (0.0,))

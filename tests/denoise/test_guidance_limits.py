"""What guidance does at the ends: extreme levels, no graph to take a gradient of."""

import pytest
import torch

from undrift.denoise import GaussianDenoiser, Guided, Linearised, PointEstimate, PseudoInverse, TweedieMoments
from undrift.observe import GaussianNoise, Matrix, Observation

PRIOR = GaussianDenoiser(torch.zeros(2), torch.eye(2))
A, STD, Y = torch.tensor([[1.0, 0.5]]), 0.3, torch.tensor([0.8])
SEEN = Observation(Matrix(A), GaussianNoise(STD), Y)
EXACT = PRIOR.posterior(A, STD**2, Y)


@pytest.mark.parametrize("kind", [PseudoInverse, TweedieMoments, Linearised])
def test_levels_whose_square_is_no_number_in_single_precision(kind):
    """At 1e20 the slope, of order 1e-40, has six digits left; at 1e30 it is 0, and the prediction is unguided."""
    u = torch.tensor([[0.3, -1.2], [1.0, 0.4]])
    guided = Guided(PRIOR, kind(SEEN))
    for level in (0.0, 1e-30, 1e10, 1e20):
        x = u * max(level, 1.0)
        torch.testing.assert_close(guided(x, level), EXACT(x.double(), level).float(), rtol=0, atol=1e-4)
    assert bool(guided(u * 1e30, 1e30).isfinite().all())


def test_without_a_graph_there_is_nothing_to_guide_by_and_it_is_said():
    guided, x = Guided(PRIOR, PointEstimate(SEEN)), torch.zeros(1, 2)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"Inference mode keeps none: use torch.no_grad"):
        guided(x, 1.0)
    frozen = Guided(torch.no_grad()(lambda x, sigma: PRIOR(x, sigma)), PointEstimate(SEEN))
    with pytest.raises(RuntimeError, match=r"Look for no_grad"):
        frozen(x, 1.0)
    with torch.no_grad():
        torch.testing.assert_close(guided(x, 1.0), Guided(PRIOR, PointEstimate(SEEN))(x, 1.0), rtol=0, atol=0)


@pytest.mark.parametrize("normalised", [False, True])
def test_data_that_would_broadcast_to_another_shape_are_refused(normalised):
    """(1, 1, 3) broadcasts against predictions (3, 3), and the norm of what comes out is one number a sample."""
    square = Observation(Matrix(torch.eye(3)), GaussianNoise(STD), torch.zeros(3))
    potential = PointEstimate(square, normalised=normalised)
    guided = Guided(GaussianDenoiser(torch.zeros(3), torch.eye(3)), potential)
    for wrong in (torch.zeros(5, 3), torch.zeros(1, 1, 3)):
        with pytest.raises(ValueError, match=r"go to sample\(\) as observed="):
            guided(torch.zeros(3, 3), 1.0, observed=wrong)

"""Small-matrix numerics against scipy and exact values."""

import mpmath as mp
import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from tests.reference.exact import precise_kernel
from undrift._linalg import as_f64, expm, gauss_legendre, linear_flow, ou_transition, psd_sqrt, sqrt_sum


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_expm_agrees_with_scipy(k):
    a = normal(k, k, k)
    b = torch.tensor([[0.0, 1e-9, 0.3], [1.0, 4.0, 12.0]], dtype=torch.float64)
    out = expm(a, b)
    for i in np.ndindex(2, 3):
        exact = scipy.linalg.expm((a * b[i]).numpy())
        assert np.abs(out[i].numpy() - exact).max() < 3e-13 * np.abs(exact).max()


def test_expm_of_a_defective_matrix():
    """Critical damping: exp(-b) (I + N b) with N nilpotent, small entries kept in any batch."""
    a = torch.tensor([[0.0, 1.0], [-1.0, -2.0]], dtype=torch.float64)
    b = torch.tensor([1e-12, 1e-6, 1.0, 30.0], dtype=torch.float64)
    decay = torch.exp(-b)
    exact = torch.stack([decay * (1 + b), decay * b, -decay * b, decay * (1 - b)], -1).unflatten(-1, (2, 2))
    torch.testing.assert_close(expm(a, b), exact, rtol=2e-13, atol=2e-15)


def test_expm_is_differentiable_at_zero_too():
    b = torch.tensor([0.0, 0.7], dtype=torch.float64, requires_grad=True)
    a = normal(1, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(expm, (a, b))


@pytest.mark.parametrize("rank", [0, 1, 2, 3, 4])
def test_psd_sqrt_of_any_rank(rank):
    low = torch.diag(torch.tensor([1.0, 1e-6, 1e3, 1.0], dtype=torch.float64)) @ normal(rank + 10, 4, rank)
    m = low @ low.T
    root = psd_sqrt(m)
    scale = torch.outer(m.diagonal(), m.diagonal()).sqrt()
    assert bool(((root @ root.T - m).abs() <= 1e-6 * scale).all())  # a dropped pivot costs its square root
    assert float((root @ root.T - m).diagonal().abs().max()) <= 1e-12 * float(m.abs().max())
    assert int((root.abs().amax(0) > 0).sum()) == rank
    assert bool((root.triu(1) == 0).all())


def test_psd_sqrt_keeps_channels_of_any_scale():
    m = torch.diag(torch.tensor([1.0, 1e-30, 0.0, 1e20], dtype=torch.float64))
    torch.testing.assert_close(psd_sqrt(m).diagonal(), m.diagonal().sqrt(), rtol=1e-15, atol=0.0)


def test_psd_sqrt_in_batches():
    low = normal(3, 5, 3, 2)
    m = low @ low.mT
    torch.testing.assert_close(psd_sqrt(m), torch.stack([psd_sqrt(x) for x in m]), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("k", [1, 3])
def test_sqrt_sum_adds_covariances(k):
    roots = [normal(1, 4, k, 2), normal(2, k, 5), normal(3, 1, k, 1)]
    total = sum(r @ r.mT for r in roots)
    root = sqrt_sum(*roots)
    torch.testing.assert_close(root, torch.linalg.cholesky(total), rtol=1e-12, atol=1e-13)
    assert float(sqrt_sum(torch.zeros(k, 1, dtype=torch.float64)).abs().max()) == 0.0


def test_sqrt_sum_keeps_what_a_large_root_would_bury():
    """Rows that differ by 1e12, in either order: the small direction keeps full relative accuracy."""
    large = torch.tensor([[1.0], [1.0]], dtype=torch.float64)
    small = 1e-12 * torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    expected = 1e-12 * 13**0.5  # Schur complement: (3 - 1)^2 + (-1 - 2)^2, to leading order
    for order in ((large, small), (small, large)):
        assert float(sqrt_sum(*order)[1, 1]) == pytest.approx(expected, rel=1e-12)


def test_sqrt_sum_is_differentiable():
    roots = (normal(1, 2, 3, 3).requires_grad_(), normal(2, 2, 3, 2).requires_grad_())
    assert torch.autograd.gradcheck(sqrt_sum, roots)


def test_quadrature_is_exact_for_polynomials():
    nodes, weights = gauss_legendre(8)
    for degree in range(16):
        assert float((weights * nodes**degree).sum()) == pytest.approx(1 / (degree + 1), rel=1e-14)


@pytest.mark.parametrize("b", [1e-8, 0.1, 2.0, 30.0, 1e3, 1e5])
def test_ou_transition_for_any_length(b):
    """Against the stationary difference where that is accurate, also far beyond what one quadrature reaches."""
    a = torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 1.0], [0.0, -1.0, -1.0]], dtype=torch.float64)
    g = torch.tensor([[0.0], [0.0], [2.0**0.5]], dtype=torch.float64)  # ALDA: S = I
    phi, root = ou_transition(a, g, torch.tensor(b, dtype=torch.float64))
    exact = scipy.linalg.expm(a.numpy() * b)
    np.testing.assert_allclose(phi, exact, rtol=0.0, atol=1e-12)
    np.testing.assert_allclose(root @ root.T, np.eye(3) - exact @ exact.T, rtol=0.0, atol=1e-12)


def test_ou_transition_of_brownian_motion():
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    phi, root = ou_transition(zero, one, torch.tensor([0.0, 1e-20, 6400.0], dtype=torch.float64))
    assert phi.flatten().tolist() == [1.0, 1.0, 1.0]
    np.testing.assert_allclose(root.flatten(), [0.0, 1e-10, 80.0], rtol=1e-14)


@pytest.mark.parametrize("b", [1e-12, 1e-3, 0.99, 1.01, 40.0])
@pytest.mark.parametrize("a", [-0.5, 0.0, 1e-9])
def test_ou_transition_of_one_channel(a, b):
    """Closed form, against 50 digits: g^2 (e^(2 a b) - 1) / (2 a), or g^2 b at a = 0; and its derivative in a."""
    drift = torch.tensor([[a]], dtype=torch.float64, requires_grad=True)
    noise = torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    phi, root = ou_transition(drift, noise, torch.tensor(b, dtype=torch.float64))
    (slope,) = torch.autograd.grad(root.sum(), drift)
    with mp.workdps(50):
        variance = lambda x: b * mp.nsum(lambda n: (2 * x * b) ** n / mp.factorial(n + 1), [0, 150])  # noqa: E731
        exact, exact_slope = mp.sqrt(variance(mp.mpf(a))), mp.diff(lambda x: mp.sqrt(variance(x)), mp.mpf(a))
    assert float(phi.detach()) == pytest.approx(np.exp(a * b), rel=1e-15)
    assert float(root.detach()) == pytest.approx(float(exact), rel=1e-15)
    assert float(slope) == pytest.approx(float(exact_slope), rel=1e-14)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_ou_transition_is_differentiable_twice(k):
    """In drift, noise and clock together, for clocks that need no rounds of doubling, one, and two."""
    leaves = (0.6 * normal(1, k, k), normal(2, k, max(1, k - 1)), torch.tensor([0.3, 9.0, 1.7], dtype=torch.float64))
    leaves = tuple(leaf.requires_grad_() for leaf in leaves)
    assert torch.autograd.gradcheck(ou_transition, leaves)
    assert torch.autograd.gradgradcheck(ou_transition, leaves, rtol=1e-3, atol=1e-4)


CHAINS = {  # CLD and ALDA: noise on the last channel alone, so that roots are graded by powers of b
    "CLD": (((0.0, 1.0), (-1.0, -2.0)), 2.0),
    "ALDA": (((0.0, 1.0, 0.0), (-1.0, 0.0, 1.0), (0.0, -1.0, -1.0)), 2.0**0.5),
}


@pytest.mark.parametrize("b", [1e-4, 0.0595, 1.2875, 20.0])
@pytest.mark.parametrize("name", CHAINS)
def test_derivatives_of_graded_roots(name, b):
    """Every entry's derivative along a random change of A, g and the start, against differences in 80 digits."""
    a, g = CHAINS[name]
    k = len(a)
    start = torch.diag(torch.tensor([0.0] + [0.1] * (k - 1), dtype=torch.float64))
    noise = torch.zeros(k, 1, dtype=torch.float64)
    noise[-1] = g
    leaves = [torch.tensor(a, dtype=torch.float64), noise, start]
    steps = [normal(1, k, k), normal(2, k, 1) * (noise != 0), normal(3, k, k) * (start != 0)]
    with mp.workdps(80):
        roots = []
        for sign in (1, -1):
            drift, source, spread = (
                x.numpy().astype(object) + sign * mp.mpf(10) ** -30 * h.numpy().astype(object)
                for x, h in zip(leaves, steps, strict=True)
            )
            roots.append(precise_kernel(drift, source @ source.T, spread @ spread.T, mp.mpf(b))[1])
        exact = np.array(((roots[0] - roots[1]) * mp.mpf(10) ** 30 / 2).tolist(), dtype=float)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    phi, root = ou_transition(leaves[0], leaves[1], torch.tensor(b, dtype=torch.float64))
    root = sqrt_sum(phi @ leaves[2], root)
    for i in range(k):
        for j in range(i + 1):
            grads = torch.autograd.grad(root[i, j], leaves, retain_graph=True)
            value = sum(float((x * h).sum()) for x, h in zip(grads, steps, strict=True))
            assert abs(value - exact[i, j]) < 1e-13 * max(abs(exact[i, j]), float(root[i, i].detach())), (i, j)


def _rotation(t: Tensor) -> Tensor:
    basis = torch.stack([normal(i, 3, 3) for i in range(3)])
    skew = basis - basis.mT
    return torch.einsum("...i,ijk->...jk", torch.stack([torch.cos(3 * t), t**2, torch.sin(5 * t)], -1), skew)


def _ends(start: float, end: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(start, dtype=torch.float64), torch.tensor(end, dtype=torch.float64)


@pytest.mark.parametrize("panels", [1, 2, 8])
def test_skew_flows_stay_orthogonal_at_any_accuracy(panels):
    phi = linear_flow(_rotation, *_ends(0.0, 2.0), panels=panels, stages=3).phi
    torch.testing.assert_close(phi @ phi.T, torch.eye(3, dtype=torch.float64), rtol=0.0, atol=1e-13)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_flow_order_is_twice_the_stages(stages):
    exact = linear_flow(_rotation, *_ends(0.0, 1.0), panels=32).phi
    panels = (16, 32) if stages < 3 else (8, 16)
    errors = [
        float((linear_flow(_rotation, *_ends(0.0, 1.0), panels=n, stages=stages).phi - exact).abs().max())
        for n in panels
    ]
    assert abs(np.log2(errors[0] / errors[1]) - 2 * stages) < 0.4, errors


def test_flow_runs_backwards_and_composes():
    there = linear_flow(_rotation, *_ends(0.2, 1.0), panels=8)
    back = linear_flow(_rotation, *_ends(1.0, 0.2), panels=8)
    torch.testing.assert_close(back.phi @ there.phi, torch.eye(3, dtype=torch.float64), rtol=0.0, atol=1e-13)
    assert float(there.weights.sum()) == pytest.approx(0.8, rel=1e-14)
    assert float(back.weights.sum()) == pytest.approx(-0.8, rel=1e-14)
    from_node = linear_flow(_rotation, there.nodes[20], torch.tensor(1.0, dtype=torch.float64), panels=8).phi
    torch.testing.assert_close(there.to_end[20], from_node, rtol=0.0, atol=1e-9)  # stage order is below panel order


def test_coefficients_are_float64_on_the_cpu_with_their_gradients():
    assert as_f64(3).dtype == torch.float64
    leaf = torch.tensor([0.1], dtype=torch.float32, requires_grad=True)
    as_f64(leaf).sum().backward()
    assert leaf.grad is not None
    assert float(leaf.grad) == 1.0

"""Constrained parameters: the log Jacobian is autograd's, maps invert, labels follow the order of the numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from undrift.density import Parameters, ordered

SPACES: dict[str, dict[str, Any]] = {
    "real": {"a": constraints.real},
    "vector": {"a": (constraints.real, 3)},
    "positive": {"a": constraints.positive},
    "nonnegative": {"a": (constraints.nonnegative, 2)},
    "positive matrix": {"a": (constraints.positive, 2, 3)},
    "unit interval": {"a": (constraints.unit_interval, 2)},
    "interval": {"a": constraints.interval(-2.0, 5.0)},
    "half-open interval": {"a": constraints.half_open_interval(0.0, 2.0)},
    "greater than": {"a": (constraints.greater_than(1.5), 2)},
    "less than": {"a": (constraints.less_than(-1.0), 2)},
    "simplex": {"a": (constraints.simplex, 4)},
    "rows of simplexes": {"a": (constraints.simplex, 2, 3)},
    "ordered": {"a": (ordered, 4)},
    "rows of ordered": {"a": (ordered, 2, 3)},
    "independent": {"a": (constraints.independent(constraints.positive, 1), 3)},
    "Cholesky factor of correlations": {"a": (constraints.corr_cholesky, 3, 3)},
    "many": {
        "mu": constraints.real,
        "tau": constraints.positive,
        "share": (constraints.simplex, 3),
        "cut": (ordered, 2),
        "theta": (constraints.real, 2, 2),
    },
}


def free(space: Parameters, n: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, space.dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def independent_entries(value: Tensor, constraint: Any) -> Tensor:
    """As many entries of a constrained value as it has free coordinates: the measure that densities refer to."""
    if constraint is constraints.simplex:
        return value[..., :-1].reshape(-1)
    if constraint is constraints.corr_cholesky:
        rows, columns = torch.tril_indices(value.shape[-2], value.shape[-1], offset=-1)
        return value[..., rows, columns].reshape(-1)
    return value.reshape(-1)


@pytest.mark.parametrize("name", SPACES)
def test_the_log_jacobian_is_that_of_autograd(name: str) -> None:
    space = Parameters(SPACES[name])

    def flat(x: Tensor) -> Tensor:
        values, _ = space.constrain(x.unsqueeze(0))
        specs = [entry[0] if isinstance(entry, tuple) else entry for entry in SPACES[name].values()]
        return torch.cat([independent_entries(values[key], c) for key, c in zip(values, specs, strict=True)])

    x = free(space)
    _, log_det = space.constrain(x)
    assert log_det.shape == (5,)
    for row, found in zip(x, log_det, strict=True):
        jacobian = torch.autograd.functional.jacobian(flat, row)
        assert float(found) == pytest.approx(float(torch.linalg.slogdet(jacobian).logabsdet), abs=1e-9)


@pytest.mark.parametrize("name", SPACES)
def test_maps_invert_and_values_satisfy_their_constraint(name: str) -> None:
    space = Parameters(SPACES[name])
    x = 2 * free(space)
    values, _ = space.constrain(x)
    torch.testing.assert_close(space.unconstrain(values), x, rtol=1e-7, atol=1e-7)
    for key, entry in SPACES[name].items():
        constraint, *shape = entry if isinstance(entry, tuple) else (entry,)
        assert values[key].shape == (5, *shape)
        assert space.shapes[key] == tuple(shape)
        assert bool(constraint.check(values[key]).all())


@pytest.mark.parametrize("name", SPACES)
def test_single_precision_stays_single(name: str) -> None:
    space = Parameters(SPACES[name])
    values, log_det = space.constrain(free(space, dtype=torch.float32))
    assert {v.dtype for v in values.values()} == {log_det.dtype} == {torch.float32}


@pytest.mark.parametrize("name", SPACES)
def test_labels_follow_the_order_of_the_numbers(name: str) -> None:
    space = Parameters(SPACES[name])
    x = free(space)
    values, _ = space.constrain(x)
    flat = space.flat(x)
    assert len(space.labels) == flat.shape[1] == len(set(space.labels))
    for label, column in zip(space.labels, flat.T, strict=True):
        key, _, rest = label.partition("[")
        entry = values[key]
        for i in rest.rstrip("]").split(",") if rest else ():
            entry = entry[:, int(i)]
        assert torch.equal(column, entry)


def test_labels_read_like_indices() -> None:
    space = Parameters({"mu": constraints.real, "m": (constraints.real, 2, 2), "v": (constraints.positive, 1)})
    assert space.labels == ["mu", "m[0,0]", "m[0,1]", "m[1,0]", "m[1,1]", "v[0]"]


def test_ordered_vectors_count_up_from_the_first() -> None:
    x = torch.tensor([[1.0, 0.0, math.log(2.0)]], dtype=torch.float64)
    values, log_det = Parameters({"cut": (ordered, 3)}).constrain(x)
    torch.testing.assert_close(values["cut"], torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64))
    assert float(log_det) == pytest.approx(math.log(2.0))
    assert not bool(ordered.check(torch.tensor([1.0, 1.0, 2.0])))


def test_what_counts_as_no_constraint() -> None:
    assert Parameters({"x": (constraints.real, 3)}).trivial
    assert Parameters({"x": (constraints.real_vector, 3)}).trivial
    assert not Parameters({"x": (constraints.real, 3, 1)}).trivial
    assert not Parameters({"x": constraints.positive}).trivial
    assert not Parameters({"x": constraints.real, "y": constraints.real}).trivial


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({}, "at least one, name -> constraint"),
        ({"tau": "positive"}, "tau needs a constraint of torch.distributions.constraints"),
        ({"tau": constraints.greater_than}, "tau needs a constraint"),
        ({"on": constraints.boolean}, "no bijection from R.k is known for on, Boolean"),
        ({"L": (constraints.lower_cholesky, 2, 2)}, "no bijection from R.k is known for L, LowerCholesky"),
        ({"S": (constraints.positive_definite, 2, 2)}, "no bijection from R.k is known for S"),
        ({"p": constraints.simplex}, r"p has the shape \(\), but Simplex\(\) needs 1 dim.*\(constraint, \*shape\)"),
        ({"c": ordered}, r"c has the shape \(\), but .* needs 1"),
        ({"p": (constraints.simplex, 1)}, "is a constant; leave it out"),
        ({"v": (constraints.real, 0)}, r"positive whole sizes, got \(0,\)"),
        ({"v": (constraints.real, 2.5)}, r"positive whole sizes, got \(2.5,\)"),
        ({"v": (constraints.real, "3")}, "positive whole sizes"),
    ],
)
def test_spaces_that_cannot_be_are_refused_at_once(spec: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Parameters(spec)


def test_values_that_do_not_fit() -> None:
    space = Parameters({"mu": constraints.real, "theta": (constraints.real, 2)})
    with pytest.raises(ValueError, match=r"points must have shape \(batch, 3\), got \(2, 2\)"):
        space.constrain(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="values for theta are missing"):
        space.unconstrain({"mu": torch.zeros(4)})
    with pytest.raises(ValueError, match=r"theta must have shape \(batch, 2\), got \(4, 3\)"):
        space.unconstrain({"mu": torch.zeros(4), "theta": torch.zeros(4, 3)})

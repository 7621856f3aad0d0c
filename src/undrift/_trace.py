"""Traces of Jacobians, exact or by probes, over the directions that matter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["carried_trace"]


def carried_trace(
    output: Tensor,
    x: Tensor,
    shape: torch.Size,
    carry: Callable[[Tensor], Tensor],
    probes: Tensor | None,
    create_graph: bool = False,
) -> Tensor:
    """tr(g' J g) per sample, J = d output / d x: (batch, 1), or v' g' J g v for each of the probes (count, *shape).

    Exactly, it takes one backward pass for each coordinate of a direction; otherwise one for each probe.

    Args:
        output: (batch, *out), of as many coordinates as ``x``.
        x: (batch, *out), with a graph to ``output``.
        shape: of the directions, (batch, *event).
        carry: applies g: maps directions of this shape, or any that broadcasts to it, to the shape of ``x``.
        probes: random signs (count, *shape), or None for the exact trace.
        create_graph: keep what a derivative of the result needs.

    Returns:
        (batch, 1) or (batch, count), float64.
    """
    count = shape[1:].numel() if probes is None else len(probes)
    columns = []
    for i in range(count):
        if probes is None:
            v = torch.zeros(1, *shape[1:], dtype=x.dtype, device=x.device)
            v.view(-1)[i] = 1.0
        else:
            v = probes[i]
        carried = carry(v).expand_as(x)
        keep = create_graph or i + 1 < count
        (row,) = torch.autograd.grad(output, x, carried, retain_graph=keep, create_graph=create_graph)
        columns.append((row.double() * carried.double()).flatten(1).sum(-1))
    forms = torch.stack(columns, -1)
    return forms.sum(-1, keepdim=True) if probes is None else forms

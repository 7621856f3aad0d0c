r"""Small fast networks for controls: a field of x and time, in which time is embedded once a step, not once a walker.

.. math:: h_0 = \mathrm{act}(W x + e), \quad h_{i+1} = \mathrm{act}(A_i h_i), \quad y = V h_n + c

with :math:`e` an embedding of time by Fourier features. V and c are 0 at the start: a fresh network says nothing.
"""

from __future__ import annotations

from torch import Tensor, nn

from undrift.networks.base import FourierFeatures

__all__ = ["TimeGate", "TimeMLP", "as_rows"]


class TimeMLP(nn.Module):
    """A perceptron of points and time.

    Args:
        inputs, outputs: numbers at a point.
        width: of the hidden layers.
        depth: hidden layers after the first.
        frequencies: Fourier features of time, even.
    """

    def __init__(self, inputs: int, outputs: int, width: int = 64, depth: int = 2, frequencies: int = 64) -> None:
        super().__init__()
        self.embed = nn.Sequential(
            FourierFeatures(frequencies), nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.inward = nn.Linear(inputs, width, bias=False)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.outward = nn.Linear(width, outputs)
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(self.outward.bias)

    def time(self, label: Tensor) -> Tensor:
        """Times (steps,) in [0, 1] to embeddings (steps, width)."""
        return self.embed(4.0 * label - 2.0)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x (steps, batch, inputs) with the embeddings e (steps, width) of its times: (steps, batch, outputs)."""
        h = nn.functional.silu(self.inward(x) + e.unsqueeze(-2))
        for layer in self.hidden:
            h = nn.functional.silu(layer(h))
        return self.outward(h)


class TimeGate(nn.Module):
    """A factor, or one a coordinate, that depends on time alone; constant at the start.

    Args:
        outputs: 1, or the number of coordinates.
        initial: its value at the start.
        width, frequencies: as in :class:`TimeMLP`.
    """

    def __init__(self, outputs: int = 1, initial: float = 1.0, width: int = 64, frequencies: int = 64) -> None:
        super().__init__()
        last = nn.Linear(width, outputs)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, initial)
        self.net = nn.Sequential(
            FourierFeatures(frequencies), nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.net.append(last)

    def forward(self, label: Tensor) -> Tensor:
        """Times (steps,) in [0, 1] to factors (steps, outputs)."""
        return self.net(4.0 * label - 2.0)


def as_rows(value: Tensor) -> Tensor:
    """(steps, n) shaped to meet (steps, batch, n)."""
    return value.unsqueeze(-2)

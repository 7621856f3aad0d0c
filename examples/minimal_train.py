"""Train one denoiser on points in the plane, then sample it under three processes without training again.

    python minimal_train.py [steps]

The denoiser sees x0 + sigma n at random noise levels, and no process. The processes are chosen afterwards.
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from undrift import Diffusion, sample
from undrift.denoise import NetworkDenoiser
from undrift.networks import MLP
from undrift.process import CLD, VP, FlowMatching
from undrift.sample import Exponential
from undrift.train import Dataset, Denoising, TrainConfig, Trainer, load


def two_moons(n: int, seed: int = 0) -> Tensor:
    """Two interleaved half circles with a little noise, (n, 2), centred."""
    generator = torch.Generator().manual_seed(seed)
    angle = torch.pi * torch.rand(n, generator=generator)
    side = torch.randint(2, (n,), generator=generator) * 2 - 1
    x = torch.stack([angle.cos() - 0.5 * side, side * (angle.sin() - 0.25)], -1)
    return x + 0.05 * torch.randn(n, 2, generator=generator)


def picture(x: Tensor, rows: int = 11, columns: int = 44) -> list[str]:
    """A histogram of points in [-2, 2] x [-1.25, 1.25], in characters."""
    i = ((1.25 - x[:, 1]) / 2.5 * rows).long()
    j = ((x[:, 0] + 2) / 4 * columns).long()
    inside = (i >= 0) & (i < rows) & (j >= 0) & (j < columns)
    counts = torch.bincount(i[inside] * columns + j[inside], minlength=rows * columns).reshape(rows, columns)
    shade = (counts.float() / counts.max() * 4).ceil().long().clamp(max=4)
    return ["".join(" .:*#"[s] for s in row) for row in shade.tolist()]


def main(steps: int = 2000) -> None:
    data = Dataset("two moons", two_moons(20_000))
    denoiser = NetworkDenoiser(MLP(features=2, width=64, depth=3), sigma_data=data.std)

    # With a folder the run is kept: metrics, checkpoints, the model with averaged weights. Started again it resumes.
    folder = Path(tempfile.mkdtemp(prefix="minimal_train_"))
    config = TrainConfig(steps=steps, batch=512, lr=2e-3, warmup=min(200, steps), seed=0)
    fit = Trainer(denoiser, Denoising(), data, config, folder=folder).fit(progress=False)
    print(f"{fit.step} steps, loss {fit.loss:.3f}; kept in {folder}")

    denoiser = load(folder / "model.safetensors")
    columns = [picture(data.x[:4000])]
    for process in (VP(), CLD(), FlowMatching()):
        x = sample(Diffusion(process, denoiser), 4000, shape=(2,), sampler=Exponential(steps=30), seed=0)
        columns.append(picture(x))
    titles = ("data", "VP", "CLD", "flow matching")
    for k in (0, 2):
        print("\n" + "  ".join(f"{title:44}" for title in titles[k : k + 2]))
        for left, right in zip(columns[k], columns[k + 1], strict=True):
            print(left + "  " + right)


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))

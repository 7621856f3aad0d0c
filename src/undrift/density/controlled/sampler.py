"""A controlled diffusion that has been trained: it draws, says how good its draws are, and is kept in a file."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from undrift.config import build, describe
from undrift.container import read_file, write_file
from undrift.density.affine import AffineTarget
from undrift.density.bounds import bounds
from undrift.density.controlled.denoiser import ControlDenoiser
from undrift.density.controlled.diffusion import ControlledDiffusion
from undrift.density.controlled.walk import walk
from undrift.density.draws import Draws
from undrift.density.method import Method
from undrift.density.session import Session
from undrift.density.target import Target
from undrift.measure.evidence import log_mean_exp

if TYPE_CHECKING:
    from undrift.density.controlled.methods import Controlled

__all__ = ["Trained", "TrainedSampler"]

_PATHS = 1024  # walked back at a time
_FORWARD = 4096  # exact samples that are walked back, at most


@dataclass(frozen=True, eq=False)
class TrainedSampler:
    """A method, what it has learned, and for what.

    Attributes:
        method: with all its settings.
        diffusion: with the weights it draws with.
        target: as it was given.
        loc, scale: of the coordinates it works in; None for the target's own.
        record: of the training.
    """

    method: Controlled
    diffusion: ControlledDiffusion
    target: Target
    loc: Tensor | None = None
    scale: Tensor | None = None
    record: Sequence[Mapping[str, Any]] = ()

    @property
    def seen(self) -> Target:
        """The target in the coordinates of the diffusion."""
        if self.loc is None or self.scale is None:
            return self.target
        return self.target.affine(self.loc, self.scale)

    def draw(
        self,
        n: int,
        seed: int = 0,
        *,
        repeats: int = 8,
        steps: int | None = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        progress: bool = False,
    ) -> Draws:
        """More draws.

        Args:
            n: draws, over all repeats; rounded up to whole walkers.
            seed: the same seed gives the same draws on the same device.
            repeats: independent groups.
            steps: K, if it is to be another than the method's: the control serves any.
            dtype, device: of the walkers.
            progress: show a bar.

        Raises:
            ValueError: for numbers that do not fit.
        """
        if not 1 <= repeats <= n:
            raise ValueError(f"repeats must be at least 1 and at most n, got {repeats} for n = {n}.")
        began, before = time.perf_counter(), self.target.evaluations.copy()
        self.diffusion.to(device)
        method = self.method if steps is None else replace(self.method, steps=steps)
        twin = replace(self, method=method)
        generator = torch.Generator(device).manual_seed(seed)
        draws = twin.draws_of(self.seen, n, repeats, generator, dtype, progress=progress)
        spent = self.target.evaluations - before
        return replace(draws, evaluations=spent, seconds=time.perf_counter() - began)

    def draws_of(
        self,
        seen: Target,
        n: int,
        repeats: int,
        generator: torch.Generator,
        dtype: torch.dtype,
        *,
        progress: bool = False,
    ) -> Draws:
        """Draws of the target as it is seen; costs are for the caller to fill in."""
        m, walkers = self.method, -(-n // repeats)
        result = walk(
            self.diffusion,
            seen,
            repeats,
            walkers,
            generator,
            dtype,
            steps=m.steps,
            resampling=m.resampling,
            move=m.move,
            moves=m.moves,
            size=m.move_size,
            progress=progress,
        )
        found = None
        if m.resampling is None:
            found = bounds(result.log_weights, self._backward(seen, min(n, _FORWARD), generator, dtype))
        x = result.x
        if seen is not self.target:
            assert isinstance(seen, AffineTarget)
            x = seen.to_x(x.reshape(-1, seen.dim)).reshape(x.shape)
        accepted = [row["acceptance"] for row in result.rows if row["acceptance"] is not None]
        return Draws(
            target=self.target,
            states=x.unsqueeze(2),
            walker_log_weights=result.log_weights,
            corrected=True,
            repeat_log_z=log_mean_exp(result.log_weights),
            promise="unbiased",
            method=m.in_words(),
            acceptance=accepted[-1] if accepted else None,
            levels=tuple(result.rows),
            bounds=found,
            training=tuple(self.record),
            sampler=self,
        )

    def _backward(self, seen: Target, n: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor | None:
        """log w of paths walked back from exact samples, (n,); None where there are none."""
        if not seen.exact:
            return None
        spare = torch.Generator().manual_seed(generator.initial_seed() ^ 0x5EED)
        x = seen.sample(n, spare).to(generator.device, dtype)
        with torch.no_grad():
            tables = self.diffusion.tables(x, self.method.steps)
            parts = [
                self.diffusion.log_weights(tables, self.diffusion.walk_back(seen, tables, part, generator))
                for part in x.split(_PATHS)
            ]
        return torch.cat(parts)

    def denoiser(self) -> ControlDenoiser:
        """What was learned as E[x0 | x0 + sigma n], in the sampler's coordinates: for any process and any sampler."""
        return ControlDenoiser(self.diffusion, self.seen)

    # -- on disk -------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the method and its weights to one sealed safetensors file, atomically."""
        tensors = {f"diffusion.{k}": v.detach().cpu().contiguous() for k, v in self.diffusion.state_dict().items()}
        if self.loc is not None and self.scale is not None:
            tensors |= {"loc": self.loc.cpu().contiguous(), "scale": self.scale.cpu().contiguous()}
        about = {
            "kind": "sampler",
            "method": describe(self.method),
            "target": self.target.name,
            "dim": self.target.dim,
            "record": [dict(row) for row in self.record],
        }
        path = Path(path)
        write_file(path, tensors, about)
        return path

    @staticmethod
    def load(path: str | Path, target: Target) -> TrainedSampler:
        """A sampler from a file, for the target it was trained for.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if the file is of something else, or of a target with another name or dimension.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"no trained sampler at {Path(path).absolute()}; undrift density writes sampler.safetensors."
            )
        tensors, about = read_file(path)
        if about.get("kind") != "sampler":
            raise ValueError(f"{path} holds no trained sampler.")
        if (about["target"], about["dim"]) != (target.name, target.dim):
            raise ValueError(
                f"{path} was trained for {about['target']} in {about['dim']} dimensions, got {target.name} in "
                f"{target.dim}."
            )
        method = build(about["method"], Method)
        diffusion = ControlledDiffusion(method.scheme(method.train_steps), target.dim)
        prefix = "diffusion."
        diffusion.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
        return TrainedSampler(
            method, diffusion, target, tensors.get("loc"), tensors.get("scale"), tuple(about["record"])
        )


@dataclass(frozen=True, eq=False)
class Trained(Method):
    """Draws from a sampler that was trained before, and kept in a file.

    Args:
        path: of the file, such as sampler.safetensors in the folder of a run.
        steps: K, if it is to be another than the one it was made for.
    """

    path: str
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"Trained: steps must be at least 1, got {self.steps}.")

    def draw(self, session: Session) -> Draws:
        sampler = TrainedSampler.load(self.path, session.target)
        session.seen = sampler.seen
        return sampler.draw(
            session.n,
            session.seed,
            repeats=session.repeats,
            steps=self.steps,
            dtype=session.dtype,
            device=session.generator.device,
            progress=session.progress,
        )

    def in_words(self) -> str:
        """One line for reports."""
        return f"a trained sampler ({self.path})"

r"""The training loop.

Randomness has no memory: everything random in step i comes from generators seeded by (seed, i), and the order of the
data by (seed, epoch). A run that is killed and resumed therefore equals the uninterrupted one, bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from undrift.config import describe
from undrift.container import CheckpointError, read_file
from undrift.networks.base import takes_observed
from undrift.train.checkpoint import Model, build_model, describe_model, parts_of, save, with_parts, write_model
from undrift.train.config import TrainConfig
from undrift.train.data import Dataset, DataSource
from undrift.train.log import MetricLog
from undrift.train.objectives import Objective

__all__ = ["Fit", "Trainer", "TrainingDiverged"]

_MAY_CHANGE = ("steps", "checkpoint_every", "threads")
_MOMENTS = ("exp_avg", "exp_avg_sq")


class TrainingDiverged(RuntimeError):
    """A loss or a gradient that is not finite. ``step``, and ``sigma`` = (lowest, highest level of the batch)."""

    def __init__(self, message: str, step: int, sigma: tuple[float, float]) -> None:
        super().__init__(message)
        self.step, self.sigma = step, sigma


@dataclass(frozen=True)
class Fit:
    """What :meth:`Trainer.fit` did.

    Args:
        step: steps done in all.
        interrupted: stopped by Ctrl-C before the last step.
        loss: mean loss of the last (possibly partial) row of metrics; NaN if this call did no step.
        model: the model with averaged weights, in evaluation mode.
    """

    step: int
    interrupted: bool
    loss: float
    model: Any


def step_seed(seed: int, stream: str, index: int) -> int:
    """63-bit seed of a stream of randomness at a step or an epoch."""
    digest = hashlib.sha256(f"{seed}/{stream}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class Trainer:
    """Trains the network of a model, and its process if that is to be learned.

    With a folder, it writes ``last.safetensors`` (the whole state), ``model.safetensors`` (the model with averaged
    weights, for :func:`undrift.train.load`), ``metrics.jsonl``, and TensorBoard scalars where that is installed; and
    :meth:`fit` resumes from what the folder holds.

    Args:
        model: a NetworkDenoiser, a Diffusion of one, a NetworkClassifier, a NoiseDiffusion, or, without a folder, a
            NonlinearDiffusion; its network, and a learned process, are trained in place.
        objective: what is minimised.
        data: a data set, or the source of one.
        config: settings.
        folder: where the run is kept, or None to keep nothing.
        device: where to train.
        notes: plain data to store beside the model.
    """

    def __init__(
        self,
        model: Model,
        objective: Objective,
        data: Dataset | DataSource,
        config: TrainConfig | None = None,
        folder: str | Path | None = None,
        device: str | torch.device = "cpu",
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.objective = model, objective
        self.config = config or TrainConfig()
        self.folder = None if folder is None else Path(folder)
        self.device = torch.device(device)
        self.data = data.load() if isinstance(data, DataSource) else data
        if not isinstance(self.data, Dataset):
            raise TypeError(f"Trainer: data must be a Dataset or a DataSource, got a {type(data).__name__}.")
        if self.config.batch > len(self.data):
            raise ValueError(
                f"Trainer: batch is {self.config.batch}, but {self.data.name} has {len(self.data)} points."
            )
        self.parts = parts_of(model).to(self.device)
        self.network = self.parts["network"]
        classes = getattr(self.network, "classes", None)
        if classes is not None and (self.data.classes is None or self.data.classes > classes):
            raise ValueError(
                f"Trainer: the network takes {classes} classes, but {self.data.name} has {self.data.classes or 'none'}."
            )
        check_observed(self.network, self.data, self.config.observed_dropout)
        self.notes = {"data": self.data.name, "event": list(self.data.event), **(notes or {})}
        self.description: dict[str, Any] = {}
        if self.folder is not None:  # what cannot be described must fail now, not at the first checkpoint
            self.description = {
                "model": describe_model(model),
                "objective": describe(objective, "objective"),
                "data": {"name": self.data.name, "points": len(self.data), "event": list(self.data.event)},
                "config": {k: v for k, v in describe(self.config).items() if k not in _MAY_CHANGE},
            }
        self.step = 0
        # Kept by hand: on a small network torch's AveragedModel spends more on walking the modules than on averaging.
        self._averaged = copy.deepcopy(self.parts).eval().requires_grad_(False)
        self._pairs: list[tuple[list[Tensor], list[Tensor]]] = [
            (list(self._averaged[name].parameters()), [p.detach() for p in part.parameters()])
            for name, part in self.parts.items()
        ]
        self._trained = {name: [p for p in part.parameters() if p.requires_grad] for name, part in self.parts.items()}
        groups = [{"params": parameters, "part": name} for name, parameters in self._trained.items()]
        # The fused kernel knows no complex numbers, which weights of Fourier layers may be.
        fused = not any(p.is_complex() for part in self._trained.values() for p in part)
        self._optimizer = torch.optim.Adam(groups, lr=self.config.lr, betas=self.config.betas, fused=fused)
        # Rows of (loss, norms of the gradients of network and process, lowest and highest sigma) since the last row of
        # metrics; read in one transfer.
        self._window = torch.zeros(self.config.log_every, 5, device=self.device)
        self._here = self.data.to(self.device)
        self._labels = None if classes is None else self._here.labels
        self._order: tuple[int, Tensor] | None = None

    @property
    def average(self) -> Model:
        """The model with averaged weights, in evaluation mode; a copy."""
        for kept, now in zip(self._averaged.buffers(), self.parts.buffers(), strict=True):
            kept.copy_(now)
        return with_parts(self.model, copy.deepcopy(self._averaged))

    # -- one step ------------------------------------------------------------------------------------------------------

    def _indices(self, step: int) -> Tensor:
        """Points of a batch: the data in a fresh order every epoch, without regard to where a batch ends."""
        n, batch = len(self.data), self.config.batch
        first, out = step * batch, []
        while first < (step + 1) * batch:
            epoch, begin = divmod(first, n)
            if self._order is None or self._order[0] != epoch:
                g = torch.Generator().manual_seed(step_seed(self.config.seed, "epoch", epoch))
                self._order = (epoch, torch.randperm(n, generator=g).to(self.device))
            take = min(n - begin, (step + 1) * batch - first)
            out.append(self._order[1][begin : begin + take])
            first += take
        return out[0] if len(out) == 1 else torch.cat(out)

    def _train_step(self) -> None:
        seed = step_seed(self.config.seed, "step", self.step)
        # What the network itself draws: dropout. (torch.manual_seed seeds every backend, which takes a millisecond.)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        g = torch.Generator(self.device).manual_seed(seed ^ 1)
        index = self._indices(self.step)
        condition = {}
        if self._labels is not None:
            drop = torch.rand(len(index), generator=g, device=self.device) < self.config.class_dropout
            labels = self._labels[index]
            condition["y"] = labels.masked_fill(drop, -1) if self.objective.drops_classes else labels
        x = self._here.draw(index, g)
        observed = self._here.observe(index, x, g)
        if observed is not None and self.config.observed_dropout:
            drop = torch.rand(len(index), generator=g, device=self.device) < self.config.observed_dropout
            observed = observed.masked_fill(drop.reshape(-1, *[1] * (observed.ndim - 1)), math.nan)
        if observed is not None:
            condition["observed"] = observed
        per_sample, sigma = self.objective.loss(self.model, x, g, **condition)
        loss = per_sample.mean()
        loss.backward()
        row = self._window[self.step % self.config.log_every]
        norms = {name: self._norm(parameters) for name, parameters in self._trained.items()}
        process = norms.get("process", loss.new_zeros(())).to(self.device)
        low, high = sigma.detach().aminmax()
        torch.stack([v.float() for v in (loss.detach(), norms["network"], process, low, high)], out=row)
        if self.device.type == "cpu":  # elsewhere this would wait; there it is done with each row of metrics
            self._check(row.unsqueeze(0), self.step)
        if self.config.clip is not None:
            for name, norm in norms.items():
                scale = (self.config.clip / (norm + 1e-6)).clamp(max=1.0)
                if norm.device.type != "cpu" or float(scale) < 1:  # elsewhere asking would wait for the device
                    torch._foreach_mul_([p.grad for p in self._trained[name] if p.grad is not None], scale)
        for group in self._optimizer.param_groups:
            group["lr"] = self.config.rate(self.step, group["part"])
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        new = 1 - self.config.ema_decay(self.step) if self.step else 1.0
        for kept, now in self._pairs:
            torch._foreach_lerp_(kept, now, new)
        self.step += 1

    @staticmethod
    def _norm(parameters: list[nn.Parameter]) -> Tensor:
        grads = [p.grad for p in parameters if p.grad is not None]
        return torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())

    def _check(self, rows: Tensor, first: int) -> None:
        """Raise if a row of the window is not finite; ``first`` is the first row's step, counted from 0."""
        good = rows[:, :3].isfinite().all(1)
        if bool(good.all()):
            return
        bad = int((~good).nonzero()[0])
        loss, norm, process, low, high = rows[bad].tolist()
        what = f"loss {loss}" if not math.isfinite(loss) else f"gradient of norm {norm}"
        if math.isfinite(loss) and math.isfinite(norm):
            what = f"gradient of the process of norm {process}"
        kept = "nothing was kept, as no checkpoint had been written"
        if self.folder is not None and (self.folder / "last.safetensors").exists():
            kept = f"the last good checkpoint is kept in {self.folder}"
        raise TrainingDiverged(
            f"training stopped at step {first + bad + 1}: {what}, at noise levels sigma from {low:.4g} to "
            f"{high:.4g}; {kept}. Lower lr, lengthen warmup, lower clip, or look at the data.",
            first + bad + 1,
            (low, high),
        )

    # -- the run -------------------------------------------------------------------------------------------------------

    def fit(self, progress: bool = True) -> Fit:
        """Train to ``config.steps``, from what the folder holds if it holds a run.

        Ctrl-C ends the step in progress, writes a checkpoint and returns; a second Ctrl-C raises at once.

        Raises:
            TrainingDiverged: at a loss or gradient that is not finite.
            CheckpointError: if the folder's run has other settings, or its file is damaged.
        """
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.step == 0 and (self.folder / "last.safetensors").exists():
                self._resume(self.folder / "last.safetensors")
        first = self.step
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(_interruptible())
            stack.enter_context(_threads(self.config.threads))
            stack.enter_context(torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []))
            stack.enter_context(_autocast(self.network, self.device, self.config.precision))
            log = stack.enter_context(MetricLog(self.folder, self.step))
            bar = stack.enter_context(
                tqdm(total=self.config.steps, initial=first, disable=not progress, unit="step", mininterval=0.5)
            )
            self.network.train()
            clock = time.perf_counter(), self.step
            while self.step < self.config.steps and not stop.is_set():
                self._train_step()
                bar.update()
                if self.step % self.config.log_every == 0:
                    row = self._row(clock)
                    clock = time.perf_counter(), self.step
                    log.write(row)
                    bar.set_postfix(loss=f"{row['loss']:.4g}", refresh=False)
                if self.step % self.config.checkpoint_every == 0 and self.step < self.config.steps:
                    self._save()
            if self.step > first:
                self._save()
        self.network.eval()
        part = self._window[: self.step % self.config.log_every or self.config.log_every, 0]
        loss = float(part.mean()) if self.step > first else math.nan
        return Fit(self.step, self.step < self.config.steps, loss, self.average)

    def _row(self, clock: tuple[float, int]) -> dict[str, float]:
        rows = self._window.cpu()
        self._check(rows, self.step - len(rows))
        seconds = time.perf_counter() - clock[0]
        done = self.step - clock[1]
        learned = {"process_gradient_norm": float(rows[:, 2].mean())} if "process" in self.parts else {}
        return {
            "step": self.step,
            "samples": self.step * self.config.batch,
            "loss": float(rows[:, 0].mean()),
            "gradient_norm": float(rows[:, 1].mean()),
            **learned,
            "lr": self.config.rate(self.step - 1),
            "sigma_min": float(rows[:, 3].min()),
            "sigma_max": float(rows[:, 4].max()),
            "samples_per_second": done * self.config.batch / seconds,
        }

    # -- state ---------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        done = self.step % self.config.log_every
        self._check(self._window[:done].cpu(), self.step - done)
        if self.folder is None:
            return
        tensors = {f"raw/{k}": v for k, v in self.parts.state_dict().items()}
        for name, p in self.parts.named_parameters():
            for moment in _MOMENTS:
                if p in self._optimizer.state:
                    tensors[f"{moment}/{name}"] = self._optimizer.state[p][moment]
        if "process" in self.parts:  # the network's average is the file's model
            tensors |= {f"average/{k}": v for k, v in self._averaged["process"].state_dict().items()}
        tensors["window"] = self._window
        average = self.average
        write_model(
            self.folder / "last.safetensors", average, self.notes, tensors, {**self.description, "step": self.step}
        )
        save(self.folder / "model.safetensors", average, {**self.notes, "step": self.step})

    def _resume(self, path: Path) -> None:
        tensors, description = read_file(path)
        state = description["training"]
        if "step" not in state:
            raise CheckpointError(f"{path} holds a model but no training state; resume from last.safetensors of a run.")
        for part, given in self.description.items():
            kept = state[part]
            if kept != given:  # a file may be older than some settings, which then stood at their defaults
                kept = _completed(part, kept)
            differing = [f"{k}: {kept.get(k)!r} -> {given.get(k)!r}" for k in given if kept.get(k) != given.get(k)]
            if differing:
                raise CheckpointError(
                    f"{self.folder} holds a run of another {part} ({'; '.join(differing)}): to resume it give the "
                    "settings it was started with, to start anew give another folder."
                )
        self.parts.load_state_dict(_group(tensors, "raw"))
        self._averaged["network"].load_state_dict(_group(tensors, "weights"))
        if "process" in self.parts:
            self._averaged["process"].load_state_dict(_group(tensors, "average"))
        moments = {m: _group(tensors, m) for m in _MOMENTS}
        for name, p in self.parts.named_parameters():
            if name in moments["exp_avg"]:
                self._optimizer.state[p] = {
                    "step": torch.tensor(float(state["step"]), device=p.device),
                    **{m: torch.empty_like(p).copy_(moments[m][name]) for m in _MOMENTS},
                }
        self._window.copy_(tensors["window"])
        self.step = state["step"]


def check_observed(network: Any, data: Dataset, dropout: float) -> None:
    """See that data, network and dropout agree on what is observed.

    Raises:
        ValueError: if the network is told what the data do not say, if observations are dropped that are not there or
            that the network cannot do without, or if it could and none are dropped.
    """
    optional = bool(getattr(network, "condition_optional", False))
    if data.observed is None and (optional or takes_observed(network)):
        raise ValueError(
            f"Trainer: the network is conditioned on what was observed, but {data.name} has no observations; "
            "give its Dataset observed=, or wrap its source in Simulated."
        )
    if dropout and data.observed is None:
        raise ValueError(
            f"Trainer: observed_dropout is {dropout:g}, but {data.name} has no observations to drop; leave it at 0."
        )
    if dropout and not optional:
        raise ValueError(
            f"Trainer: observed_dropout is {dropout:g}, but the {type(network).__name__} cannot do without what was "
            "observed; build it with condition_optional=True. A network of your own says by an attribute of that name "
            "that it reads an observation that is all NaN as none."
        )
    if optional and not dropout:
        raise ValueError(
            f"Trainer: the {type(network).__name__} may be told nothing (condition_optional), which it never learns at "
            "observed_dropout 0; give 0.1, say, or a network that is always told."
        )


def _completed(part: str, description: dict[str, Any]) -> dict[str, Any]:
    """What an older file says of its model or settings, with what has been added since at its default."""
    if part == "config":
        return {**describe(TrainConfig()), **description}
    if part == "model":
        with torch.random.fork_rng(devices=[]):  # a network draws its weights
            return describe_model(build_model(description))
    return description


def _group(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{name}/"): v for k, v in tensors.items() if k.startswith(f"{name}/")}


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second raises. Outside the main thread Ctrl-C is not ours."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(signal.SIGINT)

    def handler(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _autocast(network: nn.Module, device: torch.device, precision: str) -> Iterator[None]:
    """Run the network, and it alone, in bfloat16 where that is safe: 8 bits of coefficients would ruin the data."""
    if precision == "float32":
        yield
        return
    network.forward = torch.autocast(device.type, torch.bfloat16)(network.forward)
    try:
        yield
    finally:
        del network.forward

"""Settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["TrainConfig"]


@dataclass(frozen=True, eq=False)
class TrainConfig:
    """Settings of a training run.

    Args:
        steps: optimiser steps in all; a finished run continues if it is raised.
        batch: samples per step.
        lr: learning rate of Adam.
        process_lr: learning rate of a learned process; null for ``lr``.
        betas: Adam's averaging coefficients.
        warmup: steps over which the learning rate rises linearly from 0 to ``lr``.
        clip: largest norm of the gradient, or None; of the network and of a learned process apart.
        ema: half-life of the weights' average, in samples seen.
        ema_rampup: the half-life is at most this share of the samples seen so far, so that the average forgets the
            start early on (Karras et al. 2022, appendix F.2).
        class_dropout: probability of training a sample without its class, for classifier-free guidance.
        observed_dropout: probability of training a sample without what was observed of it, so that the network knows
            the prior beside the posterior; above 0 exactly for networks that do without (condition_optional).
        precision: "float32", or "bf16": the network runs under autocast; coefficients, losses and weights stay float32.
        seed: of everything random.
        log_every: steps between rows of metrics.
        checkpoint_every: steps between checkpoints; the last step always writes one.
        threads: threads within an operation, or None to leave them as they are. Bit for bit the same result needs the
            same number.
    """

    steps: int = 10_000
    batch: int = 128
    lr: float = 1e-3
    process_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: int = 200
    clip: float | None = 1.0
    ema: float = 100_000.0
    ema_rampup: float = 0.05
    class_dropout: float = 0.1
    observed_dropout: float = 0.0
    precision: Literal["float32", "bf16"] = "float32"
    seed: int = 0
    log_every: int = 100
    checkpoint_every: int = 1000
    threads: int | None = None

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise ValueError(f"TrainConfig: {name} must be {expected}, got {getattr(self, name)!r}.")

        for name in ("steps", "batch", "log_every", "checkpoint_every"):
            check(getattr(self, name) >= 1, name, "at least 1")
        check(0 < self.lr < math.inf, "lr", "positive and finite")
        check(self.process_lr is None or 0 < self.process_lr < math.inf, "process_lr", "positive and finite, or null")
        check(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas", "two numbers in [0, 1)")
        check(self.warmup >= 0, "warmup", "0 or more")
        check(self.clip is None or 0 < self.clip < math.inf, "clip", "positive, or null for none")
        check(0 < self.ema < math.inf, "ema", "a positive number of samples")
        check(0 < self.ema_rampup < math.inf, "ema_rampup", "positive")
        check(0 <= self.class_dropout <= 1, "class_dropout", "a probability")
        check(0 <= self.observed_dropout <= 1, "observed_dropout", "a probability")
        check(self.precision in ("float32", "bf16"), "precision", "'float32' or 'bf16'")
        check(self.seed >= 0, "seed", "0 or more")
        check(self.threads is None or self.threads >= 1, "threads", "at least 1, or null")

    def rate(self, step: int, part: str = "network") -> float:
        """Learning rate of step 0, 1, ... for the "network" or the "process"."""
        full = self.process_lr if part == "process" and self.process_lr is not None else self.lr
        return full * min(1.0, (step + 1) / self.warmup) if self.warmup else full

    def ema_decay(self, step: int) -> float:
        """Weight of the old average at step 0, 1, ..."""
        half_life = min(self.ema, self.ema_rampup * (step + 1) * self.batch)
        return 0.5 ** (self.batch / half_life)

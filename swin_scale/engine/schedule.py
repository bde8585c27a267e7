"""The learning rate as a pure function of the step: resuming needs no state, and a plan can draw the curve."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from swin_scale.config import Config, learning_rate_scale
from swin_scale.errors import UserError

LINEAR_FLOOR = 0.01
"""Fraction of the peak at which a linear schedule ends, as in the official code; it has no min_lr."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rates of a whole run, in absolute units; counts are in steps (global batches).

    A step is counted from 0 and counts skipped updates too. The official code computes its rate after the previous
    update, so that its first two updates both run at `warmup_lr` and its update n at our ``lr(n - 1)``; here update n
    runs at ``lr(n)``, the same curve without that lag.

    With layer-wise decay only the peak of a group is scaled: `warmup_lr` and `min_lr` are the same absolute rates for
    all groups, as in the official fine-tuning runs (timm 0.4.12's schedulers).
    """

    name: Literal["cosine", "linear", "step", "multistep"]
    peak_lr: float
    warmup_lr: float
    min_lr: float
    warmup: int
    total: int
    warmup_prefix: bool = True
    decay_steps: float = 1.0
    decay_rate: float = 0.1
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1

    @classmethod
    def from_config(cls, config: Config, steps_per_epoch: int) -> Schedule:
        """Resolve epochs and batch scaling; raises UserError when the warm-up does not fit the schedule."""
        given, scale = config.schedule, learning_rate_scale(config)
        lr = config.optim.lr if config.optim.lr is not None else config.optim.lr_per_512
        assert lr is not None, "validate() lets exactly one of the two through"
        total = given.total_steps or config.train.epochs * steps_per_epoch
        warmup = given.warmup_steps
        if warmup is None:
            warmup = int(given.warmup_epochs * steps_per_epoch)
        if warmup >= total:
            key = "warmup_epochs" if given.warmup_steps is None else "warmup_steps"
            raise UserError(
                f"schedule.{key} is {getattr(given, key)}, a warm-up of {warmup} steps in a schedule of {total}; "
                f"set it below {given.warmup_epochs * total / warmup if key == 'warmup_epochs' else total:g}"
            )
        milestones = tuple(sorted(epoch * steps_per_epoch for epoch in given.multisteps))
        if given.name == "multistep" and milestones[0] < warmup:
            raise UserError(
                f"schedule.multisteps starts at epoch {min(given.multisteps):g}, inside the warm-up of {warmup} steps "
                f"({steps_per_epoch} per epoch); shorten schedule.warmup_epochs or start later"
            )
        if given.name == "step" and not given.decay_epochs > 0:
            raise UserError(f"schedule.decay_epochs is {given.decay_epochs}; it must be above 0")
        return cls(
            name=given.name,
            peak_lr=lr * scale,
            warmup_lr=given.warmup_lr * scale,
            min_lr=given.min_lr * scale,
            warmup=warmup,
            total=total,
            warmup_prefix=given.warmup_prefix,
            decay_steps=given.decay_epochs * steps_per_epoch,
            decay_rate=given.decay_rate,
            milestones=milestones,
            gamma=given.gamma,
        )

    def lr(self, step: int) -> float:
        """Rate of the update that follows `step` consumed global batches (0 for the first)."""
        return self.group_lr(step, 1.0)

    def group_lr(self, step: int, scale: float) -> float:
        """Rate of a parameter group whose peak is `scale` times the schedule's (its layer-wise decay)."""
        peak = self.peak_lr * scale
        if step < self.warmup:
            return self.warmup_lr + step * (peak - self.warmup_lr) / self.warmup
        if self.name == "step":
            return peak * self.decay_rate ** (step // self.decay_steps)
        if self.name == "multistep":
            return peak * self.gamma ** bisect.bisect_right(self.milestones, step)
        if self.name == "linear":
            done = min((step - self.warmup) / (self.total - self.warmup), 1.0)
            return peak - (1.0 - LINEAR_FLOOR) * peak * done
        start = self.warmup if self.warmup_prefix else 0
        done = min((step - start) / (self.total - start), 1.0)
        return self.min_lr + 0.5 * (peak - self.min_lr) * (1.0 + math.cos(math.pi * done))

    def group_lrs(self, step: int, scales: Sequence[float]) -> list[float]:
        """Rates of several groups at one step."""
        return [self.group_lr(step, scale) for scale in scales]

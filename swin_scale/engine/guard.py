"""The loss guard: what makes a step suspect, who is to blame for it, and what the run leaves out from then on.

After every step `Guard.judge` looks at numbers that all ranks have in common; a loss past `Guard.loss_limit` was kept
from updating anything already (`Engine.train_step`). On trouble, all ranks together: `attribute` finds the cause,
`trip` writes it to ``guard.jsonl`` or ends the run when the budget is spent, and `train` goes back to the newest
checkpoint.

Who is blamed:

- a parameter that is not finite: the ranks that hold it. Nothing is left out;
- a loss that is fine when the same batch is computed once more: nobody (a computation went wrong). Nothing is left out;
- samples whose own loss is not finite: these, and no others;
- after a spike, samples whose own losses stand out, if the rest of the batch is no spike without them: these;
- anything else, or what was blamed in this step before did not help: the batch, for this one step, as PaLM's authors
  skipped batches (Chowdhery et al., 2022, section 5.1).

Blamed samples stay left out for the rest of the run. What was left out, and from which step on, is in ``guard.jsonl``
and in every checkpoint: a run resumed from anywhere, on any number of ranks, sees the samples that it saw before.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch

from swin_scale import config as keys
from swin_scale.data import Batch, LeftOut
from swin_scale.engine.dist import Dist
from swin_scale.engine.engine import Engine, StepResult
from swin_scale.errors import DivergedError
from swin_scale.log import JsonLines, read_jsonl

logger = logging.getLogger(__name__)

SIGMA = 1.4826
"""Standard deviation of a normal distribution in units of its median absolute deviation."""
START_SHARE = 0.5
"""A spike rises by at least this share of the level that the run began with, so that near a loss of zero, where batches
of easy images differ by factors, nothing is one."""
MAX_BLAMED_SHARE = 0.25
"""If more of a batch than this stands out, it is not the samples."""
MAX_NAMES = 8
"""Parameters of a rank that are named."""
FILE_NAME = "guard.jsonl"


class Detector:
    """Finds spikes in a series of positive numbers: far above the median of the last accepted ones."""

    def __init__(self, *, factor: float, deviations: float, window: int, warmup: int) -> None:
        """See `config.Guard`; `factor` 0 finds none."""
        self.factor, self.deviations, self.warmup = factor, deviations, warmup
        self._values: deque[float] = deque(maxlen=window)
        self._start: float | None = None

    def limit(self) -> float:
        """The largest number that is no spike, exact in fp32; infinite while there is too little to compare with."""
        if not self.factor or self._start is None or len(self._values) < self.warmup:
            return math.inf
        middle, deviation = robust(self._values)
        rise = max((self.factor - 1) * middle, self.deviations * deviation, START_SHARE * self._start)
        return float(np.float32(middle + rise))

    def accept(self, value: float) -> None:
        """Take a finite number that was no spike into the window."""
        self._values.append(value)
        if self._start is None and len(self._values) >= self.warmup:
            self._start = median(self._values)

    def state(self) -> dict[str, Any]:
        """What `restore` takes; JSON."""
        return {"values": list(self._values), "start": self._start}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._values = deque(map(float, state["values"]), self._values.maxlen)
        self._start = None if state["start"] is None else float(state["start"])


def robust(values: Sequence[float] | deque[float]) -> tuple[float, float]:
    """Median, and standard deviation estimated from the median absolute deviation (Hampel, 1974)."""
    middle = median(values)
    return middle, SIGMA * median(abs(value - middle) for value in values)


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """What is wrong with a step."""

    step: int
    """From 1, as in ``metrics.jsonl``."""
    what: Literal["loss", "auxiliary loss", "gradient norm", "weights"]
    value: float = math.nan
    limit: float = math.inf
    """What a spike exceeds; infinite for what is not finite."""

    def __str__(self) -> str:
        if self.what == "weights":
            return "weights that are not finite"
        if math.isfinite(self.value):
            return f"{self.what} {self.value:.4g}, a spike above {self.limit:.4g}"
        return f"{self.what} that is not finite"


@dataclass(frozen=True, kw_only=True)
class Blame:
    """Who caused a `Trouble`."""

    who: Literal["samples", "batch", "ranks", "nobody"]
    why: str
    slots: tuple[int, ...] = ()
    """Slots of the global batch whose samples are blamed one by one."""
    ids: np.ndarray
    """(global batch,) int64, coded as in `Batch.ids`."""
    losses: np.ndarray
    """(global batch,) float64: the loss of each sample in the step, 0 in empty slots."""
    ranks: Mapping[str, list[str]]
    """Rank -> parameters that are not finite on it, the first few."""

    @property
    def left_out(self) -> tuple[int, ...] | None:
        """Ids to leave out: those of `slots`; None is the whole batch."""
        return None if self.who == "batch" else tuple(sorted({int(self.ids[slot]) for slot in self.slots}))


class Guard:
    """The guard of one run. Methods that speak of all ranks are called by all of them together."""

    def __init__(self, run_dir: Path, config: keys.Config, dist: Dist) -> None:
        """Reads what ``guard.jsonl`` of an earlier start says; all ranks together."""
        self.config, self._dist = config.guard, dist
        self._scaled = config.engine.precision == "fp16"
        rest = {name: getattr(config.guard, name) for name in ("deviations", "window", "warmup")}
        self._loss = Detector(factor=config.guard.loss_factor, **rest)
        self._norm = Detector(factor=config.guard.norm_factor, **rest)
        self._path = run_dir / FILE_NAME
        self._lines: JsonLines | None = None
        self._trips: list[dict[str, Any]] = []
        rows = read_jsonl(self._path) if dist.is_main else []
        known = [trip for row in rows if (trip := _trip(row)) is not None]
        self._remember(dist.broadcast_json("guard", known))

    @property
    def on(self) -> bool:
        return self.config.enabled

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """What no batch holds any more, whether the guard is on now or not."""
        return tuple(
            LeftOut(
                step=trip["step"] - 1,
                ids=None if trip["ids"] is None else tuple(trip["ids"]),
                reason=f"left out by the loss guard after step {trip['step']}: {trip['trouble']}",
            )
            for trip in self._trips
            if trip["ids"] is None or trip["ids"]
        )

    def loss_limit(self) -> float:
        """The largest loss of the next step that may update anything."""
        return self._loss.limit() if self.on else math.inf

    def judge(self, step: int, result: StepResult) -> Trouble | None:
        """What is wrong with step number `step` (from 1), if anything; the same on all ranks.

        Waits for the device: these numbers are due before the next step.
        """
        aux = result.loss.new_zeros(()) if result.aux_loss is None else result.aux_loss
        loss, aux_loss, norm, valid = torch.stack([result.loss, aux, result.grad_norm, result.valid_samples]).tolist()
        if not valid:
            return None  # all of it was left out, and nothing updated
        if not math.isfinite(loss) or loss > (limit := self._loss.limit()):
            return Trouble(step=step, what="loss", value=loss, limit=limit if math.isfinite(loss) else math.inf)
        if not math.isfinite(aux_loss):
            return Trouble(step=step, what="auxiliary loss", value=aux_loss)
        if not math.isfinite(norm):
            if not self._scaled or result.loss_scale <= 1.0:
                return Trouble(step=step, what="gradient norm", value=norm)
            # An overflow of scaled fp16 gradients is how the loss scale finds its value.
        elif norm > (limit := self._norm.limit()):
            return Trouble(step=step, what="gradient norm", value=norm, limit=limit)
        else:
            self._norm.accept(norm)
        self._loss.accept(loss)
        return None

    def judge_weights(self, step: int, engine: Engine) -> Trouble | None:
        """Whether what would be saved after `step` steps is finite on all ranks: no checkpoint holds anything else."""
        bad = self._dist.any_rank(bool(engine.not_finite()))
        return Trouble(step=step, what="weights") if bad else None

    def attribute(
        self, trouble: Trouble, batch: Batch, result: StepResult, engine: Engine, again: Callable[[], torch.Tensor]
    ) -> Blame:
        """Who caused `trouble`; all ranks together, and to the same answer.

        Args:
            batch: this rank's part of the step's batch.
            again: computes the losses of this rank's samples, (B,) fp32, once more, from the weights as they are now.
        """
        names = self._dist.gather_json("guard parameters", engine.not_finite()[:MAX_NAMES])
        bad = {str(rank): found for rank, found in enumerate(names or ()) if found}
        bad = self._dist.broadcast_json("guard ranks", bad)
        ids = np.array(self._dist.all_gather_ints(batch.ids.tolist()), np.int64).reshape(-1)
        losses = self._gather(result.sample_losses)
        valid = ids >= 0
        known = {"ids": ids, "losses": np.where(valid, losses, 0.0), "ranks": bad}
        if bad:
            held = "; ".join(f"rank {rank}: {', '.join(found)}" for rank, found in bad.items())
            return Blame(who="ranks", why=f"parameters that are not finite ({held})", **known)
        if trouble.what == "loss":
            # The weights are those that the step began with, since it updated nothing.
            losses = self._gather(again())
            mean = losses[valid].mean()
            if math.isfinite(mean) and mean <= trouble.limit:
                odd = np.flatnonzero(valid & ~np.isfinite(known["losses"])) // len(batch.ids)
                where = f" (not finite before on ranks {sorted(set(odd.tolist()))})" if len(odd) else ""
                why = f"the same batch, computed once more, gave a sound loss{where}"
                return Blame(who="nobody", why=why, **known)
            known["losses"] = np.where(valid, losses, 0.0)
        slots, why = blame_samples(losses, valid, trouble, self.config)
        if any(trip["step"] == trouble.step and trip["ids"] for trip in self._trips) and np.isfinite(losses).all():
            slots, why = [], "leaving out single samples of it did not help"
        return Blame(who="samples" if slots else "batch", why=why, slots=tuple(slots), **known)

    def trip(self, trouble: Trouble, blame: Blame, evidence: str) -> None:
        """Count the trouble and leave out who is blamed for it; all ranks together.

        Raises DivergedError when the run has gone back often enough; then nothing is left out, so that the same command
        with a larger budget finds the same trouble again. `evidence`: where the batch was saved.
        """
        budget, reach = self.config.max_rollbacks, self.config.budget_steps
        spent = sum(abs(trouble.step - trip["step"]) < reach for trip in self._trips)
        ids = None if blame.left_out is None else list(blame.left_out)
        row = {"time": time.time(), "step": trouble.step, "trouble": str(trouble), "ids": ids}
        row = self._dist.broadcast_json("guard trip", row)
        if self._dist.is_main:
            if self._lines is None:  # most runs have no trouble
                self._lines = JsonLines(self._path)
            action = "stopped" if spent >= budget else "rolled back"
            more = {"blamed": blame.who, "why": blame.why, "ranks": dict(blame.ranks), "evidence": evidence}
            self._lines.write([{**row, "action": action, **more}])
        if spent >= budget:
            raise DivergedError(
                f"step {trouble.step}: {trouble} ({blame.who} blamed: {blame.why}), and the run has gone back {spent} "
                f"times within {reach} steps (guard.max_rollbacks {budget}); look at the batch in {evidence}, lower "
                "optim.lr, or raise guard.max_rollbacks"
            )
        self._remember([row])

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it; the same on all ranks."""
        return {"loss": self._loss.state(), "norm": self._norm.state(), "trips": self._trips}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Take up the `state` of a checkpoint, which lacks it if an earlier version wrote it; trips only add up."""
        if state is None:
            state = {"loss": {"values": [], "start": None}, "norm": {"values": [], "start": None}, "trips": []}
        self._loss.restore(state["loss"])
        self._norm.restore(state["norm"])
        self._remember([trip for row in state["trips"] if (trip := _trip(row)) is not None])

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()

    def _remember(self, trips: Iterable[dict[str, Any]]) -> None:
        known = {(trip["time"], trip["step"]) for trip in self._trips}
        self._trips += [trip for trip in trips if (trip["time"], trip["step"]) not in known]

    def _gather(self, losses: torch.Tensor) -> np.ndarray:
        """(global batch,) float64 of every rank's (B,)."""
        return np.array(self._dist.all_gather_floats(losses.tolist())).reshape(-1)


def blame_samples(losses: np.ndarray, valid: np.ndarray, trouble: Trouble, config: keys.Guard) -> tuple[list[int], str]:
    """(slots, why) of the samples that caused `trouble`; no slots: nobody in particular, and why not.

    Args:
        losses: (global batch,) of each sample.
        valid: (global batch,) bool; empty slots cause nothing.
    """
    odd = valid & ~np.isfinite(losses)
    if odd.any():
        if odd.sum() > MAX_BLAMED_SHARE * valid.sum():
            return [], f"the losses of {odd.sum()} of {valid.sum()} samples are not finite, though all weights are"
        return np.flatnonzero(odd).tolist(), "their losses are not finite, though all weights are"
    if not math.isfinite(trouble.value):
        return [], "all losses and weights are finite"
    middle, deviation = robust(losses[valid].tolist())
    bar = middle + max((config.loss_factor - 1) * middle, config.deviations * deviation)
    out = valid & (losses > bar)
    if not out.any() or out.sum() > MAX_BLAMED_SHARE * valid.sum():
        return [], f"{out.sum()} of {valid.sum()} losses stand out (above {bar:.4g})"
    rest = losses[valid & ~out].mean()
    if trouble.what == "loss" and rest > trouble.limit:
        return [], f"without the {out.sum()} losses that stand out (above {bar:.4g}) the mean is still {rest:.4g}"
    return np.flatnonzero(out).tolist(), f"their losses are above {bar:.4g}, {middle:.4g} being usual in this batch"


def _trip(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """What is remembered of a line of ``guard.jsonl``; None for the end of a run, and for what we did not write."""
    ids = row.get("ids")
    sound = isinstance(row.get("step"), int) and (ids is None or isinstance(ids, list)) and "trouble" in row
    if not sound or row.get("action") == "stopped":
        return None
    return {key: row.get(key) for key in ("time", "step", "trouble", "ids")}

"""The run's diary: one row per step, its sample ids digested over all ranks, bad samples in the ledger, events.

A step is only remembered; everything that needs another rank or the device's numbers happens in `StepLog.flush`, every
`train.log_every` steps and before every checkpoint. What rank 0 finds there (too many bad samples, time to save) all
ranks learn in the same flush.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed

from swin_scale.config import Config
from swin_scale.data import Batch, SkipLedger, Skipped, TrainStream, batch_digest
from swin_scale.engine.dist import Dist
from swin_scale.engine.engine import StepResult
from swin_scale.engine.metrics import MetricWriter, Progress, StepClock
from swin_scale.engine.routing import RoutingLog, RoutingRecord
from swin_scale.engine.stragglers import Report, StragglerWatch
from swin_scale.errors import DataError
from swin_scale.sections import Sections

logger = logging.getLogger(__name__)

IMAGE_EVERY = 5
"""Of the ``routing`` events, every one of so many is drawn in TensorBoard, and the last."""


class StepLog:
    """Rows, events and the skip ledger of one run. Every method is called by all ranks together."""

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        stream: TrainStream,
        dist: Dist,
        *,
        total_steps: int,
        flops_per_image: float,
        sections: Sections,
    ) -> None:
        """`flops_per_image`: multiply-adds of one forward. `sections`: the clock by which ranks are compared."""
        self._dist, self._stream = dist, stream
        self._writer = MetricWriter(run_dir, enabled=dist.is_main, tensorboard=config.train.tensorboard)
        self._ledger = SkipLedger(run_dir / "skipped.jsonl", max_rate=config.data.max_bad_rate)
        # Forward and backward: three times the forward's multiply-adds, two operations each.
        self._clock = StepClock(device=dist.device, ranks=dist.world, flops_per_image=6 * flops_per_image)
        world = torch.distributed.group.WORLD
        assert world is not None, "StepLog before dist.init"
        self._routing = RoutingLog(world, total_steps=total_steps)
        self._stragglers = StragglerWatch(sections, dist, every=config.health.stragglers_every)
        self._maps = 0
        self._progress: Progress | None = None
        self._total_steps = total_steps
        self._pending: list[tuple[Batch, dict[str, Any]]] = []
        self.skips_in_a_row = 0

    def start(self, step: int) -> None:
        """Training begins at `step`: set-up is not a step's time."""
        if self._dist.is_main:
            if self._progress is not None:
                self._progress.close()
            self._progress = Progress(self._total_steps, initial=step)
        self._clock.restart()
        self._stragglers.restart()

    def add(self, batch: Batch, result: StepResult) -> None:
        """Remember one step."""
        if not result.skipped:
            self.skips_in_a_row = 0
        elif result.valid_samples > 0:  # a batch that was left out is no sign of trouble
            self.skips_in_a_row += 1
        order = self._stream.order
        in_epoch = (batch.step % self._stream.steps_per_epoch + 1) * order.global_batch
        row = {
            "step": batch.step + 1,
            "epoch": batch.epoch,
            "samples": batch.epoch * self._stream.samples + min(in_epoch, self._stream.samples),
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "loss_scale": result.loss_scale,
            "skipped": result.skipped,
            **self._clock.step(order.global_batch),
            "data_wait_s": batch.wait_s,
        }
        if result.aux_loss is not None:
            row["aux_loss"] = result.aux_loss
        self._routing.add(result.routing)
        self._stragglers.step()
        # The images go back to the loader; only what the diary needs is kept.
        nothing = torch.empty(0, dtype=torch.uint8)
        self._pending.append((dataclasses.replace(batch, images=nothing, masks=nothing), row))

    def flush(self, *, save_due: bool = False) -> bool:
        """Write what is pending; returns whether rank 0 says that a checkpoint is due.

        Raises DataError on all ranks when too many samples were unusable.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return False
        ids = self._dist.all_gather_ints([int(i) for batch, _ in pending for i in batch.ids.tolist()])
        by_rank = np.array(ids, dtype=np.int64).reshape(self._dist.world, len(pending), -1)
        mine = [[dataclasses.asdict(record) for record in batch.skipped] for batch, _ in pending]
        skipped: list[Any] | None = None
        if self._dist.any_rank(any(mine)):
            skipped = self._dist.gather_json("skipped samples", mine)
        routing = self._routing.flush(pending[-1][1]["step"], sum(row["step_s"] for _, row in pending))
        compared = self._stragglers.report()
        problem = None
        if self._dist.is_main:
            if routing is not None:
                pending[-1][1].update(routing.row)
            for i, (_, row) in enumerate(pending):
                digest = batch_digest(by_rank[:, i].reshape(-1))
                self._writer.add({**row, "batch_digest": digest})
            rows = self._writer.flush()
            if routing is not None:
                with self._routing.on_account():
                    self._routing_events(rows[-1]["step"], routing)
            if compared is not None:
                self._straggler_events(rows[-1]["step"], compared)
            problem = self._keep_ledger([batch for batch, _ in pending], by_rank, skipped)
            if self._progress is not None:
                self._progress.update(rows[-1]["step"], rows[-1])
        answer = self._dist.broadcast_json("flush", {"problem": problem, "save": save_due})
        if answer["problem"]:
            raise DataError(answer["problem"])
        return bool(answer["save"])

    def _keep_ledger(self, batches: list[Batch], by_rank: np.ndarray, skipped: list[Any] | None) -> str | None:
        for i, batch in enumerate(batches):
            records = [Skipped(**r) for share in skipped or [] for r in share[i]]
            seen = int((by_rank[:, i] != -1).sum())
            try:
                self._ledger.add(batch.step + 1, batch.epoch, seen, records)
            except DataError as error:
                return str(error)
            for record in records:
                self._writer.event("skipped_sample", batch.step + 1, **record.row())
        return None

    def _routing_events(self, step: int, routing: RoutingRecord) -> None:
        for alarm in routing.alarms:
            logger.warning("step %d: %s", step, alarm.problem)
            self._writer.event(alarm.name, step, layer=alarm.layer, problem=alarm.problem, **alarm.fields)
        if routing.maps is not None:
            self._writer.event("routing", step, **routing.maps)
            self._maps += 1
            # Pictures cost more than all the numbers together.
            if self._maps % IMAGE_EVERY == 1 or step == self._total_steps:
                for name, layer in routing.maps["layers"].items():
                    if layer["dropped"] is not None:
                        self._writer.heat_map(f"moe/{name}/dropped", np.array(layer["dropped"]), step)

    def _straggler_events(self, step: int, compared: Report) -> None:
        self._writer.event("stragglers", step, **compared.fields)
        for slow in compared.begun:
            logger.warning("step %d: %s", step, slow)
            self._writer.event("slow_rank", step, **slow.row())

    def event(self, name: str, step: int, **fields: Any) -> None:
        """Write an event after the pending rows, and leave its time out of the next step's."""
        self.flush()
        self._writer.event(name, step, **fields)
        if self._dist.is_main:
            logger.info("%s at step %d: %s", name, step, ", ".join(f"{k} {_short(v)}" for k, v in fields.items()))
        self._clock.restart()

    def picture(self, picture: torch.Tensor, step: int) -> None:
        """Keep a picture (3, H, W) uint8 of what the model makes of images."""
        name = self._writer.picture(picture, step)
        self.event("picture", step, file=name)

    def figure(self, tag: str, value: float, step: int) -> None:
        """Draw one number in TensorBoard; on rank 0, which alone may know it."""
        self._writer.figure(tag, value, step)

    def first_batch(self, images: torch.Tensor) -> None:
        """Draw the first batch, as rank 0 sees it before mixing."""
        self._writer.images("first_batch", images)

    def state(self) -> dict[str, Any]:
        """What must survive a restart: skips in a row, how many samples were seen and unusable, routers' alarms."""
        counts = self._dist.broadcast_json("ledger", {"seen": self._ledger.seen, "bad": self._ledger.bad})
        routers = self._dist.broadcast_json("routers", self._routing.watch.state())
        return {"skips_in_a_row": self.skips_in_a_row, "ledger": counts, "routers": routers}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up `state` of a checkpoint."""
        self.skips_in_a_row = int(state["skips_in_a_row"])
        self._ledger.seen, self._ledger.bad = int(state["ledger"]["seen"]), int(state["ledger"]["bad"])
        self._routing.watch.restore(state.get("routers", {}))  # checkpoints of dense models may lack it

    def go_back(self, state: Mapping[str, Any], step: int) -> None:
        """Take up an earlier `state`, that after `step` steps: the rows from there on come again."""
        self.flush()
        self.restore(state)
        self._writer.go_back(step + 1)
        self.start(step)

    def __enter__(self) -> StepLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.close()
        self._ledger.close()
        self._writer.close()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""One training run from config to final checkpoint; the same call resumes it.

In the order in which it happens: `job.prepare` judges the whole request before any process group exists; `run` joins
the ranks, finds the checkpoint to resume from, wraps the model, and loops: batch -> step -> record -> save -> evaluate.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash

from swin_scale.checkpoint import SMALL_FILES, Checkpoint, checkpoint_bytes, list_steps, shortage
from swin_scale.config_load import LoadedConfig, config_from_text, diff_configs
from swin_scale.data import Batch, draw_mix, finish, mix_batch
from swin_scale.engine.construct import build_model
from swin_scale.engine.dist import Dist, init, peer_loss
from swin_scale.engine.engine import Engine, MicroBatch
from swin_scale.engine.experts import ExpertParallel
from swin_scale.engine.kernel_choice import choose_kernels
from swin_scale.engine.layout import read_env
from swin_scale.engine.losses import smooth_targets
from swin_scale.engine.optimizers import state_layout
from swin_scale.engine.record import StepLog
from swin_scale.engine.saving import load_survived, loading, newest_good, save
from swin_scale.engine.schedule import Schedule
from swin_scale.errors import CheckpointError, DivergedError, SwinScaleError, UserError
from swin_scale.evaluate import evaluate
from swin_scale.job import Job, architecture, prepare
from swin_scale.log import setup_logging
from swin_scale.models import flops
from swin_scale.report import environment, write_report
from swin_scale.run_dir import ExitRecord, take, write_config

logger = logging.getLogger(__name__)


def run(loaded: LoadedConfig, *, allow_change: bool = False) -> int:
    """Train until done; returns 0, or raises the error whose exit code the process ends with."""
    layout = read_env(os.environ)
    job = prepare(loaded, layout.world)
    config = job.config
    run_dir = Path(config.run.dir)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(config.engine.threads or max(1, cores // layout.local_world))
    with contextlib.ExitStack() as stack:
        refusal = take(run_dir, stack) if layout.rank == 0 else None
        if layout.rank == 0 and refusal is None:
            stack.callback(_report, run_dir)
        record = stack.enter_context(ExitRecord(run_dir, layout.rank))
        if layout.rank == 0 and refusal is None:
            record.start()
        dist = stack.enter_context(init(layout, timeout_s=config.engine.timeout_s))
        refusal = dist.broadcast_json("run directory", refusal)
        if refusal is not None:
            raise UserError(refusal)
        record.start()
        setup_logging(run_dir, dist.rank, console=dist.is_main)
        with peer_loss("training"):
            _train(job, dist, allow_change)
    return 0


def _report(run_dir: Path) -> None:
    """The run as one page, whatever its end was; a page that cannot be written fails nothing."""
    try:
        write_report(run_dir)
    except (OSError, UserError) as error:
        logger.warning("no report: %s", error)


def _train(job: Job, dist: Dist, allow_change: bool) -> None:
    config, plan = job.config, job.plan
    run_dir = Path(config.run.dir)
    checkpoint, damage = newest_good(run_dir / "checkpoints", dist)
    if checkpoint is not None:
        _check_resume(checkpoint, job, allow_change)
    if dist.is_main:
        write_config(run_dir, job.config_text)
    weights = config.init.weights if checkpoint is None else None
    network = architecture(job)
    experts = ExpertParallel.create(dist, config.moe) if network.moe is not None else None
    kernels = choose_kernels(config, dist, network)
    logger.info("kernels: %s", kernels.text)
    model, values = build_model(config, dist, job.model["overrides"], weights, experts, kernels.mode)
    schedule = Schedule.from_config(config, job.stream.steps_per_epoch)
    engine = Engine(model, config, plan, schedule, dist, values, experts)
    logger.info("%s", engine.groups_table)
    macs = flops(network)
    with contextlib.ExitStack() as stack:
        log = StepLog(run_dir, config, job.stream, dist, total_steps=job.stop_step, flops_per_image=macs)
        stack.enter_context(log)
        step = 0
        if checkpoint is not None:
            stack.enter_context(loading(run_dir / "checkpoints", dist, checkpoint.step))
            _restore(checkpoint, engine, log)
            step = checkpoint.step
            logger.info("resumed from %s", checkpoint.path)
        facts = {**_environment(dist), "kernels": kernels.text}
        log.event("start", step, environment=facts, checkpoint=checkpoint and checkpoint.path.name)
        for what in damage:
            log.event("fell_back", step, problem=what)
        _check_space(job, dist, engine, log, step)
        step = _loop(job, dist, engine, log, step, checkpoint)
    logger.info("done: %d steps", step)


def _environment(dist: Dist) -> dict[str, str]:
    device = torch.cuda.get_device_name(dist.device) if dist.device.type == "cuda" else "CPU"
    return environment(ranks=dist.world, nodes=dist.world // dist.local_world, device=device)


def _restore(checkpoint: Checkpoint, engine: Engine, log: StepLog) -> None:
    try:
        with checkpoint:
            engine.load(checkpoint, checkpoint.state)
        log.restore(checkpoint.state)
        float(checkpoint.state.get("elapsed_s", 0.0))  # for `Saver`
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, SwinScaleError):
            raise
        # Every digest is right, so whoever wrote it meant something else than this version reads.
        raise CheckpointError(f"{checkpoint.path} cannot be resumed: {type(error).__name__}: {error}") from error


def _check_space(job: Job, dist: Dist, engine: Engine, log: StepLog, step: int) -> None:
    """Warn while there is time when the disk will not hold the checkpoints that are kept and the one being written."""
    config, root = job.config, Path(job.config.run.dir) / "checkpoints"
    moments = len(state_layout(config.optim).moments)
    size = checkpoint_bytes(engine.parameters_table(), moments=moments, ema=config.optim.ema_decay > 0)
    lack = None
    if dist.is_main:
        more = config.checkpoint.keep + 1 - len(list_steps(root))
        lack = shortage(root, size=size, files=dist.world + SMALL_FILES, checkpoints=max(1, more))
    lack = dist.broadcast_json("space", lack)
    if lack is not None:
        logger.warning("%s", lack)
        log.event("low_space", step, problem=lack)


def _loop(job: Job, dist: Dist, engine: Engine, log: StepLog, step: int, resumed: Checkpoint | None) -> int:
    """Steps `step` to the last; returns the number of steps done."""
    config, stream = job.config, job.stream
    saver = Saver(job, dist, engine, log, resumed)
    batches = stream.batches(
        step,
        stop_step=job.stop_step,
        rank=dist.rank,
        world=dist.world,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        timeout_s=config.engine.timeout_s,
    )
    evaluated = None
    log.start(step)
    with batches:
        for batch in batches:
            if step == 0:
                log.first_batch(batch.images)
            result = engine.train_step(batch.step, micro_batches(batch, job, engine), int(batch.valid.sum()))
            step = batch.step + 1
            if resumed is not None and step == resumed.step + 1:
                float(result.loss)  # waits for the device: the step has been done, not only asked for
                load_survived(saver.root, dist, resumed.step)
            log.add(batch, result)
            if log.skips_in_a_row >= config.train.max_skips:
                log.flush()
                raise DivergedError(
                    f"step {step}: {log.skips_in_a_row} updates in a row were skipped for non-finite losses or "
                    f"gradients (train.max_skips {config.train.max_skips}); lower optim.lr, or resume an earlier step"
                )
            due = False
            if step % config.train.log_every == 0 or step == job.stop_step:
                due = log.flush(save_due=saver.time_is_up())
            if due or saver.step_is_due(step):
                saver.save(step)
            every = config.train.eval_every_epochs * stream.steps_per_epoch
            if job.val and every and step % every == 0:
                log.flush()
                evaluated = _evaluate(job, dist, engine, log, step)
    if saver.saved_step != step:
        saver.save(step, final=True)
    elif resumed is not None and step == resumed.step:
        load_survived(saver.root, dist, step)  # nothing was left to do
    if job.val and evaluated != step:
        _evaluate(job, dist, engine, log, step)
    return step


def micro_batches(batch: Batch, job: Job, engine: Engine) -> Iterator[MicroBatch]:
    """Cut a rank's batch into micro-batches on the device: normalised, erased, mixed, with soft targets."""
    config, plan = job.config, job.plan
    device = engine.dist.device
    height, width = batch.images.shape[2:]
    mix = draw_mix(config.augment, seed=config.run.seed, step=batch.step, height=height, width=width)
    valid = batch.valid
    # Copies from pageable memory would wait for the device.
    pixels = batch.images.pin_memory() if device.type == "cuda" else batch.images
    for start in range(0, plan.per_rank, plan.micro):
        part = slice(start, start + plan.micro)
        images = finish(
            pixels[part].to(device, non_blocking=True),
            batch.boxes[part],
            batch.noise_keys[part],
            mode=config.augment.remode,
        )
        here = valid[part].to(device, non_blocking=True)
        labels = batch.labels[part].clamp(min=0).to(device, non_blocking=True)
        targets = smooth_targets(labels, job.model["overrides"]["num_classes"], config.optim.label_smoothing)
        if config.augment.mixes:
            images, targets = mix_batch(images, targets, here, mix)
        yield MicroBatch(inputs=images.to(engine.dtype), targets=targets, valid=here)


class Saver:
    """When to save, by steps and by minutes, and the save itself."""

    def __init__(self, job: Job, dist: Dist, engine: Engine, log: StepLog, resumed: Checkpoint | None) -> None:
        self._job, self._dist, self._engine, self._log = job, dist, engine, log
        self.root = Path(job.config.run.dir) / "checkpoints"
        self._last = time.monotonic()
        self._start = self._last - float(resumed.state.get("elapsed_s", 0.0) if resumed else 0.0)
        self.saved_step = resumed.step if resumed else -1

    def time_is_up(self) -> bool:
        """By this rank's clock; `StepLog.flush` takes rank 0's word for all."""
        minutes = self._job.config.checkpoint.every_minutes
        return minutes is not None and time.monotonic() - self._last >= 60 * minutes

    def step_is_due(self, step: int) -> bool:
        every = self._job.config.checkpoint.every_steps
        return every is not None and step % every == 0

    def save(self, step: int, *, final: bool = False) -> None:
        """Save all ranks' state. A failed save is an event and training goes on, unless it is the last one.

        ``elapsed_s`` is the time spent training, by a clock that never jumps, summed over restarts.
        """
        job, config = self._job, self._job.config
        # Rows first: every step up to a committed checkpoint has its row, whatever happens next.
        self._log.flush()
        self._last = time.monotonic()
        try:
            path = save(
                self.root,
                self._engine,
                self._dist,
                step=step,
                state={**self._log.state(), **cursor(job, step), "elapsed_s": round(self._last - self._start, 3)},
                config_text=job.config_text,
                model=job.model,
                keep=config.checkpoint.keep,
                keep_every_hours=config.checkpoint.keep_every_hours,
            )
        except CheckpointError as error:
            if final:
                raise
            logger.error("step %d was not saved: %s; training goes on", step, error)
            self._log.event("save_failed", step, problem=str(error))
            return
        self.saved_step = step
        self._log.event("checkpoint", step, path=path.name, seconds=round(time.monotonic() - self._last, 3))


def cursor(job: Job, step: int) -> dict[str, Any]:
    """Where the data stream stands after `step` steps, and which data it is."""
    epoch, batch = divmod(step, job.stream.steps_per_epoch)
    sources = [
        {
            "samples": len(source),
            "digest": xxhash.xxh3_64_hexdigest("".join(s.xxh3_128 for s in source.manifest.shards).encode()),
        }
        for source in job.stream.sources
    ]
    return {"step": step, "epoch": epoch, "batch": batch, "sources": sources}


def _check_resume(checkpoint: Checkpoint, job: Job, allow_change: bool) -> None:
    """Compare config and data with the checkpoint's; raises UserError for what may not change (without the flag)."""
    try:
        before_config = config_from_text(checkpoint.config_text, f"{checkpoint.path}/config.yaml")
    except UserError as error:
        raise CheckpointError(str(error)) from error
    changes = diff_configs(before_config, job.config)
    for change in changes:
        logger.info("config change: %s", change)
    refused = [str(c) for c in changes if c.grade == "impossible" or (c.grade != "safe" and not allow_change)]
    before = checkpoint.state.get("sources")
    now = cursor(job, checkpoint.step)["sources"]
    if before != now and not allow_change:
        refused.append(f"data.train: {before} -> {now} (other samples; needs --allow-change)")
    if refused:
        raise UserError(
            f"cannot resume from {checkpoint.path}: {'; '.join(refused)}; undo the change, pass --allow-change where "
            "it is allowed, or choose another run.dir"
        )


def _evaluate(job: Job, dist: Dist, engine: Engine, log: StepLog, step: int) -> int:
    """Evaluate weights (and their moving average) and record it; returns `step`."""
    for ema in (False, True) if job.config.optim.ema_decay else (False,):
        with engine.evaluating(ema=ema) as module:
            figures = evaluate(module, job.val, dist, dtype=engine.dtype, workers=job.config.data.workers)
        log.event("eval", step, weights="ema" if ema else "master", **figures)
    return step

"""One training run from config to final checkpoint; the same call resumes it.

In the order in which it happens: `job.prepare` judges the whole request before any process group exists; `run` joins
the ranks, finds the checkpoint to resume from, wraps the model, and loops: batch -> step -> record -> save -> evaluate.
What is trained for is the business of `job.task`. A step that the loss guard does not trust sends the loop back to the
newest checkpoint, from where it goes on without the samples to blame.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from swin_scale.checkpoint import Checkpoint
from swin_scale.config_load import LoadedConfig
from swin_scale.data import Batch
from swin_scale.end_signals import EndSignals
from swin_scale.ending import Ending
from swin_scale.engine.construct import build_model
from swin_scale.engine.dist import Dist, init, peer_loss
from swin_scale.engine.engine import Engine, MicroBatch, StepResult
from swin_scale.engine.experts import ExpertParallel
from swin_scale.engine.guard import Guard, Trouble
from swin_scale.engine.kernel_choice import choose_kernels
from swin_scale.engine.layout import read_env
from swin_scale.engine.preempt import EndAgreedError, EndRequests, Poll
from swin_scale.engine.record import StepLog
from swin_scale.engine.replicas import Replicas
from swin_scale.engine.restore import Restorer
from swin_scale.engine.saving import load_survived, loading, newest_good
from swin_scale.engine.schedule import Schedule
from swin_scale.engine.watch import Watch
from swin_scale.errors import DivergedError, PreemptedError, UserError
from swin_scale.feed import Feed
from swin_scale.health import look_before_step_one, require_equal_replicas
from swin_scale.job import Job, architecture, prepare
from swin_scale.ledger import Ledger
from swin_scale.log import setup_logging
from swin_scale.report import environment, write_report
from swin_scale.resume import check_resume
from swin_scale.room import predicted_bytes
from swin_scale.run_dir import ExitRecord, take, write_config
from swin_scale.saver import Saver
from swin_scale.sections import Section, Sections

logger = logging.getLogger(__name__)


def run(
    loaded: LoadedConfig,
    *,
    allow_change: bool = False,
    dist: Dist | None = None,
    whole: Path | None = None,
    began: float | None = None,
    signals: EndSignals | None = None,
) -> int:
    """Train until done; returns 0, or raises the error whose exit code the process ends with.

    Args:
        dist: the processes, when they have joined already; then they stay together.
        whole: directory of the run that this is a stage of, where a request to end is left.
        began: reading of `time.monotonic` from which on the run's time counts, such as the process's start; None: now.
        signals: requests to end since the process began; None: remembered from now on.
    """
    sections = Sections(began=began, outside=Section.SET_UP)
    layout = read_env(os.environ) if dist is None else dist.layout
    job = prepare(loaded, layout.world)
    config = job.config
    run_dir = Path(config.run.dir)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(config.engine.threads or max(1, cores // layout.local_world))
    with contextlib.ExitStack() as stack:
        signals = signals or stack.enter_context(EndSignals())
        refusal = take(run_dir, stack, began) if layout.rank == 0 else None
        ours = layout.rank == 0 and refusal is None
        ledger = stack.enter_context(Ledger(run_dir, sections, ranks=layout.world, enabled=ours, whole=whole))
        if ours:
            stack.callback(_report, run_dir, ledger)
        record = stack.enter_context(ExitRecord(run_dir, layout.rank))
        if ours:
            record.start()
        watch = stack.enter_context(Watch(run_dir, config.engine, sections))
        if dist is None:
            dist = stack.enter_context(init(layout, timeout_s=config.engine.timeout_s))
        refusal = dist.broadcast_json("run directory", refusal)
        if refusal is not None:
            raise UserError(refusal)
        record.start()
        setup_logging(run_dir, dist.rank, console=dist.is_main)
        watch.start(dist)
        with EndRequests(whole or run_dir, dist, signals) as requests, peer_loss("training"):
            _train(job, dist, allow_change, requests, sections, ledger)
    return 0


def _report(run_dir: Path, ledger: Ledger) -> None:
    """The run as one page, whatever its end was; a page that cannot be written fails nothing."""
    ledger.write()
    try:
        write_report(run_dir)
    except (OSError, UserError) as error:
        logger.warning("no report: %s", error)


def _train(job: Job, dist: Dist, allow_change: bool, requests: EndRequests, sections: Sections, ledger: Ledger) -> None:
    with contextlib.ExitStack() as stack:
        try:
            training, step, resumed = _set_up(job, dist, allow_change, requests, sections, ledger, stack)
        except EndAgreedError as asked:
            raise PreemptedError(
                f"asked to end by {asked} before the first step: there is nothing to save, and the same command goes on"
            ) from asked
        step = training.run(step, resumed)
        training.engine.close()
    logger.info("done: %d steps", step)


def _set_up(
    job: Job,
    dist: Dist,
    allow_change: bool,
    requests: EndRequests,
    sections: Sections,
    ledger: Ledger,
    stack: contextlib.ExitStack,
) -> tuple[Training, int, Checkpoint | None]:
    """Everything before the first step: what to train with, the step to go on from, the checkpoint resumed from."""
    config, plan = job.config, job.plan
    run_dir = Path(config.run.dir)
    requests.raise_if_agreed()  # while the ranks joined
    checkpoint, damage = newest_good(run_dir / "checkpoints", dist)
    requests.raise_if_agreed()  # while files were verified
    if checkpoint is not None:
        check_resume(checkpoint, job, allow_change)
    if dist.is_main:
        write_config(run_dir, job.config_text)
    weights = config.init.weights if checkpoint is None else None
    network = architecture(job)
    experts = ExpertParallel.create(dist, config.moe, sections) if network.moe is not None else None
    kernels = choose_kernels(config, dist, network)
    logger.info("kernels: %s", kernels.text)
    model, values = build_model(
        config, dist, job.model["overrides"], weights, experts, kernels.mode, create=job.task.create
    )
    schedule = Schedule.from_config(config, job.stream.steps_per_epoch)
    engine = Engine(model, config, plan, schedule, dist, values, experts, losses=job.task.losses, sections=sections)
    logger.info("%s", engine.groups_table)
    macs = job.task.flops(network)
    log = StepLog(run_dir, config, job.stream, dist, total_steps=job.stop_step, flops_per_image=macs, sections=sections)
    stack.enter_context(log)
    guard = stack.enter_context(contextlib.closing(Guard(run_dir, config, dist)))
    restorer = Restorer(run_dir, dist, engine, log, guard, job.stream.sources)
    step = 0
    requests.raise_if_agreed()  # while the model was built
    if checkpoint is not None:
        stack.enter_context(loading(run_dir / "checkpoints", dist, checkpoint.step))
        restorer.load(checkpoint)
        step = checkpoint.step
        logger.info("resumed from %s", checkpoint.path)
    elif guard.on:
        restorer.remember_start()
    device = torch.cuda.get_device_name(dist.device) if dist.device.type == "cuda" else "CPU"
    facts = environment(ranks=dist.world, nodes=dist.world // dist.local_world, device=device)
    facts["kernels"] = kernels.text
    log.event(
        "start", step, total_steps=job.stop_step, environment=facts, checkpoint=checkpoint and checkpoint.path.name
    )
    for what in damage:
        log.event("fell_back", step, problem=what)
    look_before_step_one(job, dist, log, step, size=predicted_bytes(job, engine))
    replicas = Replicas(engine.module, engine.fragments, dist, every=config.health.replicas_every)
    training = Training(
        job=job, dist=dist, engine=engine, log=log, restorer=restorer, requests=requests, sections=sections,
        ledger=ledger, replicas=replicas,
    )  # fmt: skip
    return training, step, checkpoint


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What follows a step; the same on all ranks."""

    trouble: Trouble | None
    """Why the step is not to be trusted."""
    save_due: bool
    end: str | None
    """Who asks to end."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What the steps of a run need. All ranks call its methods together."""

    job: Job
    dist: Dist
    engine: Engine
    log: StepLog
    restorer: Restorer
    requests: EndRequests
    sections: Sections
    ledger: Ledger
    replicas: Replicas

    def run(self, step: int, resumed: Checkpoint | None) -> int:
        """Steps `step` to the last; returns the number of steps done. Raises PreemptedError once asked to end."""
        with Saver(
            self.job, self.dist, self.engine, self.log, self.restorer, resumed, self.ledger, self.sections
        ) as saver:
            return self._run(saver, step, resumed)

    def _run(self, saver: Saver, step: int, resumed: Checkpoint | None) -> int:
        job, dist, log, sections = self.job, self.dist, self.log, self.sections
        save_last = partial(self._save, final=True)
        ending = Ending(job, dist, self.engine, log, self.requests, saver, resumed, save=save_last)
        poll = Poll(self.requests)
        evaluated = drawn = None
        ending.check(step, during="set-up")
        if self._evaluation_is_due(step) and not ending.evaluated_before(self._kinds):
            evaluated = self._evaluate(ending, step)  # the run ended between this step and its evaluation, or within it
        log.start(step)
        with Feed(job, dist, self.restorer.guard, self.requests, step) as batches, sections.bare(then=Section.CLOSE):
            self.ledger.at(step)
            sections.step = step
            while (batch := self._next(batches)) is not None:
                result = self._do(batch, batches, ending)
                sections.step = step = batch.step + 1
                if resumed is not None and step == resumed.step + 1:
                    with sections(Section.RECORD):
                        float(result.loss)  # waits for the device: the step has been done, not only asked for
                        load_survived(saver.root, dist, resumed.step)
                found = self._look(saver, poll, step, batch, result)
                self.ledger.at(step)
                if found.trouble is not None:
                    step = self._go_back(saver, batches, found.trouble, batch, result)
                    continue
                if found.end is not None:
                    with sections(Section.RECORD):
                        ending.end(step, found.end, during="step")
                if found.save_due:
                    self._save(saver, step)
                    if step < job.stop_step:
                        with sections(Section.RECORD):
                            ending.check(step, during="checkpoint")
                if self._evaluation_is_due(step):
                    with sections(Section.RECORD):
                        log.flush()
                    evaluated = self._evaluate(ending, step)
                    if saver.best_is_due(step):
                        self._save(saver, step)
                if job.shown is not None and job.task.picture_is_due(step):
                    drawn = self._draw(step)
        if saver.saved_step != step:
            self._save(saver, step, final=True)
        elif resumed is not None and step == resumed.step:
            load_survived(saver.root, dist, step)  # nothing was left to do
        if job.val and evaluated != step:
            self._evaluate(ending, step)
        if job.shown is not None and drawn != step:
            self._draw(step)
        return step

    def _do(self, batch: Batch, batches: Feed, ending: Ending) -> StepResult:
        """One step of training; ends the run where some rank had no batch for it, as somebody asks to end."""
        engine = self.engine
        if batch.step == 0:
            with self.sections(Section.RECORD):
                self.log.first_batch(batch.images)
        # No loss is below it: for want of one rank's batch, the step updates nothing on any rank.
        limit = -math.inf if batches.given_up else self.restorer.guard.loss_limit()
        result = engine.train_step(batch.step, self._micro_batches(batch), int(batch.valid.sum()), loss_limit=limit)
        assert result.skipped or not batches.given_up
        if result.skipped and self.dist.any_rank(batches.given_up):
            engine.undo_skipped()
            ending.end(batch.step, self.requests.agreed() or "a request to one rank", during="data wait")
        return result

    def _look(self, saver: Saver, poll: Poll, step: int, batch: Batch, result: StepResult) -> _Look:
        """Record a step, and see what is to follow it."""
        log, guard, stop_step = self.log, self.restorer.guard, self.job.stop_step
        flush = step % self.job.config.train.log_every == 0 or step == stop_step
        if guard.on or flush:
            with self.sections(Section.OPTIMIZER):  # what the device still has to do for it is the step's time
                float(result.loss)
        with self.sections(Section.RECORD):
            trouble = self._judge(step, batch, result)
            due = False
            if flush:
                due = log.flush(save_due=saver.time_is_up())
                if self.ledger.figures is not None:
                    log.figure("speed/goodput", self.ledger.figures.goodput, step)
            due = due or saver.step_is_due(step)
            saver.poll(step)
            end = poll() if step < stop_step else None
            kept = due or end is not None or self._evaluation_is_due(step) or step == stop_step
            if guard.on and trouble is None and kept:
                trouble = guard.judge_weights(step, self.engine)
            if self.replicas.due(step) and trouble is None:
                require_equal_replicas(self.replicas, log, step)
        return _Look(trouble=trouble, save_due=due, end=end)

    def _go_back(self, saver: Saver, batches: Feed, trouble: Trouble, batch: Batch, result: StepResult) -> int:
        """Undo what the guard does not trust; returns the step from which the run goes on, without what is to blame."""
        self.ledger.write()
        with self.sections(Section.RESTORE):
            saver.settle()  # what is being written is sound, and may be what the run goes back to
            step = self.restorer.go_back(trouble, batch, result, self._micro_batches(batch))
            saver.put_back(step)
            batches.restart(step)
        self.ledger.at(step)
        return step

    def _next(self, batches: Iterator[Batch]) -> Batch | None:
        with self.sections(Section.DATA):
            return next(batches, None)

    def _judge(self, step: int, batch: Batch, result: StepResult) -> Trouble | None:
        """Record a step; what the guard holds against it. Raises DivergedError after too many skips in a row."""
        log, guard, most = self.log, self.restorer.guard, self.job.config.train.max_skips
        log.add(batch, result)
        trouble = guard.judge(step, result) if guard.on else None
        if trouble is None and log.skips_in_a_row >= most:
            log.flush()
            raise DivergedError(
                f"step {step}: {log.skips_in_a_row} updates in a row were skipped for non-finite losses or "
                f"gradients (train.max_skips {most}); lower optim.lr, or resume an earlier step"
            )
        return trouble

    def _save(self, saver: Saver, step: int, *, final: bool = False) -> None:
        with self.sections(Section.RECORD):
            self.log.flush()
            require_equal_replicas(self.replicas, self.log, step)
        self.ledger.saving()
        before = self.sections.seconds()[Section.CHECKPOINT]
        with self.sections(Section.CHECKPOINT):
            saver.save(step, final=final)
        if step in (saver.saved_step, saver.writing_step) and not final:
            self.ledger.saved(self.sections.seconds()[Section.CHECKPOINT] - before)
            with self.sections(Section.RECORD):
                saver.tell_plan(step)

    @property
    def _kinds(self) -> tuple[str, ...]:
        """Which weights an evaluation is of."""
        return ("master", "ema") if self.job.config.optim.ema_decay else ("master",)

    def _evaluation_is_due(self, step: int) -> bool:
        """After so many steps, the end of the run aside, when it always is."""
        every = self.job.config.train.eval_every_epochs * self.job.stream.steps_per_epoch
        return bool(self.job.val and every and step and step % every == 0)

    def _micro_batches(self, batch: Batch) -> Iterator[MicroBatch]:
        job, engine = self.job, self.engine
        return job.task.micro_batches(batch, job.plan, device=engine.dist.device, dtype=engine.dtype)

    def _evaluate(self, ending: Ending, step: int) -> int:
        """Evaluate weights (and their moving average) and record it, if nobody asks to end; returns `step`."""
        job, config, engine = self.job, self.job.config, self.engine
        found = {}
        try:
            with self.sections(Section.EVALUATION):
                for kind in self._kinds:
                    with engine.evaluating(ema=kind == "ema") as module:
                        found[kind] = job.task.evaluate(
                            module,
                            job.val,
                            self.dist,
                            dtype=engine.dtype,
                            workers=config.data.workers,
                            attend=self.requests.attend,
                        )
        except EndAgreedError as asked:
            ending.end(step, str(asked), during="evaluation")
        for kind, figures in found.items():
            self.log.event("eval", step, weights=kind, **figures)
            ending.saver.rate(step, kind, figures)
        return step

    def _draw(self, step: int) -> int:
        """Record a picture of what the model makes of a few images, the same ones each time; returns `step`."""
        assert self.job.shown is not None
        with (
            self.sections(Section.EVALUATION),
            self.job.shown.batches() as batches,
            self.engine.evaluating() as module,
        ):
            picture = self.job.task.draw(module, next(batches), self.dist.device)
            self.log.picture(picture, step)
        return step

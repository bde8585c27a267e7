"""A run in stages, by the processes that one command started: they join once, and each stage is a run among them.

In the order in which it happens: `judge` prepares every stage and lets each one's model take the weights of the one
before, by shapes alone -> the ranks join -> rank 0 says which stages are done, from what they left -> `train.run` for
each of the others. Between two stages only the process groups live on.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from swin_scale.checkpoint import list_steps
from swin_scale.config_diff import diff_configs
from swin_scale.config_load import config_from_text
from swin_scale.convert import Source, judge_weights, open_weights
from swin_scale.convert.weights import Loaded
from swin_scale.end_signals import EndSignals
from swin_scale.engine.dist import Dist, init
from swin_scale.engine.layout import read_env
from swin_scale.engine.saving import newest_good
from swin_scale.errors import SwinScaleError, UserError
from swin_scale.job import Job, prepare
from swin_scale.log import setup_logging
from swin_scale.report import write_report
from swin_scale.run_dir import ExitRecord, forget_requests, write_stages
from swin_scale.run_lock import claim
from swin_scale.staged import Stage, Staged
from swin_scale.train import run

logger = logging.getLogger(__name__)

_STAGE_DIRECTORY = re.compile(r"\d+_.+")


def run_stages(
    staged: Staged, *, allow_change: bool = False, began: float | None = None, signals: EndSignals | None = None
) -> int:
    """Train what is left of all stages; returns 0, or raises the error whose exit code the process ends with.

    `began`, `signals`: see `train.run`; what the stages share is the time of the first of them.
    """
    layout = read_env(os.environ)
    jobs = judge(staged, layout.world)
    root = staged.directory
    with contextlib.ExitStack() as stack:
        refusal = _take(staged, stack, began) if layout.rank == 0 else None
        if layout.rank == 0 and refusal is None:
            stack.callback(_report, root)
        # Each stage logs its own end, and this one has no other.
        record = stack.enter_context(ExitRecord(root, layout.rank, quiet=True))
        if layout.rank == 0 and refusal is None:
            record.start()
        limit = max(job.config.engine.timeout_s for job in jobs)
        dist = stack.enter_context(init(layout, timeout_s=limit))
        refusal = dist.broadcast_json("run directory", refusal)
        if refusal is not None:
            raise UserError(refusal)
        record.start()
        setup_logging(None, dist.rank, console=dist.is_main)
        first = _first_unfinished(staged.stages, jobs, dist)
        for stage in staged.stages[:first]:
            logger.info("stage %s is done", stage.label)
        for stage in staged.stages[first:]:
            logger.info("stage %s begins or goes on", stage.label)
            with _named(stage):
                run(stage.loaded, allow_change=allow_change, dist=dist, whole=root, began=began, signals=signals)
            began = time.monotonic()
            # An engine's parts refer to each other: without this the next one would find its memory taken.
            gc.collect()
            if dist.device.type == "cuda":
                torch.cuda.empty_cache()
    return 0


def judge(staged: Staged, ranks: int) -> list[Job]:
    """Prepare every stage, and see that it can start from what it starts from.

    Raises the error that the stage itself would end with, before any has begun; UserError where two do not fit.
    """
    jobs: dict[Path, Job] = {}
    for stage in staged.stages:
        with _named(stage):
            job = prepare(stage.loaded, ranks)
            _judge_start(job, jobs)
        jobs[stage.directory] = job
    return list(jobs.values())


def _judge_start(job: Job, before: dict[Path, Job]) -> None:
    """Whether `job` can start from its init.weights; `before` are the stages that will have run, by directory."""
    init, kind = job.config.init, "ema" if job.config.init.ema else "master"
    if init.weights is None:
        return
    source = before.get(Path(init.weights))
    with torch.device("meta"):
        model = _model(job)
        values = None if source is None else _model(source).state_dict()
    if source is None or values is None:
        with open_weights(init.weights, kind=kind) as weights:
            judge_weights(model, weights, head=init.head, upcycle=init.upcycle)
        return
    name = Path(init.weights).name
    if init.ema and not source.config.optim.ema_decay:
        raise UserError(f"init.ema is true, but stage {name} keeps no moving average; set optim.ema_decay there")
    origin = Source(path=Path(f"stage {name}"), format="checkpoint", kind=kind, model=source.model)
    try:
        judge_weights(model, Loaded(values, origin), head=init.head, upcycle=init.upcycle)
    except SwinScaleError as error:
        raise UserError(f"init.weights: {error}") from error


def _model(job: Job) -> torch.nn.Module:
    return job.task.create(job.model["name"], **job.model["overrides"])


def _take(staged: Staged, stack: contextlib.ExitStack, began: float | None) -> str | None:
    """`run_dir.take` for the directory of all stages."""
    try:
        stack.enter_context(claim(staged.directory))
        _refuse_strangers(staged)
        write_stages(staged.directory, [stage.label for stage in staged.stages])
        forget_requests(staged.directory, began)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"run.dir {staged.directory} cannot be written: {error.strerror}; make it writable, or set another"
    return None


def _refuse_strangers(staged: Staged) -> None:
    """Raise UserError when another run was here: a plain one, or stages of other names or in another order."""
    ours = {stage.label for stage in staged.stages}
    if list_steps(staged.directory / "checkpoints"):
        raise UserError(f"run.dir {staged.directory} holds a run without stages; set another run.dir")
    for path in sorted(staged.directory.iterdir()):
        if _STAGE_DIRECTORY.fullmatch(path.name) and path.name not in ours and list_steps(path / "checkpoints"):
            raise UserError(
                f"{path} is a stage that this run does not have (its stages: {', '.join(sorted(ours))}); name the "
                "stages as they were, move it away, or set another run.dir"
            )


def _first_unfinished(stages: Sequence[Stage], jobs: Sequence[Job], dist: Dist) -> int:
    """Index of the stage to go on with, or their number; all ranks call this together.

    A stage is done when it recorded an end without error and its checkpoint of the last step is whole. Once the next
    one has a checkpoint of its own, the record is enough: nothing is read from the stage before any more.
    """
    found: list[object] = []
    if dist.is_main:
        try:
            first = _survey(stages, jobs)
            found = [first, first > 0 and not any(map(_has_begun, stages[first:])), None]
        except UserError as error:
            found = [0, False, str(error)]
    first, needed, refusal = dist.broadcast_json("stages", found)
    if refusal is not None:
        raise UserError(refusal)
    if not needed:
        return first
    last, end = stages[first - 1], jobs[first - 1].stop_step
    with _named(last):
        checkpoint, damage = newest_good(last.directory / "checkpoints", dist)
    if checkpoint is not None and checkpoint.step >= end:
        return first
    logger.error("stage %s has lost its end (%s); it goes on from before", last.label, "; ".join(damage))
    return first - 1


def _survey(stages: Sequence[Stage], jobs: Sequence[Job]) -> int:
    """What the stages' directories say; raises UserError where they cannot be a part of this run."""
    for i, (stage, job) in enumerate(zip(stages, jobs, strict=True)):
        later = next((other for other in stages[i + 1 :] if _has_begun(other)), None)
        if not _has_ended(stage):
            if later is None:
                return i
            raise UserError(
                f"{later.directory} has checkpoints, but {stage.directory / 'exit.json'} does not say that stage "
                f"{stage.label} is done; move {later.directory} away to train it anew, or set another run.dir"
            )
        _refuse_changes(stage, job, later)
        if later is None and max(list_steps(stage.directory / "checkpoints"), default=-1) < job.stop_step:
            return i
    return len(stages)


def _refuse_changes(stage: Stage, job: Job, later: Stage | None) -> None:
    """Raise UserError when the config of a stage that is done now says another training, with the typed diff."""
    path = stage.directory / "config.yaml"
    try:
        before = config_from_text(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}; put back what it was") from error
    changes = diff_configs(before, job.config)
    refused = [c for c in changes if c.grade != "safe" or (later and c.key == "train.max_steps")]
    if refused:
        after = "it and those after it" if later is None else f"it and {later.directory}"
        raise UserError(
            f"stage {stage.label} is done, and its config is not what it was: {'; '.join(map(str, refused))}; undo the "
            f"change (stages.NAME.a.b=c sets a key of one stage only), or move {after} away to train anew"
        )


def _has_begun(stage: Stage) -> bool:
    return bool(list_steps(stage.directory / "checkpoints"))


def _has_ended(stage: Stage) -> bool:
    try:
        record = json.loads((stage.directory / "exit.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("code") == 0


@contextlib.contextmanager
def _named(stage: Stage) -> Iterator[None]:
    """Errors say which stage they are about."""
    try:
        yield
    except SwinScaleError as error:
        raise type(error)(f"stage {stage.label}: {error}") from error


def _report(root: Path) -> None:
    """The stages on one page; a page that cannot be written fails nothing."""
    try:
        write_report(root)
    except (OSError, UserError) as error:
        logger.warning("no report: %s", error)

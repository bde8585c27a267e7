"""What a run looks at before its first step, and before it saves: the machine under it, and its ranks' weights."""

from __future__ import annotations

import logging
import time

from swin_scale.doctor.examine import before_step_one
from swin_scale.engine.dist import Dist
from swin_scale.engine.record import StepLog
from swin_scale.engine.replicas import Replicas, ReplicasDifferError
from swin_scale.job import Job

logger = logging.getLogger(__name__)


def look_before_step_one(job: Job, dist: Dist, log: StepLog, step: int, *, size: int) -> None:
    """Disk, data and peers: a warning and an event ``doctor`` for each thing that is not well; all ranks together.

    `size`: bytes of a checkpoint. Raises UserError or DataError on all ranks for what would end the run, or lose its
    work.
    """
    began = time.monotonic()
    findings = before_step_one(job.config, dist, size=size)
    for finding in findings:
        if finding.verdict != "ok":
            problem = f"{finding.text}; {finding.fix}"
            logger.warning("%s: %s", finding.check, problem)
            log.event("doctor", step, check=finding.check, problem=problem)
    warnings = sum(finding.verdict != "ok" for finding in findings)
    logger.info("doctor: %d checks, %d warnings, in %.1f s", len(findings), warnings, time.monotonic() - began)


def require_equal_replicas(replicas: Replicas, log: StepLog, step: int) -> None:
    """Raise ReplicasDifferError on all ranks, after an event that names them, where ranks hold other bits than others.

    Nothing may be saved after `step` steps, or trained on, without it.
    """
    difference = replicas.compare()
    if difference is not None:
        log.event("replicas_differ", step, **difference.row())
        raise ReplicasDifferError(f"step {step}: {difference}")

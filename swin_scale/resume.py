"""Where a run stands, and whether the one that is asked for may go on from there."""

from __future__ import annotations

import logging
from typing import Any

import xxhash

from swin_scale.checkpoint import Checkpoint
from swin_scale.config_diff import diff_configs
from swin_scale.config_load import config_from_text
from swin_scale.errors import CheckpointError, UserError
from swin_scale.job import Job

logger = logging.getLogger(__name__)


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


def check_resume(checkpoint: Checkpoint, job: Job, allow_change: bool) -> None:
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

"""What a run's checkpoints take on disk."""

from __future__ import annotations

from swin_scale.checkpoint import checkpoint_bytes
from swin_scale.engine.engine import Engine
from swin_scale.engine.optimizers import state_layout
from swin_scale.job import Job


def predicted_bytes(job: Job, engine: Engine) -> int:
    """Of one checkpoint of all ranks."""
    optim = job.config.optim
    moments = len(state_layout(optim).moments)
    return checkpoint_bytes(engine.parameters_table(), moments=moments, ema=optim.ema_decay > 0)

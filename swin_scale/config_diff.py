"""What differs between the config of a checkpoint and the one about to resume from it, and what that means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from swin_scale.config import ADAMW, Config
from swin_scale.config_load import flatten, scalar

SAFE = (
    "run.dir",
    "data.val",
    "data.workers",
    "data.prefetch",
    "data.max_bad_rate",
    "train.micro_batch",
    "train.max_steps",
    "train.eval_every_epochs",
    "train.eval_batch",
    "train.log_every",
    "train.tensorboard",
    "train.max_skips",
    "engine.zero_stage",
    "engine.offload",
    "engine.activation_checkpointing",
    "engine.kernels",
    "engine.layer_norm",
    "engine.bucket_mb",
    "engine.threads",
    "engine.timeout_s",
    "engine.hang_timeout_s",
    "moe.ep_size",
    "moe.backend",
    "moe.a2a_chunks",
    "moe.eval_capacity_factor",
    "moe.cosine_init_t",
    "simmim.picture_every_steps",
    "simmim.pictures",
    "checkpoint.every_steps",
    "checkpoint.every_minutes",
    "checkpoint.keep",
    "checkpoint.keep_every_hours",
    "checkpoint.keep_best",
    "checkpoint.mode",
    "checkpoint.wait_s",
    "checkpoint.write_timeout_s",
    "guard.enabled",
    "guard.loss_factor",
    "guard.norm_factor",
    "guard.deviations",
    "guard.window",
    "guard.warmup",
    "guard.max_rollbacks",
    "guard.budget_steps",
    "health.stragglers_every",
    "health.replicas_every",
    "init.weights",
    "init.ema",
    "init.head",
    "init.upcycle",
)
"""Keys that may change at a resume without a flag: they leave samples, model and update rule as they were."""

IMPOSSIBLE = (
    "task",
    "model.name",
    "model.num_classes",
    "model.embed_dim",
    "model.depths",
    "model.num_heads",
    "model.mlp_ratio",
    "model.in_chans",
    "model.qkv_bias",
    "model.ape",
    "model.patch_norm",
    "model.extra_norm_interval",
    "model.mlp_fc2_bias",
    "moe.experts",
    "moe.router",
    "moe.cosine_dim",
    "moe.fc2_bias",
    "optim.name",
    # Steps are counted in global batches: another size would put the data cursor elsewhere.
    "train.global_batch",
)
"""Keys whose change leaves the saved state without a meaning."""


Grade = Literal["safe", "needs --allow-change", "impossible"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """One key that differs from the checkpoint's config."""

    key: str
    before: Any
    after: Any
    grade: Grade

    def __str__(self) -> str:
        return f"{self.key}: {scalar(self.before)} -> {scalar(self.after)} ({self.grade})"


def diff_configs(before: Config, after: Config) -> list[Change]:
    """Every difference between a checkpoint's config and the one about to resume from it, graded."""
    old = dict(flatten(before))
    changes = []
    for key, value in flatten(after):
        if old[key] != value:
            changes.append(Change(key=key, before=old[key], after=value, grade=_grade(key, old[key], value)))
    return changes


def _grade(key: str, before: Any, after: Any) -> Grade:
    if key in SAFE or (key == "optim.name" and before in ADAMW and after in ADAMW):
        return "safe"
    return "impossible" if key in IMPOSSIBLE else "needs --allow-change"

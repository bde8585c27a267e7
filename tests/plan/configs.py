"""Configs made of a few values, without files."""

from typing import Any

from swin_scale.config import Config
from swin_scale.config_load import config_from_values


def make_config(
    name: str = "swinv2_g3b_patch4_window12_192",
    batch: int = 8,
    *,
    accumulation: int = 1,
    precision: str = "fp32",
    stage: int = 1,
    mode: str = "off",
    ranks: int = 1,
    task: str = "classify",
    **sections: Any,
) -> Config:
    """`batch`: images of a micro-batch; `sections`: further values, by section."""
    values: dict[str, Any] = {
        "task": task,
        "run": {"dir": "run"},
        "data": {"train": ["nowhere"]},
        "augment": {"mixup_prob": 0.0},
        "model": {"name": name, "drop_path_rate": 0.0},
        "optim": {"lr": 1e-4},
        "train": {"global_batch": batch * accumulation * ranks, "micro_batch": batch},
        "engine": {"zero_stage": stage, "precision": precision, "activation_checkpointing": mode},
    }
    for section, more in sections.items():
        values.setdefault(section, {}).update(more)
    return config_from_values(values).config

"""The official repository's format: ``torch.save({"model": state_dict})`` with the buffers it derives from sizes.

Parameter names and shapes are the same as here. Its state dicts also hold three buffers per attention, and its resume
and evaluation paths expect them, so they are written unless left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swin_scale.convert.infer import CONTINUOUS
from swin_scale.convert.plain import replacing
from swin_scale.errors import CheckpointError
from swin_scale.models import variant
from swin_scale.models.geometry import Stage, stages
from swin_scale.models.layers import relative_coords_table, relative_position_index

MASKED = -100.0
"""What the official mask adds to scores between tokens of different regions."""


def check(keys: Iterable[str], path: Path) -> None:
    """Raise CheckpointError for weights the official code has no place for."""
    if normed := [key for key in keys if ".enorm." in key]:
        raise CheckpointError(
            f"{path}: the official code has no norms on the main branch ({len(normed)} keys such as {normed[0]}); "
            "convert to safetensors instead"
        )


def derived_buffers(name: str, overrides: Mapping[str, Any]) -> dict[str, Tensor]:
    """The official persistent buffers of a model, by key."""
    v = variant(name, **overrides)
    buffers: dict[str, Tensor] = {}
    if v.family == "swin_mlp":
        return buffers
    for i, stage in enumerate(stages(v)):
        index = relative_position_index(stage.window_size)
        coords = relative_coords_table(stage.window_size, stage.pretrained_window_size)
        mask = shift_mask(stage)
        for j in range(stage.depth):
            block = f"layers.{i}.blocks.{j}."
            buffers[f"{block}attn.relative_position_index"] = index
            if v.family in CONTINUOUS:
                buffers[f"{block}attn.relative_coords_table"] = coords
            if j % 2 and any(stage.shift_size):
                buffers[f"{block}attn_mask"] = mask
    return buffers


def shift_mask(stage: Stage) -> Tensor:
    """(windows, N, N): 0 between tokens of one region of the rolled map, -100 across regions (Swin, section 3.2)."""
    labels = []
    for size, window, shift in zip(stage.resolution, stage.window_size, stage.shift_size):
        position = torch.arange(size)
        labels.append((position >= size - window).long() + (position >= size - shift).long() * (shift > 0))
    regions = 3 * labels[0][:, None] + labels[1]
    (height, width), (h, w) = stage.resolution, stage.window_size
    tokens = regions.view(height // h, h, width // w, w).transpose(1, 2).reshape(-1, h * w)
    return (tokens[:, :, None] != tokens[:, None, :]).float() * MASKED


def save_torch(path: Path, content: Any) -> None:
    """``torch.save`` in one rename; raises CheckpointError when the file cannot be written."""
    with replacing(path) as temporary:
        try:
            with open(temporary, "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
        except RuntimeError as error:  # what torch makes of a failed write of its zip
            raise OSError(str(error)) from error

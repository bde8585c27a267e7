"""The official models and their state dicts, for comparison. The checkout is named by SWIN_OFFICIAL."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor, nn

from swin_scale.convert.official import derived_buffers
from swin_scale.models import Variant
from tests import peers  # noqa: F401 - timm, which the official models import, needs its shim


def with_official_buffers(state: dict[str, Tensor], name: str, **overrides: Any) -> dict[str, Tensor]:
    """`state` with the derived buffers an official file has beside the parameters."""
    return {**state, **derived_buffers(name, overrides)}


def official_module(name: str) -> ModuleType:
    """A module of the checkout."""
    sys.path.insert(0, os.environ["SWIN_OFFICIAL"])
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def official_model(v: Variant) -> nn.Module:
    """The official model of the same sizes."""
    modules = {
        "swin": ("models.swin_transformer", "SwinTransformer"),
        "swinv2": ("models.swin_transformer_v2", "SwinTransformerV2"),
        "swin_mlp": ("models.swin_mlp", "SwinMLP"),
    }
    module, name = modules[v.family]
    cls = getattr(official_module(module), name)
    values = {
        key: getattr(v, key)
        for key in ("img_size", "window_size", "embed_dim", "num_classes", "patch_size", "in_chans", "mlp_ratio")
    }
    if v.family == "swinv2" and v.pretrained_window_sizes:
        values["pretrained_window_sizes"] = list(v.pretrained_window_sizes)
    return cls(depths=list(v.depths), num_heads=list(v.num_heads), drop_path_rate=0.0, **values)


def load_pretrained(path: Path, model: nn.Module) -> None:
    """The official fine-tuning load; it opens its label map relative to the working directory."""
    config = SimpleNamespace(MODEL=SimpleNamespace(PRETRAINED=str(path)))
    official_module("utils").load_pretrained(config, model, logging.getLogger("official"))

"""Directories as Hugging Face and timm publish them: weights and a ``config.json`` that describes the model."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from swin_scale.checkpoint import strictjson
from swin_scale.checkpoint.manifest import read_small
from swin_scale.convert.weights import Source
from swin_scale.errors import CheckpointError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
_FILES = (WEIGHTS, "pytorch_model.bin")
_TIMM_NAME = re.compile(r"swin(?:v2)?_\w+?_window(\d+)(?:to(\d+))?_(\d+)(?:to(\d+))?")


def weight_file(directory: Path) -> Path | None:
    """The one file with the weights of such a directory; None when it is none, or there are several (`index`)."""
    if not (directory / CONFIG).is_file() or index_file(directory) is not None:
        return None
    return next((directory / name for name in _FILES if (directory / name).is_file()), None)


def index_file(directory: Path) -> Path | None:
    """What says which of several files has which tensor; None when there is none."""
    if not (directory / CONFIG).is_file():
        return None
    return next((path for name in _FILES if (path := directory / f"{name}.index.json").is_file()), None)


def index(path: Path) -> dict[str, str]:
    """Name of a tensor -> name of its file, which is one beside the index; raises CheckpointError."""
    content = strictjson.loads(read_small(path), path)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{path} is damaged: it has no table weight_map of tensors and files")
    for name in dict.fromkeys(names.values()):
        if Path(name).name != name or name.startswith("."):
            raise CheckpointError(f"{path} names {name!r}, which is no file beside it; refused")
        if not (path.parent / name).is_file():
            raise CheckpointError(f"{path.parent / name} is missing: {path.name} names it; add it")
    return names


def describe(directory: Path, source: Source) -> Source:
    """`source` with what the config says about the model; raises CheckpointError for a damaged config."""
    path = directory / CONFIG
    config = strictjson.loads(read_small(path), path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is damaged: it holds {type(config).__name__}, not a table")
    try:
        facts = _timm(config) if "architecture" in config else _hugging_face(config)
        names = config.get("id2label") or {}
        classes = tuple(str(names[key]) for key in sorted(names, key=int))
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    unnamed = all(re.fullmatch(r"LABEL_\d+", name) for name in classes)
    return dataclasses.replace(source, facts=facts, classes=None if unnamed else classes)


def _hugging_face(config: dict[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if config.get("model_type") not in ("swin", "swinv2"):
        return facts
    for field, key in {"img_size": "image_size", "window_size": "window_size"}.items():
        if (value := config.get(key)) is not None:
            facts[field] = tuple(map(int, value)) if isinstance(value, list) else int(value)
    if config["model_type"] == "swinv2":
        facts["pretrained_window_sizes"] = tuple(map(int, config.get("pretrained_window_sizes") or ()))
        facts["pretrained_window_sizes"] = facts["pretrained_window_sizes"] or (0,) * len(config.get("depths") or ())
    return facts


def _timm(config: dict[str, Any]) -> dict[str, Any]:
    match = _TIMM_NAME.match(str(config["architecture"]))
    if match is None:
        return {}
    small, large = int(match[1]), int(match[2] or match[1])
    facts: dict[str, Any] = {"img_size": int(match[4] or match[3]), "window_size": large}
    if str(config["architecture"]).startswith("swinv2"):
        facts["pretrained_window_sizes"] = (small, small, small, small // 2) if match[2] else (0, 0, 0, 0)
    return facts

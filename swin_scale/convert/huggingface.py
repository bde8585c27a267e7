"""Directories that ``transformers`` loads: ``config.json``, ``preprocessor_config.json`` and the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swin_scale.checkpoint import strictjson
from swin_scale.checkpoint.tensorfile import Written
from swin_scale.convert import hub, plain
from swin_scale.convert.weights import Weights
from swin_scale.files import write_atomic
from swin_scale.models import Variant

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet; what the models here are trained with."""


def write(directory: Path, weights: Weights, model: Mapping[str, Any], v: Variant) -> Written:
    """Write the directory in one rename; it must not exist, or be empty. Raises CheckpointError, UserError."""
    with plain.replacing_directory(directory) as temporary:
        written = plain.write(temporary / hub.WEIGHTS, weights, model)
        _write_json(temporary / hub.CONFIG, config(v, model.get("classes")))
        _write_json(temporary / "preprocessor_config.json", preprocessor(v))
    return written


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomic(path, strictjson.dumps(dict(content), indent=2) + b"\n")


def config(v: Variant, classes: Any = None) -> dict[str, Any]:
    """What ``SwinConfig`` or ``Swinv2Config`` needs to build the model, and the label names."""
    labels = list(classes) if classes else [f"LABEL_{i}" for i in range(v.num_classes)]
    named = "Swinv2" if v.family == "swinv2" else "Swin"
    content: dict[str, Any] = {
        "architectures": [f"{named}ForImageClassification"],
        "model_type": named.lower(),
        "image_size": list(v.img_size) if isinstance(v.img_size, tuple) else v.img_size,
        "patch_size": v.patch_size,
        "num_channels": v.in_chans,
        "embed_dim": v.embed_dim,
        "depths": list(v.depths),
        "num_heads": list(v.num_heads),
        "window_size": v.window_size[0] if isinstance(v.window_size, tuple) else v.window_size,
        "mlp_ratio": v.mlp_ratio,
        "qkv_bias": v.qkv_bias,
        "hidden_dropout_prob": v.drop_rate,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": v.drop_path_rate,
        "hidden_act": "gelu",
        "use_absolute_embeddings": False,
        "layer_norm_eps": 1e-5,
        "encoder_stride": v.patch_size << (len(v.depths) - 1),
        "id2label": {str(i): name for i, name in enumerate(labels)},
        "label2id": {name: i for i, name in enumerate(labels)},
    }
    if v.family == "swinv2":
        content["pretrained_window_sizes"] = list(v.pretrained_window_sizes) or [0] * len(v.depths)
    return content


def preprocessor(v: Variant) -> dict[str, Any]:
    """Resizing to the model's size and ImageNet's normalisation, for ``AutoImageProcessor``."""
    height, width = v.img_size if isinstance(v.img_size, tuple) else (v.img_size, v.img_size)
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }

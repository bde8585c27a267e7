"""Weights into models: an existing one (`load_weights`), or the one a file was made with (`model_from_weights`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from swin_scale import labels
from swin_scale.convert.fit import Head, fit
from swin_scale.convert.infer import infer_model, pretrained_windows
from swin_scale.convert.report import Report
from swin_scale.convert.source import Source, read_state_dict
from swin_scale.errors import CheckpointError
from swin_scale.models import create_model, variant
from swin_scale.models.geometry import Stage, stages
from swin_scale.models.swin import Swin


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a weight file says about its model."""

    path: Path
    format: str
    """``checkpoint``, ``safetensors`` or ``torch``."""
    kind: str
    """``master`` or ``ema``."""
    step: int | None
    name: str
    overrides: Mapping[str, Any]
    classes: tuple[str, ...] | None
    """Display names in label order; for foreign files of 1,000 or 21,841 classes those of ImageNet."""
    wnids: tuple[str, ...] | None


def load_weights(model: nn.Module, path: str | Path, *, head: Head = "auto", kind: str = "master") -> Report:
    """Fill `model` from any weights this project reads; every key of both sides is in the returned report.

    Args:
        model: from `create_model`, not on the meta device.
        path, kind: see `read_state_dict`.
        head: see `fit`; ``auto`` keeps an equal head, maps 21,841 classes to 1,000, and otherwise starts anew.

    Raises CheckpointError for unknown or missing keys and unfitting shapes, and for SwinV2 weights whose coordinates
    were scaled by another window than the model's, which would load and be wrong. The model is then unchanged.
    """
    state, source = read_state_dict(path, kind=kind)
    return _load(model, state, source, head)


def _load(model: nn.Module, state: Mapping[str, Tensor], source: Source, head: Head) -> Report:
    target = model.state_dict()
    assert not any(tensor.is_meta for tensor in target.values()), "materialise the model first (to_empty, init_weights)"
    here, there = _model_windows(getattr(model, "stages", ())), _source_windows(state, source)
    for stage, window in (there or {}).items():
        if here and here.get(stage, window) != window:
            wanted = tuple(there.get(i, here[i]) for i in here) if there else ()
            raise CheckpointError(
                f"{source.path}: stage {stage} was trained with windows of {window}, the model scales its coordinates "
                f"by {here[stage]}; create it with pretrained_window_sizes={wanted}"
            )
    tensors, report = fit(state, target, where=str(source.path), into=type(model).__name__, head=head)
    model.load_state_dict(tensors, strict=True)
    return report


def _model_windows(geometry: Any) -> dict[int, int]:
    """Per stage of a SwinV2, the window that its coordinates are scaled by; square windows larger than a token only."""
    return {
        i: stage.pretrained_window_size or stage.window_size[0]
        for i, stage in enumerate(geometry)
        if isinstance(stage, Stage) and stage.window_size[0] == stage.window_size[1] > 1
    }


def _source_windows(state: Mapping[str, Tensor], source: Source) -> dict[int, int] | None:
    """The same for the model the weights were made with; None when nothing tells or it has no such coordinates."""
    if not any(key.endswith("attn.logit_scale") for key in state):
        return None
    if source.model is None:
        return pretrained_windows({key.removeprefix("encoder."): tensor for key, tensor in state.items()})
    return _model_windows(stages(variant(source.model["name"], **source.model["overrides"])))


def model_from_weights(
    path: str | Path, *, model: str | None = None, kind: str = "master", **overrides: Any
) -> tuple[Swin, ModelInfo]:
    """The model that the weights belong to, filled, on the CPU, in training mode; and what is known about it.

    Args:
        path, kind: see `read_state_dict`. Files written here know their model; official ones are recognised by their
            keys and shapes.
        model: name to use instead, for files that do not tell.
        overrides: fields of `Variant` to change, such as ``img_size``; a SwinV2 then keeps scaling its coordinates by
            the windows it was trained with.

    Raises CheckpointError when the weights do not fit, UserError for an unknown name or override.
    """
    state, source = read_state_dict(path, kind=kind)
    name, base = describe_model(state, source, model)
    values = {**base, **overrides}
    if {"img_size", "window_size"} & overrides.keys() and not values.get("pretrained_window_sizes"):
        trained = _model_windows(stages(variant(name, **base)))
        if variant(name).family == "swinv2" and trained:
            depth = len(variant(name, **values).depths)
            values["pretrained_window_sizes"] = tuple(trained.get(stage, 0) for stage in range(depth))
    network = create_model(name, **values)
    _load(network, state, source, "keep")
    classes, wnids = label_names(source, variant(name, **values).num_classes)
    info = ModelInfo(
        path=source.path,
        format=source.format,
        kind=source.kind,
        step=source.step,
        name=name,
        overrides=values,
        classes=classes,
        wnids=wnids,
    )
    return network, info


def describe_model(state: Mapping[str, Tensor], source: Source, model: str | None) -> tuple[str, dict[str, Any]]:
    """(name, overrides) of the model behind `state`: as asked for, as the file says, or as its shapes tell."""
    if source.model is not None and model in (None, source.model["name"]):
        return source.model["name"], dict(source.model["overrides"])
    if model is not None:
        head = state.get("head.weight")
        return model, {"num_classes": 0 if head is None else len(head)}
    return infer_model(state, source.path)


def label_names(source: Source, classes: int) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    if source.model is not None:
        names, wnids = source.model.get("classes"), source.model.get("wnids")
        return (tuple(names) if names else None, tuple(wnids) if wnids else None)
    space = labels.by_count(classes)
    return (space.classes, space.wnids) if space else (None, None)

"""Weights into models: an existing one (`load_weights`), or the one a file was made with (`model_from_weights`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from swin_scale import labels
from swin_scale.config import Augment
from swin_scale.convert import experts
from swin_scale.convert.fit import Head, fit, is_masked
from swin_scale.convert.infer import CONTINUOUS, infer_model, plain_names, pretrained_windows
from swin_scale.convert.report import Report
from swin_scale.convert.source import eval_augment, open_weights
from swin_scale.convert.translate import View, as_official
from swin_scale.convert.weights import Source, Step, Weights, apply_steps
from swin_scale.errors import CheckpointError, UserError
from swin_scale.models import Variant, create_model, variant
from swin_scale.models.geometry import Stage, stages
from swin_scale.models.swin import Swin


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a weight file says about its model."""

    path: Path
    format: str
    """``checkpoint``, ``safetensors``, ``torch``, ``deepspeed`` or ``ranks``."""
    kind: str
    """``master`` or ``ema``."""
    step: int | None
    name: str
    overrides: Mapping[str, Any]
    classes: tuple[str, ...] | None
    """Display names in label order; for foreign files of 1,000 or 21,841 classes those of ImageNet."""
    wnids: tuple[str, ...] | None
    augment: Augment
    """The run's in the keys that decide how an evaluation looks at images; the defaults where a file does not tell."""

    def fixed_view(self, crop: bool | None = None) -> Augment:
        """How to look at images: as the run did, or with ``eval_crop`` set to `crop`."""
        return self.augment if crop is None else dataclasses.replace(self.augment, eval_crop=crop)


def load_weights(
    model: nn.Module, path: str | Path, *, head: Head = "auto", kind: str = "master", upcycle: bool = False
) -> Report:
    """Fill `model` from any weights this project reads; every key of both sides is in the returned report.

    Args:
        model: from `create_model`, not on the meta device. With an ``ep_group`` it takes its own experts only, and
            where the source can help it reads no others.
        path, kind: see `open_weights`.
        head: see `fit`; ``auto`` keeps an equal head, maps 21,841 classes to 1,000, and otherwise starts from zeros, or
            from the model's own values where the weights have no head.
        upcycle: whether `model` has experts where the weights have dense MLPs: each expert starts as a copy, the gates
            as `model` has them.

    Raises CheckpointError for unknown or missing keys and unfitting shapes, and for SwinV2 weights whose coordinates
    were scaled by another window than the model's, which would load and be wrong. The model is then unchanged.
    """
    with open_weights(path, kind=kind) as weights:
        return _load(model, as_official(weights), head, upcycle)


def judge_weights(model: nn.Module, weights: Weights, *, head: Head = "auto", upcycle: bool = False) -> Report:
    """What `load_weights` would report, from names and shapes alone: no value is read, nothing is changed.

    `model` may be on the meta device, `weights` may be `Loaded` from one that is. Raises as `load_weights` does.
    """
    view = as_official(weights)
    return view.account(_fitted(model, view, head, upcycle, lambda share: dict(share.tensors))[1])


def _load(model: nn.Module, view: View, head: Head, upcycle: bool = False) -> Report:
    assert not any(value.is_meta for value in model.state_dict().values()), "materialise the model first (to_empty)"
    tensors, report = _fitted(model, view, head, upcycle, lambda share: share.load())
    model.load_state_dict(tensors, strict=True)
    return view.account(report)


def _fitted(
    model: nn.Module, view: View, head: Head, upcycle: bool, read: Callable[[Weights], dict[str, Tensor]]
) -> tuple[dict[str, Tensor], Report]:
    """Tensors for exactly the keys of `model`, and their report from the keys of `view.weights` on."""
    target, source = model.state_dict(), view.weights.source
    _check_windows(model, view)
    weights = experts.Share(view.weights, experts.held_experts(model))
    steps = experts.upcycling(weights.tensors, experts.held_experts(model))
    _check_upcycling(steps, model, view, upcycle)
    taken = {step.sources for step in steps}
    steps += [Step((key,), (key,)) for key in weights.tensors if (key,) not in taken]
    tensors, report = fit(
        apply_steps(read(weights), steps),
        target,
        where=str(source.path),
        into=type(model).__name__,
        head=head,
        fresh=_fresh(target) if upcycle else {},
    )
    return tensors, report.before(steps).before(weights.steps)


def _check_upcycling(steps: Sequence[Step], model: nn.Module, view: View, upcycle: bool) -> None:
    """Raise unless `upcycle` was asked for where it is needed, and can be done where it was asked for."""
    path, source, target = view.weights.source.path, plain_names(view.weights.tensors), plain_names(model.state_dict())
    if not upcycle:
        if steps:
            raise CheckpointError(
                f"{path} has the dense {steps[0].sources[0]}, where the model has experts; set init.upcycle=true "
                "(upcycle=True) to start each expert as a copy of it, or create the model the weights were made with"
            )
        return
    if not steps:
        what = "has experts itself" if any(map(experts.match, target)) else "is to fill a model without experts"
        raise UserError(f"init.upcycle: {path} {what}; leave it out")
    if any(name.endswith(".relative_position_bias_table") for name in source):
        raise CheckpointError(
            f"{path} has Swin V1's tables of position biases, the model computes them from coordinates; start a "
            "swinv2_moe from a SwinV2, a swin_moe from its dense baseline"
        )
    v = getattr(model, "variant", None)
    biased = any(name.endswith(".mlp.fc2.bias") for name in source)
    if biased and isinstance(v, Variant) and v.moe is not None and not (v.mlp_fc2_bias and v.moe.fc2_bias):
        raise CheckpointError(
            f"{path} has second biases of MLPs, the model none (mlp_fc2_bias={v.mlp_fc2_bias}, moe.fc2_bias="
            f"{v.moe.fc2_bias}); create it with mlp_fc2_bias=True and moe.fc2_bias=True"
        )


def _fresh(target: Mapping[str, Tensor]) -> dict[str, str]:
    """What upcycling cannot take from a dense MLP."""
    gates = {name: "gate: the model's own initialisation" for name in target if "._moe_layer.gates." in name}
    biases = (name for name in target if name.endswith("._moe_layer.experts.batched_fc2_bias"))
    return gates | dict.fromkeys(biases, "the model's own initialisation: the dense MLPs have none")


Units = dict[int, tuple[int | None, int | None]]
"""Per stage of a SwinV2, the windows (height, width) that its coordinates are scaled by; None where one is a token."""


def trained_windows(path: str | Path, *, kind: str = "master") -> tuple[int, ...] | None:
    """What `pretrained_window_sizes` of a model has to be for these weights, whatever its own windows are.

    None for weights without log-spaced coordinates, for files that do not tell, and for windows that are not square.
    `path`, `kind`: see `open_weights`.
    """
    with open_weights(path, kind=kind) as weights:
        units = _source_units(as_official(weights))
    return None if units is None else _sides(units)


def own_windows(network: Variant) -> tuple[int, ...] | None:
    """The same of a model as it is."""
    return _sides(_units(stages(network)))


def _sides(units: Units) -> tuple[int, ...] | None:
    sides = [0 if units[stage] == (None, None) else _side(units[stage]) for stage in sorted(units)]
    return None if None in sides else tuple(side for side in sides if side is not None)


def _check_windows(model: nn.Module, view: View) -> None:
    here, there = _units(getattr(getattr(model, "encoder", model), "stages", ())), _source_units(view) or {}
    for stage, trained in there.items():
        present = here.get(stage, trained)
        if all(a == b for a, b in zip(trained, present) if a is not None and b is not None):
            continue
        wanted = tuple(_side(there.get(i, (None, None))) or _side(here[i]) or 0 for i in here)
        fix = "the windows it was trained with"
        if _side(trained):
            fix = f"pretrained_window_sizes={wanted} (in a config model.pretrained_window_sizes={[*wanted]})"
        raise CheckpointError(
            f"{view.weights.source.path}: stage {stage} was trained with windows of {_shown(trained)}, the model scales"
            f" its coordinates by {_shown(present)}; create it with {fix}"
        )


def _units(geometry: Any) -> Units:
    units: Units = {}
    for i, stage in enumerate(geometry):
        if isinstance(stage, Stage):
            height, width = (None if side == 1 else stage.pretrained_window_size or side for side in stage.window_size)
            units[i] = height, width
    return units


def _side(unit: tuple[int | None, int | None]) -> int | None:
    """The one number of both axes; None where there is none."""
    sides = {side for side in unit if side is not None}
    return sides.pop() if len(sides) == 1 else None


def _shown(unit: tuple[int | None, int | None]) -> str:
    side = _side(unit)
    return str(side) if side is not None else " x ".join(str(side or 1) for side in unit)


def _source_units(view: View) -> Units | None:
    """Those of the model the weights were made with; None when nothing tells or it has no such coordinates."""
    source = view.weights.source
    if not any(".attn.cpb_mlp." in name for name in plain_names(view.clues)):
        return None
    if source.model is not None:
        return _units(stages(variant(source.model["name"], **source.model["overrides"])))
    if source.facts:
        name, overrides = infer_model(view.clues, source.path, source.facts)
        return _units(stages(variant(name, **overrides)))
    found = pretrained_windows(plain_names(view.clues))
    return None if found is None else {stage: (window, window) for stage, window in found.items()}


def model_from_weights(
    path: str | Path, *, model: str | None = None, kind: str = "master", **overrides: Any
) -> tuple[Swin, ModelInfo]:
    """The model that the weights belong to, filled, on the CPU, in training mode; and what is known about it.

    Args:
        path, kind: see `open_weights`. Files written here know their model; official ones are recognised by their
            keys and shapes.
        model: name to use instead, for files that do not tell.
        overrides: fields of `Variant` to change, such as ``img_size``; a SwinV2 then keeps scaling its coordinates by
            the windows it was trained with.

    Raises CheckpointError when the weights do not fit, UserError for an unknown name or override.
    """
    with open_weights(path, kind=kind) as weights:
        view, source = as_official(weights), weights.source
        name, base = describe_model(view, model)
        values = {**base, **overrides}
        if {"img_size", "window_size"} & overrides.keys() and not values.get("pretrained_window_sizes"):
            trained = _units(stages(variant(name, **base)))
            if variant(name).family in CONTINUOUS:
                values["pretrained_window_sizes"] = tuple(_side(trained[stage]) or 0 for stage in sorted(trained))
        augment = eval_augment(source)
        network = create_model(name, **values)
        _load(network, view, "keep")
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
        augment=augment,
    )
    return network, info


def describe_model(view: View, model: str | None) -> tuple[str, dict[str, Any]]:
    """(name, overrides) of the model behind `view`: as asked for, as the file says, or as its shapes tell."""
    source = view.weights.source
    if source.model is not None and model in (None, source.model["name"]):
        # SimMIM's encoder has no head, whatever its name says.
        headless = {"num_classes": 0} if any(map(is_masked, view.clues)) else {}
        return source.model["name"], {**source.model["overrides"], **headless}
    if model is not None:
        head = plain_names(view.clues).get("head.weight")
        return model, {"num_classes": 0 if head is None else len(head)}
    return infer_model(view.clues, source.path, source.facts)


def label_names(source: Source, classes: int) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    if source.model is not None:
        names, wnids = source.model.get("classes"), source.model.get("wnids")
        return (tuple(names) if names else None, tuple(wnids) if wnids else None)
    if source.classes is not None and len(source.classes) == classes:
        return source.classes, None
    space = labels.by_count(classes)
    return (space.classes, space.wnids) if space else (None, None)

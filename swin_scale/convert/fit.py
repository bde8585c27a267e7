"""Fitting one state dict to the keys and shapes of another, with a reason for everything that is not a plain copy.

Rules, in the order they are tried: prefixes (``module.`` of DistributedDataParallel, ``encoder.`` of SimMIM), derived
buffers (dropped: the model rebuilds them), aliases, the head, resizing of Swin V1's position tables (`tables`), equal
shapes. What no rule explains is an error.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from swin_scale import labels
from swin_scale.convert.report import Line, Report
from swin_scale.convert.tables import resized
from swin_scale.errors import CheckpointError

Head = Literal["auto", "keep", "zero", "trunc_normal", "map22kto1k"]

DERIVED = ("relative_position_index", "relative_coords_table", "attn_mask")
"""Buffers of the official code that follow from sizes alone."""

ALIASES = {"rpe_mlp": "cpb_mlp"}
"""Module names of the internal SwinV2 code (Feature-Distillation, SimMIM releases) and the public ones."""

_HEAD = ("head.weight", "head.bias")


class _Fit:
    """The tensors placed so far, and the lists of the report."""

    def __init__(self, where: str, target: Mapping[str, Tensor]) -> None:
        self.where, self.target = where, target
        self.placed: dict[str, Tensor] = {}
        self.lists: dict[str, list[Line]] = {"copied": [], "converted": [], "dropped": [], "created": []}
        self.unknown: list[str] = []

    def drop(self, key: str, reason: str) -> None:
        self.lists["dropped"].append(Line(key, None, reason))

    def create(self, name: str, tensor: Tensor, reason: str) -> None:
        self.placed[name] = tensor
        self.lists["created"].append(Line(None, name, reason))

    def place(self, key: str, name: str, tensor: Tensor, reason: str, *, changed: bool) -> None:
        wanted = self.target[name]
        if name in self.placed:
            raise CheckpointError(f"{self.where}: two of its keys are {name}, {key} is the second")
        if tensor.shape != wanted.shape:
            raise CheckpointError(
                f"{self.where}: {key} has shape {tuple(tensor.shape)}, the model's {name} has {tuple(wanted.shape)}"
            )
        if tensor.dtype != wanted.dtype:
            cast = f"cast from {tensor.dtype} to {wanted.dtype}".replace("torch.", "")
            tensor, changed, reason = tensor.to(wanted.dtype), True, f"{reason}, {cast}" if reason else cast
        self.placed[name] = tensor
        self.lists["converted" if changed else "copied"].append(Line(key, name, reason))


def fit(
    source: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    *,
    where: str,
    into: str,
    head: Head = "auto",
    fresh: Mapping[str, str] = MappingProxyType({}),
) -> tuple[dict[str, Tensor], Report]:
    """Tensors for exactly the keys of `target`, and the report of how each came about.

    Args:
        source: state dict of a Swin model under official names, with or without derived buffers and prefixes.
        target: state dict of the model to fill; shapes and dtypes are read, and values where a head is kept.
        where, into: what to call the two in messages and in the report.
        head: ``keep`` needs the same class count; ``map22kto1k`` takes the 1,000 rows of a 21,841-class head;
            ``zero`` starts the head from zeros; ``trunc_normal`` leaves the model's own initialisation, a truncated
            normal of std 0.02 and zero biases; ``auto`` keeps equal heads, maps 21,841 to 1,000, and otherwise starts
            from zeros, as official fine-tuning does, or from the model's initialisation where the source has no head,
            as official fine-tuning of SimMIM weights does. The report says which.
        fresh: names in `target` that keep their values where the source lacks them, with the reason for the report.

    Raises CheckpointError listing unknown keys with the nearest names, missing keys, and shapes that do not fit.
    """
    state = _Fit(where, target)
    names = _rename(source, target, state)
    for key, (name, reason) in names.items():
        tensor = source[key]
        if name in _HEAD:
            continue
        if name not in target:
            state.unknown.append(key)
        elif tensor.shape == target[name].shape:
            state.place(key, name, tensor, reason, changed=False)
        else:
            tensor, how = resized(name, tensor, target[name], where, geometric=is_masked(key))
            state.place(key, name, tensor, f"{reason}, {how}" if reason else how, changed=True)
    _fit_head({name: key for key, (name, _) in names.items() if name in _HEAD}, source, state, head)
    _refuse_unknown(state, names)
    for name, reason in fresh.items():
        if name not in state.placed:
            state.create(name, target[name], reason)
    if missing := [name for name in target if name not in state.placed]:
        raise CheckpointError(
            f"{where} lacks {len(missing)} of the model's {len(target)} keys: {', '.join(missing[:6])}"
            f"{', ...' if len(missing) > 6 else ''}; create the model the weights were made with"
        )
    lists = {name: tuple(lines) for name, lines in state.lists.items()}
    report = Report(
        source=where,
        target=into,
        copied=lists["copied"],
        converted=lists["converted"],
        dropped=lists["dropped"],
        created=lists["created"],
    )
    report.check(source, target)
    return {name: state.placed[name] for name in target}, report


def _rename(source: Mapping[str, Tensor], target: Mapping[str, Tensor], state: _Fit) -> dict[str, tuple[str, str]]:
    """Source key -> (name in the target, reason for the change); keys that are dropped are left out."""
    stripped = "module." if source and all(key.startswith("module.") for key in source) else ""
    is_simmim = any(key.startswith(f"{stripped}encoder.") for key in source)
    extract = is_simmim and not any(name.startswith("encoder.") for name in target)
    names: dict[str, tuple[str, str]] = {}
    for key in source:
        name = key.removeprefix(stripped)
        reason = "prefix module. removed" if stripped else ""
        if extract:
            if name.startswith("decoder.") or name == "encoder.mask_token":
                state.drop(key, "only for masked-image pre-training")
                continue
            name = name.removeprefix("encoder.")
            reason = "encoder of a SimMIM model"
        if name.endswith(DERIVED):
            state.drop(key, "derived from sizes, rebuilt by the model")
            continue
        for alias, official in ALIASES.items():
            if f".{alias}." in name:
                name = name.replace(f".{alias}.", f".{official}.")
                reason = f"{reason}, {alias} is {official}".removeprefix(", ")
        names[key] = (name, reason)
    return names


def _refuse_unknown(state: _Fit, names: Mapping[str, tuple[str, str]]) -> None:
    if not state.unknown:
        return
    lines = []
    for key in state.unknown[:6]:
        near = difflib.get_close_matches(names[key][0], list(state.target), n=2, cutoff=0.7)
        lines.append(f"{key} (nearest: {', '.join(near)})" if near else key)
    more = f" and {len(state.unknown) - 6} more" if len(state.unknown) > 6 else ""
    raise CheckpointError(
        f"{state.where} has {len(state.unknown)} keys that the model does not: {', '.join(lines)}{more}; "
        "create the model the weights were made with"
    )


def _fit_head(keys: Mapping[str, str], source: Mapping[str, Tensor], state: _Fit, head: Head) -> None:
    """Place, map, create or drop ``head.weight`` and ``head.bias``; `keys` maps those names to the source's keys."""
    target = state.target
    wanted = [name for name in _HEAD if name in target]
    if not wanted:
        for key in keys.values():
            state.drop(key, "the model has no head")
        return
    here = target[wanted[0]].shape[0]
    there = source[keys[wanted[0]]].shape[0] if wanted[0] in keys and source[keys[wanted[0]]].dim() else None
    policy = _head_policy(head, there, here, state.where)
    if policy == "keep":
        for name, key in keys.items():
            state.place(key, name, source[key], "", changed=False)
    elif policy == "map22kto1k":
        rows = torch.tensor(labels.map_22k_to_1k())
        for name, key in keys.items():
            state.place(key, name, source[key][rows], "rows of the 1,000 classes among 21,841", changed=True)
    else:
        why = "it has no head" if there is None else f"its head has {there} classes, the model's {here}"
        if there == here:
            why = "as asked"
        for key in keys.values():
            state.drop(key, "head started anew as asked" if there == here else why)
        for name in wanted:
            if policy == "zero":
                state.create(name, torch.zeros_like(target[name]), f"zeros: {why}")
            else:
                state.create(name, target[name], f"the model's own initialisation: {why}")


def _head_policy(head: Head, there: int | None, here: int, where: str) -> str:
    if head == "auto":
        if there is None:
            return "trunc_normal"
        return "keep" if there == here else "map22kto1k" if (there, here) == (labels.CLASSES_22K, 1000) else "zero"
    if head == "keep" and there != here:
        had = "no head" if there is None else f"a head of {there} classes"
        raise CheckpointError(
            f"{where} has {had}, the model has {here} classes; set init.head (head=) to auto, zero or trunc_normal, or "
            "give the model those classes"
        )
    if head == "map22kto1k" and (there, here) != (labels.CLASSES_22K, 1000):
        raise CheckpointError(
            f"{where}: map22kto1k needs {labels.CLASSES_22K} -> 1000 classes, here {there or 'no head'} -> {here}; set "
            "init.head (head=) to auto, zero or trunc_normal"
        )
    return head


def adapted(key: str, name: str, tensor: Tensor, wanted: Tensor, where: str) -> Tensor:
    """The `tensor` at `key` in the shape and dtype of `wanted`, as `fit` makes it for the parameter `name`."""
    if tensor.shape != wanted.shape:
        tensor, _ = resized(name, tensor, wanted, where, geometric=is_masked(key))
    return tensor.to(wanted.dtype)


def is_masked(key: str) -> bool:
    """Whether a key belongs to a SimMIM model."""
    return key.removeprefix("module.").startswith("encoder.")

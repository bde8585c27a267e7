"""Which model a foreign state dict belongs to, read off its keys and shapes (official names)."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from swin_scale.convert import experts
from swin_scale.convert.weights import plain_name
from swin_scale.errors import CheckpointError
from swin_scale.models import Variant, list_models, variant

CONTINUOUS = ("swinv2", "swin_moe", "swinv2_moe")
"""Families whose position bias is a function of log-spaced coordinates."""
_BLOCK = re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.(.+)")
_SECOND = ".mlp.fc2.weight"
_MUST_KNOW = {
    "img_size": "image size",
    "window_size": "window size",
    "pretrained_window_sizes": "windows that its coordinates are scaled by",
}


def infer_model(
    state: Mapping[str, Tensor], path: Path, known: Mapping[str, Any] | None = None
) -> tuple[str, dict[str, Any]]:
    """(name, overrides) of the model that `state` fits.

    Everything the tensors tell is compared with the known models: family, widths, depths, heads, extra norms, window,
    and from the official derived buffers also the image size and the pretrained windows; `known` holds fields stated
    beside the tensors. The first name that agrees in all but the class count is taken (names that differ in drop-path
    rate only are the same model); failing that, the nearest name with the differences as overrides. Raises
    CheckpointError when the image size, or the windows of a SwinV2, cannot be told.
    """
    try:
        facts = {**read_facts(state, path), **(known or {})}
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path} is not a Swin model of a known kind: {error!r}") from error
    differences = {name: _differences(variant(name), facts) for name in list_models()}
    differences = {name: unlike for name, unlike in differences.items() if "family" not in unlike}
    nearest = min(differences, key=lambda name: len(differences[name]))
    matching = [name for name, unlike in differences.items() if unlike.keys() <= {"num_classes"}]
    for field, what in _MUST_KNOW.items():
        needed = field == "img_size" or facts["family"] in CONTINUOUS
        if needed and field not in facts and len({getattr(variant(name), field) for name in matching}) != 1:
            near = f"; it could be {', '.join(matching)}" if matching else ""
            raise CheckpointError(f"{path} does not tell the {what} of its model{near}; name the model")
    return nearest, differences[nearest]


def _differences(v: Variant, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that do not hold for `v`; of a mixture of experts, the fields in which it differs."""
    windows = v.pretrained_window_sizes or (0,) * len(v.depths)
    known = dataclasses.asdict(v) | {"pretrained_window_sizes": windows}
    unlike = {key: value for key, value in facts.items() if known[key] != value}
    if (moe := facts.get("moe")) is not None and known["moe"] is not None:
        changes = {field: value for field, value in moe.items() if known["moe"][field] != value}
        unlike.pop("moe", None)
        unlike |= {"moe": changes} if changes else {}
    return unlike


def read_facts(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Fields of `Variant` that the keys and shapes of `state` determine; raises CheckpointError when it is no Swin."""
    state = plain_names(state)
    if "patch_embed.proj.weight" not in state or "layers.0.blocks.0.norm1.weight" not in state:
        raise CheckpointError(f"{path} is not a Swin model under official names; its first keys are {list(state)[:4]}")
    blocks: dict[int, dict[int, set[str]]] = {}
    for key in state:
        if match := _BLOCK.fullmatch(key):
            blocks.setdefault(int(match[1]), {}).setdefault(int(match[2]), set()).add(match[3])
    stages = sorted(blocks)
    width, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
    first = blocks[0][0]
    family = _family(first, any("._moe_layer." in key for key in state))
    facts: dict[str, Any] = {
        "family": family,
        "embed_dim": width,
        "in_chans": in_chans,
        "patch_size": patch,
        "depths": tuple(len(blocks[stage]) for stage in stages),
        "num_heads": tuple(_heads(state, family, stage) for stage in stages),
        "num_classes": len(state["head.weight"]) if "head.weight" in state else 0,
        "patch_norm": "patch_embed.norm.weight" in state,
        "ape": "absolute_pos_embed" in state,
        "mlp_ratio": _mlp_ratio(state, width),
        "mlp_fc2_bias": all(key.replace(".weight", ".bias") in state for key in state if key.endswith(_SECOND)),
        "extra_norm_interval": _extra_norm_interval(blocks),
        **_moe_facts(state, blocks),
    }
    if family != "swin_mlp":
        facts["qkv_bias"] = bool({"attn.qkv.bias", "attn.q_bias"} & first)
    windows = {stage: _window(state, stage) for stage in stages}
    if windows[0]:
        facts["window_size"] = max(window for window in windows.values() if window)
    for stage in stages:
        mask = state.get(f"layers.{stage}.blocks.1.attn_mask")
        if mask is not None and (window := windows[stage]):
            facts["img_size"] = math.isqrt(mask.shape[0]) * window * patch << stage
            break
    if family in CONTINUOUS and (pretrained := pretrained_windows(state)) is not None and windows[0]:
        present = tuple(windows[stage] for stage in stages)
        scaled = tuple(pretrained.get(stage, windows[stage]) for stage in stages)
        facts["pretrained_window_sizes"] = (0,) * len(stages) if scaled == present else scaled
    return facts


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` without the prefixes of DistributedDataParallel and of a SimMIM encoder, and under public names."""
    return {plain_name(key): tensor for key, tensor in state.items()}


def _family(first: Collection[str], has_experts: bool) -> str:
    """By the first block's keys."""
    if "attn.logit_scale" in first:
        return "swinv2_moe" if has_experts else "swinv2"
    if "attn.cpb_mlp.0.weight" in first:
        return "swin_moe"
    return "swin_mlp" if "spatial_mlp.weight" in first else "swin"


def _mlp_ratio(state: Mapping[str, Tensor], width: int) -> float:
    if (dense := state.get("layers.0.blocks.0.mlp.fc1.weight")) is not None:
        return dense.shape[0] / width
    return state["layers.0.blocks.0.mlp._moe_layer.experts.batched_fc1_w"].shape[1] / width


def _moe_facts(state: Mapping[str, Tensor], blocks: Mapping[int, Mapping[int, set[str]]]) -> dict[str, Any]:
    """``moe`` (the fields of `MoEConfig` that tensors tell, or None) and ``moe_blocks``."""
    inside = "mlp._moe_layer."
    found = {i: sorted(j for j in blocks[i] if any(key.startswith(inside) for key in blocks[i][j])) for i in blocks}
    layers = [f"layers.{stage}.blocks.{block}.{inside}" for stage in sorted(found) for block in found[stage]]
    if not layers:
        return {"moe": None}
    total, _ = experts.gate_sizes(state, layers[0], "this file")
    moe: dict[str, Any] = {"num_experts": total, "router": "linear"}
    if (cosine := state.get(f"{layers[0]}gates.0.sim_matrix")) is not None:
        moe |= {"router": "cosine", "cosine_dim": cosine.shape[0]}
    return {"moe": moe, "moe_blocks": tuple(tuple(found[stage]) for stage in sorted(blocks))}


def _heads(state: Mapping[str, Tensor], family: str, stage: int) -> int:
    block = f"layers.{stage}.blocks.0."
    if family in CONTINUOUS:
        return state[f"{block}attn.cpb_mlp.2.weight"].shape[0]
    if family == "swin":
        return state[f"{block}attn.relative_position_bias_table"].shape[1]
    weight = state[f"{block}spatial_mlp.weight"]
    return weight.shape[0] // weight.shape[1]


def _window(state: Mapping[str, Tensor], stage: int) -> int | None:
    """Window of a stage after clamping to its map; None when nothing tells."""
    block = f"layers.{stage}.blocks.0."
    if (index := state.get(f"{block}attn.relative_position_index")) is not None:
        return math.isqrt(math.isqrt(index.numel()))  # (N, N), or torchvision's flat one
    if (coords := state.get(f"{block}attn.relative_coords_table")) is not None:
        return (coords.shape[1] + 1) // 2
    if (table := state.get(f"{block}attn.relative_position_bias_table")) is not None:
        return (math.isqrt(table.shape[0]) + 1) // 2
    if (weight := state.get(f"{block}spatial_mlp.weight")) is not None:
        return math.isqrt(weight.shape[1])
    return None


def pretrained_windows(state: Mapping[str, Tensor]) -> dict[int, int] | None:
    """Window by which each stage's log-spaced coordinates are scaled, from the official ``relative_coords_table``.

    The entry for an offset of one token is log2(8 / (P - 1) + 1) / 3 (SwinV2, section 3.3), which gives P. Stages whose
    window is a single token have no such entry. None when the file has no tables (they are derived, and optional).
    """
    found: dict[int, int] = {}
    for key, table in state.items():
        match = _BLOCK.fullmatch(key)
        is_table = match and match[3] == "attn.relative_coords_table" and not table.is_meta
        if match and is_table and table.dim() == 4 and table.shape[1] >= 3:
            one = float(table[0, (table.shape[1] + 1) // 2, 0, 0])
            found[int(match[1])] = round(8 / (8**one - 1)) + 1 if one > 0 else 0
    return found or None


def _extra_norm_interval(blocks: Mapping[int, Mapping[int, set[str]]]) -> int:
    normed = [index for stage in blocks.values() for index, keys in stage.items() if "enorm.weight" in keys]
    return min(normed) + 1 if normed else 0

"""The foreign formats, one table each: which of their keys hold what the official keys hold, and what they cannot say.

All of them name a Swin Transformer's tensors differently. timm counts a patch merging to the stage after it; Hugging
Face keeps query, key and value apart; torchvision numbers one flat list of stages and mergings; the OpenMMLab projects
gather the four neighbours of a merging in another order (``nn.Unfold``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from swin_scale.convert.rules import Layout, Rule, same, split
from swin_scale.errors import UserError
from swin_scale.models import Variant, variant
from swin_scale.models.geometry import stages

_DERIVED = (r"(^|\.)(relative_position_index|relative_coords_table|attn_mask)$", "derived from sizes, rebuilt")
_PRETRAINING = "only for masked-image pre-training"


def _has(*keys: str) -> Callable[[Collection[str]], bool]:
    return lambda present: any(key in present for key in keys)


def _ends(suffix: str) -> Callable[[Collection[str]], bool]:
    return lambda present: any(key.endswith(suffix) for key in present)


def _both(*tests: Callable[[Collection[str]], bool]) -> Callable[[Collection[str]], bool]:
    return lambda present: all(test(present) for test in tests)


def _not(test: Callable[[Collection[str]], bool]) -> Callable[[Collection[str]], bool]:
    return lambda present: not test(present)


# timm

_BLOCK = "layers.{i}.blocks.{j}."
_MERGING = "layers.{i}.downsample."


def _is_timm(keys: Collection[str]) -> bool:
    """A head called head.fc, or mergings in later stages but none in the first."""
    merging = [key for key in keys if ".downsample.reduction." in key and key.startswith("layers.")]
    late = bool(merging) and not any(key.startswith("layers.0.") for key in merging)
    return "patch_embed.proj.weight" in keys and ("head.fc.weight" in keys or late)


TIMM = Layout(
    rules=(
        same("patch_embed.{x}", "patch_embed.{x}"),
        same(_BLOCK + "{x}", _BLOCK + "{x}"),
        same(_MERGING + "{x}", "layers.{i+1}.downsample.{x}"),
        same("norm.{p}", "norm.{p}"),
        same("head.{p}", "head.fc.{p}"),
    ),
    marks=_is_timm,
    dropped=(_DERIVED,),
)


# Hugging Face transformers


def _hugging_face(prefix: str, attention: Sequence[Rule], aliases: Sequence[tuple[str, str]]) -> Layout:
    encoder = prefix + "encoder.layers.{i}."
    block = encoder + "blocks.{j}."
    is_v2 = _ends("attention.self.logit_scale")
    return Layout(
        rules=(
            same("patch_embed.proj.{p}", prefix + "embeddings.patch_embeddings.projection.{p}"),
            same("patch_embed.norm.{p}", prefix + "embeddings.norm.{p}"),
            *attention,
            same(_BLOCK + "attn.proj.{p}", block + "attention.output.dense.{p}"),
            same(_BLOCK + "norm1.{p}", block + "layernorm_before.{p}"),
            same(_BLOCK + "norm2.{p}", block + "layernorm_after.{p}"),
            same(_BLOCK + "mlp.fc1.{p}", block + "intermediate.dense.{p}"),
            same(_BLOCK + "mlp.fc2.{p}", block + "output.dense.{p}"),
            same(_MERGING + "{x}", encoder + "downsample.{x}"),
            same("norm.{p}", prefix + "layernorm.{p}"),
            same("head.{p}", "classifier.{p}"),
        ),
        marks=_both(
            _ends("embeddings.patch_embeddings.projection.weight"), is_v2 if prefix == "swinv2." else _not(is_v2)
        ),
        dropped=(_DERIVED, (r"(^|\.)embeddings\.mask_token$", _PRETRAINING), (r"^decoder\.", _PRETRAINING)),
        aliases=((r"^(embeddings|encoder|layernorm)\.", prefix + r"\1."), *aliases),
    )


_HF1, _HF2 = (f"{name}.encoder.layers.{{i}}.blocks.{{j}}.attention.self." for name in ("swin", "swinv2"))

HF_V1 = _hugging_face(
    "swin.",
    (
        split(_BLOCK + "attn.qkv.{p}", _HF1 + "query.{p}", _HF1 + "key.{p}", _HF1 + "value.{p}"),
        same(_BLOCK + "attn.relative_position_bias_table", _HF1 + "relative_position_bias_table"),
    ),
    aliases=(  # names inside transformers 5, which files do not have unless saved with torch.save
        (r"\.attention\.q_proj\.", ".attention.self.query."),
        (r"\.attention\.k_proj\.", ".attention.self.key."),
        (r"\.attention\.v_proj\.", ".attention.self.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.attention\.relative_position_bias\.", ".attention.self."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    ),
)
HF_V2 = _hugging_face(
    "swinv2.",
    (
        split(_BLOCK + "attn.qkv.weight", _HF2 + "query.weight", _HF2 + "key.weight", _HF2 + "value.weight"),
        same(_BLOCK + "attn.q_bias", _HF2 + "query.bias"),
        same(_BLOCK + "attn.v_bias", _HF2 + "value.bias"),
        same(_BLOCK + "attn.logit_scale", _HF2 + "logit_scale"),
        same(_BLOCK + "attn.cpb_mlp.{x}", _HF2 + "continuous_position_bias_mlp.{x}"),
    ),
    aliases=(),
)


# torchvision

_TV_BLOCK = "features.{2i+1}.{j}."
_TV_COMMON = (
    same("patch_embed.proj.{p}", "features.0.0.{p}"),
    same("patch_embed.norm.{p}", "features.0.2.{p}"),
    same(_BLOCK + "mlp.fc1.{p}", _TV_BLOCK + "mlp.0.{p}"),
    same(_BLOCK + "mlp.fc2.{p}", _TV_BLOCK + "mlp.3.{p}"),
    same(_BLOCK + "{x}", _TV_BLOCK + "{x}"),
    same(_MERGING + "{x}", "features.{2i+2}.{x}"),
    same("norm.{p}", "norm.{p}"),
    same("head.{p}", "head.{p}"),
)
_TV_BIAS = Rule(
    (_BLOCK + "attn.q_bias", _BLOCK + "attn.v_bias"),
    (_TV_BLOCK + "attn.qkv.bias",),
    out=lambda values: [torch.cat([values[0], torch.zeros_like(values[0]), values[1]])],
    back=lambda values: values[0].chunk(3)[::2],
    reason="one bias there, whose part for the keys is always zero",
)
TV_V1 = Layout(
    rules=_TV_COMMON,
    marks=_both(_has("features.0.0.weight"), _not(_ends("attn.logit_scale"))),
    dropped=(_DERIVED,),
)
TV_V2 = Layout(
    rules=(_TV_BIAS, *_TV_COMMON),
    marks=_both(_has("features.0.0.weight"), _ends("attn.logit_scale")),
    dropped=(_DERIVED,),
)


# OpenMMLab: mmpretrain's SwinTransformer and SwinTransformerV2


def _unfold(values: Sequence[Tensor]) -> Sequence[Tensor]:
    """Neighbours (0,0), (1,0), (0,1), (1,1) of C channels each, to channels of neighbours in row-major order."""
    (tensor,) = values
    blocks = tensor.reshape(*tensor.shape[:-1], 4, -1)[..., [0, 2, 1, 3], :]
    return [blocks.transpose(-1, -2).reshape(tensor.shape)]


def _fold(values: Sequence[Tensor]) -> Sequence[Tensor]:
    """The reverse of `_unfold`."""
    (tensor,) = values
    blocks = tensor.reshape(*tensor.shape[:-1], -1, 4).transpose(-1, -2)
    return [blocks[..., [0, 2, 1, 3], :].reshape(tensor.shape)]


def _unfolded(official: str, foreign: str) -> Rule:
    return Rule((official,), (foreign,), _unfold, _fold, "channels of a merging in another order")


_MM_BLOCK = "backbone.stages.{i}.blocks.{j}."
_MM_COMMON = (
    same("patch_embed.proj.{p}", "backbone.patch_embed.projection.{p}"),
    same("patch_embed.norm.{p}", "backbone.patch_embed.norm.{p}"),
    same("absolute_pos_embed", "backbone.absolute_pos_embed"),
    same(_BLOCK + "attn.{x}", _MM_BLOCK + "attn.w_msa.{x}"),
    same(_BLOCK + "norm1.{p}", _MM_BLOCK + "norm1.{p}"),
    same(_BLOCK + "norm2.{p}", _MM_BLOCK + "norm2.{p}"),
    same(_BLOCK + "enorm.{p}", _MM_BLOCK + "norm3.{p}"),
    same(_BLOCK + "mlp.fc1.{p}", _MM_BLOCK + "ffn.layers.0.0.{p}"),
    same(_BLOCK + "mlp.fc2.{p}", _MM_BLOCK + "ffn.layers.1.{p}"),
    same("norm.{p}", "backbone.norm{last}.{p}"),
    same("head.{p}", "head.fc.{p}"),
)
_is_mm = _ends("patch_embed.projection.weight")
_MM_ALIASES = ((r"^(patch_embed|stages|norm\d|absolute_pos_embed)(\.|$)", r"backbone.\1\2"),)
MM_V1 = Layout(
    rules=(
        *_MM_COMMON,
        _unfolded(_MERGING + "reduction.weight", "backbone.stages.{i}.downsample.reduction.weight"),
        _unfolded(_MERGING + "norm.{p}", "backbone.stages.{i}.downsample.norm.{p}"),
    ),
    marks=_both(_is_mm, _not(_ends("attn.w_msa.logit_scale"))),
    dropped=(_DERIVED,),
    aliases=_MM_ALIASES,
)
MM_V2 = Layout(
    rules=(
        *_MM_COMMON,
        _unfolded(_MERGING + "reduction.weight", "backbone.stages.{i+1}.downsample.reduction.weight"),
        same(_MERGING + "norm.{p}", "backbone.stages.{i+1}.downsample.norm.{p}"),
    ),
    marks=_both(_is_mm, _ends("attn.w_msa.logit_scale")),
    dropped=(_DERIVED,),
    aliases=_MM_ALIASES,
)

LAYOUTS: Mapping[str, Mapping[str, Layout]] = {
    "timm": {"swin": TIMM, "swinv2": TIMM},
    "hf": {"swin": HF_V1, "swinv2": HF_V2},
    "torchvision": {"swin": TV_V1, "swinv2": TV_V2},
    "mm": {"swin": MM_V1, "swinv2": MM_V2},
}
"""Format -> family -> its keys."""

NAMES = {"timm": "timm", "hf": "Hugging Face", "torchvision": "torchvision", "mm": "mmpretrain"}


_TIMM_NAME = re.compile(r"(swin|swinv2)_(tiny|small|base|large)_patch4_(window\w+?_[\dto]+)(?:_.*)?")


def timm_model(name: str, v: Variant) -> tuple[str, dict[str, Any]]:
    """(entry, arguments) with which ``timm.create_model`` builds the same model as `v`, whose name here is `name`."""
    arguments: dict[str, Any] = {"num_classes": v.num_classes}
    match = _TIMM_NAME.fullmatch(name)
    known = variant(name)
    if match is None:
        entry = "swinv2_tiny_window8_256" if v.family == "swinv2" else "swin_tiny_patch4_window7_224"
        known = variant("swinv2_tiny_patch4_window8_256" if v.family == "swinv2" else "swin_tiny_patch4_window7_224")
    else:
        entry = f"{match[1]}_{match[2]}_{'patch4_' if v.family == 'swin' else ''}{match[3]}"
    for field in ("img_size", "window_size", "embed_dim", "depths", "num_heads", "patch_size", "in_chans", "mlp_ratio",
                  "qkv_bias", "pretrained_window_sizes"):  # fmt: skip
        if getattr(v, field) != getattr(known, field):
            arguments[field] = getattr(v, field)
    if "pretrained_window_sizes" in arguments:
        arguments["pretrained_window_sizes"] = v.pretrained_window_sizes or (0,) * len(v.depths)
    return entry, arguments


def recognise(keys: Collection[str]) -> tuple[str, Layout] | None:
    """Format and layout of a foreign state dict, told by its keys; None for official and unknown ones."""
    for name, families in LAYOUTS.items():
        for layout in families.values():
            if layout.marks(keys):
                return name, layout
    return None


def check(to: str, v: Variant) -> None:
    """Raise UserError, naming the field, where the format has no way to say what `v` is."""
    name = NAMES[to]

    def refuse(key: str, value: object, why: str) -> None:
        raise UserError(f"{name} cannot express model.{key} {value}: {why}; convert to safetensors instead")

    if v.moe is not None:
        refuse("moe", f"with {v.moe.num_experts} experts", "it has no experts")
    if v.family not in LAYOUTS[to]:
        refuse("family", v.family, "it has no such model")
    if v.extra_norm_interval and not (to == "mm" and v.family == "swinv2"):
        refuse("extra_norm_interval", v.extra_norm_interval, "it has no norms on the main branch")
    if v.ape and to != "mm":
        refuse("ape", v.ape, "it has no absolute position embedding")
    if not v.patch_norm:
        refuse("patch_norm", v.patch_norm, "it always normalises the patches")
    if to == "torchvision" and v.in_chans != 3:
        refuse("in_chans", v.in_chans, "it always reads three channels")
    _check_windows(to, v, refuse)


def _check_windows(to: str, v: Variant, refuse: Callable[[str, object, str], None]) -> None:
    if to == "timm":
        return
    if to == "torchvision" and any(v.pretrained_window_sizes):
        refuse("pretrained_window_sizes", v.pretrained_window_sizes, "it scales coordinates by the present window")
    for i, stage in enumerate(stages(v)):
        (height, width), (shift_h, shift_w) = stage.window_size, stage.shift_size
        if to != "torchvision" and (height != width or shift_h != shift_w):
            refuse("window_size", v.window_size, f"stage {i} has windows of {height} x {width} shifted by {shift_h}, "
                   f"{shift_w}, and it knows square ones only")  # fmt: skip
        shrinks = to in ("hf", "mm") and v.family == "swinv2"
        wanted = v.window_size if isinstance(v.window_size, tuple) else (v.window_size, v.window_size)
        if not shrinks and tuple(stage.window_size) != tuple(wanted):
            refuse("window_size", v.window_size, f"stage {i} has a map of {stage.resolution}, smaller than a window")

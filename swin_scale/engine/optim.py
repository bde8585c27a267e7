"""Which parameters decay and at what rate: the groups that an optimizer of `optimizers` is built over.

Rules of the official optimizer.py: no weight decay for 1-D parameters, biases and position, scale and routing
parameters; optionally a learning rate that falls from the head to the patch embedding (layer-wise decay as in BEiT,
used to fine-tune SimMIM weights).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from swin_scale.config import Optim
from swin_scale.errors import UserError

NO_DECAY_NAMES = frozenset({"absolute_pos_embed", "mask_token"})
NO_DECAY_KEYWORDS = (
    "relative_position_bias_table",
    "cpb_mlp",
    "logit_scale",
    # Swin-MoE: expert biases are 2-D (experts, features); the rest belongs to the cosine router.
    "fc1_bias",
    "fc2_bias",
    "temperature",
    "cosine_projector",
    "sim_matrix",
)
# SimMIM keeps its backbone under this name; the rules are about the names inside. (The official SimMIM code prefixes
# its keywords as well, which then match nothing, so that it decays the position bias; here the rule is the same.)
_ENCODER = "encoder."

ParamGroup = dict[str, Any]


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies to the parameter called `name`."""
    name = name.removeprefix(_ENCODER)
    return not (
        parameter.ndim <= 1
        or name.endswith(".bias")
        or name in NO_DECAY_NAMES
        or any(keyword in name for keyword in NO_DECAY_KEYWORDS)
    )


def layer_id(name: str, depths: Sequence[int]) -> int:
    """Layer number for layer-wise decay: 0 for the patch embedding, 1 to sum(depths) for the blocks, then the rest.

    A merging belongs to the last block of its stage; norm, head and absolute_pos_embed to the last layer, as in the
    official code.
    """
    name = name.removeprefix(_ENCODER)
    if name.startswith("patch_embed.") or name == "mask_token":
        return 0
    match = re.match(r"layers\.(\d+)\.(?:blocks\.(\d+)|downsample)\.", name)
    if match is None:
        return sum(depths) + 1
    stage, block = int(match[1]), match[2]
    if block is None:
        return sum(depths[: stage + 1])
    return sum(depths[:stage]) + int(block) + 1


def stage_depths(names: Iterable[str]) -> tuple[int, ...]:
    """Blocks per stage, counted from parameter names ``layers.{stage}.blocks.{block}.…``."""
    depths: dict[int, int] = {}
    for name in names:
        match = re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name.removeprefix(_ENCODER))
        if match is not None:
            stage, block = int(match[1]), int(match[2])
            depths[stage] = max(depths.get(stage, 0), block + 1)
    return tuple(depths[stage] for stage in sorted(depths))


def param_groups(model: nn.Module, optim: Optim, experts: Collection[nn.Parameter] = ()) -> list[ParamGroup]:
    """Groups for a torch optimizer, every trained parameter in exactly one; frozen ones are left out.

    Parameters in `experts`, those that are not on all ranks, have groups of their own.

    Each group has `params`, `names` (in the same order), `name`, `weight_decay` and `lr_scale`. Groups are ordered by
    layer, decayed before undecayed, experts last, parameters as in the model: the order is part of a checkpoint's
    meaning for DeepSpeed, so it depends on nothing else. Raises UserError when nothing is trained.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        raise UserError("every parameter of the model is frozen; there is nothing to train")
    depths = stage_depths(name for name, _ in model.named_parameters())
    layerwise = optim.layer_decay != 1.0
    last = sum(depths) + 1
    spread = frozenset(experts)
    groups: dict[tuple[int, bool, bool], ParamGroup] = {}
    for name, parameter in named:
        layer = layer_id(name, depths) if layerwise else last
        decay, expert = decays(name, parameter), parameter in spread
        kind = ("decay" if decay else "no_decay") + ("_experts" if expert else "")
        group = groups.setdefault(
            (layer, not decay, expert),
            {
                "params": [],
                "names": [],
                "name": f"layer_{layer}_{kind}" if layerwise else kind,
                "weight_decay": optim.weight_decay if decay else 0.0,
                "lr_scale": optim.layer_decay ** (last - layer),
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    ordered = [groups[key] for key in sorted(groups)]
    placed = [id(parameter) for group in ordered for parameter in group["params"]]
    assert len(set(placed)) == len(placed) == len(named), "a parameter is in two groups or in none"
    return ordered


def describe_groups(groups: Sequence[ParamGroup]) -> str:
    """Table of the groups: tensors, parameters, weight decay, learning-rate scale and the first names."""
    rows = [("group", "tensors", "parameters", "decay", "lr scale", "for example")]
    for group in groups:
        examples = ", ".join(group["names"][:2]) + (", ..." if len(group["names"]) > 2 else "")
        rows.append(
            (
                group["name"],
                f"{len(group['params']):,}",
                f"{sum(parameter.numel() for parameter in group['params']):,}",
                f"{group['weight_decay']:g}",
                f"{group['lr_scale']:.6g}",
                examples,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:5], widths[1:5]))
        + f"  {row[5]}"
        for row in rows
    )

"""Models of the official repository, from a checkout that the environment variable SWIN_OFFICIAL names."""

import os
import sys
from pathlib import Path
from typing import Any

import torch

CHECKOUT = os.environ.get("SWIN_OFFICIAL", "")
WITHOUT_CHECKOUT = "SWIN_OFFICIAL does not name a checkout of the official repository"
DERIVED = ("relative_position_index", "relative_coords_table", "attn_mask", "_num_global_experts")
"""Ends of the names of buffers that follow from the configuration."""


def build_official(
    stem: str, classes: int, changes: dict[str, Any] | None = None, *, pretrain: bool = False
) -> torch.nn.Module:
    """The model of the one official config file whose stem matches `stem` (a glob), with `changes` of its values.

    With `pretrain`, the SimMIM model around it.
    """
    import tests.peers  # noqa: F401  (makes timm importable, which the official code wants)

    if CHECKOUT not in sys.path:
        sys.path.insert(0, CHECKOUT)
    from config import _C, _update_config_from_file
    from models import build_model

    config = _C.clone()
    (path,) = Path(CHECKOUT, "configs").glob(f"*/{stem}.yaml")
    _update_config_from_file(config, str(path))
    # main.py sets the class count from the data set.
    config.merge_from_list(["MODEL.NUM_CLASSES", classes, *sum((changes or {}).items(), ())])
    return build_model(config, is_pretrain=pretrain)


@torch.no_grad()
def perturb(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Move every parameter off its initial value: nothing stays zero, one, or equal to its neighbours."""
    for p in module.parameters():
        p.add_(torch.randn(p.shape, generator=generator), alpha=0.2 if p.ndim == 1 else 0.01)


def split_derived(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(weights, derived buffers) of an official state dict."""
    derived = {key: value for key, value in state.items() if key.endswith(DERIVED)}
    return {key: value for key, value in state.items() if key not in derived}, derived

"""SwinV2 in other people's code, carrying our weights: the official repository, timm, Hugging Face transformers.

A peer's parameters are found through a function of our name; a name that stands for several of theirs means that ours
is their concatenation along the first axis. Nothing is loaded by half: every parameter of both sides has to match.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
import runpy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_scale.models import Variant
from swin_scale.models.geometry import pair

_REMEDY = Path(__file__).resolve().parents[2] / "tests" / "peers.py"

OFFICIAL_FILE = "models/swin_transformer_v2.py"

Names = Callable[[str], tuple[str, ...]]


class PeerMissing(Exception):
    """A peer cannot take part; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A model in a comparison: `logits` of images, and its gradients under our parameter names."""

    name: str
    module: nn.Module
    names: Names = lambda ours: (ours,)
    output: str | None = None
    """Attribute of the module's result that holds the logits; None: the result is the logits."""
    dtype: torch.dtype | None = None
    """Of parameters and images; None: as they are."""
    autocast: torch.dtype | None = None

    @property
    def arithmetic(self) -> torch.dtype:
        """What its matrix products are in."""
        return self.autocast or self.dtype or torch.float32

    def place(self, device: torch.device) -> None:
        """The module to `device`, in its dtype."""
        self.module.to(device, self.dtype)

    def logits(self, x: Tensor) -> Tensor:
        scope = torch.autocast(x.device.type, self.autocast) if self.autocast else contextlib.nullcontext()
        with scope:
            result = self.module(x.to(self.dtype or x.dtype))
        return result if self.output is None else getattr(result, self.output)

    def forward(self, x: Tensor) -> Tensor:
        """Logits without gradients, in eval mode."""
        # One module serves both ways; the flag costs time where it is set on every module anew.
        if self.module.training:
            self.module.eval()
        with torch.inference_mode():
            return self.logits(x)

    def forward_backward(self, x: Tensor, labels: Tensor) -> None:
        """Gradients of the cross entropy, in training mode."""
        if not self.module.training:
            self.module.train()
        self.module.zero_grad(set_to_none=True)
        F.cross_entropy(self.logits(x).float(), labels).backward()

    def gradients(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradient of each parameter in `ours`, in fp64 on the CPU."""
        theirs = dict(self.module.named_parameters())
        grads = {name: [theirs[part].grad for part in self.names(name)] for name in ours}
        return {
            name: torch.cat([g.double().cpu() if g is not None else torch.zeros(0) for g in parts])
            for name, parts in grads.items()
        }

    @torch.no_grad()
    def take(self, ours: Mapping[str, Tensor]) -> None:
        """Copy our parameters in; raises PeerMissing unless every parameter of both sides has its counterpart."""
        theirs = dict(self.module.named_parameters())
        for name, value in ours.items():
            parts = [theirs.pop(part, None) for part in self.names(name)]
            if any(part is None for part in parts):
                raise PeerMissing(f"it has no counterpart of our {name}")
            found = [part for part in parts if part is not None]
            if sum(part.numel() for part in found) != value.numel():
                raise PeerMissing(f"{name} has shape {tuple(value.shape)}, {[tuple(p.shape) for p in found]} there")
            for part, piece in zip(found, value.split([len(p) for p in found]), strict=True):
                part.copy_(piece.view_as(part))
        if theirs:
            raise PeerMissing(f"we have no counterpart of its {', '.join(list(theirs)[:3])}")


def official(v: Variant, checkout: str | None) -> Contestant:
    """The model file of a checkout of microsoft/Swin-Transformer, which needs only torch, numpy and timm."""
    code = official_code(checkout)
    model = code.SwinTransformerV2(**_arguments(v), ape=v.ape, patch_norm=v.patch_norm)
    return Contestant(name="official", module=model)


def official_code(checkout: str | None) -> ModuleType:
    """The official SwinV2's module, a new copy at each call."""
    if checkout is None:
        raise PeerMissing("no checkout given; pass --official DIR, a clone of microsoft/Swin-Transformer")
    path = Path(checkout) / OFFICIAL_FILE
    if not path.is_file():
        raise PeerMissing(f"there is no {OFFICIAL_FILE} in the checkout given")
    _import("timm")
    spec = importlib.util.spec_from_file_location("official_swin_transformer_v2", path)
    assert spec is not None and spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    return code


def timm(v: Variant) -> Contestant:
    _import("timm")
    code = importlib.import_module("timm.models.swin_transformer_v2")
    return Contestant(name="timm", module=code.SwinTransformerV2(**_arguments(v)), names=timm_names)


def huggingface(v: Variant) -> Contestant:
    # With torchvision installed, transformers imports it; `_import` makes that possible.
    _import("timm")
    code = _import("transformers")
    arguments = _arguments(v)
    config = code.Swinv2Config(
        image_size=arguments.pop("img_size"),
        num_channels=arguments.pop("in_chans"),
        num_labels=arguments.pop("num_classes"),
        **arguments,
    )
    return Contestant(
        name="huggingface", module=code.Swinv2ForImageClassification(config), names=huggingface_names, output="logits"
    )


def timm_names(ours: str) -> tuple[str, ...]:
    """timm merges at the start of a stage, not at its end, and keeps the classifier in a head of several parts."""
    name = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + 1}.downsample.", ours)
    return (re.sub(r"^head\.", "head.fc.", name),)


def huggingface_names(ours: str) -> tuple[str, ...]:
    """Hugging Face keeps q, k and v apart."""
    for pattern, theirs in _HUGGINGFACE:
        name, found = re.subn(pattern, theirs, ours)
        if found:
            if ".qkv." in name:
                return tuple(name.replace("qkv", part) for part in ("query", "key", "value"))
            return (name,)
    return (ours,)


_BLOCK = r"^layers\.(\d+)\.blocks\.(\d+)\."
_BLOCK_THERE = r"swinv2.encoder.layers.\1.blocks.\2."
_HUGGINGFACE = (
    (r"^head\.", "classifier."),
    (r"^norm\.", "swinv2.layernorm."),
    (r"^patch_embed\.proj\.", "swinv2.embeddings.patch_embeddings.projection."),
    (r"^patch_embed\.norm\.", "swinv2.embeddings.norm."),
    (r"^layers\.(\d+)\.downsample\.", r"swinv2.encoder.layers.\1.downsample."),
    (_BLOCK + r"norm1\.", _BLOCK_THERE + "layernorm_before."),
    (_BLOCK + r"norm2\.", _BLOCK_THERE + "layernorm_after."),
    (_BLOCK + r"mlp\.fc1\.", _BLOCK_THERE + "intermediate.dense."),
    (_BLOCK + r"mlp\.fc2\.", _BLOCK_THERE + "output.dense."),
    (_BLOCK + r"attn\.proj\.", _BLOCK_THERE + "attention.output.dense."),
    (_BLOCK + r"attn\.cpb_mlp\.", _BLOCK_THERE + "attention.self.continuous_position_bias_mlp."),
    (_BLOCK + r"attn\.q_bias$", _BLOCK_THERE + "attention.self.query.bias"),
    (_BLOCK + r"attn\.v_bias$", _BLOCK_THERE + "attention.self.value.bias"),
    (_BLOCK + r"attn\.", _BLOCK_THERE + "attention.self."),
)


def _arguments(v: Variant) -> dict[str, Any]:
    """What the constructors have in common; all noise of training is off."""
    if pair(v.img_size)[0] != pair(v.img_size)[1] or not isinstance(v.window_size, int):
        raise PeerMissing("it is compared on square images and windows only")
    return {
        "img_size": pair(v.img_size)[0],
        "patch_size": v.patch_size,
        "in_chans": v.in_chans,
        "num_classes": v.num_classes,
        "embed_dim": v.embed_dim,
        "depths": v.depths,
        "num_heads": v.num_heads,
        "window_size": v.window_size,
        "mlp_ratio": v.mlp_ratio,
        "qkv_bias": v.qkv_bias,
        "drop_path_rate": 0.0,
        "pretrained_window_sizes": v.pretrained_window_sizes or (0,) * len(v.depths),
    }


def _import(package: str) -> Any:
    """Import a peer's package; raises PeerMissing with the pip line.

    timm imports torchvision, whose PyPI build does not load beside a CPU build of torch. In a checkout of this
    repository the tests have the remedy; elsewhere a matching torchvision is needed.
    """
    try:
        # By its place, as a console script has no checkout among the places it imports from.
        if package == "timm" and _REMEDY.is_file():
            return runpy.run_path(str(_REMEDY))["timm"]
        return importlib.import_module(package)
    except (ImportError, RuntimeError) as error:
        hint = (
            f"pip install {package}" if isinstance(error, ModuleNotFoundError) else f"{type(error).__name__}: {error}"
        )
        raise PeerMissing(f"{package} cannot be imported ({hint})") from error

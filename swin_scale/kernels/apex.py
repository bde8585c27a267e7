"""NVIDIA Apex where it is installed: found without being run, told from its namesake, imported at first use. Its home.

The project called `apex` on PyPI is a web toolkit of the same import name. NVIDIA's is built from its source.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from swin_scale.errors import UserError

Part = Literal["normalization", "optimizers"]

_EXTENSIONS: Mapping[Part, str] = {"normalization": "fused_layer_norm_cuda", "optimizers": "amp_C"}
_BUILD = "from its source, https://github.com/NVIDIA/apex, with its C++ and CUDA extensions"


def why_not_apex(part: Part = "normalization") -> str | None:
    """What keeps Apex's `part` from being used here, as one clause that says what to install; None if nothing does.

    Nothing is imported for it: the namesake would start its web framework, or fail on another version of that.
    """
    spec = importlib.util.find_spec("apex")
    # A directory called apex without code of its own, such as a checkout of Apex, has no origin.
    if spec is None or spec.origin is None:
        return f"NVIDIA Apex is not installed (it is not on PyPI: build it {_BUILD})"
    places = list(spec.submodule_search_locations or ())
    if PathFinder.find_spec("apex.normalization", places) is None:
        return (
            f"the package apex in {spec.origin} is not NVIDIA's but the web toolkit of that name on PyPI (pip "
            f"uninstall apex, then build NVIDIA's {_BUILD})"
        )
    extension = _EXTENSIONS[part]
    if importlib.util.find_spec(extension) is None:
        return f"NVIDIA Apex in {spec.origin} was built without {extension} (build it again {_BUILD})"
    if not torch.cuda.is_available():
        return "NVIDIA Apex computes on CUDA devices only, and none is usable here"
    return None


def require_apex(part: Part, *, key: str, value: str, instead: str) -> None:
    """Raise UserError that names the config's `key`, its `value` and what to set `instead` where Apex cannot serve.

    NVIDIA's is imported: extensions built for another torch are found, but do not load.
    """
    reason = why_not_apex(part)
    if reason is None:
        try:
            import_apex(part)
            importlib.import_module(_EXTENSIONS[part])
        except ImportError as error:
            reason = f"NVIDIA Apex does not load ({error}; build it for this torch {_BUILD})"
    if reason is not None:
        raise UserError(f"{key} is {value}, but {reason}; or set {key}={instead}")


def import_apex(part: Part) -> ModuleType:
    """``apex.normalization`` or ``apex.optimizers``; whether it is there was asked before."""
    return importlib.import_module(f"apex.{part}")


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last axis by Apex's fused kernel: statistics in fp32, output in the dtype of `x`.

    Args:
        x: (..., C) on a CUDA device.
        weight, bias: (C,).

    While torch.compile traces, torch's own is used, as in Apex: the compiler fuses that with what is around it.
    """
    if torch.compiler.is_compiling():
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    fused_layer_norm = importlib.import_module("apex.normalization.fused_layer_norm")
    out: Tensor = fused_layer_norm.fused_layer_norm_affine(
        x, weight.to(x.dtype), bias.to(x.dtype), tuple(weight.shape), eps
    )
    return out

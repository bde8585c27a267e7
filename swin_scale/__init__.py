"""Pretrain Swin Transformers at scale.

``create_model``, ``create_simmim``, ``list_models``, ``load_weights`` and ``predict`` are looked up on first use, so
that importing the package brings in neither torch nor numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swin_scale.convert import load_weights
    from swin_scale.models import create_model, create_simmim, list_models
    from swin_scale.predictor import predict

__version__ = "0.1.0"
__all__ = ["__version__", "create_model", "create_simmim", "list_models", "load_weights", "predict"]

_HOMES = {
    "create_model": "swin_scale.models",
    "create_simmim": "swin_scale.models",
    "list_models": "swin_scale.models",
    "load_weights": "swin_scale.convert",
    "predict": "swin_scale.predictor",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value

"""Peers the tests compare with: torchvision and timm, importable on a CPU build of torch.

PyPI's torchvision is a CUDA build whose compiled operators do not load beside a CPU torch, and its Python half then
fails at import. Only after that failure the two operator schemas it looks up are declared, which is enough for
transforms and for timm; declaring them before a healthy torchvision loads would end the process.
"""

import sys

import torch
from torch.overrides import TorchFunctionMode

try:
    import torchvision
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    for name in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    _schemas = torch.library.Library("torchvision", "DEF")
    _schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

import timm

__all__ = ["Unfilled", "timm", "torchvision"]


class Unfilled(TorchFunctionMode):
    """Inside, modules are built without drawing the weights, for those that a strict load fills."""

    _DRAWS = (torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.erfinv_)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0] if func in self._DRAWS else func(*args, **(kwargs or {}))

"""The deterministic fill that the golden numbers of the official code were computed with."""

import math

import torch
from torch import Tensor, nn


def sequence(count: int, key: int) -> Tensor:
    """(count,) float64 in [-1, 1), a fixed function of index and key."""
    i = torch.arange(1, count + 1, dtype=torch.float64)
    return 2 * (torch.sin(12.9898 * i + 78.233 * (key + 1)) * 43758.5453).remainder(1.0) - 1


def image(*shape: int, key: int = -1) -> Tensor:
    return sequence(math.prod(shape), key).view(shape)


@torch.no_grad()
def fill(module: nn.Module) -> nn.Module:
    """Every parameter becomes a function of its name; the module ends in float64 and eval mode."""
    module = module.double().eval()
    for name, parameter in module.named_parameters():
        v = sequence(parameter.numel(), sum(map(ord, name)) % 1000).view_as(parameter)
        if "logit_scale" in name:
            v = math.log(10) + 3 * v
        elif "temperature" in name:
            v = math.log(2) + 0.5 * v
        elif "cpb_mlp" in name:
            pass
        elif "relative_position_bias_table" in name:
            v = 2 * v
        elif parameter.ndim == 1 and name.endswith("weight"):
            v = 1 + 0.1 * v
        else:
            v = 0.15 * v
        parameter.copy_(v)
    return module

"""Initial values of gates and experts, the same whatever the ranks the experts are spread over."""

import math

import torch
from torch import Generator, Tensor, nn

from swin_scale.moe.experts import Experts
from swin_scale.moe.router import Router

SIM_MATRIX_STD = 0.01


def initial_value(module: nn.Module, name: str, std: float, generator: Generator) -> Tensor | None:
    """The value of parameter `name` of an `Experts` or `Router`, on the CPU in fp32; None for any other module.

    Expert weights are normal with `std` and drawn for all experts of the layer in the order of their global ids, those
    of other ranks being thrown away, so that an expert starts the same on any rank and the generator ends the same on
    all. Biases are 0. The cosine gate starts as Tutel's does: similarity matrix normal, std 0.01, and the log-scale
    ln(1 / initial temperature). Linear layers inside a gate are not named here: they are Linears like any other.
    """
    if isinstance(module, Experts):
        # Sizes are the layer's: by now the parameter itself may be cut over ranks.
        if name.endswith("bias"):
            width = module.hidden if name == "batched_fc1_bias" else module.dim
            return torch.zeros(module.num_local, width, device="cpu")
        value = torch.empty(module.num_local, module.hidden, module.dim, device="cpu")
        other = torch.empty(module.hidden, module.dim, device="cpu")
        for e in range(module.num_experts):
            local = e - module.first
            (value[local] if 0 <= local < module.num_local else other).normal_(std=std, generator=generator)
        return value
    if isinstance(module, Router):
        if name == "temperature":
            return torch.full((1,), math.log(1 / module.config.cosine_init_t), device="cpu")
        shape = module.config.cosine_dim, module.config.num_experts
        return torch.empty(shape, device="cpu").normal_(std=SIM_MATRIX_STD, generator=generator)
    return None

"""FusedLayerNorm: statistics in fp32; input, weight and bias must be of one dtype, as the kernel has it."""

import torch
import torch.nn.functional as F


def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
    assert input.dtype == weight.dtype == bias.dtype, "expected inputs of one dtype"
    return F.layer_norm(input.float(), normalized_shape, weight.float(), bias.float(), eps).to(input.dtype)


class FusedLayerNorm(torch.nn.LayerNorm):
    def forward(self, input):
        return fused_layer_norm_affine(input, self.weight, self.bias, self.normalized_shape, self.eps)

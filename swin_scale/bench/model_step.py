"""A training step of a contestant: forward, backward and AdamW on a batch that is at hand."""

from __future__ import annotations

import torch
from torch import Tensor

from swin_scale.bench.peers import Contestant

LEARNING_RATE = 1e-6
"""Small, for weights to stay what the gate saw."""


class TrainingStep:
    """Forward, backward and torch's fused AdamW, called with images and labels.

    fp32 parameters are updated themselves, as under AMP. For those in half precision the optimizer holds fp32 masters,
    which gradients are copied to and parameters from. Nobody scales the loss or clips.
    """

    def __init__(self, contestant: Contestant) -> None:
        self.contestant = contestant
        self.parameters: list[Tensor] = [p for p in contestant.module.parameters() if p.requires_grad]
        self.is_half = self.parameters[0].dtype.itemsize < 4
        self.masters = [p.detach().float() for p in self.parameters] if self.is_half else self.parameters
        on_gpu = self.parameters[0].is_cuda
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=LEARNING_RATE, weight_decay=0.05, fused=True, capturable=on_gpu
        )

    def __call__(self, x: Tensor, labels: Tensor) -> None:
        self.contestant.forward_backward(x, labels)
        if self.is_half:
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                if parameter.grad is not None and master.grad is None:
                    master.grad = torch.empty_like(master)
            used = [i for i, parameter in enumerate(self.parameters) if parameter.grad is not None]
            torch._foreach_copy_(_grads(self.masters, used), _grads(self.parameters, used))
        self.optimizer.step()
        if self.is_half:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.masters)


def _grads(tensors: list[Tensor], used: list[int]) -> list[Tensor]:
    grads = [tensors[i].grad for i in used]
    return [grad for grad in grads if grad is not None]

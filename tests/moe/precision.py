"""Errors of the MoE layer in any dtype and on any device against itself in fp64, beside torch's own dense MLP."""

import torch
from torch import Tensor, nn

from swin_scale.moe.config import MoEConfig
from swin_scale.moe.layer import MoEMlp
from tests.moe.cases import fill

TOKENS, DIM, HIDDEN = 512, 64, 256
HALVES = (torch.bfloat16, torch.float16)


def layer_errors(config: MoEConfig, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Relative errors of `y` and of all `gradients` together, with weights and tokens rounded to `dtype` in both."""
    return _errors(MoEMlp(config, DIM, HIDDEN), dtype, device)


def dense_errors(dtype: torch.dtype, device: str) -> dict[str, float]:
    """The same of torch's linear, GELU, linear."""
    return _errors(nn.Sequential(nn.Linear(DIM, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, DIM)), dtype, device)


def _errors(module: nn.Module, dtype: torch.dtype, device: str) -> dict[str, float]:
    fill(module)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:  # products keep the size of what goes in
                parameter.div_(parameter.std() * max(parameter.shape[-2:]) ** 0.5)
    generator = torch.Generator().manual_seed(5)
    x, upstream = torch.randn(2, TOKENS, DIM, generator=generator).to(dtype)
    got = _outcome(module.to(device, dtype), x.to(device), upstream.to(device))
    want = _outcome(module.to("cpu", torch.float64), x.double(), upstream.double())
    return {key: float((got[key] - want[key]).norm() / want[key].norm()) for key in want}


def _outcome(module: nn.Module, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    module.eval().zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    result = module(x)
    y = result[0] if isinstance(result, tuple) else result
    y.backward(upstream)
    grads = [x.grad, *(parameter.grad for parameter in module.parameters())]
    return {"y": y.detach().double().cpu(), "gradients": torch.cat([g.double().cpu().flatten() for g in grads])}

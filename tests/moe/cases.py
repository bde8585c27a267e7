"""MoE layers and inputs that tests and the golden script share."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from swin_scale.moe.config import MoEConfig
from swin_scale.moe.layer import MoEMlp
from swin_scale.moe.stats import RoutingStats

DIM, HIDDEN, EXPERTS, TOKENS = 6, 8, 4, 20
WIDTH = {"temperature": 0.5, "sim_matrix": 1.0}


def fill(module: nn.Module, seed: int = 0) -> None:
    """Normal values (std 0.3 unless named in WIDTH), each parameter's drawn from its name, whatever the order."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            generator = torch.Generator().manual_seed(seed + sum(name.encode()))
            value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(WIDTH.get(name.rpartition(".")[2], 0.3) * value)


def layer(config: MoEConfig, dim: int = DIM, hidden: int = HIDDEN, **groups) -> MoEMlp:
    """A filled layer in fp64, in evaluation; its experts are those of the whole layer, cut to this rank's."""
    whole = MoEMlp(config, dim, hidden).double()
    fill(whole)
    module = MoEMlp(config, dim, hidden, **groups).double().eval()
    mine = slice(module.experts.first, module.experts.first + module.num_local_experts)
    module.load_state_dict({k: v[mine] if ".experts." in k else v for k, v in whole.state_dict().items()})
    return module


def inputs(tokens: int = TOKENS, dim: int = DIM, seed: int = 7) -> tuple[Tensor, Tensor]:
    """Tokens (tokens, dim) and an upstream gradient of the same shape, fp64."""
    generator = torch.Generator().manual_seed(seed)
    x, upstream = torch.randn(2, tokens, dim, generator=generator, dtype=torch.float64)
    return x, upstream


@dataclass(frozen=True)
class Pass:
    """What one forward and backward gave."""

    y: Tensor
    aux: Tensor
    stats: RoutingStats
    grads: dict[str, Tensor]
    """By parameter name, and `x`."""

    def arrays(self) -> dict[str, np.ndarray]:
        named = {"y": self.y, "aux": self.aux, "kept_E": self.stats.kept_E}
        named |= {f"grad {name}": grad for name, grad in self.grads.items()}
        return {name: value.detach().numpy() for name, value in named.items()}


def run(module: nn.Module, x: Tensor, upstream: Tensor) -> Pass:
    """The pass whose loss is (y * upstream).sum() + aux."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    y, aux, stats = module(x)
    ((y * upstream).sum() + aux).backward()
    grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return Pass(y.detach(), aux.detach(), stats, grads | {"x": x.grad})

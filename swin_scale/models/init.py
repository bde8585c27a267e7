"""The official initialisation, as one function of the module tree and a seed.

| parameter | value |
|---|---|
| weights of Linear and Conv1d, V1 bias tables, absolute position, mask token | normal, std `Variant.init_std` |
| patch embedding and SimMIM decoder (Conv2d), weight and bias | uniform within 1 / sqrt(fan in), torch's default |
| LayerNorm | 1 and 0; after a V2 branch both 0, so that a block starts as the identity (SwinV2, section 3.1) |
| logit_scale | ln 10 |
| experts and cosine gates, of either backend | `moe.initial` |
| every other bias | 0 |

The official code cuts the normal at +-2, a hundred standard deviations, so a plain normal is the same distribution.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from swin_scale.models.layers import PostNorm
from swin_scale.moe.initial import initial_value
from swin_scale.moe.tutel import TutelMoEMlp

if TYPE_CHECKING:
    from swin_scale.models.simmim import SimMIM
    from swin_scale.models.swin import Swin

INITIAL_LOGIT_SCALE = math.log(10.0)


@torch.no_grad()
def init_parameters(model: "Swin | SimMIM", seed: int) -> None:
    """Initialise all parameters of `model` with `initial_values`."""
    parameters = dict(model.named_parameters())
    for name, value in initial_values(model, seed):
        parameters[name].copy_(value)


def initial_values(model: "Swin | SimMIM", seed: int) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of every parameter, in the order of `named_parameters`, drawn one by one as they are asked for.

    Values are drawn on the CPU in fp32 from a generator of their own, whatever the device and dtype of the model, so
    that the same seed gives the same weights everywhere: a model on the meta device, filled parameter by parameter,
    equals one built directly. A value may be a broadcast view: copy it, never write to it.
    """
    generator, std = torch.Generator("cpu").manual_seed(seed), model.variant.init_std
    tutels = [module for module in model.modules() if isinstance(module, TutelMoEMlp)]
    natives = {theirs: native for module in tutels for theirs, native in module.natives().items()}
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = initial_value(natives.get(module, module), name, std, generator)
            if value is None:
                value = _initial(module, name, parameter.shape, std, generator)
            yield f"{prefix}.{name}" if prefix else name, value.expand(parameter.shape)


def _initial(module: nn.Module, name: str, shape: torch.Size, std: float, generator: torch.Generator) -> Tensor:
    if isinstance(module, nn.LayerNorm):
        starts_at_one = name == "weight" and not isinstance(module, PostNorm)
        return torch.ones((), device="cpu") if starts_at_one else torch.zeros((), device="cpu")
    if isinstance(module, nn.Conv2d):
        # From the layer's sizes: by now the weight itself may be cut over ranks.
        bound = (module.in_channels // module.groups * math.prod(module.kernel_size)) ** -0.5
        return torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)
    if name == "logit_scale":
        return torch.full((), INITIAL_LOGIT_SCALE, device="cpu")
    if name.endswith("bias"):
        return torch.zeros((), device="cpu")
    return torch.empty(shape, device="cpu").normal_(std=std, generator=generator)

"""One MoE layer in several codes with the same weights: ours, Tutel's, DeepSpeed's, one-hot einsum; and a dense MLP.

Shapes as in `swin_scale.moe.router`, H hidden units. Weights go by the names of `random_weights`, whoever holds them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_scale.bench.peers import PeerMissing
from swin_scale.engine.fragments import import_deepspeed
from swin_scale.errors import UserError
from swin_scale.moe.config import MoEConfig
from swin_scale.moe.layer import MoEMlp
from swin_scale.moe.router import capacity, gshard

Weights = dict[str, Tensor]
Forward = Callable[[Tensor], tuple[Tensor, Tensor | None]]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = ("forward", "forward+backward")

AXES = {"gate": 2, "fc1": 3, "bias1": 2, "fc2": 3, "bias2": 2}
"""Weight -> its axes, experts first."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a layer with top-1 routing; capacity `factor` 0 drops nothing."""

    experts: int
    dim: int
    hidden: int
    factor: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer in a comparison: `forward` of tokens (T, D) gives its output and its auxiliary loss, if it has one."""

    name: str
    module: nn.Module
    forward: Forward
    parts: Mapping[str, Sequence[Tensor]]
    """Our name of a weight -> the parameter, or one for each expert."""
    input_last: tuple[str, ...] = ()
    """Weights that are stored with their two axes exchanged."""

    @torch.no_grad()
    def take(self, weights: Weights) -> None:
        """Copy weights in; a dense layer takes the first expert's."""
        for name, parts in self.parts.items():
            values = weights[name].unbind(0) if self._by_expert(name) else [weights[name]]
            for part, value in zip(parts, values):
                part.copy_(value.t() if name in self.input_last else value)

    def gradients(self) -> Weights:
        """Of every weight, in our shapes, fp64 on the CPU."""
        found = {}
        for name, parts in self.parts.items():
            grads = [torch.zeros_like(part) if part.grad is None else part.grad for part in parts]
            grads = [grad.t() if name in self.input_last else grad for grad in grads]
            found[name] = (torch.stack(grads) if self._by_expert(name) else grads[0]).double().cpu()
        return found

    def _by_expert(self, name: str) -> bool:
        """Whether a parameter holds one expert's weight, not that of all experts."""
        return self.parts[name][0].dim() < AXES[name]


def random_weights(sizes: Sizes, generator: torch.Generator) -> Weights:
    """fp32 weights with which activations keep their size; rows of the gate have length 1."""
    E, D, H = sizes.experts, sizes.dim, sizes.hidden

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    return {
        "gate": F.normalize(normal(E, D, std=1.0), dim=1),
        "fc1": normal(E, H, D, std=D**-0.5),
        "bias1": normal(E, H, std=0.1),
        "fc2": normal(E, H, D, std=H**-0.5),
        "bias2": normal(E, D, std=0.1),
    }


def loads(tokens: int, experts: int, spread: float) -> list[int]:
    """Tokens of each expert: evenly spaced from 1 - spread to 1 + spread times their mean, which is a whole number."""
    mean = tokens // experts
    low = [round(mean * (1 - spread * (1 - 2 * e / max(experts - 1, 1)))) for e in range(experts // 2)]
    return low + [mean] * (experts % 2) + [2 * mean - load for load in reversed(low)]


def tokens_for(gate_ED: Tensor, load_E: Sequence[int], generator: torch.Generator) -> Tensor:
    """Normal tokens (sum of loads, D), in random order, of which the gate sends each expert its load."""
    (E, D), wanted_E = gate_ED.shape, torch.tensor(load_E)
    drawn, taken = 4 * sum(load_E), torch.zeros(0)
    while len(taken) < sum(load_E):
        x = torch.randn(drawn, D, generator=generator)
        expert_T = (x @ gate_ED.t()).argmax(1)
        place_T = F.one_hot(expert_T, E).cumsum(0).gather(1, expert_T[:, None]).squeeze(1)
        taken, drawn = x[place_T <= wanted_E[expert_T]], 2 * drawn
    return taken[torch.randperm(len(taken), generator=generator)]


def reference(x_TD: Tensor, w: Weights) -> Tensor:
    """What every layer without drops computes, expert by expert."""
    gate_T, expert_T = (x_TD @ w["gate"].t()).softmax(1).max(1)
    y_TD = torch.zeros_like(x_TD)
    for e in range(len(w["gate"])):
        rows = (expert_T == e).nonzero().squeeze(1)
        y = mlp(x_TD[rows], w["fc1"][e], w["bias1"][e], w["fc2"][e], w["bias2"][e])
        y_TD = y_TD.index_add(0, rows, gate_T[rows, None] * y)
    return y_TD


def dense_reference(x_TD: Tensor, w: Weights) -> Tensor:
    """What the dense MLP computes."""
    return mlp(x_TD, w["fc1"][0], w["bias1"][0], w["fc2"][0], w["bias2"][0])


def mlp(x_TD: Tensor, fc1_HD: Tensor, bias1_H: Tensor, fc2_HD: Tensor, bias2_D: Tensor) -> Tensor:
    """gelu(x @ fc1.T + bias1) @ fc2 + bias2."""
    return F.gelu(x_TD @ fc1_HD.t() + bias1_H) @ fc2_HD + bias2_D


def backward(layer: Layer, x: Tensor, upstream: Tensor) -> None:
    """A pass whose loss is (y * upstream).sum() plus the auxiliary loss, if there is one."""
    y, aux = layer.forward(x)
    if aux is None:
        y.backward(upstream)
    else:
        torch.autograd.backward((y, aux), (upstream, torch.ones_like(aux)))


def ours(sizes: Sizes, name: str = "ours") -> Layer:
    """Our layer as the published Swin-MoE models set it: load and importance loss, noise, batch-prioritised routing."""
    config = MoEConfig(
        num_experts=sizes.experts, capacity_factor=sizes.factor, eval_capacity_factor=sizes.factor, drop=0.0
    )
    module = MoEMlp(config, sizes.dim, sizes.hidden)
    return Layer(name=name, module=module, forward=lambda x: module(x)[:2], parts=_tutel_names(module))


def tutel(sizes: Sizes) -> Layer:
    """Tutel's own layer, with the same options."""
    try:
        code = importlib.import_module("tutel.moe")
    except ImportError as error:
        raise PeerMissing(
            f"tutel cannot be imported ({error}); build https://github.com/microsoft/tutel from source"
        ) from error
    module = code.moe_layer(
        gate_type={"type": "top", "k": 1, "capacity_factor": sizes.factor, "gate_noise": 1.0, "fp32_gate": True},
        model_dim=sizes.dim,
        experts={
            "type": "ffn",
            "num_experts_per_device": sizes.experts,
            "hidden_size_per_expert": sizes.hidden,
            "activation_fn": F.gelu,
        },
        # Told to drop nothing, it drops all the same under prioritised routing.
        batch_prioritized_routing=sizes.factor != 0,
        is_gshard_loss=False,
    )

    def forward(x_TD: Tensor) -> tuple[Tensor, Tensor]:
        y_TD = module(x_TD)
        return y_TD, y_TD.l_aux

    return Layer(name="tutel", module=module, forward=forward, parts=_tutel_names(module))


def deepspeed(sizes: Sizes, on_gpu: bool) -> Layer:
    """DeepSpeed's own layer around an ordinary MLP, tokens taken in their order."""
    try:
        import_deepspeed(on_gpu)
    except UserError as error:
        raise PeerMissing(str(error)) from error
    code = importlib.import_module("deepspeed.moe.layer")
    module = code.MoE(
        sizes.dim,
        Dense(sizes.dim, sizes.hidden),
        sizes.experts,
        capacity_factor=sizes.factor or 1.0,
        eval_capacity_factor=sizes.factor or 1.0,
        min_capacity=0,
        drop_tokens=sizes.factor != 0,
        use_rts=False,
    )
    inner: Any = module.deepspeed_moe
    parts = {"gate": [inner.gate.wg.weight], **_by_expert(inner.experts.deepspeed_experts)}
    return Layer(name="deepspeed", module=module, forward=lambda x: module(x)[:2], parts=parts, input_last=("fc2",))


def one_hot(sizes: Sizes) -> Layer:
    module = OneHot(sizes)
    parts: dict[str, list[Tensor]] = {name: [parameter] for name, parameter in module.named_parameters()}
    return Layer(name="one-hot", module=module, forward=module, parts=parts)


def dense(sizes: Sizes) -> Layer:
    """The MLP of a dense model: the first expert for all tokens."""
    module = Dense(sizes.dim, sizes.hidden)
    return Layer(
        name="dense",
        module=module,
        forward=lambda x: (module(x), None),
        parts=_by_expert([module]),
        input_last=("fc2",),
    )


class Dense(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_TD)))


class OneHot(nn.Module):
    """Top-1 routing by einsum over a (tokens, experts, capacity) tensor: GShard (2020), algorithm 1 and section 3.1."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        E, D, H = sizes.experts, sizes.dim, sizes.hidden
        self.factor = sizes.factor
        self.gate = nn.Parameter(torch.empty(E, D))
        self.fc1, self.bias1 = nn.Parameter(torch.empty(E, H, D)), nn.Parameter(torch.empty(E, H))
        self.fc2, self.bias2 = nn.Parameter(torch.empty(E, H, D)), nn.Parameter(torch.empty(E, D))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and GShard's balance loss."""
        T, E = len(x_TD), len(self.gate)
        limit = capacity(T, E, 1, self.factor)
        score_TE = F.linear(x_TD.float(), self.gate.float()).softmax(1)
        mask_TE = F.one_hot(score_TE.argmax(1), E)
        place_T = (mask_TE * (mask_TE.cumsum(0) - 1)).sum(1)
        slots_C = torch.arange(T if limit is None else limit, device=x_TD.device)
        place_TC = (place_T[:, None] == slots_C).to(score_TE.dtype)
        combine_TEC = torch.einsum("te,tc->tec", score_TE * mask_TE, place_TC)
        dispatch_TEC = (combine_TEC > 0).to(x_TD.dtype)
        x_ECD = torch.einsum("tec,td->ecd", dispatch_TEC, x_TD)
        h_ECH = F.gelu(torch.einsum("ecd,ehd->ech", x_ECD, self.fc1) + self.bias1[:, None])
        y_ECD = torch.einsum("ech,ehd->ecd", h_ECH, self.fc2) + self.bias2[:, None]
        y_TD = torch.einsum("tec,ecd->td", combine_TEC.to(x_TD.dtype), y_ECD)
        return y_TD, gshard(score_TE.sum(0), mask_TE.sum(0), torch.tensor(T, device=x_TD.device))


def _by_expert(experts: Sequence[Dense]) -> dict[str, list[Tensor]]:
    return {
        "fc1": [expert.fc1.weight for expert in experts],
        "bias1": [expert.fc1.bias for expert in experts],
        "fc2": [expert.fc2.weight for expert in experts],
        "bias2": [expert.fc2.bias for expert in experts],
    }


def _tutel_names(module: nn.Module) -> dict[str, list[Tensor]]:
    """Ours and Tutel's layers name their parameters alike."""
    ends = {
        "gate": "wg.weight",
        "fc1": "batched_fc1_w",
        "bias1": "batched_fc1_bias",
        "fc2": "batched_fc2_w",
        "bias2": "batched_fc2_bias",
    }
    found = list(module.named_parameters())
    return {ours: [value for name, value in found if name.endswith(end)] for ours, end in ends.items()}

"""Swin Transformer V1, V2 and MoE: one family that differs in norm placement, attention score, position bias and MLP.

    image -> PatchEmbed -> [Block x depth, PatchMerging] per stage -> norm -> mean over tokens -> head

Names and shapes of parameters are those of the official weights. Papers: Swin (Liu et al., 2021), SwinV2 (2022),
Tutel (Hwang et al., 2023) for Swin-MoE.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from swin_scale.errors import UserError
from swin_scale.kernels import window_attention
from swin_scale.models.geometry import Stage, pair, stages
from swin_scale.models.init import init_parameters
from swin_scale.models.layers import (
    Linear,
    Mlp,
    PatchEmbed,
    PatchMerging,
    PostNorm,
    compute_dtype,
    dropout,
    recompute,
    relative_coords_table,
    relative_position_index,
    residual,
)
from swin_scale.models.variants import Family, Pair, Variant
from swin_scale.moe.config import MoEConfig
from swin_scale.moe.layer import MoEMlp
from swin_scale.moe.stats import RoutingStats

MakeMoEMlp = Callable[[MoEConfig, int, int], nn.Module]
"""Options, dim and hidden width to the layer that takes an MLP's place: `moe.layer.MoEMlp`, its groups bound."""
Score = Literal["dot", "cosine"]
Position = Literal["table", "sigmoid_cpb", "raw_cpb"]

_ATTENTION: dict[Family, tuple[Score, Position]] = {
    "swin": ("dot", "table"),
    "swinv2": ("cosine", "sigmoid_cpb"),
    "swin_moe": ("dot", "raw_cpb"),
    "swinv2_moe": ("cosine", "sigmoid_cpb"),
}
MAX_LOGIT_SCALE = math.log(100.0)
CPB_HIDDEN = 512


class WindowAttention(nn.Module):
    """Multi-head self-attention in windows of (h, w) tokens.

    `score`: the `dot` product scaled by head_dim^-0.5, or SwinV2's `cosine` with a learnt scale and no bias of keys.
    `position`: a `table` of biases, or an MLP of log-spaced offsets (SwinV2, section 3.3), bounded by 16 * sigmoid or
    raw as in Swin-MoE.
    """

    relative_position_index: Tensor

    def __init__(
        self,
        dim: int,
        window_size: Pair,
        heads: int,
        *,
        score: Score,
        position: Position,
        qkv_bias: bool = True,
        drop: float = 0.0,
        pretrained_window_size: int = 0,
    ) -> None:
        super().__init__()
        self.window_size, self.heads, self.drop = window_size, heads, drop
        self.score, self.position = score, position
        self.pretrained_window_size = pretrained_window_size
        self.head_dim = dim // heads
        if score == "cosine":
            self.logit_scale = nn.Parameter(torch.empty(heads, 1, 1))
            self.q_bias = nn.Parameter(torch.empty(dim)) if qkv_bias else None
            self.v_bias = nn.Parameter(torch.empty(dim)) if qkv_bias else None
        if position == "table":
            offsets = (2 * window_size[0] - 1) * (2 * window_size[1] - 1)
            self.relative_position_bias_table = nn.Parameter(torch.empty(offsets, heads))
        else:
            self.cpb_mlp = nn.Sequential(Linear(2, CPB_HIDDEN), nn.ReLU(), Linear(CPB_HIDDEN, heads, bias=False))
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias and score == "dot")
        self.proj = Linear(dim, dim)
        self.register_buffer("relative_position_index", relative_position_index(window_size), persistent=False)
        self._cached_bias: tuple[list[Tensor], Tensor] | None = None

    def rebuild_buffers(self, device: torch.device | None = None) -> None:
        device = self.relative_position_index.device if device is None else device
        self.relative_position_index = relative_position_index(self.window_size, device)

    def position_bias(self) -> Tensor:
        """(heads, N, N), fp32 or wider.

        Without gradients it is kept from call to call together with copies of the parameters it was made from, and
        used again only while they are equal in value: no way of changing parameters can leave it stale.
        """
        is_table = self.position == "table"
        sources = [self.relative_position_bias_table] if is_table else list(self.cpb_mlp.parameters())
        # Parameters that ZeRO-3 has partitioned away are empty here and prove nothing.
        if torch.is_grad_enabled() or any(p.numel() == 0 or p.is_meta for p in sources):
            self._cached_bias = None
            return self._position_bias()
        if self._cached_bias is not None and all(map(_same, self._cached_bias[0], sources)):
            return self._cached_bias[1]
        bias = self._position_bias()
        self._cached_bias = [p.detach().clone() for p in sources], bias
        return bias

    def _position_bias(self) -> Tensor:
        N = self.window_size[0] * self.window_size[1]
        table: Tensor
        if self.position == "table":
            table = self.relative_position_bias_table
            table = table.to(compute_dtype(table))
        else:
            index = self.relative_position_index
            coords = relative_coords_table(self.window_size, self.pretrained_window_size, index.device)
            table = self.cpb_mlp(coords.flatten(0, 2).to(compute_dtype(self.proj.weight)))
        if self.position == "sigmoid_cpb":
            # The sigmoid acts on each entry of the table, so it goes before the much larger gather.
            table = 16 * torch.sigmoid(table)
        return table.t().index_select(1, self.relative_position_index.flatten()).view(-1, N, N)

    def _qkv_bias(self) -> Tensor | None:
        """(3C,) for V2, whose keys have no bias; None without `qkv_bias`."""
        if self.q_bias is None or self.v_bias is None:
            return None
        return torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))

    def forward(self, x: Tensor, bias: Tensor, shift_size: Pair = (0, 0)) -> Tensor:
        """x: (B, H, W, C), bias: `position_bias()`. Returns (B, H, W, C)."""
        if self.score == "cosine":
            scale = self.logit_scale.to(bias.dtype).clamp(max=MAX_LOGIT_SCALE).exp()
            qkv = self.qkv(x, self._qkv_bias())
        else:
            scale = bias.new_full((self.heads, 1, 1), self.head_dim**-0.5)
            qkv = self.qkv(x)
        x = window_attention(qkv, scale, bias, self.window_size, shift_size, self.score == "cosine")
        return dropout(self.proj(x), self.drop, self.training)


def _same(kept: Tensor, now: Tensor) -> bool:
    return kept.dtype == now.dtype and kept.device == now.device and torch.equal(kept, now)


class SameRouting:
    """Raises if a mixture of experts, run a second time by activation checkpointing, sends a token elsewhere.

    Gradients would then be of a routing that never was. The comparison stays on the device.
    """

    def __init__(self) -> None:
        self._first: Tensor | None = None

    def check(self, expert_TK: Tensor) -> None:
        # The first time with itself: selective checkpointing wants the same operations in both runs.
        self._first = expert_TK if self._first is None else self._first
        same = (self._first == expert_TK).all()
        torch._assert_async(same, "activation checkpointing: a recomputed block chose other experts")


class Block(nn.Module):
    """Attention and MLP with residuals, normed before each branch (V1) or after it (V2, section 3.1).

    With a mixture of experts under V2, the second norm is applied to each expert's output, before the gate weighs it.
    """

    def __init__(self, v: Variant, stage: Stage, index: int, drop_path: float, moe_mlp: MakeMoEMlp) -> None:
        super().__init__()
        score, position = _ATTENTION[v.family]
        self.post_norm = v.post_norm
        self.shift_size = stage.shift_size if index % 2 else (0, 0)
        self.drop_path = drop_path
        self.activation_checkpointing = v.activation_checkpointing
        norm = PostNorm if self.post_norm else nn.LayerNorm
        self.norm1 = norm(stage.dim)
        self.attn = WindowAttention(
            stage.dim,
            stage.window_size,
            stage.heads,
            score=score,
            position=position,
            qkv_bias=v.qkv_bias,
            drop=v.drop_rate,
            pretrained_window_size=stage.pretrained_window_size,
        )
        self.norm2 = norm(stage.dim)
        hidden = int(stage.dim * v.mlp_ratio)
        self.is_moe = v.moe is not None and index in stage.moe_blocks
        self.mlp: nn.Module
        if v.moe is not None and self.is_moe:
            self.mlp = moe_mlp(v.moe, stage.dim, hidden)
        else:
            self.mlp = Mlp(stage.dim, hidden, v.drop_rate, v.mlp_fc2_bias)
        has_extra = v.extra_norm_interval > 0 and (index + 1) % v.extra_norm_interval == 0
        self.enorm = nn.LayerNorm(stage.dim) if has_extra else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, RoutingStats | None]:
        """x: (B, H, W, C). Returns the same shape, and the auxiliary loss and the routing of an MoE block, or Nones."""
        # Outside of what is recomputed: backward then does not run the position-bias MLP a second time.
        bias = self.attn.position_bias()
        mode = self.activation_checkpointing
        if not self.is_moe:
            return recompute(mode, self._forward, x, bias), None, None
        forward = partial(self._forward_moe, None if mode == "off" else SameRouting())
        # To the end, as the routing is compared after the last tensor that backward needs.
        return recompute(mode, forward, x, bias, early_stop=False)

    def _forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = self._attend(x, bias)
        x = self._add(x, self.norm2(self.mlp(x)) if self.post_norm else self.mlp(self.norm2(x)))
        return x if self.enorm is None else self.enorm(x)

    def _forward_moe(self, same: SameRouting | None, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, RoutingStats]:
        x = self._attend(x, bias)
        y, aux, stats = self.mlp(x, norm=self.norm2) if self.post_norm else self.mlp(self.norm2(x))
        if same is not None:
            same.check(stats.expert_TK)
        x = self._add(x, y)
        return (x if self.enorm is None else self.enorm(x)), aux, stats

    def _attend(self, x: Tensor, bias: Tensor) -> Tensor:
        if self.post_norm:
            return self._add(x, self.norm1(self.attn(x, bias, self.shift_size)))
        return self._add(x, self.attn(self.norm1(x), bias, self.shift_size))

    def _add(self, x: Tensor, branch: Tensor) -> Tensor:
        return residual(x, branch, self.drop_path, self.training)


class StageBlocks(nn.Module):
    """The blocks of one stage and the merging that ends it; only a holder of names, `Swin` runs them."""

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class Swin(nn.Module):
    """The hierarchical backbone with a linear head. Built initialised with `seed`, unless on the meta device."""

    def __init__(self, v: Variant, seed: int = 0, moe_mlp: MakeMoEMlp = MoEMlp) -> None:
        super().__init__()
        self.variant = v
        self.stages = stages(v)
        self.num_features = self.stages[-1].dim
        self.patch_embed = PatchEmbed(v.patch_size, v.in_chans, v.embed_dim, v.patch_norm)
        if v.ape:
            height, width = self.stages[0].resolution
            self.absolute_pos_embed = nn.Parameter(torch.empty(1, height * width, v.embed_dim))
        total = sum(v.depths)
        rates = iter([v.drop_path_rate * i / max(total - 1, 1) for i in range(total)])
        self.layers = nn.ModuleList()
        for stage in self.stages:
            blocks = [self._block(stage, i, next(rates), moe_mlp) for i in range(stage.depth)]
            last = stage is self.stages[-1]
            merging = None if last else PatchMerging(stage.dim, post_norm=v.post_norm)
            self.layers.append(StageBlocks(blocks, merging))
        self.norm = nn.LayerNorm(self.num_features)
        self.head = Linear(self.num_features, v.num_classes) if v.num_classes else nn.Identity()
        if not self.norm.weight.is_meta:
            self.init_weights(seed)

    def _block(self, stage: Stage, index: int, drop_path: float, moe_mlp: MakeMoEMlp) -> nn.Module:
        return Block(self.variant, stage, index, drop_path, moe_mlp)

    @property
    def is_moe(self) -> bool:
        """Whether any block is a mixture of experts, so that `forward` returns an auxiliary loss too."""
        return self.variant.moe is not None

    def forward(
        self, x: Tensor, *, stats: bool = False
    ) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, dict[str, RoutingStats]]:
        """Images (B, in_chans, H, W) to logits (B, num_classes).

        A model with experts returns (logits, aux), the second the weighted sum of its layers' auxiliary losses, 0-d and
        in fp32 at least; with `stats` a third value too, the routing of each such block by its name, such as
        `layers.2.blocks.1`. Raises UserError for `stats` of a dense model.
        """
        if stats and not self.is_moe:
            raise UserError(f"stats: a dense {self.variant.family} model routes nothing; call it without")
        outputs, aux, routing = self._encode(self.embed(x))
        logits = self.head(self.norm(outputs[-1]).mean((1, 2)))
        if not self.is_moe:
            return logits
        total = torch.stack(aux).sum()
        return (logits, total, routing) if stats else (logits, total)

    def forward_pooled(self, x: Tensor) -> Tensor:
        """Images to (B, C): mean of the normed tokens, what the head reads."""
        return self.norm(self._encode(self.embed(x))[0][-1]).mean((1, 2))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the normed last map (B, C, H / stride, W / stride), in channels-last memory."""
        return self.norm(self._encode(self.embed(x))[0][-1]).permute(0, 3, 1, 2)

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        """Images to the output of every stage before merging, un-normed, (B, C_i, H_i, W_i), for dense prediction."""
        return [y.permute(0, 3, 1, 2) for y in self._encode(self.embed(x))[0]]

    def embed(self, x: Tensor) -> Tensor:
        """Images to the patch tokens (B, H / patch, W / patch, embed_dim) that the first stage starts from."""
        expected = pair(self.variant.img_size)
        if tuple(x.shape[-2:]) != expected:
            raise UserError(
                f"input of {tuple(x.shape[-2:])} pixels for a model built for img_size {expected}: "
                f"resize the images, or create the model with img_size={tuple(x.shape[-2:])}"
            )
        return self.patch_embed(x)

    def _encode(self, x: Tensor) -> tuple[list[Tensor], list[Tensor], dict[str, RoutingStats]]:
        """Patch tokens to the output of every stage before merging, and auxiliary losses and routing of MoE blocks."""
        if self.variant.ape:
            x = x + self.absolute_pos_embed.view(1, *x.shape[1:])
        x = dropout(x, self.variant.drop_rate, self.training)
        outputs, losses, routing = [], [], {}
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, StageBlocks)
            for j, block in enumerate(layer.blocks):
                x, aux, stats = block(x)
                if stats is not None:
                    losses.append(aux)
                    routing[f"layers.{i}.blocks.{j}"] = stats
            outputs.append(x)
            if layer.downsample is not None:
                x = layer.downsample(x)
        return outputs, losses, routing

    def init_weights(self, seed: int = 0) -> None:
        """Initialise every parameter by the official rules (`models.init`) and rebuild the derived buffers."""
        init_parameters(self, seed)
        self.rebuild_buffers()

    def rebuild_buffers(self, device: torch.device | None = None) -> None:
        """Fill the derived buffers, which are never saved, where they are or on `device`.

        After `to_empty` they hold nothing of use; on the meta device, nothing at all.
        """
        for module in self.modules():
            if isinstance(module, WindowAttention):
                module.rebuild_buffers(device)

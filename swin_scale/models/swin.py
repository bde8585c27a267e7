"""Swin Transformer V1, V2 and MoE: one family that differs in norm placement, attention score, position bias and MLP.

    image -> PatchEmbed -> [Block x depth, PatchMerging] per stage -> norm -> mean over tokens -> head

Names and shapes of parameters are those of the official weights. Papers: Swin (Liu et al., 2021), SwinV2 (2022),
Tutel (Hwang et al., 2023) for Swin-MoE.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from swin_scale.errors import UserError
from swin_scale.models.attention import Position, Score, WindowAttention
from swin_scale.models.geometry import Stage, pair, stages
from swin_scale.models.init import init_parameters
from swin_scale.models.layers import (
    AddNorm,
    LayerNorm,
    Linear,
    Mlp,
    PatchEmbed,
    PatchMerging,
    PostNorm,
    drop_path_keep,
    dropout,
    recompute,
    residual,
)
from swin_scale.models.variants import Family, Variant
from swin_scale.moe.config import MoEConfig
from swin_scale.moe.layer import MoEMlp
from swin_scale.moe.stats import RoutingStats

MakeMoEMlp = Callable[[MoEConfig, int, int], nn.Module]
"""Options, dim and hidden width to the layer that takes an MLP's place: `moe.layer.MoEMlp`, its groups bound."""

_ATTENTION: dict[Family, tuple[Score, Position]] = {
    "swin": ("dot", "table"),
    "swinv2": ("cosine", "sigmoid_cpb"),
    "swin_moe": ("dot", "raw_cpb"),
    "swinv2_moe": ("cosine", "sigmoid_cpb"),
}


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
        norm = partial(PostNorm if self.post_norm else AddNorm, stage.dim, v.kernels, v.layer_norm)
        self.norm1 = norm() if self.post_norm else LayerNorm(stage.dim, v.layer_norm)
        self.attn = WindowAttention(
            stage.dim,
            stage.window_size,
            stage.heads,
            score=score,
            position=position,
            qkv_bias=v.qkv_bias,
            drop=v.drop_rate,
            attn_drop=v.attn_drop_rate,
            pretrained_window_size=stage.pretrained_window_size,
            kernels=v.kernels,
        )
        self.norm2 = norm()
        hidden = int(stage.dim * v.mlp_ratio)
        self.is_moe = v.moe is not None and index in stage.moe_blocks
        self.mlp: nn.Module
        if v.moe is not None and self.is_moe:
            self.mlp = moe_mlp(v.moe, stage.dim, hidden)
        else:
            self.mlp = Mlp(stage.dim, hidden, v.drop_rate, v.mlp_fc2_bias)
        has_extra = v.extra_norm_interval > 0 and (index + 1) % v.extra_norm_interval == 0
        self.enorm = LayerNorm(stage.dim, v.layer_norm) if has_extra else None

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
        x, normed = self._attend(x, bias)
        branch = self.mlp(normed)
        x = self.norm2(branch, x, self._keep(branch)) if self.post_norm else self._add(x, branch)
        return x if self.enorm is None else self.enorm(x)

    def _forward_moe(self, same: SameRouting | None, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, RoutingStats]:
        x, normed = self._attend(x, bias)
        branch, aux, stats = self.mlp(normed, norm=self.norm2) if self.post_norm else self.mlp(normed)
        if same is not None:
            same.check(stats.expert_TK)
        x = self._add(x, branch)
        return (x if self.enorm is None else self.enorm(x)), aux, stats

    def _attend(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The attention half: x with its branch, and what the MLP reads, which is the same under V2."""
        if self.post_norm:
            branch = self.attn(x, bias, self.shift_size)
            x = self.norm1(branch, x, self._keep(branch))
            return x, x
        branch = self.attn(self.norm1(x), bias, self.shift_size)
        return self.norm2(x, branch, self._keep(branch))

    def _add(self, x: Tensor, branch: Tensor) -> Tensor:
        return residual(x, branch, self.drop_path, self.training)

    def _keep(self, branch: Tensor) -> Tensor | None:
        return drop_path_keep(branch, self.drop_path, self.training)


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
        self.patch_embed = PatchEmbed(v.patch_size, v.in_chans, v.embed_dim, v.patch_norm, v.layer_norm)
        if v.ape:
            height, width = self.stages[0].resolution
            self.absolute_pos_embed = nn.Parameter(torch.empty(1, height * width, v.embed_dim))
        total = sum(v.depths)
        rates = iter([v.drop_path_rate * i / max(total - 1, 1) for i in range(total)])
        self.layers = nn.ModuleList()
        for stage in self.stages:
            blocks = [self._block(stage, i, next(rates), moe_mlp) for i in range(stage.depth)]
            last = stage is self.stages[-1]
            merging = None if last else PatchMerging(stage.dim, v.post_norm, v.kernels, v.layer_norm)
            self.layers.append(StageBlocks(blocks, merging))
        self.norm = LayerNorm(self.num_features, v.layer_norm)
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
        outputs, aux, routing = self.encode(self.embed(x))
        logits = self.head(self.norm(outputs[-1]).mean((1, 2)))
        if not self.is_moe:
            return logits
        total = torch.stack(aux).sum()
        return (logits, total, routing) if stats else (logits, total)

    def forward_pooled(self, x: Tensor) -> Tensor:
        """Images to (B, C): mean of the normed tokens, what the head reads."""
        return self.norm(self.encode(self.embed(x))[0][-1]).mean((1, 2))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the normed last map (B, C, H / stride, W / stride), in channels-last memory."""
        return self.norm(self.encode(self.embed(x))[0][-1]).permute(0, 3, 1, 2)

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        """Images to the output of every stage before merging, un-normed, (B, C_i, H_i, W_i), for dense prediction."""
        return [y.permute(0, 3, 1, 2) for y in self.encode(self.embed(x))[0]]

    def embed(self, x: Tensor) -> Tensor:
        """Images to the patch tokens (B, H / patch, W / patch, embed_dim) that the first stage starts from."""
        expected = pair(self.variant.img_size)
        if tuple(x.shape[-2:]) != expected:
            raise UserError(
                f"input of {tuple(x.shape[-2:])} pixels for a model built for img_size {expected}: "
                f"resize the images, or create the model with img_size={tuple(x.shape[-2:])}"
            )
        return self.patch_embed(x)

    def encode(self, x: Tensor) -> tuple[list[Tensor], list[Tensor], dict[str, RoutingStats]]:
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

    @contextlib.contextmanager
    def frozen_position_bias(self) -> Iterator[None]:
        """Inside, passes without gradients compute each block's position bias once. Parameters must not change there.

        For inference on a GPU; on a CPU little is gained, see `WindowAttention.position_bias`.
        """
        attentions = [module for module in self.modules() if isinstance(module, WindowAttention)]
        for attention in attentions:
            attention.freeze_bias(True)
        try:
            yield
        finally:
            for attention in attentions:
                attention.freeze_bias(False)

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

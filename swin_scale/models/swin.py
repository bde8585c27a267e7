"""Swin Transformer V1 and V2: one family that differs in norm placement, attention score and position bias.

    image -> PatchEmbed -> [Block x depth, PatchMerging] per stage -> norm -> mean over tokens -> head

Names and shapes of parameters are those of the official weights. Papers: Swin (Liu et al., 2021), SwinV2 (2022).
"""

import math

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
from swin_scale.models.variants import Pair, Variant

MAX_LOGIT_SCALE = math.log(100.0)
CPB_HIDDEN = 512


class WindowAttention(nn.Module):
    """Multi-head self-attention in windows of (h, w) tokens; `cosine` is SwinV2's score and position bias."""

    relative_position_index: Tensor

    def __init__(
        self,
        dim: int,
        window_size: Pair,
        heads: int,
        *,
        cosine: bool,
        qkv_bias: bool = True,
        drop: float = 0.0,
        pretrained_window_size: int = 0,
    ) -> None:
        super().__init__()
        self.window_size, self.heads, self.cosine, self.drop = window_size, heads, cosine, drop
        self.pretrained_window_size = pretrained_window_size
        self.head_dim = dim // heads
        if cosine:
            self.logit_scale = nn.Parameter(torch.empty(heads, 1, 1))
            self.cpb_mlp = nn.Sequential(Linear(2, CPB_HIDDEN), nn.ReLU(), Linear(CPB_HIDDEN, heads, bias=False))
            self.q_bias = nn.Parameter(torch.empty(dim)) if qkv_bias else None
            self.v_bias = nn.Parameter(torch.empty(dim)) if qkv_bias else None
        else:
            offsets = (2 * window_size[0] - 1) * (2 * window_size[1] - 1)
            self.relative_position_bias_table = nn.Parameter(torch.empty(offsets, heads))
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias and not cosine)
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
        sources = list(self.cpb_mlp.parameters()) if self.cosine else [self.relative_position_bias_table]
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
        if self.cosine:
            index = self.relative_position_index
            coords = relative_coords_table(self.window_size, self.pretrained_window_size, index.device)
            table = self.cpb_mlp(coords.flatten(0, 2).to(compute_dtype(self.logit_scale)))
            # The sigmoid acts on each entry of the table, so it goes before the much larger gather.
            table = 16 * torch.sigmoid(table)
        else:
            table = self.relative_position_bias_table
            table = table.to(compute_dtype(table))
        return table.t().index_select(1, self.relative_position_index.flatten()).view(-1, N, N)

    def _qkv_bias(self) -> Tensor | None:
        """(3C,) for V2, whose keys have no bias; None without `qkv_bias`."""
        if self.q_bias is None or self.v_bias is None:
            return None
        return torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))

    def forward(self, x: Tensor, bias: Tensor, shift_size: Pair = (0, 0)) -> Tensor:
        """x: (B, H, W, C), bias: `position_bias()`. Returns (B, H, W, C)."""
        if self.cosine:
            scale = self.logit_scale.to(bias.dtype).clamp(max=MAX_LOGIT_SCALE).exp()
            qkv = self.qkv(x, self._qkv_bias())
        else:
            scale = bias.new_full((self.heads, 1, 1), self.head_dim**-0.5)
            qkv = self.qkv(x)
        x = window_attention(qkv, scale, bias, self.window_size, shift_size, self.cosine)
        return dropout(self.proj(x), self.drop, self.training)


def _same(kept: Tensor, now: Tensor) -> bool:
    return kept.dtype == now.dtype and kept.device == now.device and torch.equal(kept, now)


class Block(nn.Module):
    """Attention and MLP with residuals, normed before each branch (V1) or after it (V2, section 3.1)."""

    def __init__(self, v: Variant, stage: Stage, index: int, drop_path: float) -> None:
        super().__init__()
        self.post_norm = v.family == "swinv2"
        self.shift_size = stage.shift_size if index % 2 else (0, 0)
        self.drop_path = drop_path
        self.activation_checkpointing = v.activation_checkpointing
        norm = PostNorm if self.post_norm else nn.LayerNorm
        self.norm1 = norm(stage.dim)
        self.attn = WindowAttention(
            stage.dim,
            stage.window_size,
            stage.heads,
            cosine=v.family == "swinv2",
            qkv_bias=v.qkv_bias,
            drop=v.drop_rate,
            pretrained_window_size=stage.pretrained_window_size,
        )
        self.norm2 = norm(stage.dim)
        self.mlp = Mlp(stage.dim, int(stage.dim * v.mlp_ratio), v.drop_rate)
        has_extra = v.extra_norm_interval > 0 and (index + 1) % v.extra_norm_interval == 0
        self.enorm = nn.LayerNorm(stage.dim) if has_extra else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x: (B, H, W, C). Returns the same shape, and what the MLP returned beside it (None unless it is an MoE)."""
        # Outside of what is recomputed: backward then does not run the position-bias MLP a second time.
        return recompute(self.activation_checkpointing, self._forward, x, self.attn.position_bias())

    def _forward(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.post_norm:
            x = self._add(x, self.norm1(self.attn(x, bias, self.shift_size)))
            y, aux = self._feed_forward(x)
            x = self._add(x, self.norm2(y))
        else:
            x = self._add(x, self.attn(self.norm1(x), bias, self.shift_size))
            y, aux = self._feed_forward(self.norm2(x))
            x = self._add(x, y)
        return (x if self.enorm is None else self.enorm(x)), aux

    def _feed_forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        y = self.mlp(x)
        return y if isinstance(y, tuple) else (y, None)

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

    block: type[nn.Module] = Block

    def __init__(self, v: Variant, seed: int = 0) -> None:
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
            blocks = [self.block(v, stage, i, next(rates)) for i in range(stage.depth)]
            last = stage is self.stages[-1]
            merging = None if last else PatchMerging(stage.dim, post_norm=v.family == "swinv2")
            self.layers.append(StageBlocks(blocks, merging))
        self.norm = nn.LayerNorm(self.num_features)
        self.head = Linear(self.num_features, v.num_classes) if v.num_classes else nn.Identity()
        if not self.norm.weight.is_meta:
            self.init_weights(seed)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.head(self.forward_pooled(x))

    def forward_pooled(self, x: Tensor) -> Tensor:
        """Images to (B, C): mean of the normed tokens, what the head reads."""
        return self.norm(self._encode(self.embed(x))[-1]).mean((1, 2))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the normed last map (B, C, H / stride, W / stride), in channels-last memory."""
        return self.norm(self._encode(self.embed(x))[-1]).permute(0, 3, 1, 2)

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        """Images to the output of every stage before merging, un-normed, (B, C_i, H_i, W_i), for dense prediction."""
        return [y.permute(0, 3, 1, 2) for y in self._encode(self.embed(x))]

    def embed(self, x: Tensor) -> Tensor:
        """Images to the patch tokens (B, H / patch, W / patch, embed_dim) that the first stage starts from."""
        expected = pair(self.variant.img_size)
        if tuple(x.shape[-2:]) != expected:
            raise UserError(
                f"input of {tuple(x.shape[-2:])} pixels for a model built for img_size {expected}: "
                f"resize the images, or create the model with img_size={tuple(x.shape[-2:])}"
            )
        return self.patch_embed(x)

    def _encode(self, x: Tensor) -> list[Tensor]:
        """Patch tokens to the output of every stage, before merging."""
        if self.variant.ape:
            x = x + self.absolute_pos_embed.view(1, *x.shape[1:])
        x = dropout(x, self.variant.drop_rate, self.training)
        outputs = []
        for layer in self.layers:
            assert isinstance(layer, StageBlocks)
            for block in layer.blocks:
                x, _ = block(x)
            outputs.append(x)
            if layer.downsample is not None:
                x = layer.downsample(x)
        return outputs

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

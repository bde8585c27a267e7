"""Window attention as a layer: parameters, score and position bias. Its arithmetic is `kernels.window_attention`."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from swin_scale.kernels import Mode, window_attention
from swin_scale.models.layers import (
    Linear,
    compute_dtype,
    dropout,
    relative_coords_table,
    relative_position_index,
    spread_offsets,
)
from swin_scale.models.variants import Pair

Score = Literal["dot", "cosine"]
Position = Literal["table", "sigmoid_cpb", "raw_cpb"]

MAX_LOGIT_SCALE = math.log(100.0)
CPB_HIDDEN = 512


class WindowAttention(nn.Module):
    """Multi-head self-attention in windows of (h, w) tokens.

    `score`: the `dot` product scaled by head_dim^-0.5, or SwinV2's `cosine` with a learnt scale and no bias of keys.
    `position`: a `table` of biases, or an MLP of log-spaced offsets (SwinV2, section 3.3), bounded by 16 * sigmoid or
    raw as in Swin-MoE.
    """

    relative_position_index: Tensor
    relative_coords_table: Tensor

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
        attn_drop: float = 0.0,
        pretrained_window_size: int = 0,
        kernels: Mode = "auto",
    ) -> None:
        super().__init__()
        self.window_size, self.heads = window_size, heads
        self.drop, self.attn_drop = drop, attn_drop
        self.score, self.position, self.kernels = score, position, kernels
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
        if position != "table":
            table = relative_coords_table(window_size, pretrained_window_size)
            self.register_buffer("relative_coords_table", table, persistent=False)
        self.frozen_bias = False
        self._frozen_bias: Tensor | None = None
        self._cached_bias: tuple[list[Tensor], Tensor] | None = None

    def rebuild_buffers(self, device: torch.device | None = None) -> None:
        device = self.relative_position_index.device if device is None else device
        self.relative_position_index = relative_position_index(self.window_size, device)
        if self.position != "table":
            self.relative_coords_table = relative_coords_table(self.window_size, self.pretrained_window_size, device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "WindowAttention":
        """Parameters may go to half precision; the offsets they are applied to stay in fp32."""
        super()._apply(fn, recurse)
        if self.position != "table" and self.relative_coords_table.dtype.itemsize < 4:
            self.rebuild_buffers()
        return self

    def freeze_bias(self, frozen: bool) -> None:
        """Without gradients, take the position bias of the first call from now on for all; or no longer."""
        self.frozen_bias, self._frozen_bias = frozen, None

    def position_bias(self) -> Tensor:
        """(heads, N, N), fp32 or wider.

        On a CPU, without gradients, it is kept from call to call together with copies of the parameters it was made
        from, and used again only while they are equal in value: no way of changing parameters can leave it stale. A GPU
        would have to be waited for to know; there it is computed every time, unless `freeze_bias` promised.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._cached_bias = None
            return self._position_bias()
        is_table = self.position == "table"
        sources = [self.relative_position_bias_table] if is_table else list(self.cpb_mlp.parameters())
        # Parameters that ZeRO-3 has partitioned away are empty here and prove nothing.
        if any(p.numel() == 0 for p in sources):
            self._cached_bias = None
            return self._position_bias()
        if self.frozen_bias:
            if self._frozen_bias is None:
                self._frozen_bias = self._position_bias()
            return self._frozen_bias
        if sources[0].device.type != "cpu":
            return self._position_bias()
        if self._cached_bias is not None and all(map(_same, self._cached_bias[0], sources)):
            return self._cached_bias[1]
        bias = self._position_bias()
        self._cached_bias = [p.detach().clone() for p in sources], bias
        return bias

    def _position_bias(self) -> Tensor:
        table: Tensor
        if self.position == "table":
            table = self.relative_position_bias_table
            table = table.to(compute_dtype(table))
        else:
            coords = self.relative_coords_table.flatten(0, 2)
            table = self.cpb_mlp(coords.to(compute_dtype(self.proj.weight)))
        if self.position == "sigmoid_cpb":
            # The sigmoid acts on each entry of the table, so it goes before the much larger gather.
            table = 16 * torch.sigmoid(table)
        return spread_offsets(table, self.relative_position_index, self.window_size)

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
        rate, seed = self._attention_dropout(x)
        cosine = self.score == "cosine"
        x = window_attention(
            qkv, scale, bias, self.window_size, shift_size, cosine, dropout=rate, seed=seed, kernels=self.kernels
        )
        return dropout(self.proj(x), self.drop, self.training)

    def _attention_dropout(self, x: Tensor) -> tuple[float, Tensor | None]:
        """Rate and seed; the seed is drawn from the default generator of x's device, for which nothing waits."""
        if not (self.training and self.attn_drop):
            return 0.0, None
        return self.attn_drop, torch.randint(2**63 - 1, (), device=x.device)


def _same(kept: Tensor, now: Tensor) -> bool:
    return kept.dtype == now.dtype and kept.device == now.device and torch.equal(kept, now)

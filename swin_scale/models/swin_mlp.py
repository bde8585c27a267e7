"""Swin-MLP: the backbone of `swin.py` with a grouped linear layer over the tokens of a window in place of attention.

From the Swin repository (Liu et al., 2021). Windows shift by zero padding instead of rolling, so no mask is needed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_scale.kernels import window_partition, window_reverse
from swin_scale.models.geometry import Stage
from swin_scale.models.layers import AddNorm, LayerNorm, Mlp, drop_path_keep, recompute, residual
from swin_scale.models.swin import MakeMoEMlp, Swin
from swin_scale.models.variants import Variant


class SpatialMlp(nn.Conv1d):
    """For each head one (N x N) linear map over the tokens of a window; stored as the official grouped Conv1d."""

    def __init__(self, heads: int, tokens: int) -> None:
        super().__init__(heads * tokens, heads * tokens, kernel_size=1, groups=heads)
        self.heads, self.tokens = heads, tokens

    def reset_parameters(self) -> None:
        """Nothing; `init_weights` does it."""

    def forward(self, windows: Tensor) -> Tensor:
        """(B * nW, N, C) to the same, channels grouped by head."""
        count, N, C = windows.shape
        # One product per head over all windows, (N, N) by (N, B * nW * d): a convolution would see a batch of slivers.
        x = windows.view(count, N, self.heads, -1).permute(2, 1, 0, 3).reshape(self.heads, N, -1)
        assert self.bias is not None
        y = torch.baddbmm(self.bias.view(self.heads, N, 1), self.weight.view(self.heads, N, N), x).view(
            self.heads, N, count, C // self.heads
        )
        return y.permute(2, 1, 0, 3).reshape(count, N, C)


class SwinMlpBlock(nn.Module):
    """Pre-norm block: spatial MLP over each window, then the channel MLP, both residual."""

    def __init__(self, v: Variant, stage: Stage, index: int, drop_path: float) -> None:
        super().__init__()
        self.window_size = stage.window_size
        self.shift_size = stage.shift_size if index % 2 else (0, 0)
        self.drop_path = drop_path
        self.activation_checkpointing = v.activation_checkpointing
        self.norm1 = LayerNorm(stage.dim, v.layer_norm)
        self.spatial_mlp = SpatialMlp(stage.heads, stage.window_size[0] * stage.window_size[1])
        self.norm2 = AddNorm(stage.dim, v.kernels, v.layer_norm)
        self.mlp = Mlp(stage.dim, int(stage.dim * v.mlp_ratio), v.drop_rate, v.mlp_fc2_bias)

    def forward(self, x: Tensor) -> tuple[Tensor, None, None]:
        """x: (B, H, W, C). Returns the same shape, and two Nones where `swin.Block` may tell of experts."""
        return recompute(self.activation_checkpointing, self._forward, x), None, None

    def _forward(self, x: Tensor) -> Tensor:
        branch = self._mix(self.norm1(x))
        x, normed = self.norm2(x, branch, drop_path_keep(branch, self.drop_path, self.training))
        return residual(x, self.mlp(normed), self.drop_path, self.training)

    def _mix(self, x: Tensor) -> Tensor:
        """Pads each shifted axis by one window, mixes tokens inside windows, and crops the padding again."""
        _, H, W, _ = x.shape
        top, left = (w - s if s else 0 for w, s in zip(self.window_size, self.shift_size, strict=True))
        if top or left:
            x = F.pad(x, (0, 0, left, self.shift_size[1], top, self.shift_size[0]))
        padded = (x.shape[1], x.shape[2])
        windows = self.spatial_mlp(window_partition(x, self.window_size))
        x = window_reverse(windows, self.window_size, (0, 0), padded)
        return x[:, top : top + H, left : left + W]


class SwinMlp(Swin):
    """`Swin` of such blocks."""

    def _block(self, stage: Stage, index: int, drop_path: float, moe_mlp: MakeMoEMlp) -> SwinMlpBlock:
        return SwinMlpBlock(self.variant, stage, index, drop_path)

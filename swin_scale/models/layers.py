"""Parts that V1, V2 and Swin-MLP share. Feature maps are (B, H, W, C) throughout, as the matrix products want them."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from swin_scale import kernels as ops
from swin_scale.kernels import LayerNormBy, Mode
from swin_scale.models.variants import Pair

T = TypeVar("T")

MLP_PIECE = 1 << 21
"""Hidden values of an MLP computed at once on a CPU: 8 MiB in fp32."""


class Linear(nn.Linear):
    """A Linear that leaves its parameters to `init_weights`, computes in the input's dtype, and may borrow a bias."""

    def reset_parameters(self) -> None:
        """Nothing: drawing weights twice would double the time to build a model of billions."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: (..., in). `bias`: (out,), used instead of the layer's own (SwinV2 keeps q and v biases elsewhere)."""
        bias = self.bias if bias is None else bias
        return F.linear(x, self.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class Mlp(nn.Module):
    """(..., dim) to (..., dim): linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden: int, drop: float, fc2_bias: bool = True) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim, bias=fc2_bias)
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.numel() // x.shape[-1] * self.fc1.out_features <= MLP_PIECE:
            return self._forward(x)
        # The hidden map is the largest tensor of a pass. In pieces it stays in cache, and below the 32 MiB from which
        # malloc maps fresh pages on every call: in the first stage of SwinV2-T at batch 8, 1.8x the speed forward and
        # 1.3x forward and backward.
        pieces = x.flatten(0, -2).split(max(1, MLP_PIECE // self.fc1.out_features))
        return torch.cat([self._forward(piece) for piece in pieces]).view(x.shape)

    def _forward(self, x: Tensor) -> Tensor:
        x = dropout(F.gelu(self.fc1(x)), self.drop, self.training)
        return dropout(self.fc2(x), self.drop, self.training)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis: torch's or NVIDIA Apex's, as `by` says."""

    def __init__(self, dim: int, by: LayerNormBy = "torch") -> None:
        super().__init__(dim)
        self.by = by

    def forward(self, input: Tensor) -> Tensor:
        return ops.layer_norm(input, self.weight, self.bias, self.eps, by=self.by)


class PostNorm(LayerNorm):
    """Norm at the end of a residual branch (SwinV2, section 3.1). Starts at zero, so a block starts as the identity."""

    def __init__(self, dim: int, kernels: Mode = "auto", by: LayerNormBy = "torch") -> None:
        super().__init__(dim, by)
        self.kernels = kernels

    def forward(self, input: Tensor, x: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """`input`: the branch. Returns it normed, or with `x` given x + keep · that; keep: `drop_path_keep`."""
        if x is None:
            return super().forward(input)
        return ops.residual_norm(x, input, self.weight, self.bias, keep, self.eps, kernels=self.kernels, by=self.by)


class AddNorm(LayerNorm):
    """Norm at the start of a residual branch, together with the sum before it that it reads (Swin V1)."""

    def __init__(self, dim: int, kernels: Mode = "auto", by: LayerNormBy = "torch") -> None:
        super().__init__(dim, by)
        self.kernels = kernels

    def forward(self, x: Tensor, branch: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(total, normed total) with total = x + keep · branch; keep: `drop_path_keep`."""
        return ops.add_norm(x, branch, self.weight, self.bias, keep, self.eps, kernels=self.kernels, by=self.by)


class PatchProjection(nn.Conv2d):
    """The convolution of the patch embedding, whose parameters are left to `init_weights`."""

    def reset_parameters(self) -> None:
        """Nothing; see `Linear`."""


class PatchEmbed(nn.Module):
    """Images (B, C, H, W) to tokens (B, H / patch, W / patch, dim)."""

    def __init__(self, patch_size: int, in_chans: int, dim: int, norm: bool, by: LayerNormBy = "torch") -> None:
        super().__init__()
        self.proj = PatchProjection(in_chans, dim, patch_size, patch_size)
        self.norm = LayerNorm(dim, by) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x).permute(0, 2, 3, 1).contiguous()
        return x if self.norm is None else self.norm(x)


class MergeNorm(LayerNorm):
    """(B, H, W, C) to (B, H/2, W/2, 4C): each 2 x 2 neighbourhood into one token, normed."""

    def __init__(self, dim: int, kernels: Mode = "auto", by: LayerNormBy = "torch") -> None:
        super().__init__(4 * dim, by)
        self.kernels = kernels

    def forward(self, input: Tensor) -> Tensor:
        return ops.patch_merge(input, self.weight, self.bias, self.eps, kernels=self.kernels, by=self.by)


class PatchMerging(nn.Module):
    """(B, H, W, C) to (B, H/2, W/2, 2C): each 2 x 2 neighbourhood into one token, normed before (V1) or after (V2)."""

    def __init__(self, dim: int, post_norm: bool, kernels: Mode = "auto", by: LayerNormBy = "torch") -> None:
        super().__init__()
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)
        self.norm = LayerNorm(2 * dim, by) if post_norm else MergeNorm(dim, kernels, by)
        self.post_norm, self.kernels = post_norm, kernels

    def forward(self, x: Tensor) -> Tensor:
        if self.post_norm:
            return self.norm(self.reduction(ops.patch_merge(x, kernels=self.kernels)))
        return self.reduction(self.norm(x))


def dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    return F.dropout(x, rate) if training and rate else x


def residual(x: Tensor, branch: Tensor, drop_path: float, training: bool) -> Tensor:
    """x + branch; in training the branch of each sample is dropped with probability `drop_path`, or scaled up."""
    return ops.residual(x, branch, drop_path_keep(branch, drop_path, training))


def drop_path_keep(branch: Tensor, drop_path: float, training: bool) -> Tensor | None:
    """(B,) fp32 or wider: 0 where a sample's branch is dropped, else 1 / (1 - drop_path); None where none may be.

    Stochastic depth (Huang et al., 2016), drawn from torch's default generator.
    """
    if not (training and drop_path):
        return None
    keep = 1 - drop_path
    return branch.new_empty(len(branch)).bernoulli_(keep).to(compute_dtype(branch)).div_(keep)


def recompute(mode: str, function: Callable[..., T], *args: Tensor, early_stop: bool = True) -> T:
    """function(*args) under activation checkpointing `mode`: 'off', 'block', or 'selective' (attention is kept).

    Random numbers are drawn again as they were. With `early_stop` the second run ends at the last tensor that backward
    needs; without, it runs to the end of `function`.
    """
    if mode == "off" or not torch.is_grad_enabled():
        return function(*args)
    if mode == "block":
        return checkpoint(function, *args, use_reentrant=False, early_stop=early_stop)
    contexts = partial(create_selective_checkpoint_contexts, _keep_attention)
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts, early_stop=early_stop)


def _keep_attention(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op.name() in ops.ATTENTION_OPS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def compute_dtype(x: Tensor) -> torch.dtype:
    """fp32 for half precision, the tensor's own dtype otherwise: for logit scale, norms, softmax and position bias."""
    return torch.promote_types(x.dtype, torch.float32)


def relative_position_index(window_size: Pair, device: torch.device | None = None) -> Tensor:
    """(N, N) int64: row of the table of relative offsets, ((2h-1) * (2w-1) rows), for each pair of tokens."""
    h, w = window_size
    # On the CPU wherever it is wanted: arithmetic on the meta device imports torch's compiler, seconds in each process.
    rows, cols = torch.meshgrid(torch.arange(h, device="cpu"), torch.arange(w, device="cpu"), indexing="ij")
    rows, cols = rows.flatten(), cols.flatten()
    index = (rows[:, None] - rows + h - 1) * (2 * w - 1) + cols[:, None] - cols + w - 1
    return index.to(torch.get_default_device() if device is None else device)


def spread_offsets(table: Tensor, index: Tensor, window_size: Pair) -> Tensor:
    """((2h-1) * (2w-1), heads) to (heads, N, N), a value for each pair of tokens; index: `relative_position_index`."""
    if table.is_cuda and torch.is_grad_enabled():
        return _SpreadOffsets.apply(table, index, window_size)
    N = len(index)
    return table.t().index_select(1, index.flatten()).view(-1, N, N)


class _SpreadOffsets(Function):
    """With a gradient summed in a fixed order, where that of index_select adds N² values atomically, in any order."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, window_size: Pair) -> Tensor:
        ctx.window_size = window_size
        return table.t().index_select(1, index.flatten()).view(-1, *index.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        h, w = ctx.window_size
        # (head, row, column, other row, other column): pairs of rows first, then, beside their offset, of columns.
        rows = _sum_diagonals(grad.view(-1, h, w, h, w).permute(0, 2, 4, 1, 3))
        return _sum_diagonals(rows.permute(0, 3, 1, 2)).flatten(1).t(), None, None


def _sum_diagonals(x: Tensor) -> Tensor:
    """(..., n, n) to (..., 2n-1): entry i - j + n - 1 is the sum over all such i, j.

    Backwards and padded to 2n, rows cut at 2n-1 instead stand one step further to the right each.
    """
    n = x.shape[-1]
    sheared = F.pad(x.flip(-1), (0, n)).flatten(-2)[..., : n * (2 * n - 1)]
    return sheared.unflatten(-1, (n, 2 * n - 1)).sum(-2)


def relative_coords_table(window_size: Pair, pretrained: int = 0, device: torch.device | None = None) -> Tensor:
    """(1, 2h-1, 2w-1, 2) fp32: log-spaced offsets in units of the (pretrained) window (SwinV2, equations 3 and 4).

    A window of one token has the single offset 0, so its unit, 1 - 1, is taken as 1.
    """
    axes = []
    for size in window_size:
        # On the CPU, as above.
        offset = torch.arange(1 - size, size, dtype=torch.float32, device="cpu")
        scaled = offset / max((pretrained or size) - 1, 1) * 8
        axes.append(scaled.sign() * torch.log2(scaled.abs() + 1.0) / 3.0)
    table = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)[None]
    return table.to(torch.get_default_device() if device is None else device)

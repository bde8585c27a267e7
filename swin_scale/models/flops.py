"""Floating-point operations of a forward pass, counted as the published tables do. No torch here."""

from dataclasses import replace

from swin_scale.models.geometry import Stage, stages
from swin_scale.models.variants import Pair, Variant


def flops(variant: Variant, img_size: int | Pair | None = None) -> int:
    """Multiply-adds (one each) of one image, the "FLOPs" of the Swin papers; 1e9 of them are a table's GFLOPs.

    Counted: patch embedding, linear layers, both attention products, norms, head. Not counted, as in the published
    numbers: softmax, position bias, GELU, the gate of a mixture of experts. A mixture counts as top_k * capacity_factor
    dense MLPs, the published convention, which pads experts to their capacity; without a limit as top_k of them.
    """
    v = variant if img_size is None else replace(variant, img_size=img_size)
    all_stages = stages(v)
    tokens = all_stages[0].resolution[0] * all_stages[0].resolution[1]
    total: float = tokens * v.embed_dim * (v.in_chans * v.patch_size**2 + v.patch_norm)
    for i, stage in enumerate(all_stages):
        total += sum(_block(v, stage, j) for j in range(stage.depth))
        if i < len(all_stages) - 1:
            total += _merging(v, stage)
    last = all_stages[-1].dim
    # The pooling term of the published count: tokens halved once per stage, the last one included.
    return int(total + last * (tokens >> len(all_stages)) + last * v.num_classes)


def _block(v: Variant, stage: Stage, index: int) -> float:
    (H, W), (wh, ww), C = stage.resolution, stage.window_size, stage.dim
    tokens, N = H * W, wh * ww
    mlp = 2 * tokens * C * C * v.mlp_ratio
    if v.moe and index in stage.moe_blocks:
        mlp *= v.moe.top_k * (abs(v.moe.capacity_factor) or 1)
    norms_and_mlp = 2 * C * tokens + mlp
    if v.family == "swin_mlp":
        # Shifting pads each shifted axis by one window.
        rows = H // wh + (index % 2 and stage.shift_size[0] > 0)
        cols = W // ww + (index % 2 and stage.shift_size[1] > 0)
        return norms_and_mlp + rows * cols * C * N * N
    return norms_and_mlp + tokens // N * (4 * N * C * C + 2 * N * N * C)


def _merging(v: Variant, stage: Stage) -> int:
    tokens, C = stage.resolution[0] * stage.resolution[1], stage.dim
    norm = tokens * C // 2 if v.post_norm else tokens * C
    return norm + tokens // 4 * 8 * C * C

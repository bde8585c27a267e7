"""Shapes of a variant, stage by stage: what the modules are built from, and where impossible sizes are refused.

No torch here.
"""

from dataclasses import dataclass

from swin_scale.errors import UserError
from swin_scale.models.variants import Pair, Variant


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: `depth` blocks on a map of `resolution` tokens (height, width)."""

    dim: int
    depth: int
    heads: int
    resolution: Pair
    window_size: Pair
    shift_size: Pair
    """Of the odd blocks; even ones do not shift."""
    pretrained_window_size: int
    moe_blocks: tuple[int, ...]
    """Indices of the blocks whose MLP is a mixture of experts."""


def pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def stages(v: Variant) -> list[Stage]:
    """The stages of `v`. Raises UserError, naming valid values near by, when its sizes do not fit together."""
    _check(v)
    resolution = _tokens(v)
    pretrained = v.pretrained_window_sizes or (0,) * len(v.depths)
    moe_blocks = v.moe_blocks if v.moe else ((),) * len(v.depths)
    result = []
    for i, (depth, heads) in enumerate(zip(v.depths, v.num_heads, strict=True)):
        hw = (resolution[0] >> i, resolution[1] >> i)
        # A window as large as the map covers it: no shift ("<=", not "<"), and never larger than the map.
        (window_h, shift_h), (window_w, shift_w) = (
            (size, 0) if size <= window else (window, window // 2)
            for window, size in zip(pair(v.window_size), hw, strict=True)
        )
        result.append(
            Stage(
                dim=v.embed_dim << i,
                depth=depth,
                heads=heads,
                resolution=hw,
                window_size=(window_h, window_w),
                shift_size=(shift_h, shift_w),
                pretrained_window_size=pretrained[i],
                moe_blocks=moe_blocks[i],
            )
        )
    return result


def _tokens(v: Variant) -> Pair:
    height, width = pair(v.img_size)
    return height // v.patch_size, width // v.patch_size


def _check(v: Variant) -> None:
    def refuse(key: str, value: object, why: str) -> None:
        raise UserError(f"model.{key}: {value} {why}")

    count = len(v.depths)
    if not count or min(v.depths) < 1:
        refuse("depths", v.depths, "is not one positive count for each stage")
    if len(v.num_heads) != count:
        refuse("num_heads", v.num_heads, f"has {len(v.num_heads)} entries for {count} stages; give one for each")
    if v.pretrained_window_sizes and len(v.pretrained_window_sizes) != count:
        refuse("pretrained_window_sizes", v.pretrained_window_sizes, f"needs {count} entries, one a stage, or ()")
    for i, heads in enumerate(v.num_heads):
        if heads < 1 or (v.embed_dim << i) % heads:
            refuse("num_heads", v.num_heads, f"does not divide the {v.embed_dim << i} channels of stage {i}")
    if min(pair(v.window_size)) < 1:
        refuse("window_size", v.window_size, "must be at least 1")
    if not 0 <= v.drop_path_rate < 1:
        refuse("drop_path_rate", v.drop_path_rate, "must be in [0, 1)")
    if not 0 <= v.drop_rate < 1:
        refuse("drop_rate", v.drop_rate, "must be in [0, 1)")
    if not 0 <= v.attn_drop_rate < 1:
        refuse("attn_drop_rate", v.attn_drop_rate, "must be in [0, 1)")
    if v.attn_drop_rate and v.family == "swin_mlp":
        refuse("attn_drop_rate", v.attn_drop_rate, "must be 0 for swin_mlp, which has no attention")
    if v.num_classes < 0:
        refuse("num_classes", v.num_classes, "must be 0 (no head) or more")
    if v.activation_checkpointing not in ("off", "block", "selective"):
        refuse("activation_checkpointing", repr(v.activation_checkpointing), "must be off, block or selective")
    if v.kernels not in ("auto", "triton", "reference"):
        refuse("kernels", repr(v.kernels), "must be auto, triton or reference")
    if v.layer_norm not in ("torch", "apex"):
        refuse("layer_norm", repr(v.layer_norm), "must be torch or apex")
    if v.init_std <= 0:
        refuse("init_std", v.init_std, "must be positive")
    if v.moe:
        _check_moe(v)
    for axis, size, window in zip(("height", "width"), pair(v.img_size), pair(v.window_size), strict=True):
        if not _fits(size, window, v):
            near = ", ".join(map(str, valid_sizes(size, window, v)))
            refuse("img_size", v.img_size, f"does not fit window_size {window} in {axis}; valid near {size}: {near}")


def _check_moe(v: Variant) -> None:
    if v.family not in ("swin_moe", "swinv2_moe"):
        raise UserError(f"model.moe: blocks of {v.family} have no experts; choose a name of swin_moe or swinv2_moe")
    shown = [list(blocks) for blocks in v.moe_blocks]
    if len(v.moe_blocks) != len(v.depths):
        raise UserError(f"model.moe_blocks: {shown} needs {len(v.depths)} entries, the block indices of each stage")
    for i, (blocks, depth) in enumerate(zip(v.moe_blocks, v.depths, strict=True)):
        if any(not 0 <= block < depth for block in blocks):
            raise UserError(f"model.moe_blocks: {shown} names a block that stage {i}, of {depth} blocks, does not have")
    if not any(v.moe_blocks):
        raise UserError(f"model.moe_blocks: {shown} names no block; name one, or set moe to None for a dense model")


def _fits(size: int, window: int, v: Variant) -> bool:
    """Whether an image side divides into patches, halves at every merging, and fills whole windows in every stage."""
    stride = v.patch_size << (len(v.depths) - 1)
    if size < stride or size % stride:
        return False
    sides = [size // v.patch_size >> i for i in range(len(v.depths))]
    return all(side % min(side, window) == 0 for side in sides)


def valid_sizes(size: int, window: int, v: Variant) -> list[int]:
    """Up to two valid image sides below and two above `size` (pixels)."""
    stride = v.patch_size << (len(v.depths) - 1)
    # Multiples of stride * window always fit, so the search ends within that distance.
    reach = max(size, 0) + 2 * stride * window + stride
    fitting = [side for side in range(stride, reach + 1, stride) if _fits(side, window, v)]
    return [s for s in fitting if s < size][-2:] + [s for s in fitting if s > size][:2]

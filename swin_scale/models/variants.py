"""Every named model: the released sizes under their official config stems, the billion-parameter ones, and nano sizes.

A name is an architecture plus the image size, class count and drop-path rate of its official config. No torch here.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from swin_scale.errors import UserError
from swin_scale.moe.config import MoEConfig

Pair = tuple[int, int]
Family = Literal["swin", "swinv2", "swin_mlp", "swin_moe", "swinv2_moe"]
IN1K_CLASSES, IN22K_CLASSES = 1000, 21841


@dataclass(frozen=True, kw_only=True)
class Variant:
    """All that defines a model. Every field can be overridden by name in `create_model`."""

    family: Family
    """What a block is.

    | family | norm | attention score | position bias |
    |---|---|---|---|
    | swin | before a branch | scaled dot product | table |
    | swinv2, swinv2_moe | after it | cosine | log-spaced CPB through 16 * sigmoid |
    | swin_moe | before | scaled dot product | log-spaced CPB as the MLP gives it |
    | swin_mlp | before | none: a spatial MLP | none |
    """
    img_size: int | Pair
    """Pixels, one side of a square or (height, width)."""
    window_size: int | Pair
    """Tokens; clamped to the feature map, each axis by itself."""
    embed_dim: int
    """Channels of the first stage; each later stage doubles them."""
    depths: tuple[int, ...]
    """Blocks of each stage."""
    num_heads: tuple[int, ...]
    """Heads of each stage."""
    drop_path_rate: float
    """Of the last block; rises linearly from 0 in the first."""
    num_classes: int = IN1K_CLASSES
    """0 leaves the head out."""
    patch_size: int = 4
    in_chans: int = 3
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    drop_rate: float = 0.0
    """Of tokens after the patch embedding, the projection of attention and both layers of MLPs."""
    attn_drop_rate: float = 0.0
    """Of attention probabilities."""
    ape: bool = False
    """Learned absolute position embedding."""
    patch_norm: bool = True
    pretrained_window_sizes: tuple[int, ...] = ()
    """Log-spaced CPB: window each stage was pretrained with; 0 or () means the present one (SwinV2, section 3.3)."""
    extra_norm_interval: int = 0
    """SwinV2-H and -G: a LayerNorm on the main branch after every so many blocks of a stage; 0 for none."""
    activation_checkpointing: Literal["off", "block", "selective"] = "off"
    """Recompute nothing, whole blocks, or blocks without their attention."""
    kernels: Literal["auto", "triton", "reference"] = "auto"
    """Who computes attention, residual norms, merging and dispatch to experts: Triton where it can, always, or torch
    (`kernels.choice`)."""
    layer_norm: Literal["torch", "apex"] = "torch"
    """Whose LayerNorm is used where no Triton kernel serves."""
    moe: MoEConfig | None = None
    """Of the families swin_moe and swinv2_moe: the mixture in the blocks `moe_blocks`; None makes every MLP dense."""
    moe_blocks: tuple[tuple[int, ...], ...] = ()
    """Of each stage, the indices of the blocks whose MLP is a mixture of experts."""
    mlp_fc2_bias: bool = True
    """False leaves out the second bias of dense MLPs (that of experts: `moe.fc2_bias`)."""
    init_std: float = 0.02
    """Standard deviation of initial weights."""

    @property
    def post_norm(self) -> bool:
        """Whether norms end residual branches and mergings (SwinV2, section 3.1) or begin them."""
        return self.family in ("swinv2", "swinv2_moe")


_T, _B, _G = (2, 2, 6, 2), (2, 2, 18, 2), (2, 2, 42, 4)
_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 96, "depths": _T, "num_heads": (3, 6, 12, 24)},
    "small": {"embed_dim": 96, "depths": _B, "num_heads": (3, 6, 12, 24)},
    "base": {"embed_dim": 128, "depths": _B, "num_heads": (4, 8, 16, 32)},
    "large": {"embed_dim": 192, "depths": _B, "num_heads": (6, 12, 24, 48)},
    "tiny_c24": {"embed_dim": 96, "depths": _T, "num_heads": (4, 8, 16, 32)},
    "tiny_c12": {"embed_dim": 96, "depths": _T, "num_heads": (8, 16, 32, 64)},
    "tiny_c6": {"embed_dim": 96, "depths": _T, "num_heads": (16, 32, 64, 128)},
    # Not released as configs. Heads by the rule of 32 channels each; main-branch norm of SwinV2, section 3.4.
    "huge": {"embed_dim": 352, "depths": _B, "num_heads": (11, 22, 44, 88), "extra_norm_interval": 6},
    "giant1b": {"embed_dim": 448, "depths": _B, "num_heads": (14, 28, 56, 112)},
    "g3b": {"embed_dim": 512, "depths": _G, "num_heads": (16, 32, 64, 128), "extra_norm_interval": 6},
    "nano": {"embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 10},
}
_22K = {"num_classes": IN22K_CLASSES}
_FROM_12 = {"pretrained_window_sizes": (12, 12, 12, 6)}


def _moe(experts: int, **values: Any) -> dict[str, Any]:
    """A published mixture: every second block of the two last stages, no second biases, small initial weights."""
    return {
        "moe": MoEConfig(num_experts=experts, fc2_bias=False, **values),
        "moe_blocks": ((), (), tuple(range(1, 18, 2)), (1,)),
        "mlp_fc2_bias": False,
        "init_std": 0.005,
    }


def _moe_rows(drop_path_rate: float, experts: Iterable[int]) -> list[tuple[str, float, dict[str, Any]]]:
    stem = "patch4_window12_192"
    return [
        *((f"{stem}_{count}expert_22k", drop_path_rate, _moe(count) | _22K) for count in experts),
        (f"{stem}_cosine_router_32expert_22k", drop_path_rate, _moe(32, router="cosine") | _22K),
    ]


_DENSE_BASELINE = ("patch4_window12_192_densebaseline_22k", 0.2, {"mlp_fc2_bias": False, **_22K})
_MOE_NANO = (
    "patch4_window4_32",
    0.0,
    _moe(8, drop=0.0) | {"moe_blocks": ((1,), (1,)), "init_std": 0.02},
)

# family -> size -> [(rest of the name, drop-path rate, further values)]; window and image size are in the name's rest.
_RELEASED: dict[Family, dict[str, list[tuple[str, float, dict[str, Any]]]]] = {
    "swin": {
        "nano": [("patch4_window4_32", 0.0, {})],
        "tiny": [
            ("patch4_window7_224", 0.2, {}),
            ("patch4_window7_224_22k", 0.1, _22K),
            ("patch4_window7_224_22kto1k_finetune", 0.1, {}),
        ],
        "tiny_c24": [("patch4_window8_256", 0.2, {})],
        "small": [
            ("patch4_window7_224", 0.3, {}),
            ("patch4_window7_224_22k", 0.2, _22K),
            ("patch4_window7_224_22kto1k_finetune", 0.2, {}),
        ],
        "base": [
            ("patch4_window7_224", 0.5, {}),
            ("patch4_window7_224_22k", 0.2, _22K),
            ("patch4_window7_224_22kto1k_finetune", 0.2, {}),
            ("patch4_window12_384_finetune", 0.5, {}),
            ("patch4_window12_384_22kto1k_finetune", 0.2, {}),
        ],
        "large": [
            ("patch4_window7_224_22k", 0.2, _22K),
            ("patch4_window7_224_22kto1k_finetune", 0.2, {}),
            ("patch4_window12_384_22kto1k_finetune", 0.2, {}),
        ],
    },
    "swinv2": {
        "nano": [("patch4_window4_32", 0.0, {})],
        "tiny": [("patch4_window8_256", 0.2, {}), ("patch4_window16_256", 0.2, {})],
        "small": [("patch4_window8_256", 0.3, {}), ("patch4_window16_256", 0.3, {})],
        "base": [
            ("patch4_window8_256", 0.5, {}),
            ("patch4_window16_256", 0.5, {}),
            ("patch4_window12_192_22k", 0.2, _22K),
            ("patch4_window12to16_192to256_22kto1k_ft", 0.2, _FROM_12),
            ("patch4_window12to24_192to384_22kto1k_ft", 0.2, _FROM_12),
        ],
        "large": [
            ("patch4_window12_192_22k", 0.2, _22K),
            ("patch4_window12to16_192to256_22kto1k_ft", 0.2, _FROM_12),
            ("patch4_window12to24_192to384_22kto1k_ft", 0.2, _FROM_12),
        ],
        "huge": [("patch4_window12_192", 0.2, {})],
        "giant1b": [("patch4_window12_192", 0.2, {})],
        "g3b": [("patch4_window12_192", 0.2, {})],
    },
    "swin_mlp": {
        "nano": [("patch4_window4_32", 0.0, {})],
        "tiny_c24": [("patch4_window8_256", 0.2, {})],
        "tiny_c12": [("patch4_window8_256", 0.2, {})],
        "tiny_c6": [("patch4_window8_256", 0.2, {})],
        "base": [("patch4_window7_224", 0.5, {})],
    },
    "swin_moe": {
        "nano": [_MOE_NANO],
        "small": [*_moe_rows(0.2, (8, 16, 32, 64, 128)), _DENSE_BASELINE],
        "base": [*_moe_rows(0.3, (8, 16, 32)), _DENSE_BASELINE],
    },
    # Not published: the mixtures of Swin-MoE in blocks of SwinV2.
    "swinv2_moe": {
        "nano": [_MOE_NANO],
        "small": _moe_rows(0.2, (8, 16, 32)),
        "base": _moe_rows(0.3, (8, 16, 32)),
    },
}


def _variants() -> dict[str, Variant]:
    table = {}
    for family, sizes in _RELEASED.items():
        for size, rows in sizes.items():
            for rest, drop_path_rate, values in rows:
                _, window, image, *_ = rest.split("_")
                table[f"{family}_{size}_{rest}"] = Variant(
                    family=family,
                    window_size=int(window.removeprefix("window").rpartition("to")[2]),
                    img_size=int(image.rpartition("to")[2]),
                    drop_path_rate=drop_path_rate,
                    **_SIZES[size] | values,
                )
    return table


_VARIANTS = _variants()


def list_models() -> list[str]:
    """Names that `create_model` and `variant` know, sorted."""
    return sorted(_VARIANTS)


def variant(name: str, **overrides: Any) -> Variant:
    """The named variant with `overrides` put in; `moe` may be a mapping of the fields of `MoEConfig` that change.

    Raises UserError with the nearest names for an unknown one.
    """
    if name not in _VARIANTS:
        raise UserError(f"unknown model {name!r}{_nearest(name, list(_VARIANTS))}; swin_scale.list_models() has all")
    base = _VARIANTS[name]
    _refuse_unknown("model override", overrides, [field.name for field in fields(Variant) if field.name != "family"])
    values = {key: _as_tuples(value) for key, value in overrides.items()}
    if isinstance(changes := values.get("moe"), Mapping):
        values["moe"] = _changed(base.moe, changes)
    return replace(base, **values)


def _changed(base: MoEConfig | None, changes: Mapping[str, Any]) -> MoEConfig:
    _refuse_unknown("moe override", changes, [field.name for field in fields(MoEConfig)])
    if base is not None:
        return replace(base, **changes)
    if "num_experts" not in changes:
        raise UserError("moe: this model is dense; give num_experts, and moe_blocks to say which blocks")
    return MoEConfig(**changes)


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, (list, tuple)) else value


def _refuse_unknown(what: str, keys: Iterable[str], known: list[str]) -> None:
    for key in keys:
        if key not in known:
            raise UserError(f"unknown {what} {key!r}{_nearest(key, known)}; known: {', '.join(known)}")


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f", did you mean {' or '.join(near)}?" if near else ""

"""The same weights in timm's models give the same logits: an independent implementation, through a map of names."""

import pytest
import torch

from swin_scale.models import create_model, variant
from tests.peers import Unfilled, timm


def to_timm(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm merges patches at the start of a stage where the official names have it at the end of the one before."""
    renamed = {}
    for key, value in state.items():
        head, _, rest = key.partition(".")
        if head == "layers" and ".downsample." in f".{rest}":
            stage, _, tail = rest.partition(".")
            key = f"layers.{int(stage) + 1}.{tail}"
        elif head == "head":
            key = f"head.fc.{rest}"
        renamed[key] = value
    return renamed


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Weights of visible effect everywhere: the official start has identity blocks and tiny biases."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.add_(noise * (0.5 if "cpb_mlp" in name else 0.2 if p.ndim == 1 or "bias_table" in name else 0.01))


def assert_same_logits(ours: torch.nn.Module, theirs: torch.nn.Module, size: int, images: int = 2) -> None:
    randomise(ours)
    # timm's V2 registers its k bias and tables as buffers that it never saves either, so this is strict both ways.
    theirs.load_state_dict(to_timm(ours.state_dict()), strict=True)
    x = torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        a, b = ours.eval()(x), theirs.eval()(x)
    assert (a - b).abs().max() <= 1e-5


def peer(name: str, **overrides) -> tuple[torch.nn.Module, torch.nn.Module, int]:
    v = variant(name, **overrides)
    shared = {
        "img_size": v.img_size,
        "embed_dim": v.embed_dim,
        "depths": v.depths,
        "num_heads": v.num_heads,
        "window_size": v.window_size,
        "num_classes": v.num_classes,
    }
    with Unfilled():
        if v.family == "swin":
            theirs = timm.models.SwinTransformer(**shared)
        else:
            pretrained = v.pretrained_window_sizes or (0,) * len(v.depths)
            theirs = timm.models.SwinTransformerV2(pretrained_window_sizes=pretrained, **shared)
    return create_model(name, **overrides), theirs, v.img_size


# Released geometry (image, window, pretrained windows) at reduced width and depth; the full sizes follow as proof.
THIN = {"embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "num_classes": 7}


@pytest.mark.parametrize(
    "name",
    [
        "swin_base_patch4_window7_224",
        "swin_base_patch4_window12_384_finetune",
        "swinv2_base_patch4_window8_256",
        "swinv2_base_patch4_window16_256",
        "swinv2_base_patch4_window12to16_192to256_22kto1k_ft",
        "swinv2_base_patch4_window12to24_192to384_22kto1k_ft",
    ],
)
def test_thin_model_of_released_geometry(name):
    assert_same_logits(*peer(name, **THIN))


def test_full_tiny():
    assert_same_logits(*peer("swinv2_tiny_patch4_window8_256"))


@pytest.mark.proof
@pytest.mark.parametrize(
    "name",
    [
        "swin_tiny_patch4_window7_224",
        "swin_small_patch4_window7_224",
        "swinv2_tiny_patch4_window16_256",
        "swinv2_small_patch4_window8_256",
        "swinv2_base_patch4_window12to24_192to384_22kto1k_ft",
    ],
)
def test_full_sizes(name):
    assert_same_logits(*peer(name), images=1)

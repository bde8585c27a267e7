"""Beside a checkout of the official repository (environment variable SWIN_OFFICIAL): SimMIM, loss and all gradients."""

import sys

import pytest
import torch

from swin_scale.data.masking import draw_mask
from swin_scale.models import create_simmim
from tests.models.official import CHECKOUT, WITHOUT_CHECKOUT, build_official, perturb, split_derived

pytestmark = [pytest.mark.proof, pytest.mark.skipif(not CHECKOUT, reason=WITHOUT_CHECKOUT)]
NAMES = {"SWIN": "swin_base_patch4_window7_224_22k", "SWINV2": "swinv2_base_patch4_window12_192_22k"}


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("norm_target", [None, 47])
def test_loss_and_gradients_in_float64(family, norm_target, process_group, capsys):
    """Half of base's width, all of its depth."""
    changes = {
        "DATA.IMG_SIZE": 96,
        f"MODEL.{family}.EMBED_DIM": 64,
        f"MODEL.{family}.NUM_HEADS": [2, 4, 8, 16],
        f"MODEL.{family}.WINDOW_SIZE": 6,
        "MODEL.DROP_PATH_RATE": 0.0,
        "MODEL.SIMMIM.NORM_TARGET.ENABLE": norm_target is not None,
    }
    stem = f"simmim_pretrain__{family.lower()}_base__*"
    official = build_official(stem, 0, changes, pretrain=True).train()
    generator = torch.Generator().manual_seed(1)
    perturb(official, generator)
    official.double()
    ours = create_simmim(
        NAMES[family], img_size=96, embed_dim=64, num_heads=(2, 4, 8, 16), window_size=6, drop_path_rate=0.0,
        norm_target=norm_target,
    ).double()  # fmt: skip
    weights, derived = split_derived(official.state_dict())
    ours.load_state_dict(weights, strict=True)
    official.load_state_dict(ours.state_dict() | derived, strict=True)
    x = torch.randn(2, 3, 96, 96, generator=generator, dtype=torch.float64)
    masks = [
        draw_mask(96, 96, ratio=0.6, cell=32, patch=4, seed=0, epoch=0, sample=sample).astype("int64")
        for sample in range(2)
    ]
    mask = torch.stack([torch.from_numpy(m) for m in masks])
    expected, got = official(x, mask), ours(x, mask)
    expected.backward()
    got.backward()
    wanted = {name: p.grad for name, p in official.named_parameters()}
    worst = max(
        ((p.grad - wanted[name]).abs().max() / wanted[name].abs().max().clamp_min(1e-9)).item()
        for name, p in ours.named_parameters()
    )
    capsys.readouterr()
    with capsys.disabled():
        sys.stdout.write(
            f"\nSimMIM {family}, norm_target {norm_target}: loss {expected.item():.6f}, difference "
            f"{abs(expected - got).item():.1e}; gradients to {worst:.1e} of each tensor's largest"
        )
    assert abs(expected - got).item() <= 1e-6 and worst <= 1e-6
    assert wanted.keys() == dict(ours.named_parameters()).keys()

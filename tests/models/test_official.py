"""Beside a checkout of the official repository (environment variable SWIN_OFFICIAL): every released config.

Random weights of the official model load strictly into ours and back, and logits agree to 1e-5. Models with experts,
which need Tutel too, are in test_official_moe.py.
"""

import sys

import pytest
import torch

from swin_scale.models import create_model, list_models, variant
from swin_scale.models.layers import relative_coords_table, relative_position_index
from tests.models.official import CHECKOUT, DERIVED, WITHOUT_CHECKOUT, build_official, perturb, split_derived

pytestmark = [pytest.mark.proof, pytest.mark.skipif(not CHECKOUT, reason=WITHOUT_CHECKOUT)]
OURS_ALONE = ("nano", "huge", "giant1b", "g3b")
RELEASED = [
    name for name in list_models() if not any(f"_{size}_" in name for size in OURS_ALONE) and variant(name).moe is None
]


@pytest.mark.parametrize("name", RELEASED)
def test_released_config(name, process_group, capsys):
    v = variant(name)
    official = build_official(name, v.num_classes).eval()
    generator = torch.Generator().manual_seed(1)
    perturb(official, generator)
    weights, derived = split_derived(official.state_dict())

    ours = create_model(name).eval()
    drop_path = getattr(official.layers[-1].blocks[-1].drop_path, "drop_prob", 0.0)
    assert v.drop_path_rate == pytest.approx(drop_path)
    ours.load_state_dict(weights, strict=True)
    official.load_state_dict(ours.state_dict() | derived, strict=True)
    for i, stage in enumerate(ours.stages):
        prefix = f"layers.{i}.blocks.0.attn."
        if prefix + DERIVED[0] in derived:
            assert torch.equal(derived[prefix + DERIVED[0]], relative_position_index(stage.window_size))
        if prefix + DERIVED[1] in derived:
            table = relative_coords_table(stage.window_size, stage.pretrained_window_size)
            assert torch.allclose(derived[prefix + DERIVED[1]], table, atol=1e-6)

    x = torch.randn(1, 3, v.img_size, v.img_size, generator=generator)
    with torch.no_grad():
        expected, got = official(x), ours(x)
    if v.family == "swin_moe":
        expected, aux = expected
        assert aux == 0, "a dense baseline has no auxiliary loss"
    difference = (expected - got).abs().max().item()
    capsys.readouterr()
    with capsys.disabled():
        sys.stdout.write(f"\n{name}: logits to {expected.abs().max():.2f}, largest difference {difference:.1e}")
    assert difference <= 1e-5

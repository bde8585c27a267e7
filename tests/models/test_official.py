"""Beside a checkout of the official repository (environment variable SWIN_OFFICIAL): every released config.

Random weights of the official model load strictly into ours and back, and logits agree to 1e-5.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

from swin_scale.models import create_model, list_models, variant
from swin_scale.models.layers import relative_coords_table, relative_position_index

CHECKOUT = os.environ.get("SWIN_OFFICIAL", "")
DERIVED = ("relative_position_index", "relative_coords_table", "attn_mask")

pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif(not CHECKOUT, reason="SWIN_OFFICIAL does not name a checkout of the official repository"),
]
OURS_ALONE = ("nano", "huge", "giant1b", "g3b")
RELEASED = [name for name in list_models() if not any(f"_{size}_" in name for size in OURS_ALONE)]


def build_official(name: str) -> torch.nn.Module:
    import tests.peers  # noqa: F401  (makes timm importable, which the official code wants)

    if CHECKOUT not in sys.path:
        sys.path.insert(0, CHECKOUT)
    from config import _C, _update_config_from_file
    from models import build_model

    config = _C.clone()
    path = next(Path(CHECKOUT, "configs").glob(f"*/{name}.yaml"))
    _update_config_from_file(config, str(path))
    config.defrost()
    # main.py sets the class count from the data set.
    config.MODEL.NUM_CLASSES = variant(name).num_classes
    config.freeze()
    return build_model(config)


@pytest.mark.parametrize("name", RELEASED)
def test_released_config(name, capsys):
    official = build_official(name).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in official.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.2 if p.ndim == 1 else 0.01)
    theirs = official.state_dict()
    derived = {key: value for key, value in theirs.items() if key.endswith(DERIVED)}
    weights = {key: value for key, value in theirs.items() if key not in derived}

    ours = create_model(name).eval()
    v = variant(name)
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
    difference = (expected - got).abs().max().item()
    capsys.readouterr()
    with capsys.disabled():
        sys.stdout.write(f"\n{name}: logits to {expected.abs().max():.2f}, largest difference {difference:.1e}")
    assert difference <= 1e-5

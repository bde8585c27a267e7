"""Files of ranks exchanged with a checkout of the official code (SWIN_OFFICIAL) and a real Tutel, over processes."""

import importlib.util
import os

import numpy as np
import pytest

from swin_scale.convert import convert, model_from_weights
from tests.convert import official_moe_worker as worker
from tests.spawn import spawn

pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif("SWIN_OFFICIAL" not in os.environ, reason="SWIN_OFFICIAL is not set"),
    pytest.mark.skipif(importlib.util.find_spec("tutel") is None, reason="Tutel is not installed"),
]

# ranks, NUM_LOCAL_EXPERTS of the official config, experts of the layer, cosine router
LAYOUTS = [(2, 2, 4, False), (4, 1, 4, True), (4, -2, 2, False)]


@pytest.mark.parametrize(("ranks", "local", "experts", "cosine"), LAYOUTS)
def test_what_the_official_code_saves_and_loads(tmp_path, ranks, local, experts, cosine):
    (tmp_path / "theirs").mkdir()
    expected = spawn(ranks, worker.save, tmp_path / "theirs", local, cosine, timeout=120)
    assert all(np.allclose(expected[0], other, atol=1e-6) for other in expected)
    for name in ("ckpt_epoch_final.pth", "ckpt_epoch_1.pth"):
        network, _ = model_from_weights(tmp_path / "theirs" / name)
        assert network.variant.moe.num_experts == experts
        np.testing.assert_allclose(worker.logits(network.eval()), expected[0], rtol=0, atol=1e-5)
    source = tmp_path / "theirs" / "ckpt_epoch_final.pth"
    convert(source, tmp_path / "whole", to=f"tutel-ep{ranks}")
    for resume in (False, True):
        got = spawn(ranks, worker.load, tmp_path / "whole" / "whole.pth", local, cosine, resume, timeout=120)
        assert all(np.allclose(expected[0], other, rtol=0, atol=1e-6) for other in got)
    if local == 1:
        convert(source, tmp_path / "split", to="official")
        got = spawn(ranks, worker.load, tmp_path / "split" / "split.pth", local, cosine, False, timeout=120)
        assert all(np.allclose(expected[0], other, rtol=0, atol=1e-6) for other in got)

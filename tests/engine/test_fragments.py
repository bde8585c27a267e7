"""The contract with DeepSpeed's private names: what `fragments.py` relies on exists and means what it should."""

import sys

import numpy as np
import pytest

from swin_scale.engine.fragments import import_deepspeed
from swin_scale.errors import UserError
from tests.engine.test_engine import make_config, make_engine, train
from tests.spawn import spawn_dist


@pytest.mark.parametrize(
    ("stage", "precision", "micro", "kind"),
    [(1, "fp32", "auto", "DeepSpeedZeroOptimizer"), (1, "bf16", 2, "BF16_Optimizer")],
)
def test_private_names_hold_the_whole_state(stage, precision, micro, kind):
    """Two ranks' pieces tile every parameter once, and both moments of every group are linked."""
    config = make_config(engine={"zero_stage": stage, "precision": precision}, train={"micro_batch": micro})
    covered: dict[str, np.ndarray] = {}
    for optimizer, pieces, shapes in spawn_dist(2, contract_case, config):
        assert optimizer == kind
        for name, start, length, moments, dtype in pieces:
            covered.setdefault(name, np.zeros(shapes[name], int).reshape(-1))[start : start + length] += 1
            assert sorted(moments) == ["exp_avg", "exp_avg_sq"]
            assert dtype == "torch.float32"
    assert covered.keys() == shapes.keys()
    assert all((count == 1).all() for count in covered.values())


def contract_case(dist, config):
    engine, plan = make_engine(dist, config)
    train(engine, plan, dist, 0, 1)
    list(engine.local_fragments())
    pieces = [
        (p.name, p.start, p.master.numel(), list(p.moments), str(p.master.dtype)) for p in engine.fragments.pieces()
    ]
    assert "torch._inductor.compile_fx" not in sys.modules
    shapes = {name: tuple(p.shape) for name, p in engine.module.named_parameters()}
    return type(engine._zero).__name__, pieces, shapes


@pytest.mark.parametrize("version", ["0.18.9", "0.20.0", "1.0.0"])
def test_other_versions_are_refused(version, monkeypatch):
    deepspeed = import_deepspeed(on_gpu=False, local_rank=0)
    monkeypatch.setattr(deepspeed, "__version__", version)
    with pytest.raises(UserError, match=r"deepspeed>=0\.19\.8,<0\.20"):
        import_deepspeed(on_gpu=False, local_rank=0)


def test_missing_deepspeed_names_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"pip install .deepspeed>=0\.19\.8,<0\.20"):
        import_deepspeed(on_gpu=False, local_rank=0)

"""The contract with DeepSpeed's private names: what `fragments.py` relies on exists and means what it should."""

import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from swin_scale.engine.fragments import LossScale, import_deepspeed
from swin_scale.engine.pieces import LOSS_SCALER_STATE
from swin_scale.errors import UserError
from tests.engine.test_engine import RESIDENT, make_config, make_engine, train
from tests.spawn import spawn_dist


@pytest.mark.parametrize(
    ("stage", "precision", "micro", "kind"),
    [
        (0, "fp32", "auto", "GuardedAdamW"),
        (1, "fp32", "auto", "DeepSpeedZeroOptimizer"),
        (1, "bf16", 2, "BF16_Optimizer"),
        (3, "fp32", "auto", "DeepSpeedZeroOptimizer_Stage3"),
        (3, "bf16", 2, "DeepSpeedZeroOptimizer_Stage3"),
    ],
)
def test_private_names_hold_the_whole_state(stage, precision, micro, kind):
    """Three ranks' pieces tile every parameter once, and both moments of every group are linked."""
    config = make_config(engine={"zero_stage": stage, "precision": precision}, train={"micro_batch": micro})
    covered: dict[str, np.ndarray] = {}
    for optimizer, pieces, shapes in spawn_dist(3, contract_case, config):
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
    shapes = {name: engine.fragments.shape(p) for name, p in engine.module.named_parameters()}
    return type(engine._zero).__name__, pieces, shapes


def test_zero_3_keeps_parts_and_gathers_where_asked():
    """On the meta device before, cut after; small ones stay; nothing of torch is replaced."""
    for parts, filled, gathered, output in spawn_dist(3, parts_case, make_config(engine={"zero_stage": 3})):
        for full, part, kept in parts:
            assert part == -(-full // 3)
            assert kept == (full if full <= RESIDENT else 0)
        assert set(filled) == {0}
        assert gathered
        assert np.isfinite(output).all()


def parts_case(dist, config):
    original = torch.nn.functional.linear
    engine, plan = make_engine(dist, config)
    train(engine, plan, dist, 0, 1)
    parameters = list(engine.module.parameters())
    parts = [(p.ds_numel, p.ds_tensor.numel(), p.numel()) for p in parameters]
    # Were the master the part itself, evaluating the moving average would overwrite it.
    parts_of = {p.master.data_ptr() for p in engine.fragments.pieces()}
    assert not parts_of & {p.ds_tensor.data_ptr() for p in parameters}
    engine.fragments._publish()
    filled = [p.numel() for p in parameters]
    with engine.evaluating() as module:
        output = module(torch.zeros(2, 3, 32, 32)).numpy()
    assert torch.nn.functional.linear is original
    return parts, filled, any(p.numel() for p in parameters), output


UNINITIALISED = [
    (0, "fp32", "auto"),
    (1, "bf16", 2),
    (2, "fp32", 2),
    (2, "bf16", "auto"),
    (3, "fp32", "auto"),
    (3, "bf16", 2),
]


@pytest.mark.parametrize(("stage", "precision", "micro"), UNINITIALISED)
def test_what_memory_held_before_is_never_seen(stage, precision, micro):
    """Every tensor that torch or DeepSpeed leaves unfilled holds NaN; most parameters do not divide by three ranks."""
    config = make_config(engine={"zero_stage": stage, "precision": precision}, train={"micro_batch": micro})
    found = spawn_dist(3, uninitialised_case, config)
    for results, bad, finite, _ in found:
        assert np.isfinite(results).all()
        assert bad == []
        assert finite
    assert sum(padding for *_, padding in found) > 0 or stage < 3, "nothing was padded"


def uninitialised_case(dist, config):
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    engine, plan = make_engine(dist, config)
    bad = engine.not_finite()
    results = [result[:2] for result in train(engine, plan, dist, 0, 3)]
    finite = all(bool(fragment.data.isfinite().all()) for fragment in engine.local_fragments())
    parts = [p.ds_tensor for p in engine.module.parameters() if hasattr(p, "ds_tensor")]
    return results, bad + engine.not_finite(), finite, sum(int(part.isnan().sum()) for part in parts)


@pytest.mark.parametrize("stage", [1, 3])
def test_the_local_rank_does_not_stay_in_the_environment(stage):
    """Where nobody set it, as under Slurm, DeepSpeed has it while it needs it."""
    [found] = spawn_dist(1, environment_of, make_config(engine={"zero_stage": stage}))
    assert found == [None, None if stage == 1 else "0", None]


def environment_of(dist, config):
    """LOCAL_RANK before, in and after the life of an engine."""
    del os.environ["LOCAL_RANK"]
    import_deepspeed(on_gpu=False)
    found = [os.environ.get("LOCAL_RANK")]
    engine, plan = make_engine(dist, config)
    train(engine, plan, dist, 0, 2)
    found.append(os.environ.get("LOCAL_RANK"))
    engine.close()
    return [*found, os.environ.get("LOCAL_RANK")]


def test_the_loss_scale_grows_after_an_update_and_ends_no_run(monkeypatch):
    import_deepspeed(on_gpu=False)
    from deepspeed.runtime.fp16 import loss_scaler

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 0)
    scaler = loss_scaler.DynamicLossScaler(8.0, 2, 1.0, delayed_shift=1, consecutive_hysteresis=False)
    scale = LossScale(SimpleNamespace(loss_scaler=scaler))
    divided_by, then = [], []
    for overflow in [True] * 5 + [False] * 4 + [True]:
        scaler.update_scale(overflow)
        divided_by.append(scaler.cur_scale)
        scale.grow()
        then.append(scaler.cur_scale)
    assert then == [4, 2, 1, 1, 1, 1, 1, 2, 2, 1]
    assert divided_by == [4, 2, 1, 1, 1, 1, 1, 1, 2, 1]


@pytest.mark.parametrize("before", [[], [False], [False, True], [True, False, False]])
def test_a_step_that_never_was_leaves_the_loss_scale_alone(monkeypatch, before):
    """For want of a rank's batch: its overflow is made, and must not be found in the checkpoint that follows."""
    from deepspeed.runtime.fp16 import loss_scaler

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 0)
    scaler = loss_scaler.DynamicLossScaler(8.0, 2, 1.0, delayed_shift=2, consecutive_hysteresis=False)
    scale = LossScale(SimpleNamespace(loss_scaler=scaler))

    def step(overflow):
        scaler.update_scale(overflow)
        scale.grow()

    for overflow in before:
        step(overflow)
    known = {key: getattr(scaler, key) for key in LOSS_SCALER_STATE}
    step(True)
    assert {key: getattr(scaler, key) for key in LOSS_SCALER_STATE} != known
    scale.undo()
    assert {key: getattr(scaler, key) for key in LOSS_SCALER_STATE} == known


def test_operators_are_not_probed_on_a_gpu(monkeypatch):
    """Which runs compilers; on a CPU the one that would be built is left out."""
    deepspeed = import_deepspeed(on_gpu=False)
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False
    monkeypatch.delitem(vars(deepspeed.ops), "__compatible_ops__")
    monkeypatch.setattr(deepspeed.ops, "_probe_compatible_ops", lambda: pytest.fail("operators are probed"))
    assert import_deepspeed(on_gpu=True) is deepspeed


@pytest.mark.parametrize("version", ["0.18.9", "0.20.0", "1.0.0"])
def test_other_versions_are_refused(version, monkeypatch):
    deepspeed = import_deepspeed(on_gpu=False)
    monkeypatch.setattr(deepspeed, "__version__", version)
    with pytest.raises(UserError, match=r"deepspeed>=0\.19\.8,<0\.20"):
        import_deepspeed(on_gpu=False)


def test_missing_deepspeed_names_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"pip install .deepspeed>=0\.19\.8,<0\.20"):
        import_deepspeed(on_gpu=False)

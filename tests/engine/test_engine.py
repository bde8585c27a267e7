"""The engine on real gloo processes: one gradient for any cut of the batch, skips agreed, saves local, resume exact."""

import dataclasses
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from swin_scale.checkpoint import Checkpoint
from swin_scale.config import batch_plan
from swin_scale.config_load import config_from_values
from swin_scale.errors import DataError
from tests.spawn import spawn_dist

BATCH, CLASSES = 12, 10
RESIDENT = 1000
"""Parameters that ZeRO-3 keeps gathered here; with its real threshold all of a nano model would stay."""


def proof(*values):
    return pytest.param(*values, marks=pytest.mark.proof)


def make_config(**sections):
    values = {
        "run": {"dir": "r"},
        "data": {"train": ["d"]},
        "augment": {"mixup_prob": 0.0},
        "model": {"name": "swinv2_nano_patch4_window4_32", "num_classes": CLASSES, "drop_path_rate": 0.0},
        "optim": {"lr": 1e-3, "clip_grad": 1.0},
        "schedule": {"warmup_steps": 2, "total_steps": 20},
        "train": {"global_batch": BATCH},
        "engine": {"precision": "fp32"},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return config_from_values(values).config


def make_engine(dist, config, seed=0):
    from swin_scale.engine import ds_config
    from swin_scale.engine.engine import Engine
    from swin_scale.engine.schedule import Schedule
    from swin_scale.models import create_model
    from swin_scale.models.init import initial_values
    from swin_scale.tasks.classify import losses

    allow_fp16_on_cpu()
    ds_config.STAGE3_RESIDENT_NUMEL = RESIDENT
    plan = batch_plan(config, dist.world)
    overrides = {k: v for k, v in dataclasses.asdict(config.model).items() if k != "name" and v is not None}
    overrides["activation_checkpointing"] = config.engine.activation_checkpointing
    sharded = config.engine.zero_stage == 3
    with torch.device("meta" if sharded else "cpu"):
        model = create_model(config.model.name, seed=seed, **overrides)
    values = initial_values(model, seed) if sharded else None
    return Engine(model, config, plan, Schedule.from_config(config, 10), dist, values, losses=losses), plan


def allow_fp16_on_cpu():
    """DeepSpeed's CPU accelerator reports fp16 unsupported, though torch computes it."""
    import os

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    accelerator.supported_dtypes = lambda: [torch.float32, torch.float16, torch.bfloat16]


def batch_of(step, plan, dist, engine, *, invalid=(), poison=None):
    """This rank's micro-batches of a fixed random global batch; `poison` = (step, slot) gets an infinite pixel."""
    from swin_scale.engine.engine import MicroBatch

    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator)
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    valid = torch.tensor([slot not in invalid for slot in range(BATCH)])
    if poison is not None and poison[0] == step:
        images[poison[1]] = torch.inf
    targets = torch.nn.functional.one_hot(labels, CLASSES).float()
    first = dist.rank * plan.per_rank
    cuts = [slice(first + i * plan.micro, first + (i + 1) * plan.micro) for i in range(plan.accumulation)]
    micros = [MicroBatch(inputs=images[c].to(engine.dtype), targets=targets[c], valid=valid[c]) for c in cuts]
    return micros, int(valid[first : first + plan.per_rank].sum())


def train(engine, plan, dist, first, last, **options):
    results = []
    for step in range(first, last):
        micros, valid = batch_of(step, plan, dist, engine, **options)
        r = engine.train_step(step, micros, valid)
        results.append((float(r.loss), float(r.grad_norm), r.skipped, r.loss_scale))
    return results


def weights(engine):
    """Whole, as numpy arrays, which travel between processes by value."""
    import deepspeed

    parameters = dict(engine.module.named_parameters())
    sharded = engine.config.engine.zero_stage == 3
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=sharded):
        return {name: p.detach().float().numpy().copy() for name, p in parameters.items()}


def run_steps(dist, config, steps, options):
    engine, plan = make_engine(dist, config)
    return train(engine, plan, dist, 0, steps, **options), weights(engine)


def test_layouts_follow_the_same_gradients():
    """1 rank, 2 ranks, accumulation and ZeRO stage give the same losses, norms and parameters; empty slots too."""
    options = {"invalid": (1, 6, 7)}
    whole, expected = spawn_dist(1, run_steps, make_config(), 4, options)[0]
    layouts = [
        (2, make_config(engine={"zero_stage": 1})),
        (2, make_config(engine={"zero_stage": 2}, train={"micro_batch": 2})),
        (1, make_config(engine={"zero_stage": 2}, train={"micro_batch": 2})),
        (2, make_config(engine={"zero_stage": 0}, train={"micro_batch": 3})),
        (3, make_config(engine={"zero_stage": 3}, train={"micro_batch": 2})),
    ]
    for world, config in layouts:
        for results, parameters in spawn_dist(world, run_steps, config, 4, options):
            for (loss, norm, *_), (expected_loss, expected_norm, *_) in zip(results, whole, strict=True):
                assert loss == pytest.approx(expected_loss, abs=1e-5)
                assert norm == pytest.approx(expected_norm, rel=1e-4)
            for name, value in parameters.items():
                np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-5)


def test_mean_is_over_valid_samples_only():
    """A batch with empty slots equals plain torch on the valid samples."""
    from swin_scale.models import create_model

    options = {"invalid": (0, 3, 4)}
    [(results, _)] = spawn_dist(1, run_steps, make_config(), 1, options)
    model = create_model("swinv2_nano_patch4_window4_32", num_classes=CLASSES, drop_path_rate=0.0)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator)
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    keep = [slot for slot in range(BATCH) if slot not in options["invalid"]]
    loss = torch.nn.functional.cross_entropy(model(images[keep]), labels[keep])
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert results[0][0] == pytest.approx(loss.item(), abs=1e-6)
    assert results[0][1] == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize(
    ("stage", "precision", "micro"),
    [
        (0, "fp32", 3),
        (1, "fp32", "auto"),
        (1, "bf16", 2),
        (1, "fp16", "auto"),
        (2, "bf16", 3),
        (3, "fp32", 3),
        (3, "fp16", "auto"),
        proof(1, "fp32", 2),
        proof(1, "bf16", "auto"),
        proof(1, "fp16", 2),
        proof(3, "bf16", "auto"),
    ],
)
def test_non_finite_step_is_skipped_by_all_ranks(stage, precision, micro):
    """An infinite pixel on the last rank alone: no rank updates; fp16 halves its scale; the next step goes on."""
    config = make_config(engine={"zero_stage": stage, "precision": precision}, train={"micro_batch": micro})
    ranks = spawn_dist(2, skip_case, config)
    for before, after, results in ranks:
        assert [skipped for _, _, skipped, _ in results] == [False, True, False]
        assert results[1][1] == float("inf")
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert np.array_equal(value, after[name]), name
        if precision == "fp16":
            assert [scale for *_, scale in results] == [65536.0, 65536.0, 32768.0]
        assert torch.isfinite(torch.tensor([results[0][0], results[2][0]])).all()
    assert [r[1:] for r in ranks[0][2]] == [r[1:] for r in ranks[1][2]]


def skip_case(dist, config):
    engine, plan = make_engine(dist, config)
    poison = {"poison": (1, BATCH - 1)}
    results = train(engine, plan, dist, 0, 1, **poison)
    before = weights(engine)
    results += train(engine, plan, dist, 1, 2, **poison)
    after = weights(engine)
    results += train(engine, plan, dist, 2, 3, **poison)
    return before, after, results


@pytest.mark.parametrize(
    ("stage", "precision", "micro", "optimizer"),
    [
        (2, "bf16", "auto", "adamw"),
        (1, "bf16", 2, "adamw"),
        (1, "fp16", "auto", "sgd"),
        (0, "fp32", "auto", "sgd"),
        (3, "bf16", 3, "adamw"),
        proof(1, "fp32", "auto", "adamw"),
        proof(3, "fp16", "auto", "sgd"),
    ],
)
def test_resume_is_bit_equal(tmp_path, stage, precision, micro, optimizer):
    """2 + 2 steps equal 4 steps bit for bit, moments and moving average included, through files on disk."""
    config = make_config(
        engine={"zero_stage": stage, "precision": precision},
        train={"micro_batch": micro},
        optim={"name": optimizer, "ema_decay": 0.9},
        model={"drop_path_rate": 0.3},
    )
    for whole, resumed in spawn_dist(2, resume_case, config, tmp_path):
        assert whole[0] == resumed[0]
        for a, b in zip(whole[1:], resumed[1:], strict=True):
            assert a.keys() == b.keys()
            for name, value in a.items():
                assert np.array_equal(value, b[name]), name


def resume_case(dist, config, root):
    engine, plan = make_engine(dist, config)
    train(engine, plan, dist, 0, 2)
    save_step(engine, dist, root, 2)
    results = train(engine, plan, dist, 2, 4)
    whole = (results, weights(engine), local_state(engine))
    fresh, _ = make_engine(dist, config, seed=1)
    with Checkpoint.open(root / "step_00000002") as checkpoint:
        fresh.load(checkpoint, checkpoint.state)
    results = train(fresh, plan, dist, 2, 4)
    return whole, (results, weights(fresh), local_state(fresh))


def local_state(engine):
    return {f"{f.kind}/{f.name}@{f.start}": f.data.numpy().copy() for f in engine.local_fragments()}


def save_step(engine, dist, root, step):
    from swin_scale.engine.saving import save

    return save(root, engine, dist, step=step, state={"step": step}, config_text="", model={"name": "m"}, keep=3)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_save_makes_no_tensor_collective_and_copies_nothing(tmp_path, stage):
    """During a save no collective is called, and the rank's memory rises by at most 1.1 times its own shard."""
    model = {"embed_dim": 224, "num_heads": [7, 14]}
    config = make_config(engine={"zero_stage": stage}, optim={"ema_decay": 0.9}, model=model)
    for calls, extra, shard in spawn_dist(2, save_cost_case, config, tmp_path):
        assert calls == []
        assert shard > 50e6
        assert extra < 1.1 * shard


def save_cost_case(dist, config, root):
    import torch.distributed as td

    engine, plan = make_engine(dist, config)
    train(engine, plan, dist, 0, 1)
    shard = sum(f.data.numel() * f.data.element_size() for f in engine.local_fragments())
    calls = []
    names = ["all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "reduce_scatter_tensor"]
    names += ["broadcast", "reduce", "gather", "gather_object", "scatter", "all_to_all", "all_to_all_single", "barrier"]
    names += ["reduce_scatter", "broadcast_object_list", "send", "recv"]
    originals = {name: getattr(td, name) for name in names}
    for name, original in originals.items():
        setattr(td, name, lambda *a, _name=name, _o=original, **k: (calls.append(_name), _o(*a, **k))[1])
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        before = memory("VmRSS")
        save_step(engine, dist, root, 1)
        extra = memory("VmHWM") - before
    finally:
        for name, original in originals.items():
            setattr(td, name, original)
    return calls, extra, shard


def memory(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def test_moving_average_is_the_textbook_one_on_every_layout():
    for world, config in [(1, make_config(optim={"ema_decay": 0.5})), (2, make_config(optim={"ema_decay": 0.5}))]:
        for expected, averaged, before, after in spawn_dist(world, ema_case, config):
            for name, value in averaged.items():
                np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-7)
                assert np.array_equal(before[name], after[name]), name
            assert any(not np.array_equal(averaged[name], before[name]) for name in before)


def ema_case(dist, config):
    engine, plan = make_engine(dist, config)
    expected = weights(engine)
    for step in range(3):
        train(engine, plan, dist, step, step + 1)
        expected = {name: expected[name] * 0.5 + value * 0.5 for name, value in weights(engine).items()}
    before = weights(engine)
    with engine.evaluating(ema=True):
        averaged = weights(engine)
    return expected, averaged, before, weights(engine)


def test_an_error_of_one_rank_in_an_evaluation_waits_for_nobody():
    config = make_config(engine={"zero_stage": 1}, optim={"ema_decay": 0.5})
    assert spawn_dist(2, broken_evaluation_case, config) == ["a shard is gone", "the other is gone"]


def broken_evaluation_case(dist, config):
    engine, _ = make_engine(dist, config)
    try:
        with engine.evaluating(ema=True):
            if dist.is_main:
                raise DataError("a shard is gone")
            dist.store.wait(["left"], timedelta(seconds=50))  # a rank that does not meet the others for a while
            raise DataError("the other is gone")
    except DataError as error:
        dist.store.set("left", "")
        return str(error)


def test_noise_seed_has_no_collisions_nearby():
    from swin_scale.engine.engine import noise_seed

    seeds = {noise_seed(s, t, m, r) for s in range(4) for t in range(50) for m in range(4) for r in range(8)}
    assert len(seeds) == 4 * 50 * 4 * 8
    assert all(0 <= seed < 1 << 63 for seed in seeds)

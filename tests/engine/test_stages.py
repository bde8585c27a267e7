"""Every ZeRO stage is the same run: initial values, losses, evaluation, hand-overs between any two layouts."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from swin_scale.checkpoint import Checkpoint
from tests.engine import test_engine
from tests.engine.test_engine import (
    local_state,
    make_config,
    make_engine,
    memory,
    proof,
    run_steps,
    save_step,
    skip_case,
    train,
    weights,
)
from tests.spawn import spawn_dist

NOISY = {"optim": {"ema_decay": 0.9}, "model": {"drop_path_rate": 0.3}, "train": {"micro_batch": 3}}
V1 = "swin_nano_patch4_window4_32"
V2 = "swinv2_nano_patch4_window4_32"
MLP = "swin_mlp_nano_patch4_window4_32"


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize(
    ("name", "precision"), [(V1, "fp32"), (V2, "bf16"), proof(V1, "bf16"), proof(V2, "fp32"), proof(MLP, "fp32")]
)
def test_the_same_seed_gives_the_same_initial_values(name, precision):
    """Cut over 3 ranks as they are drawn, or drawn whole: bit for bit."""
    sharded = make_config(engine={"zero_stage": 3, "precision": precision}, model={"name": name})
    whole = make_config(engine={"zero_stage": 1, "precision": precision}, model={"name": name})
    [[expected, _]] = spawn_dist(1, initial_case, whole)
    for values, buffers in spawn_dist(3, initial_case, sharded):
        assert equal(values, expected)
        assert not any(buffers)


def initial_case(dist, config):
    engine, _ = make_engine(dist, config, seed=5)
    return weights(engine), [b.is_meta for b in engine.module.buffers()]


@pytest.mark.parametrize("half", [4, proof(10)])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_halves_are_the_whole(tmp_path, stage, half):
    """One layout, with moving average, drop-path and two micro-batches a step: bit for bit, through files."""
    config = make_config(engine={"zero_stage": stage}, **NOISY)
    for whole, resumed in spawn_dist(2, halves_case, config, tmp_path, half, timeout=300):
        assert whole[0] == resumed[0]
        assert equal(whole[1], resumed[1])
        assert equal(whole[2], resumed[2])


def halves_case(dist, config, root, half):
    engine, plan = make_engine(dist, config)
    train(engine, plan, dist, 0, half)
    save_step(engine, dist, root, half)
    whole = (train(engine, plan, dist, half, 2 * half), weights(engine), local_state(engine))
    fresh, _ = make_engine(dist, config, seed=1)
    with Checkpoint.open(root / f"step_{half:08d}") as checkpoint:
        fresh.load(checkpoint, checkpoint.state)
    return whole, (train(fresh, plan, dist, half, 2 * half), weights(fresh), local_state(fresh))


def layout(stage, world):
    return make_config(engine={"zero_stage": stage}, optim={"ema_decay": 0.9}), world


CHAIN = [layout(0, 2), layout(3, 3), layout(1, 2), layout(2, 1), layout(0, 1)]
LONG_CHAIN = [layout(0, 1), layout(3, 2), layout(1, 4), layout(3, 3), layout(2, 2), layout(0, 3), layout(3, 1)]
"""Every stage hands over to another and takes over from another; 3 ranks leave a padded last part."""


@pytest.mark.parametrize(("chain", "leg"), [(CHAIN, 2), proof(LONG_CHAIN, 8)], ids=["short", "long"])
def test_a_run_follows_one_trajectory_through_every_layout(tmp_path, chain, leg):
    """At each hand-over masters, moments and averages are bit-equal after gather; the run never leaves its course."""
    course, expected = spawn_dist(1, run_steps, layout(1, 1)[0], leg * len(chain), {})[0]
    losses = []
    for i, (config, world) in enumerate(chain):
        results = spawn_dist(world, leg_case, config, tmp_path, leg * i, leg * (i + 1))
        losses += results[0]
        if i:
            hand_over(tmp_path, leg * i)
    for (loss, norm, *_), (expected_loss, expected_norm, *_) in zip(losses, course, strict=True):
        assert loss == pytest.approx(expected_loss, abs=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-3)
    with Checkpoint.open(tmp_path / f"step_{leg * len(chain):08d}") as checkpoint:
        assert checkpoint.state["optimizer_step"] == leg * len(chain)
        for name, value in checkpoint.load_full().items():
            np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-5)


def leg_case(dist, config, root, first, last):
    """Take over at `first`, save again at once, train to `last`, save."""
    engine, plan = make_engine(dist, config, seed=first)
    if first:
        with Checkpoint.open(root / f"step_{first:08d}") as checkpoint:
            engine.load(checkpoint, checkpoint.state)
        save_step(engine, dist, root / "again", first)
    results = train(engine, plan, dist, first, last)
    save_step(engine, dist, root, last)
    return results


def hand_over(root, step):
    """What was loaded and saved again equals what was saved before, bit for bit."""
    name = f"step_{step:08d}"
    with Checkpoint.open(root / name) as before, Checkpoint.open(root / "again" / name) as after:
        assert before.kinds() == after.kinds() == ("master", "ema", "exp_avg", "exp_avg_sq")
        assert before.state["optimizer_step"] == after.state["optimizer_step"] == step
        for kind in before.kinds():
            ours, theirs = before.load_full(kind), after.load_full(kind)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(value, theirs[n]) for n, value in ours.items()), kind


STAGES = range(4)


@pytest.mark.proof
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_stage_reads_every_other_on_other_ranks(tmp_path, world):
    """Each of 16 layouts saves; every stage, on another number of ranks each, loads it bit-equal and goes on as it."""
    expected = spawn_dist(world, every_stage_saves_case, tmp_path, timeout=240)[0]
    for reader in STAGES:
        ranks = 1 + (world + reader) % 4
        for losses in spawn_dist(ranks, takes_over_from_all_case, reader, tmp_path, timeout=240):
            assert losses == [pytest.approx(course, abs=1e-5) for course in expected]
        for stage in STAGES:
            places = (tmp_path / str(stage), tmp_path / str(stage) / f"by{reader}")
            before, after = (Checkpoint.open(place / "step_00000003") for place in places)
            with before, after:
                for kind in before.kinds():
                    ours, theirs = before.load_full(kind), after.load_full(kind)
                    assert all(torch.equal(v, theirs[n]) for n, v in ours.items()), (kind, stage, reader, ranks)


def every_stage_saves_case(dist, root):
    return [save_and_go_on_case(dist, layout(stage, dist.world)[0], root / str(stage)) for stage in STAGES]


def takes_over_from_all_case(dist, reader, root):
    config, _ = layout(reader, dist.world)
    return [take_over_case(dist, config, root / str(stage), f"by{reader}") for stage in STAGES]


def save_and_go_on_case(dist, config, root):
    engine, plan = make_engine(dist, config)
    train(engine, plan, dist, 0, 3)
    save_step(engine, dist, root, 3)
    return [loss for loss, *_ in train(engine, plan, dist, 3, 6)]


def take_over_case(dist, config, root, name):
    engine, plan = make_engine(dist, config, seed=1)
    with Checkpoint.open(root / "step_00000003") as checkpoint:
        engine.load(checkpoint, checkpoint.state)
    save_step(engine, dist, root / name, 3)
    return [loss for loss, *_ in train(engine, plan, dist, 3, 6)]


@pytest.mark.parametrize(("before", "after"), [((3, 3), (2, 2)), proof((1, 2), (3, 3))], ids=str)
def test_loss_scale_is_handed_over(tmp_path, before, after):
    """fp16 halved its scale once before the save: the next stage goes on from there, and counts its updates on."""
    config = make_config(engine={"zero_stage": before[0], "precision": "fp16"})
    spawn_dist(before[1], halve_case, config, tmp_path)
    config = make_config(engine={"zero_stage": after[0], "precision": "fp16"})
    for scales, state, saved in spawn_dist(after[1], scale_case, config, tmp_path):
        assert scales == [32768.0, 32768.0]
        assert state == saved


def halve_case(dist, config, root):
    engine, plan = make_engine(dist, config)
    train(engine, plan, dist, 0, 3, poison=(1, 0))
    save_step(engine, dist, root, 3)


def scale_case(dist, config, root):
    engine, plan = make_engine(dist, config, seed=1)
    with Checkpoint.open(root / "step_00000003") as checkpoint:
        engine.load(checkpoint, checkpoint.state)
        saved = {key: checkpoint.state[key] for key in ("optimizer_step", "loss_scaler")}
    state = engine.state()
    return [scale for *_, scale in train(engine, plan, dist, 3, 5)], state, saved


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_checkpoint_before_the_first_applied_update_resumes(tmp_path, stage):
    """The only step so far was skipped, so the optimizer has made no state yet."""
    config = make_config(engine={"zero_stage": stage})
    for first, resumed in spawn_dist(2, skipped_case, config, tmp_path):
        assert first == resumed


def skipped_case(dist, config, root):
    engine, plan = make_engine(dist, config)
    [(_, _, skipped, _)] = train(engine, plan, dist, 0, 1, poison=(0, 0))
    assert skipped
    save_step(engine, dist, root, 1)
    fresh, _ = make_engine(dist, config, seed=1)
    with Checkpoint.open(root / "step_00000001") as checkpoint:
        fresh.load(checkpoint, checkpoint.state)
    return train(engine, plan, dist, 1, 3), train(fresh, plan, dist, 1, 3)


@pytest.mark.parametrize(("stage", "name"), [(0, V2), (3, V1), (3, V2), proof(0, V1), proof(3, MLP)])
def test_evaluation_sees_the_masters_or_their_average(stage, name):
    """Before any training and between steps, with and without the average; training then goes on as if nothing was.

    Under ZeRO-3 nothing stays gathered here, V1's bias table included, which is read outside its module's forward.
    """
    config = make_config(engine={"zero_stage": stage}, optim={"ema_decay": 0.5}, model={"name": name})
    reference = make_config(engine={"zero_stage": 1}, optim={"ema_decay": 0.5}, model={"name": name})
    [expected] = spawn_dist(1, evaluation_case, reference)
    for outputs, undisturbed, losses in spawn_dist(2, evaluation_case, config):
        for output, value in zip(outputs, expected[0], strict=True):
            np.testing.assert_allclose(output, value, rtol=0, atol=1e-5)
        assert losses == undisturbed


def evaluation_case(dist, config):
    test_engine.RESIDENT = 0
    calm, plan = make_engine(dist, config)
    undisturbed = train(calm, plan, dist, 0, 4)
    engine, plan = make_engine(dist, config)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(9))
    outputs, losses = [], []
    for step in range(4):
        for ema in (False, True):
            with engine.evaluating(ema=ema) as module:
                outputs.append(module(images).numpy())
        losses += train(engine, plan, dist, step, step + 1)
    return outputs, undisturbed, losses


@pytest.mark.parametrize(
    ("name", "mode"),
    [(V1, "selective"), (V2, "block"), proof(V1, "block"), proof(V2, "selective"), proof(MLP, "selective")],
)
def test_activation_checkpointing_changes_no_bit_under_zero_3(name, mode):
    """Recomputation gathers what it needs, attention kept or not."""
    noise = {"model": {"name": name, "drop_path_rate": 0.3}, "train": {"micro_batch": 3}}
    [off, *_] = spawn_dist(2, run_steps, make_config(engine={"zero_stage": 3}, **noise), 3, {})
    settings = {"zero_stage": 3, "activation_checkpointing": mode}
    for results, parameters in spawn_dist(2, run_steps, make_config(engine=settings, **noise), 3, {}):
        assert results == off[0]
        assert equal(parameters, off[1])


@pytest.mark.parametrize(
    ("stage", "precision"), [(1, "bf16"), (3, "fp32"), proof(1, "fp32"), proof(2, "fp16"), proof(3, "bf16")]
)
def test_offloaded_state_gives_the_same_run(tmp_path, stage, precision):
    """The same losses (the norm is summed in another order); saved with offload, resumed without it, and on."""
    options = {"optim": {"ema_decay": 0.9}, "train": {"micro_batch": 3 if precision == "fp32" else "auto"}}
    plain = make_config(engine={"zero_stage": stage, "precision": precision}, **options)
    offloaded = dataclasses.replace(plain, engine=dataclasses.replace(plain.engine, offload="optimizer"))
    tolerance = {"fp32": 1e-6, "bf16": 1e-3, "fp16": 1e-3}[precision]
    expected = spawn_dist(2, save_and_go_on_case, plain, tmp_path / "plain")[0]
    for losses in spawn_dist(2, save_and_go_on_case, offloaded, tmp_path / "off"):
        assert losses == pytest.approx(expected, abs=tolerance)
    for losses in spawn_dist(2, take_over_case, plain, tmp_path / "off", "again"):
        assert losses == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("stage", [1, 3])
def test_offloaded_optimizer_skips_non_finite_steps(stage):
    config = make_config(engine={"zero_stage": stage, "offload": "optimizer"})
    for offloads, (before, after, results) in spawn_dist(2, offload_case, config):
        assert offloads
        assert [skipped for _, _, skipped, _ in results] == [False, True, False]
        assert equal(before, after)


def offload_case(dist, config):
    engine, _ = make_engine(dist, config)
    return engine._deepspeed.zero_cpu_offload(), skip_case(dist, config)


def test_a_zero_3_checkpoint_converts_to_one_file(tmp_path):
    """Written by three ranks with padded parts; the file holds the gathered parameters in their full shapes."""
    expected = spawn_dist(3, save_weights_case, layout(3, 3)[0], tmp_path)[0]
    from safetensors.torch import load_file

    from swin_scale.convert import convert

    convert(tmp_path / "step_00000002", tmp_path / "w.safetensors", to="safetensors")
    found = load_file(tmp_path / "w.safetensors")
    assert equal({name: value.numpy() for name, value in found.items()}, expected)


def save_weights_case(dist, config, root):
    engine, plan = make_engine(dist, config)
    train(engine, plan, dist, 0, 2)
    save_step(engine, dist, root, 2)
    return weights(engine)


MIDDLE = {"name": V2, "embed_dim": 256, "num_heads": [8, 16], "depths": [2, 16]}
"""53 million parameters: 211 MB in fp32."""


def test_no_rank_ever_holds_the_whole_model():
    """Wrapped for ZeRO-3 on 4 ranks: parameters arrive one by one; then DeepSpeed keeps a few copies of the shard."""
    config = make_config(engine={"zero_stage": 3, "bucket_mb": 1}, model=MIDDLE)
    for full, filled, wrapped in spawn_dist(4, construction_case, config):
        assert full > 200e6
        assert filled < 0.4 * full
        # Partition, its defragmented copy, master, gradients: all of a rank's share.
        assert wrapped < 5 * full / 4


def construction_case(dist, config):
    import ctypes

    from swin_scale.engine import engine as module

    # glibc would keep what is freed for the next allocation of that size; here, what is in use is wanted.
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    figures = []
    materialize = module.materialize

    def measured(*args, **options):
        base = reset_peak()
        materialize(*args, **options)
        figures.append(memory("VmHWM") - base)

    module.materialize = measured
    base = reset_peak()
    engine, _ = make_engine(dist, config)
    figures.append(max(memory("VmHWM") - base, figures[0]))
    full = 4 * sum(int(np.prod(engine.fragments.shape(p))) for p in engine.module.parameters())
    return full, *figures


def reset_peak():
    """The high-water mark starts again from what is in use."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")

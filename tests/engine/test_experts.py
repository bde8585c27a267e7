"""Experts spread over real gloo processes follow the run on one process: losses, norms, skips, checkpoints."""

import dataclasses

import numpy as np
import pytest
import torch

from swin_scale.checkpoint import Checkpoint
from swin_scale.config import batch_plan
from swin_scale.job import MOE_FIELDS
from swin_scale.moe.stats import collect
from tests.engine.test_engine import allow_fp16_on_cpu, batch_of, local_state, make_config, save_step, train, weights
from tests.engine.test_stages import hand_over
from tests.spawn import spawn_dist

V1 = "swin_moe_nano_patch4_window4_32"
V2 = "swinv2_moe_nano_patch4_window4_32"
EXACT = {"capacity_factor": 0.0, "gate_noise": 0.0, "drop": 0.0, "aux_weight": 0.1, "z_weight": 0.01}
"""Nothing is drawn and nothing is dropped, so that a layout changes nothing but the order of sums."""
GRID = [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)]
"""(ranks, EP)."""
NOISY = {"gate_noise": 1.0, "drop": 0.1, "capacity_factor": 1.25}
BINDS, OFF = 0.05, 0.0
EXPERTS = "._moe_layer.experts."


def proof(*values):
    return pytest.param(*values, marks=pytest.mark.proof)


def moe_config(ep=1, stage=1, *, precision="fp32", moe=EXACT, **sections):
    sections["model"] = {"name": V1, **sections.get("model", {})}
    return make_config(moe={**moe, "ep_size": ep}, engine={"zero_stage": stage, "precision": precision}, **sections)


def make_engine(dist, config, seed=0):
    from swin_scale.engine.engine import Engine
    from swin_scale.engine.experts import ExpertParallel
    from swin_scale.engine.schedule import Schedule
    from swin_scale.models import create_model
    from swin_scale.models.init import initial_values
    from swin_scale.tasks.classify import losses

    allow_fp16_on_cpu()
    plan = batch_plan(config, dist.world)
    overrides = {k: v for k, v in dataclasses.asdict(config.model).items() if k != "name" and v is not None}
    given = {name: getattr(config.moe, key) for key, name in MOE_FIELDS.items()}
    overrides["moe"] = {name: value for name, value in given.items() if value is not None}
    overrides["activation_checkpointing"] = config.engine.activation_checkpointing
    experts = ExpertParallel.create(dist, config.moe)
    with torch.device("meta" if config.engine.zero_stage == 3 else "cpu"):
        model = create_model(config.model.name, seed=seed, **experts.model_options(), **overrides)
    values = initial_values(model, seed) if config.engine.zero_stage == 3 else None
    return Engine(model, config, plan, Schedule.from_config(config, 10), dist, values, experts, losses=losses), plan


def gathered(shares, ep):
    """Parameters of the whole model from those of every rank; ranks that hold the same hold the same bits."""
    for rank, share in enumerate(shares):
        for name, value in share.items():
            twin = shares[rank % ep if EXPERTS in name else 0][name]
            assert np.array_equal(value, twin), f"{name} of rank {rank} differs from its copy"
    return {
        name: np.concatenate([share[name] for share in shares[:ep]]) if EXPERTS in name else value
        for name, value in shares[0].items()
    }


def steps_case(dist, config, steps, options):
    engine, plan = make_engine(dist, config)
    return train(engine, plan, dist, 0, steps, **options), weights(engine)


def run(ranks, config, steps, **options):
    """Results, the same on all ranks, and gathered parameters."""
    results, shares = zip(*spawn_dist(ranks, steps_case, config, steps, options, timeout=300))
    assert all(result == results[0] for result in results), "ranks report different losses, norms or skips"
    return results[0], gathered(shares, config.moe.ep_size)


def assert_same(found, expected, tolerance=1e-5):
    for (loss, norm, *_), (expected_loss, expected_norm, *_) in zip(found[0], expected[0], strict=True):
        assert loss == pytest.approx(expected_loss, abs=tolerance)
        assert norm == pytest.approx(expected_norm, rel=10 * tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        np.testing.assert_allclose(found[1][name], value, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(
    ("clip", "steps", "layouts"),
    [
        (BINDS, 5, [(2, 2, 1), (4, 2, 2)]),
        *(proof(clip, 20, [(*g, s) for g in GRID for s in (1, 2)]) for clip in (BINDS, OFF)),
    ],
    ids=["thinned", "clipped", "unclipped"],
)
def test_every_layout_follows_the_run_on_one_process(clip, steps, layouts):
    """The reference is one process with torch's own optimizer and clipping."""
    optim = {"clip_grad": clip}
    expected = run(1, moe_config(1, 0, optim=optim), steps)
    assert all(norm > clip for _, norm, *_ in expected[0]), "clipping does not bind"
    for ranks, ep, stage in layouts:
        assert_same(run(ranks, moe_config(ep, stage, optim=optim), steps), expected)


@pytest.mark.parametrize("ep", [2, proof(1)])
def test_balance_is_judged_per_micro_batch_and_rank_alike(ep):
    """Two micro-batches on one rank, or one on each of two that judge their own tokens: the same mean, in the loss."""
    once = run(1, moe_config(train={"micro_batch": 6}), 3)
    assert_same(run(2, moe_config(ep, 2, moe={**EXACT, "aux_scope": "rank"}), 3), once)


def figures_case(dist, config, options):
    engine, plan = make_engine(dist, config)
    micros, valid = batch_of(0, plan, dist, engine, **options)
    result = engine.train_step(0, micros, valid)
    layers = {}
    for name, tally in result.routing.layers.items():
        sums = collect([tally])[0][0].tolist()
        layers[name] = sums[0], sums[5 : 5 + tally.num_experts]
    return float(result.loss), float(result.aux_loss), layers


def test_loss_is_told_without_the_auxiliary_loss_and_routing_by_layer():
    """`aux_loss` is weighted, and the same on all ranks and layouts; a rank routes its own tokens, empty slots too."""
    options = {"invalid": (6, 7, 8, 9, 10, 11)}
    [(loss, aux, whole)] = spawn_dist(1, figures_case, moe_config(), options)
    [(same, more, _)] = spawn_dist(
        1, figures_case, moe_config(moe={**EXACT, "aux_weight": 0.2, "z_weight": 0.02}), options
    )
    assert (same, more) == (loss, pytest.approx(2 * aux, rel=1e-5))
    shares = spawn_dist(2, figures_case, moe_config(2), options)
    for found, found_aux, layers in shares:
        assert (found, found_aux) == (pytest.approx(loss, abs=1e-6), pytest.approx(aux, abs=1e-6))
        assert list(layers) == ["layers.0.blocks.1", "layers.1.blocks.1"]
        assert [tokens for tokens, _ in layers.values()] == [6 * 64, 6 * 16]
    for name, (_, routed) in whole.items():
        assert routed == [sum(pair) for pair in zip(*(share[2][name][1] for share in shares))]


@pytest.mark.parametrize("stage", [1, proof(2)])
def test_a_rank_whose_slots_are_all_empty_still_serves_its_experts(stage):
    """Weightless samples are routed, or the others would wait; they change nothing."""
    options = {"invalid": tuple(range(6, 12))}
    assert_same(run(2, moe_config(2, stage), 3, **options), run(1, moe_config(), 3, **options))


@pytest.mark.parametrize(
    ("ranks", "ep", "stage", "precision", "micro"),
    [
        (4, 2, 2, "fp16", "auto"),
        proof(2, 2, 1, "fp16", "auto"),
        (2, 2, 1, "bf16", 3),
        proof(2, 2, 1, "fp32", "auto"),
        proof(4, 4, 2, "bf16", "auto"),
        proof(2, 2, 2, "fp16", 3),
        proof(1, 1, 3, "fp16", "auto"),
    ],
)
def test_a_non_finite_step_is_skipped_by_all_ranks(ranks, ep, stage, precision, micro):
    """One rank's infinite pixel reaches the experts of all: none moves, the loss scale halves, training goes on."""
    config = moe_config(ep, stage, precision=precision, train={"micro_batch": micro})
    for before, after, results in spawn_dist(ranks, skip_case, config):
        assert [skipped for _, _, skipped, _ in results] == [False, True, False]
        assert results[1][1] == np.inf
        scales = [scale for *_, scale in results]
        assert scales == ([65536.0, 65536.0, 32768.0] if precision == "fp16" else [1.0, 1.0, 1.0])
        assert all(np.array_equal(value, after[name]) for name, value in before.items())


def skip_case(dist, config):
    engine, plan = make_engine(dist, config)
    results = train(engine, plan, dist, 0, 1, poison=(1, 0))
    before = weights(engine)
    results += train(engine, plan, dist, 1, 2, poison=(1, 0))
    after = weights(engine)
    return before, after, results + train(engine, plan, dist, 2, 3)


@pytest.mark.parametrize(
    ("stage", "precision", "micro"),
    [(1, "bf16", 3), proof(1, "bf16", "auto"), proof(2, "bf16", "auto"), proof(2, "fp16", 3)],
)
def test_lower_precision_follows_its_run_without_spread_experts(stage, precision, micro):
    """(1, bf16, 3) is DeepSpeed's own optimizer for gradients accumulated in fp32."""
    options = {"precision": precision, "train": {"micro_batch": micro}, "optim": {"clip_grad": BINDS}}
    expected, _ = run(2, moe_config(1, stage, **options), 3)
    found, _ = run(2, moe_config(2, stage, **options), 3)
    for (loss, norm, *_), (expected_loss, expected_norm, *_) in zip(found, expected, strict=True):
        assert loss == pytest.approx(expected_loss, abs=2e-3)
        assert norm == pytest.approx(expected_norm, rel=2e-2)


@pytest.mark.proof
@pytest.mark.parametrize("stage", [1, 2])
def test_offloaded_experts_follow_the_same_run(stage):
    config = moe_config(2, stage, optim={"clip_grad": BINDS})
    offloaded = dataclasses.replace(config, engine=dataclasses.replace(config.engine, offload="optimizer"))
    assert_same(run(2, offloaded, 3), run(2, config, 3))


@pytest.mark.parametrize("name", [V1, proof(V2)])
def test_zero_3_trains_a_mixture_that_every_rank_has_whole(name):
    """Built on the meta device, cut over three ranks; gates and norms are read outside of their own modules."""
    model = {"model": {"name": name}}
    assert_same(spawn_dist(3, steps_case, moe_config(1, 3, **model), 3, {})[0], run(1, moe_config(1, 0, **model), 3))


@pytest.mark.parametrize(("name", "mode"), [(V1, "block"), proof(V2, "block"), proof(V1, "selective")])
def test_recomputed_blocks_route_as_before(name, mode):
    """Noise, dropout, drop-path and tokens on their way to other ranks: activation checkpointing changes no bit."""
    sections = {"model": {"name": name, "drop_path_rate": 0.3}, "train": {"micro_batch": 3}}
    config = moe_config(2, moe=NOISY, **sections)
    recomputed = dataclasses.replace(config, engine=dataclasses.replace(config.engine, activation_checkpointing=mode))
    (results, off), (again, on) = run(2, config, 3), run(2, recomputed, 3)
    assert results == again
    assert all(np.array_equal(value, on[key]) for key, value in off.items())


# -- checkpoints and evaluation ----------------------------------------------------------------------------------------

CHAIN = [(4, 4, 1), (1, 1, 0), (2, 2, 2)]
LONG_CHAIN = [*CHAIN, (4, 4, 2), (3, 1, 3), (4, 2, 1), (2, 1, 1), (4, 2, 2), (1, 1, 3), (2, 2, 1)]
"""(ranks, EP, ZeRO stage)."""


@pytest.mark.parametrize(("chain", "leg"), [(CHAIN, 2), proof(LONG_CHAIN, 5)], ids=["short", "long"])
def test_a_run_moves_between_expert_layouts(tmp_path, chain, leg):
    """At each hand-over masters, moments and averages are bit-equal after gather; the run never leaves its course."""
    optim = {"ema_decay": 0.9, "clip_grad": BINDS}
    course, expected = run(1, moe_config(1, 1, optim=optim), leg * len(chain))
    losses = []
    for i, (ranks, ep, stage) in enumerate(chain):
        config = moe_config(ep, stage, optim=optim)
        losses += spawn_dist(ranks, leg_case, config, tmp_path, leg * i, leg * (i + 1))[0]
        if i:
            hand_over(tmp_path, leg * i)
    for (loss, norm, *_), (expected_loss, expected_norm, *_) in zip(losses, course, strict=True):
        assert loss == pytest.approx(expected_loss, abs=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-3)
    with Checkpoint.open(tmp_path / f"step_{leg * len(chain):08d}") as checkpoint:
        for name, value in checkpoint.load_full().items():
            np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-5)


def leg_case(dist, config, root, first, last):
    engine, plan = make_engine(dist, config, seed=first)
    if first:
        with Checkpoint.open(root / f"step_{first:08d}") as checkpoint:
            engine.load(checkpoint, checkpoint.state)
        save_step(engine, dist, root / "again", first)
    results = train(engine, plan, dist, first, last)
    save_step(engine, dist, root, last)
    return results


@pytest.mark.parametrize("half", [3, proof(10)])
@pytest.mark.parametrize(("ranks", "ep", "stage"), [(2, 2, 1), proof(4, 2, 2)])
def test_two_halves_are_the_whole(tmp_path, ranks, ep, stage, half):
    """Noise, dropout, drop-path, capacity, moving average, two micro-batches a step: bit for bit, through files."""
    sections = {"optim": {"ema_decay": 0.9}, "model": {"drop_path_rate": 0.3}}
    micro = {"train": {"micro_batch": 12 // ranks // 2 if ranks == 2 else 1}}
    config = moe_config(ep, stage, moe=NOISY, **sections, **micro)
    for whole, resumed in spawn_dist(ranks, halves_case, config, tmp_path, half, timeout=300):
        assert whole[0] == resumed[0]
        for ours, theirs in zip(whole[1:], resumed[1:], strict=True):
            assert ours.keys() == theirs.keys()
            assert all(np.array_equal(value, theirs[name]) for name, value in ours.items())


def halves_case(dist, config, root, half):
    engine, plan = make_engine(dist, config)
    train(engine, plan, dist, 0, half)
    save_step(engine, dist, root, half)
    whole = (train(engine, plan, dist, half, 2 * half), weights(engine), local_state(engine))
    fresh, _ = make_engine(dist, config, seed=1)
    with Checkpoint.open(root / f"step_{half:08d}") as checkpoint:
        fresh.load(checkpoint, checkpoint.state)
    return whole, (train(fresh, plan, dist, half, 2 * half), weights(fresh), local_state(fresh))


@pytest.mark.parametrize(("ranks", "ep", "stage"), [(2, 2, 1), proof(4, 2, 2), proof(2, 1, 3)])
def test_evaluation_sees_masters_or_their_average_whatever_each_rank_shows(ranks, ep, stage):
    """Ranks evaluate different numbers of images with shared experts; training then goes on as if nothing was."""
    config = moe_config(ep, stage, optim={"ema_decay": 0.5})
    [(expected, _)] = spawn_dist(1, evaluation_case, moe_config(optim={"ema_decay": 0.5}))
    undisturbed = spawn_dist(ranks, steps_case, config, 3, {})[0][0]
    for rank, (outputs, losses) in enumerate(spawn_dist(ranks, evaluation_case, config)):
        for output, value in zip(outputs, expected, strict=True):
            np.testing.assert_allclose(output, value[: rank + 2], rtol=0, atol=1e-5)
        assert losses == undisturbed


def evaluation_case(dist, config):
    engine, plan = make_engine(dist, config)
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(9))
    outputs, losses = [], []
    for step in range(3):
        for ema in (False, True):
            with engine.evaluating(ema=ema) as module:
                shown = images if dist.world == 1 else images[: dist.rank + 2]
                outputs.append(module(shown)[0].numpy())
        losses += train(engine, plan, dist, step, step + 1)
    return outputs, losses


def test_initial_weights_from_a_file_reach_the_experts_of_every_rank(tmp_path):
    from swin_scale.models import create_model

    model = create_model(V1, seed=5, num_classes=10)
    torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
    shares = spawn_dist(4, from_file_case, moe_config(2), str(tmp_path / "w.pth"))
    found = gathered(shares, 2)
    for name, value in model.named_parameters():
        assert np.array_equal(found[name], value.detach().numpy()), name


def from_file_case(dist, config, path):
    from swin_scale.engine.construct import build_model
    from swin_scale.engine.experts import ExpertParallel

    experts = ExpertParallel.create(dist, config.moe)
    model, _ = build_model(config, dist, {"num_classes": 10}, path, experts)
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}

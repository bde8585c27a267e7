"""SimMIM under the engine: one gradient for any layout, experts, precisions, recomputation, and what ZeRO-3 gathers."""

import dataclasses

import numpy as np
import pytest
import torch

from swin_scale.config import batch_plan
from swin_scale.config_load import config_from_values
from swin_scale.data.masking import Masking
from swin_scale.job import MOE_FIELDS
from tests.engine.test_engine import BATCH, allow_fp16_on_cpu, weights
from tests.spawn import spawn_dist

V1, V2, MOE = (f"{family}_nano_patch4_window4_32" for family in ("swin", "swinv2", "swin_moe"))
EXACT_MOE = {"capacity_factor": 0.0, "gate_noise": 0.0, "drop": 0.0}
INVALID = (1, 6, 7)
STEPS = 4


def proof(*values):
    return pytest.param(*values, marks=pytest.mark.proof)


def make_config(name=V2, *, engine=None, train=None, **sections):
    values = {
        "run": {"dir": "r"},
        "task": "simmim",
        "data": {"train": ["d"], "img_size": 32},
        "model": {"name": name, "drop_path_rate": 0.0},
        "simmim": {"mask_patch_size": 8},
        # Adam divides by the size of gradients, of which some start as small as the rounding of a sum over ranks.
        "optim": {"lr": 1e-3, "clip_grad": 0.05, "eps": 1e-6},
        "schedule": {"warmup_steps": 2, "total_steps": 20},
        "train": {"global_batch": BATCH, **(train or {})},
        "engine": {"precision": "fp32", **(engine or {})},
    }
    return config_from_values({**values, **sections}).config


def make_engine(dist, config, resident=1):
    """An engine as a run would build it; `resident`: elements of parameters that ZeRO-3 does not cut."""
    from swin_scale.engine import ds_config
    from swin_scale.engine.construct import build_model
    from swin_scale.engine.engine import Engine
    from swin_scale.engine.experts import ExpertParallel
    from swin_scale.engine.schedule import Schedule
    from swin_scale.models import variant
    from swin_scale.tasks import MaskedImages

    allow_fp16_on_cpu()
    ds_config.STAGE3_RESIDENT_NUMEL = resident
    task = MaskedImages(config)
    overrides = {k: v for k, v in dataclasses.asdict(config.model).items() if k != "name" and v is not None}
    overrides |= {"num_classes": 0, "img_size": 32}
    experts = None
    if variant(config.model.name).moe is not None:
        given = {name: getattr(config.moe, key) for key, name in MOE_FIELDS.items()}
        overrides["moe"] = {name: value for name, value in given.items() if value is not None}
        experts = ExpertParallel.create(dist, config.moe)
    model, values = build_model(config, dist, overrides, experts=experts, create=task.create)
    plan = batch_plan(config, dist.world)
    schedule = Schedule.from_config(config, 10)
    return Engine(model, config, plan, schedule, dist, values, experts, losses=task.losses), task, plan


def images_of(step):
    """(images, masks, valid) of a fixed random global batch with empty slots."""
    images = torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(step))
    masking = Masking(ratio=0.6, cell=8, patch=4)
    masks = torch.stack([torch.from_numpy(masking.draw(32, 32, epoch=step, sample=i)) for i in range(BATCH)])
    return images, masks, torch.tensor([slot not in INVALID for slot in range(BATCH)])


def batch_of(step, plan, dist):
    """This rank's micro-batches of it, and its valid samples."""
    from swin_scale.engine.engine import MicroBatch

    images, masks, valid = images_of(step)
    first = dist.rank * plan.per_rank
    cuts = [slice(first + i * plan.micro, first + (i + 1) * plan.micro) for i in range(plan.accumulation)]
    micros = [MicroBatch(inputs=images[c], targets=masks[c], valid=valid[c]) for c in cuts]
    return micros, int(valid[first : first + plan.per_rank].sum())


def run_case(dist, config, steps=STEPS):
    """(loss, norm, skipped, aux) of each step; the parameters; what is drawn of images before all steps and after."""
    engine, _, plan = make_engine(dist, config)
    x, mask, _ = (part[:2] for part in images_of(99))
    # Before any step in which ZeRO-3 may have learnt what is read: a resumed run may have none left.
    with engine.evaluating() as module:
        before = module(x, mask, output="drawing")
    results = []
    for step in range(steps):
        r = engine.train_step(step, *batch_of(step, plan, dist))
        aux = None if r.aux_loss is None else float(r.aux_loss)
        results.append((float(r.loss), float(r.grad_norm), r.skipped, aux))
        assert bool(r.routing.layers) == (aux is not None)
    with engine.evaluating() as module:
        after = module(x, mask, output="drawing")
    return results, weights(engine), before.numpy(), after.numpy()


def assert_same(found, expected, atol=1e-5):
    for results, parameters, before, after in found:
        for (loss, norm, skipped, aux), (wanted, wanted_norm, _, wanted_aux) in zip(results, expected[0], strict=True):
            assert loss == pytest.approx(wanted, abs=atol) and not skipped
            assert norm == pytest.approx(wanted_norm, rel=1e-4)
            assert aux == (None if wanted_aux is None else pytest.approx(wanted_aux, abs=atol))
        for name, value in parameters.items():
            if value.shape == expected[1][name].shape:  # experts of other ranks are elsewhere
                np.testing.assert_allclose(value, expected[1][name], rtol=0, atol=10 * atol, err_msg=name)
        np.testing.assert_allclose(before, expected[2], rtol=0, atol=atol)
        np.testing.assert_allclose(after, expected[3], rtol=0, atol=20 * atol)


LAYOUTS = [
    (2, {"zero_stage": 3}, {"micro_batch": 2}),
    proof(1, {"zero_stage": 2}, {"micro_batch": 2}),
    proof(2, {"zero_stage": 0}, {"micro_batch": 3}),
    proof(3, {"zero_stage": 1}, {}),
    proof(3, {"zero_stage": 3}, {"micro_batch": 2}),
]


@pytest.fixture(scope="module")
def whole():
    """One process, one micro-batch: losses, norms, parameters, drawing."""
    return spawn_dist(1, run_case, make_config(model={"name": V2, "drop_path_rate": 0.0, "ape": True}))[0]


@pytest.mark.parametrize(("world", "engine", "train"), LAYOUTS)
def test_layouts_follow_the_same_gradients(whole, world, engine, train):
    """With a position embedding, which as the mask token belongs to the encoder, that is never called, and cut by
    ZeRO-3 down to the last parameter."""
    config = make_config(model={"name": V2, "drop_path_rate": 0.0, "ape": True}, engine=engine, train=train)
    assert_same(spawn_dist(world, run_case, config), whole)


def test_the_mean_is_over_usable_images_as_plain_torch_has_it(whole):
    """The first step is that of a model outside of any engine on the usable images alone."""
    from swin_scale.models import create_simmim

    model = create_simmim(V2, mask_patch_size=8, drop_path_rate=0.0, ape=True)
    x, mask, valid = images_of(0)
    loss = model(x[valid], mask[valid])
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert whole[0][0][0] == pytest.approx(loss.item(), abs=1e-6)
    assert whole[0][0][1] == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize(
    ("world", "ep", "stage"), [(2, 2, 1), proof(2, 2, 2), proof(4, 2, 1), proof(4, 4, 2), proof(2, 1, 3)]
)
def test_experts_spread_over_ranks_follow_the_same_gradients(world, ep, stage):
    """Losses, auxiliary ones too, which are judged over the same images: all ranks' one micro-batch."""
    alone = make_config(MOE, moe=EXACT_MOE)
    spread = make_config(MOE, moe={**EXACT_MOE, "ep_size": ep}, engine={"zero_stage": stage})
    assert_same(spawn_dist(world, run_case, spread), spawn_dist(1, run_case, alone)[0])


@pytest.mark.parametrize(
    ("precision", "stage", "tolerance"), [("bf16", 1, 0.02), proof("fp16", 1, 0.005), proof("bf16", 3, 0.02),
                                          proof("fp16", 3, 0.005)]
)  # fmt: skip
def test_half_precision_follows_fp32_with_targets_in_fp32(whole, precision, stage, tolerance):
    config = make_config(
        model={"name": V2, "drop_path_rate": 0.0, "ape": True}, engine={"precision": precision, "zero_stage": stage},
        train={"micro_batch": 3},
    )  # fmt: skip
    for results, _, drawn, _ in spawn_dist(2, run_case, config):
        losses, _, skipped, _ = zip(*results)
        assert losses == pytest.approx([row[0] for row in whole[0]], abs=tolerance)
        assert not any(skipped) and drawn.dtype == np.float32


@pytest.mark.parametrize("mode", [proof("block"), "selective"])
def test_recomputing_changes_no_bit(mode):
    plain, again = (
        spawn_dist(1, run_case, make_config(engine={"activation_checkpointing": how}), 2)[0] for how in ("off", mode)
    )
    assert plain[0] == again[0]
    assert all(np.array_equal(value, again[1][name]) for name, value in plain[1].items())

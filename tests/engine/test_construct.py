"""The model before it is wrapped: the same values on every layout, from a seed or from a file."""

import dataclasses

import pytest
import torch

from swin_scale.engine.construct import build_model
from swin_scale.errors import CheckpointError
from swin_scale.models import create_model
from swin_scale.tasks.classify import losses
from tests.engine.test_engine import CLASSES, allow_fp16_on_cpu, make_config, weights
from tests.spawn import spawn_dist

NAME = "swin_nano_patch4_window4_32"


def wrap(dist, config, path):
    from swin_scale.config import batch_plan
    from swin_scale.engine.engine import Engine
    from swin_scale.engine.schedule import Schedule

    allow_fp16_on_cpu()
    model, values = build_model(config, dist, {"num_classes": CLASSES}, path)
    meta = all(p.is_meta for p in model.parameters())
    schedule = Schedule.from_config(config, 10)
    engine = Engine(model, config, batch_plan(config, dist.world), schedule, dist, values, losses=losses)
    return meta, {name: torch.from_numpy(value) for name, value in weights(engine).items()}, engine.module.layers


def wrapped_case(dist, config, path):
    meta, parameters, layers = wrap(dist, config, path)
    block = layers[0].blocks[0]
    return meta, {k: v.numpy() for k, v in parameters.items()}, (block.activation_checkpointing, block.norm1.by)


@pytest.mark.parametrize("from_file", [False, True])
def test_zero_3_starts_from_the_same_values(tmp_path, from_file):
    """From the seed or from a file, cut over ranks or whole; the file is read by the first rank alone."""
    path = None
    expected = create_model(NAME, num_classes=CLASSES, seed=3).state_dict()
    if from_file:
        path = tmp_path / "weights.pth"
        expected = create_model(NAME, num_classes=CLASSES, seed=8).state_dict()
        torch.save({"model": expected}, path)
    settings = {"activation_checkpointing": "block", "layer_norm": "apex"}
    for stage, world in ((1, 1), (3, 2)):
        config = make_config(run={"seed": 3}, model={"name": NAME}, engine={"zero_stage": stage, **settings})
        for meta, parameters, block in spawn_dist(world, wrapped_case, config, path):
            assert meta == (stage == 3)
            assert block == ("block", "apex")
            assert parameters.keys() <= expected.keys()
            assert all(torch.equal(torch.from_numpy(value), expected[name]) for name, value in parameters.items())


@pytest.mark.parametrize("stage", [1, 3])
def test_weights_that_do_not_fit_end_all_ranks(tmp_path, stage):
    state = create_model(NAME, num_classes=CLASSES).state_dict()
    del state["norm.weight"]
    torch.save({"model": state}, tmp_path / "broken.pth")
    config = make_config(model={"name": NAME}, engine={"zero_stage": stage})
    for message in spawn_dist(2, refused_case, config, tmp_path / "broken.pth"):
        assert "norm.weight" in message


def refused_case(dist, config, path):
    with pytest.raises(CheckpointError) as error:
        build_model(config, dist, {"num_classes": CLASSES}, path)
    return str(error.value)


def test_frozen_parameters_stay_and_move_between_stages(tmp_path):
    """Not updated, saved once, and carried by the moving average; from stage 1 to 3 and back."""
    config = make_config(model={"name": NAME}, optim={"ema_decay": 0.5})
    previous = None
    for step, (stage, world) in enumerate([(1, 2), (3, 3), (0, 2), (2, 1)]):
        here = dataclasses.replace(config, engine=dataclasses.replace(config.engine, zero_stage=stage))
        for frozen in spawn_dist(world, frozen_case, here, tmp_path, step):
            assert previous is None or (frozen == previous).all()
        previous = frozen


def frozen_case(dist, config, root, step):
    from swin_scale.checkpoint import Checkpoint
    from swin_scale.config import batch_plan
    from swin_scale.engine.engine import Engine
    from swin_scale.engine.schedule import Schedule
    from tests.engine.test_engine import save_step, train

    seeded = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=step))
    model, values = build_model(seeded, dist, {"num_classes": CLASSES})
    model.patch_embed.proj.weight.requires_grad_(False)
    plan = batch_plan(config, dist.world)
    engine = Engine(model, seeded, plan, Schedule.from_config(config, 10), dist, values, losses=losses)
    if step:
        with Checkpoint.open(root / f"step_{step:08d}") as checkpoint:
            engine.load(checkpoint, checkpoint.state)
    train(engine, plan, dist, step, step + 1)
    save_step(engine, dist, root, step + 1)
    with engine.evaluating(ema=True):
        return weights(engine)["patch_embed.proj.weight"]

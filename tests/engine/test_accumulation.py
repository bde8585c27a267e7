"""One batch whole, or in four micro-batches: the same parameters after 20 updates, whatever is trained.

Gradients are clipped at every update, so that a code that clips micro-batches (the official SimMIM does, before it has
the whole gradient) is another training; and 300 images leave the last batch of an epoch with 12, which fill one
micro-batch, half of a second and none of the others, so that a mean of micro-batches' means is one too.
"""

import numpy as np
import pytest

from swin_scale.config_load import config_from_values
from tests.spawn import spawn_dist

STEPS, BATCH = 20, 32
CLIP = {"classify": 0.1, "simmim": 0.02}
OPTIMIZERS = {
    "adamw": ({"name": "adamw", "lr": 1e-3}, 1e-5),
    "sgd": ({"name": "sgd", "lr": 0.1}, 1e-6),
}
"""What is set of them, and how far parameters may be apart; those that move most move by 1e-2 and more."""


def settings(task, optimizer, train, micro):
    return {
        "run": {"dir": "unused", "seed": 3},
        "task": task,
        "data": {"train": [str(train)], "workers": 0},
        "augment": {"auto_augment": "none"},
        "model": {"name": "swinv2_nano_patch4_window4_32", "drop_path_rate": 0.0},
        **({"simmim": {"mask_patch_size": 8, "pictures": 0}} if task == "simmim" else {}),
        "optim": {**OPTIMIZERS[optimizer][0], "clip_grad": CLIP[task]},
        "schedule": {"warmup_steps": 2, "total_steps": STEPS},
        "train": {"global_batch": BATCH, "micro_batch": micro},
        "engine": {"precision": "fp32"},
    }


def updates(dist, values):
    """(gradient norms, parameters, how far the one that moved most moved) after the run's first steps."""
    from swin_scale.engine.construct import build_model
    from swin_scale.engine.engine import Engine
    from swin_scale.engine.schedule import Schedule
    from swin_scale.job import prepare

    job = prepare(config_from_values(values), dist.world)
    config, task = job.config, job.task
    model, _ = build_model(config, dist, job.model["overrides"], create=task.create)
    begun = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    schedule = Schedule.from_config(config, job.stream.steps_per_epoch)
    engine = Engine(model, config, job.plan, schedule, dist, losses=task.losses)
    norms = []
    with job.stream.batches(0, stop_step=STEPS, rank=dist.rank, world=dist.world, workers=0) as batches:
        for batch in batches:
            micro_batches = task.micro_batches(batch, job.plan, device=dist.device, dtype=engine.dtype)
            result = engine.train_step(batch.step, micro_batches, int(batch.valid.sum()))
            norms.append(float(result.grad_norm))
    assert job.plan.accumulation == BATCH // dist.world // job.plan.micro
    ended = {name: p.detach().numpy().copy() for name, p in engine.module.named_parameters()}
    return norms, ended, max(float(np.abs(ended[name] - begun[name]).max()) for name in begun)


def thinned(task, optimizer, world):
    marks = [] if (task, optimizer, world) in (("classify", "sgd", 1), ("simmim", "adamw", 1)) else [pytest.mark.proof]
    return pytest.param(task, optimizer, world, marks=marks)


@pytest.mark.parametrize(
    ("task", "optimizer", "world"),
    [thinned(t, o, world) for t in ("classify", "simmim") for o in ("adamw", "sgd") for world in (1, 2)],
)
def test_micro_batches_make_the_same_updates(digits, task, optimizer, world):
    tolerance = OPTIMIZERS[optimizer][1]
    [(norms, expected, moved)] = spawn_dist(1, updates, settings(task, optimizer, digits[0], BATCH), timeout=240)
    cut = spawn_dist(world, updates, settings(task, optimizer, digits[0], 8), timeout=240)
    assert min(norms) > CLIP[task], "clipping did not bind"
    assert moved > 8e-3
    worst = ("", 0.0)
    for found, parameters, _ in cut:
        np.testing.assert_allclose(found, norms, rtol=1e-3)
        assert parameters.keys() == expected.keys()
        worst = max([worst, *((n, float(np.abs(p - expected[n]).max())) for n, p in parameters.items())], key=_size)
    print(f"proof: {task}, {optimizer}: 1 x 32 and {4 // world} x 8 on {world}: {worst[1]:.1e} apart ({worst[0]})")  # noqa: T201
    assert worst[1] < tolerance, worst


def _size(entry):
    return entry[1]

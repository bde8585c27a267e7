"""Schedules against the official golden numbers, against timm where it does the same, and at their edges."""

import dataclasses
from importlib import import_module

import pytest
import torch

from swin_scale.config import Config, Data, Model, Optim, Run, Train
from swin_scale.config import Schedule as ScheduleConfig
from swin_scale.engine.schedule import Schedule
from swin_scale.errors import UserError
from tests.peers import timm

peer_schedulers = import_module(f"{timm.__name__}.scheduler")  # a submodule that `import timm` leaves out

EPOCH = 1251  # ImageNet-1K at a global batch of 1024


def make_schedule(steps_per_epoch: int = EPOCH, epochs: int = 300, batch: int = 1024, lr: float | None = None, **keys):
    config = Config(
        run=Run(dir="x"),
        data=Data(train=("x",)),
        model=Model(name="x"),
        optim=Optim(lr_per_512=5e-4) if lr is None else Optim(lr=lr),
        schedule=ScheduleConfig(**keys),
        train=Train(global_batch=batch, epochs=epochs),
    )
    return Schedule.from_config(config, steps_per_epoch)


@pytest.mark.parametrize(
    ("step", "lr"),
    [(0, 1e-6), (1, 1.039928e-6), (25020, 1e-3), (187650, 5.604224e-4), (375300, 1e-5), (10**7, 1e-5)],
)
def test_official_1k_recipe(step, lr):
    assert make_schedule().lr(step) == pytest.approx(lr, rel=1e-6)


def test_without_prefix_the_rate_falls_at_the_end_of_the_warmup():
    """How every released weight was trained."""
    schedule = make_schedule(warmup_prefix=False)
    assert schedule.lr(25019) == pytest.approx(1e-3, rel=1e-4)
    assert schedule.lr(25020) == pytest.approx(9.8918e-4, rel=1e-5)
    assert schedule.lr(375300) == pytest.approx(1e-5)


@pytest.mark.parametrize("prefix", [True, False])
def test_cosine_equals_timm(prefix):
    schedule = make_schedule(10, epochs=12, lr=1e-3, warmup_epochs=2, warmup_prefix=prefix)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    peer = peer_schedulers.CosineLRScheduler(
        optimizer, t_initial=100 if prefix else 120, lr_min=5e-6, warmup_lr_init=5e-7, warmup_t=20, cycle_limit=1,
        t_in_epochs=False, warmup_prefix=prefix,
    )  # fmt: skip
    for step in range(125):
        peer.step_update(step)
        assert schedule.lr(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12), step


def test_step_equals_timm():
    schedule = make_schedule(10, epochs=12, lr=1e-3, name="step", warmup_epochs=2, decay_epochs=3, decay_rate=0.5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    peer = peer_schedulers.StepLRScheduler(
        optimizer, decay_t=30, decay_rate=0.5, warmup_lr_init=5e-7, warmup_t=20, warmup_prefix=False, t_in_epochs=False
    )
    for step in range(120):
        peer.step_update(step)
        assert schedule.lr(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12), step


def test_linear():
    """base - 0.99 base (t - w) / (N - w), then constant."""
    schedule = make_schedule(10, epochs=12, lr=1e-3, name="linear", warmup_epochs=2)
    rates = [schedule.lr(step) for step in (10, 20, 70, 120, 500)]
    assert rates == pytest.approx([5.0025e-4, 1e-3, 1e-3 * (1 - 0.495), 1e-5, 1e-5])


def test_multistep():
    schedule = make_schedule(
        10, epochs=12, lr=1e-3, name="multistep", warmup_epochs=2, multisteps=(8.0, 3.0), gamma=0.1
    )
    rates = [schedule.lr(step) for step in (20, 29, 30, 79, 80, 119)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5])


@pytest.mark.parametrize("name", ["cosine", "linear", "step", "multistep"])
def test_the_warmup_is_one_line_for_all(name):
    schedule = make_schedule(10, epochs=12, lr=1e-3, name=name, warmup_epochs=2, multisteps=(3.0,))
    for step in range(20):
        assert schedule.lr(step) == pytest.approx(5e-7 + step * (1e-3 - 5e-7) / 20, rel=1e-12)


def test_no_warmup_starts_at_the_peak():
    assert make_schedule(10, warmup_epochs=0, lr=1e-3).lr(0) == 1e-3


def test_rates_scale_with_the_batch_only_when_given_per_512():
    scaled, absolute = make_schedule(batch=4096), make_schedule(batch=4096, lr=5e-4)
    assert (scaled.peak_lr, scaled.warmup_lr, scaled.min_lr) == pytest.approx((4e-3, 4e-6, 4e-5))
    assert (absolute.peak_lr, absolute.warmup_lr, absolute.min_lr) == (5e-4, 5e-7, 5e-6)


def test_lengths_in_steps_win_over_epochs():
    schedule = make_schedule(10, epochs=5, lr=1e-3, total_steps=1000, warmup_steps=100)
    assert schedule.lr(100) == 1e-3
    assert schedule.lr(999) > schedule.lr(1000) == 5e-6


def test_layer_decay_scales_the_peak_but_neither_end():
    schedule = make_schedule(10, epochs=12, lr=1e-3, warmup_epochs=2)
    scales = [0.25, 1.0]
    assert schedule.group_lrs(0, scales) == [5e-7, 5e-7]
    assert schedule.group_lrs(20, scales) == pytest.approx([2.5e-4, 1e-3])
    assert schedule.group_lrs(120, scales) == pytest.approx([5e-6, 5e-6])
    scaled = dataclasses.replace(schedule, peak_lr=2.5e-4)
    assert [schedule.group_lr(step, 0.25) for step in range(130)] == [scaled.lr(step) for step in range(130)]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"epochs": 20},
            r"schedule\.warmup_epochs is 20, a warm-up of 200 steps.* of 200; set it below 20",
        ),
        ({"warmup_steps": 500, "total_steps": 400}, r"schedule\.warmup_steps is 500.*below 400"),
        ({"name": "multistep", "multisteps": (3.0,)}, r"schedule\.multisteps starts at epoch 3, inside the warm-up"),
        ({"name": "step", "decay_epochs": 0.0}, r"schedule\.decay_epochs is 0"),
    ],
)
def test_what_cannot_be_is_refused(keys, message):
    with pytest.raises(UserError, match=message):
        make_schedule(10, **keys)

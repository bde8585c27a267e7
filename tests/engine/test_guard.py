"""The loss guard: what is a spike and what is not, who is blamed, what is remembered, within which budget."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swin_scale.config import Guard as Keys
from swin_scale.engine.guard import FILE_NAME, SIGMA, Blame, Detector, Guard, Trouble, blame_samples, robust
from swin_scale.errors import DivergedError
from swin_scale.log import read_jsonl

KEYS = Keys()


def detector(factor=KEYS.loss_factor, **options):
    options = {"deviations": KEYS.deviations, "window": KEYS.window, "warmup": KEYS.warmup, **options}
    return Detector(factor=factor, **options)


def curve(steps, seed, *, first, last, noise):
    """A training curve: exponential decay with multiplicative noise, and now and then a hard batch."""
    rng = np.random.default_rng(seed)
    level = last + (first - last) * np.exp(-np.arange(steps) / (steps / 5))
    hard = np.where(rng.random(steps) < 0.02, 1.3, 1.0)
    return (level * hard * np.exp(noise * rng.standard_normal(steps))).tolist()


def alarms(found, values):
    """Steps at which `found` sees a spike; those are not accepted."""
    steps = []
    for step, value in enumerate(values):
        if value > found.limit():
            steps.append(step)
        else:
            found.accept(value)
    return steps


@pytest.mark.parametrize(
    ("first", "last", "noise"),
    [(9.9, 2.5, 0.02), (9.9, 2.5, 0.1), (2.3, 0.05, 0.15), (1.0, 0.3, 0.05), (0.9, 1e-4, 0.2)],
    ids=["22K", "22K, small batches", "by heart", "SimMIM", "to zero"],
)
def test_no_alarm_on_healthy_curves(first, last, noise):
    for seed in range(2):
        assert alarms(detector(), curve(4000, seed, first=first, last=last, noise=noise)) == []


def test_no_alarm_on_norms_that_vary_a_hundred_times_more_than_losses():
    """Norms of a warm-up that rises tenfold, and bursts of seven times the usual."""
    for seed in range(2):
        norms = np.array(curve(5000, seed, first=1.0, last=2.0, noise=0.3)) * np.linspace(0.1, 1, 5000) ** 0.5
        norms[500::97] *= 7
        assert norms.max() > 30 * np.median(norms[:100])
        assert alarms(detector(KEYS.norm_factor), norms.tolist()) == []


@pytest.mark.parametrize("step", [KEYS.warmup, 100, 4000])
def test_a_tenfold_loss_is_found_at_once_and_does_not_move_the_limit(step):
    values = curve(5000, 1, first=9.9, last=2.5, noise=0.05)
    found = detector()
    for value in values[:step]:
        found.accept(value)
    limit = found.limit()
    assert 10 * values[step] > limit and found.limit() == limit
    assert alarms(found, [10 * value for value in values[step : step + 50]] + values[step + 50 : step + 90]) == list(
        range(50)
    )


def test_the_limit_by_hand():
    """Median 4, absolute deviations 1 1 1 1 0: the largest of three rises, on top of the median."""
    values = [3.0, 5.0, 4.0, 3.0, 5.0]
    assert robust(values) == (4.0, SIGMA)
    by_factor, by_deviation, by_start = (
        detector(3.0, deviations=1.0, window=5, warmup=5),
        detector(1.01, deviations=10.0, window=5, warmup=5),
        detector(1.01, deviations=0.1, window=5, warmup=5),
    )
    for found, limit in ((by_factor, 12.0), (by_deviation, 4 + 10 * SIGMA), (by_start, 6.0)):
        for value in values[:-1]:
            found.accept(value)
            assert found.limit() == math.inf
        found.accept(values[-1])
        assert found.limit() == float(np.float32(limit))
    # The start stays where it was when the level has fallen.
    for _ in range(20):
        by_start.accept(0.0)
    assert by_start.limit() == 2.0


def test_factor_zero_finds_no_spike():
    found = detector(0.0, warmup=4)
    for _ in range(100):
        found.accept(1.0)
    assert found.limit() == math.inf


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60), st.integers(0, 60))
def test_state_survives_json_at_any_step(values, cut):
    whole, first, second = (detector(window=16, warmup=4) for _ in range(3))
    limits = [(whole.accept(value), whole.limit())[1] for value in values]
    for value in values[:cut]:
        first.accept(value)
    second.restore(json.loads(json.dumps(first.state())))
    assert [(second.accept(value), second.limit())[1] for value in values[cut:]] == limits[cut:]


# -- who is blamed -----------------------------------------------------------------------------------------------------

VALID = np.array([True] * 22 + [False] * 2)


def losses_of(**changed):
    losses = 2.0 + 0.2 * np.random.default_rng(0).standard_normal(24)
    losses[22:] = 1e9  # of empty slots, which cause nothing
    for slot, value in changed.items():
        losses[int(slot[1:])] = value
    return losses


def blame(losses, *, value, limit=math.inf, what="loss"):
    return blame_samples(losses, VALID, Trouble(step=7, what=what, value=value, limit=limit), KEYS)[0]


def test_samples_without_a_finite_loss_are_blamed_and_no_others():
    assert blame(losses_of(s3=math.nan, s9=math.inf, s4=50.0, s23=math.nan), value=math.nan) == [3, 9]


def test_when_much_of_a_batch_is_not_finite_it_is_not_the_samples():
    assert blame(losses_of(**{f"s{slot}": math.nan for slot in range(6)}), value=math.nan) == []


def test_samples_that_stand_out_are_blamed_for_a_spike_that_goes_without_them():
    spike = losses_of(s5=200.0, s6=30.0)
    assert blame(spike, value=spike[VALID].mean(), limit=4.0) == [5, 6]
    # The rest is a spike too: leaving out two would not help.
    assert blame(spike, value=spike[VALID].mean(), limit=1.5) == []


def test_nobody_is_blamed_for_a_spike_of_all():
    assert blame(10 * losses_of(), value=20.0, limit=5.0) == []


def test_a_gradient_that_is_not_finite_has_no_sample_to_blame():
    assert blame(losses_of(s5=200.0), value=math.inf, what="gradient norm") == []
    assert blame(losses_of(s5=200.0), value=90.0, limit=50.0, what="gradient norm") == [5]


# -- what is remembered ------------------------------------------------------------------------------------------------


@pytest.fixture
def alone():
    from swin_scale.engine.dist import Dist

    store, device = torch.distributed.HashStore(), torch.device("cpu")
    return Dist(
        rank=0, world=1, local_rank=0, local_world=1, device=device, backend="gloo", store=store, cpu_group=None,
        timeout_s=5,
    )  # fmt: skip


def make_guard(run_dir, dist, **options):
    from swin_scale.config_load import config_from_values

    values = {"run": {"dir": str(run_dir)}, "data": {"train": ["d"]}, "model": {"name": "m"}, "guard": options}
    return Guard(run_dir, config_from_values({**values, "optim": {"lr": 1}, "train": {"global_batch": 8}}).config, dist)


def blamed(who, slots=()):
    nothing = {"why": "of it", "ranks": {}, "losses": np.zeros(8)}
    return Blame(who=who, slots=slots, ids=np.arange(40, 48), **nothing)


def test_what_was_left_out_outlives_the_process_and_any_checkpoint(tmp_path, alone):
    first = make_guard(tmp_path, alone)
    early = json.loads(json.dumps(first.state()))
    first.trip(Trouble(step=7, what="loss", value=math.nan), blamed("samples", (1, 3)), "guard/step_00000007")
    first.trip(Trouble(step=9, what="loss", value=math.nan), blamed("ranks"), "guard/step_00000009")
    first.trip(Trouble(step=9, what="gradient norm", value=math.inf), blamed("batch"), "guard/step_00000009_2")
    late = json.loads(json.dumps(first.state()))
    first.close()
    assert [(entry.step, entry.ids) for entry in first.left_out] == [(6, (41, 43)), (8, None)]
    assert "after step 7: loss that is not finite" in first.left_out[0].reason

    with open(tmp_path / FILE_NAME, "a") as file:
        file.write('{"step": 11, "ids": [1], "tro')  # of a kill
    again = make_guard(tmp_path, alone)
    again.restore(early)
    assert again.left_out == first.left_out
    (tmp_path / FILE_NAME).unlink()
    elsewhere = make_guard(tmp_path / "copy", alone)
    assert elsewhere.left_out == ()
    elsewhere.restore(late)
    elsewhere.restore(late)
    assert elsewhere.left_out == first.left_out and len(elsewhere.state()["trips"]) == 3
    elsewhere.restore(None)  # of a checkpoint without
    assert elsewhere.left_out == first.left_out


def test_the_budget_is_spent_within_its_reach_whoever_is_blamed_and_whatever_restarts(tmp_path, alone):
    options = {"max_rollbacks": 2, "budget_steps": 100}
    nan = {"what": "loss", "value": math.nan}
    guard = make_guard(tmp_path, alone, **options)
    guard.trip(Trouble(step=50, **nan), blamed("ranks"), "a")
    guard.trip(Trouble(step=120, **nan), blamed("samples", (0,)), "b")
    guard.trip(Trouble(step=151, **nan), blamed("samples", (2,)), "c")  # the first is out of reach
    guard = make_guard(tmp_path, alone, **options)
    with pytest.raises(DivergedError, match=r"step 152: .*2 times within 100 steps \(guard\.max_rollbacks 2\).*in d,"):
        guard.trip(Trouble(step=152, **nan), blamed("samples", (4,)), "d")
    assert [entry.ids for entry in guard.left_out] == [(40,), (42,)]
    # A larger budget finds it again: what ended the run left nothing out.
    guard = make_guard(tmp_path, alone, **{**options, "max_rollbacks": 3})
    assert [entry.ids for entry in guard.left_out] == [(40,), (42,)]
    guard.trip(Trouble(step=152, **nan), blamed("samples", (4,)), "d")
    assert [row["action"] for row in read_jsonl(tmp_path / FILE_NAME)] == ["rolled back"] * 3 + [
        "stopped",
        "rolled back",
    ]


# -- the verdict on a step ---------------------------------------------------------------------------------------------


def result(loss=2.0, norm=1.0, aux=None, valid=8.0, scale=1.0):
    from swin_scale.engine.engine import StepResult

    t = torch.tensor
    return StepResult(
        loss=t(loss), grad_norm=t(norm), lr=0.1, loss_scale=scale, skipped=False, sample_losses=torch.full((8,), loss),
        valid_samples=t(valid), aux_loss=None if aux is None else t(aux),
    )  # fmt: skip


def test_the_verdict_on_a_step(tmp_path, alone):
    guard = make_guard(tmp_path, alone, window=8, warmup=4)
    assert guard.judge(1, result(norm=1e9)) is None  # nothing to compare with yet
    for step in range(2, 9):
        assert guard.judge(step, result()) is None
    limit = guard.loss_limit()
    assert limit == 4.0
    for step in range(9, 12):
        for what, value, suspect in (
            ("loss", math.nan, result(loss=math.nan)),
            ("loss", 4.25, result(loss=4.25)),
            ("auxiliary loss", math.inf, result(aux=math.inf)),
            ("gradient norm", math.inf, result(norm=math.inf)),
            ("gradient norm", 40.0, result(norm=40.0)),
        ):
            trouble = guard.judge(step, suspect)
            assert trouble is not None and trouble.what == what and trouble.step == step
            assert repr(trouble.value) == repr(value)
        assert guard.judge(step, result(loss=4.0, norm=20.0)) is None  # at the limits
    assert guard.judge(12, result(loss=0.0, norm=math.inf, valid=0.0)) is None


def test_an_overflow_of_scaled_gradients_is_none_of_its_business(tmp_path, alone):
    guard = make_guard(tmp_path, alone)
    guard._scaled = True
    assert guard.judge(1, result(norm=math.inf, scale=2.0)) is None
    assert guard.judge(2, result(norm=math.inf, scale=1.0)) is not None
    assert guard.judge(3, result(loss=math.nan, norm=math.inf, scale=2.0)) is not None


# -- a loss above the limit updates nothing ----------------------------------------------------------------------------


def limited(dist, config):
    """(loss, skipped, whether weights moved, largest difference of the losses once more) of steps on one batch."""
    from tests.engine.test_engine import batch_of, make_engine, weights

    engine, plan = make_engine(dist, config)
    found = []
    for step, (invalid, limit) in enumerate(
        # The last micro-batch of one rank has no valid sample from the second step on.
        [((), 0.1), ((8, 9, 10, 11), 0.1), (range(12), math.inf), ((8, 9, 10, 11), math.inf)]
    ):
        micros, valid = batch_of(step, plan, dist, engine, invalid=invalid)
        before, again = weights(engine), engine.sample_losses(step, micros)
        result = engine.train_step(step, micros, valid, loss_limit=limit)
        after = weights(engine)
        moved = any((before[name] != after[name]).any() for name in before)
        odd = float((again - result.sample_losses).abs().max())
        found.append((float(result.loss), result.skipped, moved, odd, float(result.valid_samples)))
    return found


@pytest.mark.parametrize(
    ("world", "stage"),
    [(1, 1), pytest.param(2, 0, marks=pytest.mark.proof), pytest.param(2, 3, marks=pytest.mark.proof)],
)
def test_a_loss_above_the_limit_updates_nothing_on_any_rank(world, stage):
    from tests.engine.test_engine import make_config
    from tests.spawn import spawn_dist

    config = make_config(engine={"zero_stage": stage}, train={"micro_batch": 2})
    for found in spawn_dist(world, limited, config):
        losses, skipped, moved, odd, valid = zip(*found)
        assert skipped == (True, True, True, False) and moved == (False, False, False, True)
        assert valid == (12, 8, 0, 8) and max(odd) == 0.0
        assert losses[2] == 0 and all(loss > 1 for loss in (losses[0], losses[1], losses[3]))

"""One run, moved between numbers of ranks and ZeRO stages, or stopped and started again: whole runs, command line."""

import shutil

import pytest
import torch

from swin_scale.checkpoint import Checkpoint, step_directory
from swin_scale.errors import PeerLostError
from tests import runs

STEPS, FEW = 40, 20
"""Of the claims, and of what `make test` sees of them. 300 images in batches of 24: epochs end at 13, 26 and 39."""
LAYOUTS = ((1, 0), (2, 1), (4, 2), (3, 3), (1, 1))
"""(ranks, ZeRO stage) that a run goes through, as long in each."""
ELASTIC = {
    "augment__mixup": 0.8,
    "checkpoint__every_steps": "null",
    "data__workers": 1,
    "optim__ema_decay": 0.9,
    # Adam divides by the gradient's size. Those of the position MLP start at 1e-9, which is the rounding of a sum over
    # ranks: with the usual 1e-8 they move by whole steps, in directions that depend on the order of summation.
    "optim__eps": 1e-6,
}
NOISY = {**ELASTIC, "model__drop_path_rate": 0.3, "engine__zero_stage": 1, "nproc": 2, "train__micro_batch": 6}
"""Two micro-batches a step and a random network: nothing may be drawn twice, or not at all."""


def checkpoint(run_dir, step=STEPS):
    """kind -> parameter name -> tensor."""
    with Checkpoint.open(step_directory(run_dir / "checkpoints", step)) as opened:
        return {kind: opened.load_full(kind) for kind in opened.kinds()}


def difference(a, b):
    """Largest absolute difference of any element, per kind."""
    assert a.keys() == b.keys()
    assert all(a[kind].keys() == b[kind].keys() for kind in a)
    return {kind: max(float((a[kind][n] - b[kind][n]).abs().max()) for n in a[kind]) for kind in a}


def run(run_dir, digits, code=0, **settings):
    result = runs.run(run_dir, digits[0], timeout=300, **{**ELASTIC, "data__val": f"[{digits[1]}]", **settings})
    assert result.returncode == code, result.stderr
    return result


def chain(steps):
    """(ranks, ZeRO stage, step at which it is stopped): each time in the middle of an epoch."""
    return [(*layout, steps * (i + 1) // len(LAYOUTS)) for i, layout in enumerate(LAYOUTS)]


@pytest.fixture(scope="module")
def steady(digits, tmp_path_factory):
    """Runs on one process that nothing disturbed, by their steps."""
    made = {}

    def of(steps):
        if steps not in made:
            made[steps] = tmp_path_factory.mktemp("steady") / "run"
            run(made[steps], digits, nproc=1, train__max_steps=steps)
        return made[steps]

    return of


@pytest.mark.fault(8, "moved 1 -> 2 -> 4 -> 3 -> 1 ranks, ZeRO 0 -> 1 -> 2 -> 3 -> 1, mid-epoch")
def test_a_run_moves_between_ranks_and_stages(digits, steady, tmp_path):
    run_dir = tmp_path / "run"
    for ranks, stage, stop in chain(FEW):
        run(run_dir, digits, nproc=ranks, engine__zero_stage=stage, train__max_steps=stop)
    assert_same_run(run_dir, steady(FEW), FEW)


def assert_same_run(run_dir, steady, steps):
    """Equal sample ids; losses within 1e-5; parameters within 1e-5 after AdamW's steps."""
    ours, theirs = runs.trajectory(run_dir), runs.trajectory(steady)
    assert len(ours) == steps
    assert [(step, digest) for step, _, _, digest in ours] == [(step, digest) for step, _, _, digest in theirs]
    assert max(abs(a[1] - b[1]) for a, b in zip(ours, theirs, strict=True)) < 1e-5
    found = difference(checkpoint(run_dir, steps), checkpoint(steady, steps))
    assert found["master"] < 1e-5
    assert found["ema"] < 1e-5


SAVES_AT_ONCE = """
import sys
from swin_scale import cli, saver

begin = saver.Saver.__init__

def forget(self, *arguments):
    begin(self, *arguments)
    self.saved_step = -1

saver.Saver.__init__ = forget
sys.exit(cli.main())
"""


@pytest.mark.proof
@pytest.mark.long
@pytest.mark.fault(8, "handed over to every layout of the chain without a step: moments and averages bit for bit")
def test_every_hand_over_is_exact(digits, steady, tmp_path):
    """A run that is asked for no further step, and made to save again: what it loaded, in files of its new layout."""
    run_dir = tmp_path / "run"
    previous = None
    for ranks, stage, stop in chain(STEPS):
        settings = {"engine__zero_stage": stage, "nproc": ranks}
        if previous is not None:
            before = checkpoint(run_dir, previous)
            run(run_dir, digits, program=SAVES_AT_ONCE, **settings, train__max_steps=previous)
            files = step_directory(run_dir / "checkpoints", previous).glob("rank*.safetensors")
            assert len(list(files)) == ranks, "nothing was saved in the new layout"
            after = checkpoint(run_dir, previous)
            assert set(before) == {"master", "exp_avg", "exp_avg_sq", "ema"}
            assert all(torch.equal(before[k][n], after[k][n]) for k in before for n in before[k])
        run(run_dir, digits, **settings, train__max_steps=stop)
        previous = stop
    assert_same_run(run_dir, steady(STEPS), STEPS)


@pytest.fixture(scope="module")
def noisy(digits, tmp_path_factory):
    """40 steps on two processes with drop-path, mixup, moving average and accumulation."""
    run_dir = tmp_path_factory.mktemp("noisy") / "run"
    run(run_dir, digits, **NOISY, train__max_steps=STEPS)
    return run_dir


@pytest.fixture(scope="module")
def half(digits, tmp_path_factory):
    """The first 20 steps of `noisy`, to be copied."""
    run_dir = tmp_path_factory.mktemp("half") / "run"
    run(run_dir, digits, **NOISY, train__max_steps=20)
    return run_dir


PHASES = {
    "mid-epoch": (20, {}),
    "after evaluation, at an epoch's end": (26, {"train__eval_every_epochs": 1}),
    "one step before an epoch's end": (25, {}),
    "one step into an epoch": (27, {}),
    "before the first update": (1, {}),
}


@pytest.mark.parametrize("phase", ["mid-epoch", *(pytest.param(p, marks=pytest.mark.proof) for p in list(PHASES)[1:])])
@pytest.mark.fault(9, "stopped and started again at each phase, with moving average, mixup, drop-path, accumulation")
def test_stopping_and_starting_again_changes_no_bit(digits, noisy, half, tmp_path, phase):
    stop, settings = PHASES[phase]
    run_dir = tmp_path / "run"
    if phase == "mid-epoch":
        shutil.copytree(half, run_dir)
    else:
        run(run_dir, digits, **NOISY, **settings, train__max_steps=stop)
    run(run_dir, digits, **NOISY, **settings, train__max_steps=STEPS)
    assert runs.trajectory(run_dir) == runs.trajectory(noisy)
    assert same_files(run_dir, noisy)


@pytest.mark.proof
@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.fault(9, "stopped and started again at ZeRO 0, 2 and 3")
def test_every_stage_starts_again_to_the_same_bits(digits, tmp_path, stage):
    """As stage 1 does at each phase: stopped in the middle of an epoch, and over its end."""
    settings = {**NOISY, "engine__zero_stage": stage}
    for name, stops in (("whole", (FEW,)), ("parts", (10, FEW))):
        for stop in stops:
            run(tmp_path / name, digits, **settings, train__max_steps=stop)
    assert runs.trajectory(tmp_path / "parts") == runs.trajectory(tmp_path / "whole")
    assert same_files(tmp_path / "parts", tmp_path / "whole", FEW)


DIES_MID_STEP = """
import os, signal, sys
from swin_scale import cli
from swin_scale.tasks import Classify

whole = Classify.micro_batches

def dying(task, batch, *rest, **options):
    for i, micro_batch in enumerate(whole(task, batch, *rest, **options)):
        if batch.step == 24 and i == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        yield micro_batch

Classify.micro_batches = dying
sys.exit(cli.main())
"""


@pytest.mark.fault(9, "killed in the middle of an accumulated step")
def test_a_kill_between_micro_batches_changes_no_bit(digits, noisy, half, tmp_path):
    """The step whose first micro-batch was done when the process died is done again from its start."""
    run_dir = tmp_path / "run"
    shutil.copytree(half, run_dir)
    run(run_dir, digits, code=PeerLostError.exit_code, program=DIES_MID_STEP, **NOISY, train__max_steps=STEPS)
    assert runs.steps(run_dir) == [20]
    run(run_dir, digits, **NOISY, train__max_steps=STEPS)
    assert runs.trajectory(run_dir) == runs.trajectory(noisy)
    assert same_files(run_dir, noisy)


def same_files(a, b, steps=STEPS):
    """The last checkpoints hold the same bytes, rank by rank."""
    ours, theirs = (sorted(step_directory(r / "checkpoints", steps).glob("rank*.safetensors")) for r in (a, b))
    return len(ours) == len(theirs) > 0 and all(x.read_bytes() == y.read_bytes() for x, y in zip(ours, theirs))


def test_a_rank_count_that_does_not_divide_names_the_nearest(digits, steady, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(steady(FEW), run_dir)
    refused = runs.run(run_dir, digits[0], **{**ELASTIC, "nproc": 5, "train__max_steps": FEW + 1})
    assert refused.returncode == 2
    assert "4" in refused.stderr
    assert "6" in refused.stderr

"""Whole runs through the command line: finish, resume after a kill, fall back, refuse, and hand weights over."""

import json
import random
import shutil
import subprocess
import sys

import pytest

from swin_scale.checkpoint import Checkpoint
from swin_scale.data import batch_digest
from swin_scale.data.order import BatchOrder, Source
from swin_scale.engine.metrics import STEP_KEYS
from swin_scale.log import read_jsonl, read_metrics
from swin_scale.shards import ShardSet
from tests import runs, warm
from tests.kills import Kill, kill_run


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory):
    """A run of 16 steps that nothing disturbed: 300 images, batch 24, so an epoch ends at step 13."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    result = runs.run(run_dir, digits[0], data__val=f"[{digits[1]}]", train__max_steps=16, cold=True)
    assert result.returncode == 0, result.stderr
    return run_dir


def test_a_run_leaves_what_the_readme_says(finished):
    rows = read_metrics(finished / "metrics.jsonl")
    assert list(rows) == list(range(1, 17))
    assert all(set(STEP_KEYS) <= row.keys() for row in rows.values())
    assert [rows[s]["epoch"] for s in (13, 14)] == [0, 1]
    assert rows[13]["samples"] == 300
    assert rows[1]["mfu"] is None
    assert runs.exit_record(finished)["code"] == 0
    names = {path.name for path in finished.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "logs", "checkpoints", "exit.json"} <= names
    assert runs.steps(finished) == [8, 12, 16]
    assert (finished / "checkpoints" / "latest").read_text().strip() == "step_00000016"
    [evaluation] = runs.events(finished, "eval")
    assert evaluation["samples"] == 50
    text = (finished / "config.yaml").read_text()
    assert "# command line" in text
    assert "# default" in text


def test_digests_are_those_of_the_order(digits, finished):
    """What came out of two ranks' loaders with the pixels is the order that (seed, epoch, data) define."""
    order = BatchOrder([Source(shard_samples=(100, 100, 100))], seed=0, global_batch=24)
    expected = [batch_digest(order.batch(step)[0]) for step in range(16)]
    assert [digest for *_, digest in runs.trajectory(finished)] == expected


@pytest.mark.fault(2, "all processes killed with -9 while a checkpoint is half written")
def test_killed_run_resumes_to_the_same_bits(digits, finished, tmp_path):
    rng = random.Random(1)
    options = {"data__val": f"[{digits[1]}]", "train__max_steps": 16}
    kill_run(tmp_path / "run", digits[0], rng, Kill("saving"), **options)
    result = runs.run(tmp_path / "run", digits[0], **options)
    assert result.returncode == 0, result.stderr
    assert runs.trajectory(tmp_path / "run") == runs.trajectory(finished)
    assert runs.events(tmp_path / "run", "fell_back") == []
    assert same_checkpoint(tmp_path / "run", finished)


def same_checkpoint(a, b):
    files = sorted(path.name for path in (a / "checkpoints/step_00000016").glob("*.safetensors"))
    return len(files) == 2 and all(
        (a / "checkpoints/step_00000016" / f).read_bytes() == (b / "checkpoints/step_00000016" / f).read_bytes()
        for f in files
    )


@pytest.mark.fault(4, "newest checkpoint: a flipped bit in a rank's file")
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(digits, finished, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    victim = run_dir / "checkpoints/step_00000016/rank00001.safetensors"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    result = runs.run(run_dir, digits[0], data__val=f"[{digits[1]}]", train__max_steps=18)
    assert result.returncode == 0, result.stderr
    assert "rank00001.safetensors is damaged" in result.stderr
    [fell_back] = runs.events(run_dir, "fell_back")
    assert "step_00000016/rank00001.safetensors" in fell_back["problem"]
    assert fell_back["step"] == 12
    assert runs.trajectory(run_dir)[:16] == runs.trajectory(finished)


@pytest.mark.fault(25, "run: another learning rate, batch, model, with the flag and without, at a resume")
def test_resume_grades_config_changes(digits, finished, tmp_path):
    """On one rank: safe keys pass, a learning rate needs the flag, another model is impossible."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    base = {"nproc": 1, "train__max_steps": 17, "data__workers": 0}
    refused = runs.run(run_dir, digits[0], optim__lr=5e-4, **base)
    assert refused.returncode == 2
    assert "optim.lr: 0.001 -> 0.0005 (needs --allow-change)" in refused.stderr
    impossible = runs.run(
        run_dir, digits[0], model__name="swin_nano_patch4_window4_32", train__global_batch=48,
        flags=("--allow-change",), **base,
    )  # fmt: skip
    assert impossible.returncode == 2
    assert "model.name" in impossible.stderr
    assert "train.global_batch: 24 -> 48 (impossible)" in impossible.stderr
    assert runs.exit_record(run_dir)["code"] == 2
    allowed = runs.run(run_dir, digits[0], optim__lr=5e-4, flags=("--allow-change",), **base)
    assert allowed.returncode == 0, allowed.stderr
    assert [row[0] for row in runs.trajectory(run_dir)] == list(range(1, 18))
    again = runs.run(run_dir, digits[0], optim__lr=5e-4, **base)
    assert again.returncode == 0, again.stderr
    assert len(runs.trajectory(run_dir)) == 17


@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.fault(15, "run: learning rate of 1e30, with the loss guard and without")
def test_divergence_ends_with_exit_5(digits, tmp_path, guard):
    result = runs.run(
        tmp_path / "run", digits[0], nproc=1, data__workers=0, optim__lr=1e30, optim__clip_grad=0, train__max_skips=3,
        schedule__warmup_steps=1, train__max_steps=50, guard__enabled=str(guard).lower(), guard__max_rollbacks=3,
    )  # fmt: skip
    assert result.returncode == 5, result.stderr
    assert ("guard.max_rollbacks 3" if guard else "3 updates in a row were skipped") in result.stderr
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["skipped"] for row in rows.values()][-3:] == [True] * 3
    assert runs.exit_record(tmp_path / "run")["code"] == 5


def spoil(shards, rows):
    """Overwrite the image bytes of these index rows with text."""
    opened = ShardSet.open(shards)
    for row in rows:
        entry = opened.index[row]
        with open(opened.path(int(entry["shard"])), "r+b") as file:
            file.seek(int(entry["offset"]))
            file.write(b"<html>not an image</html>"[: int(entry["size"])])


@pytest.mark.fault(17, "run: HTML instead of two images")
def test_bad_samples_leave_empty_slots_and_are_listed(digits, tmp_path):
    spoiled = tmp_path / "shards"
    shutil.copytree(digits[0], spoiled)
    spoil(spoiled, [3, 200])
    options = {"train__max_steps": 13, "train__tensorboard": "false"}
    result = runs.run(tmp_path / "run", spoiled, data__max_bad_rate=0.5, **options)
    assert result.returncode == 0, result.stderr
    listed = read_jsonl(tmp_path / "run" / "skipped.jsonl")
    assert sorted(record["id"] for record in listed) == [3, 200]
    assert all({"step", "shard", "key", "reason"} <= record.keys() for record in listed)
    assert {e["id"] for e in runs.events(tmp_path / "run", "skipped_sample")} == {3, 200}


@pytest.mark.fault(17, "run: HTML instead of every fourth image")
def test_too_many_bad_samples_stop_the_run_with_exit_3(digits, tmp_path):
    spoiled = tmp_path / "shards"
    shutil.copytree(digits[0], spoiled)
    spoil(spoiled, range(2, 300, 4))  # not among the few that are looked at before the first step
    result = runs.run(tmp_path / "run", spoiled, nproc=2, train__max_steps=13)
    assert result.returncode == 3, result.stderr
    assert "data.max_bad_rate" in result.stderr
    assert runs.exit_record(tmp_path / "run")["code"] == 3


def swin_scale(*arguments, cold=False):
    if cold:
        command = [sys.executable, "-m", "swin_scale", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)
    return warm.run([*map(str, arguments)], [runs.environment()])


def test_weights_convert_evaluate_predict_and_start_another_run(digits, finished, tmp_path):
    for file, form in (("w.safetensors", "safetensors"), ("w.pth", "official")):
        result = swin_scale("convert", finished, tmp_path / file, "--to", form)
        assert result.returncode == 0, result.stderr
    [training] = runs.events(finished, "eval")
    for weights in (finished, tmp_path / "w.safetensors"):
        result = swin_scale("eval", "--weights", weights, "--data", digits[1], "--workers", 0)
        assert result.returncode == 0, result.stderr
        figures = json.loads(result.stdout)
        assert figures["top1"] == training["top1"]
        assert figures["loss"] == pytest.approx(training["loss"], rel=1e-5)
    image = next((digits[0].parent / "images/val/7").iterdir())
    result = swin_scale("predict", "--weights", tmp_path / "w.safetensors", image, "--json", "--topk", 3, cold=True)
    assert result.returncode == 0, result.stderr
    guesses = json.loads(result.stdout)["predictions"]
    assert len(guesses) == 3
    assert guesses[0]["probability"] >= guesses[1]["probability"]
    result = runs.run(
        tmp_path / "tuned", digits[0], nproc=1, data__workers=0, init__weights=tmp_path / "w.pth", train__max_steps=1
    )
    assert result.returncode == 0, result.stderr
    assert "79 copied" in result.stderr
    with Checkpoint.open(finished / "checkpoints/step_00000016") as before:
        start = before.load_full()
    with Checkpoint.open(tmp_path / "tuned/checkpoints/step_00000001") as after:
        # The first update runs at schedule.warmup_lr, 5e-7, which bounds AdamW's move.
        assert all((value - start[name]).abs().max() < 1e-6 for name, value in after.load_full().items())


@pytest.mark.parametrize(
    ("settings", "code", "message"),
    [
        ({"train__global_batch": 25}, 2, "does not divide over 2 ranks"),
        ({"model__num_classes": 7}, 2, "model.num_classes is 7"),
        ({"data__img_size": 33}, 2, "33"),
        ({"model__name": "swinv2_nano_patch4_window4_23"}, 2, "swinv2_nano_patch4_window4_32"),
        ({"data__train": "[nowhere]"}, 3, "nowhere"),
        ({"init__weights": "nowhere.pth"}, 4, "nowhere.pth"),
    ],
)
def test_wrong_requests_end_before_training_with_their_code(digits, tmp_path, settings, code, message):
    nproc = 2 if "train__global_batch" in settings else 1
    result = runs.run(tmp_path / "run", digits[0], nproc=nproc, cold=nproc > 1, **settings)
    assert result.returncode == code, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


KILLS = {
    1: [
        *4 * [Kill("saving")], Kill("saving", cold=True),
        *4 * [Kill("steps")], Kill("steps", cold=True),
        *3 * [Kill("steps", "rank")], Kill("steps", "rank", cold=True),
        *4 * [Kill("steps", "worker")], *2 * [Kill("steps", "launcher", cold=True)],
    ],
    3: [
        *3 * [Kill("saving")], *2 * [Kill("steps")], *2 * [Kill("steps", "rank")], *2 * [Kill("steps", "worker")],
        Kill("steps", "launcher", cold=True),
    ],
}  # fmt: skip
"""By ZeRO stage, in an order to be drawn."""


@pytest.mark.proof
@pytest.mark.long
@pytest.mark.parametrize(("stage", "steps"), [(1, 420), (3, 200)])
@pytest.mark.fault(2, "run: kill -9 of any process at any moment, and of all while a checkpoint is written")
def test_kills_change_nothing(digits, tmp_path, stage, steps):
    """The run equals an undisturbed one, bit for bit."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = {
        "train__max_steps": steps, "train__global_batch": 8, "checkpoint__every_steps": 5,
        "schedule__total_steps": steps, "engine__zero_stage": stage,
    }  # fmt: skip
    undisturbed = runs.run(whole, digits[0], timeout=600, **options)
    assert undisturbed.returncode == 0, undisturbed.stderr
    rng = random.Random(2026)
    resumed = []
    for kill in rng.sample(KILLS[stage], k=len(KILLS[stage])):
        kill_run(killed, digits[0], rng, kill, **options)
        resumed.append(max(runs.steps(killed), default=0))
    result = runs.run(killed, digits[0], timeout=600, **options)
    assert result.returncode == 0, result.stderr
    assert runs.trajectory(killed) == runs.trajectory(whole)
    assert len(runs.trajectory(whole)) == steps
    assert [row["step"] for row in runs.events(killed, "start")] == [0, *resumed]
    # Kills of a run that trains say nothing against its checkpoints.
    assert runs.events(killed, "fell_back") == []
    last = f"checkpoints/step_{steps:08d}"
    for file in ("rank00000.safetensors", "rank00001.safetensors"):
        assert (killed / last / file).read_bytes() == (whole / last / file).read_bytes()
    kinds = f"{len(resumed)} kills ({sum(kill.when == 'saving' for kill in KILLS[stage])} while saving)"
    print(f"proof: ZeRO-{stage}: {kinds}, from {resumed}: {steps} losses, norms and digests bit-equal")  # noqa: T201

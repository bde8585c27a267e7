"""Whole runs with faults for the loss guard: found, blamed, rolled back, left out, and the rest as if never seen."""

import io
import json
import math
import shutil
import struct
import zlib

import numpy as np
import pytest
import xxhash
from PIL import Image

from swin_scale.data.order import BatchOrder, Source
from swin_scale.data.reader import ImageReader
from swin_scale.log import read_jsonl, read_metrics
from swin_scale.shards import ShardSet, save_index
from tests import runs

BATCH = 24
SINGLE = {"nproc": 1, "data__workers": 0}
# Erasing would paint coloured noise, and the crop could cut nothing off a picture of one colour.
PLAIN = {"augment__reprob": 0.0, "augment__color_jitter": 0.0, "guard__window": 8, "guard__warmup": 4}
RED, GREEN = (255, 0, 0), (0, 255, 0)
FAULT = "coloured_images"
"""Red images make the forward pass infinite; green ones a loss that is tenfold over the batch."""


def sample_of(train, step, slot):
    """The id in a slot of a step (from 1) of a nano run."""
    shards = ShardSet.open(train)
    source = Source(shard_samples=tuple(shard.samples for shard in shards.manifest.shards))
    return int(BatchOrder([source], seed=0, global_batch=BATCH).batch(step - 1)[0][slot])


def paint(directory, sample, colour):
    """Put a picture of one colour in the place of a sample: its key, label and neighbours stay."""
    shards = ShardSet.open(directory)
    rows = np.array(shards.index)
    offset, size = int(rows[sample]["offset"]), int(rows[sample]["size"])
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(buffer, "PNG", optimize=True)
    picture, end = buffer.getvalue()[:-12], buffer.getvalue()[-12:]
    room = size - len(picture) - len(end) - 12
    assert room >= 0, "the picture does not fit into the place of the old one"
    body = b"paDd" + bytes(room)
    data = picture + struct.pack(">I", room) + body + struct.pack(">I", zlib.crc32(body)) + end
    with open(shards.path(int(rows[sample]["shard"])), "r+b") as file:
        file.seek(offset)
        file.write(data)
    rows[sample]["digest"] = xxhash.xxh3_64_intdigest(data)
    save_index(directory, rows)


@pytest.fixture(scope="module")
def planted(digits, tmp_path_factory):
    """(shards, ids): a red image in step 3 and a green one in step 8, on the first and the last rank of two."""
    directory = tmp_path_factory.mktemp("planted") / "shards"
    shutil.copytree(digits[0], directory)
    ids = sample_of(directory, 3, 5), sample_of(directory, 8, 20)
    for sample, colour in zip(ids, (RED, GREEN)):
        paint(directory, sample, colour)
    return directory, ids


def run(run_dir, train, *, code=0, **options):
    result = runs.run(run_dir, train, **{**PLAIN, **options})
    assert result.returncode == code, result.stderr
    return result


def without(run_dir, train, ids, **options):
    """The trajectory of an undisturbed run whose data lacks `ids`."""
    run(run_dir, train, data__exclude=list(ids), **options)
    assert not (run_dir / "guard.jsonl").exists()
    return runs.trajectory(run_dir)


def trips(run_dir):
    return [(row["step"], row["blamed"], row["ids"], row["action"]) for row in read_jsonl(run_dir / "guard.jsonl")]


def rolled_back(run_dir):
    """(step of the trouble, step gone back to) of each."""
    return [(event["step"], event["to_step"]) for event in runs.events(run_dir, "rolled_back")]


@pytest.mark.fault(
    15, "run: an image of NaN loss at 3, a tenfold loss at 8, NaN in a parameter at 10, on one rank of two"
)
def test_what_was_planted_is_found_blamed_and_left_out(planted, tmp_path):
    train, (red, green) = planted
    run_dir = tmp_path / "run"
    run(run_dir, train, fault=f"{FAULT};nan_parameter_once:10")
    assert trips(run_dir) == [
        (3, "samples", [red], "rolled back"),
        (8, "samples", [green], "rolled back"),
        (10, "ranks", [], "rolled back"),
    ]
    # There was no checkpoint yet at step 3.
    assert rolled_back(run_dir) == [(3, 0), (8, 4), (10, 8)]
    nan, spike, parameter = runs.events(run_dir, "guard")
    assert nan["trouble"] == "loss that is not finite" and "a spike above" in spike["trouble"]
    reader = ImageReader([ShardSet.open(train)])
    assert [sample["key"] for sample in nan["samples"]] == [reader.read_key(red)]
    assert parameter["samples"] == [] and list(parameter["ranks"]) == ["1"]

    # The rest equals, bit for bit, a run that never had the two.
    assert runs.trajectory(run_dir) == without(tmp_path / "clean", train, (red, green))
    skipped = {(row["step"], row["id"]): row for row in read_jsonl(run_dir / "skipped.jsonl")}
    assert set(skipped) == {(3, red), (8, green)}
    reason = skipped[8, green]["reason"]
    assert reason.startswith("left out by the loss guard after step 8: loss") and skipped[8, green]["excluded"]

    # What was saved for viewing is what was planted.
    for step, sample, slot, colour in ((3, red, 5, RED), (8, green, 20, GREEN)):
        folder = run_dir / f"guard/step_{step:08d}"
        saved = json.loads((folder / "batch.json").read_text())
        assert len(saved["samples"]) == BATCH == len(list(folder.glob("*.png")))
        [bad] = [entry for entry in saved["samples"] if entry["blamed"]]
        assert (bad["id"], bad["slot"], bad["rank"]) == (sample, slot, slot // 12)
        assert (bad["loss"] is None) == (step == 3) and all(e["loss"] for e in saved["samples"] if not e["blamed"])
        assert Image.open(folder / bad["image"]).getpixel((16, 16)) == colour

    # A resume leaves them out too, in the next epoch as well, and on another number of ranks.
    options = {"train__max_steps": 28, "data__workers": 0}
    run(run_dir, train, nproc=1, fault=FAULT, **options)
    assert len(trips(run_dir)) == 3
    later = [row for row in read_jsonl(run_dir / "skipped.jsonl") if row["epoch"] == 1]
    assert sorted(row["id"] for row in later) == sorted((red, green))


@pytest.mark.fault(15, "run: a parameter that turns NaN again after every roll-back, until the budget is spent")
def test_a_spent_budget_ends_with_exit_5_and_the_batch_saved(planted, tmp_path):
    train, ids = planted
    run_dir = tmp_path / "run"
    options = {**SINGLE, "data__exclude": list(ids), "guard__max_rollbacks": 2}
    result = run(run_dir, train, code=5, fault="nan_parameter:6", **options)
    assert trips(run_dir) == [(6, "ranks", [], "rolled back")] * 2 + [(6, "ranks", [], "stopped")]
    assert rolled_back(run_dir) == [(6, 4)] * 2
    assert "guard.max_rollbacks 2" in result.stderr and "guard/step_00000006_3" in result.stderr
    assert runs.exit_record(run_dir)["code"] == 5
    assert (run_dir / "guard/step_00000006_3/batch.json").exists()
    assert not any(math.isnan(row["loss"] or 0) for row in read_metrics(run_dir / "metrics.jsonl").values())
    # No checkpoint holds what is not finite, and started again the same run ends well.
    assert runs.steps(run_dir) == [4]
    run(run_dir, train, **options)
    assert runs.trajectory(run_dir) == without(tmp_path / "clean", train, ids, **SINGLE)


FP16_ON_CPU = """
import sys
from swin_scale.cli import main
from tests.engine.test_engine import allow_fp16_on_cpu
allow_fp16_on_cpu()
sys.exit(main())
"""
MOE = {"model__name": "swin_moe_nano_patch4_window4_32", "moe__ep_size": 2, "moe__capacity_factor": 0}
LAYOUTS = {
    "stage 0": {"engine__zero_stage": 0, "optim__ema_decay": 0.9},
    "stage 2, bf16, accumulation": {"engine__zero_stage": 2, "engine__precision": "bf16", "train__micro_batch": 4},
    "stage 3, bf16, average": {"engine__zero_stage": 3, "engine__precision": "bf16", "optim__ema_decay": 0.9},
    "fp16": {"engine__precision": "fp16", "program": FP16_ON_CPU, "train__micro_batch": 6},
    "experts on two ranks": {"engine__zero_stage": 2, **MOE},
    "SimMIM": {"task": "simmim", "simmim__mask_patch_size": 8, "train__micro_batch": 6},
}


@pytest.mark.proof
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.fault(15, "run: the same images and parameter under ZeRO 0, 2, 3, bf16, fp16, accumulation, EP, SimMIM")
def test_every_layout_proof(planted, tmp_path, layout):
    train, (red, green) = planted
    options = {"train__max_steps": 9, **layout}
    run(tmp_path / "run", train, fault=f"{FAULT};nan_parameter_once:6", **options)
    assert trips(tmp_path / "run") == [
        (3, "samples", [red], "rolled back"),
        # ZeRO-3 gathers parameters anew after a skipped update: what was wrong on one rank is gone by then.
        (6, "nobody" if layout.get("engine__zero_stage") == 3 else "ranks", [], "rolled back"),
        (8, "samples", [green], "rolled back"),
    ]
    assert rolled_back(tmp_path / "run") == [(3, 0), (6, 4), (8, 4)]
    assert runs.trajectory(tmp_path / "run") == without(tmp_path / "clean", train, (red, green), **options)


@pytest.mark.proof
@pytest.mark.fault(15, "run: an infinite gradient of finite losses at 5, a spike at 8, stopped and started again at 6")
def test_nobody_to_blame_leaves_out_the_batch_and_restarts_change_no_verdict(planted, tmp_path):
    """What cannot be traced to samples leaves one step empty, which updates nothing."""
    train, (red, green) = planted
    options = {**SINGLE, "data__exclude": [red]}
    fault = f"{FAULT};inf_gradient:5"
    run(tmp_path / "whole", train, fault=fault, **options)
    for stop in (6, 12):
        run(tmp_path / "run", train, fault=fault, train__max_steps=stop, **options)
    rows = [read_jsonl(tmp_path / name / "guard.jsonl") for name in ("whole", "run")]
    for a, b in zip(*rows, strict=True):
        assert {**a, "time": 0, "evidence": ""} == {**b, "time": 0, "evidence": ""}  # the spike's limit among them
    assert trips(tmp_path / "run") == [(5, "batch", None, "rolled back"), (8, "samples", [green], "rolled back")]
    assert runs.trajectory(tmp_path / "run") == runs.trajectory(tmp_path / "whole")
    empty = read_metrics(tmp_path / "run/metrics.jsonl")[5]
    assert empty["skipped"] and empty["loss"] == 0
    listed = [row["id"] for row in read_jsonl(tmp_path / "run/skipped.jsonl") if row["step"] == 5]
    assert sorted(set(listed)) == sorted(sample_of(train, 5, slot) for slot in range(BATCH))
    # A batch that caused nothing later comes again.
    everything = [sample_of(train, 5, slot) for slot in range(BATCH)]
    clean = without(tmp_path / "clean", train, [red, green, *everything], **SINGLE)
    assert clean == runs.trajectory(tmp_path / "run")

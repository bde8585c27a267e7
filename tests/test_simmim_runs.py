"""Runs of SimMIM through the command line: moved between layouts, handed over, drawn, continued with labels."""

import json
import re

import pytest
import torch

from swin_scale.checkpoint import Checkpoint, step_directory
from swin_scale.convert import convert, inspect_path, model_from_weights, read_state_dict
from swin_scale.errors import UserError
from swin_scale.evaluate import evaluate_weights
from swin_scale.predictor import load_predictor
from swin_scale.probe import probe
from tests import runs
from tests.test_elastic import checkpoint, difference, same_files

V2, MOE = "swinv2_nano_patch4_window4_32", "swin_moe_nano_patch4_window4_32"
SIMMIM = {
    "task": "simmim",
    "simmim__mask_patch_size": 8,
    "simmim__picture_every_steps": 8,
    "checkpoint__every_steps": "null",
    "optim__ema_decay": 0.9,
    "optim__clip_grad": 0.05,
    # Adam divides by the gradient's size; those of the position MLP start as small as the rounding of a sum over ranks.
    "optim__eps": 1e-6,
}
EXACT_MOE = {"model__name": MOE, "moe__capacity_factor": 0, "moe__gate_noise": 0, "moe__drop": 0}
SHORT = ((2, 3, 5, {}), (1, 1, 16, {"train__micro_batch": 8}))
CHAIN = ((3, 1, 4, {}), (1, 0, 8, {}), (4, 2, 14, {"train__micro_batch": 3}), (2, 3, 18, {}))
MOE_CHAIN = ((2, 1, 6, {"moe__ep_size": 2}), (4, 2, 12, {"moe__ep_size": 2}), (1, 1, 18, {}))
"""(ranks, ZeRO stage, step at which it is stopped, more); an epoch ends at step 13."""


def proof(*values):
    return pytest.param(*values, marks=pytest.mark.proof)


def run(run_dir, digits, code=0, **settings):
    settings = {"data__val": f"[{digits[1]}]", **SIMMIM, **settings}
    result = runs.run(run_dir, digits[0], timeout=300, **settings)
    assert result.returncode == code, result.stderr
    return result


@pytest.fixture(scope="module")
def steady(digits, tmp_path_factory):
    """16 steps on one process that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("simmim") / "run"
    run(run_dir, digits, nproc=1, train__max_steps=16, train__tensorboard="true")
    return run_dir


def assert_moved(steady, moved, last):
    """Losses, sample ids, parameters, moving averages, evaluations."""
    ours, theirs = runs.trajectory(moved), runs.trajectory(steady)
    assert [(step, digest) for step, _, _, digest in ours] == [(step, digest) for step, _, _, digest in theirs]
    assert len(theirs) == last
    assert max(abs(a[1] - b[1]) for a, b in zip(ours, theirs, strict=True)) < 1e-5
    found = difference(checkpoint(moved, last), checkpoint(steady, last))
    assert found["master"] < 1e-5 and found["ema"] < 1e-5
    evaluations = [
        {row["weights"]: row for row in runs.events(r, "eval") if row["step"] == last} for r in (moved, steady)
    ]
    for weights in ("master", "ema"):
        mine, other = (rows[weights] for rows in evaluations)
        assert mine["samples"] == other["samples"] == 50 and "top1" not in mine
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)


def move(run_dir, digits, chain, **settings):
    for ranks, stage, stop, more in chain:
        run(run_dir, digits, nproc=ranks, engine__zero_stage=stage, train__max_steps=stop, **settings, **more)


def test_a_run_moves_between_layouts_in_the_middle_of_an_epoch(steady, digits, tmp_path):
    move(tmp_path / "moved", digits, SHORT)
    assert_moved(steady, tmp_path / "moved", 16)


@pytest.mark.proof
@pytest.mark.parametrize(("chain", "settings"), [(CHAIN, {}), (MOE_CHAIN, EXACT_MOE)], ids=["dense", "experts"])
def test_a_long_chain_of_layouts(digits, tmp_path, chain, settings):
    last = chain[-1][2]
    run(tmp_path / "steady", digits, nproc=1, train__max_steps=last, **settings)
    move(tmp_path / "moved", digits, chain, **settings)
    assert_moved(tmp_path / "steady", tmp_path / "moved", last)


@pytest.mark.proof
@pytest.mark.parametrize(
    ("stage", "precision", "more"),
    [(1, "bf16", {}), (3, "bf16", {}), (2, "bf16", {**EXACT_MOE, "moe__ep_size": 2, "moe__gate_noise": 1})],
)
def test_stopping_and_starting_again_changes_no_bit(digits, tmp_path, stage, precision, more):
    """In the middle of an epoch, and over its end: with drop-path, accumulation, recomputation, a moving average and
    norm targets."""
    settings = {
        "nproc": 2, "engine__zero_stage": stage, "engine__precision": precision, "model__drop_path_rate": 0.2,
        "train__micro_batch": 6, "engine__activation_checkpointing": "selective", "simmim__norm_target": 7, **more,
    }  # fmt: skip
    for name, stops in (("whole", (16,)), ("parts", (7, 16))):
        for stop in stops:
            run(tmp_path / name, digits, **settings, train__max_steps=stop)
    assert runs.trajectory(tmp_path / "parts") == runs.trajectory(tmp_path / "whole")
    assert same_files(tmp_path / "parts", tmp_path / "whole", 16)


def test_what_a_run_leaves(steady):
    """Loss that falls, evaluations without accuracy, pictures as files, in TensorBoard and on the page."""
    losses = [loss for _, loss, _, _ in runs.trajectory(steady)]
    assert losses[-1] < 0.9 * losses[0]
    assert [row["file"] for row in runs.events(steady, "picture")] == [
        f"pictures/step_000000{n}.webp" for n in ("08", "16")
    ]
    from PIL import Image

    with Image.open(steady / "pictures" / "step_00000016.webp") as picture:
        assert picture.size == (8 * 98 + 2, 3 * 98 + 2)
    page = (steady / "report.html").read_text()
    assert page.count('src="data:image/webp;base64,') == 2 and "mean absolute error of hidden pixels" in page
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(steady / "tb"), size_guidance={"images": 0})
    board.Reload()
    assert [image.step for image in board.Images("pictures")] == [8, 16]
    assert "eval/loss" in board.Tags()["scalars"] and "eval/top1" not in board.Tags()["scalars"]
    config = (steady / "config.yaml").read_text()
    assert re.search(r"crop_scale: \[0.67, 1.0\] +# task simmim", config)
    with Checkpoint.open(step_directory(steady / "checkpoints", 16)) as saved:
        assert {"encoder.mask_token", "decoder.0.weight"} <= saved.parameters.keys()
        assert saved.model["overrides"]["num_classes"] == 0


def test_the_encoder_is_handed_over_with_every_key_accounted_for(steady, digits, tmp_path):
    network, info = model_from_weights(steady)
    assert info.name == V2 and network.variant.num_classes == 0
    with Checkpoint.open(step_directory(steady / "checkpoints", 16)) as saved:
        masters = saved.load_full("master")
    state = dict(network.named_parameters())
    assert all(torch.equal(value, masters[f"encoder.{name}"]) for name, value in state.items())
    for to, name in (("official", "w.pth"), ("safetensors", "w.safetensors"), ("timm", "t.safetensors")):
        report = convert(steady, tmp_path / name, to=to, kind="ema")
        taken = {line.source for line in (*report.copied, *report.converted)}
        dropped = {line.source: line.reason for line in report.dropped}
        assert taken | dropped.keys() == masters.keys()
        assert dropped.keys() == {"encoder.mask_token", "decoder.0.weight", "decoder.0.bias"}
    read, _ = read_state_dict(tmp_path / "w.pth")
    assert state.keys() <= read.keys()
    assert V2 in inspect_path(steady)
    figures = probe(str(steady), [str(digits[0])], [str(digits[1])], method="knn", workers=0)
    assert figures["samples"] == 50 and figures["train_samples"] == 300 and figures["top1"] > 20


def test_an_encoder_without_a_head_does_not_classify(steady, digits):
    with pytest.raises(UserError, match=r"has no classifier.*--probe"):
        evaluate_weights(str(steady), [str(digits[1])], workers=0)
    with pytest.raises(UserError, match="has no classifier"):
        load_predictor(str(steady))


def test_fine_tuning_starts_from_the_encoder(steady, digits, tmp_path):
    """The same command as from any weights; the log says where each key went, and the head is new."""
    settings = {"simmim__mask_patch_size": 32, "simmim__picture_every_steps": 1000, "task": "classify"}
    result = run(tmp_path / "tuned", digits, nproc=1, **settings, init__weights=steady, train__max_steps=2)
    assert "only for masked-image pre-training" in result.stderr + (tmp_path / "tuned/logs/rank0.log").read_text()
    with Checkpoint.open(step_directory(tmp_path / "tuned" / "checkpoints", 2)) as saved:
        assert "head.weight" in saved.parameters and "encoder.mask_token" not in saved.parameters
    assert not (tmp_path / "tuned" / "pictures").exists()
    refused = run(tmp_path / "tuned", digits, code=2, nproc=1, train__max_steps=3)
    assert 'task: "classify" -> "simmim" (impossible)' in refused.stderr
    assert json.loads((tmp_path / "tuned" / "exit.json").read_text())["code"] == 2

"""Runs of a mixture of experts through the command line: moved between numbers of ranks that share experts, refused."""

import dataclasses
import importlib.util
import json
import re
import sys

import pytest

from swin_scale.config_diff import diff_configs
from swin_scale.config_load import load_config
from swin_scale.errors import UserError
from swin_scale.job import architecture, prepare
from swin_scale.log import read_metrics
from swin_scale.models import variant
from tests import runs
from tests.test_elastic import checkpoint, difference, same_files

NAME = "swin_moe_nano_patch4_window4_32"
EXACT = {
    "model__name": NAME,
    "moe__capacity_factor": 0,
    "moe__gate_noise": 0,
    "moe__drop": 0,
    "engine__zero_stage": 1,
    "checkpoint__every_steps": "null",
    "optim__clip_grad": 0.05,
    "optim__ema_decay": 0.9,
    # Adam divides by the gradient's size; those of the position MLP start as small as the rounding of a sum over ranks.
    "optim__eps": 1e-6,
}
"""Dropless, no noise, no dropout; clipping binds on every step."""
SHORT = ((2, 2, 1, 3), (1, 1, 0, 6))
CHAIN = ((4, 4, 1, 5), (1, 1, 0, 10), (2, 2, 2, 15), (4, 4, 2, 20))
"""(ranks, EP, ZeRO stage, step at which it is stopped); an epoch ends at step 13."""


def proof(*values):
    return pytest.param(*values, marks=pytest.mark.proof)


def run(run_dir, digits, **settings):
    result = runs.run(run_dir, digits[0], timeout=300, **{"data__val": f"[{digits[1]}]", **settings})
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.parametrize("chain", [SHORT, proof(CHAIN)], ids=["short", "long"])
def test_a_run_moves_between_numbers_of_ranks_that_share_experts(digits, tmp_path, chain):
    """Against one process: losses, sample ids, parameters, moving average, evaluation."""
    steady, moved, last = tmp_path / "steady", tmp_path / "moved", chain[-1][-1]
    run(steady, digits, nproc=1, **EXACT, train__max_steps=last)
    for ranks, ep, stage, stop in chain:
        layout = {"nproc": ranks, "moe__ep_size": ep, "engine__zero_stage": stage}
        run(moved, digits, **{**EXACT, **layout}, train__max_steps=stop)
    ours, theirs = runs.trajectory(moved), runs.trajectory(steady)
    assert [(step, digest) for step, _, _, digest in ours] == [(step, digest) for step, _, _, digest in theirs]
    assert max(abs(a[1] - b[1]) for a, b in zip(ours, theirs, strict=True)) < 1e-5
    assert all(norm > EXACT["optim__clip_grad"] for _, _, norm, _ in theirs), "clipping does not bind"
    found = difference(checkpoint(moved, last), checkpoint(steady, last))
    assert found["master"] < 1e-5
    assert found["ema"] < 1e-5
    for mine, other in zip(runs.events(moved, "eval")[-2:], runs.events(steady, "eval"), strict=True):
        assert mine["weights"] == other["weights"]
        assert (mine["samples"], mine["top1"]) == (other["samples"], other["top1"])
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
    mine, other = (read_metrics(run_dir / "metrics.jsonl")[last]["aux_loss"] for run_dir in (moved, steady))
    assert mine == pytest.approx(other, abs=1e-6)
    assert other > 0


@pytest.mark.proof
def test_stopping_and_starting_again_changes_no_bit(digits, tmp_path):
    """Two ranks that share experts, with noise, capacity, dropout, drop-path, mixup, moving average, accumulation."""
    settings = {
        **EXACT, "nproc": 2, "moe__ep_size": 2, "moe__gate_noise": 1, "moe__capacity_factor": 1.25, "moe__drop": 0.1,
        "model__drop_path_rate": 0.3, "augment__mixup": 0.8, "train__micro_batch": 6,
    }  # fmt: skip
    for name, stops in (("whole", (16,)), ("parts", (7, 16))):
        for stop in stops:
            run(tmp_path / name, digits, **settings, train__max_steps=stop)
    assert runs.trajectory(tmp_path / "parts") == runs.trajectory(tmp_path / "whole")
    assert same_files(tmp_path / "parts", tmp_path / "whole", 16)


REFUSED = {
    "experts that do not divide": (3, {"moe.ep_size": 3}, "moe.ep_size 3 does not divide moe.experts 8"),
    "ranks that do not divide": (3, {"moe.ep_size": 2}, "moe.ep_size 2 does not divide the 3 ranks"),
    "stage 0": (2, {"moe.ep_size": 2, "engine.zero_stage": 0}, "set engine.zero_stage=1"),
    "stage 3": (2, {"moe.ep_size": 2, "engine.zero_stage": 3}, "set engine.zero_stage=1"),
    "a dense model": (1, {"model.name": "swinv2_nano_patch4_window4_32", "moe.top_k": 2}, "moe.top_k is 2"),
    "a dense model on Tutel": (
        1,
        {"model.name": "swin_nano_patch4_window4_32", "moe.backend": "tutel", "moe.aux_scope": "rank"},
        "moe.aux_scope is 'rank'",
    ),
    "more choices than experts": (1, {"moe.top_k": 9}, "moe.top_k: 9"),
    "an unknown router": (1, {"moe.router": "cosin"}, "expected one of linear, cosine"),
    "Tutel over all ranks": (1, {"moe.backend": "tutel"}, "set moe.aux_scope=rank"),
    "Tutel at stage 3": (
        1,
        {"moe.backend": "tutel", "moe.aux_scope": "rank", "engine.zero_stage": 3},
        "or moe.backend=native",
    ),
    "Tutel that is not there": (1, {"moe.backend": "tutel", "moe.aux_scope": "rank"}, "github.com/microsoft/tutel"),
}


def request(digits, tmp_path, ranks, settings):
    """What a run of `ranks` processes judges before it starts."""
    values = {**runs.NANO, "run.dir": tmp_path / "run", "data.train": f"[{digits[0]}]", "model.name": NAME, **settings}
    (tmp_path / "c.yaml").write_text("train: {}\n")
    return prepare(load_config(tmp_path / "c.yaml", [f"{key}={value}" for key, value in values.items()]), ranks)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_train_is_refused_with_the_key_and_the_fix(digits, tmp_path, monkeypatch, case):
    ranks, settings, message = REFUSED[case]
    monkeypatch.setitem(sys.modules, "tutel", None)
    with pytest.raises(UserError, match=re.escape(message)):
        request(digits, tmp_path, ranks, settings)


def test_the_resolved_config_and_the_checkpoint_say_what_the_name_says(digits, tmp_path):
    """Blanks are filled from the model's name, and what was set is kept; a model can be built again from it."""
    job = request(digits, tmp_path, 1, {"moe.experts": 4, "moe.capacity_factor": 0})
    assert (job.config.moe.experts, job.config.moe.top_k, job.config.moe.capacity_factor) == (4, 1, 0.0)
    assert architecture(job).moe == dataclasses.replace(variant(NAME).moe, num_experts=4, capacity_factor=0.0)
    assert None not in vars(job.config.moe).values()
    assert re.search(rf"top_k: 1 +# {NAME}", job.config_text)
    assert re.search(r"experts: 4 +# command line", job.config_text)
    again = json.loads(json.dumps(job.model))
    assert variant(again["name"], **again["overrides"]) == architecture(job)


def test_only_how_experts_are_spread_may_change_freely(digits, tmp_path):
    before = request(digits, tmp_path, 4, {}).config
    changed = {"moe.ep_size": 2, "moe.a2a_chunks": 1, "moe.experts": 4, "moe.aux_weight": 0.1}
    grades = {change.key: change.grade for change in diff_configs(before, request(digits, tmp_path, 4, changed).config)}
    assert grades == {
        "moe.ep_size": "safe",
        "moe.a2a_chunks": "safe",
        "moe.experts": "impossible",
        "moe.aux_weight": "needs --allow-change",
    }


TUTEL = {"moe__backend": "tutel", "moe__aux_scope": "rank", "model__name": NAME, "train__max_steps": 3, "nproc": 2}


@pytest.mark.skipif(importlib.util.find_spec("tutel") is None, reason="Tutel is not installed")
@pytest.mark.parametrize("ep", [1, 2])
def test_a_run_on_tutel_is_that_of_the_native_backend_and_resumes_on_it(digits, tmp_path, ep):
    """Noise, capacity and priorities as published: the same start, the same routing, the same three steps."""
    for backend in ("tutel", "native"):
        run(tmp_path / backend, digits, **{**TUTEL, "moe__backend": backend}, moe__ep_size=ep)
    ours, theirs = (runs.trajectory(tmp_path / backend) for backend in ("native", "tutel"))
    for (_, loss, norm, _), (_, other, other_norm, _) in zip(ours, theirs, strict=True):
        assert loss == pytest.approx(other, abs=1e-5)
        assert norm == pytest.approx(other_norm, rel=1e-4)
    run(tmp_path / "tutel", digits, **{**TUTEL, "moe__backend": "native", "train__max_steps": 6}, moe__ep_size=ep)
    assert list(read_metrics(tmp_path / "tutel" / "metrics.jsonl")) == list(range(1, 7))

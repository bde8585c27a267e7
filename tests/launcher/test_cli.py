"""`launch slurm` up to the submission: what it prints, freezes and refuses."""

import re
import shutil
from pathlib import Path

import pytest

from launcher import chain, slurm
from swin_scale.cli import main
from swin_scale.staged import load
from tests import runs

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
STAGED = """
run: {{dir: {run}}}
stages:
  - {{name: small, base: {base}}}
  - {{name: large, base: {base}, train: {{global_batch: 48}}, model: {{drop_path_rate: 0.3}}}}
"""


@pytest.fixture
def submitted(monkeypatch):
    """Scripts that were submitted, to a Slurm that takes all."""
    scripts = []
    monkeypatch.setattr(slurm, "submit", lambda script, **_: scripts.append(script) or "7")
    monkeypatch.setattr(slurm, "look_up", lambda job: None)
    return scripts


def arguments(tmp_path, train, *flags):
    _, _, _, _, config, *overrides = runs.command(tmp_path / "run", train, nproc=1)
    return ["launch", "slurm", config, "--nodes", "2", "--gpus-per-node", "1", *flags, *overrides]


def test_runs_in_stages_are_judged_and_frozen(tmp_path, capsys, submitted):
    """What is submitted is what was judged, whatever becomes of the files that it came from."""
    config = tmp_path / "staged.yaml"
    config.write_text(STAGED.format(run=tmp_path / "run", base=DEMO))
    argv = ["launch", "slurm", str(config), "train.log_every=5", "--nodes", "2", "--gpus-per-node", "1"]
    assert main([*argv, "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1].endswith(f"{tmp_path}/run {tmp_path}/run/submit.yaml --restart requeue")
    assert "global 50 = 2 ranks x 25 x 1 micro-batches; global 48 = 2 ranks x 24 x 1 micro-batches" in printed.err
    assert main([*argv, "--dry-run", "--tasks-per-node", "3", "--gpus-per-node", "0"]) == 2
    assert "does not divide over 6 ranks" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    asked = load(config, ["train.log_every=5"])
    assert main([*argv, "--skip-data-check"]) == 0
    config.unlink()
    frozen = load(tmp_path / "run" / "submit.yaml")
    assert frozen.configs == asked.configs and len(frozen.configs) == 2
    assert [stage.follows for stage in frozen.stages] == [False, True]


@pytest.mark.fault(18, "a shard that is missing where the job is submitted")
def test_shards_that_are_not_there_are_named_before_the_queue(digits, tmp_path, capsys, submitted):
    train = tmp_path / "train"
    shutil.copytree(digits[0], train)
    argv = arguments(tmp_path, train)
    _, second, _ = sorted(train.glob("*.tar"))
    second.unlink()
    assert main(argv) == 3
    said = capsys.readouterr().err
    assert f"{second} is named in manifest.json but missing" in said and "--skip-data-check" in said
    assert not (tmp_path / "run").exists() and submitted == []
    (train / "manifest.json").write_text("{")
    assert main([*argv, "data.val=[/nowhere]"]) == 3
    said = capsys.readouterr().err
    assert f"{train}/manifest.json is not valid JSON" in said and "/nowhere/manifest.json does not exist" in said
    assert main([*argv, "--dry-run"]) == 0
    assert "warning: " in capsys.readouterr().err
    assert main([*argv, "--skip-data-check"]) == 0
    assert submitted == [tmp_path / "run" / "submit.sbatch"]


def test_the_forecast_is_printed_where_the_gpu_is_known(digits, tmp_path, capsys, submitted):
    argv = arguments(tmp_path, digits[0], "--dry-run")
    assert main(argv) == 0
    printed = capsys.readouterr()
    assert "the kind of GPU is not known; --gpu forecasts memory and time for a100-40g" in printed.err
    assert printed.out.startswith("#!/usr/bin/env bash")
    for flags in (["--gpu", "H200"], ["--gpus-per-node", "h200:1"]):
        assert main([*argv, *flags]) == 0
        said = capsys.readouterr().err
        assert "on 2 x h200, 2 nodes" in said
        assert re.search(r"memory of a rank: fits\n(.*\n)*  = peak", said)
        assert "a step takes" in said and "a checkpoint is" in said
    large = ["model.name=swinv2_g3b_patch4_window12_192", "data.img_size=192", "train.global_batch=16"]
    assert main([*argv, "--gpu", "a100-40g", *large]) == 0
    assert re.search("warning: a rank needs .* GB and a a100-40g has", capsys.readouterr().err)


def test_a_submission_by_hand_hears_of_bad_nodes(digits, tmp_path, capsys, submitted):
    (tmp_path / "run").mkdir()
    for restart in range(2):
        chain.record(tmp_path / "run", "blamed", "6", restart=restart, node="n2", why="task 1: Killed")
    assert main(arguments(tmp_path, digits[0])) == 0
    assert "warning: node n2 interrupted this run 2 times; --exclude n2?" in capsys.readouterr().err
    row = chain.read_chain(tmp_path / "run")[-1]
    assert (row["event"], row["job"], row["nodes"]) == ("submitted", "7", 2)

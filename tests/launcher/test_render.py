"""The batch script: six clusters' worth of text, read again by eye when it changes; and what is refused before it."""

import dataclasses
import shlex
import subprocess
from pathlib import Path

import pytest

from launcher.render import TEMPLATE, BatchJob, gpu_count, render, time_limit_s
from swin_scale.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
BASE = BatchJob(
    name="pretrain",
    run_dir="/scratch/runs/pretrain",
    config="/scratch/runs/pretrain/submit.yaml",
    workdir="/home/ada/swin",
    python="/home/ada/venv/bin/python",
    nodes=2,
    tasks_per_node=1,
    gpus_per_node=None,
)


def shape(**changes):
    return dataclasses.replace(BASE, **changes)


SHAPES = {
    "cpu_2x1": BASE,
    "h100_8x8": shape(
        nodes=8, tasks_per_node=8, gpus_per_node="8", cpus_per_task=12, mem="0", time="24:00:00", partition="gpu",
        account="vision", options=(("exclusive", ""),),
    ),
    "a100_16x4_typed": shape(
        nodes=16, tasks_per_node=4, gpus_per_node="a100:4", cpus_per_task=16, time="2-00:00:00", partition="boost",
        account="EUHPC_R01", qos="long", constraint="a100_40g&ib", signal_lead_s=300,
    ),
    "one_node_no_requeue": shape(
        nodes=1, tasks_per_node=4, gpus_per_node="4", mem="400G", time="7-0", partition="small", restart="chain",
        allow_change=True,
    ),
    "h200_64x8_exclude": shape(
        nodes=64, tasks_per_node=8, gpus_per_node="8", cpus_per_task=24, time="12:00:00", partition="high,low",
        exclude="n[017-019,233]", signal_lead_s=900, after="4711",
        options=(("reservation", "swin"), ("comment", "3B, second try"), ("switches", "1@60:00")),
    ),
    "odd_names": shape(
        name="it's 50% #1", run_dir="/data/my runs/50%", config="/data/my runs/50%/submit.yaml",
        workdir="/data/my runs", python="/opt/py 3/bin/python",
        tasks_per_node=2, gpus_per_node="2", restart="never", time="90",
    ),
}  # fmt: skip
"""Six clusters: what they name, count, allow and forbid."""


@pytest.mark.parametrize("name", SHAPES)
def test_text_of_six_cluster_shapes(name):
    """After a change on purpose: write ``render(SHAPES[name], ...)`` to the file, and read what git says of it."""
    text = render(SHAPES[name], TEMPLATE.read_text())
    assert text == (GOLDEN / f"{name}.sbatch").read_text()


@pytest.mark.parametrize("name", SHAPES)
def test_bash_reads_it_and_finds_the_words_that_went_in(name):
    job, text = SHAPES[name], render(SHAPES[name], TEMPLATE.read_text())
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""
    command = shlex.split(text.splitlines()[-1])
    assert command[:4] == ["exec", job.python, "-m", "launcher.batch"]
    assert command[4:6] == [job.run_dir, job.config]
    assert "@" not in "".join(line for line in text.splitlines() if not line.startswith("#"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": 0}, "--nodes is 0"),
        ({"tasks_per_node": 0}, "--tasks-per-node is 0"),
        ({"cpus_per_task": 0}, "--cpus-per-task is 0"),
        ({"gpus_per_node": "8", "tasks_per_node": 4}, "one task runs on one GPU"),
        ({"gpus_per_node": "many"}, "a type and a number such as a100:8"),
        ({"time": "tomorrow"}, "--time is 'tomorrow'"),
        ({"time": "2", "signal_lead_s": 120}, "leaves nothing of --time 2"),
        ({"bad_node_limit": -1}, "--exclude-after is -1"),
        ({"signal_lead_s": 5}, "choose 60 to 65535"),
        ({"partition": "a\n#SBATCH --uid=0"}, "cannot hold line ends"),
        ({"name": 'a"b'}, "double quotes"),
        ({"options": (("signal", "USR2@5"),)}, "set by the launcher; use --signal-lead"),
        ({"options": (("--wrap", "x"),)}, "not the long name of an option"),
        ({"options": (("comment", "a\nb"),)}, "cannot hold line ends"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(UserError, match=message):
        render(shape(**changes), TEMPLATE.read_text())


def test_a_limit_of_ones_own_reaches_the_supervisor():
    assert "--restart requeue --exclude-after=0\n" in render(shape(bad_node_limit=0), TEMPLATE.read_text())


def test_gpus_and_time_limits_as_sbatch_reads_them():
    assert [gpu_count(text) for text in (None, "8", "a100:4", "nvidia_a100-sxm4:2")] == [0, 8, 4, 2]
    limits = {"90": 5400, "90:30": 5430, "1:00:00": 3600, "2-0": 172800, "1-6": 108000, "1-6:30": 109800,
              "1-00:00:05": 86405, "UNLIMITED": None}  # fmt: skip
    assert {text: time_limit_s(text) for text in limits} == limits

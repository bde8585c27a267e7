"""Each check finds what is injected, and nothing where nothing is wrong."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest

from swin_scale.cli import main
from swin_scale.doctor import machine, storage
from swin_scale.doctor.cli import exit_code
from swin_scale.doctor.data import NO_CHANCE, chance, check_data
from swin_scale.doctor.examine import before_step_one, examine
from swin_scale.doctor.finding import ok, raise_refusals, refuse, warn
from swin_scale.doctor.machine import check_port, check_versions, numbers
from swin_scale.doctor.ranks import judge, judge_devices
from swin_scale.doctor.storage import check_storage, measure_storage
from swin_scale.engine import fragments
from swin_scale.errors import DataError, UserError
from swin_scale.shards import ShardSet, load_index, save_index
from tests.plan.configs import make_config
from tests.spawn import spawn_dist

NANO = "swinv2_nano_patch4_window4_32"
VERSIONS = {"torch": "2.13.0+cpu", "deepspeed": "0.19.8", "triton": "3.9.0"}


def verdicts(findings):
    return {finding.check: finding.verdict for finding in findings}


def nano(run_dir, train, **sections):
    return make_config(NANO, 4, run={"dir": str(run_dir)}, data={"train": [str(train)], "workers": 0}, **sections)


@pytest.mark.parametrize(
    ("says", "version"),
    [
        ("echo 580.65.06; echo 580.65.06", "580.65.06"),
        ("echo Driver/library version mismatch; echo NVML library version: 580.65; exit 18", None),
        ("sleep 60 & wait", None),
    ],
    ids=["two GPUs", "failed", "hung"],
)
def test_the_driver_is_asked_without_waiting_for_one_that_hangs(tmp_path, monkeypatch, says, version):
    """What it has started may keep the pipe open long after it was killed."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{says}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    if "sleep" in says:
        monkeypatch.setattr(machine, "DRIVER_S", 0.5)
    began = time.monotonic()
    assert machine._driver() == version
    assert time.monotonic() - began < 55, "waited for what it had started"


@pytest.mark.parametrize(
    ("changed", "verdict", "text"),
    [
        ({}, "ok", "0.19.8"),
        ({"deepspeed": "0.19.7"}, "refuse", "pip install 'deepspeed"),
        ({"deepspeed": "0.20.1"}, "refuse", "0.20.1 is outside"),
        ({"deepspeed": None}, "refuse", "not installed"),
    ],
)
def test_versions_of_deepspeed(changed, verdict, text):
    found = next(f for f in check_versions(None, {**VERSIONS, **changed}.get) if f.check == "deepspeed")
    assert found.verdict == verdict and text in str(found)


def test_versions_that_a_config_asks_for():
    assert verdicts(check_versions(None, {**VERSIONS, "torch": "2.9.1"}.get))["torch"] == "refuse"
    config = make_config("swin_moe_nano_patch4_window4_32", 4, moe={"backend": "tutel", "aux_scope": "rank"})
    assert verdicts(check_versions(config, VERSIONS.get))["tutel"] == "refuse"
    config = make_config(NANO, 4, engine={"kernels": "triton", "layer_norm": "apex"})
    found = verdicts(check_versions(config, VERSIONS.get))
    assert found["triton"] == found["apex"] == "refuse"
    assert fragments.SUPPORTED == machine.DEEPSPEED
    assert numbers("2.13.0rc1+cu130")[:2] == (2, 13)


def test_namesake_of_apex(monkeypatch):
    monkeypatch.setattr(machine, "why_not_apex", lambda: "the package apex in x is not NVIDIA's but the web toolkit")
    assert verdicts(check_versions(None, VERSIONS.get))["apex"] == "warn"


def test_ports():
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        taken = check_port({"MASTER_PORT": str(busy.getsockname()[1])})
    assert taken.verdict == "refuse" and "MASTER_PORT" in taken.fix
    assert check_port({"MASTER_PORT": "70000"}).verdict == check_port({"MASTER_PORT": "x"}).verdict == "refuse"
    assert check_port({}).verdict == "ok"


def test_cores():
    assert machine.check_cores(0, 1).verdict == "ok"
    assert machine.check_cores(1000, 1).verdict == "warn"


def test_storage_is_measured_and_left_clean(tmp_path):
    speed = measure_storage(tmp_path, size=4 << 20)
    assert speed.write > 0 and speed.read > 0 and speed.fsync_s >= 0
    assert list(tmp_path.iterdir()) == []


def test_storage(tmp_path, monkeypatch):
    later = tmp_path / "made" / "later"
    assert set(verdicts(check_storage(later, size=1e6, keep=2, probe=1 << 20)).values()) == {"ok"}
    assert not later.exists()
    disk = os.statvfs(tmp_path)
    free = disk.f_bavail * disk.f_frsize
    assert verdicts(check_storage(tmp_path, size=free / 2.5, keep=9))["space"] == "warn"
    (lack,) = [f for f in check_storage(tmp_path, size=free * 2.0, keep=2) if f.check == "space"]
    assert lack.verdict == "refuse" and "run.dir" in lack.fix
    monkeypatch.setattr(storage, "SLOW_SAVE_S", 0.0)
    assert verdicts(check_storage(tmp_path, size=1e6, keep=2))["storage"] == "warn"
    assert verdicts(check_storage(tmp_path, size=None, keep=2)) == {"storage": "ok"}
    (unwritable,) = check_storage(storage.Path("/proc/run"), size=1e6, keep=2)
    assert unwritable.verdict == "refuse" and "run.dir" in unwritable.fix


def damaged(train, to, count):
    """A copy of a shard set, the first byte of `count` images changed."""
    shutil.copytree(train, to)
    shards = ShardSet.open(to)
    for row in shards.index[:count]:
        with open(shards.path(int(row["shard"])), "r+b") as file:
            file.seek(int(row["offset"]))
            file.write(b"?")
    return to


def test_data(digits, tmp_path):
    train, val = digits
    (good,) = check_data([str(train), str(val)])
    assert good.verdict == "ok" and "350 samples in 2 sets; 32 read" in good.text
    (bad,) = check_data([str(damaged(train, tmp_path / "bad", 300))])
    assert bad.verdict == "refuse" and bad.data and "digest" in bad.text and "shards verify" in bad.fix
    (one,) = check_data([str(damaged(train, tmp_path / "one", 1))], samples=300)
    assert one.verdict == "warn"
    (gone,) = check_data([str(tmp_path / "gone")])
    assert gone.verdict == "refuse" and gone.data and "shards write" in str(gone)
    assert chance(2, 8, 0.01) > NO_CHANCE > chance(3, 8, 0.01)
    assert chance(0, 8, 0.01) == pytest.approx(1.0) and chance(8, 8, 0.5) == 0.5**8
    unlabelled = shutil.copytree(train, tmp_path / "unlabelled")
    index = load_index(unlabelled).copy()
    index["label"] = -1
    save_index(unlabelled, index)
    assert verdicts(check_data([str(unlabelled)])) == {"data.train": "refuse"}
    assert verdicts(check_data([str(unlabelled)], labelled=False)) == {"data.train": "ok"}
    (tmp_path / "bad" / ShardSet.open(train).manifest.shards[0].name).unlink()
    (torn,) = check_data([str(tmp_path / "bad")])
    assert torn.verdict == "refuse" and "missing" in torn.text


def reports(count=8, **odd):
    """Of so many like ranks on two machines, the last one with `odd`."""
    same = {"device": "NVIDIA H200", "versions": {"torch": "2.13.0"}, "matmul_s": 0.0015, "all_reduce_s": 0.002}
    found = [{**same, "rank": r, "host": f"node{r // 4}", "time": (100.0 + r / 1000, 100.1)} for r in range(count)]
    found[-1].update(odd)
    return found


@pytest.mark.parametrize(
    ("odd", "check", "verdict", "text"),
    [
        ({"matmul_s": 0.0020}, "matmul", "warn", "rank 7 on node1 1.33 times"),
        ({"versions": {"torch": "2.12.0"}}, "versions", "refuse", "torch 2.13.0 and 2.12.0"),
        ({"device": "NVIDIA H100"}, "devices", "warn", "NVIDIA H100"),
        ({"time": (108.0, 108.1)}, "clocks", "warn", "at least 7.9 s between ranks; rank 7 on node1"),
    ],
)
def test_peers(odd, check, verdict, text):
    assert set(verdicts(judge(reports())).values()) == {"ok"}
    found = {finding.check: finding for finding in judge(reports(**odd))}
    assert found[check].verdict == verdict and text in found[check].text and found[check].fix
    assert {name for name, finding in found.items() if finding.verdict != "ok"} == {check}


def test_a_slow_machine():
    slow = [{**r, "all_reduce_s": 0.004 if r["host"] == "node2" else 0.002} for r in reports(16)]
    found = {finding.check: finding for finding in judge(slow)}
    assert found["all-reduce"].verdict == "warn" and "machine node2 2.00 times" in found["all-reduce"].text


def test_a_slow_gpu_of_this_machine(monkeypatch):
    (alone,) = judge_devices()
    assert alone.check == "matmul" and alone.verdict == "ok"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    (slow,) = judge_devices([1.0, 1.01, 1.3, 1.0])
    assert slow.verdict == "warn" and "GPU 2 1.30 times" in slow.text


def test_exit_codes():
    assert exit_code([ok("a", "x"), warn("b", "x", "y")]) == 0
    assert exit_code([refuse("a", "x", "y", data=True)]) == 3
    assert exit_code([refuse("a", "x", "y", data=True), refuse("b", "x", "y")]) == 2
    raise_refusals([ok("a", "x")])
    with pytest.raises(DataError, match="a: x; y"):
        raise_refusals([refuse("a", "x", "y", data=True)])
    with pytest.raises(UserError):
        raise_refusals([refuse("a", "x", "y", data=True), refuse("b", "x", "y")])


def _look(dist, good, gone):
    quick = [str(finding) for finding in before_step_one(good, dist, size=1e6)]
    try:
        before_step_one(gone, dist, size=1e6)
    except DataError as error:
        return quick, str(error), verdicts(examine([good], dist=dist))
    return quick, "nothing was raised", {}


def test_two_ranks(digits, tmp_path):
    good, gone = nano(tmp_path / "run", digits[0]), nano(tmp_path / "run", tmp_path / "gone")
    (quick, raised, first), (quick_too, raised_too, second) = spawn_dist(2, _look, good, gone)
    assert quick == quick_too and len(quick) == 7 and all(line.startswith("ok") for line in quick)
    assert raised == raised_too and "does not exist" in raised
    assert {"ranks", "versions", "matmul", "all-reduce", "clocks", "storage", "data.train"} <= set(first)
    assert "refuse" not in first.values() and "data.train" not in second


def write_config(tmp_path, train):
    path = tmp_path / "c.yaml"
    path.write_text(
        f"run: {{dir: {tmp_path}/run}}\ndata: {{train: [{train}], workers: 0}}\nmodel: {{name: {NANO}}}\n"
        "optim: {lr: 1e-3}\ntrain: {global_batch: 4}\n"
    )
    return path


def test_the_verb(digits, tmp_path, capsys):
    path = write_config(tmp_path, digits[0])
    assert main(["doctor", str(path), "--json"]) == 0
    found = {row["check"]: row for row in json.loads(capsys.readouterr().out)}
    assert found["data.train"]["verdict"] == found["space"]["verdict"] == "ok"
    assert main(["doctor", str(path), f"data.train=[{tmp_path}/gone]"]) == 3
    assert "1 refused" in capsys.readouterr().out
    assert main(["doctor", str(path), "engine.kernels=triton"]) == 2
    assert main(["doctor", str(path), f"data.train=[{tmp_path}/gone]", "engine.kernels=triton"]) == 2
    (tmp_path / "run").mkdir()
    shutil.copy(path, tmp_path / "run" / "config.yaml")
    capsys.readouterr()
    assert main(["doctor", "--run", str(tmp_path / "run")]) == 0
    assert "data.train" in capsys.readouterr().out


@pytest.mark.proof
def test_the_verb_from_several_processes(digits, tmp_path):
    path = write_config(tmp_path, digits[0])
    command = [sys.executable, "-m", "swin_scale", "doctor", str(path), "--nproc", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 on 1 machine" in done.stdout
    done = subprocess.run([*command, f"data.train=[{tmp_path}/gone]"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done.stdout + done.stderr

"""One run per directory: who is alive, who is dead, and what cannot be known from here."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys

import pytest

from swin_scale.errors import UserError
from swin_scale.run_lock import claim, judge, this_process

ME = dataclasses.replace(this_process(), host="node1", boot="boot-a", namespace="pid:[1]")
GONE = (1 << 22) + 1
"""Above the largest process id of Linux."""


def other(**changes):
    return dataclasses.replace(ME, **changes)


@pytest.mark.fault(26, "lock of a dead, renamed, rebooted, requeued or distant owner")
@pytest.mark.parametrize(
    ("owner", "lock", "verdict"),
    [
        (other(), True, "alive"),
        (other(), None, "alive"),
        (other(host="renamed"), True, "alive"),
        (other(pid=GONE), True, "dead"),
        (other(pid=GONE, host="renamed"), None, "dead"),
        (other(start=ME.start - 1), True, "dead"),  # the id was given to another process
        (other(pid=GONE, namespace="pid:[2]"), True, "dead"),  # a container that would hold the lock
        (other(pid=GONE, namespace="pid:[2]"), None, "unknown"),
        (other(pid=1, boot="boot-b"), True, "dead"),  # this machine was booted since
        (other(pid=1, boot="boot-b", host="node2"), True, "unknown"),
        (other(pid=1, boot="boot-b", host="node2"), None, "unknown"),
        (other(boot="boot-b", host="node2", job="7", restart=0), None, "replaced"),
        (other(boot="boot-b", host="node1", job="7", restart=0), None, "replaced"),
        (other(job="7", restart=0), False, "replaced"),  # on this machine, and still there
        (other(job="7", restart=0, namespace="pid:[2]"), False, "replaced"),
        (other(job="7", restart=0, namespace="pid:[2]"), True, "dead"),
        (other(job="7", restart=0, pid=GONE), False, "dead"),
        (other(boot="boot-b", host="node2", job="7", restart=1), None, "unknown"),
        (other(boot="boot-b", host="node2", job="8", restart=0), None, "unknown"),
    ],
)
def test_verdicts(owner, lock, verdict):
    assert judge(owner, dataclasses.replace(ME, job="7", restart=1), lock_is_ours=lock) == verdict


@pytest.mark.parametrize(("over", "verdict"), [(True, "replaced"), (False, "alive"), (None, "unknown")])
def test_slurms_word_on_another_job(over, verdict):
    owner = other(boot="boot-b", host="node2", job="6")
    assert judge(owner, ME, lock_is_ours=True, job_is_over=over) == verdict
    assert judge(other(boot="boot-b", host="node2"), ME, lock_is_ours=True, job_is_over=over) == "unknown"


def test_many_machines_are_called_localhost():
    me = dataclasses.replace(ME, host="localhost")
    assert judge(other(host="localhost", boot="boot-b"), me, lock_is_ours=True) == "unknown"


def put(run_dir, **changes):
    (run_dir / "lock").mkdir(parents=True, exist_ok=True)
    path = run_dir / "lock" / f"{len(os.listdir(run_dir / 'lock'))}.json"
    path.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(this_process(), **changes))))
    return path


def test_dead_owners_are_removed_and_the_record_goes_with_its_owner(tmp_path):
    stale = put(tmp_path, pid=GONE)
    with claim(tmp_path):
        assert not stale.exists()
        assert len(list((tmp_path / "lock").glob("*.json"))) == 1
    assert list((tmp_path / "lock").glob("*.json")) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"host": "node2", "boot": "b", "pid": 12}, "process 12 on node2, and .* cannot be seen .* remove .*json"),
        ({}, "is in use by process"),
    ],
)
def test_living_and_unknown_owners_are_left_alone(tmp_path, changes, message):
    record = put(tmp_path, **changes)
    with pytest.raises(UserError, match=message), claim(tmp_path):
        raise AssertionError
    assert [path.name for path in (tmp_path / "lock").glob("*.json")] == [record.name]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1}', "[" * 5000, "\0" * 100_000])
def test_unreadable_records_are_not_taken_for_dead(tmp_path, text):
    (tmp_path / "lock").mkdir()
    (tmp_path / "lock" / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"remove .*x\.json"), claim(tmp_path):
        raise AssertionError


HOLD = """
import sys, time
from pathlib import Path
from swin_scale.errors import UserError
from swin_scale.run_lock import claim
try:
    with claim(Path(sys.argv[1])):
        print("mine", flush=True)
        began = time.monotonic()
        time.sleep(float(sys.argv[2]))
        print(*(f"{t} " for t in (began, time.monotonic()) if "--times" in sys.argv), end="", flush=True)
except UserError as error:
    print(error, flush=True)
"""


def hold(run_dir, seconds, *options):
    argv = [sys.executable, "-c", HOLD, str(run_dir), str(seconds), *options]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)


@pytest.mark.fault(26, "eight processes ask for one run directory at once")
@pytest.mark.parametrize("locks", [True, False], ids=["with-file-locks", "without"])
def test_at_most_one_of_many_gets_it(tmp_path, locks, monkeypatch):
    """Without file locks it is the records alone that decide, as on some shared file systems."""
    if not locks:
        monkeypatch.setattr(sys.modules[__name__], "HOLD", "import fcntl\ndel fcntl.lockf\n" + WITHOUT + HOLD)
    for _ in range(3):
        started = [hold(tmp_path, 1.0, "--times") for _ in range(8)]
        said = [process.communicate(timeout=60)[0] for process in started]
        spans = sorted(tuple(map(float, text.split()[1:])) for text in said if text.startswith("mine\n"))
        # On a busy machine one may come so late that it is the first's successor.
        assert all(ended < began for (_, ended), (began, _) in itertools.pairwise(spans)), said
        assert spans or not locks
        assert all("in use by" in text for text in said if not text.startswith("mine\n")), said


WITHOUT = """
def unsupported(*_):
    raise OSError(95, "Operation not supported")
fcntl.lockf = unsupported
"""


@pytest.mark.fault(26, "owner killed with -9, the next one comes at once")
def test_a_killed_owner_is_followed_at_once(tmp_path):
    first = hold(tmp_path, 60)
    assert first.stdout.readline() == "mine\n"
    refused = hold(tmp_path, 0)
    assert f"in use by process {first.pid}" in refused.communicate(timeout=60)[0]
    first.kill()
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # not reaped: a zombie is dead too
    assert hold(tmp_path, 0).communicate(timeout=60)[0] == "mine\n"
    first.wait()


@pytest.mark.fault(26, "the owner's node was lost, not its process: the job's next generation comes")
@pytest.mark.parametrize("locks", [True, False], ids=["with-file-locks", "without"])
def test_a_new_generation_of_the_job_ends_the_old_one(tmp_path, locks, monkeypatch):
    """The old process ends by itself, before the new one goes on, and never without one."""
    code = HOLD if locks else "import fcntl\ndel fcntl.lockf\n" + WITHOUT + HOLD

    def generation(restart, seconds):
        argv = [sys.executable, "-c", QUICK + code, str(tmp_path), str(seconds)]
        env = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restart)}
        return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    old = generation(0, 60)
    assert old.stdout.readline() == "mine\n"
    new = generation(1, 0)
    assert new.communicate(timeout=60)[0] == "mine\n"
    assert old.wait(60) == 6
    again = generation(1, 60)
    assert again.stdout.readline() == "mine\n"
    assert "in use by process" in generation(1, 0).communicate(timeout=60)[0]
    assert again.poll() is None
    again.kill()
    again.wait()


QUICK = "import swin_scale.run_lock as r\nr.WATCH_S, r.FENCE_S = 0.05, 0.5\n"


@pytest.mark.fault(7, "run directory below a file, or not writable")
def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    message = r"run\.dir .*file/run cannot be written: Not a directory; make it writable"
    with pytest.raises(UserError, match=message), claim(tmp_path / "file" / "run"):
        raise AssertionError

"""Starting ranks here: their environment, whose exit code counts, signals, and that nothing stays behind."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from launcher.local import Exit, first_cause, launch_local, shared_environment
from launcher.processes import state
from swin_scale.errors import UserError

WORKER = "tests.launcher.worker"


def launch(directory, *modes, nproc=2, grace_s=0.5, **options):
    return launch_local(nproc, [str(directory), *modes], module=WORKER, grace_s=grace_s, **options)


def left_by(directory):
    return [json.loads(path.read_text()) for path in sorted(directory.glob("rank*.json"))]


def alive(directory):
    """Recorded processes that still run (zombies, which only wait to be read, do not)."""
    found = []
    for pid in (pid for rank in left_by(directory) for pid in rank["pids"]):
        try:
            with open(f"/proc/{pid}/stat") as file:
                state = file.read().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state not in "ZX":
            found.append(pid)
    return found


def nobody_is_left(directory):
    """Once those that were killed have come to die, which takes until they get a core."""
    wait_until(lambda: alive(directory) == [])


def is_pending(pid, number):
    """Whether a signal has been sent to a process that has not taken it yet."""
    with open(f"/proc/{pid}/status") as file:
        [mask] = [line.split()[1] for line in file if line.startswith("ShdPnd:")]
    return bool(int(mask, 16) >> (number - 1) & 1)


def wait_until(condition, seconds=50.0):
    """Less than the minute after which ranks, and their workers, would end by themselves."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def start_launcher(directory, *modes):
    """A launcher as a process of its own, once both of its ranks run."""
    code = f"from tests.launcher.test_local import launch; raise SystemExit(launch({str(directory)!r}, *{modes!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(left_by(directory)) == 2)
    return process


def test_ranks_see_torchruns_variables_and_rank_0_has_the_terminal(tmp_path, capfd):
    assert launch(tmp_path, "exit0", nproc=3, log_dir=tmp_path / "logs") == 0
    ranks = left_by(tmp_path)
    for rank, body in enumerate(ranks):
        seen = body["environment"]
        assert (seen["RANK"], seen["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (seen["WORLD_SIZE"], seen["LOCAL_WORLD_SIZE"], seen["MASTER_ADDR"]) == ("3", "3", "127.0.0.1")
        assert body["argv"][1:] == [str(tmp_path), "exit0"]
    assert len({body["environment"]["MASTER_PORT"] for body in ranks}) == 1
    assert capfd.readouterr().out == "rank 0 says exit0\n"
    assert (tmp_path / "logs" / "rank2.out").read_text() == "rank 2 says exit0\n"


def test_environment_keeps_what_the_user_set():
    shared = shared_environment({"OMP_NUM_THREADS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True", "RANK": "7"}, 2)
    assert shared["OMP_NUM_THREADS"] == "3"
    assert "TORCHELASTIC_USE_AGENT_STORE" not in shared
    assert int(shared_environment({}, 10_000)["OMP_NUM_THREADS"]) == 1
    with pytest.raises(UserError, match="--nproc is 0"):
        launch_local(0, [])


@pytest.mark.parametrize(
    ("exits", "rank"),
    [
        ([(0, 0, 1), (1, 0, 1)], None),
        ([(1, 3, 1), (0, 6, 5)], 1),
        ([(0, 6, 1), (1, 3, 4)], 1),  # rank 0 noticed the loss of rank 1 before rank 1 had ended
        ([(0, 6, 1), (1, -9, 1)], 1),
        ([(1, -9, 1), (0, 1, 3)], 1),  # what follows a death is not its cause
        ([(1, -9, 2), (0, 4, 2)], 0),  # noticed together: the more specific one
        ([(0, 6, 1), (1, 6, 2)], 0),
        ([(1, 2, 1), (0, 2, 1)], 0),
        ([(1, 5, 3), (0, 0, 1)], 1),
    ],
)
def test_first_cause(exits, rank):
    cause = first_cause([Exit(rank=rank, code=code, tick=tick) for rank, code, tick in exits])
    assert (cause.rank if cause else None) == rank


def test_being_ended_by_the_launcher_is_no_cause():
    exits = [Exit(rank=0, code=-15, tick=3, asked=True), Exit(rank=1, code=6, tick=1)]
    assert first_cause(exits).rank == 1
    assert first_cause(exits[:1]) is None


def test_the_first_failure_ends_the_others_and_gives_its_code(tmp_path, caplog):
    start = time.monotonic()
    assert launch(tmp_path, "stubborn", "exit3") == 3
    assert time.monotonic() - start < 50  # where it did not end the other one, that would go on for a minute
    nobody_is_left(tmp_path)  # nor the worker of the rank that ignored SIGTERM
    assert "last lines of rank 1:\nrank 1 says exit3" in caplog.text
    assert "rank 1 ended first, with exit code 3" in caplog.text


def test_a_killed_rank_is_a_lost_peer(tmp_path, caplog):
    assert launch(tmp_path, "sleep", "killed") == 6
    assert "rank 1 was killed by SIGKILL" in caplog.text
    nobody_is_left(tmp_path)


@pytest.mark.parametrize(
    ("sent", "modes", "code"),
    [
        (signal.SIGUSR1, ("graceful",), 75),
        (signal.SIGTERM, ("graceful",), 0),
        (signal.SIGTERM, ("sleep",), 128 + signal.SIGTERM),
    ],
)
def test_signals_reach_every_rank(tmp_path, sent, modes, code):
    process = start_launcher(tmp_path, *modes)
    process.send_signal(sent)
    assert process.wait(50) == code, process.stderr.read()
    nobody_is_left(tmp_path)
    process.communicate()


def test_a_second_interrupt_ends_ranks_that_ignore_the_first(tmp_path):
    process = start_launcher(tmp_path, "stubborn")
    ranks = [rank["pids"][0] for rank in left_by(tmp_path)]
    for pid in ranks:  # SIGINT would end them by KeyboardInterrupt; stop them so that nothing does
        os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: all(state(pid) == "T" for pid in ranks))
    process.send_signal(signal.SIGINT)
    # Two that came before the launcher looked would be one.
    wait_until(lambda: all(is_pending(pid, signal.SIGINT) for pid in ranks))
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(50) == 128 + signal.SIGINT
    nobody_is_left(tmp_path)
    process.communicate()


def test_killing_the_launcher_leaves_no_process(tmp_path):
    process = start_launcher(tmp_path, "stubborn")
    assert len(alive(tmp_path)) == 4  # two ranks, each with a worker
    process.kill()
    process.communicate()  # also: nobody holds on to our pipes
    nobody_is_left(tmp_path)

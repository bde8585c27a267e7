"""The watchdog of a rank, with ranks that have no torch and no collectives; whole runs are in `tests/test_hangs.py`."""

import contextlib
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher import crash
from launcher.processes import Process, children, describe, holding, output_of, state
from launcher.watchdog import STACK_SIGNAL, Limits, Patience, Settings, Watchdog
from swin_scale import heartbeat
from swin_scale.heartbeat import WARM_UP, Beat, Pulse, begin_life, read_beat
from swin_scale.log import read_jsonl
from swin_scale.sections import Section, Sections
from tests.launcher.watched import STEP, watchdogs

ROOT = Path(__file__).resolve().parents[2]
HOST = os.uname().nodename


# -- limits ------------------------------------------------------------------------------------------------------------


def beat(section, stretches, longest_s=0.0):
    return Beat(section=section, since=0.0, step=9, count=9, stretches=stretches, longest_s=longest_s, ended=False)


@pytest.mark.parametrize(
    ("section", "stretches", "longest_s", "limit"),
    [
        (Section.FORWARD, 0, 0.0, 540),  # kernels compile: before the collectives give up
        (None, WARM_UP, 0.0, 540),
        (Section.CHECKPOINT, 1, 0.0, 1800),
        (Section.EVALUATION, WARM_UP, 0.0, 1800),
        (Section.FORWARD, WARM_UP + 1, 0.3, 240),
        (Section.CHECKPOINT, WARM_UP + 1, 100.0, 600),
        (Section.CHECKPOINT, WARM_UP + 1, 200.0, 1000),
    ],
)
def test_limits_are_learned(section, stretches, longest_s, limit):
    assert Limits(hang_s=240, timeout_s=600).of(beat(section, stretches, longest_s)) == limit


def test_nothing_hangs_sooner_than_the_user_says():
    assert Limits(hang_s=240, timeout_s=60).of(beat(Section.FORWARD, 0)) == 240
    assert Limits(hang_s=5, timeout_s=60).of(beat(Section.FORWARD, 99, 0.001)) == 5


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def test_time_in_which_the_watchdog_slept_too_does_not_count():
    """A suspended job, or a machine that was moved."""
    clock = Clock()
    patience = Patience(5.0, clock)
    assert patience.waited(7) == 0
    clock.now += 3600
    assert patience.waited(7) == 5
    clock.now += 1
    assert patience.waited(7) == 6
    clock.now += 1
    assert patience.waited(8) == 0


class Simulation:
    """Sections on a clock that a test moves, and the watchdog's judgement once a second of it."""

    def __init__(self, *, hang_s=240.0, timeout_s=600.0):
        self.clock = Clock()
        descriptor = heartbeat.heartbeat_memory()
        self.sections = Sections(clock=self.clock)
        self._pulse = Pulse(descriptor, self.sections, clock=self.clock)
        self._memory = mmap.mmap(descriptor, heartbeat.SIZE)
        os.close(descriptor)
        self._limits, self._patience = Limits(hang_s=hang_s, timeout_s=timeout_s), Patience(5.0, self.clock)
        self.late_at: float | None = None

    def spend(self, seconds):
        while seconds > 0 and self.late_at is None:
            passed = min(seconds, 1.0)
            self.clock.now += passed
            seconds -= passed
            seen = read_beat(self._memory)
            if self._patience.waited(seen.count) > self._limits.of(seen):
                self.late_at = self.clock.now

    def do(self, section, seconds):
        with self.sections(section):
            self.spend(seconds)


def clean_steps(simulation, rng, steps):
    """What a healthy run of a big model does: slow first steps, heavy tails, evaluations, saves."""
    for step in range(steps):
        simulation.sections.step = step
        first = 400.0 if step == 0 else 1.0
        simulation.do(Section.DATA, 0.05 * rng.lognormvariate(0, 1.5) + (45 if rng.random() < 0.005 else 0))
        simulation.do(Section.FORWARD, first + rng.lognormvariate(0, 0.5))
        simulation.do(Section.BACKWARD, first / 2 + 2 * rng.lognormvariate(0, 0.5))
        simulation.do(Section.OPTIMIZER, 0.3)
        if step % 100 == 99:
            simulation.do(Section.CHECKPOINT, rng.uniform(60, 250))
        if step % 250 == 249:
            with simulation.sections(Section.EVALUATION):
                for _ in range(400):
                    simulation.sections.alive()
                    simulation.spend(rng.uniform(1, 9))


@pytest.mark.fault(14, "1,000 clean steps: slow first ones, stalls of storage, long saves and evaluations")
@pytest.mark.parametrize("seed", range(2))
def test_1000_clean_steps_give_no_alarm(seed):
    simulation = Simulation()
    clean_steps(simulation, random.Random(seed), 1000)
    assert simulation.late_at is None


@pytest.mark.parametrize("section", [Section.DATA, Section.FORWARD, Section.BACKWARD, Section.OPTIMIZER])
def test_a_hang_is_seen_within_five_minutes(section):
    simulation = Simulation()
    clean_steps(simulation, random.Random(0), 30)
    assert simulation.late_at is None
    began = simulation.clock.now
    simulation.do(section, 3600)
    assert simulation.late_at - began <= 300 - 30  # the rest is for the other watchdogs to answer


# -- processes ---------------------------------------------------------------------------------------------------------


def test_a_process_is_known_by_more_than_its_number():
    child = subprocess.Popen([sys.executable, "-IS", "-c", "input()"], stdin=subprocess.PIPE)
    process = Process(child.pid)
    assert process.is_alive() and child.pid in children(os.getpid()) and not process.wait(0)
    assert str(child.pid) in describe(child.pid) and "State:" in describe(child.pid)
    os.kill(child.pid, signal.SIGSTOP)
    wait_for(lambda: state(child.pid) == "T", "its standstill")
    assert crash.stopped_children(os.getpid()) == (child.pid,)
    assert holding(child.pid, STACK_SIGNAL) == set()
    process.signal(STACK_SIGNAL)
    assert holding(child.pid, STACK_SIGNAL) == {str(child.pid)}  # it has not come to answer
    process.kill()
    assert process.wait(60) and not process.is_alive()  # a zombie is dead
    child.wait()
    assert not Process(child.pid).is_alive() and state(child.pid) == ""
    child.stdin.close()


def test_the_first_alarm_of_a_life_counts(tmp_path):
    begin_life(tmp_path, "now")
    assert crash.find_alarm(tmp_path, "now") is None
    assert crash.raise_alarm(tmp_path, "now") and not crash.raise_alarm(tmp_path, "now")
    bundle = crash.find_alarm(tmp_path, "now")
    assert bundle.is_dir() and [bundle] == list((tmp_path / "crash").iterdir())
    assert crash.find_alarm(tmp_path, "then") is None
    crash.withdraw_alarm(tmp_path)
    assert crash.raise_alarm(tmp_path, "now")
    assert crash.find_alarm(tmp_path, "now") != bundle  # also within the same second


# -- two ranks, one fault ----------------------------------------------------------------------------------------------

FAULTS = ("stopped", "gil", "killed", "worker", "frozen", "stall", "none")


class Ranks:
    """Two ranks and their watchdogs in one run directory."""

    def __init__(self, run_dir, fault):
        self.run_dir, self.fault = run_dir, fault
        run_dir.mkdir()
        begin_life(run_dir, f"life of {fault}")
        (run_dir / "config.yaml").write_text("run: {}\n")
        (run_dir / "metrics.jsonl").write_text("".join(f'{{"step": {i + 1}}}\n' for i in range(300)))
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.launcher.watched", str(run_dir), str(rank), "2", fault],
                cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True,
            )
            for rank in range(2)
        ]  # fmt: skip

    def shown(self):
        """What everybody may read: (step, section) by rank."""
        return {rank: (one.step, one.section) for rank, one in heartbeat.read_statuses(self.run_dir).items()}

    def freeze(self):
        """Stop the last rank's watchdog, and the rank too where its machine is to hang."""
        section = {"frozen": "forward", "stall": "optimizer"}[self.fault]
        wait_for(lambda: self.shown().get(1) == (STEP, section), "the rank that is to freeze")
        for pid in (watchdogs(self.run_dir)[1], *[self.processes[1].pid] * (self.fault == "frozen")):
            os.kill(pid, signal.SIGSTOP)
            wait_for(lambda: state(pid) == "T", "its standstill")  # noqa: B023 - called here
        (self.run_dir / "met").touch()

    def thaw(self):
        self.processes[1].send_signal(signal.SIGCONT)
        for pid in watchdogs(self.run_dir).values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def ended(self):
        """Whether both have."""
        codes = [process.poll() for process in self.processes]
        if self.fault in ("frozen", "stall") and codes[0] is not None:
            self.thaw()
        return None not in codes

    def outcome(self):
        """Run directory and exit codes, once the watchdogs have ended too."""
        wait_for(lambda: not watchdogs(self.run_dir), "the watchdogs' end")
        errors = [process.communicate()[1].decode() for process in self.processes]
        assert not any(errors), errors
        return self.run_dir, [process.returncode for process in self.processes]


def wait_for(true, what, seconds=300):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """fault -> (run directory, exit codes), all of them met side by side: most of it is waiting."""
    root = tmp_path_factory.mktemp("watched")
    ranks = {fault: Ranks(root / fault, fault) for fault in FAULTS}
    try:
        for fault in ("frozen", "stall"):
            ranks[fault].freeze()
        wait_for(lambda: sum(pair.ended() for pair in ranks.values()) == len(FAULTS), "the ranks' end")
        return {fault: pair.outcome() for fault, pair in ranks.items()}
    finally:
        for pair in ranks.values():
            for process in pair.processes:
                process.kill()
                process.wait()
            pair.thaw()


def bundle_of(run_dir):
    [bundle] = (run_dir / "crash").iterdir()
    return bundle


@pytest.mark.fault(13, "a rank without torch: stopped, holding the GIL, killed, with a stopped child")
@pytest.mark.parametrize(
    ("fault", "section", "says"),
    [
        ("stopped", "backward", "stopped (SIGSTOP, or a debugger)"),
        ("gil", "optimizer", f"rank 0 waited in section forward after step {STEP + 1}"),
        ("killed", "checkpoint", "was killed"),
        ("worker", "data", "waiting for a loader worker that is stopped"),
    ],
)
def test_the_rank_to_blame_is_named_and_ended(ended, fault, section, says):
    run_dir, codes = ended[fault]
    assert codes == [6, -signal.SIGKILL]
    bundle = bundle_of(run_dir)
    [line] = (bundle / "verdict.txt").read_text().splitlines()
    assert line.startswith(f"rank 1 on {HOST} ") and f"in section {section} after step {STEP}" in line and says in line
    facts = json.loads((bundle / "verdict.json").read_text())
    assert (facts["rank"], facts["ranks"], facts["section"], facts["step"]) == (1, [1], section, STEP)
    record = json.loads((run_dir / "exit.json").read_text())
    assert (record["code"], record["rank"]) == (6, 1) and record["cause"].endswith(line)
    *_, event = read_jsonl(run_dir / "metrics.jsonl")
    assert (event["event"], event["problem"], event["ranks"]) == ("hang", line, [1])
    assert run_dir / event["bundle"] == bundle
    assert (bundle / "config.yaml").read_text() == "run: {}\n"
    assert [row["step"] for row in read_jsonl(bundle / "metrics.jsonl")][-2:] == [299, 300]
    assert len(read_jsonl(bundle / "metrics.jsonl")) == crash.ROWS


def test_stacks_are_kept_or_why_there_are_none(ended):
    gil, stopped = (bundle_of(ended[fault][0]) for fault in ("gil", "stopped"))
    for bundle in (gil, stopped):
        assert "in wait_for_the_others" in (bundle / "rank0.txt").read_text()
    assert "tests/launcher/watched.py" in (gil / "rank1.txt").read_text()
    assert "in meet" in (gil / "rank1.txt").read_text()  # though it holds the lock of the interpreter
    text = (stopped / "rank1.txt").read_text()
    assert "it is stopped, and a stopped process runs nothing (state T)" in text and "State: T (stopped)" in text
    assert "only NCCL keeps a flight record" in text


def test_a_stopped_worker_is_described_and_ended(ended):
    run_dir, _ = ended["worker"]
    pid = int((run_dir / "worker").read_text())
    text = (bundle_of(run_dir) / "rank1.txt").read_text()
    assert f"process {pid}: " in text and "State: T (stopped)" in text.partition(f"process {pid}: ")[2]
    wait_for(lambda: state(pid) in ("", "Z", "X"), "its end")


@pytest.mark.fault(13, "a machine frozen with its rank and its watchdog")
def test_a_frozen_machine_is_named_by_the_others(ended):
    run_dir, codes = ended["frozen"]
    assert codes == [-signal.SIGKILL, -signal.SIGKILL]  # it, once it wakes up, is told that it is too late
    text = (bundle_of(run_dir) / "verdict.txt").read_text()
    assert text.startswith(f"rank 1 on {HOST} gave no sign of life for ") and "nor did its watchdog" in text
    assert f"last seen in section forward after step {STEP}" in text


def test_what_goes_on_by_itself_is_left_alone(ended):
    run_dir, codes = ended["stall"]
    assert codes == [0, 0]
    text = (bundle_of(run_dir) / "verdict.txt").read_text()
    assert f"rank 0 on {HOST} went on by itself" in text and "engine.hang_timeout_s" in text
    assert not (run_dir / "exit.json").exists() and not (run_dir / "heartbeat" / "alarm").exists()
    assert read_jsonl(run_dir / "metrics.jsonl")[-1]["event"] == "stall"


def test_a_run_that_ends_well_leaves_no_bundle_and_no_process(ended):
    run_dir, codes = ended["none"]
    assert codes == [0, 0] and not (run_dir / "crash").exists()
    assert all(status.ended for status in heartbeat.read_statuses(run_dir).values())


def test_a_watchdog_is_nobodys_child(ended):
    assert all((run_dir / f"alone{rank}").exists() for run_dir, _ in ended.values() for rank in range(2))


@pytest.mark.parametrize("killed", [True, False])
def test_a_watchdog_leaves_another_life_alone(tmp_path, killed):
    """Slurm lost the node, but not its processes: by now the run directory is another generation's."""
    begin_life(tmp_path, "elsewhere")
    beats, clock = heartbeat.heartbeat_memory(), Clock()
    Pulse(beats, Sections(clock=clock), clock=clock)  # never late; that it has not shared yet is enough
    with subprocess.Popen([sys.executable, "-IS", "-c", "input()"], stdin=subprocess.PIPE) as process:
        settings = Settings(
            run_dir=str(tmp_path), life="here", rank=0, world=1, local_rank=0, pid=process.pid, hang_s=2.0,
            timeout_s=60.0, heartbeat=beats, stacks=beats,
        )  # fmt: skip
        watchdog = Watchdog(settings)
        if killed:
            process.kill()
            wait_for(lambda: state(process.pid) == "Z", "the rank's end")
        watchdog.run()
        assert [process.poll() is None, process.kill()] == [not killed, None]
    os.close(beats)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["heartbeat", "life"]


def test_a_command_that_gives_no_answer_is_left_behind():
    """Both streams of one that does, whatever its exit code."""
    assert output_of(["sh", "-c", "echo one; echo two >&2; exit 3"], 60) == "one\ntwo\n"
    with pytest.raises(TimeoutError, match=r"sleep 600 gave no answer within 0\.2 s"):
        output_of(["sleep", "600"], 0.2)
    with pytest.raises(FileNotFoundError):
        output_of(["no-such-command"], 1)
